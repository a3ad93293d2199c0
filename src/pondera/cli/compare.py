"""``pondera compare``: several recipes, several seeds, one table at equal cost."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from pondera.cli.config import load_config
from pondera.cli.output import only_json, print_json, print_table
from pondera.cli.parser import Parser, number, whole
from pondera.ground.errors import UserError

SUMMARY = "trains several recipes over seeds and charges each for what it spends"
EXAMPLES = """
pondera compare plain ponderlm2 --seeds 3
pondera compare plain doubledepth pausetoken ponderlm2 --equal flops --data.text books/
pondera compare plain mine.yaml --equal flops --flops 1e14 --out runs/mine --json
"""
COLUMNS = {
    "bits_per_byte": "bits/byte",
    "loss": "loss",
    "passes_per_token": "passes/token",
    "inference_flops_per_token": "inference FLOPs/token",
    "kv_bytes_per_token": "KV bytes/token",
    "train_flops": "training FLOPs",
    "tokens_per_second": "tokens/s",
    "parameters": "parameters",
}


def parser() -> Parser:
    """What ``pondera compare`` takes."""
    found = Parser(
        "compare",
        "Trains every recipe with every seed; prints scores beside prices, as mean ± spread over seeds. Settings given "
        "by dotted name (see `pondera train --help`) hold for all recipes.",
        EXAMPLES,
        settings="",
    )
    add = found.add_argument
    add("recipes", nargs="+", metavar="RECIPE", help="recipes or YAML files, the one to beat first")
    add("--seeds", type=whole(1), default=3, metavar="N", help="runs per recipe (default: 3)")
    add("--equal", choices=("tokens", "flops"), default="tokens", help="what all are trained with (default: tokens)")
    add("--flops", type=number(0, above=True), metavar="N", help="how many, with --equal flops (default: the first's)")
    add("--out", type=Path, metavar="DIR", help="where runs and report go (default: runs/compare-RECIPES)")
    add("--json", action="store_true", help="print the rows as JSON, and nothing else")
    return found


def run(args: argparse.Namespace) -> int:
    """Trains, prints the table and says where the report is."""
    if "name" in args.overrides:
        raise UserError("--name: here every recipe keeps its own name; leave it out")
    if args.flops is not None and args.equal != "flops":
        raise UserError("--flops says how much --equal flops grants; add --equal flops, or leave --flops out")
    names = [load_config(recipe, args.overrides).name for recipe in args.recipes]
    for name in names:
        if names.count(name) > 1:
            raise UserError(
                f"two of the recipes are called {name!r}; the table could not tell them apart, so rename one"
            )
    out = args.out or Path("runs") / f"compare-{'-'.join(Path(recipe).stem for recipe in args.recipes)}"

    from pondera.jobs.compare import compare

    with only_json(args.json):
        found = compare(args.recipes, args.seeds, args.equal, args.flops, out, args.overrides, progress=True)
    if args.json:
        print_json(found)
        return 0
    rows = found["rows"]
    keys = [key for key in COLUMNS if any(row.get(key) is not None for row in rows)]
    print_table(
        ["recipe", *(COLUMNS[key] for key in keys)],
        [[row["name"], *(_cell(row.get(key)) for key in keys)] for row in rows],
    )
    print(f"mean ± spread over {args.seeds} seeds at equal training {args.equal}\n")
    print(f"  the page:     {out / 'report.html'}\n  the numbers:  {out / 'results.json'}")
    return 0


def _cell(value: Any) -> str:
    """A number, or the mean and spread of several."""
    if isinstance(value, dict):
        mean, spread = value.get("mean"), value.get("spread")
        return f"{_number(mean)} ± {_number(spread)}" if spread else _number(mean)
    return _number(value)


def _number(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:.4f}".rstrip("0").rstrip(".") if abs(value) < 1000 else f"{value:.3g}"
