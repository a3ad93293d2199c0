"""What tools/docs makes of results, on made-up ones that can be worked out by hand; and the shape of the pages."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from helpers import scripts

from pondera.core import spec

build, docstrings, findings, flows, front, models, names, pages, study, tasks = (
    scripts.load(f"tools.docs.{name}")
    for name in ("build", "docstrings", "findings", "flows", "front", "models", "names", "pages", "study", "tasks")
)

FOLDERS = ("src", "tests", "tools", "experiments", "benchmarks")
HEALTHY = {"split_error": 0.1, "reachable_error": 0.09, "perplexity": 60.0, "reachable_perplexity": 64.0, "width": 16}


def row(setting: str, seed: int, error: float, data: str = "clusters", **more: Any) -> dict[str, Any]:
    """One of a study."""
    numbers = dict.fromkeys(("usage", "perplexity", "crowding", "split_error", "effective_rank_codes"), 0.5)
    measured = {"effective_rank_input": 8.0, "error_coded": error, "warmup": 0, "bits": 8}
    return {"setting": setting, "data": data, "seed": seed, **numbers, **measured, **more}


def written(folder: Path, rows: Any, **more: Any) -> str:
    (folder / "found.json").write_text(json.dumps({"command": "python it.py", "rows": rows, **more}))
    return str(folder / "found.json")


def cells(text: str, first: str) -> list[str]:
    """The line of a table that begins so, without its first cell."""
    (line,) = (line for line in text.splitlines() if line.startswith(f"| {first} |"))
    return [cell.strip() for cell in line.split("|")[2:-1]]


def test_collapse_has_a_table_of_means_for_each_kind_of_vectors(tmp_path: Path):
    rows = [row("random", seed, error, purity=0.5) for seed, error in ((0, 0.1), (1, 0.3))]
    rows += [row("SimVQ", 0, 0.25, "states")]
    clusters, states = study.collapse(written(tmp_path, rows)).split("**States**")
    assert cells(clusters, "random")[-2:] == ["0.200 ± 0.141", "0.50 ± 0.00"]
    assert cells(states, "SimVQ")[-1] == "0.250"  # one seed has no spread; without labels there is no purity
    assert "purity" in clusters and "purity" not in states and "2 seeds" in states


def test_verdicts_stand_beside_their_evidence(tmp_path: Path):
    healthy = {**HEALTHY, "effective_rank_input": 9.0}
    sick = {**healthy, "split_error": 0.9, "perplexity": 3.0}
    rows = [row("good", 0, 0.1, diagnosis=healthy), row("bad", 0, 0.4, diagnosis=sick), row("bad", 1, 0.8)]
    said = study.verdicts(written(tmp_path, rows))
    assert cells(said, "clusters: good") == ["1.0 ×", "60", "64", "0.100", "0.090", "9.0", "healthy"]
    assert cells(said, "clusters: bad") == ["4.0 ×", "3", "64", "0.900", "0.090", "9.0", "token collapse"]


def test_figures_show_each_initialisation_at_both_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    rows = [row("k-means at step 0", 0, 0.375), row("random, std 8", 0, 0.75), row("warm-up, then k-means", 0, 0.125)]
    rows[-1]["warmup"] = 500
    monkeypatch.setattr(study, "COLLAPSE", written(tmp_path, rows))
    drawn = study.figures()
    assert {path.name for path in drawn} == {
        "collapse-clusters-error-coded.svg",
        "collapse-clusters-effective-rank-input.svg",
    }
    svg = drawn[study.FIGURES / "collapse-clusters-error-coded.svg"]
    assert svg.count(">k-means</text>") == 1 and all(f">{value}</text>" in svg for value in ("0.375", "0.750", "0.125"))
    assert "<title>after a warm-up, k-means: 0.125</title>" in svg
    monkeypatch.setattr(study, "COLLAPSE", "results/nothing.json")
    assert study.figures() == {}


def test_quantizers_are_held_together_at_equal_bits(tmp_path: Path):
    rows = [row("VQ, 8 bits", 0, 0.5), row("VQ, 8 bits", 0, 0.25, "images"), row("Identity", 0, 0.1, bits=0)]
    said = study.quantizers(written(tmp_path, rows))
    assert cells(said, "`VQ, 8 bits`") == ["8", "0.500", "0.250"]
    assert cells(said, "`Identity`") == ["none", "0.100", ""]


def test_runs_of_flows_stand_next_to_a_perfect_sampler(tmp_path: Path):
    numbers = {"modes": 90, "perfect_at_quarter": 5.0, "perfect_modes": 23.04, "target_mean_reward": 2.0, "steps": 1000}
    names = {"environment": "Set(3)", "objective": "TB", "variant": "α = ½"}
    measured = {"modes_at_quarter": 4, "modes_found": 20, "mean_reward": 1.0, "tv": None, "spearman": 0.9, "slope": 0.5}
    rows = [{**names, **numbers, **measured, "seed": seed} for seed in (0, 1)]
    rows += [{**rows[0], "variant": "α = 0.9", "tv": 0.25, "mean_reward": 3.0}]
    said = flows.flow_study(written(tmp_path, rows))
    assert "**`Set(3)`**, 1,000 steps (a perfect sampler finds 5 at ¼ and 23 at the end of 90 modes)" in said
    assert cells(said, "TB, α = ½") == ["2", "4.0 ± 0.0", "20.0 ± 0.0", "0.50 ± 0.00", "", "0.90 ± 0.00", "0.50"]
    assert cells(said, "TB, α = 0.9") == ["1", "4.0", "20.0", "1.50", "0.250", "0.90", "0.50"]


def test_one_arm_against_every_other_is_paired_by_seed(tmp_path: Path):
    def arm(name: str, values: list[float], size: float) -> dict[str, Any]:
        fields = {"bits_per_byte": {"values": values}, "parameters": {"mean": size}, "train_flops": {"mean": 2 * size}}
        return {"name": name, "seeds": [0, 1, 2], **fields}

    rows = [arm("plain", [2.0, 2.1, 2.2], 5.0), arm("mine", [1.9, 2.0, 2.1], 10.0), arm("noisy", [1.5, 2.4, 2.1], 10.0)]
    said = models.versus(f"{written(tmp_path, rows)}#mine")
    assert cells(said, "`plain`") == ["0.50 ×", "0.50 ×", "-0.100 ± 0.000", "significant"]
    assert cells(said, "`noisy`")[2:] == ["+0.000 ± 0.994", "not significant"]
    assert "`mine` |" not in said.partition("\n")[2]


def test_a_result_that_is_not_there_is_not_made_up():
    part = "<!-- generated: versus results/nothing.json#mine -->\nold\n<!-- end -->"
    assert "*not run yet*" in build.built(part) and "old" not in build.built(part)


def test_a_renamed_class_has_its_new_name_wherever_a_result_names_it():
    recorded = {
        "command": "run --cache Full()",
        "rows": {"Full() float32": [{"policy": "Around(Full(exact=False))", "of": "Full"}]},
    }
    assert names.with_current_names(recorded) == {
        "command": "run --cache Full()",
        "rows": {
            "PreallocatedCache() float32": [
                {"policy": "Around(PreallocatedCache(exact=False))", "of": "PreallocatedCache"}
            ]
        },
    }
    assert names.with_current_names(["Full attention", "Fuller()"]) == ["Full attention", "Fuller()"]
    assert not set(names.RENAMED) & set(spec.index()) and set(names.RENAMED.values()) <= set(spec.index())


def test_a_comparison_says_the_difference_to_the_first_and_at_equal_cost():
    def arm(name: str, values: list[float], cost: float) -> dict[str, Any]:
        return {
            "name": name,
            "seeds": [0, 1, 2],
            "bits_per_byte": {"values": values},
            "inference_flops_per_token": {"mean": cost},
            "passes_per_token": {"mean": 1.5},
        }

    rows = [arm("plain", [2.0, 2.1, 2.2], 1.0), arm("deep", [1.9, 2.0, 2.1], 2.0), arm("mine", [1.5, 2.4, 2.1], 2.2)]
    assert models.verdicts(rows) == [
        "deep against plain: -0.100 bits per byte (95 % CI ± 0.000, paired, 3 seeds: significant).",
        "mine against plain: -0.100 bits per byte (95 % CI ± 0.994, paired, 3 seeds: not significant).",
        "At 1.10 × the inference FLOPs, mine against deep: "
        "+0.000 bits per byte (95 % CI ± 0.994, paired, 3 seeds: not significant).",
    ]
    corrected = models.verdicts([*rows[:2], {**rows[2], "control_of": "deep"}], comparisons=2)
    assert corrected == [
        "deep against plain: -0.100 bits per byte (95 % CI ± 0.000, paired, 3 seeds: significant, also after correction "
        "for 2 comparisons).",
        "deep against mine, which gives the same passes to random tokens: +0.000 bits per byte (95 % CI ± 0.994, paired, "
        "3 seeds: not significant).",
    ]


@pytest.mark.parametrize("file", sorted(scripts.ROOT.glob("results/*/*/tokens.json")), ids=str)
def test_sentences_of_committed_comparisons_are_those_that_were_recorded(file: Path):
    """The same pairs, differences and intervals as the comparison wrote, in other words."""
    found = json.loads(file.read_text())
    sentences = models.verdicts(found["rows"], found.get("comparisons", 1))
    assert len(sentences) == len(found["verdict"])
    for sentence, recorded in zip(sentences, found["verdict"], strict=True):
        number, margin = re.findall(r"\d\.\d{3}", recorded)
        sign = "-" if "below" in recorded else "+"
        assert f"{sign}{number} bits per byte (95 % CI ± {margin}," in sentence
        # Comparisons of earlier versions recorded "cannot tell from noise".
        noise = "cannot tell from noise" in recorded or "not significant" in recorded
        assert ("not significant" in sentence) == noise


METHOD = '''
class OwnIdea:
    """Keeps n tokens.

    The latest ones.

    Source: a paper.
    Cost: one pass.
    When not to use it: never | always.
    Resolved: nothing,
    over two lines.

    Args:
        tokens: how many,
            1 or more.
        mode: ``"a"`` or ``"b"``.

    Example:
        >>> 1 + 1
        2
    """

    paper = "a paper"

    def __init__(self, tokens: int, mode: str | None = None, *, last: bool) -> None: ...
'''


def test_a_page_has_the_parts_of_the_docstring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "kv_cache" / "own_idea.py"
    file.parent.mkdir()
    file.write_text(METHOD)
    monkeypatch.setenv("PONDERA_METHODS", str(tmp_path))
    method = spec.find("OwnIdea")
    page = pages.page(method)
    parts = dict(re.findall(r"^## (.*?)\n\n(.*?)(?=\n\n## |\Z)", page, re.DOTALL | re.MULTILINE))
    assert page.startswith("# OwnIdea\n") and "**Keeps n tokens.**\n\nThe latest ones.\n" in page
    assert parts["Source"] == "A paper." and parts["Cost"] == "One pass."
    assert parts["When not to use it"] == "Never | always."
    assert parts["Choices made here"] == "Nothing,\nover two lines."
    assert parts["Example"] == "```python\n>>> 1 + 1\n2\n```" and "not run yet" in parts["What was measured"]
    assert cells(parts["Arguments"], "`tokens`") == ["`int`", "required", "how many, 1 or more."]
    assert [argument for argument, _, _ in docstrings.parameters(method.signature)] == ["tokens", "mode", "last"]


def test_every_argument_of_a_method_is_explained_on_its_page():
    for method in (spec.index() | spec.index(pages.UNMEASURED)).values():
        wanted = {name for name, _, _ in docstrings.parameters(method.signature)}
        assert wanted == set(docstrings.of_method(method).arguments), method.name


def test_an_argument_refers_only_to_what_has_a_page():
    methods = spec.index() | spec.index(pages.UNMEASURED)
    for method in methods.values():
        for argument, meaning in docstrings.of_method(method).arguments.items():
            assert set(re.findall(r"see `(\w+)", meaning)) <= set(methods), f"{method.name}: {argument}"


def test_a_package_of_methods_has_a_heading_and_a_guide():
    for seam in (*spec.SEAMS, *spec.PARTS, *pages.UNMEASURED):
        assert seam in pages.SEAMS and (scripts.ROOT / "docs/guides" / f"{pages.GUIDES[seam]}.md").is_file()


def test_the_picture_shows_every_length_of_every_cache_in_both_charts():
    def measured(speed: float) -> dict[str, float]:
        return {"tokens_per_second": speed, "peak_bytes": 1e8 / speed}

    def row(factor: float) -> dict[str, Any]:
        return {name: measured(factor * number) for number, name in enumerate(front.DRAWN, start=1)}

    rows = {"decode 4096 x 1": row(8.0), "decode 65536 x 1": row(1.0), "decode 4096 x 8": {}, "first 4096": {}}
    svg = front.picture({"rows": rows})
    drawn = ElementTree.fromstring(svg)
    notes = [title.text for title in drawn.iter("{http://www.w3.org/2000/svg}title")]
    assert {"VQKV: 24.0000 at 4.1K", "VQKV: 3.0000 at 65.5K", "DynamicCache: 100.0000 at 65.5K"} <= set(notes)
    assert len([note for note in notes if note and " at " in note]) == 2 * 2 * len(front.DRAWN)
    assert "prefers-color-scheme: dark" in svg and svg.count("<style>") == 1


def test_the_headline_says_the_numbers_format_of_each_figure_and_names_the_strongest_stock_cache():
    said = [front.headline("results/memory.json"), front.gains("")]
    for wanted in ("float32", "13.4", "7.0", "bfloat16", "`StaticCache`", "5.6"):
        assert all(wanted in text for text in said), wanted
    rows = json.loads((scripts.ROOT / "results/memory.json").read_text())["rows"]["decode 65536 x 1"]
    stock = [one for one in rows if one.endswith("Cache") and one != "DynamicCache"]
    assert max(stock, key=lambda one: rows[one]["times_as_fast_as_dynamic"]) == "StaticCache"


def test_a_finding_over_models_has_its_spread():
    said = findings._eviction()
    for policy, number in (("SnapKV", "54 ± 25 %"), ("H2O", "32 ± 11 %")):
        assert f"{number} ({policy})" in said
    assert "3 models" in said


PROSE = [
    *sorted((scripts.ROOT / "docs").rglob("*.md")),
    scripts.ROOT / "CONTRIBUTING.md",
    scripts.ROOT / "pyproject.toml",
]


@pytest.mark.parametrize("page", PROSE, ids=lambda page: str(page.relative_to(scripts.ROOT)))
def test_a_python_file_that_is_named_exists(page: Path):
    files = {str(file.relative_to(scripts.ROOT)) for one in FOLDERS for file in (scripts.ROOT / one).rglob("*.py")}
    named = set(re.findall(r"(?<![\w/.-])(?!my_methods/)(?:[\w-]+/)+[\w-]+\.py\b", page.read_text()))
    assert not {name for name in named if not any(f"/{file}".endswith(f"/{name}") for file in files)}


PAGES = sorted((scripts.ROOT / "docs/results").glob("*.md"))


def test_the_index_lists_every_page():
    index = next(page for page in PAGES if page.stem == "index").read_text()
    assert set(re.findall(r"\]\((\S+)\)", index)) == {page.name for page in PAGES if page.stem != "index"}
    for title, name in re.findall(r"\[(.*)\]\((\S+)\)", index):
        assert (scripts.ROOT / "docs/results" / name).read_text().startswith(f"# {title}\n")


@pytest.mark.parametrize("page", [page for page in PAGES if page.stem != "index"], ids=lambda page: page.stem)
def test_a_page_begins_with_the_answer_and_ends_with_the_command(page: Path):
    title, answer, *_, last = page.read_text().strip().split("\n\n")
    assert title.endswith("?") and answer[0] not in "#|<-" and len(answer) > 60
    assert "\n## Command and files\n" in page.read_text() and "`results/" in last
    for module in re.findall(r"`python -m (\S+)|`python (benchmarks/\S+?)[ `]", last):
        path = module[1] or f"{module[0].strip('`.').replace('.', '/')}.py"
        assert (scripts.ROOT / path).is_file(), path


def test_the_python_interface_has_every_argument():
    api = scripts.load("tools.docs.api")
    text = next(iter(api.files().values()))
    for name, _, _ in api.SHOWN:
        assert f"## {name}\n" in text
    for argument in ("kv_cache", "calibrate", "effort", "passes", "past_key_values", "init"):
        assert f"| `{argument}` |" in text
    assert "Returns: The model, in eval mode" in text and "nearest name" in text


def test_a_measure_by_difficulty_is_the_mean_over_the_seeds_that_have_it():
    tracking = scripts.load("tools.docs.tracking")
    runs = [
        {"difficulty": [0, 1, 40], "accuracy": [1.0, 0.5, 0.0], "passes": [1, 3, 3]},
        {"difficulty": [0], "accuracy": [0.8], "passes": [2]},
    ]
    assert tracking.curve({"by_difficulty": runs}, "accuracy") == [(0, 0.9), (1, 0.5)]
    assert tracking.curve({"by_difficulty": runs}, "passes") == [(0, 1.5), (1, 3.0)]


def test_each_task_that_was_run_has_a_row_with_paired_differences(tmp_path: Path):
    def row(name: str, values: list[float]) -> dict[str, Any]:
        fields = {"accuracy": {"values": values}, "passes_per_token": {"values": [1.0, 1.0, 1.0]}}
        return {"name": name, "seeds": [0, 1, 2], **fields}

    folder = tmp_path / "parity-cpu"
    folder.mkdir()
    accuracies = {"plain": [0.5, 0.6, 0.7], "doubledepth": [0.6, 0.7, 0.8], "ponderlm2": [0.9, 0.5, 0.7]}
    rows = [row(name, values) for name, values in (accuracies | {"adaptivelatentcot": [0.5, 0.5, 0.5]}).items()]
    (folder / "models.json").write_text(json.dumps({"rows": rows}))
    said = tasks.on_tasks(str(tmp_path))
    found = cells(said, "`StateTracking('parity', reset=0.1)`")
    assert found[:3] == ["0.500", "0.600 ± 0.100", "0.700 ± 0.100"]
    assert found[-2:] == ["+0.100 ± 0.000 *", "+0.000 ± 0.657"]
    assert "Copying" not in said


def test_lengths_have_the_accuracy_beyond_the_training_only_where_there_is_some(tmp_path: Path):
    levels = {"difficulty": [0, 1, 2], "accuracy": [1.0, 0.9, 0.25], "passes": [1, 1, 1]}
    fields = {"name": "plain", "passes_per_token": {"values": [1.0, 1.0]}, "by_difficulty": [levels, levels]}
    rows = [
        {**fields, "length": 16, "accuracy": {"values": [0.8, 0.6]}, "accuracy_beyond": {"values": [None, None]}},
        {**fields, "length": 32, "accuracy": {"values": [0.5, 0.5]}, "accuracy_beyond": {"values": [0.25, 0.5]}},
    ]
    said = tasks.lengths(written(tmp_path, rows, seeds=2))
    short, long = (line.split(" | ") for line in said.splitlines() if line.startswith("| `plain` |"))
    assert short[1:7] == ["16", "1.00", "0.700 ± 0.141", "", "1.00", "0.25"]
    assert long[1:5] == ["32", "1.00", "0.500 ± 0.000", "0.375 ± 0.177"]


def test_a_part_is_made_from_a_folder_of_results():
    part = "<!-- generated: gained results/tracking/s3-resets-cpu -->\nold\n<!-- end -->"
    assert "`adaptivelatentcot`" in build.built(part) and "not run yet" not in build.built(part)
