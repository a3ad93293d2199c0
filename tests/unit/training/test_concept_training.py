"""Training with codebooks: resumed exactly, counted without learning, prices with and without concepts."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from helpers import training_worker

from pondera.core.run_folder import Run
from pondera.evaluation.perplexity import evaluate
from pondera.inference.load import load
from pondera.training.train import train

CONCEPTS = "ConceptLM(chunk=2, codes=4, segments=2)"
# With statistics, a warm-up and respawn: everything that a quantizer notes while it trains.
NOTES = "ConceptLM(chunk=2, quantizer=Product(VQ(4, update='ema', init='kmeans', start_step=2, respawn=0.1), groups=2))"
# With loss terms and random choices of a think method.
THINKING = [
    f"ConceptLM(chunk=2, quantizer=Product(VQ(4), groups=2), think={think})"
    for think in ("UniversalTransformer(steps=2)", "PonderLM3(thoughts=1, train_rounds=(1, 2), warmup=0.5)")
]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return training_worker.write_text(tmp_path_factory.mktemp("concepts") / "text")


@pytest.mark.parametrize("chunk", [CONCEPTS, NOTES, *THINKING])
def test_resumed_is_what_it_would_have_been(chunk: str, text: Path, tmp_path: Path):
    config = training_worker.tiny(text, {"think": None, "chunk": chunk, "train.keep": 2})
    straight = train(config, tmp_path / "straight", progress=False)
    assert {"next_token", "concept"} <= straight.metrics()[-1]["terms"].keys()
    again = Run(tmp_path / "again")
    shutil.copytree(straight.path, again.path)
    shutil.rmtree(again.checkpoints()[-1])
    shutil.rmtree(again.model_dir)
    again.result_file.unlink()
    train(config, again.path, resume=True, progress=False)
    weights = [(run.model_dir / "model.safetensors").read_bytes() for run in (straight, again)]
    assert weights[0] == weights[1]


def test_counting_a_step_of_micro_batches_teaches_codebooks_nothing(text: Path, tmp_path: Path):
    """Every vector is counted once: hits per step are those of one whole batch."""
    hits, chunk = [], NOTES.replace("init='kmeans', start_step=2", "decay=0.5")
    for size in (4, 1):
        config = training_worker.tiny(text, {"think": None, "chunk": chunk, "train.micro_batch_size": size})
        run = train(config, tmp_path / str(size), progress=False)
        state = load(str(run.path)).model.state_dict()
        hits.append([tensor.sum() for name, tensor in state.items() if name.endswith("statistics.hits_K")])
    assert len(hits[0]) == 2
    torch.testing.assert_close(hits[0], hits[1], rtol=1e-5, atol=1e-5)
    assert hits[0][0] == pytest.approx(64, rel=0.02)  # 4 windows of 16 chunks


@pytest.mark.parametrize("chunk", THINKING)
def test_micro_batches_change_no_loss_term(chunk: str, text: Path, tmp_path: Path):
    runs = []
    for size in (4, 1):
        config = training_worker.tiny(text, {"think": None, "chunk": chunk, "train.micro_batch_size": size})
        runs.append(train(config, tmp_path / str(size), progress=False).metrics())
    for whole, parts in zip(*runs, strict=True):
        assert any(name.startswith("think_") for name in whole["terms"])
        assert parts["terms"] == pytest.approx(whole["terms"], rel=1e-3)


def test_without_effort_the_concepts_are_left_out(text: Path, tmp_path: Path):
    run = train(training_worker.tiny(text, {"think": None, "chunk": CONCEPTS}), tmp_path / "run", progress=False)
    with_concepts, without = (evaluate(run.path, max_tokens=200, effort=effort) for effort in (1.0, 0.0))
    assert with_concepts["bits_per_byte"] != without["bits_per_byte"]
    assert with_concepts["passes_per_token"] == without["passes_per_token"] == 1.0
    plain = train(training_worker.tiny(text, {"think": None}), tmp_path / "plain", progress=False)
    bare = evaluate(plain.path, max_tokens=200)
    for key in ("inference_flops_per_token", "kv_bytes_per_token"):
        assert bare[key] == without[key] < with_concepts[key]
