"""Halting rules shared by several methods, and the controls for comparison.

Shapes: B batch, T tokens, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from pondera.core.errors import UserError, unknown
from pondera.core.stateless_random import prefix_hash, stateless_uniform
from pondera.models.backbone import Backbone
from pondera.models.method import TokenBatch

CONTROLS = ("fixed", "random", "oracle")
_SEED_FACTOR = 0x5851F42D4C957F2D
"""Spreads the bits of small seeds."""


class Halting(nn.Module):
    """A halting control in place of a method's own rule, or a marker that the own rule is used.

    ``"fixed"``: every token takes all passes. ``"random"``: a token continues with probability `continue_prob`; this
    matches the compute of the learned rule without its information. ``"oracle"``: a token continues while the model's
    prediction of the next token is wrong. Only training and scoring know the next token; where it is unknown, every
    token continues.

    Random decisions are hashes of the tokens of the document up to and including the token (`keyed`), its position, the
    depth, the seed of the run and, in training, the step number. Caching, padding and other sequences of the batch do not
    change them. What a token means for the task says nothing about them, even if there are few different tokens. Rows that
    begin alike decide alike there; another seed decides otherwise. A caller that gives `inputs_embeds` tells no token ids:
    tokens at one position then decide alike in all rows.

    Args:
        kind: the name of the method's own rule, or of a control.
        own: the name of the method's own rule.
        continue_prob: for ``"random"``.
    """

    seed: Tensor

    def __init__(self, kind: str, own: str, continue_prob: float) -> None:
        super().__init__()
        if kind not in (own, *CONTROLS):
            raise unknown("halting", kind, (own, *CONTROLS))
        if not 0 <= continue_prob <= 1:
            raise UserError(
                f"continue_prob={continue_prob}: give the share of tokens that continue at each step, from 0 to 1"
            )
        self.kind, self.continue_prob, self.learned = kind, continue_prob, kind == own
        self.draw = 0
        """Number of the random decisions: 1 + the step in training; 0 at evaluation."""
        if kind == "random":  # saved with the weights, so that an evaluation knows the seed of the training
            self.register_buffer("seed", torch.zeros((), dtype=torch.long))

    def begin_step(self, step: int, seed: int) -> None:
        """Sets the random decisions of a step; see `Method.begin_step`."""
        self.draw = 1 + step
        if self.kind == "random" and step >= 0:
            self.seed.fill_(seed % 2**63)

    def keyed(self, batch: TokenBatch) -> TokenBatch:
        """The batch with the hashes that random decisions depend on; a cache stores those of its tokens.

        Called once per call, before its first pass. Other kinds of halting need none. Tokens whose ids are not known add
        nothing to the hash.
        """
        if self.kind != "random":
            return batch
        cache, tokens = batch.cache, batch.h_BTD.shape[1]
        earlier_BT = None if cache is None else cache.prefix_hashes()
        before_B1 = None if earlier_BT is None else earlier_BT[:, -1:]
        if batch.ids_BT is not None:
            document_BT = None if batch.mask is None else batch.mask[:, -tokens:]
            prefix_BT = prefix_hash(batch.ids_BT, batch.position_ids, document_BT, before_B1)
        elif before_B1 is not None:
            prefix_BT = before_B1.expand(-1, tokens)
        else:
            return batch
        if cache is not None:
            cache.append_prefix_hashes(prefix_BT)
        return replace(batch, prefix_BT=prefix_BT)

    @property
    def adaptive(self) -> bool:
        """True if the number of passes can differ between tokens."""
        return self.kind != "fixed"

    @property
    def needs_vocabulary(self) -> str:
        """See `Think.needs_vocabulary`."""
        return "compares the predicted token with the next one" if self.kind == "oracle" else ""

    def continue_mask(
        self,
        depth: int,
        position_ids: Tensor,
        labels_BT: Tensor | None,
        predict: Callable[[], Tensor],
        prefix_BT: Tensor | None = None,
    ) -> Tensor | None:
        """The mask of tokens that a control sends to `depth`; ``None``: all tokens.

        Args:
            depth: the next pass, 1, 2, ...
            position_ids: ``[B or 1, T]``.
            labels_BT: the next token of each token; negative where unknown.
            prefix_BT: see `TokenBatch`; default: ``None``, token ids are not known.
            predict: returns the most likely next token ``[B, T]`` at the current depth.
        """
        if self.kind == "random":
            key = self.seed * _SEED_FACTOR if prefix_BT is None else prefix_BT + self.seed * _SEED_FACTOR
            return stateless_uniform(position_ids, depth, self.draw, key) < self.continue_prob
        if self.kind == "oracle" and labels_BT is not None:
            return (predict() != labels_BT) | (labels_BT < 0)
        return None

    def explored(self, depth: int, batch: TokenBatch, share: float) -> Tensor | None:
        """The mask of tokens that take the pass `depth` in a training step whatever the rule says, ``[B, T]``; ``None``: none.

        Without them a rule that has learned to halt a token early would never see again what a further pass gains.

        Args:
            depth: the next pass, 1, 2, ...
            batch: the tokens.
            share: the probability of each token.
        """
        if not self.draw or not share:
            return None
        return stateless_uniform(batch.position_ids, depth, self.draw + 2**40, batch.ids_BT) < share


def router(backbone: Backbone, start: float, outputs: int = 1, width: int | None = None) -> nn.Linear:
    """A linear layer from states to logits; its logits are the same for every token at initialization.

    Args:
        backbone: provides the width, dtype and device.
        start: the initial probability, sigmoid of the initial logit.
        outputs: logits per token.
        width: input width; default: ``None``, the width of the states.
    """
    weight = next(backbone.parameters())
    layer = nn.Linear(width or backbone.config.hidden_size, outputs, dtype=weight.dtype, device=weight.device)
    nn.init.zeros_(layer.weight)
    nn.init.constant_(layer.bias, math.log(start / (1 - start)))
    return layer


def continue_prob_for(passes: float, steps: int) -> float:
    """The probability to continue with which random halting takes a given mean number of passes.

    It solves ``1 + p + p^2 + ... + p^steps = passes`` for p.

    Args:
        passes: the mean passes per token; p is 0 below 1, and 1 above ``1 + steps``.
        steps: the maximum number of passes after the first.

    Example:
        >>> round(continue_prob_for(1.75, steps=2), 6)
        0.5
    """
    low, high = 0.0, 1.0
    for _ in range(50):  # bisection: the mean passes increase with p
        middle = (low + high) / 2
        low, high = (middle, high) if sum(middle**step for step in range(steps + 1)) < passes else (low, middle)
    return (low + high) / 2


def exit_probabilities(reach: list[Tensor]) -> list[Tensor]:
    """The probability that a token exits at each step, from the probabilities of reaching each step.

    Args:
        reach: ``[B, T]`` per step, non-increasing from 1; 0 from the first step that a token did not take.

    Returns:
        Tensors of the same shapes. They sum to 1 for every token, because the last step taken gets the remainder.

    Example:
        >>> reach = [torch.tensor(1.0), torch.tensor(0.6), torch.tensor(0.0)]
        >>> [round(float(probability), 2) for probability in exit_probabilities(reach)]
        [0.4, 0.6, 0.0]
    """
    return [own - after for own, after in zip(reach, [*reach[1:], torch.zeros_like(reach[0])], strict=True)]
