"""Splits documents into training and held-out ones by the hash of their names, reproducibly on every machine."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter

FAR = 3.0
"""A warning is logged if the held-out share deviates by more than this factor."""

log = logging.getLogger(__name__)


def divide(names: list[str], sizes: list[int], share: float) -> tuple[list[int], list[int]]:
    """Indices of the training and of the held-out documents, each in the order of their hashes.

    A name is held out if its hash is in the lowest `share` of the hash range. Documents of one name are parts of one text (or
    have a generic title such as ``"Untitled"``), so they stay together. If the result deviates far from `share`, whole names
    are held out in the order of their hashes while they fit. If no name fits, the documents are split individually, and a
    warning is logged. Each split has at least one document.

    Args:
        names: names of the documents, at least two.
        sizes: their bytes.
        share: share of the text to hold out, above 0 and below 1.

    Example:
        >>> [len(side) for side in divide(["speech"] * 200, [10] * 200, 0.05)]
        [191, 9]
    """
    train, held_out = _by_hash([_hash(name) for name in names], share)
    if len(set(names)) < len(names) and _far(held_out, sizes, share):
        train, held_out = _by_whole_names(names, sizes, share)
        if _far(held_out, sizes, share):
            train, held_out = _by_hash([_hash(part) for part in _parts(names)], share)
            log.warning(
                "data.validation: %d documents share %d names (titles), and no whole names make up %g %% of the text; "
                "documents of one name are now in both splits. If they are parts of one text, use more titles",
                len(names),
                len(set(names)),
                100 * share,
            )
    if _far(held_out, sizes, share):
        log.warning(
            "data.validation: %g %% of the text was requested, and %.2g %% is held out: %d of %d whole documents",
            100 * share,
            100 * _share(held_out, sizes),
            len(held_out),
            len(names),
        )
    return train, held_out


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def _by_hash(hashes: list[int], share: float) -> tuple[list[int], list[int]]:
    order = sorted(range(len(hashes)), key=hashes.__getitem__)
    count = sum(value < share * 2.0**64 for value in hashes)
    count = min(max(count, 1), len(order) - 1)
    return order[count:], order[:count]


def _by_whole_names(names: list[str], sizes: list[int], share: float) -> tuple[list[int], list[int]]:
    """Holds out names in the order of their hashes up to the share; names that are too large are skipped."""
    hashes = {name: _hash(name) for name in set(names)}
    size_of: Counter[str] = Counter()
    for name, size in zip(names, sizes, strict=True):
        size_of[name] += size
    wanted, held, chosen = share * sum(sizes), 0, set()
    for name in sorted(hashes, key=hashes.__getitem__):
        if held < 0.5 * wanted and held + size_of[name] <= 2 * wanted:
            chosen.add(name)
            held += size_of[name]
    order = sorted(range(len(names)), key=lambda row: hashes[names[row]])
    return [row for row in order if names[row] not in chosen], [row for row in order if names[row] in chosen]


def _parts(names: list[str]) -> list[str]:
    """Makes names unique by appending their occurrence number."""
    seen: Counter[str] = Counter()
    found = []
    for name in names:
        seen[name] += 1
        found.append(f"{name}\n{seen[name]}")
    return found


def _share(rows: list[int], sizes: list[int]) -> float:
    return sum(sizes[row] for row in rows) / max(1, sum(sizes))


def _far(held_out: list[int], sizes: list[int], share: float) -> bool:
    """Whether the held-out or the training share deviates from the requested one by more than the factor `FAR`."""
    found = _share(held_out, sizes)
    return not (share / FAR <= found <= share * FAR and 1 - found >= (1 - share) / FAR)
