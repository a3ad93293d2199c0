"""Cache for segment-level recurrence, for batches whose sequences are at different positions in their blocks.

When a sequence continues after a full block, the cache closes the block: the method computes the memory slots and the
local context from it. The cache keeps the closed block and the earlier state until the next block closes, so that
tokens can be rolled back across one block boundary. None of this grows with the sequence.

Shapes: B sequences, A active sequences of a call, S tokens of a call, L block, K columns of a call, W columns recorded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from pondera.cache.masks import SlotMask
from pondera.cache.token_cache import TokenCache
from pondera.core.errors import UserError
from pondera.methods.memory.common.segment_layer import SegmentEnd, SegmentLayer, SegmentStep
from pondera.models.backbone import Backbone
from pondera.models.rotary import Rotary


class SegmentCache(TokenCache):
    """A token cache for `generate` that stores at most one open block of KV slots and the state of closed blocks.

    Args:
        block: L.
        kinds: type of each layer, see `Backbone.layer_types`.
        layers: one cache layer per decoder layer.
        rows: maps the number of closed blocks of a sequence to its number of memory slots.
        tbptt: gradients are cut at every `tbptt`-th block boundary; ``None``: never.
        keeps: keep the previous state, for rollback across a block boundary.

    Attributes:
        fill: tokens in the open block of each sequence.
        closed: closed blocks of each sequence.
    """

    holds: ClassVar[tuple[str, ...]] = (*TokenCache.holds, "_real_BW")
    by_row: ClassVar[tuple[str, ...]] = ("fill", "closed", "_reopens")

    def __init__(
        self,
        block: int,
        kinds: list[str],
        layers: list[SegmentLayer],
        rows: Callable[[int], int],
        tbptt: int | None,
        keeps: bool = True,
    ) -> None:
        super().__init__(layers, 1)
        self.block, self.kinds, self.rows, self.tbptt, self.keeps = block, kinds, rows, tbptt, keeps

    def clear(self) -> None:
        """See `CacheState.clear`."""
        super().clear()
        self.fill: list[int] = []
        self.closed: list[int] = []
        self._reopens: list[bool] = []
        self._real_BW: Tensor | None = None

    def start(self, batch: int) -> None:
        """Initializes the cache for a batch of this size, if it is empty."""
        if not self.fill:
            self.fill, self.closed, self._reopens = [0] * batch, [0] * batch, [False] * batch

    def room(self, sequence: int) -> int:
        """Number of tokens that the sequence can read before the next block boundary."""
        return self.block - self.fill[sequence] % self.block

    @property
    def even(self) -> bool:
        """True if all sequences are at the same position."""
        return len(set(self.fill)) < 2 and len(set(self.closed)) < 2

    def begin(self, backbone: Backbone, counts: list[int], h_BTD: Tensor) -> SegmentStep:
        """Prepares a call that adds tokens to each sequence, from zero up to its next block boundary.

        Args:
            backbone: provides rotary embeddings.
            counts: number of new tokens of each sequence.
            h_BTD: inputs, for their dtype and device.
        """
        active = [sequence for sequence, count in enumerate(counts) if count]
        self._close(backbone, [sequence for sequence in active if self.fill[sequence] == self.block], h_BTD)
        fill, count = [self.fill[sequence] for sequence in active], [counts[sequence] for sequence in active]
        together = len(active) == len(counts) and self.even and len(set(count)) == 1
        for sequence in active:
            self.fill[sequence] += counts[sequence]
        width = max(self.fill)
        sequences = None if together else torch.tensor(active, device=h_BTD.device)
        turn = SegmentStep(fill, count, width, len(counts), sequences)
        for layer in self._layers:
            layer.trim(fill[0] if together else width)
            layer.turn = turn
        return turn

    def _close(self, backbone: Backbone, sequences: list[int], h_BTD: Tensor) -> None:
        if not sequences:
            return
        device, blocks = h_BTD.device, [self.closed[sequence] for sequence in sequences]
        chosen = None if len(sequences) == len(self.fill) else torch.tensor(sequences, device=device)
        cut = [self.tbptt is not None and (count + 1) % self.tbptt == 0 for count in blocks]
        closings = {}
        for kind in set(self.kinds):

            def turned(first: int, stop: int, kind: str = kind) -> Rotary | None:
                return backbone.rotation(kind, torch.arange(first, stop, device=device)[None], h_BTD)

            own = turned(0, self.block)
            closings[kind] = SegmentEnd(
                chosen, len(self.fill), blocks, cut, self.keeps, own, lambda width, turned=turned: turned(-width, 0)
            )
        for layer, kind in zip(self._layers, self.kinds, strict=True):
            layer.close(closings[kind])
        for sequence in sequences:
            self.closed[sequence] += 1
            self.fill[sequence], self._reopens[sequence] = 0, self.keeps

    def masks(self, turn: SegmentStep, device: torch.device) -> dict[str, SlotMask]:
        """The mask of each layer type: tokens attend to memory, local context, and their block causally."""
        position_AS = turn.positions(device)
        if turn.active_A is None:
            closed = self.closed[:1]
        else:
            closed = [self.closed[sequence] for sequence in turn.active_A.tolist()]
        masks = {}
        for kind in set(self.kinds):
            layers = [layer for layer, its in zip(self._layers, self.kinds, strict=True) if its == kind]
            memory, mems = (max(width) for width in zip(*(layer.widths() for layer in layers), strict=True))
            order_K = torch.arange(-memory - mems, turn.width, device=device)
            own_A1 = torch.tensor([self.rows(count) for count in closed], device=device)[:, None]
            carried_A1 = torch.tensor([min(mems, count * self.block) for count in closed], device=device)[:, None]
            there_AK = torch.where(order_K < -mems, order_K >= -mems - own_A1, order_K >= -carried_A1)
            seen_ASK = (order_K <= position_AS[..., None]) & there_AK[:, None]
            masks[kind] = SlotMask(seen_ASK, position_AS, order_K[None])
        return masks

    @property
    def _layers(self) -> list[SegmentLayer]:
        return self.layers  # type: ignore[return-value]

    @property
    def mixed(self) -> bool:
        """True if layers of one type have different numbers of slots."""
        return any(
            len(
                {
                    layer.update_memory is None
                    for layer, its in zip(self._layers, self.kinds, strict=True)
                    if its == kind
                }
            )
            > 1
            for kind in set(self.kinds)
        )

    def note(self, passes_BT: Tensor, real_BT: Tensor | None) -> None:
        """Records new tokens, and which of them are padding."""
        batch, tokens = passes_BT.shape
        if real_BT is not None or self._real_BW is not None:
            new = torch.ones_like(passes_BT, dtype=torch.bool) if real_BT is None else real_BT
            old = self._real_BW if self._real_BW is not None else new.new_ones(batch, min(self.tokens, 2 * self.block))
            self._real_BW = torch.cat([old, new], dim=1)[:, -2 * self.block :]
        self.tokens += tokens
        self.passes_BT = passes_BT.new_ones(()).expand(batch, self.tokens)  # one stored number for any length

    def rollback(self, tokens: int) -> None:
        """See `CacheState.rollback`; rolls back at most across one block boundary.

        Raises:
            UserError: more tokens than can be rolled back.
        """
        count = self.tokens - tokens
        if not count:
            return
        counts = [count] * len(self.fill)
        if self._real_BW is not None and count <= self._real_BW.shape[1]:
            counts = self._real_BW[:, -count:].sum(-1).tolist()
        kept = [have + self.block * reopens for have, reopens in zip(self.fill, self._reopens, strict=True)]
        if any(more > most for more, most in zip(counts, kept, strict=True)):
            raise UserError(
                f"crop: cannot roll back {count} tokens; keys and values are kept for {min(kept)}: those of the open "
                f"block and of the one before (block={self.block}); start with a new cache"
            )
        back = [sequence for sequence, more in enumerate(counts) if more > self.fill[sequence]]
        if back:
            device = next(iter(self._layers[0].before.values())).device
            chosen = None if len(back) == len(counts) else torch.tensor(back, device=device)
            for layer in self._layers:
                layer.reopen(chosen, len(counts))
            for sequence in back:
                self.fill[sequence] += self.block
                self.closed[sequence] -= 1
                self._reopens[sequence] = False
        self.fill = [have - more for have, more in zip(self.fill, counts, strict=True)]
        for layer in self._layers:
            layer.trim(max(self.fill))
        if self._real_BW is not None:
            self._real_BW = self._real_BW[:, :-count]
