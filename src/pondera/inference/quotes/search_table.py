"""The sentences of all files in one table, and their scores for a question.

Shapes: S sentences, P passages, D dimensions of the encoder.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pondera.core.errors import UserError
from pondera.inference.quotes.documents import TextFile
from pondera.inference.quotes.words import Words

PASSAGE_WEIGHT, WORDS_WEIGHT = 0.5, 0.5
"""Weights of the words of the passage compared with those of the sentence, and of words compared with meaning."""


class Place(NamedTuple):
    """Where a sentence is: file, first byte and end."""

    file: str
    start: int
    end: int


class SearchTable:
    """What a search reads.

    Args:
        files: the files, in an order that does not depend on how they were given.
        vectors: the vectors ``[S, D]`` of the sentences of each file; `None` without an encoder.
        words_weight: weight of words compared with meaning.

    Attributes:
        texts: the text of each sentence.
        places: all places of a text.
    """

    def __init__(self, files: Sequence[TextFile], vectors: Sequence[np.ndarray | None], words_weight: float) -> None:
        self._words_weight = words_weight
        self.texts: list[str] = []
        self.places: dict[str, list[Place]] = defaultdict(list)
        passages: list[str] = []
        passage_of: list[np.ndarray] = []
        for file in files:
            for start, end in file.sentence_S2.tolist():
                self.texts.append(file.text(start, end))
                self.places[self.texts[-1]].append(Place(file.path, start, end))
            passage_of.append(file.passage_of_S + len(passages))
            passages += [file.text(*place) for place in file.passage_P2]
        self._passage_of_S = np.concatenate(passage_of)
        self._words_of_sentences, self._words_of_passages = Words(self.texts), Words(passages)
        encoded = [array for array in vectors if array is not None]
        self._vector_SD = np.concatenate(encoded).astype(np.float32) if encoded else None

    def scores(self, question: str, vector_1D: np.ndarray | None) -> np.ndarray:
        """The score of each sentence ``[S]``.

        Args:
            question: any text.
            vector_1D: its vector; `None` without an encoder.

        Raises:
            UserError: the encoder is not that of the index.
        """
        passage_P = self._words_of_passages.scores(question)
        by_words_S = self._words_of_sentences.scores(question) + PASSAGE_WEIGHT * passage_P[self._passage_of_S]
        if self._vector_SD is None or vector_1D is None:
            return by_words_S
        if vector_1D.shape[-1] != self._vector_SD.shape[-1]:
            raise UserError(
                f"the encoder gives {vector_1D.shape[-1]} numbers and the index has {self._vector_SD.shape[-1]}: it was made "
                "with another encoder of that name; make the index again"
            )
        by_meaning_S = self._vector_SD @ vector_1D[0].astype(np.float32)
        return _standardised(by_meaning_S) + self._words_weight * _standardised(by_words_S)


def _standardised(score_S: np.ndarray) -> np.ndarray:
    """Mean 0 and variance 1; zeros if all are equal."""
    spread = float(score_S.std())
    return (score_S - score_S.mean()) / spread if spread > 0 else np.zeros_like(score_S)
