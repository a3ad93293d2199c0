"""Columns: the token of each KV slot, of one sequence in the order of writing, or of a batch at one depth.

Shapes: B batch, C columns of one sequence or one depth, s queries of one sequence.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from pondera.cache.state import BatchState

FREE = -1
"""Token index of an empty column."""

Attend = Literal["all_shallower", "same_depth", "causal"]
"""The columns that a query at depth d sees. "all_shallower": of its own and earlier tokens, the columns of depths 0 to d.
"same_depth": of its own and earlier tokens, the column at depth d, or the deepest one of a token that halted earlier.
"causal": its own column and all columns that were written before it."""


@dataclass
class Columns:
    """The token, depth, position and key bias of each column of one sequence.

    Args:
        token_C: the index of the token in its batch row, padding counted.
        depth_C: the index of the pass that wrote the column.
        position_C: the position id of the token.
        log_weight_C: key bias, added to the attention scores of the column; 0 for most methods.
    """

    token_C: Tensor
    depth_C: Tensor
    position_C: Tensor
    log_weight_C: Tensor

    @classmethod
    def none(cls, device: torch.device) -> Columns:
        """No columns."""
        empty = torch.zeros(0, dtype=torch.long, device=device)
        return cls(empty, empty, empty, torch.zeros(0, device=device))

    def joined(self, other: Columns) -> Columns:
        """These columns, followed by those of `other`."""
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return Columns(*(torch.cat(pair) for pair in pairs))

    def at(self, keep_C: Tensor) -> Columns:
        """The columns where `keep_C` is true."""
        return Columns(*(value[keep_C] for value in vars(self).values()))

    def visible(self, new: int, attend: Attend) -> Tensor:
        """``[s, C]``: the columns that the queries of the last `new` columns see."""
        depth_s, before_sC = self.depth_C[-new:, None], self.token_C <= self.token_C[-new:, None]
        if attend == "causal":
            order_C = torch.arange(len(self.token_C), device=depth_s.device)
            return order_C <= order_C[-new:, None]
        if attend == "all_shallower":
            return before_sC & (self.depth_C <= depth_s)
        return before_sC & (self.depth_C == torch.minimum(self._deepest(), depth_s))

    def _deepest(self) -> Tensor:
        """``[C]``: the depth of the deepest column of each column's token."""
        deepest = self.depth_C.new_zeros(int(self.token_C.max()) + 1)
        return deepest.scatter_reduce(0, self.token_C, self.depth_C, "amax")[self.token_C]


@dataclass
class DepthSlots(BatchState):
    """The token and the key bias of each column of one depth.

    Args:
        token_BC: the index of the token in its batch row (padding counts), or `FREE`.
        log_weight_BC: added to the attention scores of each column; default: `None`, nothing is added.
        next_B: for each batch row, the column after its last slot.
    """

    token_BC: Tensor
    log_weight_BC: Tensor | None = None
    next_B: Tensor = field(init=False)

    def __post_init__(self) -> None:
        # One additional column, so that the maximum is defined if there is no column.
        order_C = torch.arange(self.token_BC.shape[1] + 1, device=self.token_BC.device)
        self.next_B = torch.where(F.pad(self.token_BC, (1, 0), value=FREE) >= 0, order_C, 0).amax(-1)

    def joined(self, other: DepthSlots) -> DepthSlots:
        """These columns, followed by those of `other`."""
        weights = [slots.log_weight_BC for slots in (self, other) if slots.log_weight_BC is not None]
        token_BC = torch.cat([self.token_BC, other.token_BC], dim=1)
        return DepthSlots(token_BC, torch.cat(weights, dim=1) if weights else None)

    def before(self, token: int) -> DepthSlots:
        """The columns of tokens before this index."""
        token_BC = torch.where(self.token_BC < token, self.token_BC, FREE)
        width = int(DepthSlots(token_BC).next_B.amax()) if token_BC.numel() else 0
        return DepthSlots(token_BC[:, :width], None if self.log_weight_BC is None else self.log_weight_BC[:, :width])
