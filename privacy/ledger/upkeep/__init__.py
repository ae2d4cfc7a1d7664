"""What keeps a ledger alive: copies, recovery, the machine's list of data folders."""
