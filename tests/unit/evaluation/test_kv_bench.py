from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from helpers import saved_models

from pondera.arch.dimensions import head_dim, kv_heads
from pondera.core.errors import UserError
from pondera.data.questions.base import AskedContext, Question
from pondera.evaluation import kv_bench
from pondera.evaluation.kv_bench import BenchSettings, bench
from pondera.evaluation.kv_sweep import new_cache
from pondera.evaluation.question_score import (
    encode,
    score_context,
    score_turns,
    score_turns_without,
    score_without,
)
from pondera.inference.load import Loaded, load
from pondera.methods.kv_cache.preallocated_cache import PreallocatedCache
from pondera.methods.kv_cache.streaming_llm import StreamingLLM

ASKED = AskedContext(
    "the lazy dog sleeps in the sun; a quick one runs by",
    (Question("\nthe", " quick"), Question("\nfox", " jumps over")),
)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    return load(saved_models.save(tmp_path_factory.mktemp("model") / "m", "plain"))


def _by_hand(loaded: Loaded, context: str, question: Question) -> tuple[float, bool]:
    """The whole text in one call, without a cache; the tokens of the answer are decoded one by one."""
    answer = encode(loaded, question.answer, False)
    ids = (encode(loaded, context, True) if context else []) + encode(loaded, question.text, not context)
    nats, decoded = 0.0, []
    for position, token in enumerate(answer):
        given = torch.tensor([[*ids, *answer[:position]]])
        nats += float(loaded.model(given).logits[0, -1].log_softmax(-1)[token])
        decoded.append(int(loaded.model(torch.tensor([[*ids, *decoded]])).logits[0, -1].argmax()))
    return nats, decoded == answer


@torch.no_grad()
def test_the_full_cache_scores_as_the_text_in_one_call(loaded: Loaded):
    method = PreallocatedCache()
    method.bind(loaded.model.backbone.config)
    found = score_context(loaded, method, ASKED, timed=True)
    for number, question in enumerate(ASKED.questions):
        nats, right = _by_hand(loaded, ASKED.context, question)
        assert math.isclose(found.nats[number], nats, abs_tol=1e-4) and found.right[number] == right
    assert found.cache_bytes > 0 and found.step_seconds > 0


@torch.no_grad()
def test_bytes_are_those_of_the_stock_cache(loaded: Loaded):
    """Storage that is allocated for later tokens is not part of the cache of a context; positions are."""
    config, tokens = loaded.model.backbone.config, len(encode(loaded, ASKED.context, True))
    slots = config.num_hidden_layers * kv_heads(config) * tokens
    method = PreallocatedCache()
    method.bind(loaded.model.backbone.config)
    found = score_context(loaded, method, ASKED)
    stock, positions = slots * 2 * head_dim(config) * 4, slots * 4
    assert 0 <= found.cache_bytes - stock <= 2 * positions


@torch.no_grad()
def test_without_a_context(loaded: Loaded):
    found = score_without(loaded, ASKED)
    for number, question in enumerate(ASKED.questions):
        nats, right = _by_hand(loaded, "", question)
        assert math.isclose(found.nats[number], nats, abs_tol=1e-4) and found.right[number] == right


@torch.no_grad()
def test_a_right_answer_is_seen(loaded: Loaded):
    """Answers that the model itself decodes are right, and others are not."""
    seen = 0
    for text in ("\nthe", "\nfox", "\ndog", " over", " lazy", " brown", " jumps", " quick", ".", " T", "\na", "\nb"):
        ids = encode(loaded, ASKED.context, True) + encode(loaded, text, False)
        best = int(loaded.model(torch.tensor([ids])).logits[0, -1].argmax())
        answer = str(loaded.tokenizer.decode(best))
        if encode(loaded, answer, False) != [best]:
            continue  # part of a character, which no text stands for
        wrong = " the" if answer != " the" else " fox"
        asked = AskedContext(ASKED.context, (Question(text, answer), Question(text, wrong)))
        assert score_context(loaded, _full(loaded), asked).right == (True, False)
        seen += 1
    assert seen


@torch.no_grad()
def test_questions_do_not_see_each_other(loaded: Loaded):
    method = StreamingLLM(6)
    method.bind(loaded.model.backbone.config)
    both = score_context(loaded, method, ASKED)
    alone = [score_context(loaded, method, AskedContext(ASKED.context, (question,))) for question in ASKED.questions]
    assert both.nats == pytest.approx([one.nats[0] for one in alone], abs=1e-5)
    assert both.nats != pytest.approx(score_context(loaded, _full(loaded), ASKED).nats, abs=1e-3), "nothing was evicted"


THREE = AskedContext(ASKED.context, (*ASKED.questions, Question("\na", " lazy dog")))


@torch.no_grad()
@pytest.mark.parametrize("context", [THREE.context, ""])
def test_a_conversation_scores_as_its_text_in_one_call(loaded: Loaded, context: str):
    """All questions but the first, each after the right answers to the ones before."""
    asked = AskedContext(context, THREE.questions)
    found = score_turns(loaded, _full(loaded), asked) if context else score_turns_without(loaded, _full(loaded), asked)
    assert len(found.nats) == len(found.right) == 2
    ids = encode(loaded, context, True) if context else []
    for number, question in enumerate(asked.questions):
        ids += encode(loaded, question.text, not ids)
        answer = encode(loaded, question.answer, False)
        logits_TV = loaded.model(torch.tensor([ids + answer])).logits[0].log_softmax(-1)
        nats = sum(float(logits_TV[len(ids) - 1 + place, token]) for place, token in enumerate(answer))
        if number:
            assert math.isclose(found.nats[number - 1], nats, abs_tol=1e-4)
        ids += answer


@torch.no_grad()
def test_the_cache_of_a_conversation_is_cut_after_the_first_question(loaded: Loaded):
    method = StreamingLLM(6)
    method.bind(loaded.model.backbone.config)
    found = score_turns(loaded, method, THREE)
    first = encode(loaded, THREE.questions[0].text, False)
    cache = new_cache(loaded.model, method)
    loaded.model(torch.tensor([encode(loaded, THREE.context, True) + first[:-1]]), past_key_values=cache)
    rest, nats = first[-1:], []
    for question in THREE.questions:
        rest += encode(loaded, question.text, False) if question is not THREE.questions[0] else []
        answer = encode(loaded, question.answer, False)
        logits_TV = loaded.model(torch.tensor([rest + answer[:-1]]), past_key_values=cache).logits[0].log_softmax(-1)
        nats.append(sum(float(row[token]) for row, token in zip(logits_TV[-len(answer) :], answer, strict=True)))
        rest = answer[-1:]
    assert found.nats == pytest.approx(nats[1:], abs=1e-5)
    assert found.nats != pytest.approx(score_turns(loaded, _full(loaded), THREE).nats, abs=1e-3), "nothing was evicted"


def test_a_conversation_needs_two_questions_and_room_for_all(loaded: Loaded):
    with pytest.raises(UserError, match="at least 2 questions"):
        score_turns(loaded, _full(loaded), AskedContext(ASKED.context, ASKED.questions[:1]))
    with pytest.raises(UserError, match="tokens of questions exceed the 96 positions"):
        score_turns(loaded, _full(loaded), AskedContext(ASKED.context, ASKED.questions * 20))


def test_an_unknown_order_is_refused():
    with pytest.raises(UserError, match="in-turns"):
        BenchSettings(ask="later")


def _full(loaded: Loaded) -> PreallocatedCache:
    method = PreallocatedCache()
    method.bind(loaded.model.backbone.config)
    return method


def test_a_context_that_is_too_long(loaded: Loaded):
    with pytest.raises(UserError, match="exceed the 96 positions of this model"):
        score_context(loaded, _full(loaded), AskedContext("x" * 200, ASKED.questions))


@pytest.fixture
def small(tmp_path: Path) -> BenchSettings:
    paragraphs = [
        {"context": f"a{n} is b{n}.", "qas": [{"question": f"a{n}?", "answers": [{"text": f"b{n}"}]}]} for n in range(9)
    ]
    (tmp_path / "x.json").write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}))
    return BenchSettings((f"Squad({str(tmp_path / 'x.json')!r})",), ("StreamingLLM(0.5)",), tokens=40, contexts=2)


def test_rows(loaded: Loaded, small: BenchSettings):
    full, half = bench(loaded, small)
    assert full.method == kv_bench.FULL and full.of_full == 1 and half.method == "StreamingLLM(0.5)"
    assert full.items == half.items >= 2 and half.cache_bytes < full.cache_bytes
    assert full.kept in (None, pytest.approx(1.0))
    assert full.kept is None or full.kept_interval == pytest.approx((1.0, 1.0))
    assert 0 <= half.right_interval[0] <= half.right <= half.right_interval[1] <= 1


def test_what_is_kept_is_the_share_of_the_worth():
    def score(*nats: float):
        return kv_bench.ContextScore(tuple(nats), (True, False), 100)

    scores = {
        kv_bench.NONE: [score(-10, -8), score(-6, -6)],
        kv_bench.FULL: [score(-2, -2), score(-1, -1)],
        "half": [score(-6, -5), score(-3.5, -3.5)],
    }
    row = kv_bench._row("q", "half", PreallocatedCache(), scores)
    assert row.kept == pytest.approx((7 + 5) / (14 + 10)) and row.right == 0.5 and row.items == 4
    assert row.kept_interval == pytest.approx((0.5, 0.5))
    scores[kv_bench.FULL] = scores[kv_bench.NONE]
    assert kv_bench._row("q", "half", PreallocatedCache(), scores).kept is None


def test_a_stored_run_goes_on(loaded: Loaded, small: BenchSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    store = tmp_path / "out" / "scores.json"
    rows = bench(loaded, small, store=store)
    with monkeypatch.context() as only:
        only.setattr(kv_bench, "_scores", lambda *_: pytest.fail("measured again"))
        assert bench(loaded, small, store=store) == rows
    more = BenchSettings(small.questions, (*small.methods, "StreamingLLM(8)"), small.tokens, small.contexts)
    assert bench(loaded, more, store=store)[:2] == rows
    other = BenchSettings(small.questions, small.methods, 30, small.contexts)
    with pytest.raises(UserError, match="has tokens 40, and 30 is asked for; give another file"):
        bench(loaded, other, store=store)
    store.write_text("[]")
    with pytest.raises(UserError, match="is not a file of pondera bench"):
        bench(loaded, small, store=store)
