"""Heatmaps of text, shaded by passes or loss per token, for a terminal and for HTML.

Tokens come from a model and are not trusted: control characters and characters that reorder text are printed as escapes
(``\\x1b``).
"""

from __future__ import annotations

import html
import itertools
from collections import Counter
from collections.abc import Sequence

from pondera.core.escape import escape

SHADES = (231, 195, 153, 117, 75, 33, 26, 19)  # xterm's 256 colours, white to dark blue
SUPERSCRIPTS = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")


def shade_terminal(
    tokens: Sequence[str],
    passes: Sequence[float],
    low: float | None = None,
    high: float | None = None,
    color: bool = True,
) -> str:
    """Terminal text in which tokens with more passes are darker.

    Args:
        tokens: the text of each token.
        passes: the passes of each token.
        low: the value of the lightest shade (default: `None`, the minimum of `passes`).
        high: the value of the darkest shade (default: `None`, the maximum of `passes`).
        color: use 256-colour backgrounds; if false, tokens are marked with their passes unless they have the most common
            number.

    Returns:
        The text, and a legend on the last line.

    Raises:
        ValueError: `tokens` and `passes` differ in length.

    Example:
        >>> print(shade_terminal(["The", " cat", " sat"], [1, 3, 1], color=False))
        The cat³ sat
        passes per token: 1 if unmarked
    """
    if len(tokens) != len(passes):
        raise ValueError(f"{len(tokens)} tokens but {len(passes)} counts of passes")
    if not tokens:
        return ""
    low, high = min(passes) if low is None else low, max(passes) if high is None else high
    if max(passes) == min(passes):
        return f"{''.join(map(escape, tokens))}\nevery token took {_count(passes[0])}"
    if not color:
        usual = Counter(map(_number, passes)).most_common(1)[0][0]
        marked = (_marked(escape(token), _number(value), usual) for token, value in zip(tokens, passes, strict=True))
        return f"{''.join(marked)}\npasses per token: {usual} if unmarked"
    pieces = (_painted(escape(token), _share(value, low, high)) for token, value in zip(tokens, passes, strict=True))
    steps = [low + (high - low) * index / (len(SHADES) - 1) for index in range(len(SHADES))]
    legend = "".join(_painted(f" {_number(value)} ", _share(value, low, high)) for value in steps)
    return f"{''.join(pieces)}\npasses per token: {legend}"


def shade_html(tokens: Sequence[str], passes: Sequence[float | None], nll: Sequence[float | None] = ()) -> str:
    """Escaped HTML spans with the shades `--passes` and `--nll` from 0 (light) to 1 (dark); the page's CSS colours them.

    Args:
        tokens: the text of each token.
        passes: the passes of each token; `None` if unknown.
        nll: the negative log-likelihood of each token in nats; `None` if unknown; may be shorter than `tokens`.

    Example:
        >>> shade_html(["<b>"], [1])
        '<span style="--passes:0;--nll:0" title="1 pass">&lt;b&gt;</span>'
    """
    passes_range, nll_range = _range(passes), _range(nll)
    spans = []
    for token, count, loss in itertools.islice(itertools.zip_longest(tokens, passes, nll), len(tokens)):
        title = [] if count is None else [_count(count)]
        title += [] if loss is None else [f"{loss:.2f} nats"]
        style = f"--passes:{_share(count, *passes_range):.3g};--nll:{_share(loss, *nll_range):.3g}"
        spans.append(f'<span style="{style}" title="{", ".join(title)}">{html.escape(escape(token))}</span>')
    return "".join(spans)


def _range(values: Sequence[float | None]) -> tuple[float, float]:
    known = [value for value in values if value is not None]
    return (min(known), max(known)) if known else (0.0, 0.0)


def _share(value: float | None, low: float, high: float) -> float:
    """The position of `value` between `low` (0) and `high` (1)."""
    return 0.0 if value is None or high <= low else min(1.0, max(0.0, (value - low) / (high - low)))


def _number(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _count(value: float) -> str:
    return f"{_number(value)} pass" + ("" if value == 1 else "es")


def _painted(text: str, share: float) -> str:
    index = round(share * (len(SHADES) - 1))
    start = f"\x1b[48;5;{SHADES[index]};38;5;{16 if index < len(SHADES) // 2 + 1 else 231}m"
    return "\n".join(f"{start}{line}\x1b[0m" if line else "" for line in text.split("\n"))


def _marked(text: str, count: str, usual: str) -> str:
    if count == usual:
        return text
    mark = count.translate(SUPERSCRIPTS) if count.isdigit() else f"[{count}]"
    body = text.removesuffix("\n")
    return body + mark + text[len(body) :]
