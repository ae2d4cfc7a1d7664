"""What an operator does from afar: enrol nodes, start and follow runs."""
