"""The seam `kv_cache`: KV cache compression without training, one file per method; `base.py` defines the interface."""

from pondera.core.lazy_names import lazy_names

__getattr__, __dir__ = lazy_names(__name__, ("kv_cache",), {})
