"""``pondera probe``: analyses a trained model, e.g. its predictions after each pass."""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pondera.cli.output import only_json, print_json, print_table
from pondera.cli.parser import Parser, positive_int
from pondera.core import spec
from pondera.core.errors import UserError, unknown
from pondera.core.spec import PROBES, MethodInfo, Spec
from pondera.data.text import open_text

if TYPE_CHECKING:
    from torch import Tensor

    from pondera.inference.load import Loaded
    from pondera.methods.probe.base import Probe

SUMMARY = "analyses the passes, the codebooks or the embeddings of a model"
EXAMPLES = """
pondera probe
pondera probe think_trace runs/ponderlm2-seed0 --text "Once upon a time there was"
pondera probe think_trace runs/ponderlm2-seed0 --data.text story.txt --max-tokens 100 --top 3 --json
pondera probe collapse runs/conceptlm-seed0 --plot collapse.html
pondera probe collapse tokenizer.safetensors
pondera probe recovery smollm2 --data.text book.txt --plot recovery.html
"""
HELD_OUT = 65536
"""Tokens of held-out text that a probe reads by default."""


def parser() -> Parser:
    """The argument parser of ``pondera probe``."""
    about = "Analyses a trained model on a text, or tensors in a file. Without a NAME it lists the probes."
    arguments = Parser("probe", about, EXAMPLES)
    arguments.add_argument(
        "name", nargs="?", metavar="NAME", help="the probe, such as think_trace or Collapse(rank=12.0)"
    )
    arguments.add_argument(
        "path",
        nargs="?",
        metavar="MODEL",
        help="a run folder, a model folder, a hub name, or a file of tensors (.safetensors)",
    )
    arguments.add_argument("--text", metavar="TEXT", help="input of the model (default: held-out text of the run)")
    arguments.add_argument(
        "--data.text", dest="source", metavar="FILE", help="read the input from this file (its first document)"
    )
    arguments.add_argument(
        "--max-tokens", type=positive_int(1), metavar="N", help="maximum number of tokens (default: set by the probe)"
    )
    arguments.add_argument(
        "--top", type=positive_int(1), metavar="K", help="number of candidates to list (default: set by the probe)"
    )
    arguments.add_argument("--plot", type=Path, metavar="FILE", help="write an HTML page with plots")
    arguments.add_argument("--json", action="store_true", help="print JSON only")
    return arguments


def run(args: argparse.Namespace) -> int:
    """Lists the probes, or runs one and prints its results."""
    if args.name is None:
        methods = spec.index(PROBES)
        if args.json:
            print_json([{"name": name, "summary": method.summary} for name, method in methods.items()])
        else:
            print("\n\n".join(map(_entry, methods.values())))
            print('\nuse one:  pondera probe think_trace RUN --text "Once upon a time"')
        return 0
    given = {"max_tokens": args.max_tokens, "top": args.top}
    probe = spec.build(_chosen(args.name, {key: value for key, value in given.items() if value is not None}), *PROBES)
    if args.path is None:
        raise UserError(f"MODEL is missing; type: pondera probe {args.name} RUN")
    with only_json(args.json):
        name, found = _found(probe, args)
    shown = probe.show(found)
    if args.plot is not None:
        _draw(args, name, shown)
    if args.json:
        print_json({"name": name} | found)
    else:
        print_table(shown.columns, shown.rows)
        print(shown.note)
    return 0


def _found(probe: Probe, args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Runs the probe; returns the name of the model or file and the results."""
    file = Path(args.path).expanduser()
    if file.suffix == ".safetensors" or file.is_file():
        if args.text is not None or args.source is not None:
            raise UserError(f"{args.path} is a file of tensors and takes no text; leave --text and --data.text out")
        return file.name, probe.look(_tensors(file))
    text = _text(args)

    from pondera.inference.load import load

    loaded = load(args.path)
    return loaded.name, probe.run(loaded.model, loaded.tokenizer, _held_out(loaded) if text is None else text)


def _tensors(file: Path) -> dict[str, Tensor]:
    """Loads the tensors of a safetensors file; formats that execute code are not supported."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not file.is_file():
        raise UserError(f"no such file: {str(file)!r}")
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{file} cannot be read as safetensors: {error}; write it with safetensors.torch.save_file"
        ) from None


def _held_out(loaded: Loaded) -> str:
    """The first held-out tokens of a run, as text."""
    from pondera.data.corpus import prepare

    if loaded.run is None:
        raise UserError('a text is missing; give --text "Once upon a time" or --data.text FILE')
    split = prepare(loaded.run.config.data).validation
    return str(loaded.tokenizer.decode(split.ids[:HELD_OUT].tolist(), clean_up_tokenization_spaces=False))


def _draw(args: argparse.Namespace, name: str, shown: Any) -> None:
    """Writes the plots of the results."""
    from pondera.report.plots import write_plots

    if not shown.plots:
        raise UserError(f"--plot: {args.name} has no plots; leave it out")
    write_plots(shown.plots, shown.note, args.plot, f"{args.name}: {name}")


def _chosen(given: str, options: dict[str, int]) -> Spec:
    """The spec of a probe with the options as its arguments; case and underscores of the name are ignored."""
    wanted = spec.parse(given)
    names = {name.lower(): name for name in spec.index(PROBES)}
    name = names.get(wanted.name.replace("_", "").lower())
    if name is None:
        raise unknown("probe", wanted.name, names.values())
    return replace(wanted, name=name, kwargs=wanted.kwargs | options)


def _text(args: argparse.Namespace) -> str | None:
    """The text of ``--text`` or ``--data.text``; `None` without both."""
    if args.text is not None and args.source is not None:
        raise UserError("--text and --data.text exclude each other; give one of them")
    if args.text is None:
        if args.source is None:
            return None
        document = next(open_text(args.source).read(), None)
        if document is None:
            raise UserError(f"data.text: {args.source!r} contains no text; give another file")
        return document.text
    try:
        args.text.encode()
    except UnicodeEncodeError:
        raise UserError("--text: not UTF-8 text; convert it first, e.g. with iconv") from None
    if os.path.isfile(args.text):  # unlike Path.is_file, it does not raise for text that is no valid path
        raise UserError(
            f"--text {args.text}: this is a file, and --text takes the text itself; use --data.text {args.text}"
        )
    return args.text


def _entry(method: MethodInfo) -> str:
    return f"{method.name}: {method.summary}\n  write       {method.signature}"
