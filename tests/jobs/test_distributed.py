"""Several processes train what one process trains; sharded as well."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import training

from pondera.ground.run import Run
from pondera.jobs.train import train

WORKER = str(Path(__file__).parents[1] / "training.py")
FSDP2 = str(Path(__file__).parents[2] / "launch" / "fsdp2.yaml")


# The second thinks as long as a router says: at first no token takes its last step, later some do, not the same everywhere.
THINKS = {"fixed": "PonderLM2(thoughts=1)", "adaptive": "AdaptiveLatentCoT(steps=2, halting='router', threshold=0.89)"}


@pytest.fixture(scope="module", params=THINKS)
def alone(request, tmp_path_factory):
    """The same training in one process."""
    folder = tmp_path_factory.mktemp("alone")
    config = training.tiny(training.write_text(folder / "text"), {"think": THINKS[request.param]})
    training.write_config(folder / "config.yaml", config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PONDERA_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        return train(config, folder / "run", progress=False)


def launch(*command: str) -> None:
    """Runs a launcher with two processes on CPUs."""
    source = str(Path(__file__).parents[2] / "src")
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


def test_two_processes_train_like_one(alone, tmp_path):
    """Over torchrun, in micro-batches of one window; and one step's gradient, with unequal numbers of labels."""
    config = str(alone.path.parent / "config.yaml")
    ports = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    launch(*ports, WORKER, config, str(tmp_path / "run"), "--gradients", str(tmp_path / "gradients.pt"))
    same_losses(Run.open(tmp_path / "run"), alone)

    found = torch.load(tmp_path / "gradients.pt", weights_only=True)
    loss, gradients = training.gradients(tmp_path)
    assert found["loss"] == pytest.approx(loss, rel=1e-6)
    for name, gradient in gradients.items():
        assert (found["gradients"][name] - gradient).abs().max() <= 1e-6 * gradient.abs().max(), name


def test_shards_train_like_one(alone, tmp_path):
    """FSDP2 by the launch file that is shipped, going on from a checkpoint that one unsharded process wrote."""
    from transformers import AutoModelForCausalLM

    run = Run(tmp_path / "run")
    shutil.copytree(alone.path, run.path)
    shutil.rmtree(run.checkpoints_dir / "step-000008")
    shutil.rmtree(run.model_dir)
    run.result_file.unlink()
    config = str(alone.path.parent / "config.yaml")
    options = ("--config_file", FSDP2, "--num_processes", "2")
    launch("accelerate.commands.launch", *options, WORKER, config, str(run.path), "--resume", "--shard")
    same_losses(run, alone)

    held, *kinds = (tmp_path / "shards.txt").read_text().split()
    assert int(held) == pytest.approx(alone.result()["parameters"] / 2, abs=32)  # odd rows go to the first process
    assert {"FSDPAdaptiveLM", "FSDPLlamaDecoderLayer"} <= set(kinds)
    wanted = AutoModelForCausalLM.from_pretrained(alone.model_dir).state_dict()
    for folder in (run.model_dir, run.checkpoints()[-1]):
        weights = AutoModelForCausalLM.from_pretrained(folder).state_dict()
        assert weights.keys() == wanted.keys()
        assert all(torch.allclose(weights[name], wanted[name], atol=1e-4) for name in wanted)
