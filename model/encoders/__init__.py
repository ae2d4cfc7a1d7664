"""Encoders: from images, bytes and tables to tokens."""
