"""Halting statistics: passes per token against loss, word class and token frequency.

Shapes: T tokens of a sample, K blocks of consecutive tokens, R bootstrap resamples; 6 sums give a correlation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

HALTING_STATS = "depths"  # the name of the trace file with the result of `halting_stats`
CLASSES = ("start of a word", "inside a word", "digits", "punctuation", "whitespace", "other")
BANDS = (10, 100, 1000)  # last rank of each frequency band
PARTS = 10  # deciles
BLOCK = 64  # tokens per bootstrap block; neighbouring tokens are correlated
RESAMPLES = 1000


def halting_stats(
    tokens: Sequence[str],
    passes: Sequence[float] | np.ndarray,
    read: Sequence[float] | np.ndarray,
    predicted: Sequence[float] | np.ndarray,
    ranks: Sequence[int] | np.ndarray,
) -> dict[str, Any]:
    """How the number of passes varies over the tokens of a text.

    Two losses belong to a token: `read` is the loss of predicting the token itself, one step earlier; `predicted` is the
    loss of predicting the next token, which is the purpose of its passes.

    Args:
        tokens: the texts of T consecutive tokens; ``""`` for a special token or a part of a character.
        passes: the passes of each token; integers, except for methods that average over depths.
        read: negative log-likelihood of each token, in nats.
        predicted: negative log-likelihood of the token after it, in nats.
        ranks: frequency rank of each token; 1 is the most frequent.

    Returns:
        ``count``, ``mean``, ``constant`` (all tokens took the same number of passes) and ``histogram``, a list of
        ``passes`` (rounded) and ``tokens``. Unless ``constant``, also ``surprise``, with ``read`` and ``predicted`` as
        `against` returns them, and ``classes`` and ``frequency``, lists of groups with ``name``, ``tokens`` and mean
        ``passes``.

    Raises:
        ValueError: there are no tokens, or the arguments differ in length.

    Example:
        >>> stats = halting_stats(["a", " b", "."], [1, 2, 2], [3.0, 4.0, 5.0], [4.0, 5.0, 3.0], [1, 20, 3])
        >>> [(row["passes"], row["tokens"]) for row in stats["histogram"]]
        [(1, 1), (2, 2)]
        >>> stats["frequency"]
        [{'name': '1–10', 'tokens': 2, 'passes': 1.5}, {'name': '11–100', 'tokens': 1, 'passes': 2.0}]
    """
    if not tokens or {len(tokens)} != {len(passes), len(read), len(predicted), len(ranks)}:
        raise ValueError("give at least one token, and one value of each kind per token")
    passes_T = np.asarray(passes, np.float64)
    values, counts = np.unique(np.rint(passes_T).astype(int), return_counts=True)
    constant = bool(passes_T.min() == passes_T.max())
    stats: dict[str, Any] = {
        "count": len(tokens),
        "mean": float(passes_T.mean()),
        "constant": constant,
        "histogram": [
            {"passes": int(value), "tokens": int(count)} for value, count in zip(values, counts, strict=True)
        ],
    }
    if not constant:
        losses = {"read": read, "predicted": predicted}
        stats["surprise"] = {name: against(passes_T, np.asarray(nll, np.float64)) for name, nll in losses.items()}
        stats["classes"] = _groups(passes_T, word_classes(tokens), CLASSES)
        stats["frequency"] = _groups(passes_T, _bands(ranks), _band_names())
    return stats


def against(passes_T: np.ndarray, nll_T: np.ndarray) -> dict[str, Any]:
    """Correlation of passes with loss.

    The 95 % intervals come from a bootstrap over blocks of 64 consecutive tokens. Resampling single tokens would give
    intervals that are too narrow, because neighbouring tokens are correlated. Ranks are computed once, over the sample.

    Args:
        passes_T: passes of each token, not all equal.
        nll_T: negative log-likelihood of each token, in nats.

    Returns:
        ``deciles``: ten equal parts of the tokens by loss (fewer if there are fewer tokens), each with its mean ``nll``
        and ``passes``; ``pearson`` and ``spearman``, each with ``value``, ``low`` and ``high``. ``value`` is `None` if
        the loss is constant; ``low`` and ``high`` are `None` if there is only one block.

    Example:
        >>> result = against(np.array([1.0, 1.0, 2.0, 3.0]), np.array([0.1, 0.2, 0.5, 2.0]))
        >>> f"{result['spearman']['value']:.3f}", result["spearman"]["low"], result["deciles"][-1]
        ('0.949', None, {'nll': 2.0, 'passes': 3.0})
    """
    order_T = np.argsort(nll_T, kind="stable")
    parts = np.array_split(order_T, min(PARTS, len(order_T)))
    return {
        "deciles": [{"nll": float(nll_T[part].mean()), "passes": float(passes_T[part].mean())} for part in parts],
        "pearson": _correlation(passes_T, nll_T),
        "spearman": _correlation(_ranked(passes_T), _ranked(nll_T)),
    }


def word_classes(tokens: Sequence[str]) -> list[str]:
    """The word class of each token, from its first character that is not whitespace.

    Example:
        >>> word_classes(["\\n", "Hip", "po", " sat", ",", " 19", "x", ""])
        ['whitespace', 'start of a word', 'inside a word', 'start of a word', 'punctuation', 'digits', 'inside a word', 'other']
    """
    classes, in_word = [], False
    for token in tokens:
        rest = token.lstrip()
        in_word = in_word and rest == token
        if not rest:
            classes.append("whitespace" if token else "other")
        elif rest[0].isalpha():
            classes.append("inside a word" if in_word else "start of a word")
        else:
            classes.append("digits" if rest[0].isdigit() else "punctuation")
        in_word = in_word if not token else token[-1].isalnum()  # a part of a character does not end a word
    return classes


def _correlation(x_T: np.ndarray, y_T: np.ndarray) -> dict[str, float | None]:
    """Pearson's correlation with a block-bootstrap interval, computed from block sums so that resampling is cheap."""
    x_T, y_T = x_T - x_T.mean(), y_T - y_T.mean()
    terms_6T = np.stack([np.ones_like(x_T), x_T, y_T, x_T * x_T, y_T * y_T, x_T * y_T])
    sums_K6 = np.add.reduceat(terms_6T, np.arange(0, len(x_T), BLOCK), axis=1).T
    whole = _from_sums(sums_K6.sum(0))
    blocks = len(sums_K6)
    if blocks < 2 or np.isnan(whole):
        return {"value": None if np.isnan(whole) else float(whole), "low": None, "high": None}
    times_RK = np.random.default_rng(0).multinomial(blocks, np.full(blocks, 1 / blocks), RESAMPLES)
    low, high = np.nanquantile(_from_sums((times_RK @ sums_K6).T), [0.025, 0.975])
    return {"value": float(whole), "low": float(low), "high": float(high)}


def _from_sums(sums: np.ndarray) -> np.ndarray:
    """Pearson's correlation from n and the sums of x, y, xx, yy, xy; NaN if x or y is constant."""
    n, x, y, xx, yy, xy = sums
    x_variance, y_variance = xx / n - (x / n) ** 2, yy / n - (y / n) ** 2
    vary = (x_variance > 1e-12 * xx / n) & (y_variance > 1e-12 * yy / n)  # anything smaller is rounding error
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(vary, (xy / n - x * y / n**2) / np.sqrt(x_variance * y_variance), np.nan)


def _ranked(values_T: np.ndarray) -> np.ndarray:
    """The rank of each value; equal values get their mean rank."""
    _, which_T, counts = np.unique(values_T, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return ((ends - counts + ends + 1) / 2)[which_T]


def _bands(ranks: Sequence[int] | np.ndarray) -> list[str]:
    names = _band_names()
    return [names[index] for index in np.searchsorted(BANDS, np.asarray(ranks))]


def _band_names() -> list[str]:
    starts = [1, *(end + 1 for end in BANDS)]
    return [*(f"{start}–{end}" for start, end in zip(starts, BANDS, strict=False)), f"over {BANDS[-1]}"]


def _groups(passes_T: np.ndarray, names: Sequence[str], order: Sequence[str]) -> list[dict[str, Any]]:
    """The mean number of passes of each group that has tokens."""
    names_T = np.array(names)
    members = ((name, passes_T[names_T == name]) for name in order)
    return [{"name": name, "tokens": len(own), "passes": float(own.mean())} for name, own in members if len(own)]
