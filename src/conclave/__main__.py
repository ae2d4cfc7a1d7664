"""``python -m conclave``: the command line."""

from conclave.cli.main import main

main()
