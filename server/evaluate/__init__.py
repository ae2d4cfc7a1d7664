"""How good a model is: on public data, or on noised sums from nodes."""
