"""How much of the past is remembered: one file per method, `base.py` is the seam."""

from pondera.core.lazy_names import lazy_names

__getattr__, __dir__ = lazy_names(__name__, ("kv_cache",), {})
