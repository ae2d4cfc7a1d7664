"""What runs beside private data: the Flower ClientApp, the trainer, the node and its policy.

Importing this package switches off every call-out of the libraries, before they are imported.
"""

from privacy.no_callbacks import silence

silence()
