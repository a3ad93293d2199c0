"""Tested versions of transformers; importing this does not import transformers.

``tools/versions.py`` runs the contract suite and writes ``versions.json`` in this folder.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
from pathlib import Path

from packaging.version import Version


@functools.cache
def passed() -> tuple[str, ...]:
    """The versions of transformers that pass the contract suite, ascending."""
    found = json.loads(Path(__file__).with_suffix(".json").read_text())["transformers"]
    return tuple(sorted(found, key=Version))


def installed() -> str:
    """The installed version of transformers, read without importing it."""
    return importlib.metadata.version("transformers")


def was_tested(version: str) -> bool:
    """Whether a version of the same minor series was tested.

    Example:
        >>> was_tested("5.23.1"), was_tested("4.0.1")
        (True, False)
    """
    return Version(version).release[:2] in {Version(each).release[:2] for each in passed()}
