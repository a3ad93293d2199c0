"""``pondera doctor``: checks a config and estimates memory and time before training."""

from __future__ import annotations

import argparse

from pondera.cli.config import load_config
from pondera.cli.parser import Parser

SUMMARY = "checks a run before it starts and estimates its memory and time"
EXAMPLES = """
pondera doctor ponderlm2
pondera doctor mine.yaml --backbone.hidden_size 1024 --train.batch_size 64
"""


def parser() -> Parser:
    """The argument parser of ``pondera doctor``."""
    arguments = Parser(
        "doctor",
        "Checks installation, machine and config, and estimates memory and time, without training. The exit code is 2 if "
        "the run cannot work. Settings are given as for `pondera train`.",
        EXAMPLES,
        settings="",
    )
    arguments.add_argument(
        "recipe", nargs="?", default="plain", metavar="RECIPE", help="a recipe or YAML file (default: plain)"
    )
    return arguments


def run(args: argparse.Namespace) -> int:
    """Prints all findings."""
    config = load_config(args.recipe, args.overrides)

    from pondera.comparison.doctor import examine

    worst = "ok"
    print(f"checking {args.recipe}")
    for finding in examine(config):
        print(f"  {finding.level:9}{finding.topic:14}{finding.text}", flush=True)
        worst = finding.level if finding.level == "problem" else worst
    print("cannot run: see the problems above" if worst == "problem" else "ready to run")
    return 2 if worst == "problem" else 0
