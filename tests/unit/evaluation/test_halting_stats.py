"""Statistics of depth: equal to their slow forms, honest about what a sample can tell, written by a training."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import halting_reference, training_worker

from pondera.core.errors import UserError
from pondera.core.run_folder import Run
from pondera.data.corpus import prepare
from pondera.evaluation.halting_stats import BLOCK, RESAMPLES, against, halting_stats, word_classes
from pondera.evaluation.trace import trace_halting
from pondera.inference.load import load
from pondera.training.train import train


def sample(size: int = 1500, slope: float = 0.5, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Passes from 1 to 4 that follow a surprise, more or less."""
    draw = np.random.default_rng(seed)
    nll = draw.exponential(2.0, size)
    return np.clip(np.rint(1.5 + slope * nll + draw.normal(0, 0.7, size)), 1, 4), nll


def slow_ranks(values: np.ndarray) -> np.ndarray:
    return np.array([(values < value).sum() + ((values == value).sum() + 1) / 2 for value in values])


def test_correlations_equal_their_definitions():
    passes, nll = sample()
    found = against(passes, nll)
    assert found["pearson"]["value"] == pytest.approx(np.corrcoef(passes, nll)[0, 1])
    assert found["spearman"]["value"] == pytest.approx(np.corrcoef(slow_ranks(passes), slow_ranks(nll))[0, 1])


def test_the_interval_equals_that_of_blocks_drawn_one_by_one():
    passes, nll = sample()
    blocks = np.array_split(np.arange(len(nll)), range(BLOCK, len(nll), BLOCK))
    times = np.random.default_rng(0).multinomial(len(blocks), np.full(len(blocks), 1 / len(blocks)), RESAMPLES)
    slow = []
    for row in times:
        drawn = np.concatenate([np.tile(block, count) for block, count in zip(blocks, row, strict=True)]).astype(int)
        slow.append(np.corrcoef(passes[drawn], nll[drawn])[0, 1])
    found = against(passes, nll)["pearson"]
    assert (found["low"], found["high"]) == pytest.approx(tuple(np.quantile(slow, [0.025, 0.975])))
    assert found["low"] < found["value"] < found["high"]


def test_neighbours_that_are_alike_make_the_interval_wider():
    draw = np.random.default_rng(0)
    topics = np.repeat(draw.normal(size=24), BLOCK)  # both follow what the text is about at the moment
    passes, nll = np.rint(3 + topics), topics + draw.normal(size=len(topics))
    mixed = draw.permutation(len(nll))
    alike, apart = against(passes, nll)["pearson"], against(passes[mixed], nll[mixed])["pearson"]
    assert alike["value"] == pytest.approx(apart["value"])
    assert alike["high"] - alike["low"] > 1.5 * (apart["high"] - apart["low"])


@pytest.mark.parametrize("slope", [0.5, -0.5])
def test_deciles_and_signs_follow_the_surprise(slope: float):
    passes, nll = sample(slope=slope)
    passes = passes if slope > 0 else 5 - sample(slope=0.5)[0]
    found = against(passes, nll)
    assert len(found["deciles"]) == 10
    order = np.argsort(nll)
    assert found["deciles"][0] == {
        "nll": pytest.approx(nll[order[:150]].mean()),
        "passes": pytest.approx(passes[order[:150]].mean()),
    }
    assert (found["deciles"][-1]["passes"] > found["deciles"][0]["passes"]) == (slope > 0)
    assert found["spearman"]["low"] > 0 if slope > 0 else found["spearman"]["high"] < 0


def test_depth_that_has_nothing_to_do_with_surprise_is_not_tied_to_it():
    """The interval holds zero in about 95 of 100 samples: between 85 and 100 of these 60."""
    held = 0
    for seed in range(60):
        draw = np.random.default_rng(seed)
        found = against(draw.integers(1, 4, 2048).astype(float), draw.exponential(2.0, 2048))["spearman"]
        held += found["low"] <= 0 <= found["high"]
    assert held >= 51


@pytest.mark.parametrize("passes", [[2, 2, 2], [1.0]])
def test_constant_depth_is_said_and_nothing_is_divided(passes: list[float]):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = halting_stats(["a"] * len(passes), passes, [1.0] * len(passes), [2.0] * len(passes), [1] * len(passes))
    assert found == {
        "count": len(passes),
        "mean": passes[0],
        "constant": True,
        "histogram": [{"passes": passes[0], "tokens": len(passes)}],
    }


def test_what_cannot_be_known_is_none():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        level = against(np.tile([1.0, 2.0], 100), np.full(200, 3.0))
        few = against(np.array([1.0, 2.0, 2.0]), np.array([1.0, 2.0, 3.0]))
        rare = against(np.append(np.ones(499), 2.0), np.random.default_rng(0).exponential(size=500))
    assert level["pearson"] == level["spearman"] == {"value": None, "low": None, "high": None}
    assert few["pearson"]["value"] == pytest.approx(np.corrcoef([1, 2, 2], [1, 2, 3])[0, 1])
    assert few["pearson"]["low"] is None and len(few["deciles"]) == 3
    assert rare["pearson"]["low"] <= rare["pearson"]["value"] <= rare["pearson"]["high"]


def test_histogram_groups_and_bands():
    tokens = ["The", " cat", "nip", "\n", "7", "!", ""]
    found = halting_stats(tokens, [1, 2, 3, 1, 1, 2.4, 1], [1.0] * 7, [1.0] * 7, [1, 10, 11, 100, 101, 1000, 1001])
    assert found["histogram"] == [{"passes": n, "tokens": count} for n, count in ((1, 4), (2, 2), (3, 1))]
    assert found["classes"][0] == {"name": "start of a word", "tokens": 2, "passes": 1.5}
    assert [one["name"] for one in found["classes"]][1:] == [
        "inside a word", "digits", "punctuation", "whitespace", "other",
    ]  # fmt: skip
    assert [(one["name"], one["tokens"]) for one in found["frequency"]] == [
        ("1–10", 2), ("11–100", 2), ("101–1000", 2), ("over 1000", 1),
    ]  # fmt: skip
    assert found["mean"] == pytest.approx(11.4 / 7)


@pytest.mark.parametrize(
    ("tokens", "classes"),
    [
        (["naï", "", "ve", "té"], "start inside? inside inside"),
        (["don", "'", "t"], "start punctuation start"),
        ([" ", "x", " \n", "y", "\tz"], "whitespace start whitespace start start"),
        (["self", ".", "x1", "2", " 3"], "start punctuation start digits digits"),
        (["東", "京", "。", " “", "Oh"], "start inside punctuation punctuation start"),
    ],
)
def test_word_classes(tokens: list[str], classes: str):
    full = {"start": "start of a word", "inside": "inside a word", "inside?": "other"}
    assert word_classes(tokens) == [full.get(name, name) for name in classes.split()]


def test_a_value_per_token_is_asked_for():
    with pytest.raises(ValueError, match="one value of each kind per token"):
        halting_stats(["a", "b"], [1, 2], [1.0], [1.0, 2.0], [1, 2])
    with pytest.raises(ValueError, match="at least one token"):
        halting_stats([], [], [], [], [])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("depths")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PONDERA_METHODS", str(halting_reference.write_method(folder / "methods")))
        patch.setenv("PONDERA_CACHE", str(folder / "cache"))
        config = training_worker.tiny(training_worker.write_text(folder / "text"), {"think": "Halting()"})
        return train(config, folder / "run", progress=False)


@pytest.fixture
def methods(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PONDERA_METHODS", str(halting_reference.write_method(tmp_path / "methods")))


def test_a_training_leaves_its_depths(run: Run):
    """Every third token of a window halts: 16 windows of 32 tokens, but for the very first token."""
    assert set(run.traces()) == {"sample", "depths"}
    found = run.traces()["depths"]
    assert found["count"] == 16 * 32 - 1
    assert found["histogram"] == [{"passes": 1, "tokens": 16 * 11 - 1}, {"passes": 2, "tokens": 16 * 21}]
    assert found["residuals"][1] == pytest.approx(found["residuals"][0] / 10)
    assert sum(one["tokens"] for one in found["classes"]) == sum(one["tokens"] for one in found["frequency"]) == 511
    assert json.loads((run.traces_dir / "depths.json").read_text()) == found


@pytest.mark.parametrize("training_mode", [True, False])
def test_losses_belong_to_their_tokens(run: Run, methods: None, monkeypatch: pytest.MonkeyPatch, training_mode: bool):
    """The loss on a token is what the model said at the token before, in the window that predicts it."""
    seen = {}

    def keep(tokens, passes, **given):
        seen.update(given, tokens=tokens, passes=passes)
        return {}

    monkeypatch.setattr("pondera.evaluation.trace.halting_stats", keep)
    corpus, model = prepare(run.config.data), load(run.path, "cpu").model.train(training_mode)
    assert trace_halting(model, corpus, 32, max_tokens=100, batch_size=2) == {
        "residuals": seen_residuals(model, corpus)
    }
    assert model.training == training_mode and model.think is not None and not model.think.record
    ids = torch.from_numpy(corpus.validation.ids[:97].astype(np.int64))
    with torch.no_grad():
        logs = [model.eval()(ids[None, first : first + 32]).logits[0].log_softmax(-1) for first in (0, 32, 64)]
    losses = -torch.cat(logs).gather(1, ids[1:, None])[:, 0]
    np.testing.assert_allclose(seen["read"], losses[:-1], atol=1e-5)  # tokens 1 to 95
    np.testing.assert_allclose(seen["predicted"], losses[1:], atol=1e-5)  # tokens 2 to 96
    np.testing.assert_array_equal(seen["passes"], [1 + (at % 32 % 3 > 0) for at in range(1, 96)])
    assert "".join(seen["tokens"]) == corpus.tokenizer().decode(ids[1:96].tolist(), skip_special_tokens=True)
    counts = np.bincount(corpus.train.ids)
    common = int(counts.argmax())
    assert {int(rank) for rank, token in zip(seen["ranks"], ids[1:96], strict=True) if token == common} == {1}


def seen_residuals(model, corpus) -> list[float]:
    """Those of the first batch, and of no other."""
    model.think.record, mode = True, model.training
    with torch.no_grad():
        found = model.eval()(torch.stack([corpus.validation.windows(32)[at]["input_ids"] for at in (0, 1)])).trace
    model.train(mode).think.record = False
    return found["residuals"]


def test_windows_of_one_token_have_no_depths(run: Run, methods: None):
    with pytest.raises(UserError, match="use a larger data.context"):
        trace_halting(load(run.path, "cpu").model, prepare(run.config.data), context=1, max_tokens=1)
