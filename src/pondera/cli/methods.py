"""``pondera methods``: lists the methods, read from their files."""

from __future__ import annotations

import argparse
import ast
import inspect
from dataclasses import asdict
from typing import Any

from pondera.cli.output import print_json
from pondera.cli.parser import Parser
from pondera.core import run_config, spec
from pondera.core.cards import Card, cards
from pondera.core.errors import unknown
from pondera.core.spec import MethodInfo

SUMMARY = "lists all methods and tasks, those of one seam, or describes one"
EXAMPLES = """
pondera methods
pondera methods kv_cache
pondera methods ponder
pondera methods PonderLM2
PONDERA_METHODS=my_methods pondera methods --json
"""
PURPOSES = {
    "quantize": "discrete codes for vectors, as arguments of other methods, e.g. ConceptLM(quantizer=VQ(64))",
    "task": "a synthetic task in place of text, e.g. StateTracking('S3'), as data.task",
    "objective": "losses of GFlowNets, e.g. SubTB(alpha=0.7), as the objective of `pondera train flow-set`",
    "environment": "what a GFlowNet builds, e.g. HyperGrid(4, side=8), as the environment of `pondera train flow-set`",
    "questions": "questions about a long context, for `pondera bench kv`, e.g. Needles(8)",
}
"""What the folders are for that are no seams; seams have the help of their setting."""


def parser() -> Parser:
    """The argument parser of ``pondera methods``."""
    arguments = Parser("methods", "Lists the methods with their paper, cost and measured results.", EXAMPLES)
    arguments.add_argument(
        "name", nargs="?", metavar="NAME", help="describe this method; or list a seam, or what has NAME in its name"
    )
    arguments.add_argument("--json", action="store_true", help="print JSON only")
    return arguments


def run(args: argparse.Namespace) -> int:
    """Prints the list of methods, or the documentation of one method."""
    methods = spec.index(spec.SEAMS + spec.PARTS + spec.TASKS + spec.FLOWS)
    one = methods.get(args.name) or next(
        (m for m in methods.values() if m.name.lower() == (args.name or "").lower()), None
    )
    if one is not None:
        _print_one(one, args.json)
        return 0
    listed = list(methods.values()) if args.name is None else matching(args.name, list(methods.values()))
    if args.json:
        print_json([_plain(method) for method in listed])
        return 0
    print("\n\n".join(_section(seam, listed) for seam in dict.fromkeys(method.seam for method in listed)))
    print('\nuse one:  pondera train plain --think "PonderLM2(thoughts=1)"   more:  pondera methods NAME')
    return 0


def matching(name: str, methods: list[MethodInfo]) -> list[MethodInfo]:
    """The methods of a seam, or those with this text in their name, whatever its case.

    Raises:
        UserError: there is none.
    """
    found = [method for method in methods if method.seam == name.replace("-", "_").lower()]
    found = found or [method for method in methods if name and name.lower() in method.name.lower()]
    if not found:
        raise unknown("method or seam", name, [*dict.fromkeys(m.seam for m in methods), *(m.name for m in methods)])
    return found


def _section(seam: str, methods: list[MethodInfo]) -> str:
    """The methods of one seam under a heading."""
    own = [method for method in methods if method.seam == seam]
    settings = run_config.fields()
    purpose = PURPOSES.get(seam) or settings[seam].metadata["help"]
    return "\n\n".join([f"== {seam} ({len(own)}): {purpose} ==", *map(_entry, own)])


def _print_one(method: MethodInfo, as_json: bool) -> None:
    """Prints the entry of one method and its documentation."""
    text = documentation(method)
    if as_json:
        print_json(_plain(method) | {"documentation": text})
    else:
        print(f"{_entry(method)}\n  file        {method.file}\n\n{text}")


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
