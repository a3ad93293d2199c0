"""Writes a card for every method from the results files, and the short form for the package.

    python -m tools.cards            rewrites results/cards/ and src/pondera/cards.json
    python -m tools.cards --check    exits with 1 if one of these files is out of date

A card has the claim of the paper, the verdict, and every measurement with its unit, seeds, file and command.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from pondera.core.cards import FILE
from tools.claims import CLAIMS, Claim
from tools.measured import ROOT, Measure

CARDS = ROOT / "results" / "cards"


def files() -> dict[Path, str]:
    """Every generated file and its text."""
    measured = {name: claim.measured() for name, claim in sorted(CLAIMS.items())}
    cards = {CARDS / f"{name}.json": _json(card(name, CLAIMS[name], found)) for name, found in measured.items()}
    short = {
        name: {"claim": CLAIMS[name].claim, "verdict": CLAIMS[name].verdict, "measured": line(CLAIMS[name], found)}
        for name, found in measured.items()
    }
    return {**cards, FILE: _json(short)}


def card(name: str, claim: Claim, measured: list[Measure]) -> dict[str, object]:
    """The full card of a method."""
    full = {
        "method": name,
        "claim": claim.claim,
        "verdict": claim.verdict,
        "measured": [m.to_dict() for m in measured],
    }
    return full | ({"note": claim.note} if claim.note else {})


def line(claim: Claim, measured: list[Measure]) -> str:
    """The measurements in one line, grouped by experiment."""
    sentences = []
    for (setting, seeds), group in groupby(measured, lambda one: (one.setting, one.seeds)):
        size = f"{setting}, {seeds} seeds" if seeds else setting
        text = f"{'; '.join(_series(list(group)))} ({size})."
        sentences.append(text[0].upper() + text[1:])
    return " ".join([*sentences, *([claim.note] if claim.note else [])])


def _series(measured: list[Measure]) -> Iterator[str]:
    """Labels with numbers; neighbours whose labels differ only after the last comma share the common part."""
    for common, group in groupby(measured, lambda one: one.what.rpartition(", ")[0]):
        ones = list(group)
        if len(ones) == 1 or not common:
            yield from (f"{one.what}: {one.number()}" for one in ones)
        else:
            yield f"{common}: " + ", ".join(f"{one.what.rpartition(', ')[2]} {one.number()}" for one in ones)


def _json(value: object) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


def main() -> None:
    wanted = files()
    stale = [path for path, text in wanted.items() if not path.is_file() or path.read_text() != text]
    gone = [path for path in CARDS.glob("*.json") if path not in wanted]
    names = [str(path.relative_to(ROOT)) for path in stale + gone]
    if "--check" in sys.argv:
        if names:
            print("out of date; run python -m tools.cards:", *names)
        sys.exit(bool(names))
    CARDS.mkdir(parents=True, exist_ok=True)
    for path in stale:
        path.write_text(wanted[path])
    for path in gone:
        path.unlink()
    print("rewrote:", *names)


if __name__ == "__main__":
    main()
