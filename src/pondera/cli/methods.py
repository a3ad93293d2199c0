"""``pondera methods``: lists the methods, read from their files."""

from __future__ import annotations

import argparse
import ast
import inspect
from dataclasses import asdict
from typing import Any

from pondera.cli.output import print_json
from pondera.cli.parser import Parser
from pondera.core import spec
from pondera.core.cards import Card, cards
from pondera.core.errors import unknown
from pondera.core.spec import MethodInfo

SUMMARY = "lists all methods and tasks, or describes one"
EXAMPLES = """
pondera methods
pondera methods PonderLM2
PONDERA_METHODS=my_methods pondera methods --json
"""


def parser() -> Parser:
    """The argument parser of ``pondera methods``."""
    arguments = Parser("methods", "Lists the methods with their paper, cost and measured results.", EXAMPLES)
    arguments.add_argument("name", nargs="?", metavar="NAME", help="describe this method")
    arguments.add_argument("--json", action="store_true", help="print JSON only")
    return arguments


def run(args: argparse.Namespace) -> int:
    """Prints the list of methods, or the documentation of one method."""
    methods = spec.index(spec.SEAMS + spec.PARTS + spec.TASKS)
    if args.name is None:
        if args.json:
            print_json([_plain(method) for method in methods.values()])
        else:
            print("\n\n".join(map(_entry, methods.values())))
            print('\nuse one:  pondera train plain --think "PonderLM2(thoughts=1)"   more:  pondera methods NAME')
        return 0
    method = methods.get(args.name)
    if method is None:
        raise unknown("method", args.name, methods)
    text = documentation(method)
    if args.json:
        print_json(_plain(method) | {"documentation": text})
    else:
        print(f"{_entry(method)}\n  file        {method.file}\n\n{text}")
    return 0


def documentation(method: MethodInfo) -> str:
    """The class docstring of a method, read without importing it."""
    body = ast.parse(method.file.read_bytes()).body
    cls = next(node for node in body if isinstance(node, ast.ClassDef) and node.name == method.name)
    return inspect.cleandoc(ast.get_docstring(cls) or "(no docstring)")


def card_of(method: MethodInfo) -> Card | None:
    """The result card of a method in the package; `None` for a method of the user."""
    return cards().get(method.name) if method.file.is_relative_to(spec.PACKAGE) else None


def _entry(method: MethodInfo) -> str:
    card = card_of(method)
    results = (("claim", card.claim), ("verdict", card.verdict), ("measured", card.measured)) if card else ()
    rows = (
        ("write", f"{method.seam}: {method.signature}"),
        ("paper", method.paper),
        ("cost", method.cost),
        *results,
    )
    return "\n".join([f"{method.name}: {method.summary}", *(f"  {name:12}{text}" for name, text in rows if text)])


def _plain(method: MethodInfo) -> dict[str, Any]:
    keys = ("name", "seam", "signature", "summary", "paper", "cost")
    card = card_of(method)
    return {key: getattr(method, key) for key in keys} | {"file": str(method.file), "results": card and asdict(card)}
