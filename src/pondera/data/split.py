"""Which documents are held out: by the hash of their names, so that the same ones are held out everywhere."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter

FAR = 3.0
"""How many times as much, or as little, as was asked for is worth a word."""

log = logging.getLogger(__name__)


def divide(names: list[str], sizes: list[int], share: float) -> tuple[list[int], list[int]]:
    """Numbers of the training and of the held-out documents, each in the order of their hashes.

    A name is held out if its hash is among the lowest `share` of all hashes. Documents that share a name are parts of one
    text (or have no title of their own, such as ``"Untitled"``), so they stay together. Where that holds out far more or
    less than was asked for, whole names are held out in the order of their hashes, as far as they fit; and where no name
    fits, the parts are divided by themselves, and a warning says so. Each side has at least one document.

    Args:
        names: of at least two documents.
        sizes: their bytes.
        share: what is to be held out, more than 0 and less than 1.

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
                "documents of one name are now on both sides. If they are parts of one text, give them more titles",
                len(names),
                len(set(names)),
                100 * share,
            )
    if _far(held_out, sizes, share):
        log.warning(
            "data.validation: %g %% of the text was asked for, and %.2g %% is held out: %d of %d documents, which are not cut",
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
    """Names in the order of their hashes, until they are enough; those that are too large for that are passed over."""
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
    """Names with the number of their occurrence."""
    seen: Counter[str] = Counter()
    found = []
    for name in names:
        seen[name] += 1
        found.append(f"{name}\n{seen[name]}")
    return found


def _share(rows: list[int], sizes: list[int]) -> float:
    return sum(sizes[row] for row in rows) / max(1, sum(sizes))


def _far(held_out: list[int], sizes: list[int], share: float) -> bool:
    """Whether the share of the text, or what is left, is several times what was asked for, or a fraction of it."""
    found = _share(held_out, sizes)
    return not (share / FAR <= found <= share * FAR and 1 - found >= (1 - share) / FAR)
