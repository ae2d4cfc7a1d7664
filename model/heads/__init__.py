"""Heads: from tokens to scores and losses."""
