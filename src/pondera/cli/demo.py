"""``pondera demo``: something to look at, from nothing."""

from __future__ import annotations

import argparse
from pathlib import Path

from pondera.cli.parser import Parser

SUMMARY = "trains tiny models of text that you have and shows what thinking changes"
EXAMPLES = """
pondera demo
pondera demo --out demo
"""


def parser() -> Parser:
    """What ``pondera demo`` takes."""
    found = Parser("demo", "Trains tiny models on this Python's own library and compares them; no network.", EXAMPLES)
    found.add_argument(
        "--out", type=Path, default=Path("demo"), metavar="DIR", help="for runs and report (default: demo)"
    )
    return found


def run(args: argparse.Namespace) -> int:
    """Runs the demo."""
    from pondera.jobs.demo import demo

    demo(args.out, progress=True)
    return 0
