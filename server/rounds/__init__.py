"""One round after another: what it asks of nodes, and what it makes of their answers."""
