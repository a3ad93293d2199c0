"""``pondera generate``: streams text from a trained model."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

from pondera.cli.output import only_json, print_answers, print_json, print_table
from pondera.cli.parser import Parser, add_budget, add_kernels, add_kv_cache, add_weights, bounded_float, positive_int
from pondera.core.errors import UserError
from pondera.core.escape import escape_lines

if TYPE_CHECKING:
    from pondera.inference.load import Loaded

SUMMARY = "continues a prompt, or answers a task; can show the passes per token"
EXAMPLES = """
pondera generate runs/ponderlm2-seed0 --prompt "def read(path):"
pondera generate runs/ponderlm2-seed0 --prompt "The" --greedy --max-new-tokens 40 --show-compute
pondera generate runs/ponderlm2-seed0 --prompt "The" --effort low
pondera generate runs/ponderlm2-seed0 --prompt "R 102 021 210"      (a run on StateTracking)
pondera generate runs/ponderlm2-seed0 --prompt "The" --kv-cache "SnapKV(256)"
pondera generate smollm2 --spans my.index --quote --prompt "When was it built?"      (see pondera index)
cat story.txt | pondera generate runs/ponderlm2-seed0 --prompt -
"""


def parser() -> Parser:
    """The argument parser of ``pondera generate``."""
    arguments = Parser(
        "generate",
        "Continues a prompt. A run on a task answers the prompt: it prints the prediction and the passes of each token.",
        EXAMPLES,
    )
    arguments.add_argument(
        "path", metavar="RUN", help="a run folder, a model folder, a .gguf file, smollm2, or a hub name"
    )
    arguments.add_argument("--prompt", required=True, metavar="TEXT", help="text to continue; - reads it from stdin")
    arguments.add_argument(
        "--max-new-tokens",
        type=positive_int(1),
        default=100,
        metavar="N",
        help="maximum number of new tokens (default: 100)",
    )
    arguments.add_argument(
        "--temperature", type=bounded_float(0), metavar="X", help="sampling temperature; 0 is greedy (default: 0.8)"
    )
    arguments.add_argument(
        "--top-p",
        type=bounded_float(0, 1, above=True),
        metavar="X",
        help="nucleus sampling: probability mass of the candidates (default: 0.95)",
    )
    arguments.add_argument("--greedy", action="store_true", help="greedy decoding, same as --temperature 0")
    arguments.add_argument(
        "--seed", type=positive_int(0), default=0, metavar="N", help="random seed of the sampling (default: 0)"
    )
    add_budget(arguments)
    add_kv_cache(arguments)
    add_kernels(arguments)
    add_weights(arguments, "; decodes faster, `pondera eval --weights int8` says what it costs")
    arguments.add_argument(
        "--spans", metavar="INDEX", help="an index of text files, made by pondera index; with --quote"
    )
    arguments.add_argument(
        "--quote",
        action="store_true",
        help="answer with the sentence of the files in --spans that fits the prompt best, byte for byte; nothing is "
        "generated, and the model is not run",
    )
    arguments.add_argument("--quotes", type=positive_int(1), metavar="N", help="the same with the N best sentences")
    arguments.add_argument(
        "--json", action="store_true", help="with --quote: print JSON, with files and ranges of bytes"
    )
    arguments.add_argument(
        "--show-concepts", action="store_true", help="list the chunks of the text with their concepts"
    )
    arguments.add_argument(
        "--show-compute", action="store_true", help="print the text at its end, shaded by passes per token"
    )
    return arguments


def run(args: argparse.Namespace) -> int:
    """Streams the text to stdout."""
    if args.greedy and (args.temperature or args.top_p is not None):
        raise UserError("--greedy does not sample; leave out --greedy, or --temperature and --top-p")
    prompt = _prompt(args.prompt)
    if args.spans is not None or args.quote or args.quotes is not None or args.json:
        return _quote(args, prompt)

    from pondera.evaluation.open_model import open_model
    from pondera.inference.answers import answers, task_of
    from pondera.inference.generate import generate
    from pondera.report.heatmap import shade_terminal

    terminal = sys.stdout.isatty()

    def on_text(text: str) -> None:
        # The model can generate control characters, which must not reach the terminal.
        print(escape_lines(text) if terminal else text, end="", flush=True)

    temperature = 0.0 if args.greedy else 0.8 if args.temperature is None else args.temperature
    top_p = 0.95 if args.top_p is None else args.top_p
    options = {"calibrate": args.calibrate, "kernels": args.kernels, "weights": args.weights}
    loaded = open_model(args.path, args.kv_cache, **options)
    if task_of(loaded) is not None:
        print_answers(answers(loaded, prompt, args.effort, args.max_passes))
        return 0
    if args.show_concepts and loaded.model.chunk is None:
        raise UserError(
            f"--show-concepts: {loaded.name} has no concepts; leave it out, or use a model trained with "
            'chunk: "ConceptLM()"'
        )
    found = generate(
        loaded,
        prompt,
        args.max_new_tokens,
        temperature,
        top_p,
        args.seed,
        None if args.show_compute else on_text,
        args.effort,
        args.max_passes,
    )
    print(shade_terminal(found.tokens, found.passes, color=terminal) if args.show_compute else "")
    if args.show_concepts:
        _show_concepts(loaded, found.ids)
    return 0


def _quote(args: argparse.Namespace, question: str) -> int:
    """Prints sentences of indexed files."""
    if args.spans is None or not (args.quote or args.quotes):
        given = next(f"--{name}" for name in ("spans", "quotes", "quote", "json") if getattr(args, name))
        raise UserError(
            f"{given}: quotes need an index and --quote; type: pondera index docs/ --out my.index, then "
            f'pondera generate {args.path} --spans my.index --quote --prompt "..."'
        )

    from pondera.inference.quotes.index import SpanIndex

    with only_json(args.json):
        found = SpanIndex.load(args.spans).quotes(question, args.quotes or 1)
    if args.json:
        print_json([asdict(quote) | {"also": [place._asdict() for place in quote.also]} for quote in found])
        return 0
    for quote in found:
        print(escape_lines(quote.text) if sys.stdout.isatty() else quote.text)
        for place in ((quote.file, quote.start, quote.end), *quote.also):
            print("    {}, bytes {} to {}".format(*place))
    return 0


def _show_concepts(loaded: Loaded, ids: list[int]) -> None:
    """Prints each complete chunk with its codes and the number of correctly predicted codes."""
    from pondera.methods.probe.concepts import cell, read

    rows = []
    for chunk in read(loaded.model, loaded.tokenizer, ids):
        right = sum(a == b for a, b in zip(chunk.codes, chunk.predicted or [], strict=False))
        correct = f"{right} of {len(chunk.codes)}" if chunk.predicted is not None else ""
        rows.append([cell(chunk.text), " ".join(map(str, chunk.codes)), correct])
    print_table(["chunk", "concept", "predicted"], rows)


def _prompt(given: str) -> str:
    try:
        if given == "-":
            return sys.stdin.buffer.read().decode("utf-8")
        given.encode("utf-8")
    except UnicodeError:
        raise UserError("--prompt: not UTF-8 text; convert it first, e.g. with iconv") from None
    return given
