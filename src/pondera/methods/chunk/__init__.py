"""Chunk methods: models that read and predict units larger than a token. One file per method; `base.py` defines the
interface."""
