"""Formats in which owners keep private data, one file each; see :mod:`conclave.data.private_data`.

Everything is read in memory, by pyarrow, Pillow, numpy or the standard library, through files that are opened for
reading. Nothing is copied, cached, looked up elsewhere or unpickled.
"""
