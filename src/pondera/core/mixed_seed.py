"""One seed from several numbers."""

from __future__ import annotations

import hashlib


def mixed_seed(*parts: int) -> int:
    """Hashes several numbers to one seed.

    Example:
        >>> mixed_seed(0, 1) == mixed_seed(1, 0)
        False
    """
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1
