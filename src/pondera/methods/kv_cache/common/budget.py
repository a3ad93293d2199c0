"""Budgets of KV slots: a number of tokens, a share or bytes; for all layers and heads or for each."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pondera.core.errors import UserError

Amount = int | float | str
UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_BYTES = re.compile(r"\s*([0-9.]+)\s*(" + "|".join(UNITS) + r")\s*")


@dataclass(frozen=True)
class SlotBudget:
    """KV slots per layer and KV head.

    Args:
        amount: a number of tokens (an integer), a share of the tokens seen (a float, 0 < share <= 1), or bytes of a
            sequence over all compressed layers (``"64MiB"``); a list has one amount per compressed layer, and a list of
            lists one per KV head of each layer.
        least: minimum number of slots, for sinks and recent tokens.

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
                f"budget={amount}: what is always kept (sinks, and recent tokens or the observation window) alone needs "
                f"{self.least} slots; give at least {self.least}, or a smaller sinks, recent or window"
            )

    @property
    def by_head(self) -> bool:
        """Whether the heads of a layer have budgets of their own."""
        return isinstance(self.amount, (list, tuple)) and any(isinstance(part, (list, tuple)) for part in self.amount)

    @cached_property
    def relative(self) -> bool:
        """Whether the number of slots depends on the number of tokens seen."""
        return any(isinstance(amount, float) for amount in _leaves(self.amount))

    def check(self, layers: int, heads: int) -> None:
        """Raises if a list has the wrong length.

        Args:
            layers: number of compressed layers of the model.
            heads: number of KV heads of each.
        """
        if not isinstance(self.amount, (list, tuple)):
            return
        if len(self.amount) != layers:
            raise UserError(
                f"budget: the list has length {len(self.amount)}, but {layers} layers are compressed; give {layers}"
            )
        for part in self.amount:
            if isinstance(part, (list, tuple)) and len(part) != heads:
                raise UserError(
                    f"budget: {part} has length {len(part)}, but layers have {heads} KV heads; give {heads}"
                )

    def slots(self, layer: int, heads: list[int], tokens: int, slot_bytes: int, layers: int) -> list[int]:
        """The KV slots of these heads of a layer.

        Args:
            layer: index among the compressed layers.
            heads: KV heads.
            tokens: number of tokens seen, without padding; shares refer to it.
            slot_bytes: bytes of one KV slot of one head.
            layers: number of compressed layers.
        """
        of_layer = self.amount[layer] if isinstance(self.amount, (list, tuple)) else self.amount
        if isinstance(of_layer, int):  # the common case, which runs per token and layer
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
