"""``pondera report``: writes one HTML page about run folders."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from pondera.cli.parser import Parser
from pondera.core.archive import ARCHIVE, unpack
from pondera.core.errors import UserError
from pondera.core.run_folder import is_run

SUMMARY = "writes one HTML page about run folders"
EXAMPLES = """
pondera report runs/plain-seed0 runs/ponderlm2-seed0
pondera report runs/ --out all.html
pondera report results/heads/books-cpu
"""


def parser() -> Parser:
    """The argument parser of ``pondera report``."""
    arguments = Parser("report", "Writes one self-contained HTML page: curves, scores, costs and samples.", EXAMPLES)
    arguments.add_argument(
        "runs", nargs="+", metavar="RUN", help=f"run folders, folders that contain some at any depth, or a {ARCHIVE}"
    )
    arguments.add_argument(
        "--out", type=Path, default=Path("report.html"), metavar="FILE", help="file to write (default: report.html)"
    )
    return arguments


def run(args: argparse.Namespace) -> int:
    """Writes the page and prints its path."""
    from pondera.report.page import write_report

    with tempfile.TemporaryDirectory() as scratch:
        runs = find_runs([Path(given) for given in args.runs], Path(scratch))
        write_report(list(runs), args.out, names=runs)
    print(f"{args.out}: {len(runs)} run{'s' * (len(runs) > 1)}; open it in a browser")
    return 0


def find_runs(given: list[Path], scratch: Path) -> dict[Path, str]:
    """Finds all runs below the given paths; returns each run once, with its display path.

    Args:
        given: run folders, folders that contain runs or archives of runs at any depth, or archives.
        scratch: an empty folder; archives are unpacked into it.

    Raises:
        UserError: a path does not exist or contains no run.
    """
    found: dict[Path, Path] = {}
    for path in given:
        if path.is_file() and path.name == ARCHIVE:
            inside = _packed(path, scratch)
        elif not path.is_dir():
            raise UserError(f"no such folder: {str(path)!r}; give run folders, or a folder that contains some")
        else:
            loose = [path] if is_run(path) else [file.parent for file in sorted(path.rglob("config.yaml"))]
            inside = {run: run for run in loose}
            for archive in sorted(path.rglob(ARCHIVE)):
                inside |= _packed(archive, scratch)
        inside = {run: shown for run, shown in inside.items() if is_run(run)}
        if not inside:
            raise UserError(f"no run in {str(path)!r}: a run folder contains config.yaml and env.json")
        known = {shown.resolve() for shown in found.values()}
        found |= {run: shown for run, shown in inside.items() if shown.resolve() not in known}
    return {run: str(shown) for run, shown in found.items()}


def _packed(archive: Path, scratch: Path) -> dict[Path, Path]:
    """Unpacks the runs of an archive; returns each with its path inside the archive."""
    folder = scratch / str(len(list(scratch.iterdir())))
    return {run: archive / run.name for run in unpack(archive, folder)}
