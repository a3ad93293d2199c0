"""Objectives of GFlowNets: one file per loss, each with the weight α of the forward step."""

from pondera.core.lazy_names import lazy_names

__getattr__, __dir__ = lazy_names(__name__, ("objective",), {})
