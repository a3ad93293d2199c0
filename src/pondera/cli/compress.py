"""``pondera compress``: measures KV cache methods on a model, as quality against bytes."""

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
    from pondera.evaluation.uses import Measured

LEGEND = """table bytes: codebooks, once per model; top-1 agreement: how often the likeliest token is that of the full cache;
recall: tokens of an earlier passage that are predicted when its beginning is repeated; tokens/s: decoding, here"""
USE_LEGEND = """of full: bytes of the cache after the context; kept: share of what the context is worth (full cache 100 %,
no context 0 %), mean over needles and examples; right: questions that greedy decoding answers; first token: reading and
compressing; tokens/s: decoding, here"""
SUMMARY = "compresses the KV cache of a model and measures what that costs in quality"
EXAMPLES = """
pondera compress runs/plain
pondera compress smollm2 --plot compress.html
pondera compress smollm2 --for questions --budget 25% --out small
pondera compress path/to/model --data.text book.txt --kv-cache "StreamingLLM(0.25)" --kv-cache "H2O(0.25)"
pondera compress path/to/model --data.text book.txt --plot compress.html --out compressed
pondera generate compressed --prompt "The sea"
"""


def parser() -> Parser:
    """The argument parser of ``pondera compress``."""
    about = (
        "Measures KV cache methods on a model against its full cache: bytes, bits per byte of held-out text, top-1 agreement "
        "(next tokens equal to those with the full cache) and recall of an early passage. Recommends the elbow, or the only "
        "--kv-cache, and with --out saves the model with that method. With --for, methods that fit a use answer questions "
        "about long contexts instead, and the one that keeps most within --budget is taken."
    )
    arguments = Parser("compress", about, EXAMPLES, settings="data.", notes=lambda: text_notes("evaluation text"))
    arguments.add_argument(
        "path", metavar="MODEL", help="a run folder, a model folder, a .gguf file, smollm2, or a hub name"
    )
    arguments.add_argument(
        "--kv-cache",
        action="append",
        default=[],
        metavar="SPEC",
        help="a method such as 'H2O(0.25)', see `pondera methods`; may be repeated (default: a sweep)",
    )
    arguments.add_argument(
        "--for",
        dest="use",
        metavar="USE",
        help="what the cache is for: questions (a context is read once, its questions are not known yet), prompts (each long "
        "prompt ends with its question) or chat (a conversation of which only the first question is known)",
    )
    arguments.add_argument(
        "--budget",
        metavar="SHARE",
        help="most bytes of the full cache to take, such as 25%% (default: the elbow decides)",
    )
    arguments.add_argument(
        "--tokens", type=positive_int(64), metavar="N", help="with --for: length of a context (default: 1024)"
    )
    arguments.add_argument(
        "--contexts", type=positive_int(2), metavar="N", help="with --for: contexts of each kind (default: 4)"
    )
    arguments.add_argument(
        "--calibrate", metavar="TEXT", help="calibration text for codebooks (default: the training text of the run)"
    )
    arguments.add_argument(
        "--calibrate-tokens",
        type=positive_int(1),
        default=65536,
        metavar="N",
        help="number of calibration tokens (default: %(default)s)",
    )
    arguments.add_argument(
        "--windows",
        type=positive_int(1),
        default=8,
        metavar="N",
        help="number of held-out windows (default: %(default)s)",
    )
    arguments.add_argument(
        "--plot", type=Path, metavar="FILE", help="write an HTML page with plots of quality against bytes"
    )
    arguments.add_argument(
        "--out", type=Path, metavar="FOLDER", help="save the model with the recommended method to this folder"
    )
    arguments.add_argument("--keep", metavar="SPEC", help="with --out: save this method instead of the recommended one")
    arguments.add_argument("--json", action="store_true", help="print JSON only")
    return arguments


def run(args: argparse.Namespace) -> int:
    """Measures the methods, prints the table, and writes the plots and the model if requested."""
    if args.keep and args.out is None:
        raise UserError("--keep selects the method that --out saves; give --out FOLDER, too")
    if args.out is not None and args.out.exists():
        raise UserError(f"--out {args.out}: already exists; give another folder")
    _check_use(args)
    with only_json(args.json):
        found = _compress(args) if args.use is None else _compress_for(args)
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
        budget=args.budget,
        say=lambda line: print(line, file=sys.stderr, flush=True),
        **given_settings(args.overrides),
    )
    rows, chosen = done.rows, done.elbow
    found = {"name": done.name, "elbow": chosen.method, "rows": as_json(rows)}
    if not args.json:
        print_table(
            list(_row(rows[0])), [list(_row(row).values()) for row in rows], f"KV cache of {done.context} tokens"
        )
        print(LEGEND)
        named = "elbow" if len(rows) > 2 and args.budget is None else "chosen"
        print(
            f"{named}: {chosen.method}, {100 * chosen.of_full:.1f} % of the bytes of the full cache, "
            f"{chosen.bits_per_byte - rows[0].bits_per_byte:+.4f} bits per byte"
        )
    if args.plot is not None:
        _draw(args.plot, done.name, rows, chosen)
    if args.out is not None:
        print(f"saved with {done.written}: pondera generate {args.out} --prompt ...", file=sys.stderr)
    return found


def _check_use(args: argparse.Namespace) -> None:
    """Raises if options are given that do not go with --for, or only with it."""
    given = {"--tokens": args.tokens, "--contexts": args.contexts}
    if args.use is None:
        if names := [name for name, value in given.items() if value is not None]:
            raise UserError(f"{names[0]} is for --for USE; without it, give --data.context and --windows")
        return
    others = {
        "--keep": args.keep,
        "--plot": args.plot,
        **{f"--{name}": value for name, value in args.overrides.items()},
    }
    if names := [name for name, value in others.items() if value is not None]:
        raise UserError(
            f"{names[0]} does not go with --for: its contexts are generated; `pondera bench kv` has plots and more"
        )


def _compress_for(args: argparse.Namespace) -> dict[str, Any]:
    from dataclasses import asdict

    from pondera.evaluation.compress import compress_for

    done = compress_for(
        args.path,
        args.use,
        args.budget,
        kv_cache=args.kv_cache,
        calibrate=args.calibrate,
        out=args.out,
        say=lambda line: print(line, file=sys.stderr, flush=True),
        **{name: value for name in ("tokens", "contexts") if (value := getattr(args, name)) is not None},
    )
    full, chosen = done.rows[0], done.chosen
    if not args.json:
        cells = [_use_row(row) for row in done.rows]
        print_table(list(cells[0]), [list(row.values()) for row in cells], f"{done.name}, for {args.use}")
        print(USE_LEGEND)
        print(
            f"chosen: {chosen.method}: {100 * chosen.of_full:.1f} % of the bytes, {100 * chosen.kept:.0f} % kept, "
            f"{1 / full.step_seconds:.1f} -> {1 / chosen.step_seconds:.1f} tokens/s"
        )
    if done.written is not None:
        print(f"saved with {done.written}: pondera generate {args.out} --prompt ...", file=sys.stderr)
    return {"name": done.name, "chosen": chosen.method, "rows": [asdict(row) for row in done.rows]}


def _use_row(row: Measured) -> dict[str, str]:
    """A row of the table of a use."""
    return {
        "method": row.method,
        "of full": f"{100 * row.of_full:.1f} %",
        "kept": f"{100 * row.kept:.0f} %",
        "right": f"{100 * row.right:.0f} %",
        "first token": f"{row.prefill_seconds:.2f} s",
        "tokens/s": f"{1 / row.step_seconds:.1f}",
    }


def _row(row: SweepRow) -> dict[str, str]:
    """A row of the table."""
    return {
        "method": row.method,
        "cache bytes": f"{row.cache_bytes:,.0f}",
        "of full": f"{100 * row.of_full:.1f} %",
        "table bytes": f"{row.table_bytes:,}" if row.table_bytes else "",
        "bits/byte": f"{row.bits_per_byte:.4f}",
        "top-1 agreement": f"{100 * row.agreement:.1f} %",
        "recall": f"{100 * row.recall:.1f} %",
        "tokens/s": f"{row.tokens_per_second:.0f}",
    }


def _draw(out: Path, name: str, rows: list[SweepRow], chosen: SweepRow) -> None:
    """Plots quality against bytes, with a line per method and a point per setting."""
    from pondera.methods.probe.base import Plot
    from pondera.report.plots import write_plots

    def lines(height: Any) -> dict[str, list[tuple[float, float]]]:
        found: dict[str, list[tuple[float, float]]] = {}
        for row in sorted(rows, key=lambda row: row.of_full):
            found.setdefault(spec.parse(row.method).name, []).append((100 * row.of_full, height(row)))
        return found

    across = "% of the bytes of the full cache"
    plots = [
        Plot("Loss", across, "bits per byte", lines(lambda row: row.bits_per_byte)),
        Plot("Top-1 agreement", across, "% of next tokens", lines(lambda row: 100 * row.agreement)),
        Plot("Recall", across, "% of a passage", lines(lambda row: 100 * row.recall)),
    ]
    note = f"Elbow: {chosen.method}, {100 * chosen.of_full:.1f} % of the bytes of the full cache."
    write_plots(plots, note, out, f"KV cache methods on {name}")
