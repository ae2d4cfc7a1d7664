"""Where records come from: sources, public test splits, partitions. Shared by nodes and server.

Importing this package tells the dataset libraries to stay offline, before they are imported.
"""

from privacy.no_callbacks import silence

silence()
