"""docs/api.md: the Python interface that is not a method, from its docstrings, without importing it."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

from tools.docs.docstrings import read
from tools.docs.tables import ROOT

PAGE = ROOT / "docs" / "api.md"
NOTE = "<!-- Written by `make docs` from docstrings. Do not edit. -->"
MODELS, INFERENCE = "src/pondera/models", "src/pondera/inference"
SHOWN = (
    ("load", "src/pondera/evaluation/open_model.py", "load"),
    ("compress", "src/pondera/evaluation/compress.py", "compress"),
    ("EditablePrompt", f"{INFERENCE}/editable_prompt.py", "EditablePrompt"),
    ("EditablePrompt.edit", f"{INFERENCE}/editable_prompt.py", "edit"),
    ("EditablePrompt.replace", f"{INFERENCE}/editable_prompt.py", "replace"),
    ("EditablePrompt.generate", f"{INFERENCE}/editable_prompt.py", "generate"),
    ("PIE", f"{INFERENCE}/pie.py", "PIE"),
    ("PIE.edit", f"{INFERENCE}/pie.py", "edit"),
    ("AdaptiveConfig", f"{MODELS}/config.py", "AdaptiveConfig"),
    ("AdaptiveLM", f"{MODELS}/adaptive_lm.py", "AdaptiveLM"),
    ("AdaptiveLM.forward", f"{MODELS}/adaptive_lm.py", "forward"),
    ("AdaptiveLM.new_cache", f"{MODELS}/adaptive_lm.py", "new_cache"),
    ("AdaptiveLM.load_cache", f"{MODELS}/adaptive_lm.py", "load_cache"),
)
"""Name on the page, file, and name of the definition in the file."""
PARTS = re.compile(r"^(Returns|Raises|Examples?)::?[ \n]", re.MULTILINE)


def files() -> dict[Path, str]:
    """The page and its text."""
    about = (
        "`from pondera import ...`. Methods have [pages of their own](methods/index.md); each is a class that `load` and "
        "`AdaptiveConfig` take as an object or as text."
    )
    return {PAGE: "\n\n".join(["# Python interface", NOTE, about, *(entry(*shown) for shown in SHOWN)]) + "\n"}


def entry(name: str, file: str, defined: str) -> str:
    """Signature, description, arguments, returns, raises and example of one name."""
    node = _definition(file, defined)
    before, *rest = PARTS.split(inspect.cleandoc(ast.get_docstring(node) or ""))
    parts = dict(zip(rest[::2], map(inspect.cleandoc, rest[1::2]), strict=True))
    said = read(before)
    rows = [f"| `{argument}` | {meaning.replace('|', chr(92) + '|')} |" for argument, meaning in said.arguments.items()]
    example = parts.get("Example", parts.get("Examples", ""))
    return "\n\n".join(
        filter(
            None,
            [
                f"## {name}",
                f"```python\n{_signature(name, node)}\n```",
                said.summary,
                _plain(said.body),
                "\n".join(["| argument | meaning |", "| --- | --- |", *rows]) if rows else "",
                f"Returns: {_plain(parts['Returns'])}" if "Returns" in parts else "",
                f"Raises: {_plain(parts['Raises'])}" if "Raises" in parts else "",
                f"```python\n{example}\n```" if example else "",
            ],
        )
    )


def _definition(file: str, name: str) -> ast.FunctionDef | ast.ClassDef:
    nodes = ast.walk(ast.parse((ROOT / file).read_bytes()))
    return next(node for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name == name)


def _signature(name: str, node: ast.FunctionDef | ast.ClassDef) -> str:
    if isinstance(node, ast.ClassDef):
        return f"class {name}"
    given = ast.unparse(node.args).removeprefix("self, ").removeprefix("self")
    one_line = f"{name}({given}) -> {ast.unparse(node.returns)}" if node.returns else f"{name}({given})"
    return re.sub(r", (?=[\w*]+(: |,|\)| =))", ",\n    ", one_line) if len(one_line) > 100 else one_line


def _plain(text: str) -> str:
    return " ".join(text.split()).replace("``", "`")
