"""Base class of output heads, from a final state to one logit per token of the vocabulary.

Shapes: B batch, T tokens, D width, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor, nn

from pondera.core.loss_terms import LossTerm
from pondera.core.spec_repr import SpecRepr

IGNORED = -100
"""Label of tokens without a loss, as in transformers."""


class Head(SpecRepr, nn.Module, ABC):
    """Replaces the output matrix of a backbone.

    The constructor stores the settings; `bind` creates the weights. The logits of a state must not depend on the rest
    of the batch, and `term` must equal the cross-entropy of these logits.

    The class attribute `paper` gives the source and `cost` the cost in plain words (``pondera methods`` prints both).
    """

    paper: ClassVar[str]
    cost: ClassVar[str]
    examples: ClassVar[dict[str, str]] = {}
    """Spec strings by name, for the contract tests, of a vocabulary of 50 and states of width 12."""

    @abstractmethod
    def bind(self, vocabulary: int, width: int, rows_VD: Tensor | None = None) -> None:
        """Creates the weights. Called once, before training or loading.

        Args:
            vocabulary: V.
            width: D.
            rows_VD: the trained output matrix to replace, or ``None``; on the meta device if the weights of the head are
                loaded afterwards.

        Raises:
            UserError: the head does not support these sizes.
        """

    def check_untrained(self) -> None:  # noqa: B027 (optional)
        """Raises if the head cannot start from random weights.

        Raises:
            UserError: it needs a trained output matrix.
        """

    @abstractmethod
    def forward(self, h_BTD: Tensor) -> Tensor:
        """Logits ``[B, T, V]``."""

    @abstractmethod
    def term(self, h_BTD: Tensor, labels_BT: Tensor) -> LossTerm:
        """The cross-entropy of the next tokens, in float32, over the labels that are not `IGNORED`."""

    @property
    @abstractmethod
    def weights(self) -> int:
        """Number of weights that a state is multiplied with, for cost estimates."""
