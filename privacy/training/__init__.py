"""DP-SGD: the mechanism, the optimizer of a unit's steps, training that is charged."""
