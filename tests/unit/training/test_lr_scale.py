"""`train.lr_scale`: what methods add to the backbone learns at its own rate, and nothing else does."""

from __future__ import annotations

import shutil

import pytest
import torch
from helpers import training_worker
from helpers.training_worker import tiny
from safetensors.torch import load_file
from transformers import TrainerCallback

from pondera.core.errors import UserError
from pondera.core.run_folder import Run
from pondera.training.build import new_model
from pondera.training.train import train
from pondera.training.trainer import PonderaTrainer, arguments

CONCEPTS = {"think": None, "chunk": "ConceptLM(chunk=4, codes=8, segments=4)"}
HEAD = {"think": None, "head": "VQLogits(codes=32)"}
PAUSE = {"think": "PauseToken(pauses=1)"}
UNDECAYED = {"train.weight_decay": 0.0, "train.steps": 1}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return training_worker.write_text(tmp_path_factory.mktemp("lr_scale") / "text")


def moved(text, folder, settings: dict) -> tuple[dict[str, torch.Tensor], set[str]]:
    """By name, how far each parameter moves in the first step; and the names of those that a method added."""
    config = tiny(text, {**UNDECAYED, **settings})
    model = new_model(config, 97)
    before: dict[str, torch.Tensor] = {}

    class Look(TrainerCallback):
        def on_pre_optimizer_step(
            self, *args, **kwargs
        ) -> None:  # some codebooks are matched to the first batch before it
            before.update({name: parameter.detach().clone() for name, parameter in model.named_parameters()})

    args = arguments(config.train, str(folder), 1)
    PonderaTrainer(model, args, config.train, training_worker.Gappy(), callbacks=[Look()]).train()
    added = {id(parameter) for parameter in model.added_parameters()}
    return (
        {name: parameter.detach() - before[name] for name, parameter in model.named_parameters()},
        {name for name, parameter in model.named_parameters() if id(parameter) in added},
    )


@pytest.mark.parametrize("settings", [CONCEPTS, HEAD, PAUSE], ids=["chunk", "head", "think"])
def test_a_tenth_as_far_in_the_first_step(settings, text, tmp_path):
    """The first step of Adam is the learning rate times the sign of the gradient, so the ratio is exact but for rounding."""
    full, added = moved(text, tmp_path, settings)
    scaled, _ = moved(text, tmp_path, {**settings, "train.lr_scale": 0.1})
    assert added and any(full[name].abs().max() > 0 for name in added)
    for name, far in full.items():
        torch.testing.assert_close(scaled[name], far * (0.1 if name in added else 1.0), atol=3e-6, rtol=1e-3, msg=name)


def test_added_are_the_method_and_the_head(text):
    both = new_model(tiny(text, {**PAUSE, "head": HEAD["head"]}), 97)
    added = {id(parameter) for parameter in both.added_parameters()}
    names = {name for name, parameter in both.named_parameters() if id(parameter) in added}
    assert names == {"think.pause_PD", "backbone.lm.lm_head.table_GKC", "backbone.lm.lm_head.bias_V"}


def test_a_head_does_not_wait_with_the_backbone(text, tmp_path):
    """`freeze_backbone_steps` freezes what methods did not add; the factor then applies to the rest."""
    settings = {**HEAD, "train.freeze_backbone_steps": 1, "train.lr_scale": 0.1}
    full, added = moved(text, tmp_path, settings)
    assert {name for name, far in full.items() if far.abs().max() > 0} == added


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_every_step_has_the_schedule(scale, text, tmp_path):
    """The factor stays the same over warm-up and decay, in matrices and vectors; without one there are no more groups."""
    config = tiny(text, {**CONCEPTS, "train.lr_scale": scale, "train.warmup": 0.5})
    model = new_model(config, 97)
    trainer = PonderaTrainer(model, arguments(config.train, str(tmp_path), 1), config.train, training_worker.Gappy())
    optimizer, scheduler = trainer.create_optimizer(), trainer.create_scheduler(config.train.steps)
    added = {id(parameter) for parameter in model.added_parameters()}
    assert len(optimizer.param_groups) == (2 if scale == 1 else 4)
    rates = []
    for _ in range(config.train.steps):
        by_own: dict[bool, set[float]] = {True: set(), False: set()}
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                by_own[id(parameter) in added].add(group["lr"])
        (own,), (backbone,) = by_own[True], by_own[False]
        assert own == pytest.approx(scale * backbone)
        rates.append(backbone)
        optimizer.step()
        scheduler.step()
    assert rates[0] < max(rates) > rates[-1]


def test_a_resumed_run_keeps_it(text, tmp_path):
    config = tiny(text, {**CONCEPTS, "train.lr_scale": 0.1, "train.save_every": 4, "train.keep": 100})
    whole = train(config, tmp_path / "whole", progress=False)
    run = Run(shutil.copytree(whole.path, tmp_path / "resumed"))
    shutil.rmtree(run.model_dir)
    run.result_file.unlink()
    shutil.rmtree(run.checkpoints()[-1])
    train(config, run.path, resume=True, progress=False)
    ours, theirs = (load_file(each.model_dir / "model.safetensors") for each in (run, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    with pytest.raises(UserError, match=r"train.lr_scale \(0.1 before, 0.2 now\)"):
        train(tiny(text, {**CONCEPTS, "train.lr_scale": 0.2}), run.path, resume=True)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        (
            {"think": None, "train.lr_scale": 0.1},
            "train.lr_scale: there is no method with parameters.*leave train.lr_sc",
        ),
        ({"think": "PonderLM2(thoughts=1)", "train.lr_scale": 0.1}, r"train.lr_scale: PonderLM2\(.*adds no parameters"),
        ({**PAUSE, "train.lr_scale": 0.0}, "train.lr_scale: a number above 0, got 0.0"),
        ({**PAUSE, "train.lr_scale": float("inf")}, "train.lr_scale: a number above 0, got inf"),
    ],
)
def test_what_scales_nothing_is_refused(settings, complaint, text, tmp_path):
    with pytest.raises(UserError, match=complaint):
        train(tiny(text, settings), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()
