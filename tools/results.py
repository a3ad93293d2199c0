"""Packs the raw runs of an experiment into one file, and unpacks them again.

    python -m tools.results pack results/heads/books-cpu       runs/ becomes runs.tar.xz and runs.md
    python -m tools.results unpack results/heads/books-cpu     runs.tar.xz becomes runs/, which git ignores

The archive contains config, environment, metrics and result of every run; ``runs.md`` lists the final numbers.
`pondera report results/heads/books-cpu` reads the archive directly.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

from pondera.core.archive import ARCHIVE, pack, unpack
from pondera.core.run_folder import Run, write_atomic

LISTED = {
    "bits_per_byte": ("bits per byte", "{:.4f}"),
    "error": ("error rate", "{:.4f}"),
    "loss": ("loss, nats", "{:.4f}"),
    "passes_per_token": ("passes per token", "{:.3f}"),
    "train_tokens": ("training tokens", "{:,.0f}"),
    "train_flops": ("training FLOPs", "{:.3e}"),
    "inference_flops_per_token": ("inference FLOPs per token", "{:.3e}"),
    "kv_bytes_per_token": ("KV bytes per token", "{:,.0f}"),
    "parameters": ("parameters", "{:,.0f}"),
}
"""The numbers of a result in ``runs.md``: heading and format."""


def pack_runs(runs: Path, experiment: Path) -> None:
    """Writes the archive of some run folders, and the table of their final numbers.

    Args:
        runs: a folder of run folders.
        experiment: the results folder for the two files.
    """
    pack(runs, experiment / ARCHIVE)
    write_atomic(experiment / "runs.md", table([Run.open(path) for path in sorted(runs.iterdir())]))


def table(runs: list[Run]) -> str:
    """A Markdown table with seed, steps and final numbers of each run."""
    head = ["run", "seed", "steps", *(heading for heading, _ in LISTED.values())]
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    for run in runs:
        result, train = run.result() or {}, run.config.train
        numbers = [form.format(result[key]) if key in result else "" for key, (_, form) in LISTED.items()]
        lines.append("| " + " | ".join([f"`{run.path.name}`", str(train.seed), str(train.steps), *numbers]) + " |")
    return f"Runs in `{ARCHIVE}`; `python -m tools.results unpack` restores them.\n\n" + "\n".join(lines) + "\n"


def add_runs(runs: Path, experiment: Path) -> None:
    """Adds run folders to the archive of an experiment; new runs replace old runs of the same name."""
    with tempfile.TemporaryDirectory() as scratch:
        everything = Path(scratch)
        if (experiment / ARCHIVE).is_file():
            unpack(experiment / ARCHIVE, everything)
        shutil.copytree(runs, everything, dirs_exist_ok=True)
        pack_runs(everything, experiment)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["pack", "unpack"])
    parser.add_argument("experiments", nargs="+", type=Path, metavar="FOLDER", help="e.g. results/heads/books-cpu")
    args = parser.parse_args()
    for experiment in args.experiments:
        if args.action == "pack":
            pack_runs(experiment / "runs", experiment)
            shutil.rmtree(experiment / "runs")
        else:
            unpack(experiment / ARCHIVE, experiment / "runs")


if __name__ == "__main__":
    main()
