"""A server's folder and process."""
