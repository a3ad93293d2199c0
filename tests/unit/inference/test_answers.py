"""A run on a task answers a window: predictions, right answers and passes of each token."""

from __future__ import annotations

import pytest
import torch

from pondera import UserError
from pondera.cli.output import print_answers
from pondera.core.run_config import load as load_config
from pondera.inference.answers import Answer, answers, task_of
from pondera.inference.load import Loaded, load
from pondera.training.train import train

SETTINGS = {
    "backbone.hidden_size": 16,
    "backbone.intermediate_size": 32,
    "data.task": "StateTracking('S3', reset=0.25)",
    "data.windows": 600,
    "train.steps": 2,
    "train.batch_size": 4,
    "train.eval_tokens": 160,
    "think": "AdaptiveLatentCoT(steps=2, halting='random')",
}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    folder = tmp_path_factory.mktemp("task") / "run"
    train(load_config("plain", SETTINGS), folder, progress=False)
    return load(folder)


def test_answers_are_those_of_the_model_and_of_the_task(loaded: Loaded):
    prompt = "R 021 021 102 R 210"
    found = answers(loaded, prompt)
    assert [one.symbol for one in found] == prompt.split()
    assert [one.correct for one in found] == ["012", "021", "012", "102", "012", "210"]
    task = task_of(loaded)
    ids = torch.tensor([[task.ids[symbol] for symbol in prompt.split()]])
    with torch.no_grad():
        out = loaded.model(ids)
    names = {number: symbol for symbol, number in task.ids.items()}
    assert [one.predicted for one in found] == [names[number] for number in out.logits[0].argmax(-1).tolist()]
    assert [one.passes for one in found] == out.passes[0].tolist()
    assert [one.passes for one in answers(loaded, prompt, max_passes=1)] == [1] * 6


@pytest.mark.parametrize(("prompt", "message"), [("R 999", "999 not in the task; give symbols"), (" ", "no symbol")])
def test_other_symbols_are_refused(loaded: Loaded, prompt: str, message: str):
    with pytest.raises(UserError, match=message):
        answers(loaded, prompt)


def test_they_are_printed_below_each_other(capsys: pytest.CaptureFixture[str]):
    print_answers([Answer("R", "012", "012", 1), Answer("102", "021", "102", 3), Answer("R", None, None, 2)])
    assert capsys.readouterr().out == (
        "  token     R   102 R\n"
        "  answer  012   021\n"
        "              wrong\n"
        "  passes    1     3 2\n"
        "\n  1 of 2 right, 2.00 passes per token\n"
    )
