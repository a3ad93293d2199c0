"""A KV cache that combines several passes per token with a KV-cache method.

A think method writes the KV slots of a call pass by pass: first one slot per token, then one per token that is still
active. `CompressedSlotCache` stores the slots of each sequence in that order; the index of a slot in this order is its
column. Each sequence of the batch has its own layers of the KV-cache method. Such a layer gets one sequence without padding,
whose slots it treats as tokens, and a mask, so every KV-cache method works unchanged. The mask follows from the token and
the depth of each column. A KV-cache method evicts or codes at the end of a call, after all passes of its tokens have run; if
some tokens may be draft tokens, it waits for `crop`.

Shapes: B batch, T tokens, S inputs of a pass, C columns of one sequence, s queries of one sequence, H query heads, G KV
heads, D head width (of `run`: width of hidden states).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from pondera.cache.attention import Attention
from pondera.cache.columns import Attend, Columns
from pondera.cache.layer import AttentionCall, KVLayer
from pondera.cache.token_cache import TokenCache
from pondera.core.errors import UserError
from pondera.core.hf import Cache


class ColumnCall(AttentionCall):
    """An attention call of one sequence whose new keys are its next columns, with a mask over columns."""

    in_order = False
    """The mask over columns is not causal in general, so the model's own attention does not serve the call."""


@dataclass
class Pass:
    """The new columns and the masks of one call of the decoder; each list has one entry per sequence.

    Args:
        places: ``[s]``, the indices of the inputs of the call that write a column.
        masks: ``[1, 1, s, C]``, the columns that these inputs see in layers with full attention.
        windows: as `masks`, in layers with a sliding window.
        columns: the columns, including the new ones.
        biased: whether any column has a key bias.
    """

    places: list[Tensor]
    masks: list[Tensor]
    windows: list[Tensor]
    columns: list[Columns]
    biased: bool


class SequencesLayer(KVLayer):
    """The KV slots of one decoder layer: one layer of a KV-cache method for each sequence of the batch.

    Args:
        make: returns an empty layer for one sequence.
        windowed: whether the attention of this layer has a sliding window; it counts positions.

    Attributes:
        rows: the layers, one per sequence.
        now: the current pass; `CompressedSlotCache` sets it.
    """

    by_row: ClassVar[tuple[str, ...]] = ("rows",)

    def __init__(self, make: Callable[[], KVLayer], windowed: bool) -> None:
        super().__init__()
        self.make, self.windowed = make, windowed

    def clear(self) -> None:
        """See `CacheState.clear`."""
        super().clear()
        self.rows: list[KVLayer] = []
        self.now: Pass | None = None

    def prepare(self, batch: int) -> None:
        """See `CacheState.prepare`: creates the layers of a new batch."""
        self.rows = [self.make() for _ in range(batch)]

    def __call__(
        self,
        base: Attention,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """See `KVLayer.__call__`. The layers get the mask of the pass; `attention_mask` is ignored."""
        now = self.now
        if not self.pending or now is None:
            raise UserError(
                f"{type(module).__name__}: calls attention more than once for the keys of a layer, or outside of a pass of "
                "the think or chunk method; use the model without a kv_cache method"
            )
        scaling = float(query.shape[-1] ** -0.5) if scaling is None else scaling
        ids = kwargs.get("position_ids")
        out_BSHD = query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[-1])
        for row, (layer, place_s) in enumerate(zip(self.rows, now.places, strict=True)):
            if not len(place_s):
                continue
            one = slice(row, row + 1)
            query_1HsD, key_1GsD, value_1GsD = (x[one].index_select(2, place_s) for x in (query, key, value))
            mask = (now.windows if self.windowed else now.masks)[row]
            columns = now.columns[row]
            if not layer.is_initialized:
                layer.lazy_initialization(key_1GsD, value_1GsD)
            layer.seen += len(place_s)
            layer.positions = columns.position_C
            further = kwargs if ids is None else {**kwargs, "position_ids": columns.position_C[None, -len(place_s) :]}
            bias = columns.log_weight_C[None] if now.biased else None
            call = ColumnCall(
                module,
                query_1HsD,
                key_1GsD,
                value_1GsD,
                mask,
                scaling,
                layer.seen - len(place_s),
                further,
                base,
                mask,
                bias,
            )
            out_BSHD[row, place_s] = layer.attend(call)[0]
        self.pending = False
        return out_BSHD, None

    def attend(self, call: AttentionCall) -> Tensor:
        """Never called: `__call__` serves the call of each sequence."""
        raise NotImplementedError

    def begin(self, batch: int, now: Pass) -> None:
        """Creates the layers of a new batch, and sets the current pass."""
        if not self.rows:
            self.prepare(batch)
        for layer in self.rows:
            layer.record_past, layer.hold = self.record_past, True
        self.now = now

    def release(self, prompt: bool) -> None:
        """See `KVLayer.release`; applies to each sequence."""
        for layer in self.rows:
            layer.release(prompt)
        self.now, self.drafted, self.cropped = None, self.record_past, False

    def end_recording(self) -> None:
        """See `KVLayer.end_recording`; applies to each sequence."""
        self.record_past = self.drafted = self.cropped = False
        for layer in self.rows:
            layer.record_past = False
        self.keep([torch.ones(layer.seen, dtype=torch.bool, device=self.device) for layer in self.rows])

    def copy_storage(self) -> None:
        """See `KVLayer.copy_storage`; applies to each sequence."""
        for layer in self.rows:
            layer.copy_storage()

    def check_keep(self, keep: list[Tensor]) -> None:
        """Raises if `keep` would refuse, before anything changes."""
        for layer, keep_C in zip(self.rows, keep, strict=True):
            if layer.batch():
                layer.check_columns(keep_C)

    def keep(self, keep: list[Tensor]) -> None:
        """Keeps the columns of each sequence where its ``[C]`` booleans are true, after `check_keep`."""
        self.renew()
        for layer, keep_C in zip(self.rows, keep, strict=True):
            if layer.batch():
                layer.keep_columns(keep_C)
        self.drafted, self.cropped = False, self.record_past

    def get_seq_length(self) -> int:
        """0: the decoder's own mask is not used, so it covers the new inputs only."""
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """See `get_seq_length`."""
        return query_length, 0

    def rollback(self, tokens: int) -> None:
        """Never called: `CompressedSlotCache.rollback` determines the columns that stay."""
        raise NotImplementedError


class CompressedSlotCache(TokenCache):
    """A cache that counts tokens for `generate` and lets a KV-cache method evict or code the KV slots of each sequence.

    A budget counts KV slots: a model with up to three passes per token has up to three slots per token and layer.

    Args:
        make: returns empty layers of the KV-cache method, one per decoder layer; called once for each new sequence.
        view: makes the cache for the decoder from a list of layers.
        windowed: for each decoder layer, whether it has a sliding window.
        window: the width of the sliding windows in positions, `None` if no layer has one.
        slots_per_token: the largest number of slots per token.

    Attributes:
        columns: the columns of each sequence.
    """

    by_row: ClassVar[tuple[str, ...]] = ("columns",)

    def __init__(
        self,
        make: Callable[[], list[KVLayer]],
        view: Callable[[list], Cache],
        windowed: list[bool],
        window: int | None,
        slots_per_token: int,
    ) -> None:
        created: list[list[KVLayer]] = []
        taken = [0] * len(windowed)

        def layer(index: int) -> KVLayer:
            if taken[index] == len(created):
                created.append(make())
            taken[index] += 1
            return created[taken[index] - 1][index]

        layers = [SequencesLayer(lambda index=index: layer(index), narrow) for index, narrow in enumerate(windowed)]
        super().__init__(layers, slots_per_token, view(layers))
        self.window = window

    def clear(self) -> None:
        """See `CacheState.clear`."""
        super().clear()
        self.columns: list[Columns] = []

    @property
    def _layers(self) -> list[SequencesLayer]:
        return cast("list[SequencesLayer]", self.layers)

    def run(
        self,
        step: Callable[..., Tensor],
        x_BSD: Tensor,
        wanted_BS: Tensor,
        token_BS: Tensor,
        position_BS: Tensor,
        depth: int,
        attend: Attend,
        log_weight_BS: Tensor | None = None,
    ) -> Tensor:
        """Runs one pass of some inputs, and returns their outputs, ``[B, S, D]``; other outputs are undefined.

        Args:
            step: the decoder: ``step(x_BSD, cache, None, position_BS)``.
            x_BSD: inputs.
            wanted_BS: the inputs that run. The decoder may also compute others, which write no slot.
            token_BS: the index of each input's token in its batch row, padding counted.
            position_BS: position ids.
            depth: the index of the pass.
            attend: the columns that the inputs see.
            log_weight_BS: added to the attention scores of the new slots; default: `None`, nothing is added.
        """
        self._check()
        batch = len(x_BSD)
        if not self.columns:
            self.columns = [Columns.none(x_BSD.device) for _ in range(batch)]
        rows = wanted_BS.long().argsort(dim=-1, descending=True, stable=True)[:, : int(wanted_BS.sum(-1).max())]
        if rows.shape[1] == 0:
            return x_BSD
        taken_BS = wanted_BS.gather(1, rows)
        places, columns = [], []
        for row in range(batch):
            at = rows[row][taken_BS[row]]
            weight = self._weights(log_weight_BS, row, at)
            new = Columns(token_BS[row, at], torch.full_like(at, depth), position_BS[row, at], weight)
            columns.append(self.columns[row].joined(new))
            places.append(taken_BS[row].nonzero()[:, 0])
        now = self._pass(columns, places, attend)
        for layer in self._layers:
            layer.begin(batch, now)
        wide = rows[..., None].expand(-1, -1, x_BSD.shape[-1])
        out_BSD = step(x_BSD.gather(1, wide), self.slots, None, position_BS.gather(1, rows))
        self.columns = columns
        return torch.zeros_like(x_BSD).scatter(1, wide, out_BSD.to(x_BSD.dtype))

    @staticmethod
    def _weights(log_weight_BS: Tensor | None, row: int, at: Tensor) -> Tensor:
        if log_weight_BS is None:
            return torch.zeros(len(at), device=at.device)
        return log_weight_BS[row, at].float()

    def _pass(self, columns: list[Columns], places: list[Tensor], attend: Attend) -> Pass:
        masks, windows = [], []
        for known, place in zip(columns, places, strict=True):
            mask_sC = known.visible(len(place), attend) if len(place) else torch.zeros(0, 0, dtype=torch.bool)
            masks.append(mask_sC[None, None])
            if self.window is not None and len(place):
                near_sC = known.position_C[-len(place) :, None] - known.position_C < self.window
                mask_sC = mask_sC & near_sC
            windows.append(mask_sC[None, None])
        biased = any(bool(known.log_weight_C.any()) for known in columns)
        return Pass(places, masks, windows, columns, biased)

    def _check(self) -> None:
        """Raises if an earlier call ended before all layers stored its slots."""
        widths = [len(known.token_C) for known in self.columns]
        if any(layer.rows and [row.seen for row in layer.rows] != widths for layer in self._layers):
            raise UserError(
                "this cache contains half of a call that ended in an error: its layers have different numbers of slots; "
                "use a new cache, or call cache.reset() first"
            )

    def record(self, passes_BT: Tensor) -> None:
        """See `TokenCache.record`. The call is complete, so the KV-cache method evicts or codes."""
        prompt = passes_BT.shape[1] > 1 or self.tokens == 0
        for layer in self._layers:
            layer.release(prompt and not layer.record_past)
        super().record(passes_BT)

    def check_rollback(self, tokens: int) -> None:
        """See `CacheState.check_rollback`."""
        keep = [known.token_C < tokens for known in self.columns]
        for layer in self._layers:
            layer.check_keep(keep)

    def rollback(self, tokens: int) -> None:
        """See `CacheState.rollback`."""
        keep = [known.token_C < tokens for known in self.columns]
        for layer in self._layers:
            layer.keep(keep)
        self.columns = [known.at(keep_C) for known, keep_C in zip(self.columns, keep, strict=True)]
        for layer in self._layers:
            layer.seen = sum(len(known.token_C) for known in self.columns)
