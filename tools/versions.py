"""Runs the contract tests on several versions of transformers and records the results.

    python tools/versions.py                     the newest patch of each minor series that pyproject.toml allows
    python tools/versions.py 5.23.0 5.24.0       these versions
    python tools/versions.py 5.24.0 -- tests/unit/models -k cache      these tests instead of all; writes nothing

Each version gets an environment of its own in a cache folder, with the pinned versions of constraints.txt and only
transformers changed. The script writes results/versions.json (versions that are not run now keep their entries),
docs/versions.md, and src/pondera/core/versions.json with the versions that passed, for `pondera doctor`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import tomllib
import venv
from pathlib import Path
from typing import Any

from packaging.specifiers import SpecifierSet
from packaging.version import Version

ROOT = Path(__file__).parent.parent
RESULTS, PAGE = ROOT / "results/versions.json", ROOT / "docs/versions.md"
PASSED = ROOT / "src/pondera/core/versions.json"
UNITS = ("models", "cache", "kv_cache", "inference", "training", "evaluation")
SUITE = ["tests/contracts", *(f"tests/unit/{name}" for name in UNITS)]
"""The tests of what calls transformers; the others do not depend on its version."""
NEEDED = ["hypothesis", "pytest", "pytest-xdist"]
COUNT = re.compile(r"(\d+) (passed|failed|error|errors|skipped|xfailed)")


def allowed() -> list[str]:
    """The newest patch on the package index of each minor series that pyproject.toml allows."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    wanted = SpecifierSet(next(line for line in listed if line.startswith("transformers")).removeprefix("transformers"))
    output = subprocess.check_output([sys.executable, "-m", "pip", "index", "versions", "transformers"], text=True)
    there = (
        next(line for line in output.splitlines() if line.startswith("Available versions:"))
        .partition(":")[2]
        .split(",")
    )
    newest: dict[tuple[int, ...], str] = {}
    for version in sorted(map(str.strip, there), key=Version):
        if wanted.contains(version):
            newest[Version(version).release[:2]] = version
    return list(newest.values())


def environment(version: str, cache: Path) -> Path:
    """The Python of an environment with that version; creates the environment if necessary."""
    folder = cache / f"transformers-{version}"
    python = folder / "bin/python"
    if not (folder / "ready").is_file():
        venv.create(folder, with_pip=True, clear=True)
        pins = (ROOT / "constraints.txt").read_text().splitlines()
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as constraints:
            constraints.write("\n".join(pin for pin in pins if not pin.startswith("transformers==")))
            constraints.flush()
            install = [str(python), "-m", "pip", "install", "--quiet", "--constraint", constraints.name]
            subprocess.check_call([*install, f"transformers=={version}", *NEEDED, f"{ROOT}[hf,eval]"])
            subprocess.check_call(
                [str(python), "-m", "pip", "install", "--quiet", "--no-deps", "--editable", str(ROOT)]
            )
        (folder / "ready").touch()
    return python


def run(python: Path, tests: list[str], workers: str) -> dict[str, Any]:
    """The counts of pytest, and the failed tests."""
    threads = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    command = [str(python), "-m", "pytest", "-q", "-n", workers, "--tb=no", "-rfE", "-p", "no:cacheprovider", *tests]
    output = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, **threads, "PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
    ).stdout
    lines = output.splitlines() or [""]
    counts = {
        kind.removesuffix("s") if kind == "errors" else kind: int(number) for number, kind in COUNT.findall(lines[-1])
    }
    if not counts:
        raise SystemExit(f"{python}: pytest did not finish:\n{output[-2000:]}")
    failed = sorted(line.split(" ")[1] for line in lines if line.startswith(("FAILED ", "ERROR ")))
    return {"counts": counts, "failed": failed, "commit": commit()}


def commit() -> str:
    """The commit that is tested, short; with a mark if the tree has changes."""
    described = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    return subprocess.run(described, cwd=ROOT, capture_output=True, text=True).stdout.strip()


def write(found: dict[str, Any]) -> None:
    """Writes the results, the page and the list of tested versions in the package."""
    rows = {version: found[version] for version in sorted(found, key=Version)}
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
    good = [version for version, row in rows.items() if not row["failed"]]
    PASSED.write_text(json.dumps({"transformers": good}) + "\n")
    lines = [
        f"| {v} | {row['counts'].get('passed', 0)} | {len(row['failed'])} | {row.get('commit', 'an earlier one')} |"
        for v, row in rows.items()
    ]
    failures = [f"- {version}: `{name}`" for version, row in rows.items() for name in row["failed"][:20]]
    page = [
        "# Versions of transformers",
        "",
        "What the tests say on each, with all other packages as in `constraints.txt`. Written by `python tools/versions.py`:",
        f"`pytest {' '.join(SUITE)}`.",
        "",
        "| transformers | passed | failed | at commit |",
        "| --- | --: | --: | --- |",
        *lines,
        *(["", "Failed:", "", *failures] if failures else []),
        "",
        "What differs between them is in `src/pondera/core/hf.py`. `pondera doctor` warns of a version that is not here.",
    ]
    PAGE.write_text("\n".join(page) + "\n")


def main() -> None:
    given = sys.argv[1:]
    versions, tests = (given[: given.index("--")], given[given.index("--") + 1 :]) if "--" in given else (given, [])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("versions", nargs="*")
    parser.add_argument("--workers", default="auto", help="processes of pytest-xdist")
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "pondera-versions"
    parser.add_argument("--cache", type=Path, default=default, help="folder for the environments")
    args = parser.parse_args(versions)
    for version in args.versions or allowed():
        found = run(environment(version, args.cache), tests or SUITE, args.workers)
        print(version, found["counts"], *found["failed"], sep="\n  ", flush=True)
        if not tests:
            known = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
            write({**known, version: found})


if __name__ == "__main__":
    main()
