"""A federation on real machines: a server behind a proxy, nodes beside private data, operators. Composes the rest."""
