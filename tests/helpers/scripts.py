"""Imports scripts of the repository that are not part of the package."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[2]


def load(name: str, folder: str = ".") -> ModuleType:
    """Imports a module of the repository that is not part of the package.

    Args:
        name: the name of the module, e.g. ``experiments.heads.run``.
        folder: the folder that names start from; scripts in `benchmarks` import each other by their bare names.
    """
    path = str(ROOT / folder)
    sys.path.insert(0, path)
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(path)
