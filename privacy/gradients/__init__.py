"""Clipped gradients of units: sampling, batches that memory holds, modes, clipping."""
