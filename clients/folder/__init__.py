"""A node's folder: its settings, keys, ledgers, claims on data, backups."""
