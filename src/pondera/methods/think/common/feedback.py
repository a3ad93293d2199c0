"""Feedback between passes: the last hidden state, or the embedding mixture that it predicts.

Shapes: B batch, T tokens, D width, V vocabulary.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn

from pondera.core.errors import UserError, unknown
from pondera.cost.schedule import MatMul
from pondera.models.backbone import Backbone

KINDS = ("hidden", "vocab")


class Feedback(nn.Module):
    """Maps a final hidden state to the next input vector.

    ``hidden`` feeds the state back after the final norm, without projector or residual. ``vocab`` feeds back the
    mixture of token embeddings that the state predicts; this evaluates the head.

    If the RMS of the inputs differs from the RMS of the final states (in every pretrained backbone), hidden states are
    multiplied by the ratio of the two. The ratio is measured once, in `bind`, and saved with the weights. Inputs are token
    embeddings, or the typical inputs of layers whose inputs are not tokens (`Backbone.typical_inputs`).

    Args:
        kind: ``"hidden"`` or ``"vocab"``.
        top_k: for ``"vocab"``: number of most likely tokens to mix, with renormalized probabilities; default: ``None``,
            all tokens. With 50,000 tokens and a narrow model the full mixture costs as much as several layers.
    """

    scale: Tensor

    def __init__(self, kind: str, top_k: int | None = None) -> None:
        super().__init__()
        if kind not in KINDS:
            raise unknown("feedback", kind, KINDS)
        if top_k is not None and top_k < 1:
            raise UserError(f"top_k={top_k}: give the number of tokens to mix, 1 or more, or None for all")
        self.kind, self.top_k = kind, top_k
        self._whole = top_k is None
        self.register_buffer("scale", torch.ones(()))

    @property
    def needs_vocabulary(self) -> str:
        """See `Think.needs_vocabulary`."""
        return "feeds back a mixture of token embeddings" if self.kind == "vocab" else ""

    def embed_scale(self, width: int) -> float:
        """The embedding multiplier for this feedback: sqrt(5D/2) for states, sqrt(D) for mixtures."""
        return math.sqrt(2.5 * width) if self.kind == "hidden" else math.sqrt(width)

    @torch.no_grad()
    def bind(self, backbone: Backbone) -> None:
        """Measures the RMS ratio on random tokens, unless the initialisation scales the embeddings to unit RMS."""
        self._whole = self.top_k is None or self.top_k >= backbone.config.vocab_size
        device = next(backbone.parameters()).device
        if device.type == "meta" or backbone.unit_rms or self.kind == "vocab":
            return
        was_training = backbone.training
        backbone.eval()
        h_BTD = backbone.typical_inputs(backbone.random_tokens())
        self.scale.copy_(_rms(h_BTD) / _rms(backbone.step(h_BTD)))
        backbone.train(was_training)

    def forward(self, backbone: Backbone, h_BTD: Tensor) -> Tensor:
        """The next input vector for each state, ``[B, T, D]``."""
        if self.kind == "hidden":
            return h_BTD * self.scale
        if self._whole:
            return backbone.mix_embeddings(backbone.head(h_BTD).softmax(-1))
        logits_BTk, ids_BTk = backbone.top(h_BTD, cast(int, self.top_k))
        return backbone.mix_embeddings(logits_BTk.softmax(-1), ids_BTk)

    def cost_schedule(self, rows: float) -> list[MatMul]:
        """Matrix products for feeding back `rows` states: the head and, over all tokens, the mixture."""
        if self.kind == "hidden":
            return []
        return [MatMul(rows, "head")] * 2 if self._whole else [MatMul(rows, "head", trained=False)]


def _rms(x: Tensor) -> Tensor:
    return x.float().square().mean().sqrt()
