"""What runs in the middle: the Flower ServerApp, strategy, assignment, aggregation, checkpoints."""
