"""Which versions of transformers the contract suite passed on; importing this imports nothing heavy.

``versions.json`` beside this file is written by ``tools/versions.py``.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
from pathlib import Path

from packaging.version import Version


@functools.cache
def passed() -> tuple[str, ...]:
    """The versions of transformers that were tested and passed, ascending."""
    found = json.loads(Path(__file__).with_suffix(".json").read_text())["transformers"]
    return tuple(sorted(found, key=Version))


def installed() -> str:
    """The version of transformers that is installed; asked without importing it."""
    return importlib.metadata.version("transformers")


def was_tested(version: str) -> bool:
    """Whether one of the minor series of a version was tested.

    Example:
        >>> was_tested("5.23.1"), was_tested("4.0.1")
        (True, False)
    """
    return Version(version).release[:2] in {Version(each).release[:2] for each in passed()}
