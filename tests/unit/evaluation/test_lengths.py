"""Scores of a run on a task by length: against a loop over tokens, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import saved_models, training_worker

from pondera import UserError
from pondera.core.run_config import load
from pondera.core.run_folder import Run
from pondera.data.corpus import prepare
from pondera.evaluation.lengths import evaluate_lengths
from pondera.evaluation.perplexity import evaluate
from pondera.inference.load import load as load_run
from pondera.training.train import train

CONTEXT, POSITIONS = 12, 40
TINY = {
    "backbone.hidden_size": 16,
    "backbone.intermediate_size": 32,
    "backbone.num_attention_heads": 2,
    "backbone.num_key_value_heads": 2,
    "backbone.max_position_embeddings": POSITIONS,
    "data.task": "StateTracking('S3', reset=0.25)",
    "data.context": CONTEXT,
    "data.windows": 600,
    "train.steps": 30,
    "train.batch_size": 8,
    "train.eval_tokens": 240,
}


def trained(folder: Path, **settings: object) -> Path:
    config = load("plain", TINY | {name.replace("__", "."): value for name, value in settings.items()})
    return train(config, folder, progress=False).path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PONDERA_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        return trained(tmp_path_factory.mktemp("runs") / "thinks", think="PonderLM2(thoughts=1)")


def test_the_length_of_the_training_gives_the_scores_of_eval(run: Path):
    row, expected = evaluate_lengths(run, [CONTEXT], 600)["lengths"][0], evaluate(run, max_tokens=600)
    for name in ("accuracy", "error", "loss", "passes_per_token", "scored_tokens", "tokens"):
        assert row[name] == pytest.approx(expected[name]), name
    for name, values in row["by_difficulty"].items():
        assert values == pytest.approx(expected["by_difficulty"][name]), name
    assert row["accuracy_beyond"] is None and row["scored_beyond"] == 0


def test_positions_after_the_training_length_are_those_of_a_loop(run: Path):
    length, tokens = 20, 400
    found = evaluate_lengths(run, [8, length], tokens)
    assert (found["trained"], [row["length"] for row in found["lengths"]]) == (CONTEXT, [8, length])
    model, config = load_run(run).model, Run.open(run).config
    windows = prepare(config.data).validation.windows(length)
    right: list[bool] = []
    for index in range(tokens // length):
        window = windows[index * len(windows) // (tokens // length)]
        with torch.no_grad():
            predicted = model(window["input_ids"][None]).logits[0].argmax(-1)
        right += (predicted == window["targets"])[CONTEXT:].tolist()
    row = found["lengths"][1]
    assert row["scored_beyond"] == len(right) == (length - CONTEXT) * tokens // length
    assert row["accuracy_beyond"] == pytest.approx(sum(right) / len(right)) != row["accuracy"]
    assert row["passes_per_token"] == 2 and max(row["by_difficulty"]["difficulty"]) > CONTEXT


def test_tokens_that_are_not_scored_are_left_out(tmp_path: Path):
    """Of 20 tokens, 8 list the pairs, and every second one after them is asked; position 12 on has the answers 13, 15, ..."""
    path = trained(tmp_path / "recall", data__task="AssociativeRecall(pairs=4, values=3)", train__steps=1)
    row = evaluate_lengths(path, [20], 200)["lengths"][0]
    assert (row["scored_tokens"], row["scored_beyond"], row["tokens"]) == (60, 40, 200)


def test_every_length_has_as_many_tokens_as_the_held_out_windows_of_the_training(run: Path):
    tokens = prepare(Run.open(run).config.data).validation.num_tokens
    assert [row["tokens"] for row in evaluate_lengths(run, [24, 32], effort=0)["lengths"]] == [tokens, tokens]


def test_effort_reaches_the_model(run: Path):
    assert evaluate_lengths(run, [24], 240, effort=0)["lengths"][0]["passes_per_token"] == 1
    assert evaluate_lengths(run, [24], 240, max_passes=1)["lengths"][0]["passes_per_token"] == 1


@pytest.mark.parametrize(
    ("lengths", "said"),
    [
        ([], "give one or more lengths of at least 1 token"),
        ([16, 0], "at least 1 token, such as 16, 32, 64; got 16, 0"),
        ([16, 32, 16], "names a length twice"),
        ([16, POSITIONS + 1], f"lengths: {POSITIONS + 1} exceeds the {POSITIONS} positions"),
    ],
)
def test_wrong_lengths_are_refused(run: Path, lengths: list[int], said: str):
    with pytest.raises(UserError, match=said):
        evaluate_lengths(run, lengths)


def test_a_length_that_is_too_short_for_the_task_is_refused(tmp_path: Path):
    path = trained(tmp_path / "recall", data__task="AssociativeRecall(pairs=4, values=3)", train__steps=1)
    with pytest.raises(UserError, match=r"^lengths: 6 tokens cannot contain one problem of .*; give 10 or more"):
        evaluate_lengths(path, [20, 6])


def test_a_run_on_text_and_a_model_without_a_run_are_refused(tmp_path: Path):
    text = training_worker.write_text(tmp_path / "text")
    path = train(training_worker.tiny(text, {"train.steps": 1}), tmp_path / "run", progress=False).path
    with pytest.raises(UserError, match=r"was trained on text .* trained with data.task, or give data.context"):
        evaluate_lengths(path, [16])
    with pytest.raises(UserError, match="is not from a run"):
        evaluate_lengths(saved_models.save(tmp_path / "model", "plain"), [16])
