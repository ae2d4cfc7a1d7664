"""Attention: multi-head, and multi-head latent."""
