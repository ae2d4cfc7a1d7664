"""What runs in the middle: a run and its rounds, assignment, checks of replies, aggregation, checkpoints."""
