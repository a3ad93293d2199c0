"""Successive passes over the new tokens, where each token may halt after any pass.

This module alone implements passes over a subset of tokens: it packs the active tokens, builds their masks and writes
the cache. A method decides which tokens continue and what their next input is.

Shapes: B batch, T new tokens, S tokens of a call in one sequence, N packed tokens, C columns of a depth, K columns
read, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, cast

import torch
import torch.distributed
from torch import Tensor

from pondera.cache.columns import FREE
from pondera.cache.compressed_slots import CompressedSlotCache
from pondera.cache.depth_cache import DepthCache, DepthWrite, slot_mask
from pondera.cache.masks import SlotMask, has_documents
from pondera.cache.packing import PackedRows
from pondera.cost.schedule import DecoderPass
from pondera.models.backbone import Backbone
from pondera.models.method import SlotMaker

Attend = Literal["all_shallower", "same_depth"]
SlotCache = DepthCache | CompressedSlotCache


def new_slot_cache(backbone: Backbone, slots_per_token: int, kv_cache: SlotMaker | None = None) -> SlotCache:
    """An empty cache for passes: one store per depth, or layers of a KV-cache method.

    Args:
        backbone: runs the passes.
        slots_per_token: the most slots that a token can have.
        kv_cache: the KV-cache method, or `None`.
    """
    if kv_cache is None:
        return DepthCache(backbone.config.num_hidden_layers, slots_per_token)
    windowed = [kind == "sliding_attention" for kind in backbone.layer_types]
    return kv_cache.slot_cache(backbone.lm, windowed, slots_per_token)


class Passes:
    """The passes of one call over T new tokens.

    Args:
        backbone: runs the passes.
        position_ids: ``[B or 1, T]`` token positions.
        cache: the earlier tokens; the slots of the new tokens are appended to it.
        mask: see `Think.forward`.
        tokens: T.
        attend: the visibility rule. ``"all_shallower"``: depth k attends to every slot of depths 0..k, and halted
            tokens have no slots at greater depths (two causal axes). ``"same_depth"``: depth k attends to depth k only,
            where halted tokens keep their last keys and values.
        packed: gather the active tokens and run only those. Otherwise run all tokens and mask the halted ones, which
            gives the same results (reference implementation for tests).
        chosen_BT: the passes that each token takes, whatever the method's rule says; ``None``: the rule decides.

    Attributes:
        active_BT: the active tokens; ``None``: all tokens.
        passes_BT: passes of each new token so far.
    """

    def __init__(
        self,
        backbone: Backbone,
        position_ids: Tensor,
        cache: SlotCache,
        mask: Tensor | None,
        tokens: int,
        attend: Attend = "all_shallower",
        packed: bool = True,
        chosen_BT: Tensor | None = None,
    ) -> None:
        self.backbone, self.position_ids, self.cache, self.attend, self.packed = (
            backbone,
            position_ids,
            cache,
            attend,
            packed,
        )
        self.tokens, self.total = tokens, cache.tokens + tokens
        self.mask_BK = None if mask is None else mask[:, : self.total].long()
        self._by_position = "sliding_attention" in backbone.layer_types
        self._plain_order = not has_documents(mask)
        self._deepest = self._depth = 0
        self._chosen_BT = chosen_BT
        self.active_BT: Tensor | None = None
        self.passes_BT = torch.zeros(0)

    def run_first(self, h_BTD: Tensor) -> Tensor:
        """Depth 0, which runs every token; returns final states ``[B, T, D]``."""
        self.passes_BT = torch.ones(h_BTD.shape[:2], dtype=torch.long, device=h_BTD.device)
        if isinstance(self.cache, CompressedSlotCache):
            return self._compressed(self.cache, 0, h_BTD, None)
        return self._dense(0, h_BTD, None)

    def mask_active(self, continue_BT: Tensor | None) -> bool:
        """Keeps only the given active tokens active, without padding; returns True if another pass is needed.

        With distributed training every process runs all passes, because sharded weights are gathered jointly. The
        reference implementation runs all passes too.

        Args:
            continue_BT: the tokens that continue; ``None``: all active tokens.
        """
        if self._chosen_BT is not None:
            continue_BT = self._chosen_BT > self._depth + 1
        if continue_BT is None:
            return True
        active_BT = continue_BT.expand_as(self.passes_BT)
        self.active_BT = self.real(active_BT if self.active_BT is None else active_BT & self.active_BT)
        number = int(self.active_BT.sum())
        if self.packed and number == self.active_BT.numel():
            self.active_BT = None  # all tokens are active, so an ordinary dense pass is enough
        together = torch.distributed.is_available() and torch.distributed.is_initialized()
        return number > 0 or together or not self.packed

    def run_pass(self, depth: int, x_BTD: Tensor, state_BTD: Tensor, everyone: bool = False) -> Tensor:
        """Runs one pass over the active tokens; the states of the other tokens do not change.

        Args:
            depth: 1, 2, ...
            x_BTD: inputs; those of halted tokens are ignored.
            state_BTD: the states so far.
            everyone: run the halted tokens too, on the keys and values of the active ones (costs a dense pass).
        """
        active_BT = self.active_BT
        self._deepest = depth
        self._depth = depth
        self.passes_BT = self.passes_BT + (1 if active_BT is None or everyone else active_BT.long())
        if isinstance(self.cache, CompressedSlotCache):
            new_BTD = self._compressed(self.cache, depth, x_BTD, active_BT)
            return new_BTD if active_BT is None else torch.where(active_BT[..., None], new_BTD, state_BTD)
        if active_BT is None:
            return self._dense(depth, x_BTD, None)
        if self.packed and not everyone:
            return self._packed(depth, x_BTD, active_BT, state_BTD)
        new_BTD = self._dense(depth, x_BTD, active_BT)
        return new_BTD if everyone else torch.where(active_BT[..., None], new_BTD, state_BTD)

    def finish(self) -> None:
        """Records the new tokens in the cache; depths that no token reached repeat the depth below."""
        if self.attend == "same_depth" and isinstance(self.cache, DepthCache):
            for depth in range(self._deepest + 1, len(self._depths.depths)):
                self._depths.repeat_below(depth, self.tokens)
                self._depths.append_metadata(depth, self._new_tokens(self.passes_BT.shape[0]))
        self.cache.record(self.passes_BT)

    def real(self, chosen_BT: Tensor) -> Tensor:
        """The mask without padding tokens."""
        return chosen_BT if self.mask_BK is None else chosen_BT & (self.mask_BK[:, -self.tokens :] > 0)

    def where_active(self, new_BT: Tensor, other: Tensor | float) -> Tensor:
        """`new_BT` at active tokens, `other` at halted tokens; ``[B, T]`` or ``[B, T, D]``."""
        if self.active_BT is None:
            return new_BT
        return torch.where(self.active_BT if new_BT.ndim == 2 else self.active_BT[..., None], new_BT, other)

    def of_active(self, run: Callable[[Tensor], Tensor], x_BTD: Tensor) -> Tensor:
        """Applies `run` to the active tokens only, ``[B, T, ...]``; zeros for the other tokens."""
        if self.active_BT is None or not self.packed:
            return self.where_active(run(x_BTD), 0)
        outputs = run(x_BTD[self.active_BT][None])
        zeros = outputs.new_zeros(*self.active_BT.shape, outputs.shape[-1])
        return zeros.index_put(self.active_BT.nonzero(as_tuple=True), outputs[0])

    @property
    def _depths(self) -> DepthCache:
        return cast(DepthCache, self.cache)

    def _reads(self, depth: int) -> range:
        return range(depth + 1) if self.attend == "all_shallower" else range(depth, depth + 1)

    def _new_tokens(self, batch: int) -> Tensor:
        order_T = torch.arange(self.cache.tokens, self.total, device=self.position_ids.device)
        return order_T.expand(batch, -1)

    def _compressed(self, cache: CompressedSlotCache, depth: int, x_BTD: Tensor, active_BT: Tensor | None) -> Tensor:
        """A pass of the active tokens, without padding, whose slots a KV-cache method keeps."""
        everyone_BT = torch.ones(x_BTD.shape[:2], dtype=torch.bool, device=x_BTD.device)
        wanted_BT = self.real(everyone_BT if active_BT is None else active_BT)
        position_BT = self.position_ids.expand(len(x_BTD), -1)
        token_BT = self._new_tokens(len(x_BTD))
        return cache.run(self.backbone.step, x_BTD, wanted_BT, token_BT, position_BT, depth, cast(Attend, self.attend))

    def _dense(self, depth: int, x_BTD: Tensor, active_BT: Tensor | None) -> Tensor:
        """A pass over all T tokens; the slots of halted tokens are masked or repeat the depth below."""
        token_BT = self._new_tokens(x_BTD.shape[0])
        masked = active_BT is not None and self.attend == "all_shallower"
        self._depths.append_metadata(
            depth, torch.where(active_BT, token_BT, FREE) if masked and active_BT is not None else token_BT
        )
        write = DepthWrite(depth, self._reads(depth), kept_BT=active_BT if self.attend == "same_depth" else None)
        if (depth == 0 or self.attend == "same_depth") and self._plain_order:
            mask = self.mask_BK  # plain causal order, which the backbone's own mask handles
        else:
            mask = self._mask(depth, token_BT)
        with self._depths.writing(write) as slots:
            return self.backbone.step(x_BTD, slots, mask, self.position_ids)

    def _packed(self, depth: int, x_BTD: Tensor, active_BT: Tensor, state_BTD: Tensor) -> Tensor:
        """A pass over the active tokens only."""
        rows = PackedRows.where(active_BT)
        if rows.width == 0:
            return self._for_nothing(depth, x_BTD, active_BT, state_BTD)
        token_BT = self._new_tokens(x_BTD.shape[0])
        query_BS = _left(token_BT, active_BT, rows)
        if self.attend == "same_depth":
            self._depths.append_metadata(depth, token_BT)
            everyone = rows.even and rows.width == self.tokens
            column_N = None if everyone else token_BT[active_BT] - self.total + self._depths.width(depth)
        else:
            column_N = self._depths.allocate(depth, rows, token_BT[active_BT])
        write = DepthWrite(
            depth,
            self._reads(depth),
            rows,
            column_N,
            self._depths.width(depth),
            kept_BT=active_BT if self.attend == "same_depth" else None,
        )
        position_1N = self.position_ids.expand(active_BT.shape)[active_BT][None]
        with self._depths.writing(write) as slots:
            new_1ND = self.backbone.step(x_BTD[active_BT][None], slots, self._mask(depth, query_BS), position_1N, rows)
        return state_BTD.index_put(active_BT.nonzero(as_tuple=True), new_1ND[0].to(state_BTD.dtype))

    def _for_nothing(self, depth: int, x_BTD: Tensor, active_BT: Tensor, state_BTD: Tensor) -> Tensor:
        """A pass without tokens on this process while others have some: every process must gather sharded weights."""
        if self.attend == "same_depth":
            self._depths.repeat_below(depth, self.tokens)
            self._depths.append_metadata(depth, self._new_tokens(x_BTD.shape[0]))
        return state_BTD + 0 * self.backbone.step(x_BTD[:1, :1], None, None, self.position_ids[:1, :1]).sum()

    def _mask(self, depth: int, query_BS: Tensor) -> SlotMask | None:
        """The slots that each token attends to: those of earlier tokens and its own, within its document."""
        depths = [self._depths.depths[index] for index in self._reads(depth)]
        key_BK = torch.cat([depth.token_BC for depth in depths if depth is not None], dim=1)
        newest = self.tokens == 1 and len(query_BS) == 1 and self.mask_BK is None
        if newest and self.packed and not self._by_position:
            return None  # one new token of a sequence without padding attends to the whole cache
        seen_BSK = key_BK[:, None] <= query_BS[..., None]
        return slot_mask(seen_BSK, query_BS, key_BK, self.mask_BK, self.total, self._by_position)


def _left(token_BT: Tensor, active_BT: Tensor, rows: PackedRows) -> Tensor:
    """``[B, S]``: the active tokens of each sequence, left-aligned, then `FREE`."""
    token_BS = token_BT.new_full((rows.batch, rows.width), FREE)
    token_BS[rows.batch_N, rows.order_N] = token_BT[active_BT]
    return token_BS


def all_shallower_passes(tokens: int, context: int, shares: Sequence[float]) -> list[DecoderPass]:
    """The decoder passes under ``attend="all_shallower"``, for cost estimates.

    Args:
        tokens: number of new tokens.
        context: number of cached tokens.
        shares: share of tokens that take each pass.

    Example:
        >>> all_shallower_passes(8, 0, [1, 0.5])[-1]
        DecoderPass(queries=4.0, keys=12.0, cached=False, repeats=1)
    """
    calls: list[DecoderPass] = []
    seen: float = 0
    for share in shares:
        seen += share
        if tokens == 1:  # decoding: the token takes a pass or skips it
            calls.append(DecoderPass(1, context * seen + len(calls) + 1, repeats=share))
        else:
            calls.append(DecoderPass(tokens * share, (context + tokens) * seen))
    return [call for call in calls if call.queries and call.repeats]


def same_depth_passes(tokens: int, context: int, shares: Sequence[float]) -> list[DecoderPass]:
    """The decoder passes under ``attend="same_depth"``; arguments as in `all_shallower_passes`.

    Example:
        >>> same_depth_passes(8, 0, [1, 0.5])[-1]
        DecoderPass(queries=4.0, keys=8, cached=False, repeats=1)
    """
    keys = context + tokens
    if tokens == 1:
        return [DecoderPass(1, keys, repeats=share) for share in shares if share]
    return [DecoderPass(tokens * share, keys) for share in shares if share]
