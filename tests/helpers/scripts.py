"""Scripts that are no part of the package, as modules."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[2]


def load(name: str, folder: str = ".") -> ModuleType:
    """A module of the repository that is not part of the package.

    Args:
        name: as it is imported, e.g. ``experiments.heads.run``.
        folder: what names start from; `benchmarks` holds scripts that import each other by their bare names.
    """
    path = str(ROOT / folder)
    sys.path.insert(0, path)
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(path)
