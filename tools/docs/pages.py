"""docs/methods/: a page for each method and an index, from the docstrings and the cards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pondera.core import spec
from pondera.core.spec import MethodInfo
from tools.docs.docstrings import Docstring, of_method, parameters
from tools.docs.tables import ROOT, table
from tools.measured import Measure

FOLDER = ROOT / "docs" / "methods"
CARDS = ROOT / "results" / "cards"
NOTE = "<!-- Written by `make docs` from the docstring and the card of the method. Do not edit. -->"
SEAMS = {
    "think": "Compute per token",
    "kv_cache": "KV cache without training",
    "memory": "Trained memory",
    "chunk": "Several tokens at once",
    "head": "Output head",
    "quantize": "Quantizers",
    "probe": "Probes",
    "objective": "Objectives of GFlowNets",
    "environment": "Environments of GFlowNets",
}
"""Heading of each folder of methods; a folder that is not here is headed by its name."""
UNMEASURED = spec.PROBES + spec.FLOWS
"""Folders whose methods have pages but no cards: docs/results/flows.md compares objectives."""
GUIDES = {
    "think": "think",
    "kv_cache": "compress",
    "memory": "train-and-compare",
    "chunk": "concepts",
    "head": "concepts",
    "quantize": "concepts",
    "probe": "think",
    "objective": "flows",
    "environment": "flows",
}
"""The guide that shows a method of each folder in use."""


def files() -> dict[Path, str]:
    """Every page and its text."""
    methods = [
        method
        for method in (spec.index() | spec.index(UNMEASURED)).values()
        if method.file.is_relative_to(spec.PACKAGE.parent)
    ]
    return {FOLDER / f"{method.name}.md": page(method) for method in methods} | {FOLDER / "index.md": index(methods)}


def index(methods: list[MethodInfo]) -> str:
    """The page that lists all methods."""
    verdict = (
        "*Verdict* says whether the paper's claim showed at our small scale; the page of the method has the numbers. "
        "*Claim not tested here* means that the method was measured, but not under the conditions of the claim."
    )
    parts = ["# Methods", NOTE, f"One page per method, one table per package. {verdict}"]
    for seam in dict.fromkeys(method.seam for method in methods):
        rows = [
            (f"[{one.name}]({one.name}.md)", _cell(of_method(one).summary), _cell(one.paper), _verdict(one))
            for one in methods
            if one.seam == seam
        ]
        head = ["method", "what it does", "source", "verdict"]
        if seam in UNMEASURED:
            shown = 2 if seam in spec.PROBES else 3
            head, rows = head[:shown], [row[:shown] for row in rows]
        folder = spec.ELSEWHERE.get(seam, spec.PACKAGE / seam).relative_to(spec.PACKAGE.parent)
        parts.append(f"## {SEAMS.get(seam, seam)}\n\n`pondera/{folder}/`\n\n{_left(head, rows)}")
    return "\n\n".join(parts) + "\n"


def page(method: MethodInfo) -> str:
    """The page of one method."""
    said = of_method(method)
    source = said.sections.get("Source", method.paper)
    parts = [
        f"# {method.name}",
        NOTE,
        f"**{said.summary}**",
        said.body,
        _titled("Source", source),
        _titled("Cost", said.sections.get("Cost", "")),
        _titled("When not to use it", said.sections.get("When not to use it", "")),
        _titled("How to use it", use(method)),
        _titled("Arguments", arguments(method, said)),
        _titled("Example", _example(said.sections.get("Example", ""))),
        _titled("Choices made here", said.sections.get("Resolved", "")),
        _titled("What was measured", measured(method)),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def use(method: MethodInfo) -> str:
    """The signature, and where it is written."""
    seam = method.seam
    if seam in spec.PROBES:
        where = f"On the command line: `pondera probe {method.file.stem} MODEL`."
    elif seam in spec.FLOWS:
        where = f"In a config: `{seam}: {method.name}(...)`. On the command line: `pondera train flow-set --{seam}`."
    elif seam in spec.PARTS:
        where = f"An argument of other methods. Alone: `from pondera import {method.name}`, then `.build(width)`."
    else:
        where = f"In a config: `{seam}: {method.name}(...)`. On the command line: `--{seam.replace('_', '-')}`."
        where += f" In Python: `load(MODEL, {seam}=...)`." if seam in ("think", "kv_cache") else ""
    guide = f" See the [guide](../guides/{GUIDES[seam]}.md)." if seam in GUIDES else ""
    return f"```python\n{_signature(method)}\n```\n\n{where}{guide}"


def _signature(method: MethodInfo) -> str:
    """The signature, with a line for each argument where it is long."""
    if len(method.signature) <= 100:
        return method.signature
    lines = [
        f"    {name}{f': {kind}' if kind else ''}{f' = {default}' if default else ''},\n"
        for name, kind, default in parameters(method.signature)
    ]
    return f"{method.name}(\n{''.join(lines)})"


def arguments(method: MethodInfo, said: Docstring) -> str:
    """The table of constructor arguments."""
    rows = [
        (f"`{name}`", _code(kind), _code(default) or "required", _cell(said.arguments.get(name, "")))
        for name, kind, default in parameters(method.signature)
    ]
    return _left(["argument", "type", "default", "meaning"], rows) if rows else "None."


def measured(method: MethodInfo) -> str:
    """The card of a method."""
    card = _card(method)
    if card is None:
        return "" if method.seam in UNMEASURED else "*not run yet*"
    claim = f"Claim: {card['claim']}\n\nVerdict: **{card['verdict']}**."
    rows = []
    for found in card["measured"]:
        value = tuple(found["value"]) if isinstance(found["value"], list) else found["value"]
        one = Measure(**{**found, "value": value})
        rows.append((_cell(one.what), one.number(), one.setting, str(one.seeds or ""), f"`{one.file}`"))
    found = _left(["what", "value", "setting", "seeds", "file"], rows) if rows else ""
    return "\n\n".join(filter(None, (claim, found, card.get("note", ""))))


def _card(method: MethodInfo) -> dict[str, Any] | None:
    file = CARDS / f"{method.name}.json"
    return json.loads(file.read_text()) if file.is_file() else None


def _verdict(method: MethodInfo) -> str:
    card = _card(method)
    return card["verdict"] if card else "not run yet"


def _titled(title: str, text: str) -> str:
    return f"## {title}\n\n{text[0].upper()}{text[1:]}" if text else ""


def _example(text: str) -> str:
    return f"```python\n{text}\n```" if text else ""


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _code(text: str) -> str:
    return f"`{_cell(text)}`" if text else ""


def _left(head: list[str], rows: list[tuple[str, ...]]) -> str:
    """A table of text: every column to the left."""
    return table(head, rows).replace("---:", "---", len(head) - 1)
