"""``pondera eval``: evaluates a trained model on held-out text, its task, minimal pairs or last words, with the cost."""

from __future__ import annotations

import argparse
import math
from typing import Any

from pondera.cli.evaluate_rows import add_rows, refuse_row_options, run_rows
from pondera.cli.output import only_json, print_difficulty, print_json, print_lengths, print_table
from pondera.cli.parser import Parser, add_budget, add_kv_cache, add_weights, positive_int, text_notes
from pondera.core.errors import UserError
from pondera.core.metric import SCORES, score_name

SUMMARY = "evaluates a trained model on held-out text, minimal pairs or last words, with the cost per token"
EXAMPLES = """
pondera eval runs/ponderlm2-seed0
pondera eval runs/ponderlm2-seed0 --data.text book.txt --max-tokens 100000
pondera eval path/to/model --data.text stdlib --json
pondera eval runs/ponderlm3-seed0 --effort 0,0.25,0.5,1
pondera eval runs/ponderlm2-seed0 --kv-cache "SnapKV(64)"
pondera eval path/to/model --data.text stdlib --weights int8
pondera eval runs/ponderlm2-seed0 --pairs blimp.jsonl.xz --max-rows 6700
pondera eval runs/ponderlm2-seed0 --last-word lambada_test.jsonl.xz
pondera eval runs/states --lengths 16,32,64
"""
SHOWN = (
    ("accuracy", "accuracy", "of the tokens that are asked"),
    ("permuted_accuracy", "accuracy", "if random tokens get the same passes"),
    ("loss", "loss", "nats per token"),
    ("perplexity", "perplexity", "per token"),
    ("bits_per_byte", "bits per byte", "comparable between tokenizers"),
    ("passes_per_token", "passes", "per token"),
    ("inference_flops_per_token", "FLOPs", "per generated token"),
    ("kv_bytes_per_token", "KV cache", "bytes per token"),
    ("tokens_per_second", "speed", "tokens per second, measured"),
)


COMPARED = ("accuracy", "error", "loss", "perplexity", "bits_per_byte")
"""The scores of the weights as saved that ``--weights`` adds."""


def parser() -> Parser:
    """The argument parser of ``pondera eval``."""
    arguments = Parser(
        "eval",
        "Evaluates a trained model on held-out text.",
        EXAMPLES,
        settings="data.",
        notes=lambda: text_notes("evaluation text"),
    )
    arguments.add_argument(
        "path", metavar="RUN", help="a run folder, a model folder, a .gguf file, smollm2, or a hub name"
    )
    arguments.add_argument(
        "--max-tokens", type=positive_int(1), metavar="N", help="maximum number of tokens to score (default: all)"
    )
    add_budget(arguments, several=True)
    arguments.add_argument(
        "--lengths",
        type=_lengths,
        metavar="N,N,...",
        help="of a run on a task: score windows of these lengths, also longer than those of the training",
    )
    add_kv_cache(arguments)
    add_weights(arguments, "; the weights as saved are scored, too, and the difference is printed")
    add_rows(arguments)
    arguments.add_argument("--json", action="store_true", help="print JSON only")
    return arguments


def run(args: argparse.Namespace) -> int:
    """Evaluates the model, at each effort or length that is asked for, and prints the scores."""
    if args.pairs is not None or args.last_word is not None:
        return run_rows(args)
    refuse_row_options(args)
    if args.lengths is not None:
        return _run_lengths(args)
    from pondera.evaluation.perplexity import given_settings

    wanted: list[str | float | None] = list(args.effort or [None])
    with only_json(args.json):
        given_settings(args.overrides)  # before the model is loaded
        found = _evaluated(args, wanted, args.weights)
        if args.weights is not None:
            for one, saved in zip(found, _evaluated(args, wanted, None), strict=True):
                one["weights"], score = args.weights, score_name([one, saved])
                one["saved_weights"] = {name: saved[name] for name in COMPARED if saved.get(name) is not None}
                one["difference"] = {"score": score, "value": one[score] - saved[score]}
    if args.json:
        print_json(found[0] if len(found) == 1 else [{"effort": e} | one for e, one in zip(wanted, found, strict=True)])
    elif len(found) == 1:
        for key, name, unit in SHOWN:
            if found[0].get(key) is not None:
                print(f"  {name:15}{_number(found[0][key]):>12}  {unit}")
        if "difference" in found[0]:
            score, value = found[0]["difference"].values()
            saved = found[0]["saved_weights"][score]
            about = f"{SCORES[score]}, {found[0]['weights']} minus the weights as saved ({saved:.4f})"
            print(f"  {'difference':15}{value:>+12.4f}  {about}")
        if "by_difficulty" in found[0]:
            print_difficulty({found[0]["name"]: [found[0]["by_difficulty"]]})
    else:
        rows = [_row(effort, one, found) for effort, one in zip(wanted, found, strict=True)]
        print_table(list(rows[0]), [list(row.values()) for row in rows], "quality and cost by effort")
    return 0


def _evaluated(
    args: argparse.Namespace, efforts: list[str | float | None], weights: str | None
) -> list[dict[str, Any]]:
    """The scores at each effort, with these weights."""
    from pondera.evaluation.open_model import open_model
    from pondera.evaluation.perplexity import evaluate

    model = args.path
    if len(efforts) > 1 or weights is not None or args.kv_cache is not None or args.calibrate is not None:
        kernels = "torch" if weights is None else "native"
        model = open_model(args.path, args.kv_cache, calibrate=args.calibrate, weights=weights, kernels=kernels)
    return [evaluate(model, args.overrides, args.max_tokens, effort, args.max_passes) for effort in efforts]


def _run_lengths(args: argparse.Namespace) -> int:
    """Evaluates a run on a task at each length and prints the scores."""
    if len(args.effort or []) > 1:
        raise UserError("--lengths and several efforts: give one --effort, or leave --lengths out")
    if args.weights is not None:
        raise UserError("--lengths and --weights: leave one of them out")
    if args.overrides:
        other = next(iter(args.overrides))
        raise UserError(f"--lengths and --{other}: --lengths scores the task of the run; leave one of them out")
    from pondera.evaluation.lengths import evaluate_lengths
    from pondera.evaluation.open_model import open_model

    compressed = args.kv_cache is not None or args.calibrate is not None
    with only_json(args.json):
        model = open_model(args.path, args.kv_cache, calibrate=args.calibrate) if compressed else args.path
        effort = args.effort[0] if args.effort else None
        found = evaluate_lengths(model, args.lengths, args.max_tokens, effort, args.max_passes)
    print_json(found) if args.json else print_lengths(found)
    return 0


def _lengths(text: str) -> list[int]:
    """An argument type: whole numbers, separated by commas."""
    return [positive_int(1)(part.strip()) for part in text.split(",")]


def _row(effort: str | float | None, one: dict[str, Any], found: list[dict[str, Any]]) -> dict[str, str]:
    """A row of the table: quality and cost at one effort, compared with the row of most passes."""
    full = max(found, key=lambda other: other["passes_per_token"])
    flops, score = one["inference_flops_per_token"], score_name(found)
    label = SCORES[score].replace(" per ", "/")
    changed = {f"Δ {label} of {one['weights']}": f"{one['difference']['value']:+.4f}"} if "difference" in one else {}
    return {
        "effort": str(effort),
        "passes/token": f"{one['passes_per_token']:.3f}",
        label: f"{one[score]:.4f}",
        f"Δ {label}": f"{one[score] - full[score]:+.4f}",
        **changed,
        "FLOPs/token": "" if flops is None else f"{flops:.3g}",
        "KV bytes/token": "" if one["kv_bytes_per_token"] is None else f"{one['kv_bytes_per_token']:,.0f}",
        "tokens/s": f"{one['tokens_per_second']:.0f}",
    }


def _number(value: float) -> str:
    if not math.isfinite(value):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
