"""Which tokens go on: what the halting rules of different papers share, and the controls that they are held against.

Shapes: B batch, T tokens, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from pondera.core.errors import UserError, unknown
from pondera.core.stateless_random import stateless_uniform
from pondera.models.backbone import Backbone

CONTROLS = ("fixed", "random", "oracle")


class Halting:
    """A policy that stands in for a method's own rule, or leaves it be.

    ``"fixed"``: every token takes all passes. ``"random"``: each goes on with probability `continue_prob`, which spends what the
    learned rule spends and knows nothing. ``"oracle"``: a token goes on while the model's prediction of what follows it
    is wrong, which only training and scoring can know; where the next token is not known, every token goes on.

    Random decisions follow from position, depth and, in training, the step's number, so a cache, padding or other rows
    of a batch change nothing about them.

    Args:
        kind: the method's own rule, or a control.
        own: what the method calls its own rule.
        continue_prob: of ``"random"``.
    """

    def __init__(self, kind: str, own: str, continue_prob: float) -> None:
        if kind not in (own, *CONTROLS):
            raise unknown("halting", kind, (own, *CONTROLS))
        if not 0 <= continue_prob <= 1:
            raise UserError(
                f"continue_prob={continue_prob}: give the share of tokens that go on at each step, from 0 to 1"
            )
        self.kind, self.continue_prob, self.learned = kind, continue_prob, kind == own
        self.draw = 0
        """Changes the random decisions; 0 at evaluation."""

    @property
    def adaptive(self) -> bool:
        """Whether tokens differ."""
        return self.kind != "fixed"

    def continue_mask(
        self, depth: int, position_ids: Tensor, labels_BT: Tensor | None, predict: Callable[[], Tensor]
    ) -> Tensor | None:
        """Which tokens a control sends to `depth`; none: all of them.

        Args:
            depth: the coming pass, 1, 2, ...
            position_ids: ``[B or 1, T]``.
            labels_BT: the token after each; negative where it is not known.
            predict: gives the likeliest next token ``[B, T]`` at the present depth.
        """
        if self.kind == "random":
            return stateless_uniform(position_ids, depth, self.draw) < self.continue_prob
        if self.kind == "oracle" and labels_BT is not None:
            return (predict() != labels_BT) | (labels_BT < 0)
        return None


def router(backbone: Backbone, start: float, outputs: int = 1, width: int | None = None) -> nn.Linear:
    """A linear layer from states to logits that says the same for every token at first.

    Args:
        backbone: whose states it reads.
        start: the probability that it starts at, as a sigmoid.
        outputs: numbers per token.
        width: of what it reads, where that is not the states themselves.
    """
    weight = next(backbone.parameters())
    made = nn.Linear(width or backbone.config.hidden_size, outputs, dtype=weight.dtype, device=weight.device)
    nn.init.zeros_(made.weight)
    nn.init.constant_(made.bias, math.log(start / (1 - start)))
    return made


def exit_probabilities(reach: list[Tensor]) -> list[Tensor]:
    """What share of a token's prediction each step makes, from the probability of reaching it.

    Args:
        reach: ``[B, T]`` per step, from 1 downwards; 0 from the first step on that a token did not take.

    Returns:
        The same shapes; they sum to 1 for every token, as the last step taken gets all that is left.

    Example:
        >>> [round(float(mass), 2) for mass in exit_masses([torch.tensor(1.0), torch.tensor(0.6), torch.tensor(0.0)])]
        [0.4, 0.6, 0.0]
    """
    return [own - after for own, after in zip(reach, [*reach[1:], torch.zeros_like(reach[0])], strict=True)]
