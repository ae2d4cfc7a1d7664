"""The one door through which anything leaves a node, and the releases besides deltas."""
