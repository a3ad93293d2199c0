"""``pondera doctor``: will it run here, and how long will it take?"""

from __future__ import annotations

import argparse

from pondera.cli.config import load_config
from pondera.cli.parser import Parser

SUMMARY = "checks a run before it starts: what fits, what it takes, how long"
EXAMPLES = """
pondera doctor ponderlm2
pondera doctor mine.yaml --backbone.hidden_size 1024 --train.batch_size 64
"""


def parser() -> Parser:
    """What ``pondera doctor`` takes."""
    found = Parser(
        "doctor",
        "Checks installation, machine and config, and estimates memory and time; trains nothing. Exits with 2 if the "
        "run cannot work. Settings are given as to `pondera train`.",
        EXAMPLES,
        settings="",
    )
    found.add_argument("recipe", nargs="?", default="plain", metavar="RECIPE", help="or a YAML file (default: plain)")
    return found


def run(args: argparse.Namespace) -> int:
    """Prints every finding."""
    config = load_config(args.recipe, args.overrides)

    from pondera.comparison.doctor import examine

    worst = "ok"
    print(f"checking {args.recipe}")
    for finding in examine(config):
        print(f"  {finding.level:9}{finding.topic:14}{finding.text}", flush=True)
        worst = finding.level if finding.level == "problem" else worst
    print("cannot run as it is: see the problems above" if worst == "problem" else "ready to run")
    return 2 if worst == "problem" else 0
