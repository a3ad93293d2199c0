"""Slots of a model that runs several passes per token, kept by a KV-cache method.

A method that thinks writes the KV slots of a call pass by pass: first one slot per token, then one per token that goes on.
`CompressedSlotCache` keeps them in that order, as one sequence of columns, and hands each sequence of the batch to layers of
its own. Such a layer sees a plain causal sequence without padding, so every KV-cache method works unchanged. Which columns
a query sees follows from the token and the depth of each column. Columns are evicted or coded at the end of a call, when
all passes of its tokens have run.

Shapes: B batch, T tokens, S queries of a pass, C columns of one sequence, s queries of one sequence, H query heads, G KV
heads, D head width.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import LongTensor, Tensor, nn

from pondera.cache.attention import Attention
from pondera.cache.layer import AttentionCall, KVLayer
from pondera.cache.token_cache import TokenCache
from pondera.core.errors import UserError
from pondera.core.hf import Cache

Attend = Literal["all_shallower", "same_depth", "causal"]
"""Which columns a query at depth d sees, of tokens up to its own: those of depths 0 to d; of each token the one at depth d, or
its deepest if it halted before; or all columns written up to its own."""


@dataclass
class Columns:
    """What the columns of one sequence hold.

    Args:
        token_C: the number of the token in its sequence, padding counted.
        depth_C: the pass that wrote the column.
        position_C: position id of the token.
        log_weight_C: added to the scores of the column; 0 for most methods.
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
        """With further columns after these."""
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return Columns(*(torch.cat(pair) for pair in pairs))

    def at(self, keep_C: Tensor) -> Columns:
        """Some of the columns."""
        return Columns(*(value[keep_C] for value in vars(self).values()))

    def visible(self, new: int, attend: Attend) -> Tensor:
        """``[s, C]``: which columns the queries see that wrote the last `new` columns."""
        depth_s, before_sC = self.depth_C[-new:, None], self.token_C <= self.token_C[-new:, None]
        if attend == "causal":
            order_C = torch.arange(len(self.token_C), device=depth_s.device)
            return order_C <= order_C[-new:, None]
        if attend == "all_shallower":
            return before_sC & (self.depth_C <= depth_s)
        return before_sC & (self.depth_C == torch.minimum(self._deepest(), depth_s))

    def _deepest(self) -> Tensor:
        """``[C]``: the deepest pass of each column's token."""
        deepest = self.depth_C.new_zeros(int(self.token_C.max()) + 1)
        return deepest.scatter_reduce(0, self.token_C, self.depth_C, "amax")[self.token_C]


class ColumnCall(AttentionCall):
    """A call whose new keys are the next columns of one sequence, of which each query sees some."""

    @property
    def in_order(self) -> bool:
        """The model's own attention knows no such mask."""
        return False


@dataclass
class Pass:
    """What a call of the decoder writes and sees.

    Args:
        places: of each sequence, which of the S inputs it owns, ``[s]``.
        masks: of each sequence, which of its columns they see, ``[1, 1, s, C]``, for full attention.
        windows: the same for layers with sliding windows.
        columns: of each sequence, the new columns included.
        biased: some columns have a log-weight.
    """

    places: list[Tensor]
    masks: list[Tensor]
    windows: list[Tensor]
    columns: list[Columns]
    biased: bool


class SequencesLayer(KVLayer):
    """One decoder layer's slots: a layer of a KV-cache method for each sequence of the batch.

    Args:
        make: an empty layer for one sequence.
        windowed: attention of this layer has a sliding window, which is over positions.

    Attributes:
        rows: the layers.
        now: the pass that is being run; `CompressedSlotCache` sets it.
    """

    holds = ("rows",)

    def __init__(self, make: Callable[[], KVLayer], windowed: bool) -> None:
        super().__init__()
        self.make, self.windowed = make, windowed
        self.rows: list[KVLayer] = []
        self.now: Pass | None = None

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
        """See `KVLayer.__call__`. The mask of the pass is used, not the one that is given."""
        now = self.now
        if not self.pending or now is None:
            raise UserError(
                f"{type(module).__name__}: calls attention more than once for the keys of a layer, or outside of a pass of "
                "the method; use the model without a kv_cache method"
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
        """Never asked: `__call__` serves calls by sequence."""
        raise NotImplementedError

    def begin(self, batch: int, now: Pass) -> None:
        """Makes room for a batch, and notes the pass that comes."""
        if not self.rows:
            self.rows = [self.make() for _ in range(batch)]
        for layer in self.rows:
            layer.record_past, layer.hold = self.record_past, True
        self.now = now

    def release(self, prompt: bool) -> None:
        """See `KVLayer.release`, for each sequence."""
        for layer in self.rows:
            layer.release(prompt)
        self.now = None

    def keep(self, keep: list[Tensor]) -> None:
        """Keeps these columns of each sequence, ``[C]`` booleans."""
        for layer, keep_C in zip(self.rows, keep, strict=True):
            if layer.batch():
                layer.keep_columns(keep_C)

    def get_seq_length(self) -> int:
        """The decoder's own mask is not used, so it is made for the new inputs only."""
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """See `get_seq_length`."""
        return query_length, 0

    def nbytes(self) -> int:
        """See `KVLayer.nbytes`."""
        return sum(layer.nbytes() for layer in self.rows)

    def rollback(self, tokens: int) -> None:
        """Never asked: `CompressedSlotCache.crop` says which columns stay."""
        raise NotImplementedError

    def select(self, rows: Tensor) -> None:
        """See `KVLayer.select`."""
        self.rows = [self.rows[row].clone() for row in rows.tolist()]

    def clear(self) -> None:
        """See `KVLayer.clear`."""
        self.rows, self.now = [], None

    def batch(self) -> int:
        """See `KVLayer.batch`."""
        return len(self.rows)


class CompressedSlotCache(TokenCache):
    """Tokens to `generate`; columns, which a KV-cache method evicts or codes, to the backbone.

    A budget counts KV slots: a model with up to three passes per token has up to three slots per token.

    Args:
        make: empty layers of the KV-cache method, one per decoder layer; asked for once per sequence.
        view: makes the cache that the decoder is given of layers.
        windowed: which decoder layers have a sliding window.
        window: sliding window of layers that have one, in positions.
        slots_per_token: the most slots that a token can have.

    Attributes:
        columns: what the columns of each sequence hold.
    """

    def __init__(
        self,
        make: Callable[[], list[KVLayer]],
        view: Callable[[list], Cache],
        windowed: list[bool],
        window: int | None,
        slots_per_token: int,
    ) -> None:
        made: list[list[KVLayer]] = []
        taken = [0] * len(windowed)

        def layer(index: int) -> KVLayer:
            if taken[index] == len(made):
                made.append(make())
            taken[index] += 1
            return made[taken[index] - 1][index]

        layers = [SequencesLayer(lambda index=index: layer(index), narrow) for index, narrow in enumerate(windowed)]
        super().__init__(layers, slots_per_token, view(layers))
        self.window = window
        self.columns: list[Columns] = []
        self._open = False

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
        """One pass of some inputs, ``[B, S, D]``; what is returned for the others means nothing.

        Args:
            step: the decoder: ``step(x_BSD, cache, None, position_BS)``.
            x_BSD: inputs.
            wanted_BS: those that run. Others may be computed, and leave no slot.
            token_BS: their tokens' numbers, padding counted.
            position_BS: position ids.
            depth: of the pass.
            attend: what they see.
            log_weight_BS: added to every attention score of the new slots; `None`: nothing.
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
        self._open = True
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
        for held, place in zip(columns, places, strict=True):
            mask_sC = held.visible(len(place), attend) if len(place) else torch.zeros(0, 0, dtype=torch.bool)
            masks.append(mask_sC[None, None])
            if self.window is not None and len(place):
                near_sC = held.position_C[-len(place) :, None] - held.position_C < self.window
                mask_sC = mask_sC & near_sC
            windows.append(mask_sC[None, None])
        biased = any(bool(held.log_weight_C.any()) for held in columns)
        return Pass(places, masks, windows, columns, biased)

    def _check(self) -> None:
        """Refuses to go on from a call that ended halfway."""
        if self._open and all(layer.now is None for layer in self._layers):
            self._open = False
        widths = [len(held.token_C) for held in self.columns]
        if any(layer.rows and [row.seen for row in layer.rows] != widths for layer in self._layers):
            raise UserError(
                "this cache holds half of a call that ended in an error: its layers have seen different numbers of slots; "
                "begin with a new cache, or call cache.reset() first"
            )

    def record(self, passes_BT: Tensor) -> None:
        """See `TokenCache.record`. The call is complete: the method evicts or codes now."""
        prompt = passes_BT.shape[1] > 1 or self.tokens == 0
        for layer in self._layers:
            layer.release(prompt and not layer.record_past)
        super().record(passes_BT)
        self._open = False

    def nbytes(self) -> int:
        """Bytes of all layers' storage and of what is noted about the columns."""
        noted = sum(value.nbytes for held in self.columns for value in vars(held).values())
        return noted + sum(layer.nbytes() for layer in self._layers)

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last tokens (given as a negative number, as transformers does); 0 settles what was recorded."""
        kept = self.tokens - abs(tokens_to_remove)
        keep = [held.token_C < kept for held in self.columns]
        for layer in self._layers:
            layer.keep(keep)
        self.columns = [held.at(keep_C) for held, keep_C in zip(self.columns, keep, strict=True)]
        for layer in self._layers:
            layer.seen = sum(len(held.token_C) for held in self.columns)
        self.evict(abs(tokens_to_remove))

    def reset(self) -> None:
        """Forgets everything."""
        super().reset()
        self.columns, self._open = [], False

    def reorder_cache(self, beam_idx: LongTensor) -> None:
        """Rearranges the batch for beam search."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each row of the batch."""
        if self.columns:
            self.batch_select_indices(torch.arange(len(self.columns)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps these rows of the batch."""
        for layer in self._layers:
            layer.batch_select_indices(indices)
        self._rows(indices)

    def _rows(self, indices: Tensor) -> None:
        super()._rows(indices)
        self.columns = [copy.copy(self.columns[row]) for row in indices.tolist()]
