"""Probes: analyses of a trained model from its outputs and traces. One file per probe."""

from pondera.core.lazy_names import lazy_names

__getattr__, __dir__ = lazy_names(__name__, ("probe",), {})
