"""The parts of a method's docstring, read from its file without importing it."""

from __future__ import annotations

import ast
import inspect
import re
from dataclasses import dataclass, field

from pondera.core.spec import MethodInfo

SECTIONS = ("Source", "Cost", "When not to use it", "Resolved", "Args", "Example")
_HEAD = re.compile(rf"^({'|'.join(SECTIONS)}):[ \n]?", re.MULTILINE)
_ARGUMENT = re.compile(r"^(\w[\w, ]*): ", re.MULTILINE)


@dataclass(frozen=True)
class Docstring:
    """A docstring in parts.

    Args:
        summary: the first paragraph.
        body: the paragraphs between it and the first section.
        sections: text by the name of the section, one of `SECTIONS`; absent if the docstring has none.
        arguments: what each argument means, by name.
    """

    summary: str
    body: str
    sections: dict[str, str] = field(default_factory=dict)
    arguments: dict[str, str] = field(default_factory=dict)


def read(text: str) -> Docstring:
    """Splits a docstring.

    Example:
        >>> found = read("Keeps n tokens.\\n\\nThe latest.\\n\\nCost: none.\\n\\nArgs:\\n    n: tokens,\\n        1 or more.")
        >>> found.summary, found.body, found.sections["Cost"], found.arguments
        ('Keeps n tokens.', 'The latest.', 'none.', {'n': 'tokens, 1 or more.'})
    """
    before, *rest = _HEAD.split(inspect.cleandoc(text))
    summary, _, body = before.partition("\n\n")
    sections = {name: inspect.cleandoc(said) for name, said in zip(rest[::2], rest[1::2], strict=True)}
    arguments: dict[str, str] = {}
    _, *told = _ARGUMENT.split(sections.get("Args", ""))
    for names, meaning in zip(told[::2], told[1::2], strict=True):
        arguments |= dict.fromkeys(names.split(", "), " ".join(meaning.split()))
    return Docstring(" ".join(summary.split()), body.strip(), sections, arguments)


def of_method(method: MethodInfo) -> Docstring:
    """The docstring of a method's class."""
    body = ast.parse(method.file.read_bytes()).body
    cls = next(node for node in body if isinstance(node, ast.ClassDef) and node.name == method.name)
    return read(ast.get_docstring(cls) or "")


def parameters(signature: str) -> list[tuple[str, str, str]]:
    """Name, type and default of each constructor argument; the default is empty where one must be given.

    Example:
        >>> parameters("VQ(codes: int, scale: float | None = None)")
        [('codes', 'int', ''), ('scale', 'float | None', 'None')]
    """
    name, _, rest = signature.partition("(")
    star = "" if rest == ")" else "*, "  # an argument without a default may follow one with
    (function,) = ast.parse(f"def {name}({star}{rest}: ...").body
    assert isinstance(function, ast.FunctionDef)
    pairs = zip(function.args.kwonlyargs, function.args.kw_defaults, strict=True)
    return [
        (arg.arg, ast.unparse(arg.annotation) if arg.annotation else "", ast.unparse(default) if default else "")
        for arg, default in pairs
    ]
