"""Prose of the package and its documentation uses the terms of docs/glossary.md, not words of a private dialect."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "pondera"

WORDS = {  # a phrase with no other use in this field -> what to write instead
    r"all that there (is|are)": "all",
    r"(anew|afresh)": "again",
    r"arms? (of|against|is|are|was|were|that)": "run, variant or baseline",
    r"as if drawn": "pseudo-random",
    r"as it stands": "unchanged",
    r"as many as there( are)?": "one per ..., or the number",
    r"as many (\w+ )?as a": "the number",
    r"at (its|their) word": "say what is checked",
    r"beside": "next to, in addition to, or compared with",
    r"(brings?|comes?|came) along": "contains, is loaded with",
    r"cannot heed": "not supported",
    r"coders?": "codec",
    r"did (its|their) work": "succeeded",
    r"drafts(?! of)": "draft tokens",
    r"endless": "unbounded",
    r"excerpts?": "windows",
    r"floor by floor": "from low-level to high-level",
    r"for ever": "forever",
    r"forgets": "evicts, deletes or resets",
    r"from outside": "without changing the model",
    r"(go|goes|going|went) on (as|from|showing|where)": "continues, resumes",
    r"(had|has|have) a say": "influences",
    r"held (against|together)": "compared with",
    r"knees?": "elbow",
    r"KV rows?": "KV slot",
    r"laid (over|beside|end to end)": "merged, packed",
    r"(leaves?|leaving|left) off": "halts",
    r"no (cache|codebooks?|number|run|config|model|method) that (was|were|is|are)": "not a ...",
    r"nobody looks": "not attended",
    r"none:": "default: `None`, ...",
    r"of which (each|there)": "a relative clause after its noun",
    r"others wait": "inactive",
    r"(price(?!:)|prices|priced|pricing)": "cost",
    r"puts? back": "restores, scatters",
    r"(said|stood|stands?|standing) (beside|behind|by itself|still|out of)": "is next to, follows, is separate",
    r"says? (so|the same)": "logs a warning, raises, or agrees",
    r"so many(?! that)": "this many, or the name of the number",
    r"so much of": "the number or share of",
    r"spares?": "saves",
    r"(takes?|taken|taking|took) back": "roll back",
    r"that there (is|are)": "leave it out",
    r"the house": "the code base",
    r"the same bits": "bit-identical",
    r"thinkers?": "model with a think method",
    r"(am|are|be|been|is|was|were) told": "gets, is called with",
    r"torn": "incomplete",
    r"twins?": "reference implementation",
    r"what (came|comes|went) before": "earlier tokens",
    r"what there (is|are|was|were)": "all",
    r"where memory is short": "if memory allocation fails",
    r"whoever": "name the caller",
    r"(is|are|was|were) worth a word": "is reported",
}
PATTERNS = [(re.compile(rf"(?<![\w`-]){phrase}(?![\w`])", re.IGNORECASE), instead) for phrase, instead in WORDS.items()]
CODE = re.compile(r"``.*?``|`[^`]*`|\{[^{}]*\}")

# Occurrences in parts whose prose is being rewritten; to be removed.
ALLOWED: dict[str, int] = {}


def prose(file: Path) -> Iterator[tuple[int, str]]:
    """Line numbers and text of comments and strings of a Python file, of the comments of C, or of a text."""
    source = file.read_text(encoding="utf-8")
    if file.suffix == ".py":
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type == tokenize.COMMENT:
                yield token.start[0], token.string
        lines = source.splitlines()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value.strip():
                spread = '"""' in lines[node.lineno - 1]  # its lines are lines of the file
                for offset, line in enumerate(node.value.splitlines()):
                    if not line.lstrip().startswith((">>>", "...")):
                        yield node.lineno + offset * spread, line
    elif file.suffix in (".c", ".h"):
        for comment in re.finditer(r"/\*.*?\*/", source, re.DOTALL):
            first = source.count("\n", 0, comment.start()) + 1
            yield from enumerate(comment[0].splitlines(), first)
    else:
        inside = False  # a block of code
        for number, line in enumerate(source.splitlines(), 1):
            inside ^= line.lstrip().startswith("```")
            if not inside:
                yield number, line


def findings(file: Path) -> list[str]:
    """``file:line: phrase (write: ...)`` for each phrase of the dialect."""
    name = file.relative_to(ROOT) if file.is_relative_to(ROOT) else file.name
    return [
        f"{name}:{number}: {match[0]!r} (write: {instead})"
        for number, line in prose(file)
        for pattern, instead in PATTERNS
        for match in pattern.finditer(CODE.sub("", line))
    ]


def part_of(file: Path) -> str:
    """The key of a file in `ALLOWED`: its package, or its path outside of the package."""
    parts = file.relative_to(ROOT).parts
    depth = 4 if parts[:3] == ("src", "pondera", "methods") else 3 if parts[0] == "src" else len(parts)
    return "/".join(parts[:depth])


def files() -> list[Path]:
    """All files with prose for readers."""
    inside = [path for kind in ("py", "yaml", "c", "h") for path in SOURCE.rglob(f"*.{kind}")]
    return sorted([*inside, ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])


def test_prose_uses_the_terms_of_the_field():
    found = {file: findings(file) for file in files()}
    counts = Counter({part: 0 for part in map(part_of, found)})
    for file, lines in found.items():
        counts[part_of(file)] += len(lines)
    wrong = [
        line for file, lines in found.items() if counts[part_of(file)] > ALLOWED.get(part_of(file), 0) for line in lines
    ]
    assert not wrong, f"{len(wrong)} phrases:\n" + "\n".join(wrong)


@pytest.mark.parametrize(
    "suffix, text, lines",
    [
        (".py", '"""A summary.\n\nThe slow twin of it.\n"""\n', [3]),
        (".py", "x = 1\ny = 2  # is told by the caller\n", [2]),
        (".py", 'def f(n):\n    raise ValueError(f"got {n}, so many of them")\n', [2]),
        (".py", 'def f():\n    return g(\n        "what this leaves off "\n        "doing"\n    )\n', [3]),
        (".md", "A line.\n\n```\ntwin\n```\nRows stand beside it, `twin`.\n", [6, 6]),
        (".c", "int twin; /* The\n * price of it. */\n", [2]),
        (".yaml", "a: 1  # none: all of them\n", [1]),
        (".py", 'class A:\n    cost = "2 passes and KV rows per token"\n', [2]),
    ],
)
def test_a_phrase_is_found_in_comments_strings_and_text(tmp_path: Path, suffix: str, text: str, lines: list[int]):
    file = tmp_path / f"sample{suffix}"
    file.write_text(text)
    assert [int(line.split(":")[1]) for line in findings(file)] == lines


@pytest.mark.parametrize(
    "text",
    [
        "default: `None`, all tokens",
        "besides, there is no other way, so many that it pays; the encoder and decoder; see `price` and ``twin``",
        "tokens of the tower, untold, soldier on; it stands for a token; warm-up goes on; takes a step back",
    ],
)
def test_innocent_sentences_are_not_found(tmp_path: Path, text: str):
    file = tmp_path / "sample.md"
    file.write_text(text)
    assert findings(file) == []


ENTRY = re.compile(r"- \*\*([^*]+)\*\*: (.+\.)")


def test_the_glossary_defines_each_term_once_in_order():
    lines = (ROOT / "docs/glossary.md").read_text().splitlines()
    entries = [ENTRY.fullmatch(line) for line in lines if line.startswith("- ")]
    terms = [entry[1] for entry in entries if entry]
    assert len(terms) == len(entries) > 80, "each line reads: - **term**: One sentence or two."
    assert terms == sorted(set(terms), key=str.lower)
