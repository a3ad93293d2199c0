"""``pondera probe``: looks at a trained model from outside, e.g. at what it would say after each pass."""

from __future__ import annotations

import argparse
from dataclasses import replace

from pondera.cli.output import only_json, print_json, print_table
from pondera.cli.parser import Parser, whole
from pondera.ground import spec
from pondera.ground.errors import UserError, unknown
from pondera.ground.spec import PROBES, Method, Spec
from pondera.ground.text import open_text

SUMMARY = "looks at how a trained model thinks"
EXAMPLES = """
pondera probe
pondera probe think_trace runs/ponderlm2-seed0 --text "Once upon a time there was"
pondera probe think_trace runs/ponderlm2-seed0 --data.text story.txt --max-tokens 100 --top 3 --json
"""


def parser() -> Parser:
    """What ``pondera probe`` takes."""
    found = Parser("probe", "Looks at a trained model that reads a text. Without a NAME it lists the probes.", EXAMPLES)
    found.add_argument("name", nargs="?", metavar="NAME", help="the probe, such as think_trace or ThinkTrace")
    found.add_argument("path", nargs="?", metavar="RUN", help="a run folder, a model folder, or a hub name")
    found.add_argument("--text", metavar="TEXT", help="what the model reads")
    found.add_argument("--data.text", dest="source", metavar="FILE", help="or the file that it reads (its beginning)")
    found.add_argument("--max-tokens", type=whole(1), metavar="N", help="look at so many tokens (default: 32)")
    found.add_argument("--top", type=whole(1), metavar="K", help="candidates per pass (default: 5)")
    found.add_argument("--json", action="store_true", help="print JSON, and nothing else")
    return found


def run(args: argparse.Namespace) -> int:
    """Lists the probes, or prints what one of them finds."""
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
        raise UserError(f"say which model to look at: pondera probe {args.name} RUN")
    text = _text(args)

    from pondera.jobs.load import load

    with only_json(args.json):
        loaded = load(args.path)
        found = probe.run(loaded.model, loaded.tokenizer, text)
    if args.json:
        print_json({"name": loaded.name} | found)
    else:
        shown = probe.show(found)
        print_table(shown.columns, shown.rows)
        print(shown.note)
    return 0


def _chosen(given: str, options: dict[str, int]) -> Spec:
    """The probe of that name, in whatever case and with or without underscores, with the options as its arguments."""
    wanted = spec.parse(given)
    names = {name.lower(): name for name in spec.index(PROBES)}
    name = names.get(wanted.name.replace("_", "").lower())
    if name is None:
        raise unknown("probe", wanted.name, names.values())
    return replace(wanted, name=name, kwargs=wanted.kwargs | options)


def _text(args: argparse.Namespace) -> str:
    if (args.text is None) == (args.source is None):
        raise UserError('say what the model reads: --text "Once upon a time", or --data.text FILE')
    if args.text is None:
        document = next(open_text(args.source).read(), None)
        if document is None:
            raise UserError(f"data.text: {args.source!r} holds no text; give a file that does")
        return document.text
    try:
        args.text.encode()
    except UnicodeEncodeError:
        raise UserError("--text: this is not UTF-8 text; convert it first, e.g. with iconv") from None
    return args.text


def _entry(method: Method) -> str:
    return f"{method.name}: {method.summary}\n  write       {method.signature}"
