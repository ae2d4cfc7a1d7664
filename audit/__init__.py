"""Checks that an outsider can repeat: of ledgers, of a run, of a model's gradients, of releases."""
