"""The cache folder for data that can be rebuilt: prepared corpora and compiled kernels."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder(given: Path | None = None) -> Path:
    """The given folder, else ``$PONDERA_CACHE``, else ``~/.cache/pondera``. It may not exist yet."""
    return Path(given or os.environ.get("PONDERA_CACHE") or "~/.cache/pondera").expanduser()
