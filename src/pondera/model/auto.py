"""Makes transformers' Auto classes know Pondera without importing transformers first.

Importing transformers takes seconds, and `pondera --help` must not pay for it. `model/config.py` registers itself when it
is imported (and brings `model/lm.py` in with the first config that is made); this file sees to it that it is imported as
soon as transformers' own AutoConfig has been, through a finder at the front of `sys.meta_path`.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType

THEIRS = "transformers.models.auto.configuration_auto"
OURS = "pondera.model.config"


def announce() -> None:
    """Registers AdaptiveConfig now, or as soon as transformers' AutoConfig is imported."""
    if THEIRS in sys.modules:
        importlib.import_module(OURS)
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


class _AfterImport(importlib.abc.MetaPathFinder):
    """Lets the normal finder find transformers' AutoConfig, and imports our config once that has run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != THEIRS:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenOurs(spec.loader)
        return spec


class _ThenOurs(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader) -> None:
        self.loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        # When it was our config that asked for theirs, it is half-way through and will register itself at its end.
        importlib.import_module(OURS)
