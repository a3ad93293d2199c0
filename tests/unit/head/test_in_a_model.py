"""A head in a model: trained, saved, gone on from, priced."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.architectures import BACKBONES, VOCAB, ids
from helpers.fresh_process import copies

from pondera import AdaptiveConfig, AdaptiveLM, UserError
from pondera.cost.measure import measured_flops
from pondera.cost.model import CostModel
from pondera.cost.schedule import CostSchedule, DecoderPass
from pondera.models.next_token import next_token_term

HEAD = "VQLogits(codes=11, groups=2)"


@copies
def build(head: str | None = HEAD, backbone: str = "llama", **config) -> AdaptiveLM:
    torch.manual_seed(0)
    return AdaptiveLM(AdaptiveConfig(backbone=copy.deepcopy(BACKBONES[backbone]), head=head, **config)).eval()


@pytest.mark.parametrize("backbone", ["llama", "gpt_neox", "qwen3"])
@pytest.mark.parametrize("head", [HEAD, "VQLogits(codes=9)"])
def test_the_loss_in_training_is_that_of_its_logits(head: str, backbone: str):
    model, x = build(head, backbone), ids(2, 9)
    logits = model(x).logits
    assert logits.shape == (2, 9, VOCAB)
    trained = model.train()(x, labels=x)
    labels = torch.nn.functional.pad(x, (0, 1), value=-100)[:, 1:]
    want = next_token_term(logits, labels).mean()
    torch.testing.assert_close(trained.loss, want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.eval()(x, labels=x).loss, want, rtol=1e-4, atol=1e-5)
    trained.loss.backward()
    assert model.head is not None and all(p.grad is not None for p in model.head.parameters())


def test_saved_is_loaded_and_generates(tmp_path):
    model = build(think="PonderLM2(thoughts=1)")
    model.save_pretrained(tmp_path)
    again = AdaptiveLM.from_pretrained(tmp_path).eval()
    assert again.config.head == HEAD
    assert torch.equal(model(ids(2, 5)).logits, again(ids(2, 5)).logits)
    one, other = (m.generate(ids(1, 5), max_new_tokens=6, do_sample=False) for m in (model, again))
    assert torch.equal(one, other) and one.shape == (1, 11)


def test_gone_on_from_it_is_the_same_head(tmp_path):
    build().save_pretrained(tmp_path)
    old, new = AdaptiveLM.from_pretrained(tmp_path).eval(), AdaptiveLM(AdaptiveConfig(backbone=str(tmp_path))).eval()
    assert new.config.head == HEAD and torch.equal(old(ids(2, 5)).logits, new(ids(2, 5)).logits)
    with pytest.raises(UserError, match="leave head out"):
        AdaptiveLM(AdaptiveConfig(backbone=str(tmp_path), head="VQLogits(codes=5)"))


def test_of_trained_rows_it_begins_close_to_the_output_matrix(tmp_path):
    model = build(None)
    model.save_pretrained(tmp_path)
    before = model(ids(2, 9)).logits
    new = AdaptiveLM(AdaptiveConfig(backbone=str(tmp_path), head=f"VQLogits(codes={VOCAB}, bias=False)")).eval()
    torch.testing.assert_close(new(ids(2, 9)).logits, before, rtol=1e-3, atol=1e-4)


def test_a_head_of_clusters_is_loaded_as_it_was_saved(tmp_path):
    """A saved model has no output rows to cluster again, and needs none."""
    build(None).save_pretrained(tmp_path / "plain")
    backbone = str(tmp_path / "plain")
    model = AdaptiveLM(AdaptiveConfig(backbone=backbone, head="VQLogits(codes=9, init='kmeans')")).eval()
    model.save_pretrained(tmp_path / "clustered")
    again = AdaptiveLM.from_pretrained(tmp_path / "clustered").eval()
    onward = AdaptiveLM(AdaptiveConfig(backbone=str(tmp_path / "clustered"))).eval()
    assert torch.equal(model(ids(2, 5)).logits, again(ids(2, 5)).logits)
    assert torch.equal(model(ids(2, 5)).logits, onward(ids(2, 5)).logits)


def test_a_tied_matrix_cannot_be_replaced():
    with pytest.raises(UserError, match="tie_word_embeddings: false"):
        build(backbone="gemma3")


def test_its_price_is_what_the_counter_sees():
    model, x = build(), ids(1, 16)
    assert model.head is not None
    prices = CostModel(model.backbone.config, model.head.weights)
    counted = measured_flops(lambda: model(x))
    assert prices.forward(CostSchedule((DecoderPass(16, 16),), 16, 16)) == pytest.approx(counted, rel=0.02)
