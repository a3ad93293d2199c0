"""How much the loss depends on each key of a cache: squared gradients of the loss of repeating a text.

Shapes: T tokens of a text, G KV heads, D head width, P rotation pairs.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pondera.core.hf import CACHE, DynamicCache, PreTrainedModel
from pondera.models.rotary import rotate_by_position


class _Recorder(DynamicCache):
    """A stock cache of one call that adds a zero to the keys of some layers; the gradient of the zero is that of the keys."""

    def __init__(self, config: Any, layers: list[int]) -> None:
        super().__init__(config=config)
        self.recorded: dict[int, Tensor] = {}
        self._wanted = set(layers)

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        if layer_idx in self._wanted:
            self.recorded[layer_idx] = torch.zeros_like(key_states, requires_grad=True)
            key_states = key_states + self.recorded[layer_idx]
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


def key_sensitivity(
    model: PreTrainedModel, texts: Iterable[Tensor], layers: list[int], frequency_P: Tensor, interleaved: bool
) -> Tensor:
    """Mean squared gradients of the loss with respect to keys before rotary embedding.

    The loss is the next-token loss of a text that was read before: its keys are then what the model needs from its cache.

    Args:
        model: its weights and mode do not change.
        texts: token ids ``[T]`` each; the model reads each of them twice, one after the other.
        layers: indices of the layers.
        frequency_P, interleaved: see `rotate_by_position`.

    Returns:
        ``[layers, G, D]``, in float32.
    """
    config, training = model.config.get_text_config(decoder=True), model.training
    frozen = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval()
    total, count = None, 0
    try:
        for parameter in frozen:  # only the gradients of keys are needed
            parameter.requires_grad_(False)
        for text in texts:
            T, twice_BT = len(text), torch.cat([text, text])[None].to(model.device)
            cache = _Recorder(config, layers)
            with torch.enable_grad():
                logits_TV = model(input_ids=twice_BT, logits_to_keep=T + 1, **{CACHE: cache}).logits[0, :-1]
                loss = F.cross_entropy(logits_TV.float(), twice_BT[0, T:], reduction="sum")
                grads = torch.autograd.grad(loss, [cache.recorded[layer] for layer in layers])
            position_T = torch.arange(T, device=model.device)
            squares = [
                rotate_by_position(grad[0, :, :T].float(), -position_T, frequency_P, interleaved).square().sum(1)
                for grad in grads
            ]
            total, count = torch.stack(squares) + (0 if total is None else total), count + T
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
        model.train(training)
    assert total is not None
    return total / count
