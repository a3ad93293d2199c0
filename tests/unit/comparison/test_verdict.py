"""What the verdict compares, at which cost, and how it judges several differences at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pondera.cli.output import print_comparison
from pondera.comparison.rows import summarise
from pondera.comparison.verdict import differences, verdict
from pondera.core.run_config import RunConfig, TrainConfig
from pondera.core.run_folder import Run
from pondera.report.page import write_report


def row(name: str, scores: list[float], cost: float | None = None, passes: float = 1.5, **more: Any) -> dict[str, Any]:
    seeds = list(range(len(scores)))
    costs = {"mean": cost, "spread": None, "values": [cost] * len(scores)}
    return {
        "name": name,
        "seeds": seeds,
        "inference_flops_per_token": costs,
        "passes_per_token": {"mean": passes},
        "error": {"values": scores},
        **more,
    }


def around(middle: float, wiggle: float = 0.001) -> list[float]:
    """Three seeds."""
    return [middle - wiggle, middle, middle + 2 * wiggle]


@pytest.mark.parametrize(
    "cost, said",
    [
        (212.0, "At 1.06 × the inference FLOPs, other is 0.100 error rate below deep"),
        (188.0, "At 0.94 × the inference FLOPs, other is 0.100 error rate below deep"),
        (200.9, "At equal inference FLOPs, other is 0.100 error rate below deep"),
        (199.1, "At equal inference FLOPs, other is 0.100 error rate below deep"),
        (229.0, "At 1.15 × the inference FLOPs, other"),
        (231.0, None),
        (173.0, None),
        (None, None),
    ],
)
def test_the_ratio_of_costs_is_said(cost, said):
    rows = [row("plain", around(0.9), 100.0), row("deep", around(0.5), 200.0), row("other", around(0.4), cost)]
    found = verdict(rows, "error")
    assert found[0].startswith("deep is 0.400 error rate below plain") and found[1].startswith("other is 0.500")
    assert len(found) == (2 if said is None else 3)
    assert said is None or found[2].startswith(said)


def test_the_same_cost_as_the_baseline_needs_no_second_sentence():
    rows = [row("plain", around(0.9), 100.0), row("same", around(0.5), 101.0)]
    assert len(verdict(rows, "error")) == 1


def test_a_control_is_compared_with_its_variant_alone():
    rows = [
        row("plain", around(0.9), 100.0),
        row("cot", around(0.5), 180.0),
        row("cot-random", around(0.622), 180.0, control_of="cot"),
        row("deep", around(0.6), 190.0),
    ]
    pairs = [(one.row["name"], one.other["name"]) for one in differences(rows)]
    assert pairs == [("cot", "plain"), ("deep", "plain"), ("deep", "cot"), ("cot", "cot-random")]
    assert verdict(rows, "error")[3].startswith(
        "cot is 0.122 error rate below cot-random, which gives the same passes to random tokens (95 % CI ± "
    )
    first = [rows[1], rows[2], rows[0]]
    pairs = [(one.row["name"], one.other["name"]) for one in differences(first)]
    assert pairs == [("plain", "cot"), ("cot", "cot-random")], "a baseline has a control, too"


@pytest.mark.parametrize(
    "passes, said",
    [(1.51, ", which gives the same passes to"), (1.6, ", which gives 1.60 instead of 1.50 passes per token to")],
)
def test_passes_that_a_control_missed_are_said(passes, said):
    rows = [row("cot", around(0.5)), row("cot-random", around(0.6), passes=passes, control_of="cot")]
    [found] = verdict(rows, "error")
    assert f"below cot-random{said} random tokens (95 %" in found


def test_each_difference_is_corrected_for_all():
    """Six standard errors are enough for one comparison (4.3), and not for four (8.9)."""
    noise = [-0.001, 0.0, 0.001]
    base = [0.5, 0.6, 0.7]
    error = 0.001 / 3**0.5
    apart = [one + two - 6 * error for one, two in zip(base, noise, strict=True)]
    far = [one + two - 20 * error for one, two in zip(base, noise, strict=True)]
    [alone] = verdict([row("plain", base), row("a", apart)], "error")
    assert alone.endswith("paired, 3 seeds: significant).")
    four = verdict([row("plain", base), *(row(name, apart) for name in "abc"), row("far", far)], "error")
    assert len(four) == 4
    assert all(one.endswith(": significant alone, but not after correction for 4 comparisons).") for one in four[:3])
    assert four[3].endswith(": significant, also after correction for 4 comparisons).")


def test_terminal_and_page_say_how_many_differences_were_looked_at(tmp_path: Path, capsys):
    base = {"plain": 2.0, "deep": 1.9, "other": 1.8}
    runs = []
    for name, score in base.items():
        for seed in range(3):
            run = Run.create(tmp_path / f"{name}{seed}", RunConfig(name=name, train=TrainConfig(seed=seed)))
            run.write_result({"bits_per_byte": score + seed / 100 + seed * score / 1000})
            runs.append(run.path)
    found = summarise(list(base), runs)
    assert found["comparisons"] == 2
    print_comparison(found | {"seeds": 3, "equal": "tokens"})
    printed = capsys.readouterr().out
    assert printed.count("2 differences were looked at.") == 1
    assert all(said in printed and "also after correction for 2 comparisons" in said for said in found["verdict"])
    page = write_report(runs, tmp_path / "report.html", comparisons=2).read_text()
    assert page.count("2 differences were looked at.") == 1 and "also after correction for 2 comparisons" in page
    assert "correction" not in write_report(runs, tmp_path / "report.html").read_text(), "one difference is named"
    print_comparison(summarise(["plain", "deep"], runs[:6]) | {"seeds": 3, "equal": "tokens"})
    assert "looked at" not in capsys.readouterr().out
