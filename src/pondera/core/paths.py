"""Where Pondera keeps what it can make again: prepared text, compiled kernels."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder(given: Path | None = None) -> Path:
    """The folder that was given; else ``$PONDERA_CACHE``, else ``~/.cache/pondera``. It need not be there yet."""
    return Path(given or os.environ.get("PONDERA_CACHE") or "~/.cache/pondera").expanduser()
