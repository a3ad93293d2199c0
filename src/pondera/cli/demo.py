"""``pondera demo``: trains four tiny models on a task and shows which of them thinks where it has to."""

from __future__ import annotations

import argparse
from pathlib import Path

from pondera.cli.output import print_answers, print_comparison
from pondera.cli.parser import Parser

SUMMARY = "trains four tiny models on a task and shows a model that thinks longer where it has to"
EXAMPLES = """
pondera demo
pondera demo --out demo
"""
INTRODUCTION = """Four small models learn to track a state: after each token, the product of the elements since the reset R.
The difficulty of a token is the number of elements since the reset: its steps must be computed one after the other.
It takes about two minutes on two cores.
  plain              1 layer, one pass per token
  doubledepth        2 layers, one pass: same cost as two passes through 1 layer
  ponderlm2          1 layer, two passes: a latent thought that all later tokens and thoughts attend to
  adaptivelatentcot  1 layer, one to four passes: a router decides for each token
"""


def parser() -> Parser:
    """The argument parser of ``pondera demo``."""
    arguments = Parser(
        "demo",
        "Trains tiny models on state tracking and compares them by the difficulty of the tokens; needs no network.",
        EXAMPLES,
    )
    arguments.add_argument(
        "--out", type=Path, default=Path("demo"), metavar="DIR", help="folder for runs and report (default: demo)"
    )
    return arguments


def run(args: argparse.Namespace) -> int:
    """Runs the demo, prints the results and the paths of its files."""
    from pondera.comparison.demo import demo

    print(INTRODUCTION, flush=True)
    found = demo(args.out, progress=True)
    print_comparison(found.comparison)
    print("\nHeld-out windows, answered by adaptivelatentcot, with the passes of each token:")
    for window in found.windows:
        print()
        print_answers(window)
    print(f"""
  report:   {found.report}
  numbers:  {args.out / "results.json"}
  runs:     {args.out / "runs"}

Next:
  pondera generate {found.thinking_run} --prompt "R 021 102 210 R 021"
  pondera compare plain doubledepth adaptivelatentcot ponderlm2 --data.task "StateTracking('S3', reset=0.25)" --seeds 3
  pondera compare plain doubledepth ponderlm2 --seeds 3 --data.text YOUR_TEXT""")
    return 0
