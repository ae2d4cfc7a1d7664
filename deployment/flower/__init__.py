"""Flower's own processes, and the parts of it that are not public."""
