"""The report: one offline HTML file, made from run folders alone.

Runs with the same name are seeds of one variant. The page lists everything that is missing from a run and omits no run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template

from pondera.core.errors import UserError
from pondera.core.run_folder import write_atomic
from pondera.report.halting_section import HaltingStats, halting_section
from pondera.report.sample_section import samples
from pondera.report.score_section import charts, headline, table
from pondera.report.variants import COLUMNS, Measure, RunView, Variant, group_variants, measure_of, score_key, view_run

__all__ = [
    "COLUMNS",
    "Measure",
    "RunView",
    "Variant",
    "group_variants",
    "measure_of",
    "score_key",
    "view_run",
    "write_report",
]


def write_report(
    runs: Sequence[str | Path],
    out: str | Path,
    title: str = "Pondera report",
    names: Mapping[Path, str] | None = None,
    comparisons: int | None = None,
) -> Path:
    """Writes one self-contained HTML page about some runs; it needs no network and no script.

    Args:
        runs: run folders; those with the same `name` in their config are seeds of one variant.
        out: the file to write.
        title: the title of the page.
        names: display names by path, for runs that were unpacked elsewhere (default: the paths).
        comparisons: the number of differences for which significance is corrected (default: `None`, those on the page).

    Returns:
        `out`.

    Raises:
        UserError: there are no runs, a path is not a run folder, or `out` is a folder.

    Example::

        write_report(["runs/plain-0", "runs/ponderlm2-0"], "report.html")
    """
    if not runs:
        raise UserError("no runs to report on; give at least one run folder")
    out = Path(out)
    if out.is_dir():
        raise UserError(f"{out} is a folder; give a file, e.g. {out / 'report.html'}")
    variants = group_variants(view_run(path, (names or {}).get(Path(path))) for path in runs)
    page = Template(Path(__file__).with_name("report.html").read_text(encoding="utf-8")).substitute(
        title=escape(title),
        headline=headline(variants, comparisons),
        charts=charts(variants),
        table=table(variants),
        depths=_depths(variants),
        samples=samples(variants),
        runs="\n".join(_made(run) for variant in variants for run in variant.runs),
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(out, page.encode("utf-8", "backslashreplace"))  # file names may contain invalid Unicode
    return out


def _depths(variants: list[Variant]) -> str:
    """The halting section, with one run per variant."""
    chosen = ((variant, next((run for run in variant.runs if run.depths), None)) for variant in variants)
    return halting_section(
        [
            HaltingStats(variant.name, variant.index, run.config.train.seed, run.depths)
            for variant, run in chosen
            if run is not None
        ]
    )


def _made(run: RunView) -> str:
    import yaml

    env = run.env
    versions = {"python": env.get("python"), **(env.get("versions") or {})}
    seconds = run.result.get("train_seconds")
    facts = {
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items() if version),
        "commit": env.get("commit"),
        "machine": env.get("platform"),
        "device": env.get("device"),
        "CPUs": env.get("cpus"),
        "torch threads": env.get("torch_threads"),
        "training time": f"{seconds / 60:.1f} minutes" if seconds else None,
    }
    listing = "".join(f"<dt>{name}</dt><dd>{escape(str(value))}</dd>" for name, value in facts.items() if value)
    config = yaml.safe_dump(run.config.to_dict(), sort_keys=False, allow_unicode=True)
    where = escape(run.where) + ("" if run.result else ", incomplete")
    command = escape(str(env.get("command", "command unknown")))
    return (
        f"<details><summary>{escape(run.config.name)}, seed {run.config.train.seed} <small>{where}</small></summary>"
        f'<div class="card"><pre>{command}</pre><dl>{listing}</dl><pre>{escape(config)}</pre></div></details>'
    )
