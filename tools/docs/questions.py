"""The experiment on compressed caches of a real model: what is kept of each kind of questions, by bytes."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any

from pondera.core import spec
from pondera.evaluation.kv_sweep import FULL
from pondera.report.figure import figure
from pondera.report.svg import Series, scatter_chart
from tools.docs.study import FIGURES
from tools.docs.tables import ROOT, generated, read, table

RESULTS = "results/questions/smollm2.json"
NEARLY = 0.95
"""What nearly all is, as a share."""
PICTURE = FIGURES / "questions.svg"
DRAWN = ("RandomEviction", "SnapKV", "ExpectedAttention", "KVzip", "KIVI", "TurboQuant", "Coded(KVzip)")
"""The families in the picture, in the order of their colours."""


@generated
def questions(path: str) -> str:
    """Bytes of each method, and what it keeps of each kind of questions."""
    found = read(path)
    kinds = list(dict.fromkeys(row["questions"] for row in found["rows"]))
    head = ["method", "bytes of full", *(name for kind in kinds for name in (f"{_short(kind)}: kept", "right"))]
    rows = []
    for method, by_kind in sorted(_by_method(found).items(), key=lambda item: -_size(item[1])):
        cells = [
            cell
            for kind in kinds
            for cell in ((_kept(by_kind[kind]), f"{by_kind[kind]['right']:.0%}") if kind in by_kind else ("", ""))
        ]
        rows.append((f"`{method}`", f"{100 * _size(by_kind):.1f} %", *cells))
    said = ", ".join(f"{_items(found, kind)} of `{kind}`" for kind in kinds)
    return f"{table(head, rows)}\n\nQuestions: {said}. `{found['command']}`."


@generated
def answers_kept(path: str) -> str:
    """One sentence for the first screen: the smallest cache that keeps nearly all, beside the most known eviction method."""
    found = read(path)
    best, articles = _best(found), found["rows"][0]["questions"]
    other = _by_method(found)["SnapKV(0.25)"][articles]
    items = sum(_items(found, kind) for kind in {row["questions"] for row in found["rows"]})
    return (
        f"A chat model of 135 M parameters answers questions that come after its KV cache was compressed: {_shares(found)} of "
        f"what its contexts are worth, by the kind of question, with `{best}`, which needs no training. "
        f"(SmolLM2-135M-Instruct, {items} questions; about encyclopedia articles, `SnapKV(0.25)` keeps "
        f"{100 * other['kept']:.0f} % with {100 * other['of_full']:.0f} % of the bytes.)"
    )


def answers_gain() -> str:
    """The same in the fewest words."""
    return f"{_shares(read(RESULTS)).replace('*', '')} of what a context is worth, on a real chat model"


def _shares(found: dict[str, Any]) -> str:
    """The bytes of the best method, and the least and most that it keeps of any kind of questions."""
    rows = _by_method(found)[_best(found)]
    kept = sorted(row["kept"] for row in rows.values())
    return f"**{100 * _size(rows):.0f} % of the bytes keep {100 * kept[0]:.0f} to {100 * kept[-1]:.0f} %**"


def _best(found: dict[str, Any]) -> str:
    """The smallest cache that keeps nearly all, on average, of those that were measured on all kinds of questions."""
    methods, kinds = _by_method(found), {row["questions"] for row in found["rows"]}
    means = {
        name: (_size(rows), fmean(row["kept"] for row in rows.values()))
        for name, rows in methods.items()
        if name != FULL and rows.keys() == kinds
    }
    return min((name for name, (_, kept) in means.items() if kept >= NEARLY), key=lambda name: means[name][0])


def figures() -> dict[Path, str]:
    """What is kept of the first kind of questions against bytes, a point for each method."""
    if not (ROOT / RESULTS).is_file():
        return {}
    lines: dict[str, list[tuple[float, float]]] = {name: [] for name in DRAWN}
    found = read(RESULTS)
    first = found["rows"][0]["questions"]
    for row in found["rows"]:
        if row["questions"] == first and (name := _family(row["method"])) in lines:
            lines[name].append((100 * row["of_full"], 100 * row["kept"]))
    series = [Series(name, number, [], sorted(points)) for number, (name, points) in enumerate(lines.items()) if points]
    title = f"What a compressed cache keeps of what its context is worth ({_short(first)})"
    chart = scatter_chart(title, "% of the bytes of the full cache", "% kept", series)
    return {PICTURE: figure(chart, [one.name for one in series])}


def _by_method(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The rows by method and kind of questions."""
    by_method: dict[str, dict[str, Any]] = {}
    for row in found["rows"]:
        by_method.setdefault(row["method"], {})[row["questions"]] = row
    return by_method


def _size(by_kind: dict[str, Any]) -> float:
    return fmean(row["of_full"] for row in by_kind.values())


def _items(found: dict[str, Any], kind: str) -> int:
    return next(row["items"] for row in found["rows"] if row["questions"] == kind)


def _kept(row: dict[str, Any]) -> str:
    low, high = row["kept_interval"]
    return f"{100 * row['kept']:.0f} % [{100 * low:.0f}, {100 * high:.0f}]"


def _short(kind: str) -> str:
    return {"Squad": "articles", "Needles": "needles", "FewShot": "examples"}[spec.parse(kind).name]


def _family(method: str) -> str:
    parsed = spec.parse(method)
    inner = next((value for value in parsed.args if isinstance(value, spec.Spec)), None)
    return parsed.name if inner is None else f"{parsed.name}({inner.name})"
