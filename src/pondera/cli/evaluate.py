"""``pondera eval``: what a trained model scores on a text, and what a token costs."""

from __future__ import annotations

import argparse
import math

from pondera.cli.output import only_json, print_json
from pondera.cli.parser import Parser, whole
from pondera.ground import settings

SUMMARY = "scores a trained model on a text, with the price of a token"
EXAMPLES = """
pondera eval runs/ponderlm2-seed0
pondera eval runs/ponderlm2-seed0 --data.text book.txt --max-tokens 100000
pondera eval path/to/model --data.text stdlib --json
"""
SHOWN = (
    ("loss", "loss", "nats per token"),
    ("perplexity", "perplexity", "per token"),
    ("bits_per_byte", "bits per byte", "comparable between tokenizers"),
    ("passes_per_token", "passes", "per token"),
    ("inference_flops_per_token", "FLOPs", "per generated token"),
    ("kv_bytes_per_token", "KV cache", "bytes per token"),
    ("tokens_per_second", "speed", "tokens per second, here and now"),
)


def parser() -> Parser:
    """What ``pondera eval`` takes."""
    found = Parser("eval", "Scores a trained model on held-out text.", EXAMPLES, settings="data.", notes=_settings)
    found.add_argument("path", metavar="RUN", help="a run folder, a model folder, or a hub name")
    found.add_argument("--max-tokens", type=whole(1), metavar="N", help="score at most this many (default: all)")
    found.add_argument("--json", action="store_true", help="print the scores as JSON, and nothing else")
    return found


def run(args: argparse.Namespace) -> int:
    """Scores and prints."""
    from pondera.jobs.evaluate import evaluate

    with only_json(args.json):
        found = evaluate(args.path, args.overrides, args.max_tokens)
    if args.json:
        print_json(found)
    else:
        for key, name, unit in SHOWN:
            if found.get(key) is not None:
                print(f"  {name:15}{_number(found[key]):>12}  {unit}")
    return 0


def _number(value: float) -> str:
    if not math.isfinite(value):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _settings() -> str:
    helps = {name: settings.fields()[name].metadata["help"] for name in ("data.text", "data.context", "data.column")}
    lines = "\n".join(f"  --{name:14}{help}" for name, help in helps.items())
    return f"the text (default: what the run held out of its own; a model that is not from a run needs one):\n{lines}\n"
