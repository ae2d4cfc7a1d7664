"""The node as the unit: a trusted server's own mechanism and ledger."""
