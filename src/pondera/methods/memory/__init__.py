"""Trained memories, carried from block to block of a sequence. One file per method; the base class is in `common/`."""

from pondera.core.lazy_names import lazy_names

__getattr__, __dir__ = lazy_names(__name__, ("memory",), {})
