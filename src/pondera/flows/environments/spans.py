"""Short strings that are made of spans. Shapes: B states, L letters at most, C = L + 1 columns (the last: stopped)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from pondera.core.errors import UserError
from pondera.flows.environments.base import Environment, whole

SPANS = ("a", "b", "ab", "ba", "aab")


class Spans(Environment):
    """Appends spans to a string until it stops; a string can have been made in several ways, of different lengths.

    R(x) = exp(weight · places where the letter changes). The environment is not graded: it is the smallest one in which α
    changes what is drawn, and in which a wrong backward policy is found out. Stopping is an action.

    Source: made here, as a toy of text that is generated in spans (FoSS).
    Resolved: the modes are the strings with at most one change less than the most.

    Args:
        spans: the spans, different from each other; their letters are those of the strings.
        longest: letters at most.
        weight: log reward per change.

    Example:
        >>> env = Spans()
        >>> env.count_states(), env.count_modes()
        (254, 14)
    """

    paper: ClassVar[str] = "a toy, made here"
    examples: ClassVar[dict[str, str]] = {"small": "Spans(('a', 'b', 'ab'), longest=3)"}
    why_graded: ClassVar[str] = "a string can be made of few long or many short spans"

    def __init__(self, spans: tuple = SPANS, longest: int = 6, weight: float = 0.5) -> None:
        if not spans or not all(isinstance(span, str) and span for span in spans) or len(set(spans)) < len(spans):
            raise UserError(f"spans={spans!r}: give different texts, none of them empty, e.g. ('a', 'b', 'ab')")
        letters = sorted(set("".join(spans)))
        if missing := set(letters) - set(spans):
            raise UserError(f"spans={spans!r}: every letter must be a span, too; {', '.join(sorted(missing))} is not")
        self.letters, self.spans, self.length = letters, spans, whole("longest", longest, 1, 100)
        if not -100 <= weight <= 100:
            raise UserError(f"weight={weight}: give a number from -100 to 100")
        self.weight = weight
        self.radices, self.actions = (*(len(letters) + 1,) * longest, 2), len(spans) + 1
        self.graded, self.longest = False, longest + 1
        ids = [[letters.index(letter) + 1 for letter in span] for span in spans]
        self._size_A = torch.tensor([len(span) for span in ids])
        most = min(longest, int(self._size_A.max()))
        self._most = most
        self._span_AP = torch.tensor([(span + [0] * most)[:most] for span in ids])

    def forward_mask(self, state_BC: Tensor) -> Tensor:
        """Spans that fit, and stopping, unless stopped."""
        fits = self._filled(state_BC)[:, None] + self._size_A <= self.length
        return torch.nn.functional.pad(fits, (0, 1), value=True) & (state_BC[:, -1:] == 0)

    def backward_mask(self, state_BC: Tensor) -> Tensor:
        """Stopping if stopped; otherwise the spans with which the string ends."""
        stopped, filled = state_BC[:, -1:] == 1, self._filled(state_BC)
        found = []
        for span, size in zip(self._span_AP, self._size_A.tolist(), strict=True):
            if size > self.length:
                found.append(torch.zeros_like(filled, dtype=torch.bool))
                continue
            place = (filled[:, None] - size + torch.arange(size)).clamp_min(0)
            found.append((state_BC.gather(1, place) == span[:size]).all(1) & (filled >= size))
        return torch.cat([torch.stack(found, 1) & ~stopped, stopped], 1)

    def step(self, state_BC: Tensor, action_B: Tensor) -> Tensor:
        """Appends a span, or stops."""
        return self._written(state_BC, action_B, self._filled(state_BC), 1)

    def undo(self, state_BC: Tensor, action_B: Tensor) -> Tensor:
        """Removes a span from the end, or is not stopped."""
        span_B = action_B.clamp_max(len(self.spans) - 1)
        return self._written(state_BC, action_B, self._filled(state_BC) - self._size_A[span_B], 0)

    def finished(self, state_BC: Tensor) -> Tensor:
        """Whether the string has stopped."""
        return state_BC[:, -1] == 1

    def log_partial(self, state_BC: Tensor) -> Tensor:
        """The number of changes, times the weight."""
        return self.weight * self._changes(state_BC).double()

    def is_mode(self, state_BC: Tensor) -> Tensor:
        """Whether the string has the most changes, or one less."""
        return self._changes(state_BC) >= self.length - 2

    def remaining(self, state_BC: Tensor) -> Tensor:
        """Letters that can be appended one by one, and the stop."""
        return (self.length - self._filled(state_BC) + 1) * (1 - state_BC[:, -1])

    def count_states(self) -> int:
        """Strings up to the longest, stopped or not."""
        return 2 * sum(len(self.letters) ** length for length in range(self.length + 1))

    def count_modes(self) -> int | None:
        """Strings with the most changes, or one less."""
        many, most = len(self.letters), self.length - 1
        full = many * (many - 1) ** most
        # One change less: one of the letters repeats the one before, or the string is a letter shorter.
        one_less = many * (many - 1) ** (most - 1) * (most + 1) if most >= 1 else 1
        return full + one_less

    def uniform(self, count: int, generator: torch.Generator) -> Tensor:
        """Random strings: a random length, then random letters."""
        filled = torch.randint(self.length + 1, (count, 1), generator=generator)
        letter = 1 + torch.randint(len(self.letters), (count, self.length), generator=generator)
        kept = torch.where(torch.arange(self.length) < filled, letter, 0)
        return torch.nn.functional.pad(kept, (0, 1), value=1)

    def text(self, state_BC: Tensor) -> list[str]:
        """The strings."""
        return ["".join(self.letters[one - 1] for one in row if one) for row in state_BC[:, :-1].tolist()]

    def _filled(self, state_BC: Tensor) -> Tensor:
        return (state_BC[:, :-1] > 0).sum(1)

    def _changes(self, state_BC: Tensor) -> Tensor:
        left, right = state_BC[:, :-2], state_BC[:, 1:-1]
        return ((left != right) & (right > 0)).sum(1)

    def _written(self, state_BC: Tensor, action_B: Tensor, at_B: Tensor, sign: int) -> Tensor:
        """Writes (`sign` 1) or empties (0) the letters of a span from a place on; stopping changes the last column only."""
        stop_B = action_B == len(self.spans)
        span_B = action_B.clamp_max(len(self.spans) - 1)
        place_BP = at_B[:, None] + torch.arange(self._most)
        inside_BP = (torch.arange(self._most) < self._size_A[span_B][:, None]) & ~stop_B[:, None]
        place_BP = torch.where(inside_BP, place_BP, self.length + 1)  # outside: a column that is cut off
        wide_BC = torch.nn.functional.pad(state_BC, (0, 1))
        wide_BC = wide_BC.scatter(1, place_BP, self._span_AP[span_B] * sign)[:, :-1]
        last_B = torch.where(stop_B, sign, state_BC[:, -1])
        return torch.cat([wide_BC[:, :-1], last_B[:, None]], 1)
