"""How a step adds up, what it depends on, and what it costs."""

from __future__ import annotations

import math
import random

import pytest
import torch
from helpers import training_worker
from helpers.training_worker import tiny
from torch.nn import functional as F
from torch.utils.checkpoint import set_checkpoint_early_stop

from pondera.core.errors import UserError
from pondera.core.hf import checkpoint_activations
from pondera.cost.measure import measured_flops
from pondera.data.corpus import prepare
from pondera.data.sampler import StepSampler
from pondera.evaluation.cost_report import cost_report
from pondera.evaluation.score import ScoreSums, score
from pondera.inference.load import load
from pondera.models.adaptive_lm import AdaptiveLM
from pondera.training.build import new_model, resolve
from pondera.training.train import train


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return training_worker.write_text(tmp_path_factory.mktemp("trainer") / "text")


@pytest.mark.parametrize("kind", [AdaptiveLM, training_worker.TwoTerms])
@pytest.mark.parametrize("micro_batch_size", [1, 3])
def test_splitting_a_step_changes_nothing(kind, micro_batch_size, tmp_path):
    """Windows with 16, 1, 13 and 7 labels; the second term of `TwoTerms` counts what the model itself decides."""
    loss, whole = training_worker.gradients(tmp_path, None, kind=kind)
    split_loss, split = training_worker.gradients(tmp_path, micro_batch_size, kind=kind)
    assert split_loss == pytest.approx(loss, rel=1e-6)
    assert whole.keys() == split.keys()
    for name, gradient in whole.items():
        assert (split[name] - gradient).abs().max() <= 1e-6 * gradient.abs().max(), name


def test_loss_is_the_mean_over_labels(tmp_path):
    """Not the mean of the windows' means, which weighs a window with a single label as much as any other."""
    loss, _ = training_worker.gradients(tmp_path, 1)
    torch.manual_seed(0)
    model = None

    class Keep(AdaptiveLM):
        def forward(self, *args, **kwargs):
            nonlocal model
            model = self
            return super().forward(*args, **kwargs)

    training_worker.gradients(tmp_path, 1, kind=Keep)
    assert model is not None
    data, sums, counts = training_worker.Gappy(), [], []
    torch.manual_seed(0)
    fresh = AdaptiveLM(model.config).train()
    fresh.begin_step(1, 0)
    for window in (data[index] for index in range(4)):
        logits = fresh(window["input_ids"][None]).logits[0]
        sums.append(F.cross_entropy(logits, window["targets"], ignore_index=-100, reduction="sum").item())
        counts.append((window["targets"] != -100).sum().item())
    assert counts == [16, 1, 13, 7]
    assert loss == pytest.approx(sum(sums) / sum(counts), rel=1e-5)
    assert loss != pytest.approx(sum(s / c for s, c in zip(sums, counts, strict=True)) / 4, rel=1e-3)


def test_order_is_one_permutation_per_epoch():
    order = StepSampler(num_windows=10, batch_size=4, micro_batch_size=4, steps=5, seed=0)
    first = list(order)
    torch.manual_seed(123)
    random.seed(123)
    assert list(StepSampler(10, 4, 4, 5, seed=0)) == first != list(StepSampler(10, 4, 4, 5, seed=1))
    seen = [window for step in first for window in step]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10)) and seen[:10] != seen[10:]
    assert list(StepSampler(10, 4, 4, 5, seed=0, first_step=3)) == first[3:]
    with torch.device("meta"):  # or any accelerator that was made the default
        assert list(StepSampler(10, 4, 4, 5, seed=0)) == first


def test_order_is_shared_by_processes():
    whole = list(StepSampler(10, 4, 4, 5, seed=0))
    parts = [list(StepSampler(10, 4, 1, 5, seed=0, rank=rank, num_processes=2)) for rank in (0, 1)]
    for step, windows in enumerate(whole):
        mine, theirs = (part[2 * step : 2 * step + 2] for part in parts)
        assert [window for micro in mine + theirs for window in micro] == windows


def test_score_by_hand(text):
    config = tiny(text)
    corpus = prepare(config.data)
    model = new_model(config, corpus.vocab_size).train()
    split, state = corpus.validation, torch.get_rng_state()
    found = score(model, split, context=32, max_tokens=200, batch_size=4)
    assert torch.equal(torch.get_rng_state(), state) and model.training and model.think.training
    assert found["tokens"] == 192

    model.eval()
    nats, num_bytes, windows = 0.0, 0, (split.num_tokens - 1) // 32
    for start in [index * windows // 6 * 32 for index in range(6)]:
        ids = torch.tensor(split.ids[start : start + 33].astype("int64"))
        logits = model(ids[None, :-1]).logits[0]
        nats += F.cross_entropy(logits, ids[1:], reduction="sum").item()
        num_bytes += len(corpus.tokenizer().decode(ids[1:], skip_special_tokens=True).encode())
    assert found["loss"] == pytest.approx(nats / 192, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(nats / 192), rel=1e-4)
    assert found["bytes"] == num_bytes
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-5)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_processes_share_the_windows_of_a_score(batch_size, text):
    """Every window once, whatever is left over at the end; and all make as many forward passes."""
    corpus = prepare(tiny(text).data)
    model = new_model(tiny(text), corpus.vocab_size)
    whole = score(model, corpus.validation, 32, 10 * 32, batch_size)
    parts, passes, calls = [], [], []
    model.register_forward_hook(lambda *_: calls.append(1))
    for rank in range(4):
        calls.clear()
        score(model, corpus.validation, 32, 10 * 32, batch_size, rank=rank, num_processes=4, total=keep(parts))
        passes.append(len(calls))
    assert sum(part.nats for part in parts) == pytest.approx(whole["loss"] * 320, rel=1e-6)
    assert all(part.nats > 0 for part in parts[:3]) and len(set(passes)) == 1


def keep(parts: list[ScoreSums]):
    """Takes down each process's part of a sum."""

    def total(found: ScoreSums) -> ScoreSums:
        parts.append(found)
        return found

    return total


@pytest.mark.parametrize("think", [None, "PonderLM2(thoughts=1, train_rounds=(2, 2))"])
def test_price_of_recomputing_is_what_is_measured(think, text):
    """torch stops a recomputation as soon as it has all that it needs; the price is that of running it to its end."""
    model = new_model(tiny(text, {"think": think}), 300).train()
    checkpoint_activations(model)

    def step():
        model.begin_step(0, 0)
        ids = torch.zeros(1, 32, dtype=torch.long)
        with set_checkpoint_early_stop(False):
            model(ids, shift_labels=ids).loss.backward()

    found = cost_report(model, context=32, recompute=True)
    assert found["training_flops_per_token"] * 32 == pytest.approx(measured_flops(step), rel=1e-6)
    assert found["training_flops_per_token"] > cost_report(model, context=32)["training_flops_per_token"]


@pytest.mark.parametrize(
    "think", [None, "PonderLM2(thoughts=1, train_rounds=(2, 2))", "AdaptiveLatentCoT(steps=1, halting='fixed')"]
)
def test_price_is_what_is_measured(think, text):
    model = new_model(tiny(text, {"think": think}), 300)
    found = cost_report(model, context=32)

    def step():
        model.train().begin_step(0, 0)
        ids = torch.zeros(1, 32, dtype=torch.long)
        model(ids, shift_labels=ids).loss.backward()

    assert found["training_flops_per_token"] * 32 == pytest.approx(measured_flops(step), rel=1e-6)
    model.eval()
    with torch.no_grad():
        cache = model(torch.zeros(1, 16, dtype=torch.long), use_cache=True).past_key_values
        decoding = measured_flops(lambda: model(torch.zeros(1, 1, dtype=torch.long), past_key_values=cache))
    assert found["inference_flops_per_token"] == pytest.approx(decoding, rel=1e-6)


def test_recomputing_activations_changes_nothing(text, tmp_path):
    settings = {"train.steps": 2, "train.eval_every": 10}
    plain = train(tiny(text, settings), tmp_path / "plain", progress=False)
    again = train(tiny(text, {**settings, "train.gradient_checkpointing": True}), tmp_path / "again", progress=False)
    assert again.result()["train_flops"] > plain.result()["train_flops"]
    for line, wanted in zip(again.metrics(), plain.metrics(), strict=True):
        assert line["loss"] == pytest.approx(wanted["loss"], rel=1e-6)
        assert line["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-5)


def test_bfloat16_trains_float32_weights(text, tmp_path):
    settings = {"train.steps": 2, "train.eval_every": 10}
    plain = train(tiny(text, settings), tmp_path / "plain", progress=False)
    half = train(tiny(text, {**settings, "train.dtype": "bfloat16"}), tmp_path / "half", progress=False)
    losses = [[line["loss"] for line in run.metrics()] for run in (plain, half)]
    assert losses[0] != losses[1] and losses[1] == pytest.approx(losses[0], rel=1e-2)
    from safetensors.torch import load_file

    assert {tensor.dtype for tensor in load_file(half.model_dir / "model.safetensors").values()} == {torch.float32}
    split, settings = prepare(half.config.data).validation, half.config.train
    later = score(load(half.path, "cpu").model, split, 32, settings.eval_tokens)["loss"]
    assert half.result()["loss"] == pytest.approx(later, rel=1e-6), "validation is in float32, then as later"


@pytest.fixture(scope="module")
def checkpoint(text, tmp_path_factory):
    """A foreign checkpoint with a padded vocabulary and a tokenizer of its own, in bfloat16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PONDERA_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        corpus = prepare(tiny(text, {"data.tokenizer": "bpe-280"}).data)
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("checkpoint")
    LlamaForCausalLM(
        LlamaConfig(vocab_size=288, max_position_embeddings=64, **training_worker.SIZES)
    ).bfloat16().save_pretrained(folder)
    corpus.tokenizer().save_pretrained(folder)
    return folder


def test_wrapped_checkpoint(text, checkpoint, tmp_path):
    """Its tokenizer is used, its weights are where training starts, and a resumed run does not need it any more."""
    from transformers import AutoModelForCausalLM

    settings = {"backbone": str(checkpoint), "init": "hf", "data.tokenizer": "bpe-2048", "train.steps": 2}
    config = tiny(text, settings)
    assert resolve(config).data.tokenizer == str(checkpoint)
    theirs = AutoModelForCausalLM.from_pretrained(checkpoint).float().state_dict()
    ours = new_model(resolve(config), 280).backbone.lm.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    run = train(config, tmp_path / "run", progress=False)
    assert run.config.data.tokenizer == str(checkpoint) and run.result()["passes_per_token"] == 2
    assert AutoModelForCausalLM.from_pretrained(run.model_dir).dtype == torch.float32


@pytest.mark.parametrize(
    "settings, complaint",
    [
        (
            {"data.tokenizer": "bpe-270"},
            "288 tokens .*'bpe-270' has 270; use the checkpoint's own .*--data.tokenizer /",
        ),
        ({"data.tokenizer": "bpe-300"}, "288 tokens .*'bpe-300' has 300"),
        ({"data.tokenizer": "bpe-2048", "data.context": 128}, "128 tokens exceed the 64 .*use --data.context 64$"),
    ],
)
def test_what_does_not_fit_a_checkpoint(settings, complaint, text, checkpoint, tmp_path):
    with pytest.raises(UserError, match=complaint):
        train(tiny(text, {"backbone": str(checkpoint), "init": "hf", **settings}), tmp_path / "run", progress=False)


def test_positions_grow_with_the_context(text):
    assert new_model(tiny(text, {"data.context": 4096}), 300).backbone.config.max_position_embeddings == 4096
    small = {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 2}
    assert new_model(tiny(text, {"backbone": small, "data.context": 2048}), 300).backbone.config.n_positions == 2048
    with pytest.raises(UserError, match="2048 tokens exceed the 1024 positions"):
        new_model(tiny(text, {"backbone": {**small, "n_positions": 1024}, "data.context": 2048}), 300)
