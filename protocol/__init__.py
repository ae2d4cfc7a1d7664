"""What node and server agree on: the plan, the messages and their encodings, what a release is charged."""
