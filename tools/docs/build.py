"""Writes figures, the pages of methods and the generated parts of README.md and docs/ from docstrings and results/.

    python -m tools.docs.build            rewrites them
    python -m tools.docs.build --check    exits with 1 if one of them is out of date

A generated part is between ``<!-- generated: NAME ARGUMENT -->`` and ``<!-- end -->``. Figures and the pages under
docs/methods/ are generated as a whole.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from tools.docs import (  # noqa: F401  (these register makers)
    api,
    blocks,
    combined,
    edits,
    findings,
    flows,
    front,
    models,
    pages,
    past,
    questions,
    quotes,
    recovery,
    rounds,
    study,
    tasks,
    times,
    tracking,
)
from tools.docs.tables import MAKERS, ROOT, generated

EXAMPLE = "<!-- worked example: {} -->\n```python\n"
PART = re.compile(r"(<!-- generated: (\w+) ?(\S*) -->\n).*?(<!-- end -->)", re.DOTALL)


@generated
def output(path: str) -> str:
    """The recorded output of a command."""
    return f"```text\n{(ROOT / path).read_text().rstrip()}\n```"


@generated
def worked_example(path: str) -> str:
    """The code of a worked example of CONTRIBUTING.md, by ``PAGE#FILE``; its first line is the name of the file."""
    page, _, file = path.partition("#")
    _, found, rest = (ROOT / page).read_text().partition(EXAMPLE.format(file))
    assert found, f"{page} has no worked example {file}"
    return f"```python\n# {file}\n{rest.partition('```')[0]}```"


def built(text: str) -> str:
    """`text` with every generated part replaced by its current content."""

    def made(part: re.Match[str]) -> str:
        # If there is no results file or folder yet, the part says so; nothing is filled in by hand.
        there = not part[3] or (ROOT / part[3].partition("#")[0]).exists()
        return f"{part[1]}{MAKERS[part[2]](part[3]) if there else '*not run yet*'}\n{part[4]}"

    return PART.sub(made, text)


def wanted() -> dict[Path, str]:
    """Every file that is generated, or holds generated parts, and its text."""
    makers = (study, front, tracking, questions, recovery)
    whole = pages.files() | api.files() | {path: text for maker in makers for path, text in maker.figures().items()}
    written = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    in_parts = {page: built(page.read_text()) for page in written if page.parent != pages.FOLDER}
    return in_parts | whole


def main() -> None:
    files = wanted()
    stale = [path for path, text in files.items() if not path.is_file() or path.read_text() != text]
    gone = [path for path in pages.FOLDER.glob("*.md") if path not in files]
    if "--check" not in sys.argv:
        for path in stale:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(files[path])
        for path in gone:
            path.unlink()
    if stale or gone:
        names = (str(path.relative_to(ROOT)) for path in stale + gone)
        print("not what the results say:" if "--check" in sys.argv else "rewrote:", *names)
    sys.exit(bool(stale or gone) and "--check" in sys.argv)


if __name__ == "__main__":
    main()
