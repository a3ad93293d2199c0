"""Ways to look at a trained model from outside, one per file."""

from pondera.core.lazy_names import lazy_names

__getattr__, __dir__ = lazy_names(__name__, ("probe",), {})
