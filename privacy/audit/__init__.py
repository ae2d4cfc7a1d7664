"""Checks that attack the claim instead of trusting the code that makes it."""
