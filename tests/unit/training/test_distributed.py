"""Several processes train what one process trains; sharded as well."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import training_worker

from pondera.core.run_folder import Run
from pondera.training.train import train

WORKER = str(Path(__file__).parents[2] / "helpers" / "training_worker.py")
FSDP2 = str(Path(__file__).parents[3] / "launch" / "fsdp2.yaml")


# The second thinks as long as a router says: at first no token takes its last step, later some do, not the same everywhere.
# The third has LoRA on the first.
CASES = {
    "fixed": {"think": "PonderLM2(thoughts=1)"},
    "adaptive": {"think": "AdaptiveLatentCoT(steps=2, halting='router', threshold=0.89)"},
    "lora": {"think": "PonderLM2(thoughts=1)", "train.lora": 4},
}


@pytest.fixture(scope="module", autouse=True)
def one_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The tests' own, for what the fixtures of this module train."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PONDERA_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        yield


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """The same trainings in one process."""
    folder, runs = tmp_path_factory.mktemp("alone"), {}
    text = training_worker.write_text(folder / "text")
    for name, settings in CASES.items():
        (folder / name).mkdir()
        start = {"backbone": str(runs["fixed"].path)} if name == "lora" else {}
        config = training_worker.tiny(text, {**settings, **start})
        training_worker.write_config(folder / name / "config.yaml", config)
        runs[name] = train(config, folder / name / "run", progress=False)
    return runs


def launch(*command: str) -> None:
    """Runs a launcher with two processes on CPUs."""
    source = str(Path(__file__).parents[3] / "src")
    environment = {**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-m", *command], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-4000:]


def same_losses(run: Run, other: Run) -> None:
    for line, wanted in zip(run.metrics(), other.metrics(), strict=True):
        assert line["loss"] == pytest.approx(wanted["loss"], rel=1e-4)
        assert line["train_flops"] == pytest.approx(wanted["train_flops"], rel=1e-4)
        assert line["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-3)
    assert run.result()["loss"] == pytest.approx(other.result()["loss"], rel=1e-4)


def again(alone: dict[str, Run], folder: Path) -> list[str]:
    """What the worker is told: each config, and a folder for its run. Both train in one launch, whose start is most of it."""
    return [
        str(path) for name, run in alone.items() for path in (run.path.parent / "config.yaml", folder / name / "run")
    ]


@pytest.fixture(scope="module")
def two_processes(alone: dict[str, Run], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Over torchrun, in micro-batches of one window."""
    folder = tmp_path_factory.mktemp("torchrun")
    ports = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    launch(*ports, WORKER, *again(alone, folder), "--gradients", str(folder / "gradients.pt"))
    return folder


@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_like_one(name: str, two_processes: Path, alone: dict[str, Run]):
    same_losses(Run.open(two_processes / name / "run"), alone[name])


def test_gradient_of_two_processes(two_processes: Path, tmp_path: Path):
    """One step's, with unequal numbers of labels."""
    found = torch.load(two_processes / "gradients.pt", weights_only=True)
    loss, gradients = training_worker.gradients(tmp_path)
    assert found["loss"] == pytest.approx(loss, rel=1e-6)
    for name, gradient in gradients.items():
        assert (found["gradients"][name] - gradient).abs().max() <= 1e-6 * gradient.abs().max(), name


@pytest.fixture(scope="module")
def sharded(alone: dict[str, Run], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FSDP2 by the launch file that is shipped, going on from a checkpoint that one unsharded process wrote."""
    folder = tmp_path_factory.mktemp("fsdp2")
    for name, before in alone.items():
        run = Run(shutil.copytree(before.path, folder / name / "run"))
        shutil.rmtree(run.checkpoints_dir / "step-000008")
        shutil.rmtree(run.model_dir)
        run.result_file.unlink()
    options = ("--config_file", FSDP2, "--num_processes", "2")
    launch("accelerate.commands.launch", *options, WORKER, *again(alone, folder), "--resume", "--shard")
    return folder


@pytest.mark.parametrize("name", CASES)
def test_shards_train_like_one(name: str, sharded: Path, alone: dict[str, Run]):
    from transformers import AutoModelForCausalLM

    run, straight = Run.open(sharded / name / "run"), alone[name]
    same_losses(run, straight)
    held, *kinds = (sharded / name / "shards.txt").read_text().split()
    result = straight.result()
    count = result["parameters"] + result.get("trained_parameters", 0)  # the factors of LoRA are not in the saved model
    assert int(held) == pytest.approx(count / 2, abs=32)  # odd rows go to the first process
    assert {"FSDPAdaptiveLM", "FSDPLlamaDecoderLayer"} <= set(kinds)
    wanted = AutoModelForCausalLM.from_pretrained(straight.model_dir).state_dict()
    for folder in (run.model_dir, run.checkpoints()[-1]):
        weights = AutoModelForCausalLM.from_pretrained(folder).state_dict()
        assert weights.keys() == wanted.keys()
        assert all(torch.allclose(weights[name], wanted[name], atol=1e-4) for name in wanted)
