"""``pondera compress``: how much of the past a model can do without, by bytes and by quality."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pondera.cli.output import only_json, print_json, print_table
from pondera.cli.parser import Parser, positive_int, text_notes
from pondera.core import spec
from pondera.core.errors import UserError

if TYPE_CHECKING:
    from pondera.evaluation.kv_sweep import SweepRow

SUMMARY = "fits a model's cache into less memory, and shows what that costs"
EXAMPLES = """
pondera compress runs/plain
pondera compress path/to/model --data.text book.txt --kv-cache "StreamingLLM(0.25)" --kv-cache "H2O(0.25)"
pondera compress path/to/model --data.text book.txt --plot compress.html --out compressed
pondera generate compressed --prompt "The sea"
"""


def parser() -> Parser:
    """What ``pondera compress`` takes."""
    about = (
        "Measures memories on one model, beside its full cache: bytes, bits per byte of held-out text, how often the next "
        "token is what the full cache would have said, and how much of an early passage is recalled. Names the elbow, and "
        "writes a model with it if asked to."
    )
    found = Parser("compress", about, EXAMPLES, settings="data.", notes=lambda: text_notes("the held-out text"))
    found.add_argument("path", metavar="MODEL", help="a run folder, a model folder, or a hub name")
    found.add_argument(
        "--kv-cache",
        action="append",
        default=[],
        metavar="SPEC",
        help="such as 'H2O(0.25)'; give it several times to compare (default: a sweep); pondera methods lists them",
    )
    found.add_argument(
        "--calibrate", metavar="TEXT", help="fit codebooks to this text (default: what a run trained on)"
    )
    found.add_argument(
        "--calibrate-tokens",
        type=positive_int(1),
        default=65536,
        metavar="N",
        help="so much of it (default: %(default)s)",
    )
    found.add_argument(
        "--windows", type=positive_int(1), default=8, metavar="N", help="of held-out text (default: %(default)s)"
    )
    found.add_argument("--plot", type=Path, metavar="FILE", help="draw quality against bytes into an HTML page")
    found.add_argument("--out", type=Path, metavar="FOLDER", help="write the model with the elbow's method there")
    found.add_argument("--keep", metavar="SPEC", help="with --out: this method instead of the elbow's")
    found.add_argument("--json", action="store_true", help="print JSON, and nothing else")
    return found


def run(args: argparse.Namespace) -> int:
    """Measures, prints, draws and writes."""
    if args.keep and args.out is None:
        raise UserError("--keep says what --out writes; give --out FOLDER, too")
    if args.out is not None and args.out.exists():
        raise UserError(f"--out {args.out}: something is there already; give another folder")
    with only_json(args.json):
        found = _compress(args)
    if args.json:
        print_json(found)
    return 0


def _compress(args: argparse.Namespace) -> dict[str, Any]:
    from pondera.evaluation.compress import compress
    from pondera.evaluation.kv_sweep import as_json
    from pondera.evaluation.perplexity import given_settings

    done = compress(
        args.path,
        args.kv_cache,
        windows=args.windows,
        calibrate=args.calibrate,
        calibrate_tokens=args.calibrate_tokens,
        out=args.out,
        keep=args.keep,
        say=lambda line: print(line, file=sys.stderr, flush=True),
        **given_settings(args.overrides),
    )
    rows, chosen = done.rows, done.elbow
    found = {"name": done.name, "elbow": chosen.method, "rows": as_json(rows)}
    if not args.json:
        print_table(
            list(_row(rows[0])), [list(_row(row).values()) for row in rows], f"a cache of {done.context} tokens"
        )
        print(
            f"the elbow: {chosen.method}, {100 * chosen.of_full:.1f} % of the bytes for "
            f"{chosen.bits_per_byte - rows[0].bits_per_byte:+.4f} bits per byte"
        )
    if args.plot is not None:
        _draw(args.plot, done.name, rows, chosen)
    if args.out is not None:
        print(f"written with {done.written}: pondera generate {args.out} --prompt ...", file=sys.stderr)
    return found


def _row(row: SweepRow) -> dict[str, str]:
    """A line of the table."""
    return {
        "method": row.method,
        "cache bytes": f"{row.cache_bytes:,.0f}",
        "of full": f"{100 * row.of_full:.1f} %",
        "tables": f"{row.table_bytes:,}" if row.table_bytes else "",
        "bits/byte": f"{row.bits_per_byte:.4f}",
        "says the same": f"{100 * row.agreement:.1f} %",
        "recalls": f"{100 * row.recall:.1f} %",
        "tokens/s": f"{row.tokens_per_second:.0f}",
    }


def _draw(out: Path, name: str, rows: list[SweepRow], chosen: SweepRow) -> None:
    """Quality against bytes: a line for each method, a point for each of its settings."""
    from pondera.methods.probe.base import Plot
    from pondera.report.plots import write_plots

    def lines(height: Any) -> dict[str, list[tuple[float, float]]]:
        found: dict[str, list[tuple[float, float]]] = {}
        for row in sorted(rows, key=lambda row: row.of_full):
            found.setdefault(spec.parse(row.method).name, []).append((100 * row.of_full, height(row)))
        return found

    across = "% of the full cache's bytes"
    plots = [
        Plot("What is lost", across, "bits per byte", lines(lambda row: row.bits_per_byte)),
        Plot("What is said", across, "% as the full cache", lines(lambda row: 100 * row.agreement)),
        Plot("What is recalled", across, "% of a passage", lines(lambda row: 100 * row.recall)),
    ]
    note = f"The elbow: {chosen.method}, {100 * chosen.of_full:.1f} % of the full cache's bytes."
    write_plots(plots, note, out, f"memories of {name}")
