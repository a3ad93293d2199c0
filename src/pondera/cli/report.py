"""``pondera report``: run folders -> one HTML page."""

from __future__ import annotations

import argparse
from pathlib import Path

from pondera.cli.parser import Parser
from pondera.ground.errors import UserError
from pondera.ground.run import is_run

SUMMARY = "makes one HTML page from run folders"
EXAMPLES = """
pondera report runs/plain-seed0 runs/ponderlm2-seed0
pondera report runs/ --out all.html
"""


def parser() -> Parser:
    """What ``pondera report`` takes."""
    found = Parser("report", "Makes one self-contained HTML page: curves, scores beside prices, samples.", EXAMPLES)
    found.add_argument("runs", nargs="+", metavar="RUN", help="run folders, or folders that contain some at any depth")
    found.add_argument("--out", type=Path, default=Path("report.html"), metavar="FILE", help="(default: report.html)")
    return found


def run(args: argparse.Namespace) -> int:
    """Writes the page and says where it is."""
    runs = find_runs([Path(given) for given in args.runs])

    from pondera.jobs.report import write_report

    write_report(runs, args.out)
    print(f"{args.out}: {len(runs)} run{'s' * (len(runs) > 1)}; open it in a browser")
    return 0


def find_runs(given: list[Path]) -> list[Path]:
    """Each run once: the folders that are runs, and the runs inside those that are not.

    Raises:
        UserError: a folder does not exist, or there is no run in it.
    """
    found: dict[Path, Path] = {}
    for folder in given:
        if not folder.is_dir():
            raise UserError(f"no such folder: {str(folder)!r}; give run folders, or a folder that contains some")
        inside = [folder] if is_run(folder) else [file.parent for file in sorted(folder.rglob("config.yaml"))]
        inside = [path for path in inside if is_run(path)]
        if not inside:
            raise UserError(f"no run in {str(folder)!r}: a run folder holds config.yaml and env.json")
        for path in inside:
            found.setdefault(path.resolve(), path)
    return list(found.values())
