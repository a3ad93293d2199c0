"""Environments: what a GFlowNet builds step by step, and its reward. One file each; `base.py` defines the interface."""

from pondera.core.lazy_names import lazy_names

__getattr__, __dir__ = lazy_names(__name__, ("environment",), {})
