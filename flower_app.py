"""Where Flower starts ``flwr run .``: it imports from the root of its bundle, and from nowhere else in it."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "src"))  # this code, whether or not Conclave is installed too

from conclave.simulations import client_app, server_app

client = client_app.app
server = server_app.app
