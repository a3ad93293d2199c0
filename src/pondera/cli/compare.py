"""``pondera compare``: trains several recipes with several seeds and compares them at equal cost."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from pondera.cli.config import load_config
from pondera.cli.output import only_json, print_comparison, print_json
from pondera.cli.parser import Parser, bounded_float, positive_int
from pondera.core.errors import UserError

if TYPE_CHECKING:
    from pondera.comparison.sweep import Sweep

SUMMARY = "trains several recipes with several seeds and compares them at equal cost"
EXAMPLES = """
pondera compare plain ponderlm2 --seeds 3
pondera compare plain doubledepth pausetoken ponderlm2 --equal flops --data.text books/
pondera compare plain doubledepth ponderlm2 --sweep train.lr=2e-3,4e-3,8e-3
pondera compare plain mine.yaml --equal flops --flops 1e14 --out runs/mine --json
"""


def parser() -> Parser:
    """The argument parser of ``pondera compare``."""
    arguments = Parser(
        "compare",
        "Trains every recipe with every seed and prints scores and costs, as mean ± standard deviation over seeds. "
        "Settings by dotted name (see `pondera train --help`) apply to all recipes.",
        EXAMPLES,
        settings="",
        notes=_notes,
    )
    add = arguments.add_argument
    add("recipes", nargs="+", metavar="RECIPE", help="recipes or YAML files; the first is the baseline")
    add("--seeds", type=positive_int(1), default=3, metavar="N", help="runs per recipe (default: 3)")
    add("--equal", choices=("tokens", "flops"), default="tokens", help="what the runs have in common (default: tokens)")
    add(
        "--flops",
        type=bounded_float(0, above=True),
        metavar="N",
        help="training FLOPs with --equal flops (default: those of the baseline)",
    )
    add(
        "--jobs", type=positive_int(1), default=1, metavar="N", help="parallel runs, which share the cores (default: 1)"
    )
    add(
        "--sweep",
        action="append",
        default=[],
        metavar="SETTING=V,V,...",
        help="first train every recipe with each of these values and keep the best one for each recipe; this uses a "
        "seed of its own, which is not compared",
    )
    add(
        "--no-controls",
        action="store_true",
        help="leave out the random controls: for each recipe that learns which tokens take its passes, a model whose "
        "passes go to random tokens, with as many passes per token as the recipe has measured",
    )
    add("--out", type=Path, metavar="DIR", help="folder for runs and report (default: runs/compare-RECIPES)")
    add("--json", action="store_true", help="print JSON only")
    return arguments


def _notes() -> str:
    """What a reader of the result has to know."""
    from pondera.comparison.sweep import TUNABLE, TUNING_SEED

    return f"""how to read the result:
  NAME-random          the random control of NAME: the same settings, and random tokens take its mean passes per token
  At 1.06 × ...        variants whose inference FLOPs differ by at most 15 % are also compared with each other
  significant          the 95 % interval of the difference (Student t, seeds paired) does not contain zero
  after correction     nor does the wider interval for all differences of the result together (Bonferroni); with 3 seeds
                       it is wide, and 5 or more find smaller differences

--sweep tunes one of {", ".join(TUNABLE)}.
It trains each recipe once per value, for all its steps, with seed train.seed + {TUNING_SEED}, under OUT/tuning. The best final
score decides. Controls have the chosen value of their recipe.
"""


def run(args: argparse.Namespace) -> int:
    """Trains the runs, prints the table and the paths of the report."""
    for recipe in args.recipes:
        load_config(recipe, args.overrides)
    sweep = _sweep(args.sweep)
    out = args.out or Path("runs") / f"compare-{'-'.join(Path(recipe).stem for recipe in args.recipes)}"

    from pondera.comparison.compare import compare

    with only_json(args.json):
        found = compare(
            args.recipes,
            args.seeds,
            args.equal,
            args.flops,
            out,
            args.overrides,
            jobs=args.jobs,
            sweep=sweep,
            controls=not args.no_controls,
        )
    if args.json:
        print_json(found)
        return 0
    print_comparison(found)
    print(f"\n  report:   {out / 'report.html'}\n  numbers:  {out / 'results.json'}")
    return 0


def _sweep(given: list[str]) -> Sweep | None:
    """The sweep; there can be one."""
    from pondera.comparison.sweep import Sweep

    sweeps = [Sweep.parse(text) for text in given]
    if len({sweep.setting for sweep in sweeps}) < len(sweeps):
        raise UserError(
            f"--sweep {sweeps[0].setting} is given twice; put all values into one list: "
            f"--sweep {sweeps[0].setting}=VALUE,VALUE,..."
        )
    if len(sweeps) > 1:
        raise UserError(
            f"--sweep: tune one setting at a time, not {' and '.join(sweep.setting for sweep in sweeps)}; "
            "tune the first, then set it in the recipes and tune the next"
        )
    return sweeps[0] if sweeps else None
