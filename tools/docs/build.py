"""Writes figures and the generated parts of README.md and docs/ from the index of methods and the files under results/.

    python -m tools.docs.build            rewrites them
    python -m tools.docs.build --check    exits 1 if one of them is not what it would write

A generated part stands between ``<!-- generated: NAME ARGUMENT -->`` and ``<!-- end -->``. Figures are files of their own
beside the pages that show them.
"""

from __future__ import annotations

import re
import sys

from pondera.core import spec
from pondera.core.cards import cards
from tools.docs import blocks, models, past, study, times  # noqa: F401  (these files register what they can generate)
from tools.docs.tables import MAKERS, ROOT, generated, table

PART = re.compile(r"(<!-- generated: (\w+) ?(\S*) -->\n).*?(<!-- end -->)", re.DOTALL)


@generated
def methods(_: str) -> str:
    """The index of methods."""
    rows = [
        (f"`{m.name}`", m.seam, m.paper, m.cost, f"[{cards()[m.name].verdict}](results/cards/{m.name}.json)")
        for m in spec.index().values()
    ]
    return table(["method", "seam", "source", "cost", "claim at our scale"], rows)


@generated
def output(path: str) -> str:
    """What a command printed."""
    return f"```text\n{(ROOT / path).read_text().rstrip()}\n```"


def built(text: str) -> str:
    """`text` with every generated part made anew."""

    def made(part: re.Match[str]) -> str:
        # A result that no command has written yet leaves its place empty, never filled by hand.
        there = not part[3] or (ROOT / part[3].partition("#")[0]).is_file()
        return f"{part[1]}{MAKERS[part[2]](part[3]) if there else '*not run yet*'}\n{part[4]}"

    return PART.sub(made, text)


def main() -> None:
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    wanted = {page: built(page.read_text()) for page in pages} | study.figures()
    stale = [path for path, text in wanted.items() if not path.is_file() or path.read_text() != text]
    if "--check" not in sys.argv:
        for path in stale:
            path.parent.mkdir(exist_ok=True)
            path.write_text(wanted[path])
    if stale:
        names = (str(path.relative_to(ROOT)) for path in stale)
        print("not what the results say:" if "--check" in sys.argv else "rewrote:", *names)
    sys.exit(bool(stale) and "--check" in sys.argv)


if __name__ == "__main__":
    main()
