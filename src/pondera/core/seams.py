"""The seams of a model: one setting each, for a run and for a model's config.

A new seam touches three places: a field here, a folder ``pondera/methods/<seam>/`` with its `base.py`, and the lines of
``models/adaptive_lm.py`` that run its method. The settings of runs, recipes, command line and ``config.json``, the index of
methods, and the imports from ``pondera`` follow from this table.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any


def option(default: Any, help: str) -> Any:
    """A dataclass field with its one-sentence help."""
    return field(default=default, metadata={"help": help})


@dataclass(kw_only=True)
class SeamSettings:
    """At most one method per seam, as a spec string."""

    think: str | None = option(None, "how much to compute, e.g. PonderLM2(thoughts=1)")
    kv_cache: str | None = option(None, "how much of the KV cache to keep, without training, e.g. SnapKV(1024)")
    memory: str | None = option(None, "a trained recurrent memory, e.g. ElasticMemory(block=64)")
    chunk: str | None = option(None, "how many tokens to predict at once, e.g. ConceptLM(chunk=4)")
    head: str | None = option(None, "the output head, e.g. VQLogits(codes=512)")


SEAMS = tuple(setting.name for setting in dataclasses.fields(SeamSettings))
"""What a model is made of."""
PARTS = ("quantize",)
"""Folders of methods that are arguments of others."""
PROBES = ("probe",)
"""Folders of probes, which observe a model and change nothing."""
FLOWS = ("objective", "environment")
"""Parts of GFlowNets: losses in ``pondera/methods/objective/``, environments in ``pondera/flows/environments/``."""
TASKS = ("task", "questions")
"""Data: synthetic tasks in ``pondera/data/tasks/``, and questions about a long context in ``pondera/data/questions/``."""
