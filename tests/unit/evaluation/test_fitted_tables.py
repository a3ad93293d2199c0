"""Tables are fitted once for a model and a text, and then read from disk."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers.architectures import BACKBONES, ids
from transformers import AutoConfig, AutoModelForCausalLM

from pondera.evaluation.fitted_tables import fit
from pondera.methods.kv_cache.vqkv import VQKV


def model(seed: int = 0) -> Any:
    config = copy.deepcopy(BACKBONES["llama"])
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(config.pop("model_type"), **config)).eval()


def method(lm: Any, bits: float = 2) -> VQKV:
    made = VQKV(bits, codes=4, vectors=64, fitting="kmeans", window=5, sinks=1, flush_size=2)
    made.bind(lm.config)
    return made


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Gets an entry for each fit."""
    found, before = [], VQKV.fit

    def counted(self: VQKV, *rest: Any) -> VQKV:
        found.append(1)
        return before(self, *rest)

    monkeypatch.setattr(VQKV, "fit", counted)
    return found


def test_the_second_fit_reads_the_tables_of_the_first(tmp_path, fits):
    lm, text = model(), [ids(4, 20)]
    first = fit(method(lm), lm, text, tmp_path)
    second = fit(method(lm), lm, text, tmp_path)
    assert len(fits) == 1 and second.fitted
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name


def test_another_text_model_or_setting_is_another_fit(tmp_path, fits):
    lm, text = model(), [ids(4, 20)]
    fit(method(lm), lm, text, tmp_path)
    fit(method(lm), lm, [ids(4, 20).flip(1)], tmp_path)
    fit(method(lm, 4), lm, text, tmp_path)
    other = model(1)
    fit(method(other), other, text, tmp_path)
    half = model().bfloat16()
    fit(method(half), half, text, tmp_path)
    assert len(fits) == 5


def test_a_damaged_file_is_fitted_again(tmp_path, fits, caplog):
    lm, text = model(), [ids(4, 20)]
    fit(method(lm), lm, text, tmp_path)
    (file,) = (tmp_path / "tables").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:100])
    assert fit(method(lm), lm, text, tmp_path).fitted
    assert len(fits) == 2 and file.name in caplog.text
    fit(method(lm), lm, text, tmp_path)
    assert len(fits) == 2  # it was written anew


def test_a_folder_that_cannot_be_written_costs_only_the_tables(tmp_path, fits, caplog):
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert fit(method(lm := model()), lm, [ids(4, 20)], blocked).fitted
    assert "cannot be kept" in caplog.text
