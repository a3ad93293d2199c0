"""Does α help a GFlowNet explore, and what does it do to its target? Against a perfect sampler and two rivals.

    python -m experiments.flows.run              560 runs without duplicates, about 55 minutes of one core
    python -m experiments.flows.run --seeds 1    a fifth of it; more seeds can be added later
    python -m experiments.flows.run --paper      the published Set tasks: small at full budget, one medium, one large
    python -m experiments.flows.run --exact      exact laws, no training: a minute
    python -m experiments.flows.run --publish    writes the results of the runs so far
    python -m experiments.flows.run --smoke      a check that it runs

Small environments, in which the law of the trained policy is computed exactly: Set(16, 8) and Bit(16, 4), where all
trajectories have one length, and HyperGrid(4, 8) and spans, where they do not. Objectives: TB, DB, SubTB, FL-DB. Variants: α
= ½; α held at 0.3, 0.7 and 0.9; 0.9 annealed to exactly ½ in the last tenth; log Z and log flows started as high as α = 0.9
would put them (`flow_offset`, which keeps the target); and the rewards to the power of 2, annealed to 1 in the last tenth. In
the first two environments the offset is α = 0.9 held, step for step, so it is not run there. Runs are resumable: a finished
one is a line of runs/flows/rows.jsonl.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from experiments.common.publishing import write_json
from pondera.core import spec
from pondera.core.flow_config import FlowConfig, FlowTrainConfig, PolicyConfig
from pondera.flows import exact
from pondera.flows.graph import Graph, countable, listed
from pondera.flows.perfect import expected_log_reward, expected_modes, reward_table
from pondera.flows.train import FlowTrainer

SMALL = {"Set(16, choose=8)": 800, "Spans()": 800, "HyperGrid(4, side=8)": 800, "Bit(16, word=4)": 3000}
"""The environments with their steps."""
GRADED = ("Set(16, choose=8)", "Bit(16, word=4)")
OBJECTIVES = ("TB", "DB", "SubTB", "FLDB")
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "α = ½": ("", {}),
    "α = 0.3": ("alpha=0.3", {}),
    "α = 0.7": ("alpha=0.7", {}),
    "α = 0.9": ("alpha=0.9", {}),
    "α = 0.9, annealed": ("alpha=0.9, anneal='exact'", {}),
    "offset": ("", {"flow_offset": math.log(9)}),
    "exponent 2": ("", {"reward_exponent": 2.0}),
}
"""Arguments of the objective and settings of training."""
PAPER = {"small": ("Set(30, choose=20, energies='small')", 3), "medium": ("Set(80, choose=60, energies='medium')", 1),
         "large": ("Set(100, choose=80, energies='large')", 1)}  # fmt: skip
"""The published sets, with the number of seeds."""
PAPER_STEPS = 10_000
SAMPLES = 163_200
"""Samples behind the published numbers of modes."""
PAPER_VARIANTS = ("α = ½", "α = 0.9, annealed", "exponent 2")

Job = dict[str, Any]


def jobs(seeds: int) -> Iterator[Job]:
    """All runs on small environments, one seed after the other."""
    for seed in range(seeds):
        for environment, steps in SMALL.items():
            for objective in OBJECTIVES:
                for variant in VARIANTS:
                    if variant != "offset" or environment not in GRADED:
                        yield job(environment, objective, variant, seed, steps, 128)


def paper_jobs() -> Iterator[Job]:
    """All runs on the published sets."""
    for environment, seeds in PAPER.values():
        for seed in range(seeds):
            for objective in ("TB", "DB", "FLDB"):
                for variant in PAPER_VARIANTS:
                    yield job(environment, objective, variant, seed, PAPER_STEPS, 256)


def job(environment: str, objective: str, variant: str, seed: int, steps: int, width: int) -> Job:
    """One run, as plain data that names it."""
    return dict(environment=environment, objective=objective, variant=variant, seed=seed, steps=steps, width=width)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="seeds per variant (default: %(default)s)")
    parser.add_argument("--paper", action="store_true", help="the published sets, hours of one core")
    parser.add_argument("--exact", action="store_true", help="exact laws, no training")
    parser.add_argument("--publish", action="store_true", help="run nothing")
    parser.add_argument("--smoke", action="store_true", help="a few steps; writes to runs/smoke only")
    args = parser.parse_args()
    torch.set_num_threads(1)
    root = Path("runs/smoke") if args.smoke else Path()
    if args.exact:
        write_json(
            root / "results/flows/exact.json", {"command": "python -m experiments.flows.run --exact", **exact_laws()}
        )
        return
    rows_file = root / ("runs/flows/paper.jsonl" if args.paper else "runs/flows/rows.jsonl")
    wanted = list(paper_jobs() if args.paper else jobs(1 if args.smoke else args.seeds))
    if args.smoke:
        wanted = [
            one | {"steps": 8}
            for one in wanted
            if one["objective"] in ("TB", "FLDB") and "Bit" not in one["environment"]
        ]
    if not args.publish:
        train_all(wanted, rows_file)
    rows = read(rows_file)
    seeds = str(1 + max((row["seed"] for row in rows), default=0))
    command = ["python", "-m", "experiments.flows.run", *(["--paper"] if args.paper else ["--seeds", seeds])]
    name = "paper" if args.paper else "study"
    write_json(root / f"results/flows/{name}.json", {"command": shlex.join(command), "rows": rows})


def exact_laws() -> dict[str, Any]:
    """What the optimum with α draws, and what a perfect sampler finds of the modes of the published sets."""
    laws, perfect = [], []
    for environment in SMALL:
        graph = listed(spec.build(environment, "environment"))
        log_pb, target = exact.uniform_backward(graph), exact.target(graph)
        for alpha in (0.3, 0.5, 0.7, 0.9):
            _, log_pf = exact.optimum(graph, log_pb, alpha)
            drawn, tilt = exact.drawn_by(graph, log_pf), exact.tilt(graph, log_pb, alpha)
            repaired = drawn - tilt
            weight = (target - drawn).masked_fill(~graph.last_N, -math.inf)  # up to a constant, R/Z over what is drawn
            size = math.exp(-float((drawn + 2 * weight)[graph.last_N].logsumexp(0)))
            laws.append(
                {
                    "environment": environment,
                    "graded": graph.env.graded,
                    "alpha": alpha,
                    "tv": exact.total_variation(drawn, target),
                    "tv_reweighted": exact.total_variation(repaired - repaired.logsumexp(0), target),
                    "effective_samples": size,
                    "steps": exact.mean_length(graph, log_pf),
                }
            )
    for name, (environment, _) in PAPER.items():
        env = spec.build(environment, "environment")
        table = env.reward_table()
        found = expected_modes(table, SAMPLES)
        mean = math.exp(expected_log_reward(table))
        perfect.append(
            {"set": name, "modes": env.count_modes(), "samples": SAMPLES, "found": found, "mean_reward": mean}
        )
    return {"laws": laws, "perfect": perfect}


def train_all(wanted: list[Job], file: Path) -> None:
    """Trains what is missing; each finished run is a line of the file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    done = {named(row) for row in read(file)}
    graphs: dict[str, Graph | None] = {}
    for number, one in enumerate(wanted, start=1):
        if named(one) in done:
            continue
        found = trained(one, graphs)
        with file.open("a") as lines:
            lines.write(json.dumps(one | found) + "\n")
        what = f"{one['environment']} {one['objective']} {one['variant']} seed {one['seed']}"
        print(f"{number}/{len(wanted)} {what}: {found['modes_found']} modes, TV {found['tv']}", flush=True)


def trained(one: Job, graphs: dict[str, Graph | None]) -> dict[str, Any]:
    """The report on one run, and the modes at a quarter of its steps."""
    given, settings = VARIANTS[one["variant"]]
    config = FlowConfig(
        environment=one["environment"],
        objective=f"{one['objective']}({given})",
        policy=PolicyConfig(width=one["width"]),
        train=FlowTrainConfig(steps=one["steps"], seed=one["seed"], **settings),
    )
    if one["environment"] not in graphs:
        env = spec.build(one["environment"], "environment")
        graphs[one["environment"]] = listed(env) if countable(env) else None
    graph, trainer, started = graphs[one["environment"]], FlowTrainer(config), time.thread_time()
    quarter: dict[str, Any] = {}
    while trainer.done < config.train.steps:
        trainer.step()
        if trainer.done % config.train.eval_every == 0 or trainer.done == config.train.steps:
            trainer.explore()
        if not quarter and 4 * trainer.done >= config.train.steps:
            trainer.explore()
            table = reward_table(trainer.env, graph)
            expected = None if table is None else expected_modes(table, trainer.samples)
            quarter = {"modes_at_quarter": len(trainer.modes), "perfect_at_quarter": expected}
    seconds = time.thread_time() - started
    return trainer.report(graph).to_dict() | quarter | {"cpu_seconds": round(seconds, 2)}


def named(row: Job) -> tuple[Any, ...]:
    """What tells runs apart."""
    return tuple(row[key] for key in ("environment", "objective", "variant", "seed", "steps", "width"))


def read(file: Path) -> list[Job]:
    """The finished runs; an incomplete last line is left out."""
    lines = file.read_text().split("\n")[:-1] if file.is_file() else []
    return [json.loads(line) for line in lines]


if __name__ == "__main__":
    main()
