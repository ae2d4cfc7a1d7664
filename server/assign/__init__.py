"""Who takes part in a round, and which experts each node gets."""
