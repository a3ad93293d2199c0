"""``pondera eval --pairs`` and ``--last-word``: the options of files with rows, and how their scores are printed."""

from __future__ import annotations

import argparse
from typing import Any

from pondera.cli.output import only_json, print_json, print_table
from pondera.cli.parser import Parser, positive_int
from pondera.core.errors import UserError

FOR_ROWS = ("columns", "group", "max_rows", "batch_size")
"""The options that only rows have."""


def add_rows(parser: Parser) -> None:
    """Adds the arguments ``--pairs`` and ``--last-word``, and those of files with rows."""
    rows = parser.add_argument_group(
        "rows instead of a text", "files with rows (.jsonl, .csv and others, also as .xz or .gz)"
    )
    one = rows.add_mutually_exclusive_group()
    one.add_argument(
        "--pairs",
        metavar="FILE",
        help="minimal pairs: the share of rows in which the good text is more probable than the bad one (as BLiMP)",
    )
    one.add_argument("--last-word", metavar="FILE", help="whether the last word of each text is predicted (as LAMBADA)")
    rows.add_argument(
        "--columns",
        metavar="NAMES",
        help="the columns of the texts: GOOD,BAD for --pairs (default: sentence_good,sentence_bad, or good,bad), one name for "
        "--last-word (default: text)",
    )
    rows.add_argument(
        "--group", metavar="NAME", help="with --pairs: group the rows by a column (default: UID, field or group)"
    )
    rows.add_argument(
        "--max-rows", type=positive_int(1), metavar="N", help="score N rows, spread evenly over the file (default: all)"
    )
    rows.add_argument(
        "--batch-size",
        type=positive_int(1),
        metavar="N",
        help="texts per forward pass (default: by length); scores are equal",
    )


def refuse_row_options(args: argparse.Namespace) -> None:
    """Raises if an option of rows is given without a file with rows."""
    for name in FOR_ROWS:
        if getattr(args, name) is not None:
            option = "--" + name.replace("_", "-")
            raise UserError(
                f"{option}: needs --pairs FILE or --last-word FILE; for a text, use --data.text and --max-tokens"
            )


def run_rows(args: argparse.Namespace) -> int:
    """Scores the rows at each effort and prints the scores."""
    from pondera.evaluation.last_word import score_last_words
    from pondera.evaluation.minimal_pairs import score_pairs
    from pondera.evaluation.open_model import open_model

    efforts: list[str | float | None] = list(args.effort or [None])
    given = _given(args)
    with only_json(args.json):
        model = args.path
        if len(efforts) > 1 or args.kv_cache is not None or args.calibrate is not None:
            model = open_model(args.path, args.kv_cache, calibrate=args.calibrate)
        score = score_last_words if args.pairs is None else score_pairs
        found = [score(model, **given, effort=effort) for effort in efforts]
    if args.json:
        print_json(
            found[0] if len(found) == 1 else [{"effort": e} | one for e, one in zip(efforts, found, strict=True)]
        )
        return 0
    for effort, one in zip(efforts, found, strict=True):
        if len(found) > 1:
            print(f"effort {effort}")
        (_print_words if args.pairs is None else _print_pairs)(one)
    return 0


def _given(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of the scores; raises for options that only a text has."""
    from pondera.evaluation.perplexity import given_settings

    option = "--last-word" if args.pairs is None else "--pairs"
    if args.weights is not None:
        raise UserError(f"--weights: for the loss of a text, without {option}; leave one of them out")
    if args.lengths is not None:
        raise UserError(f"--lengths: for a run on a task, without {option}; leave one of them out")
    if args.max_tokens is not None:
        raise UserError(f"--max-tokens: for a text; with {option}, use --max-rows N")
    if args.group is not None and args.pairs is None:
        raise UserError("--group: only with --pairs")
    settings = given_settings(args.overrides)
    for name, instead in {"text": f"the text is in the file of {option}", "column": "use --columns"}.items():
        if name in settings:
            raise UserError(f"--data.{name}: not with {option}; {instead}")
    given = {
        "file": args.last_word if args.pairs is None else args.pairs,
        "columns": None if args.columns is None else [name.strip() for name in args.columns.split(",")],
        "max_rows": args.max_rows,
        "batch_size": args.batch_size,
        "context": settings.get("context"),
        "max_passes": args.max_passes,
    }
    return given | ({} if args.pairs is None else {"group": args.group})


def _print_pairs(found: dict[str, Any]) -> None:
    ties = f", {found['ties']:,} of them ties, which count half" if found["ties"] else ""
    _line("accuracy", f"{found['accuracy']:.4f}", f"of {found['rows']:,} pairs{_between(found['interval'])}{ties}")
    if "group" in found:
        about = f"mean over {len(found['groups'])} groups by {found['group']}{_between(found['macro_interval'])}"
        _line("macro accuracy", f"{found['macro_accuracy']:.4f}", about)
    _print_cost(found, "pairs")
    if "group" in found:
        lines = [[name, f"{one['rows']:,}", f"{one['accuracy']:.3f}"] for name, one in found["groups"].items()]
        print_table([found["group"], "pairs", "accuracy"], lines)


def _print_words(found: dict[str, Any]) -> None:
    cut = f", {found['cut']:,} of them cut on the left to {found['context']:,} tokens" if found["cut"] else ""
    _line("accuracy", f"{found['accuracy']:.4f}", f"of {found['rows']:,} last words{_between(found['interval'])}{cut}")
    _line("loss", f"{found['nats_per_word']:.4f}", "nats per word")
    _line("perplexity", f"{found['perplexity']:.4g}", "per word")
    _line("log-probability", f"{found['log_probability_per_byte']:.4f}", "nats per byte of the word")
    _print_cost(found, "texts")


def _print_cost(found: dict[str, Any], rows: str) -> None:
    _line("passes", f"{found['passes_per_token']:.4g}", "per token")
    _line("speed", f"{found['rows_per_second']:,.0f}", f"{rows} per second, measured")


def _line(name: str, number: str, about: str) -> None:
    print(f"  {name:16}{number:>10}  {about}")


def _between(interval: list[float] | None) -> str:
    return "" if interval is None else f" (95 % CI {interval[0]:.4f} to {interval[1]:.4f})"
