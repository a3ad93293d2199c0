"""``pondera demo``: trains three tiny models and shows a first comparison."""

from __future__ import annotations

import argparse
from pathlib import Path

from pondera.cli.output import print_comparison
from pondera.cli.parser import Parser

SUMMARY = "trains three tiny models on local text and shows the effect of latent thoughts"
EXAMPLES = """
pondera demo
pondera demo --out demo
"""
INTRODUCTION = """Trains three small Llamas on the sources and docs of this Python, with three seeds each.
It takes about five minutes on two cores.
  plain              3 layers, one pass per token
  doubledepth        6 layers, one pass: same cost as two passes through 3 layers
  latentcot          3 layers, two passes: one latent thought per token before its prediction
"""


def parser() -> Parser:
    """The argument parser of ``pondera demo``."""
    arguments = Parser(
        "demo",
        "Trains tiny models on the standard library of this Python and compares them; needs no network.",
        EXAMPLES,
    )
    arguments.add_argument(
        "--out", type=Path, default=Path("demo"), metavar="DIR", help="folder for runs and report (default: demo)"
    )
    return arguments


def run(args: argparse.Namespace) -> int:
    """Runs the demo, prints the results and the paths of its files."""
    import sys

    from pondera.comparison.demo import demo
    from pondera.report.heatmap import shade_terminal

    print(INTRODUCTION, flush=True)
    found = demo(args.out, progress=True)
    print_comparison(found.comparison)
    print("\nA sample of the latent-thought model, shaded by passes per token:\n")
    print(shade_terminal(found.sample.tokens, found.sample.passes, color=sys.stdout.isatty()))
    print(f"""
  report:   {found.report}
  numbers:  {args.out / "results.json"}
  runs:     {args.out / "runs"}

Next:
  pondera generate {found.thinking_run} --prompt "class " --show-compute
  pondera train ponderlm2 --data.text YOUR_TEXT
  pondera compare plain doubledepth ponderlm2 --seeds 3 --data.text YOUR_TEXT""")
    return 0
