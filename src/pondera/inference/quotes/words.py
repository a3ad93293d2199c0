"""BM25: how well a sentence fits a question by their common words.

Shapes: S sentences.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable

import numpy as np

_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W_\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+")
K1, B = 1.2, 0.75


class Words:
    """The words of all sentences.

    Source: Robertson and Zaragoza 2009, "The Probabilistic Relevance Framework", equation 3.15, with the usual constants 1.2
    and 0.75 and the inverse document frequency that is never negative.
    Cost: a search touches only sentences that share a word with the question.
    Resolved: a word is a run of letters and digits in lower case; in Chinese, Japanese and Korean each character is one.

    Args:
        texts: the sentences.

    Example:
        >>> words = Words(["The sea is wide.", "Ships need the sea.", "Bread."])
        >>> words.scores("Who needs bread?").argmax()
        np.int64(2)
    """

    def __init__(self, texts: Iterable[str]) -> None:
        places: dict[str, list[int]] = defaultdict(list)
        counts: dict[str, list[int]] = defaultdict(list)
        lengths = []
        for number, text in enumerate(texts):
            found = Counter(words(text))
            lengths.append(found.total())
            for word, count in found.items():
                places[word].append(number)
                counts[word].append(count)
        self._length_S = np.array(lengths, dtype=np.float64)
        self._mean = max(float(self._length_S.mean()), 1.0) if lengths else 1.0
        self._places = {word: np.array(rows) for word, rows in places.items()}
        self._counts = {word: np.array(found, dtype=np.float64) for word, found in counts.items()}

    def scores(self, question: str) -> np.ndarray:
        """The BM25 score of each sentence ``[S]``, 0 without a common word."""
        score_S = np.zeros(len(self._length_S))
        for word in dict.fromkeys(words(question)):
            rows = self._places.get(word)
            if rows is None:
                continue
            count = self._counts[word]
            rarity = math.log(1 + (len(score_S) - len(rows) + 0.5) / (len(rows) + 0.5))
            score_S[rows] += rarity * count * (K1 + 1) / (count + K1 * (1 - B + B * self._length_S[rows] / self._mean))
        return score_S


def words(text: str) -> list[str]:
    """The words of a text in lower case.

    Example:
        >>> words("Müllers 2 Boote, 海.")
        ['müllers', '2', 'boote', '海']
    """
    return _WORD.findall(text.lower())
