"""Rotary positions: one rotation, equal to those of transformers' own models."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from helpers.architectures import BACKBONES
from transformers import AutoConfig, AutoModelForCausalLM

from pondera import UserError
from pondera.arch.families import FAMILIES
from pondera.models.rotary import Rotary, rotary_frequencies, rotate, rotate_by_position

SIZES = {name: size for name, size in BACKBONES["llama"].items() if name != "model_type"}
MODELS = {
    "llama": SIZES,
    "qwen3": SIZES | {"head_dim": 16},
    "gpt_neox": {name: size for name, size in SIZES.items() if name != "num_key_value_heads"},
    "cohere": SIZES,
    "helium": SIZES | {"head_dim": 16},
    "glm": SIZES | {"head_dim": 16},
}


def model(kind: str, **fields: Any) -> Any:
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **special, **MODELS[kind], **fields)).eval()


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", MODELS)
def test_all_forms_are_the_rotation_of_the_model(kind: str):
    lm = model(kind)
    key_BHSd, position_BS = random(2, 3, 5, 16), torch.tensor([[0, 1, 2, 3, 4], [7, 8, 9, 10, 30]])
    cos_BSr, sin_BSr = lm.get_decoder().rotary_emb(key_BHSd, position_BS)
    own = importlib.import_module(f"transformers.models.{kind}.modeling_{kind}").apply_rotary_pos_emb
    expected = own(key_BHSd, key_BHSd, cos_BSr, sin_BSr)[1]
    interleaved, frequency_P = FAMILIES[kind].interleaved, rotary_frequencies(lm, "")
    angle = position_BS[:, None, :, None] * frequency_P
    close = {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(rotate(key_BHSd, angle.cos(), angle.sin(), interleaved), expected, **close)
    found = rotate_by_position(key_BHSd, position_BS[:, None], frequency_P, interleaved)
    torch.testing.assert_close(found, expected, **close)
    back = rotate_by_position(found, -position_BS[:, None], frequency_P, interleaved)
    torch.testing.assert_close(back, key_BHSd, **close)
    other = rotate(key_BHSd, angle.cos(), angle.sin(), not interleaved)
    assert float((other - expected).abs().max()) > 0.1
    if kind in ("glm", "helium"):  # their layers take the angles in another order than they rotate by
        return
    rotary = Rotary(cos_BSr, sin_BSr, interleaved)
    torch.testing.assert_close(rotary.apply(key_BHSd), expected, **close)
    torch.testing.assert_close(rotary.undo(rotary.apply(key_BHSd)), key_BHSd, **close)


def test_low_precision_is_rotated_in_float32_and_given_back_as_it_came():
    x, angle = random(1, 1, 4, 8).bfloat16(), torch.arange(4.0)[None, :, None] * torch.ones(8)
    found = Rotary(angle.cos(), angle.sin()).apply(x)
    assert found.dtype == torch.bfloat16
    exact = rotate(x.double(), angle[:, None, :, :4].double().cos(), angle[:, None, :, :4].double().sin())
    assert torch.equal(found, exact.float().bfloat16())


def test_frequencies_that_change_or_are_missing_are_refused():
    fields = {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}
    with pytest.raises(UserError, match="llama: rope_type='dynamic' changes frequencies.*; use SnapKV"):
        rotary_frequencies(model("llama", **fields), "use SnapKV")
    config = dict(BACKBONES["gpt2"])
    lm = AutoModelForCausalLM.from_config(AutoConfig.for_model(config.pop("model_type"), **config))
    with pytest.raises(UserError, match="gpt2: its rotary frequencies are not found; use SnapKV"):
        rotary_frequencies(lm, "use SnapKV")
