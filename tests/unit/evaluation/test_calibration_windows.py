"""Calibration reads windows from the whole text, not only its beginning."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers import saved_models

from pondera import UserError
from pondera.evaluation.windows import calibration
from pondera.inference.load import Loaded, load


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    return load(saved_models.save(tmp_path_factory.mktemp("model") / "m", "plain"))


def test_windows_come_from_every_part_of_a_text(loaded: Loaded, tmp_path: Path):
    documents = ["the quick brown fox jumps " * 200, "a lazy dog sleeps " * 300, "in the sun; one runs " * 250]
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    windows_NT = torch.cat(calibration(loaded, str(file), 12 * 32, 32))
    assert windows_NT.shape == (12, 32)
    decoded = [str(loaded.tokenizer.decode(ids_T)) for ids_T in windows_NT]
    for word in ("fox", "dog", "sun"):
        assert any(word in text for text in decoded), word


def test_a_short_text_gives_fewer_windows_and_one_too_short_is_refused(loaded: Loaded, tmp_path: Path):
    file = tmp_path / "short.txt"
    file.write_text("the quick brown fox jumps over the lazy dog " * 20)
    found = torch.cat(calibration(loaded, str(file), 100_000, 32))
    assert 1 <= len(found) < 10 and found.shape[1] == 32
    file.write_text("the quick brown fox")
    with pytest.raises(UserError, match="no window of 33 tokens"):
        calibration(loaded, str(file), 100, 32)


def test_equal_calls_give_equal_windows(loaded: Loaded, tmp_path: Path):
    file = tmp_path / "text.txt"
    file.write_text("".join(f"the quick fox number {n} jumps. " for n in range(500)))
    one, two = (torch.cat(calibration(loaded, str(file), 256, 32)) for _ in range(2))
    assert torch.equal(one, two)
