"""Chunk methods, with units larger than a token. One file per method; `base.py` defines the interface."""
