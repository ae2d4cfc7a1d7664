"""What makes training private: DP-SGD, accounting, the ledger, the one release door, the audit."""
