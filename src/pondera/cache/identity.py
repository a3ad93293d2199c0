"""What identifies the model of a saved cache.

Shapes: none.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import Tensor

from pondera.arch.dimensions import LayersDiffer, head_dim, kv_heads
from pondera.core.hf import PreTrainedModel

PARAMETERS, VALUES = 16, 8
"""How many parameters a fingerprint reads, and how many values of each."""


def identity(model: PreTrainedModel) -> str:
    """The number and width of the KV heads, the dtype, and a fingerprint of the weights, as JSON.

    The numbers are `None` if they differ between layers. The fingerprint is a hash of some values of some parameters, evenly
    spaced, in float32. It does not depend on the device.
    It finds other weights if any of these values differs, so a model that was trained further has another one, but a change
    of a few single weights may be missed. It is empty if the weights are not plain tensors of this process, e.g. sharded.
    """
    config = model.config.get_text_config(decoder=True)
    found: dict[str, Any] = {"dtype": str(model.dtype).removeprefix("torch.")}
    for name, number in (("KV heads", kv_heads), ("head width", head_dim)):
        try:
            found[name] = number(config)
        except LayersDiffer:
            found[name] = None
    return json.dumps(found | {"weights": _fingerprint(list(model.parameters()))})


def differences(saved: str, own: str) -> list[str]:
    """What differs between two results of `identity`, in words.

    Raises:
        ValueError: the saved one is not a result of `identity`.
    """
    there, here = json.loads(saved), json.loads(own)
    if not isinstance(there, dict) or there.keys() != here.keys():
        raise ValueError("the description of its model is incomplete")
    weights, mine = there.pop("weights"), here.pop("weights")
    found = [f"{name} {there[name]}, and this model has {here[name]}" for name in here if there[name] != here[name]]
    return found or (["other weights"] if weights and mine and weights != mine else [])


@torch.no_grad()
def _fingerprint(parameters: list[Tensor]) -> str:
    chosen = parameters[:: max(1, len(parameters) // PARAMETERS)]
    if any(type(part.data) is not Tensor or part.device.type == "meta" for part in chosen):
        return ""
    read = [part.detach().reshape(-1) for part in chosen if part.numel()]
    values = [part[:: max(1, len(part) // VALUES)][:VALUES].float().cpu() for part in read]
    return hashlib.sha256(torch.cat(values).numpy().tobytes()).hexdigest()[:16] if values else ""
