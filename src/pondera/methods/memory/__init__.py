"""What a model learns to carry from one segment of a sequence to the next: one file per method."""

from pondera.core.lazy_names import lazy_names

__getattr__, __dir__ = lazy_names(__name__, ("memory",), {})
