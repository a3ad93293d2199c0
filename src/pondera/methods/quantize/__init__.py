"""Discrete codes for vectors: codebooks, how they learn, and what can go wrong with them."""

from pondera.core.lazy_names import lazy_names

__getattr__, __dir__ = lazy_names(__name__, ("quantize",), {})
