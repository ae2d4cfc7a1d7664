"""A node's process beside private data."""
