"""PyramidKV: larger budgets for earlier layers.

Shapes: none.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar

from pondera.core.errors import UserError
from pondera.methods.kv_cache.base import KVCacheMethod
from pondera.methods.kv_cache.common.budget import SlotBudget
from pondera.methods.kv_cache.common.policy import BudgetedPolicy, Policy
from pondera.methods.kv_cache.common.wrapper import PolicyWrapper
from pondera.methods.kv_cache.snap_kv import SnapKV


@dataclass(frozen=True)
class FallingBudget(SlotBudget):
    """A budget that falls linearly from the first compressed layer to the last, with the same sum over all layers.

    Args:
        beta: the part of the budget above `least` in the last layer is that of the mean, divided by `beta`.

    Example:
        >>> [FallingBudget(100, least=20, beta=20).slots(layer, [0], 1000, 512, 3)[0] for layer in range(3)]
        [176, 100, 24]
    """

    beta: float = 20

    def slots(self, layer: int, heads: list[int], tokens: int, slot_bytes: int, layers: int) -> list[int]:
        """See `SlotBudget.slots`. No layer gets more than all tokens where their number is known; the last gets the rest."""
        found = []
        for even in super().slots(layer, heads, tokens, slot_bytes, layers):
            above = even - self.least
            last = above / self.beta
            if tokens and 2 * above - last > tokens - self.least:
                last = max(2 * above - (tokens - self.least), 0)
            part = layer / (layers - 1) if layers > 1 else 0.5
            found.append(self.least + int((2 * above - last) * (1 - part) + last * part + 1e-9))
        return found


class PyramidKV(PolicyWrapper):
    """Budgets that fall linearly over the layers, around any policy with a budget; the mean stays that of the policy.

    Earlier layers spread their attention over the whole context, and later ones gather it in few tokens.

    Source: Cai et al., PyramidKV, arXiv 2406.02069.
    Cost: as the policy's; a budget of numbers or bytes has the same sum over layers, up to rounding down.
    When not to use it: on models with few layers, or whose attention is not narrower in later layers; around `KVzip`,
    which distributes the budget by score.
    Resolved: with b = budget - protected tokens, as in the authors' code, the last layer gets b / beta, the first
    2 b - b / beta, and those between lie on a line; all keep the protected tokens (sinks, and recent tokens or the window)
    in addition. With a share, no layer gets more tokens than there are, and the last layer gets what the first cannot use.

    Args:
        policy: a policy with one budget for all layers, or a wrapper around it; default: ``SnapKV()``.
        beta: the last layer gets this fraction (1 / beta) of the mean; 1 is the policy alone.

    Example:
        >>> PyramidKV(SnapKV(512, window=32), beta=10).observation_window
        32
    """

    paper: ClassVar[str] = "PyramidKV, arXiv 2406.02069"
    cost: ClassVar[str] = "the policy's KV slots, more of them in earlier layers"
    examples: ClassVar[dict[str, str]] = {
        "exact": "PyramidKV(SnapKV(64, window=4), beta=1)",
        "tight": "PyramidKV(SnapKV(5, window=3, kernel=3), beta=4)",
        "exact-adaptive": "PyramidKV(AdaKV(SnapKV(64, window=4)), beta=1)",
        "tight-adaptive": "PyramidKV(AdaKV(SnapKV(5, window=3, kernel=3), safeguard=0.3), beta=4)",
        "exact-decoding": "PyramidKV(H2O(1.0))",
        "tight-decoding": "PyramidKV(H2O(5, recent=2))",
    }

    def __init__(self, policy: KVCacheMethod | None = None, beta: float = 20) -> None:
        policy = SnapKV() if policy is None else copy.deepcopy(policy)
        inner = policy
        while isinstance(inner, PolicyWrapper):
            inner = inner.policy
        if (
            not isinstance(policy, Policy)
            or not isinstance(inner, BudgetedPolicy)
            or isinstance(inner.budget, FallingBudget)
            or isinstance(inner.budget.amount, list)
        ):
            raise UserError(
                f"PyramidKV({type(policy).__name__}(...)): give a policy with one budget for all layers, "
                "e.g. PyramidKV(SnapKV(512))"
            )
        if not 1 <= beta < float("inf"):
            raise UserError(f"beta={beta}: give 1 or more; the last layer gets 1 / beta of the mean budget")
        inner.budget = FallingBudget(inner.budget.amount, inner.budget.least, beta)
        super().__init__(policy)
        self.beta = beta
