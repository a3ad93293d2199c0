"""All trained methods between the embeddings and the head of a model, with their seams."""

from __future__ import annotations

from pondera.core import spec
from pondera.models.method import Method


def _is_method(found: spec.MethodInfo) -> bool:
    return issubclass(getattr(spec._import(found), found.name), Method)


METHODS = [
    (found.seam, found.name)
    for found in spec.index().values()
    if found.seam in ("think", "chunk", "memory") and _is_method(found)
]
