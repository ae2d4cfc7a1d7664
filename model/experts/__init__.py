"""Experts: stacked networks, and the MoE layer that routes tokens to them."""
