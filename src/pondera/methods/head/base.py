"""The seam `head/`: from a final state to a score for each token of the vocabulary.

Shapes: B batch, T tokens, D width, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor, nn

from pondera.core.loss_terms import LossTerm
from pondera.core.spec_repr import SpecRepr

IGNORED = -100
"""Label of tokens that carry no loss, as in transformers."""


class Head(SpecRepr, nn.Module, ABC):
    """Takes the place of a backbone's output matrix.

    A head is described by its constructor and made by `bind`. It must give the same logits to a state whatever else is
    in the batch, and `term` must equal the cross-entropy of those logits.

    Class attributes `paper` and `cost` say where it is from and what it costs in plain words (``pondera methods`` prints
    them).
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
            rows_VD: the trained output matrix that it takes the place of, if there is one.

        Raises:
            UserError: sizes that it cannot take.
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
        """Numbers that a state is multiplied with, for the price."""
