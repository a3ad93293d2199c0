"""``pondera bench``: measures what a compressed KV cache still answers."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from pondera.cli.output import only_json, print_json, print_table
from pondera.cli.parser import Parser, positive_int
from pondera.core import spec

if TYPE_CHECKING:
    from pondera.evaluation.kv_bench import BenchRow

SUMMARY = "asks a model about a long context after its KV cache was compressed"
EXAMPLES = """
pondera bench kv smollm2
pondera bench kv path/to/model --kv-cache "SnapKV(0.25)" --kv-cache "KIVI(4)" --questions "Needles(4)" --contexts 4
pondera bench kv smollm2 --questions "Squad('xquad.en.json')" --tokens 1900 --out bench.json --plot bench.html
pondera bench kv smollm2 --kv-cache "VQKV(2.75)" --calibrate book.txt
pondera bench kv smollm2 --ask in-turns --kv-cache "SnapKV(0.25)" --kv-cache "KVzip(0.25)" --questions "Needles(8)"
"""
LEGEND = """kept: share of what the context is worth in nats, i.e. of the log-probability that it adds to the answers
(full cache 100 %, no context 0 %); right: answers that greedy decoding gives; in brackets: 95 % interval,
by bootstrap over the contexts; bytes: of the cache after the context, tables not counted; first token: reading and
compressing; ms/token: decoding, here"""


def parser() -> Parser:
    """The argument parser of ``pondera bench``."""
    about = (
        "Reads contexts, compresses their KV cache, and then asks questions about them, each on a copy of the cache: the "
        "method has not seen the questions, unless --ask says otherwise. Finished rows are kept in --out, and the same command "
        "continues."
    )
    arguments = Parser("bench", about, EXAMPLES, notes=_notes)
    arguments.add_argument("what", choices=["kv"], help="kv: KV cache methods")
    arguments.add_argument(
        "path", metavar="MODEL", help="a run folder, a model folder, a .gguf file, smollm2, or a hub name"
    )
    arguments.add_argument(
        "--kv-cache",
        action="append",
        default=[],
        metavar="SPEC",
        help="a method such as 'SnapKV(0.25)', see `pondera methods kv_cache`; may be repeated (default: several)",
    )
    arguments.add_argument(
        "--questions",
        action="append",
        default=[],
        metavar="SPEC",
        help="a kind of questions, see below; may be repeated (default: Needles, FewShot, Continuation)",
    )
    arguments.add_argument(
        "--tokens", type=positive_int(64), default=2048, metavar="N", help="length of a context (default: %(default)s)"
    )
    arguments.add_argument(
        "--contexts",
        type=positive_int(2),
        default=8,
        metavar="N",
        help="contexts of each kind of questions (default: %(default)s)",
    )
    arguments.add_argument(
        "--seed", type=positive_int(0), default=0, metavar="N", help="of contexts and questions (default: %(default)s)"
    )
    arguments.add_argument(
        "--ask",
        choices=["after", "before", "in-turns"],
        default="after",
        help="when: each question after the cache was compressed (the default); each read before that, with the context "
        "(one prefill per question); or in turns, a conversation of which only the first question was read before",
    )
    arguments.add_argument("--dtype", metavar="DTYPE", help="of the weights, such as bfloat16 (default: the saved one)")
    arguments.add_argument(
        "--calibrate", metavar="TEXT", help="text for methods that are fitted to the model first, such as VQKV"
    )
    arguments.add_argument(
        "--out", type=Path, metavar="FILE", help="keep the scores in this JSON file, and continue from it"
    )
    arguments.add_argument(
        "--plot", type=Path, metavar="FILE", help="write an HTML page with plots of quality against bytes"
    )
    arguments.add_argument("--json", action="store_true", help="print JSON only")
    return arguments


def _notes() -> str:
    lines = ["kinds of questions:"]
    for info in spec.index(("questions",)).values():
        lines.append(f"  {info.signature}\n      {info.summary}")
    return "\n".join(lines)


def run(args: argparse.Namespace) -> int:
    """Measures the methods, prints a table for each kind of questions, and writes the plots if requested."""
    with only_json(args.json):
        name, rows = _measured(args)
    if args.json:
        print_json({"name": name, "rows": [asdict(row) for row in rows]})
        return 0
    for questions in dict.fromkeys(row.questions for row in rows):
        cells = [shown(row) for row in rows if row.questions == questions]
        items = next(row.items for row in rows if row.questions == questions)
        title = f"{questions}: {items} questions about {args.contexts} contexts of up to {args.tokens} tokens, {name}"
        print_table(list(cells[0]), [list(row.values()) for row in cells], title)
    print(LEGEND)
    if args.plot is not None:
        draw(args.plot, name, rows)
        print(f"plots: {args.plot}")
    return 0


def _measured(args: argparse.Namespace) -> tuple[str, list[BenchRow]]:
    from pondera.evaluation.kv_bench import METHODS, QUESTIONS, BenchSettings, bench
    from pondera.evaluation.windows import calibration
    from pondera.inference.load import load

    settings = BenchSettings(
        tuple(args.questions or QUESTIONS),
        tuple(args.kv_cache or METHODS),
        args.tokens,
        args.contexts,
        args.seed,
        args.ask,
    )
    for text in settings.questions:  # before the model is loaded
        spec.build(text, "questions")
    for text in settings.methods:
        spec.build(text, "kv_cache")
    loaded = load(args.path, dtype=args.dtype)
    samples = calibration(loaded, args.calibrate, 65536, 1024)
    rows = bench(loaded, settings, samples, args.out, lambda line: print(line, file=sys.stderr, flush=True))
    return loaded.name, rows


def shown(row: BenchRow) -> dict[str, str]:
    """A row of the table."""

    def share(value: float | None, interval: tuple[float, float] | None) -> str:
        if value is None or interval is None:
            return "no worth"
        return f"{100 * value:.0f} % [{100 * interval[0]:.0f}, {100 * interval[1]:.0f}]"

    return {
        "method": row.method,
        "of full": f"{100 * row.of_full:.1f} %",
        "bytes": f"{row.cache_bytes:,.0f}",
        "tables": f"{row.table_bytes:,}" if row.table_bytes else "",
        "kept": share(row.kept, row.kept_interval),
        "right": share(row.right, row.right_interval),
        "first token": f"{row.prefill_seconds:.2f} s",
        "ms/token": f"{1000 * row.step_seconds:.1f}",
    }


def draw(out: Path, name: str, rows: list[BenchRow]) -> None:
    """Plots what is kept against bytes, with a line per method and a point per setting."""
    from pondera.methods.probe.base import Plot
    from pondera.report.plots import write_plots

    plots = []
    for questions in dict.fromkeys(row.questions for row in rows):
        lines: dict[str, list[tuple[float, float]]] = {}
        for row in sorted((row for row in rows if row.questions == questions), key=lambda row: row.of_full):
            if row.kept is not None:
                lines.setdefault(_family(row.method), []).append((100 * row.of_full, 100 * row.kept))
        if lines:
            plots.append(Plot(questions, "% of the bytes of the full cache", "% kept", lines))
    write_plots(
        plots, "What a compressed cache keeps of what the context is worth.", out, f"KV cache methods on {name}"
    )


def _family(method: str) -> str:
    """The spec string without numbers: settings of one method are points of one line."""
    parsed = spec.parse(method)
    inner = next((value for value in (*parsed.args, *parsed.kwargs.values()) if isinstance(value, spec.Spec)), None)
    return parsed.name if inner is None else f"{parsed.name}({inner.name})"
