"""TRL's trainers around an AdaptiveLM: they apply the output matrix themselves, to states that all thinking went into."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from helpers.architectures import BACKBONES, ids
from peft import LoraConfig
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer
from trl.trainer.utils import add_fused_lm_head

from pondera import AdaptiveConfig, AdaptiveLM, UserError

TEXT = "The sea was calm and the ship went on. "
CHOSEN = [
    {},
    {"think": "AdaptiveLatentCoT(steps=1, halting='fixed')"},
    {"think": "PonderLM2(thoughts=1)"},
    {"head": "VQLogits(codes=16)"},
]
OWN_TERMS = [
    {"think": "UniversalTransformer(steps=2)"},
    {"think": "PonderLM3(thoughts=1)"},
    {"think": "ThinkAtHard(steps=1)"},
    {"think": "AdaptiveLatentCoT(steps=2, halting='router')"},
    {"chunk": "ConceptLM(chunk=4)"},
]
SMALL = {"report_to": [], "use_cpu": True, "bf16": False, "save_strategy": "no", "disable_tqdm": True}


def build(**chosen) -> AdaptiveLM:
    torch.manual_seed(0)
    backbone = dict(BACKBONES["llama"], vocab_size=300, eos_token_id=0, pad_token_id=0)
    return AdaptiveLM(AdaptiveConfig(backbone=backbone, **chosen))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(
        [TEXT], trainers.BpeTrainer(vocab_size=300, special_tokens=["<eos>"], initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", pad_token="<eos>")


def gradients(model: AdaptiveLM) -> dict[str, torch.Tensor]:
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    return {name: grad for name, grad in found.items() if grad.abs().max() > 0}


def draw(model: AdaptiveLM) -> None:
    torch.manual_seed(1)
    model.train().begin_step(0, 0)


@pytest.mark.parametrize("chosen", [*CHOSEN, *OWN_TERMS], ids=str)
def test_what_is_trained_is_what_the_model_itself_trains(chosen):
    x = ids(4, 13)
    model = build(**chosen)
    draw(model)
    out = model(x, labels=x)
    assert (len(out.terms) > 1) == (chosen in OWN_TERMS)
    out.loss.backward()
    own = gradients(model)
    theirs = build(**chosen)
    add_fused_lm_head(theirs, outputs=("log_probs", "entropy", "is_top1"))
    draw(theirs)
    fused = theirs(input_ids=x, labels=x, fused_lm_head=True)
    (-fused.log_probs.sum() / fused.label_mask.sum()).backward()
    torch.testing.assert_close(gradients(theirs), own, atol=1e-5, rtol=1e-3)
    with torch.no_grad():
        scored = theirs.eval()(input_ids=x, labels=x, fused_lm_head=True).log_probs
        plain = F.log_softmax(theirs(x).logits[:, :-1], -1).gather(-1, x[:, 1:, None])[..., 0]
    torch.testing.assert_close(scored, plain, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("chosen", OWN_TERMS, ids=str)
def test_terms_that_a_loss_says_nothing_of_are_refused(chosen):
    model, x = build(**chosen), ids(2, 9)
    add_fused_lm_head(model)
    draw(model)
    log_probs = model(input_ids=x, labels=x, fused_lm_head=True).log_probs
    with pytest.raises(UserError, match="decreases the probability of some tokens"):
        (log_probs[0].sum() - log_probs[1].sum()).backward()
    if "judge" not in str(chosen) and model(x).terms:
        with pytest.raises(UserError, match="base_model"):
            model.forward = lambda **given: model.base_model(**given)
            model(input_ids=x)


@pytest.mark.parametrize("chosen", [*CHOSEN, *OWN_TERMS], ids=str)
@pytest.mark.parametrize("packing", [False, True])
def test_supervised_fine_tuning_runs(chosen, packing, tokenizer, tmp_path):
    model = build(**chosen)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    settings = SFTConfig(
        str(tmp_path),
        per_device_train_batch_size=2,
        max_steps=2,
        logging_steps=1,
        packing=packing,
        max_length=64,
        learning_rate=1e-3,
        **SMALL,
    )
    rows = Dataset.from_list([{"text": TEXT * times} for times in (1, 2, 1, 2, 1, 1, 2, 1)])
    SFTTrainer(model=model, args=settings, train_dataset=rows, processing_class=tokenizer).train()
    assert any(not torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("chosen", [CHOSEN[2], OWN_TERMS[0]], ids=str)
def test_an_adapter_is_tuned(chosen, tokenizer, tmp_path):
    settings = SFTConfig(str(tmp_path), per_device_train_batch_size=2, max_steps=2, learning_rate=1e-2, **SMALL)
    rows = Dataset.from_list([{"text": TEXT}] * 4)
    given = {"args": settings, "train_dataset": rows, "processing_class": tokenizer}
    trainer = SFTTrainer(model=build(**chosen), peft_config=LoraConfig(modules_to_save=["think"]), **given)
    before = {name: p.clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert any("think.modules_to_save" in name for name in before) == (chosen == OWN_TERMS[0])
    trainer.train()
    after = dict(trainer.model.named_parameters())
    assert any("lora_B" in name and not torch.equal(after[name], before[name]) for name in before)
    own = [name for name in before if "think.modules_to_save" in name]
    assert not own or any(not torch.equal(after[name], before[name]) for name in own)


@pytest.mark.parametrize("chosen", CHOSEN, ids=str)
def test_preferences_train(chosen, tokenizer, tmp_path):
    rows = [{"prompt": "The sea", "chosen": " was calm", "rejected": " went on"}] * 4
    build(**chosen).save_pretrained(tmp_path / "model")  # from where TRL takes its reference, too
    settings = DPOConfig(str(tmp_path), per_device_train_batch_size=2, max_steps=1, **SMALL)
    given = {"args": settings, "train_dataset": Dataset.from_list(rows), "processing_class": tokenizer}
    trainer = DPOTrainer(model=str(tmp_path / "model"), **given)
    assert type(trainer.model) is AdaptiveLM is type(trainer.ref_model)
    trainer.train()


@pytest.mark.parametrize("chosen", CHOSEN[:3], ids=str)
def test_rewards_train(chosen, tokenizer, tmp_path):
    settings = GRPOConfig(
        str(tmp_path), per_device_train_batch_size=2, num_generations=2, max_completion_length=4, max_steps=1, **SMALL
    )
    GRPOTrainer(
        model=build(**chosen),
        reward_funcs=lambda completions, **kwargs: [float(len(text)) for text in completions],
        args=settings,
        train_dataset=Dataset.from_list([{"prompt": "The sea"}] * 4),
        processing_class=tokenizer,
    ).train()
