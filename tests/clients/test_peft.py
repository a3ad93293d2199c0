"""PEFT around an AdaptiveLM: defaults, a method's own weights, virtual tokens."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from helpers.architectures import BACKBONES, ids
from peft import LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model

from pondera import AdaptiveConfig, AdaptiveLM, UserError

ROUTER = "AdaptiveLatentCoT(steps=2, halting='router')"
CHOSEN = [{}, {"think": "PonderLM2(thoughts=1)"}, {"think": ROUTER}, {"chunk": "ConceptLM(chunk=4)"}]


def build(backbone: str = "llama", **chosen) -> AdaptiveLM:
    torch.manual_seed(0)
    return AdaptiveLM(AdaptiveConfig(backbone=copy.deepcopy(BACKBONES[backbone]), **chosen))


def learn(model, steps: int = 3) -> None:
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.1)
    x = ids(2, 9)
    model.train()
    for _ in range(steps):
        model(input_ids=x, labels=x).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


@pytest.mark.parametrize("backbone", [name for name in BACKBONES if name != "qwen3_next"])
@pytest.mark.parametrize("chosen", CHOSEN[:2], ids=str)
def test_nothing_need_be_said_about_which_layers_are_adapted(backbone, chosen):
    theirs = build(backbone).backbone.lm
    wanted = {name for name, _ in get_peft_model(theirs, LoraConfig()).named_parameters() if "lora_A" in name}
    model = get_peft_model(build(backbone, **chosen), LoraConfig())
    found = {name for name, _ in model.named_parameters() if "lora_A" in name}
    assert wanted and {name.replace("backbone.lm.", "") for name in found} == wanted


@pytest.mark.parametrize("chosen", CHOSEN, ids=str)
def test_an_adapter_learns_and_is_loaded_again(chosen, tmp_path):
    model, x = get_peft_model(build(**chosen), LoraConfig(task_type="CAUSAL_LM")), ids(2, 9)
    before = model.eval()(input_ids=x).logits
    learn(model)
    after = model(input_ids=x).logits
    assert (after - before).abs().max() > 1e-3
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(build(**chosen), tmp_path).eval()
    torch.testing.assert_close(again(input_ids=x).logits, after, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        generated = model.generate(input_ids=x, max_new_tokens=3, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert generated.shape == (2, 12)


@pytest.mark.parametrize(
    ("seam", "method"), [("think", ROUTER), ("think", "PauseToken(pauses=1)"), ("chunk", "ConceptLM(chunk=4)")]
)
def test_a_methods_own_weights_train_where_they_are_named(seam, method, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        model = get_peft_model(build(**{seam: method}), LoraConfig(target_modules=["q_proj"]))
        model.train()
    assert method.partition("(")[0] in caplog.text and f"modules_to_save=['{seam}']" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        model = get_peft_model(build(**{seam: method}), LoraConfig(target_modules=["q_proj"], modules_to_save=[seam]))
        model.train()
    assert "frozen" not in caplog.text
    x, plain = ids(2, 9), build(**{seam: method}).eval()
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(input_ids=x).logits, plain(x).logits)  # the method runs in its wrapping
    own = {name: parameter.clone() for name, parameter in model.named_parameters() if f"{seam}.modules_to_save" in name}
    assert own
    learn(model)
    assert any(not torch.equal(own[name], dict(model.named_parameters())[name]) for name in own)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(plain, tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=x).logits, model(input_ids=x).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("chosen", CHOSEN, ids=str)
@pytest.mark.parametrize("init", ["hf", "scaled"])
def test_virtual_tokens_stand_where_embeddings_stand(chosen, init):
    model = get_peft_model(
        build(init=init, **chosen), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    ).eval()
    x = ids(2, 9)
    with torch.no_grad():
        prompt = model.get_prompt(2)
        given = torch.cat([prompt, model.get_base_model().get_input_embeddings()(x)], 1)
        torch.testing.assert_close(model(input_ids=x).logits, model.get_base_model()(inputs_embeds=given).logits)
        mask = torch.ones_like(x)
        options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        generated = model.generate(input_ids=x, attention_mask=mask, **options)
        step = model.get_base_model()(inputs_embeds=given).logits[:, -1].argmax(-1)
    assert torch.equal(generated[:, 9], step)
    learn(model)


def test_a_prefix_of_keys_is_for_models_without_a_method():
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model, x = get_peft_model(build(), config), ids(2, 9)
    assert model(input_ids=x, labels=x).loss.requires_grad
    with pytest.raises(UserError, match="does not support the method of this model"):
        get_peft_model(build(think="PonderLM2(thoughts=1)"), config)(input_ids=x, labels=x)
