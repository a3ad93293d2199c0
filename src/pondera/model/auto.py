"""Makes transformers and lm-eval know Pondera without importing either.

Importing transformers takes seconds, and `pondera --help` must not pay for it; and `lm_eval --model pondera` starts in a
program that has never heard of us. So a finder at the front of `sys.meta_path` waits for their modules: after
transformers' AutoConfig has been executed, `model/config.py` is imported, which registers itself (and brings `model/lm.py`
in with the first config that is made); after lm-eval's list of models, our adapter is added to it by name.

`watch` is declared as a `torch.backends` entry point, which torch calls whenever it is imported: lm-eval 0.4.13 has no
plugin mechanism of its own (its next release has, and we declare that, too). It touches nothing of torch.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from types import ModuleType

AUTO_CONFIG = "transformers.models.auto.configuration_auto"
HARNESS_MODELS = "lm_eval.models"
ADAPTER = "pondera.jobs.harness:PonderaLM"


def announce() -> None:
    """Registers AdaptiveConfig now, or as soon as transformers' AutoConfig is imported."""
    if AUTO_CONFIG in sys.modules:
        _register_config()
    watch()


def watch() -> None:
    """Waits for transformers and lm-eval; imports nothing."""
    if not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


def _register_config() -> None:
    # When it was our config that asked for theirs, it is half-way through and will register itself at its end.
    importlib.import_module("pondera.model.config")


def _register_adapter() -> None:
    registry = importlib.import_module("lm_eval.api.registry").model_registry
    if "pondera" not in registry:
        registry.register("pondera", target=ADAPTER)


class _AfterImport(importlib.abc.MetaPathFinder):
    """Lets the normal finder find a module, and does what was waiting for it once it has run."""

    waiting: dict[str, Callable[[], None]] = {AUTO_CONFIG: _register_config, HARNESS_MODELS: _register_adapter}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in self.waiting:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        if spec is not None and spec.loader is not None:
            spec.loader = _RunThen(spec.loader, self.waiting[fullname])
        return spec


class _RunThen(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader, then: Callable[[], None]) -> None:
        self.loader, self.then = loader, then

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        # From here on the module is as it would have been without us.
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.then()
