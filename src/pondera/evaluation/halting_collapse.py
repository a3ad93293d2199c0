"""Notices a learned halting rule that decides nothing, because all tokens take the same number of passes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pondera.core import spec
from pondera.core.errors import UserError

if TYPE_CHECKING:
    from pondera.models.adaptive_lm import AdaptiveLM

FEW = 0.001
"""A further pass is decided for no token if at most this share takes it, and for every token if at most this share does not."""
COSTS = ("penalty", "ponder_cost", "threshold")
"""Arguments of think methods that take passes away when they are raised; the first one that a method has is advised."""


def halting_rule(model: AdaptiveLM) -> str | None:
    """The name of the learned rule by which tokens halt; `None` if the passes are fixed, or a control decides."""
    think = model.think
    if think is None or not think.adaptive:
        return None
    halting = getattr(think, "halting", None)
    if halting is None:
        return "its own rule"
    return halting.kind if halting.learned else None


def halting_collapse(result: Mapping[str, Any], think: str | None) -> str | None:
    """A sentence that says that the halting rule of a run decides nothing, and what to change; `None` if it decides.

    Args:
        result: the result of the run: its ``halting_rule``, and ``pass_shares``, the share of the tokens that took each pass.
        think: the spec string of its think method.

    Example:
        >>> collapsed = {"halting_rule": "router", "pass_shares": [1.0, 0.0002, 0.0]}
        >>> halting_collapse(collapsed, "AdaptiveLatentCoT(steps=2, halting='router')")
        'halting by router gives every token 1 pass: it decides nothing; lower the penalty of AdaptiveLatentCoT'
        >>> halting_collapse({"halting_rule": "router", "pass_shares": [1.0, 0.4, 0.0]}, None) is None
        True
    """
    rule, shares = result.get("halting_rule"), result.get("pass_shares")
    if not rule or not isinstance(shares, list) or not all(isinstance(share, (int, float)) for share in shares):
        return None
    if len(shares) < 2 or any(FEW < share < 1 - FEW for share in shares):
        return None
    count = sum(share > 0.5 for share in shares)
    change = "lower" if count == 1 else "raise" if count == len(shares) else "change"
    taken = f"{count} {'pass' if count == 1 else 'passes'}"
    return f"halting by {rule} gives every token {taken}: it decides nothing; {change} the {_cost_of(think)}"


def _cost_of(think: str | None) -> str:
    """The argument of a think method to change, with the name of the method."""
    try:
        info = spec.find(spec.parse(think or "").name, "think")
    except UserError:  # a method of the user that is not here now
        return "weight of its penalty"
    argument = next((name for name in COSTS if f"{name}:" in info.signature), "weight of its penalty")
    return f"{argument} of {info.name}"
