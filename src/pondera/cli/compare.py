"""``pondera compare``: several recipes, several seeds, one table at equal cost."""

from __future__ import annotations

import argparse
from pathlib import Path

from pondera.cli.config import load_config
from pondera.cli.output import only_json, print_comparison, print_json
from pondera.cli.parser import Parser, bounded_float, positive_int

SUMMARY = "trains several recipes over seeds and charges each for what it spends"
EXAMPLES = """
pondera compare plain ponderlm2 --seeds 3
pondera compare plain doubledepth pausetoken ponderlm2 --equal flops --data.text books/
pondera compare plain mine.yaml --equal flops --flops 1e14 --out runs/mine --json
"""


def parser() -> Parser:
    """What ``pondera compare`` takes."""
    found = Parser(
        "compare",
        "Trains every recipe with every seed; prints scores beside prices, as mean ± deviation over seeds. Settings "
        "given by dotted name (see `pondera train --help`) hold for all recipes.",
        EXAMPLES,
        settings="",
    )
    add = found.add_argument
    add("recipes", nargs="+", metavar="RECIPE", help="recipes or YAML files, the one to beat first")
    add("--seeds", type=positive_int(1), default=3, metavar="N", help="runs per recipe (default: 3)")
    add("--equal", choices=("tokens", "flops"), default="tokens", help="what all are trained with (default: tokens)")
    add(
        "--flops",
        type=bounded_float(0, above=True),
        metavar="N",
        help="how many, with --equal flops (default: the first's)",
    )
    add(
        "--jobs", type=positive_int(1), default=1, metavar="N", help="runs side by side, sharing the cores (default: 1)"
    )
    add("--out", type=Path, metavar="DIR", help="where runs and report go (default: runs/compare-RECIPES)")
    add("--json", action="store_true", help="print the rows as JSON, and nothing else")
    return found


def run(args: argparse.Namespace) -> int:
    """Trains, prints the table and says where the report is."""
    for recipe in args.recipes:
        load_config(recipe, args.overrides)
    out = args.out or Path("runs") / f"compare-{'-'.join(Path(recipe).stem for recipe in args.recipes)}"

    from pondera.comparison.compare import compare

    with only_json(args.json):
        found = compare(args.recipes, args.seeds, args.equal, args.flops, out, args.overrides, True, args.jobs)
    if args.json:
        print_json(found)
        return 0
    print_comparison(found)
    print(f"\n  the page:     {out / 'report.html'}\n  the numbers:  {out / 'results.json'}")
    return 0
