"""Questions: the base class of questions about a long context.

A context is read once, its KV cache is compressed, and the questions are asked afterwards, each on a copy of the cache. The
method that compresses has not seen them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from pondera.core.spec_repr import SpecRepr

Count = Callable[[str], int]
"""Counts the tokens of a text."""


@dataclass(frozen=True)
class Question:
    """A question and its answer.

    Args:
        text: what follows the context, up to the answer; it ends without a space.
        answer: the text that must follow, with the space before it.
    """

    text: str
    answer: str


@dataclass(frozen=True)
class AskedContext:
    """A context and the questions that are asked about it.

    Args:
        context: the text that is read first.
        questions: each is asked alone, right after the context.
    """

    context: str
    questions: tuple[Question, ...]


class Questions(SpecRepr, ABC):
    """Base class of kinds of questions. The text of a context and of its questions are drawn with a seed."""

    examples: ClassVar[dict[str, str]] = {}
    """Spec strings by name, for the tests."""

    @abstractmethod
    def draw(self, count: Count, tokens: int, contexts: int, seed: int) -> list[AskedContext]:
        """Draws contexts with their questions; equal arguments give equal texts.

        Args:
            count: counts tokens as the model's tokenizer does.
            tokens: the length of a context at most, in tokens.
            contexts: how many contexts.
            seed: of everything that is drawn.

        Raises:
            UserError: a context of this length holds no question, or there is too little text.
        """
