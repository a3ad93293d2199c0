"""Which method is taken for a use and a budget, and how questions are scored that were known."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers import saved_models

from pondera import UserError
from pondera.core import spec
from pondera.data.questions.base import AskedContext, Question
from pondera.evaluation import uses
from pondera.evaluation.kv_sweep import FULL, ready
from pondera.evaluation.question_score import encode, score_context, score_known
from pondera.evaluation.uses import USES, Measured, choose, share_of
from pondera.inference.load import load


def row(method: str, of_full: float, kept: float) -> Measured:
    return Measured(method, of_full, kept, kept, 1.0, 1.0, ())


ROWS = [row(FULL, 1.0, 1.0), row("a", 0.26, 1.0), row("b", 0.25, 0.96), row("c", 0.12, 0.7), row("d", 0.2, 0.955)]


@pytest.mark.parametrize("budget, method", [(0.3, "a"), (0.25, "b"), (0.22, "d"), (0.12, "c"), (None, "d")])
def test_the_method_that_is_taken(budget: float | None, method: str):
    assert choose(ROWS, budget).method == method


def test_no_method_within_the_budget_names_the_smallest():
    with pytest.raises(UserError, match="the smallest cache is that of c, 12.0 %"):
        choose(ROWS, 0.05)


@pytest.mark.parametrize("given", ["0", "100%", "1", "-3%", "a quarter", "", "1.2.3"])
def test_budgets_that_are_no_share(given: str):
    with pytest.raises(UserError, match="25%"):
        share_of(given)


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("share", [0.05, 0.25, 0.9])
def test_the_methods_of_a_use_exist(use: str, share: float):
    methods = USES[use].methods(share)
    assert len(set(methods)) == len(methods) >= 4
    for text in methods:
        spec.build(text, "kv_cache")


def test_a_known_question_is_read_before_the_cache_is_compressed(tmp_path: Path):
    """The cache has read context and question when its method evicts; the log-probability is that of plain decoding with it."""
    loaded = load(saved_models.save(tmp_path / "model", "plain"))
    asked = AskedContext("the quick brown fox jumps", (Question(" over?", " dog"),))
    method = ready(loaded.model, "StreamingLLM(6, sinks=1)", (), print)
    found = score_known(loaded, method, asked)
    text = encode(loaded, asked.context, True) + encode(loaded, " over?", False)
    answer = encode(loaded, " dog", False)
    loaded.model.kv_cache = method
    with torch.no_grad():
        cache = loaded.model.new_cache()
        loaded.model(torch.tensor([text[:-1]]), past_key_values=cache)
        logits_TV = loaded.model(torch.tensor([text[-1:] + answer[:-1]]), past_key_values=cache).logits[0]
    chosen_T = logits_TV.log_softmax(-1).gather(-1, torch.tensor(answer)[:, None])
    assert found.nats[0] == pytest.approx(float(chosen_T.sum()), abs=1e-4)
    loaded.model.kv_cache = None
    unknown = score_context(loaded, method, asked)
    assert unknown.nats != found.nats and unknown.cache_bytes <= found.cache_bytes


def test_measured_rows_are_means_over_the_questions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    paragraphs = [
        {"context": f"a{n} is b{n}.", "qas": [{"question": f"a{n}?", "answers": [{"text": f"b{n}"}]}]}
        for n in range(20)
    ]
    (tmp_path / "x.json").write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}))
    squad = f"Squad({str(tmp_path / 'x.json')!r})"
    monkeypatch.setattr(uses, "QUESTIONS", (squad, squad[:-1] + ", each=2)"))
    loaded = load(saved_models.save(tmp_path / "model", "plain"))
    found = uses.measure(loaded, "questions", None, methods=["StreamingLLM(0.5)"], tokens=64, contexts=2)
    assert [one.method for one in found] == [FULL, "StreamingLLM(0.5)"]
    assert found[1].of_full == pytest.approx(sum(one.of_full for one in found[1].rows) / 2) and len(found[1].rows) == 2
