"""Small layers that everything else is built from."""
