"""Chunk methods, with units larger than a token. One file per method; `base.py` defines the interface."""

from pondera.core.lazy_names import lazy_names

__getattr__, __dir__ = lazy_names(__name__, ("chunk",), {})
