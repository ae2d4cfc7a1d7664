"""What is read from a ledger: its history, whether it holds, what was spent."""
