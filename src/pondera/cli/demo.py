"""``pondera demo``: something to look at, from nothing."""

from __future__ import annotations

import argparse
from pathlib import Path

from pondera.cli.output import print_comparison
from pondera.cli.parser import Parser

SUMMARY = "trains tiny models of text that you have and shows what thinking changes"
EXAMPLES = """
pondera demo
pondera demo --out demo
"""
INTRODUCTION = """Three small Llamas learn from the sources and docs of this Python, with three seeds each.
It takes about five minutes on two cores.
  plain              3 layers, one pass per token
  doubledepth        6 layers, one pass: what two passes through 3 layers cost
  adaptivelatentcot  3 layers, two passes: every token takes one latent thought before it is predicted
"""


def parser() -> Parser:
    """What ``pondera demo`` takes."""
    found = Parser("demo", "Trains tiny models on this Python's own library and compares them; no network.", EXAMPLES)
    found.add_argument(
        "--out", type=Path, default=Path("demo"), metavar="DIR", help="for runs and report (default: demo)"
    )
    return found


def run(args: argparse.Namespace) -> int:
    """Runs the demo and says what came out, and where everything is."""
    import sys

    from pondera.comparison.demo import demo
    from pondera.report.heatmap import shade_terminal

    print(INTRODUCTION, flush=True)
    found = demo(args.out, progress=True)
    print_comparison(found.comparison)
    print("\nWhat the thinking model writes, shaded by passes per token:\n")
    print(shade_terminal(found.sample.tokens, found.sample.passes, color=sys.stdout.isatty()))
    print(f"""
  the page:     {found.report}
  the numbers:  {args.out / "results.json"}
  the runs:     {args.out / "runs"}

Next:
  pondera generate {found.thinker} --prompt "class " --show-compute
  pondera train ponderlm2 --data.text YOUR_TEXT
  pondera compare plain doubledepth ponderlm2 --seeds 3 --data.text YOUR_TEXT""")
    return 0
