"""What the first screen of README.md shows: one sentence with numbers, a short table and a picture."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from pondera.report.figure import figure
from pondera.report.svg import WIDTH, Series, line_chart
from tools.docs.questions import answers_gain
from tools.docs.tables import ROOT, generated, read, table
from tools.measured import SPEED, Measure, capacity, decoding, first_token

FASTEST_PREFILL = "FastKV(SnapKV(0.25), tsp=0.2)"
TRACKED = "results/tracking/s3-resets-cpu/deciding.json"
PICTURE = ROOT / "docs" / "figures" / "long-context.svg"
DRAWN = {
    "DynamicCache": "DynamicCache",
    "PreallocatedCache()": "PreallocatedCache",
    "VQKV()": "VQKV",
    "StaticCache": "StaticCache",
}
"""Caches in the picture and their labels, in the order of their colours."""
LONG = 65536
GAP = 20  # between two charts


@generated
def headline(path: str) -> str:
    """Decoding speed and capacity over a long context, in one sentence."""
    found = read(path)
    assert found["rows"][f"decode {LONG} x 1"]["PreallocatedCache()"]["same_bits_as_dynamic"]
    assert not found["rows"][f"decode {LONG} x 1"]["StaticCache"]["same_bits_as_dynamic"]
    return (
        f"Decoding after {LONG:,} tokens in float32 is **{_faster('VQKV()')} times as fast** with `VQKV` as with the "
        f"`DynamicCache` of transformers. {_number(capacity('VQKV()', 'float32'))} times as many tokens fit in the same memory "
        f"in float32, and {_number(capacity('VQKV()'))} times in bfloat16. `PreallocatedCache` is "
        f"{_faster('PreallocatedCache()')} times as fast and bit-identical. The `StaticCache` of transformers, which needs the "
        f"length in advance, is {_faster('StaticCache')} times as fast and not bit-identical. (One sequence, a Llama of "
        f"{found['rates']['parameters'] / 1e6:.0f} M random weights, {found['threads']} CPU cores.)"
    )


@generated
def gains(_: str) -> str:
    """What a user gets, one line for each."""
    tracked = {row["name"]: row for row in read(TRACKED)["rows"]}
    plain, router = (tracked[name] for name in ("plain", "adaptivelatentcot"))
    rows = [
        (
            "a long context in less memory",
            "`pondera compress MODEL --for questions --budget 25%`",
            answers_gain(),
            "[questions](docs/results/questions.md), [speed](docs/results/speed.md)",
        ),
        (
            "a very long context, decoded faster",
            '`pondera compress MODEL --kv-cache "VQKV()"`',
            f"{_number(capacity('VQKV()', 'float32'))} × the tokens in float32, {_number(capacity('VQKV()'))} × in bfloat16; "
            f"decoding {_faster('VQKV()')} × at 64k in float32",
            "[speed](docs/results/long-context.md), [quality](docs/results/vqkv.md)",
        ),
        (
            "the same output, faster",
            '`load(MODEL, kv_cache="PreallocatedCache()")`',
            f"decoding {_faster('PreallocatedCache()')} × at 64k in float32, bit-identical, no length in advance "
            f"(`StaticCache`: {_faster('StaticCache')} ×, neither)",
            "[speed](docs/results/long-context.md)",
        ),
        (
            "the first token sooner",
            f'`load(MODEL, kv_cache="{FASTEST_PREFILL}")`',
            f"{_number(first_token(FASTEST_PREFILL))} × after a prompt of 4k",
            "[speed](docs/results/long-context.md), [quality](docs/results/eviction.md)",
        ),
        (
            "more compute where a token needs it",
            "`pondera train adaptivelatentcot`",
            f"state tracking: {100 * router['accuracy']['mean']:.1f} % right at "
            f"{router['passes_per_token']['mean']:.1f} passes per token, plain {100 * plain['accuracy']['mean']:.1f} %; no "
            "gain over depth was found on text",
            "[tasks](docs/results/tracking.md), [text](docs/results/language.md)",
        ),
    ]
    return table(["what you get", "how", "measured", "pages"], rows).replace("---:", "---")


def figures() -> dict[Path, str]:
    """The picture: decoding speed and peak memory against the length of the context."""
    return {PICTURE: picture(read(SPEED))}


def picture(found: dict[str, Any]) -> str:
    """Two charts in one SVG, which follows the reader's light or dark scheme and has its own ground."""
    speed = _chart(found, "Decoding speed", "tokens per second", "tokens_per_second", 1)
    peak = _chart(found, "Peak memory in addition to the model", "MB", "peak_bytes", 1e-6)
    (head, left), (_, right) = (_parts(figure(chart, list(DRAWN.values()))) for chart in (speed, peak))
    height = re.search(r'viewBox="0 0 \d+ (\d+)"', head)
    assert height
    head = head.replace(height[0], f'viewBox="0 0 {2 * WIDTH + GAP} {height[1]}"')
    return f'{head}\n{left}\n<g transform="translate({WIDTH + GAP},0)">{right}</g>\n</svg>\n'


def _chart(found: dict[str, Any], title: str, label: str, key: str, scale: float) -> str:
    lengths = sorted(int(name.split()[1]) for name in found["rows"] if re.fullmatch(r"decode \d+ x 1", name))
    series = [
        Series(label, number, [], [(n, found["rows"][f"decode {n} x 1"][name][key] * scale) for n in lengths])
        for number, (name, label) in enumerate(DRAWN.items())
    ]
    return line_chart(title, "tokens in the cache", label, series, log_x=True, log_y=True, cut=0.0)


def _parts(svg: str) -> tuple[str, str]:
    """An SVG document up to the end of its style and ground, and what is drawn on it."""
    head, ground, drawn = svg.removesuffix("</svg>\n").partition('<rect class="ground" width="100%" height="100%"/>')
    return head + ground, drawn.strip()


def _faster(cache: str) -> str:
    return _number(decoding(cache, (LONG, LONG)))


def _number(found: Measure) -> str:
    return f"{found.value[-1] if isinstance(found.value, tuple) else found.value:.1f}"
