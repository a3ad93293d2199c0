"""The report says what the runs did: nothing invented, nothing dropped, nothing executed."""

from __future__ import annotations

import math
import random
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from pondera.core.errors import UserError
from pondera.core.format import human
from pondera.core.run_config import RunConfig, TrainConfig
from pondera.core.run_folder import Run
from pondera.evaluation import significance
from pondera.report.heatmap import SHADES, shade_html, shade_terminal
from pondera.report.page import group_variants, view_run, write_report

TEXT = "The hippopotamus, which nobody had expected, sat down.\nThen it laughed, and the river laughed with it.\n"


def make_run(
    folder: Path,
    name: str,
    seed: int,
    score: float = 2.0,
    passes: float = 1.0,
    adaptive: bool = False,
    steps: int = 500,
    finished: bool = True,
    about: str = "",
    text: str = TEXT,
) -> Path:
    """A run folder such as training leaves, with a power law for a curve."""
    draw = random.Random(f"{name}{seed}")
    luck = draw.gauss(0, 0.004)
    config = RunConfig(name=name, about=about, train=TrainConfig(steps=steps, seed=seed))
    run = Run.create(folder / f"{name}-{seed}", config)
    price = 2.1e7 * passes
    last = steps if finished else steps // 2
    for step in range(10, last + 1, 10):
        tokens, bits = step * 2048, score + luck + 2.2 * ((steps / step) ** 0.35 - 1) + draw.gauss(0, 0.003)
        line = {"step": step, "tokens": tokens, "train_flops": 3 * price * tokens, "loss": bits * 2.6, "lr": 1e-3}
        if step % 50 == 0:
            line["validation"] = {"loss": bits * 2.6, "bits_per_byte": bits, "perplexity": math.exp(bits * 2.6)}
        run.log(**line)
    if finished:
        tokens = steps * 2048
        run.write_result(
            {
                "loss": bits * 2.6, "perplexity": math.exp(bits * 2.6), "bits_per_byte": bits,
                "passes_per_token": passes,
                "inference_flops_per_token": price, "train_flops": 3 * price * tokens, "train_tokens": tokens,
                "train_seconds": 312.0, "kv_bytes_per_token": 3072 * passes, "train_tokens_per_second": 5200 / passes,
                "parameters": 1_240_000,
            }
        )  # fmt: skip
        tokens_of_text = re.findall(r" ?\w+|\n|[^\w\n]", text)
        counts = [draw.choice([1, 2, 2, 3, 4]) if adaptive else passes for _ in tokens_of_text]
        losses = [draw.expovariate(0.4) for _ in counts]
        run.write_trace("sample", {"tokens": tokens_of_text, "passes": counts, "nll": losses})
    return run.path


def three_arms(folder: Path) -> list[Path]:
    arms = (
        ("plain", 1.96, 1.0, False, "every token one pass"),
        ("ponderlm2", 1.90, 2.0, False, "one extra thought per token"),
        ("halting", 1.905, 1.6, True, "stops when it is sure"),
    )
    return [
        make_run(folder, name, seed, score, passes, adaptive, about=about)
        for name, score, passes, adaptive, about in arms
        for seed in range(3)
    ]


class Page(HTMLParser):
    """Checks nesting, and collects tags, attributes and text."""

    VOID = {"meta", "input", "rect", "line"}

    def __init__(self, html: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.words)


def page_of(runs: list[Path], out: Path) -> Page:
    return Page(write_report(runs, out).read_text(encoding="utf-8"))


def test_page_is_whole_offline_and_scriptless(tmp_path):
    page = page_of(three_arms(tmp_path), tmp_path / "out" / "report.html")
    names = [tag for tag, _ in page.tags]
    assert not {"script", "link", "img", "iframe"} & set(names)
    assert "://" not in (tmp_path / "out" / "report.html").read_text()
    charts = [attributes for tag, attributes in page.tags if tag == "svg" and attributes.get("role") == "img"]
    assert len(charts) == 3 and names.count("title") > 3
    assert not re.search(r"nan|inf\b|None", " ".join(str(a.get("d", "")) for _, a in page.tags))
    identifiers = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(identifiers) == len(set(identifiers))
    assert [a["scope"] for tag, a in page.tags if tag == "th"].count("row") == 3


def test_page_tells_scores_prices_and_how_runs_were_made(tmp_path):
    runs = three_arms(tmp_path)
    page = page_of(runs, tmp_path / "report.html")
    [plain] = [arm for arm in group_variants(map(view_run, runs)) if arm.name == "plain"]
    scores = plain.values("bits_per_byte")
    mean = sum(scores) / 3
    spread = math.sqrt(sum((score - mean) ** 2 for score in scores) / 2)
    assert f"{mean:.4f}" in page.text and f"± {spread:.4f}" in page.text
    assert any(
        words.startswith(("ponderlm2 is best: 1.90", "ponderlm2 and halting do not differ")) for words in page.words
    )
    assert "Every token took 2 passes." in page.text and "darker tokens took more" in page.text
    assert "seed: 2" in page.text and "python 3." in page.text and "pytest" in page.text


def test_nothing_in_a_run_executes(tmp_path):
    bad = "<script>alert(1)</script>"
    path = make_run(tmp_path, "plain", 0, about=bad)
    run = Run.open(path)
    run.write_trace("sample", {"tokens": [bad, '"><img src=x onerror=alert(1)>', "\ud800\x1b"], "passes": [1, 2, 3]})
    (path / "config.yaml").write_text(f"name: '{bad}'\nabout: '{bad}'\n")
    (path / "env.json").write_text('{"command": "<script>alert(2)</script>"}')
    html = write_report([path], tmp_path / "report.html", title=bad).read_text()
    page = Page(html)
    assert "script" not in [tag for tag, _ in page.tags] and "img" not in [tag for tag, _ in page.tags]
    assert "alert(1)" in page.text  # shown, as text


def test_incomplete_and_damaged_runs_are_named(tmp_path):
    whole = make_run(tmp_path, "plain", 0)
    half = make_run(tmp_path, "plain", 1, finished=False)
    empty = Run.create(tmp_path / "empty", RunConfig(name="other")).path
    broken = make_run(tmp_path, "broken", 0)
    (broken / "metrics.jsonl").write_text("what\n{}\n")
    (broken / "result.json").write_text("{")
    text = page_of([whole, half, empty, broken], tmp_path / "report.html").text
    assert "last logged step 250 of 500" in text and "incomplete: 1 of 2 seeds finished" in text
    assert "no metrics" in text and "line 1: not a JSON object" in text and "result.json: cannot be read" in text
    assert "plain reaches" in text  # the finished run still has its headline


def test_no_finished_run_still_makes_a_page(tmp_path):
    text = page_of([make_run(tmp_path, "plain", 0, finished=False)], tmp_path / "report.html").text
    assert "No run has finished yet." in text


def test_runs_that_differ_in_more_than_the_seed_are_flagged(tmp_path):
    first, second = make_run(tmp_path, "plain", 0), make_run(tmp_path, "plain", 1, steps=400)
    text = page_of([first, second], tmp_path / "report.html").text
    assert "The runs named plain differ in more than the seed: train.steps." in text
    assert "differ in more" not in page_of([first, make_run(tmp_path, "plain", 2)], tmp_path / "two.html").text


def test_loss_replaces_bits_when_a_run_has_none(tmp_path):
    runs = [make_run(tmp_path, "plain", 0), make_run(tmp_path, "other", 0)]
    run = Run.open(runs[1])
    lines = [line | {"validation": {"loss": 5.0}} for line in run.metrics()]
    run.truncate_after(-1)
    for line in lines:
        run.log(**line)
    run.write_result({**(run.result() or {}), "bits_per_byte": None})
    text = page_of(runs, tmp_path / "report.html").text
    assert "validation loss" in text and "validation bits per byte" not in text


def test_report_leaves_the_runs_alone(tmp_path):
    path = make_run(tmp_path, "plain", 0)
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    first = write_report([path], tmp_path / "a.html").read_bytes()
    assert write_report([path], tmp_path / "b.html").read_bytes() == first
    assert {file: file.read_bytes() for file in path.rglob("*") if file.is_file()} == before


def test_wrong_input_is_refused(tmp_path):
    with pytest.raises(UserError, match="no runs"):
        write_report([], tmp_path / "report.html")
    with pytest.raises(UserError, match="not a run folder: config.yaml and env.json missing"):
        write_report([tmp_path], tmp_path / "report.html")
    with pytest.raises(UserError, match="is a folder"):
        write_report([make_run(tmp_path, "plain", 0)], tmp_path)


def entry(name: str, scores: list[float], price: float = 1.0, first_seed: int = 0) -> significance.Entry:
    curve = [(price * x, 3.0 - x / 10) for x in (1.0, 2.0, 4.0, 8.0)]
    prices = dict.fromkeys(significance.PRICES, price) | {"train_flops": 8 * price}
    return significance.Entry(name, dict(enumerate(scores, first_seed)), prices, curve)


def test_verdict_calls_a_gap_within_the_noise_level():
    said = significance.sentences([entry("a", [2.00, 2.02, 2.01], 2.0), entry("b", [2.03, 2.01, 2.02])], "loss")
    assert said[0] == "a and b do not differ significantly: 2.010 and 2.020 loss."
    # Differences -.03, .01, -.01: mean -.01, standard deviation .02, margin 4.30 * .02 / sqrt 3.
    assert said[1] == "a is 0.010 loss below b (95 % CI ± 0.050, paired, 3 seeds: not significant)."
    assert said[2].startswith("For 0.010 loss less than b (not significant), a spends 2×")


def test_verdict_names_best_and_its_price():
    deep = entry("deep", [1.80, 1.82, 1.81], price=2.0)
    said = significance.sentences([entry("plain", [2.00, 2.01, 2.02]), deep], "loss")
    assert said[0] == "deep is best: 1.810 loss."
    assert said[1] == "deep is 0.200 loss below plain (95 % CI ± 0.025, paired, 3 seeds: significant)."
    assert said[2].startswith("For 0.200 loss less than plain, deep spends") and "2× the training FLOPs" in said[2]
    assert "deep is 0.400 behind" in said[3]  # at 8 FLOPs: plain 2.2, deep (its point 4.0) 2.6


def test_verdict_with_one_seed_warns():
    said = significance.sentences([entry("a", [1.0], price=2.0), entry("b", [2.0])], "loss")
    assert said[1] == "a is 1.000 loss below b (one seed: significance unknown)."
    assert "less than b (one seed: significance unknown), a spends" in said[2]


def test_verdict_pairs_seeds_and_says_when_it_cannot():
    """Seeds that differ by much, recipes that differ by little: clear when paired, noise when not."""
    a, b = [2.00, 2.20, 2.40], [2.01, 2.21, 2.41]
    assert significance.gap(dict(enumerate(a)), dict(enumerate(b))).clear
    apart = significance.gap(dict(enumerate(a)), dict(enumerate(b, 3)))
    assert not apart.clear and apart.how == "unpaired, with no seed in common" and apart.seeds == "3 and 3 seeds"
    assert apart.margin == pytest.approx(2.776 * 0.2 * math.sqrt(2 / 3), rel=1e-3)  # Welch: 4 degrees of freedom
    assert significance.gap({0: 1.0}, {1: 2.0, 2: 2.1}).margin is None


def test_two_seeds_can_hardly_tell():
    assert not significance.gap({0: 1.90, 1: 1.92}, {0: 2.00, 1: 2.00}).clear  # t is 12.71 with one degree of freedom
    assert significance.gap({0: 1.90, 1: 1.901}, {0: 2.00, 1: 2.00}).clear


def test_verdict_without_prices_makes_no_claim_about_them():
    unpriced = [entry("a", [1.0, 1.1], math.nan), entry("b", [2.0, 2.1], math.nan)]
    assert not any("costs" in one or "×" in one for one in significance.sentences(unpriced, "loss"))


@pytest.mark.parametrize(
    "value, text",
    [(0, "0"), (0.25, "0.25"), (48, "48"), (999.9, "1K"), (1_250_000, "1.25M"), (3.2e12, "3.2T"), (5e21, "5000E")],
)
def test_human(value, text):
    assert human(value) == text


def test_terminal_shade_goes_from_light_to_dark_and_resets():
    text = shade_terminal(["a", "b\n", "c"], [1, 2, 4])
    body, legend = text.rsplit("\n", 1)
    assert f"48;5;{SHADES[0]};" in body.split("a")[0] and f"48;5;{SHADES[-1]};" in body.split("c")[0].rsplit("b", 1)[1]
    assert all(line.endswith("\x1b[0m") for line in body.split("\n"))
    assert legend.startswith("passes per token")


def test_terminal_marks_without_color():
    text = shade_terminal(["The", " cat", " sat", "\n", "x"], [2, 3, 2, 12, 2.5], color=False)
    assert text.startswith("The cat³ sat↵¹²\nx[2.5]\n") and "2 if unmarked" in text
    assert "\x1b" not in text


def test_terminal_says_when_depth_is_fixed():
    assert shade_terminal(["a", "b"], [2, 2]) == "ab\nevery token took 2 passes"
    assert shade_terminal([], []) == ""
    with pytest.raises(ValueError, match="2 tokens but 1"):
        shade_terminal(["a", "b"], [1])


@pytest.mark.parametrize("color", [True, False])
def test_terminal_cannot_be_driven_by_tokens(color):
    evil = "\x1b]0;owned\x07\r\x9b2J\u202e\u2028\ud800"
    text = shade_terminal([evil, "b"], [1, 2], color=color)
    rest = re.sub(r"\x1b\[(48;5;\d+;38;5;\d+|0)m", "", text)
    assert not any(character in rest for character in evil if not character.isascii() or ord(character) < 32)
    assert r"\x1b]0;owned\x07\r\x9b2J\u202e\u2028\ud800" in rest
    rest.encode()


def test_html_shade_spans_zero_to_one():
    html = shade_html(["<b>", "x", "y"], [1, 3, None], [0.5, None, 2.5])
    assert "--passes:0;--nll:0" in html and "--passes:1;--nll:0" in html and "--passes:0;--nll:1" in html
    assert "&lt;b&gt;" in html and 'title="1 pass, 0.50 nats"' in html and 'title="3 passes"' in html
