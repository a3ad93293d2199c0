"""How many tokens may be kept: as a number, a share, or bytes; for all layers and heads or for each."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from pondera.core.errors import UserError

Amount = int | float | str
UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_BYTES = re.compile(r"\s*([0-9.]+)\s*(" + "|".join(UNITS) + r")\s*")


@dataclass(frozen=True)
class SlotBudget:
    """Slots per layer and KV head.

    Args:
        amount: tokens (a whole number), a share of the tokens seen (0 < share <= 1, with a point), or bytes of a
            sequence over all compressed layers (``"64MiB"``); a list has one for each compressed layer, and a list of
            lists one for each KV head of each.
        least: what must fit in any case: sinks and recent tokens.

    Example:
        >>> [SlotBudget(amount).slots(0, [0, 1], 1000, 512, 4)[0] for amount in (128, 0.25, "1MiB")]
        [128, 250, 256]
    """

    amount: Any
    least: int = 1

    def __post_init__(self) -> None:
        for amount in _leaves(self.amount):
            self._check(amount)

    def _check(self, amount: Any) -> None:
        asked = "give tokens (512), a share of them (0.25) or bytes of a sequence ('64MiB')"
        if isinstance(amount, str):
            if not _BYTES.fullmatch(amount):
                raise UserError(f"budget={amount!r}: {asked}; units are {', '.join(UNITS)}")
        elif isinstance(amount, bool) or not isinstance(amount, (int, float)):
            raise UserError(f"budget={amount!r}: {asked}")
        elif isinstance(amount, float) and not 0 < amount <= 1:
            raise UserError(f"budget={amount!r}: a share is above 0 and at most 1; {asked}")
        elif isinstance(amount, int) and amount < self.least:
            raise UserError(
                f"budget={amount}: {self.least} slots are protected as sinks and recent tokens; give at least {self.least}, "
                "or protect fewer"
            )

    @property
    def by_head(self) -> bool:
        """Heads of a layer may have budgets of their own."""
        return isinstance(self.amount, (list, tuple)) and any(isinstance(part, (list, tuple)) for part in self.amount)

    def check(self, layers: int, heads: int) -> None:
        """Refuses lists of the wrong length.

        Args:
            layers: compressed layers of the model.
            heads: KV heads of each.
        """
        if not isinstance(self.amount, (list, tuple)):
            return
        if len(self.amount) != layers:
            raise UserError(
                f"budget: {len(self.amount)} layers are given, and {layers} are compressed; give one for each"
            )
        for part in self.amount:
            if isinstance(part, (list, tuple)) and len(part) != heads:
                raise UserError(f"budget: {part} has {len(part)} heads, and the layers have {heads}; give one for each")

    def slots(self, layer: int, heads: list[int], tokens: int, slot_bytes: int, layers: int) -> list[int]:
        """The slots of these heads of a layer.

        Args:
            layer: among the compressed ones.
            heads: KV heads.
            tokens: real tokens that were seen, for shares.
            slot_bytes: of one slot of one head.
            layers: compressed layers.
        """
        of_layer = self.amount[layer] if isinstance(self.amount, (list, tuple)) else self.amount
        if isinstance(of_layer, int):  # asked for every token and layer
            return [max(self.least, of_layer)] * len(heads)
        each = [of_layer[head] if isinstance(of_layer, (list, tuple)) else of_layer for head in heads]
        return [max(self.least, self._slots(amount, tokens, slot_bytes * len(heads) * layers)) for amount in each]

    @staticmethod
    def _slots(amount: Amount, tokens: int, token_bytes: int) -> int:
        if isinstance(amount, str):
            match = _BYTES.fullmatch(amount)
            assert match is not None
            return int(float(match[1]) * UNITS[match[2]] / token_bytes)
        return int(amount * tokens) if isinstance(amount, float) else amount


def _leaves(amount: Any) -> list[Any]:
    return [leaf for part in amount for leaf in _leaves(part)] if isinstance(amount, (list, tuple)) else [amount]
