"""transformers' own Trainer around an AdaptiveLM: accumulation, evaluation, prediction, checkpointing."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from helpers.architectures import BACKBONES, ids
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_pt_utils import LabelSmoother

from pondera import AdaptiveConfig, AdaptiveLM
from pondera.core.hf import checkpointing_arguments

CHOSEN = [
    {},
    {"think": "AdaptiveLatentCoT(steps=1, halting='fixed')"},
    {"think": "PonderLM2(thoughts=1)"},
    {"head": "VQLogits(codes=16)"},
]
OWN_TERMS = [{"think": "UniversalTransformer(steps=2)"}, {"chunk": "ConceptLM(chunk=4)"}]


def build(**chosen) -> AdaptiveLM:
    torch.manual_seed(0)
    return AdaptiveLM(AdaptiveConfig(backbone=dict(BACKBONES["llama"], pad_token_id=0), **chosen))


def texts(count: int = 8) -> Dataset:
    return Dataset.from_list([{"input_ids": row, "labels": row} for row in ids(count, 16).tolist()])


def trainer(model, folder, dataset=None, of: type = Trainer, **settings) -> Trainer:
    defaults = {
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "per_device_eval_batch_size": 2,
    }
    arguments = TrainingArguments(str(folder), **{**defaults, **settings})
    return of(model=model, args=arguments, train_dataset=dataset, eval_dataset=dataset)


def first_step(model, folder, batch: int, times: int, **settings) -> tuple[float, float]:
    """The loss and the gradient's norm of one optimizer step over eight texts."""
    found: list[tuple[float, float]] = []

    class Noting(TrainerCallback):
        def on_log(self, args, state, control, logs, **kwargs):
            if "grad_norm" in logs:
                found.append((float(logs["loss"]), float(logs["grad_norm"])))

    steps = {"max_steps": 1, "logging_steps": 1, "max_grad_norm": 1e9}
    made = trainer(
        model,
        folder,
        texts(),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=times,
        **steps,
        **settings,
    )
    made.add_callback(Noting())
    made.train()
    return found[0]


@pytest.mark.parametrize("chosen", [*CHOSEN, *OWN_TERMS], ids=str)
def test_how_a_step_is_split_changes_nothing(chosen, tmp_path):
    whole = first_step(build(**chosen), tmp_path, 8, 1)
    for batch, times in ((2, 4), (1, 8)):
        found = first_step(build(**chosen), tmp_path, batch, times)
        # Codebooks learn from every call, and so from other parts of the step.
        assert found == pytest.approx(whole, rel=5e-2 if "chunk" in chosen else 1e-4)


def test_a_step_is_that_of_the_model_itself(tmp_path):
    model, x = build(), ids(8, 16)
    loss = model.train()(x, labels=x).loss
    loss.backward()
    norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in model.parameters()])
    assert first_step(build(), tmp_path, 2, 4) == pytest.approx((float(loss.detach()), float(norm)), rel=1e-3)


@pytest.mark.parametrize("chosen", [*CHOSEN, *OWN_TERMS], ids=str)
def test_evaluation_has_a_loss_and_predictions(chosen, tmp_path):
    made = trainer(build(**chosen), tmp_path, texts(6))
    made.compute_metrics = lambda found: {"right": float((found.predictions.argmax(-1) == found.label_ids).mean())}
    assert made.label_names == ["labels"]
    found = made.evaluate()
    with torch.no_grad():
        x = ids(6, 16)
        right = build(**chosen).eval()(x, labels=x)
    assert found["eval_loss"] == pytest.approx(float(right.loss), rel=1e-2) and 0 <= found["eval_right"] <= 1
    predicted = made.predict(texts(6))
    torch.testing.assert_close(torch.as_tensor(predicted.predictions), right.logits, atol=1e-4, rtol=1e-4)


def test_the_best_model_is_found_by_its_loss(tmp_path):
    made = trainer(
        build(think="PonderLM2(thoughts=1)"),
        tmp_path,
        texts(),
        max_steps=2,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        learning_rate=1e-2,
    )
    made.train()
    assert made.state.best_metric == pytest.approx(made.evaluate()["eval_loss"], rel=1e-5)


def test_label_smoothing_shifts_the_labels(tmp_path):
    model, x = build(), ids(8, 16)
    loss, _ = first_step(model, tmp_path, 8, 1, label_smoothing_factor=0.1)
    with torch.no_grad():
        right = LabelSmoother(0.1)({"logits": build()(x).logits}, x, shift_labels=True)
    assert loss == pytest.approx(float(right), rel=1e-3)


@pytest.mark.parametrize("chosen", CHOSEN, ids=str)
def test_checkpointing_changes_nothing(chosen, tmp_path):
    plain = first_step(build(**chosen), tmp_path, 8, 1)
    assert first_step(build(**chosen), tmp_path, 8, 1, **checkpointing_arguments(True)) == pytest.approx(
        plain, rel=1e-4
    )
