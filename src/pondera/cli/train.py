"""``pondera train``: trains a recipe or YAML file and writes a run folder."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import textwrap
from pathlib import Path
from typing import Any

from pondera.cli.config import load_config, load_flow_config
from pondera.cli.output import print_difficulty
from pondera.cli.parser import Parser
from pondera.core import run_config
from pondera.core.flow_config import FlowConfig
from pondera.core.metric import SCORES, score_name
from pondera.core.run_folder import Run, is_run

SUMMARY = "trains one model and writes a run folder"
EXAMPLES = """
pondera train ponderlm2
pondera train ponderlm2 --data.text books/ --train.steps 2000 --out runs/books
pondera train plain --think "PonderLM2(thoughts=2)" --backbone.hidden_size 256 --name two-thoughts
pondera train mine.yaml --train.seed 1
pondera train runs/books --resume
pondera train adaptivelatentcot --backbone runs/plain-seed0 --out runs/thinking
pondera train ponderlm2 --backbone smollm2 --train.lora 8 --data.context 128 --out runs/smollm2-thinking
pondera train flow-set --objective "TB(alpha=0.7)"
"""


def parser() -> Parser:
    """The argument parser of ``pondera train``."""
    arguments = Parser(
        "train",
        "Trains one model. Every setting of the recipe can be overridden by its dotted name.",
        EXAMPLES,
        settings="",
        kinds=(run_config.RunConfig, FlowConfig),
        notes=lambda: f"{recipes()}\n\n{every_setting()}\n",
    )
    arguments.add_argument("recipe", metavar="RECIPE", help="a recipe, a YAML file, or with --resume a run folder")
    arguments.add_argument("--out", type=Path, metavar="DIR", help="the run folder (default: runs/NAME-seedSEED)")
    arguments.add_argument("--resume", action="store_true", help="resume from the last checkpoint in the run folder")
    return arguments


def run(args: argparse.Namespace) -> int:
    """Trains the model, then prints the paths of its files and the next commands."""
    folder = Path(args.recipe)
    again = is_run(folder)
    source = str(folder / "config.yaml") if again else args.recipe
    if run_config.is_flow(run_config.read(source)):
        return _run_flow(args, source, folder if again else None)
    config = load_config(source, args.overrides)
    out = args.out or (folder if again else _new_folder(config))

    from pondera.training.train import train

    done = train(config, out, args.resume, progress=True)
    if os.environ.get("RANK", "0") == "0":  # only the first process prints
        print(_summary(done))
        if by_difficulty := (done.result() or {}).get("by_difficulty"):
            print_difficulty({done.config.name: [by_difficulty]})
    return 0


def _run_flow(args: argparse.Namespace, source: str, folder: Path | None) -> int:
    """Trains a GFlowNet, then prints its modes, mean reward and distance to the target, next to a perfect sampler."""
    config = load_flow_config(source, args.overrides)
    out = args.out or folder or _new_folder(config)

    from pondera.flows.report import FlowReport
    from pondera.flows.train import train_flow

    done = train_flow(config, out, args.resume, progress=True)
    result = done.result() or {}
    report = FlowReport(**{name: result[name] for name in FlowReport.__dataclass_fields__})
    files = [("numbers", str(done.result_file)), ("training curve", str(done.metrics_file))]
    print(f"  {config.objective} on {config.environment}")
    print("\n".join(f"  {name + ':':19}{text}" for name, text in [*report.lines(), *files]))
    return 0


def _new_folder(config: run_config.RunConfig | FlowConfig) -> Path:
    name = re.sub(r"[^\w.-]+", "-", config.name)
    return Path("runs") / f"{name}-seed{config.train.seed}"


def _summary(done: Run) -> str:
    from pondera.evaluation.run_warnings import run_warnings

    result = done.result() or {}
    name = score_name([result])
    score = f"  ({result[name]:.4f} {SCORES[name]})" if name in result else ""
    path = shlex.quote(str(done.path))
    rows = [
        ("scores and costs", f"{done.result_file}{score}"),
        *_trained(result, done.config),
        *(("warning", warning) for warning in run_warnings(result, done.config)),
        ("model", str(done.model_dir)),
        ("training curve", str(done.metrics_file)),
        ("generate", f"pondera generate {path} --prompt {shlex.quote(_prompt(done))}{_shows(done)}"),
        ("evaluate", f"pondera eval {path}{'' if done.config.data.task else ' --data.text FILE'}"),
        ("report", f"pondera report {path}"),
    ]
    return "\n".join(f"  {name + ':':19}{text}" for name, text in rows)


def _trained(result: dict[str, Any], config: run_config.RunConfig) -> list[tuple[str, str]]:
    """How many parameters LoRA and the methods trained."""
    if "trained_parameters" not in result:
        return []
    counts = f"{result['trained_parameters']:,} of {result['parameters']:,} parameters"
    return [("trained", f"{counts}: LoRA of rank {config.train.lora}, merged into the model, and what methods add")]


def _prompt(run: Run) -> str:
    """A prompt that fits the data of a run: for a task, the first half of a held-out window."""
    data = run.config.data
    if not data.task:
        return "Once upon a time"
    from pondera.data.task_corpus import prepare_task

    corpus = prepare_task(data)
    return str(corpus.tokenizer().decode(corpus.validation.windows(data.context)[0]["input_ids"][: data.context // 2]))


def _shows(run: Run) -> str:
    """The option that shows what the method of a run does."""
    return " --show-compute" if run.config.think else " --show-concepts" if run.config.chunk else ""


def recipes() -> str:
    """The recipes of the package with their descriptions."""
    lines = ["recipes:"]
    kinds = [(name, run_config.RunConfig) for name in run_config.recipe_names()]
    kinds += [(name, FlowConfig) for name in run_config.flow_recipe_names()]
    for name, kind in kinds:
        about = run_config.load(name, kind=kind).about
        lines += [f"  {name}", *textwrap.wrap(about, 100, initial_indent="      ", subsequent_indent="      ")]
    return "\n".join(lines)


def every_setting() -> str:
    """All settings of a run with their help and default."""
    lines = ["settings and their defaults (a recipe may override them):", *_settings(run_config.RunConfig)]
    lines += [
        "  --backbone.FIELD VALUE",
        "      any field of the architecture's transformers config, e.g. --backbone.hidden_size 256",
    ]
    lines += ["", "settings of recipes of GFlowNets (flow-...):", *_settings(FlowConfig)]
    return "\n".join(lines)


def _settings(kind: type) -> list[str]:
    lines = []
    for name, item in run_config.fields(kind).items():
        help = f"{item.metadata['help']} (default: {_shown(item.default)})"
        lines += [f"  --{name} VALUE", *textwrap.wrap(help, 100, initial_indent=" " * 6, subsequent_indent=" " * 6)]
    return lines


def _shown(default: Any) -> str:
    if default is None:
        return "none"
    return repr(default) if default == "" else str(default).lower() if isinstance(default, bool) else str(default)
