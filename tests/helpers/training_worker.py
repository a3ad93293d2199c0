"""Tiny training runs for tests; as a script it trains in a separate process and can hang, shard or save gradients."""

from __future__ import annotations

import argparse
import copy
import random
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.utils.data import Dataset
from transformers import TrainerCallback

from pondera.core.loss_terms import LossTerm
from pondera.core.run_config import RunConfig, TrainConfig, assign, from_dict, load
from pondera.models.adaptive_lm import AdaptiveLM
from pondera.models.config import AdaptiveConfig
from pondera.models.next_token import IGNORED
from pondera.training.train import train
from pondera.training.trainer import PonderaTrainer, arguments

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
TINY = {
    "name": "tiny",
    "backbone": {"model_type": "llama", **SIZES},
    "init": "scaled",
    "think": "PonderLM2(thoughts=1)",
    "data": {"tokenizer": "bpe-300", "context": 32},
    "train": {"steps": 8, "batch_size": 4, "log_every": 1, "eval_every": 4, "eval_tokens": 512, "save_every": 4},
}


def write_text(folder: Path) -> Path:
    """Writes twenty documents that use a hundred random words; returns the folder."""
    folder.mkdir()
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefgh", k=draw.randint(2, 6))) for _ in range(100)]
    for number in range(20):
        (folder / f"{number}.txt").write_text(" ".join(draw.choices(words, k=1000)))
    return folder


def tiny(text: Path, settings: dict[str, Any] | None = None) -> RunConfig:
    """The config of a run of eight steps with four windows each; `settings` replaces values by their dotted names."""
    made: dict[str, Any] = copy.deepcopy(TINY)
    for name, value in {"data.text": str(text), **(settings or {})}.items():
        assign(made, name, value)
    return from_dict(made)


def write_config(path: Path, config: RunConfig) -> str:
    """Writes the config to a file; returns its path."""
    path.write_text(yaml.safe_dump(config.to_dict()))
    return str(path)


class Gappy(Dataset):
    """Windows with many, few and no ignored labels."""

    def __init__(self) -> None:
        draw = torch.Generator().manual_seed(0)
        self.tokens = torch.randint(97, (4, 17), generator=draw)
        self.ignored = [0, 15, 3, 9]

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Any]:
        targets = self.tokens[index, 1:].clone()
        targets[: self.ignored[index]] = IGNORED
        return {"input_ids": self.tokens[index, :-1], "targets": targets, "index": torch.tensor(index)}


class TwoTerms(AdaptiveLM):
    """A model with a second loss term, whose count depends on the output of the model."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        chosen = out.logits[..., 0] > 0
        out.terms["positive"] = LossTerm(out.logits[..., 0].square()[chosen].sum(), chosen.sum(), weight=0.5)
        return out


def gradients(
    folder: Path, micro_batch_size: int | None = None, num_processes: int = 1, kind: type[AdaptiveLM] = AdaptiveLM
) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of the second step on all of `Gappy`; in the first step, the trainer learns the loss terms."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    backbone = {"model_type": "llama", "vocab_size": 97, **sizes}
    model = kind(AdaptiveConfig(backbone=backbone, init="scaled", think="PonderLM2(thoughts=1)"))
    settings = TrainConfig(steps=2, lr=1e-12, batch_size=4, micro_batch_size=micro_batch_size, grad_clip=1e9)
    found: dict[str, torch.Tensor] = {}

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            found.update({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})

    trainer = PonderaTrainer(
        model, arguments(settings, str(folder), num_processes), settings, Gappy(), callbacks=[Look()]
    )
    trainer.train()
    assert trainer.latest is not None
    return trainer.latest.loss, found


def hang_before(step: int) -> None:
    """Makes the training hang after `step` steps, until it is killed."""
    original = PonderaTrainer.get_batch_samples

    def hang(self: PonderaTrainer, *args: Any) -> Any:
        while self.state.global_step == step:
            time.sleep(1)
        return original(self, *args)

    PonderaTrainer.get_batch_samples = hang


def shard_on_cpu() -> None:
    """Makes accelerate shard on CPUs; accelerate offers FSDP only for accelerators, although FSDP2 also runs with gloo."""
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    original = AcceleratorState.__init__

    def initialise(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        plugin = fsdp_plugin or self.__dict__.get("fsdp_plugin")
        if plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, plugin

    AcceleratorState.__init__ = initialise


def note_shards() -> None:
    """Writes the number of parameters in the shards of the first process to a file next to the run folder."""
    from pondera.training.callback import RunCallback

    original = RunCallback.on_train_begin

    def note(self: RunCallback, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if self.trainer.is_world_process_zero():
            model: Any = self.trainer.model
            local = sum(p.to_local().numel() for p in model.parameters())
            kinds = {type(module).__name__ for module in model.modules()}
            (self.run.path.parent / "shards.txt").write_text(f"{local} {' '.join(sorted(kinds))}")

    RunCallback.on_train_begin = note


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("runs", type=Path, nargs="+", help="a config and the folder of its run; another config, ...")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--hang-before", type=int)
    parser.add_argument("--shard", action="store_true")
    parser.add_argument("--gradients", type=Path)
    args = parser.parse_args()
    random.seed(time.time_ns())  # results must not depend on the global random state
    torch.manual_seed(time.time_ns() % 2**63)
    if args.hang_before is not None:
        hang_before(args.hang_before)
    if args.shard:
        shard_on_cpu()
        note_shards()
    for config, out in zip(args.runs[::2], args.runs[1::2], strict=True):
        train(load(config), out, args.resume)
    if args.gradients:
        loss, found = gradients(args.gradients.parent, 1, num_processes=2)
        if torch.distributed.get_rank() == 0:
            torch.save({"loss": loss, "gradients": found}, args.gradients)
