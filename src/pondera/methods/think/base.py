"""Base class of think methods, which decide how much compute each token gets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from pondera.methods.think.common.halting import Halting, continue_prob_for
from pondera.models.method import Method, MethodOutput, TokenBatch

__all__ = ["Think", "MethodOutput", "TokenBatch"]


class Think(Method):
    """Base class of methods that choose the number of passes per token and run them.

    A think method must satisfy the contract of `Method`. The contract tests check every file of this folder.
    """

    interleaved: ClassVar[bool] = False
    """True if the slots of a token are adjacent in causal order; sliding windows then grow with the slots per token."""

    adaptive: bool = False
    """True if the number of passes differs between tokens; cost estimates then need the measured shares."""

    needs_vocabulary: str = ""
    """What the method does with token embeddings or with logits of tokens; empty if nothing. Layers whose inputs are not
    tokens (`Backbone.more_layers`) have neither, so a method that needs them is refused there."""

    packed: bool = True
    """True: gather the active tokens and run only those. False: run all tokens and mask (reference implementation)."""

    def slots(self, tokens: int, shares: Sequence[float] | None = None) -> float:
        """See `Method.slots`: with interleaved slots, a smaller budget leaves out the last slots of all tokens."""
        return tokens * (sum(shares) if shares and self.interleaved else self.slots_per_token)

    def random_control(self, passes: float) -> Method | None:
        """See `Method.random_control`; the probability to continue has four digits, as a spec string is to be read."""
        halting: Halting | None = getattr(self, "halting", None)
        if halting is None or not halting.learned or not self.adaptive:
            return None
        continue_prob = round(continue_prob_for(passes, self.slots_per_token - 1), 4)
        return type(self)(**{**self._given, "halting": "random", "continue_prob": continue_prob})
