"""Where records come from: sources, public test splits, partitions. Shared by nodes and server."""
