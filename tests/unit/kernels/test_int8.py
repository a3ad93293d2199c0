"""int8 weights: near the float weights, the same function for few and many rows, and refused where they would be wrong."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import architectures, saved_models
from torch import nn

import pondera
from pondera import AdaptiveConfig, AdaptiveLM, UserError
from pondera.kernels.int8 import Int8, Int8Embedding, Int8Linear, quantized, use_int8
from pondera.kernels.products import why_not_used


def build(family: str = "llama", tied: bool = True, **chosen: str) -> AdaptiveLM:
    torch.manual_seed(0)
    config = {**copy.deepcopy(architectures.BACKBONES[family]), "initializer_range": 0.1, "tie_word_embeddings": tied}
    return AdaptiveLM(AdaptiveConfig(backbone=config, **chosen)).eval()


def test_each_weight_is_off_by_half_a_scale_at_most():
    weight = torch.randn(9, 33, generator=torch.Generator().manual_seed(0))
    weight[4] = 0
    codes, scale = quantized(weight)
    off = (codes * scale[:, None] - weight).abs()
    assert (off <= scale[:, None] * 0.5001).all() and codes.abs().amax(1).tolist() == [127] * 4 + [0] + [127] * 4
    assert off.max() > 0.3 * scale.min()


@pytest.mark.parametrize("family", architectures.BACKBONES)
@torch.no_grad()
def test_every_architecture_computes_what_its_rounded_weights_give(family: str):
    """Compared with a model whose float weights are the rounded ones, for many rows and, with the kernel, for few."""
    model, x = (
        build(family, tied=family != "gemma3"),
        architectures.ids(2, 9),
    )  # its tied embedding has a scale and stays
    plain = model(x).logits
    rounded, ours = copy.deepcopy(model), copy.deepcopy(model)
    count = use_int8(ours.backbone.lm)
    assert count == sum(isinstance(module, Int8) for module in ours.modules()) >= 13
    for old, new in zip(rounded.modules(), ours.modules(), strict=True):
        if isinstance(new, Int8):
            old.weight.copy_(new.weight)
    right = rounded(x).logits
    assert not torch.allclose(right, plain, rtol=1e-4, atol=1e-4)  # rounding changes something
    torch.testing.assert_close(ours(x).logits, right, rtol=1e-4, atol=1e-4 * float(right.abs().max()))
    few = ours(x[:1, :3]).logits
    torch.testing.assert_close(few, rounded(x[:1, :3]).logits, rtol=1e-4, atol=1e-4 * float(right.abs().max()))
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(ours.generate(x, **options), rounded.generate(x, **options))


@torch.no_grad()
def test_the_kernel_is_in_use_and_can_be_left_out(monkeypatch: pytest.MonkeyPatch):
    if why_not_used():
        pytest.skip(why_not_used())
    for native in (True, False):
        model = build()
        use_int8(model.backbone.lm, native)
        right = model(architectures.ids(1, 2)).logits
        monkeypatch.setattr(Int8, "_floats", lambda self, dtype: pytest.fail("weights as floats"))
        if native:
            assert torch.equal(model(architectures.ids(1, 2)).logits, right)
        else:
            with pytest.raises(pytest.fail.Exception):
                model(architectures.ids(1, 2))
        monkeypatch.undo()


def test_a_tied_embedding_shares_the_codes_and_one_of_its_own_stays():
    tied, own = build(), build(tied=False)
    use_int8(tied.backbone.lm)
    use_int8(own.backbone.lm)
    table, head = tied.get_input_embeddings(), tied.get_output_embeddings()
    assert type(table) is Int8Embedding and type(head) is Int8Linear
    assert table.codes.data_ptr() == head.codes.data_ptr()
    assert type(own.get_input_embeddings()) is nn.Embedding and type(own.get_output_embeddings()) is Int8Linear
    with torch.no_grad():
        assert torch.equal(table(torch.tensor([[3]]))[0, 0], table.weight[3])
        right = (own.backbone.head(torch.ones(1, 1, 64)).topk(2), own.backbone.top(torch.ones(1, 1, 64), 2))
        assert torch.equal(right[0].indices, right[1][1]) and torch.equal(right[0].values, right[1][0])


@torch.no_grad()
def test_a_thinking_model():
    model = build(think="PonderLM2(thoughts=1)")
    right = model(architectures.ids(1, 9)).logits
    use_int8(model.backbone.lm)
    found = model(architectures.ids(1, 9)).logits
    assert 1e-5 < (found - right).abs().max() < 0.2 * right.abs().max()


def test_loaded_with_int8_and_refused_by_name(tmp_path):
    folder = saved_models.checkpoint(tmp_path / "model")
    saved_models.tokenizer().save_pretrained(folder)
    model, _ = pondera.load(folder, device="cpu", weights="int8")
    assert any(type(module) is Int8Linear for module in model.modules())
    with torch.no_grad():
        assert model.generate(torch.tensor([[1, 2]]), max_new_tokens=3).shape[1] <= 5
    with pytest.raises(UserError, match="not saved"):
        model.save_pretrained(tmp_path / "again")
    with pytest.raises(UserError, match="cannot be trained"):
        model.train()(torch.tensor([[1, 2]]), labels=torch.tensor([[1, 2]]))
    with pytest.raises(UserError, match="dtype"):
        model.to(torch.bfloat16)
    assert model.float() is model
    halves, _ = pondera.load(folder, device="cpu", weights="int8", dtype="bfloat16")
    with torch.no_grad():
        assert halves(torch.tensor([[1, 2]])).logits.dtype == torch.bfloat16
    with pytest.raises(UserError, match="weights.*'int4'.*int8"):
        pondera.load(folder, weights="int4")
    with pytest.raises(UserError, match="on the CPU"):
        use_int8(nn.Linear(2, 2, device="meta"))
    layer = nn.Linear(2, 2)
    nn.init.constant_(layer.weight, torch.nan)
    with pytest.raises(UserError, match="not finite"):
        use_int8(nn.Sequential(layer))
    with pytest.raises(UserError, match="no linear layers"):
        use_int8(nn.Sequential(nn.ReLU()))
