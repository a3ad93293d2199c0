"""Class names in results files that were written before a class was renamed; the files keep what was recorded."""

from __future__ import annotations

import re
from typing import Any

RENAMED = {"Full": "PreallocatedCache"}
_OLD = "|".join(RENAMED)
_ALONE_OR_CALLED = re.compile(rf"^(?:{_OLD})$|\b(?:{_OLD})(?=\()")
_AS_RECORDED = frozenset({"command"})


def with_current_names(recorded: Any) -> Any:
    """A result with today's class names in its keys and values; a recorded command stays as it was run.

    Example:
        >>> with_current_names({"command": "run --cache Full()", "rows": {"Full(exact=False)": ["Full", "Full attention"]}})
        {'command': 'run --cache Full()', 'rows': {'PreallocatedCache(exact=False)': ['PreallocatedCache', 'Full attention']}}
    """
    if isinstance(recorded, dict):
        return {
            _renamed(key): value if key in _AS_RECORDED else with_current_names(value)
            for key, value in recorded.items()
        }
    if isinstance(recorded, list):
        return [with_current_names(value) for value in recorded]
    return _renamed(recorded) if isinstance(recorded, str) else recorded


def _renamed(text: str) -> str:
    """`text` with a renamed class where it is the whole name or a call, such as ``Full() float32``."""
    return _ALONE_OR_CALLED.sub(lambda found: RENAMED[found[0]], text)
