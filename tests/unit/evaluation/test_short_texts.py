"""Scores of short texts: against a loop over tokens, in any batch, for methods of every seam, with document masks and cuts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from helpers import declared, saved_models

from pondera import AdaptiveConfig, AdaptiveLM
from pondera.core import spec
from pondera.evaluation.binomial import share_interval
from pondera.evaluation.chunked_forward import chunked_forward
from pondera.evaluation.short_texts import Scored, document_start, score_texts
from pondera.inference.load import Loaded, load

VOCAB = 280
LENGTHS = (1, 2, 3, 5, 5, 5, 8, 8, 13, 14, 17, 21, 21, 22, 30, 31)
SEAMS = ("think", "chunk", "memory", "head")
METHODS = [(seam, text) for seam in SEAMS for kinds in declared.forms(seam).values() for text in kinds.values()]


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def model_with(seam: str | None = None, text: str | None = None) -> Loaded:
    """A random model as if it were from a run; after a training batch, so that codebooks have values.

    In float64: latent thoughts of a random model amplify the rounding errors of float32, which differ between batches.
    """
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
    backbone = {"model_type": "llama", "vocab_size": VOCAB, "initializer_range": 0.3, **sizes}
    model = AdaptiveLM(AdaptiveConfig(backbone=backbone, **({} if seam is None else {seam: text})))
    ids_BT = torch.randint(VOCAB, (4, 24))
    model.train()(ids_BT, labels=ids_BT)
    return Loaded(model.double().eval(), saved_models.tokenizer(), "made")


def texts(seed: int = 0) -> list[Scored]:
    draw = torch.Generator().manual_seed(seed)
    rows = [torch.randint(VOCAB, (length + 1,), generator=draw).tolist() for length in LENGTHS]
    return [Scored(tuple(row), 1 + number % min(3, len(row) - 1)) for number, row in enumerate(rows)]


def by_hand(model: Any, text: Scored) -> tuple[float, bool]:
    """One call per token, with all tokens before it."""
    nats, right = 0.0, True
    for place in range(text.first, len(text.ids)):
        logits_V = model(torch.tensor([text.ids[:place]])).logits[0, -1]
        nats -= float(logits_V.double().log_softmax(-1)[text.ids[place]])
        right &= int(logits_V.argmax()) == text.ids[place]
    return nats, right


def test_scores_are_those_of_a_loop_over_tokens():
    loaded, given = model_with(), texts()
    found = score_texts(loaded, given)
    for text, nats, greedy in zip(given, found.nats, found.greedy, strict=True):
        assert (pytest.approx(nats, rel=1e-5), greedy) == by_hand(loaded.model, text)
    assert found.tokens == sum(LENGTHS) and found.passes == found.tokens and found.seconds > 0


def test_a_text_that_the_model_would_write_itself_is_greedy():
    loaded, ids = model_with(), [5, 9]
    for _ in range(6):
        ids.append(int(loaded.model(torch.tensor([ids])).logits[0, -1].argmax()))
    wrong = [*ids[:-1], (ids[-1] + 1) % VOCAB]
    found = score_texts(loaded, [Scored(tuple(ids), 2), Scored(tuple(wrong), 2), Scored((7, *ids), 7)])
    assert found.greedy[:2] == [True, False] and found.nats[0] < found.nats[1]


@pytest.mark.parametrize(("seam", "text"), METHODS, ids=[text for _, text in METHODS])
def test_the_batch_changes_nothing(seam: str, text: str):
    loaded, given = model_with(seam, text), texts()
    one, many, default = (score_texts(loaded, given, batch_size=size) for size in (1, 16, None))
    for other in (many, default):
        assert other.nats == pytest.approx(one.nats, rel=1e-6)
        assert other.greedy == one.greedy and (other.tokens, other.passes) == (one.tokens, one.passes)
    for scored, nats in zip(given, one.nats, strict=True):
        logits_TV = loaded.model(torch.tensor([scored.ids[:-1]])).logits[0].double().log_softmax(-1)
        labels_T = torch.tensor(scored.ids[1:])
        expected = -logits_TV.gather(1, labels_T[:, None])[scored.first - 1 :].sum()
        assert nats == pytest.approx(float(expected), rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("text", ["StreamingLLM(6, sinks=1)", "H2O(6)", "TokenSelect(6, sinks=1, recent=1)"])
def test_a_kv_cache_method_evicts_as_it_does_for_one_text(text: str):
    loaded, given = model_with(), texts()
    full = score_texts(loaded, given).nats
    loaded.model.kv_cache = spec.build(text, "kv_cache")
    loaded.model.kv_cache.bind(loaded.model.backbone.config)
    one, many = (score_texts(loaded, given, batch_size=size).nats for size in (1, 16))
    assert many == pytest.approx(one, rel=1e-4) and one != pytest.approx(full, rel=1e-3)
    ids_BT = torch.tensor([given[-1].ids])
    parts = chunked_forward(loaded.model, loaded.model.new_cache(), ids_BT[:, :-1])
    logits_TV = torch.cat([part for _, part in parts], dim=1)[0].log_softmax(-1)
    expected = -logits_TV.gather(1, ids_BT[0, 1:, None])[given[-1].first - 1 :].sum()
    assert one[-1] == pytest.approx(float(expected), rel=1e-5)


def test_effort_reaches_the_model():
    loaded = model_with("think", "PonderLM2(thoughts=1)")
    whole, none = score_texts(loaded, texts()), score_texts(loaded, texts(), {"effort": 0.0})
    assert whole.passes == 2 * whole.tokens and none.passes == none.tokens
    assert whole.nats != pytest.approx(none.nats, rel=1e-3)


def test_mode_and_random_state_stay():
    loaded = model_with()
    loaded.model.train()
    before = torch.get_rng_state()
    score_texts(loaded, texts())
    assert loaded.model.training and torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("size", [1, 16])
@pytest.mark.parametrize("text", [None, "PonderLM2(thoughts=1)"])
def test_with_a_document_mask_a_text_does_not_see_the_token_before_it(text: str | None, size: int):
    loaded = model_with("think", text) if text else model_with()
    config = SimpleNamespace(data=SimpleNamespace(document_mask=True))
    loaded.run = cast(Any, SimpleNamespace(config=config))
    given = [Scored(one.ids) for one in texts()]
    given.append(Scored(given[-1].ids, starts=False))  # a text that was cut is one document
    found = score_texts(loaded, given, batch_size=size).nats
    for scored, nats in zip(given[:-1], found[:-1], strict=True):
        alone = by_hand(loaded.model, Scored(scored.ids[:2]))[0]
        rest = by_hand(loaded.model, Scored(scored.ids[1:]))[0]
        assert nats == pytest.approx(alone + rest, rel=1e-4)
    assert found[-1] == pytest.approx(by_hand(loaded.model, given[-1])[0], rel=1e-4)
    assert found[-1] != pytest.approx(found[-2], rel=1e-3)


def test_the_start_of_a_document_is_eos_for_pondera_and_bos_for_others(tmp_path: Path):
    own, other = load(saved_models.save(tmp_path / "own"), "cpu"), load(saved_models.checkpoint(tmp_path / "hf"), "cpu")
    for loaded in (own, other):
        loaded.tokenizer = type(loaded.tokenizer)(tokenizer_object=loaded.tokenizer.backend_tokenizer, eos_token="a")
        assert document_start(loaded) == loaded.tokenizer.convert_tokens_to_ids("a")
        loaded.tokenizer.bos_token = "b"
    assert document_start(own) == own.tokenizer.convert_tokens_to_ids("a")
    assert document_start(other) == other.tokenizer.convert_tokens_to_ids("b")


def test_the_interval_holds_what_it_promises():
    draw = torch.Generator().manual_seed(0)
    for share, count in [(0.5, 50), (0.95, 50), (0.99, 200)]:
        right = (torch.rand(4000, count, generator=draw) < share).double().mean(1).tolist()
        inside = sum(low <= share <= high for low, high in (share_interval(one, count) for one in right)) / 4000
        assert 0.93 <= inside <= 0.975
    assert share_interval(0.0, 10)[0] == 0 and share_interval(1.0, 10)[1] > 1 - 1e-9
