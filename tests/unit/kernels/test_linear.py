"""Models whose linear layers use the native kernel: the tokens and logits of torch, for every architecture and method."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from helpers import architectures, saved_models
from helpers.cache_methods import FORMS as CACHES
from helpers.cache_methods import memory
from helpers.declared import form, forms
from peft import LoraConfig, get_peft_model
from torch import nn

import pondera
from pondera import AdaptiveConfig, AdaptiveLM, UserError
from pondera.core.hf import Conv1D
from pondera.kernels import linear
from pondera.kernels.linear import NativeLinear, use_kernels
from pondera.kernels.products import FEW, why_not_used

pytestmark = pytest.mark.skipif(bool(why_not_used()), reason=why_not_used())
TRAINED = {
    f"{seam}-{case}": (seam, declared["exact"])
    for seam in ("think", "chunk", "memory", "head")
    for case, declared in forms(seam).items()
    if "exact" in declared
}
SOME_CACHES = [case for case, declared in CACHES.items() if "exact" in declared and "-" not in case]


def build(family: str = "llama", tied: bool = True, **chosen: str) -> AdaptiveLM:
    torch.manual_seed(0)
    config = {**copy.deepcopy(architectures.BACKBONES[family]), "initializer_range": 0.1, "tie_word_embeddings": tied}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return AdaptiveLM(AdaptiveConfig(backbone=config, **chosen)).eval()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of rows of every product of the kernel."""
    rows: list[int] = []

    def counted(x, weight, *others):
        y = few_rows(x, weight, *others)
        if y is not None:
            rows.append(x.numel() // x.shape[-1])
        return y

    few_rows = linear.few_rows
    monkeypatch.setattr(linear, "few_rows", counted)
    return rows


def written(model: nn.Module, kernels: str, batch: int = 2, cache=None) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedy tokens after a prompt of 12, and the logits of each."""
    use_kernels(model, kernels)
    x = architectures.ids(batch, 12)
    given = {} if cache is None else {"past_key_values": cache}
    out = model.generate(  # pyright: ignore[reportCallIssue]
        input_ids=x,
        attention_mask=torch.ones_like(x),
        max_new_tokens=6,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
        output_logits=True,
        return_dict_in_generate=True,
        **given,
    )
    return out.sequences, torch.stack(out.logits)


def same(model: nn.Module, calls: list[int], **given) -> None:
    """Both kernels write the same."""
    caches = [given.pop("cache", lambda: None)() for _ in range(2)]
    tokens, logits = written(model, "torch", cache=caches[0], **given)
    assert not calls
    found_tokens, found = written(model, "native", cache=caches[1], **given)
    assert calls and max(calls) <= FEW
    assert torch.equal(found_tokens, tokens)
    assert (found - logits).abs().max() <= 1e-4 * logits.abs().max()


@pytest.mark.parametrize("family", architectures.BACKBONES)
def test_every_architecture(family: str, calls: list[int]):
    model = build(family)
    same(model, calls)
    layers = [module for module in model.modules() if isinstance(module, (nn.Linear, Conv1D))]
    assert len(layers) >= 13 and all(type(module) in linear.NATIVE.values() for module in layers)


@pytest.mark.parametrize("case", TRAINED)
def test_every_trained_method(case: str, calls: list[int]):
    seam, text = TRAINED[case]
    same(build(tied=seam != "head", **{seam: text}), calls, batch=1 if seam == "memory" else 2)


@pytest.mark.parametrize("case", SOME_CACHES)
def test_every_kv_cache_method(case: str, calls: list[int]):
    model = build().backbone.lm
    text = form(CACHES, case, "exact")
    same(model, calls, batch=1, cache=lambda: memory(text, model).cache(model))  # pyright: ignore


def test_lora_and_a_head_of_its_own(calls: list[int]):
    for tied in (False, True):
        model = get_peft_model(
            build(tied=tied), LoraConfig(init_lora_weights=False, target_modules=["q_proj", "up_proj"])
        )  # pyright: ignore
        same(model.eval(), calls)
        assert sum(type(module) is NativeLinear for module in model.modules()) == 7 * 3 + 1 + 2 * 6
        calls.clear()


def test_bfloat16_is_near(calls: list[int]):
    model = build().to(torch.bfloat16)
    x = architectures.ids(2, 4)
    with torch.no_grad():
        right = use_kernels(model, "torch"), model(x).logits
        found = use_kernels(model, "native"), model(x).logits
    assert (right[0], found[0]) == (0, 22) and calls
    assert (found[1] - right[1]).abs().max() < 0.03 * right[1].abs().max()


def test_training_and_scoring_are_those_of_torch(calls: list[int]):
    model, x = build(), architectures.ids(1, 6)
    right = model(x, labels=x).loss
    right.backward()
    grads = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    use_kernels(model, "native")
    loss = model(x, labels=x).loss
    loss.backward()
    assert torch.equal(loss, right)
    assert all(map(torch.equal, grads, (p.grad for p in model.parameters() if p.grad is not None)))
    with torch.no_grad():
        assert model(architectures.ids(1, FEW + 1)).logits.shape[1] == FEW + 1
    assert not calls


def test_nothing_but_the_class_changes():
    class Own(nn.Linear):
        pass

    model = nn.ModuleDict({"a": nn.Linear(3, 4), "own": Own(3, 4), "inner": nn.Sequential(nn.Linear(4, 2, bias=False))})
    before, names = {**model.state_dict()}, [name for name, _ in model.named_modules()]
    assert use_kernels(model, "native") == use_kernels(model, "native") == 2
    assert type(model["a"]) is NativeLinear and type(model["own"]) is Own
    assert [name for name, _ in model.named_modules()] == names
    assert all(value.data_ptr() == before[name].data_ptr() for name, value in model.state_dict().items())
    assert type(copy.deepcopy(model)["a"]) is NativeLinear
    assert use_kernels(model, "torch") == 0 and type(model["a"]) is nn.Linear
    assert use_kernels(model.to("meta"), "native") == 0
    with pytest.raises(UserError, match="kernels.*'nativ'.*native"):
        use_kernels(model, "nativ")


def test_without_a_compiler_the_model_is_that_of_torch(monkeypatch: pytest.MonkeyPatch, calls: list[int]):
    model = build()
    monkeypatch.setenv("PONDERA_NATIVE", "0")
    assert use_kernels(model, "native") == 0
    monkeypatch.delenv("PONDERA_NATIVE")
    use_kernels(model, "native")
    monkeypatch.setenv("PONDERA_NATIVE", "0")
    with torch.no_grad():
        model(architectures.ids(1, 2))
    assert not calls


def test_what_is_loaded_uses_it_and_is_saved_as_before(tmp_path):
    folder = saved_models.checkpoint(tmp_path / "model")
    saved_models.tokenizer().save_pretrained(folder)
    model, _ = pondera.load(folder, device="cpu")
    assert any(type(module) is NativeLinear for module in model.modules())
    model.save_pretrained(tmp_path / "again")
    again = AdaptiveLM.from_pretrained(tmp_path / "again")
    assert not any(type(module) is NativeLinear for module in again.modules())
    assert all(map(torch.equal, again.state_dict().values(), model.state_dict().values()))
    plain, _ = pondera.load(folder, device="cpu", kernels="torch")
    assert not any(type(module) is NativeLinear for module in plain.modules())
    with pytest.raises(UserError, match="kernels"):
        pondera.load(folder, kernels="fast")
