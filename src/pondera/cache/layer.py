"""Where queries, new keys and the past meet: cache layers that do their attention themselves.

transformers hands a cache layer new keys and values, and an attention function queries, keys and a mask; neither sees
all. A `KVLayer` gives back the new keys and values as they are, and serves the attention call that follows
(`pondera.cache.attention`), which hands it everything. A call that does not follow raises.

Shapes: B batch, H query heads, G KV heads, R = H / G, T new tokens, K tokens seen and new, D head width.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Self

import torch
from torch import LongTensor, Tensor, nn

from pondera.cache.attention import Attention
from pondera.cache.slot_attention import PLAIN, Softmax
from pondera.cache.stock_attention import stock_attention
from pondera.core.errors import UserError
from pondera.core.hf import CacheLayerMixin, sdpa_attention

CAP, SINK, BIAS = "softcap", "s_aux", "position_bias"
"""What transformers calls what an attention function may be given beside queries, keys, values and a mask."""


@dataclass(frozen=True)
class AttentionCall:
    """One forward of one attention layer.

    Args:
        module: the attention layer.
        query_BHTD: after rotary embedding, as keys.
        key_BGTD, value_BGTD: of the new tokens only.
        mask_B1TK: true where a query may look, over all tokens seen, forgotten or not; none: causally at all of them.
        scaling: of the products.
        start: tokens seen before.
        further: what else the attention function was given.
        base: the model's own attention function.
        given_mask: the mask as `base` takes it.
        key_bias_BK: added to the scores of each key, seen and new; `None`: nothing.
    """

    module: nn.Module
    query_BHTD: Tensor
    key_BGTD: Tensor
    value_BGTD: Tensor
    mask_B1TK: Tensor | None
    scaling: float
    start: int
    further: dict[str, Any] = field(default_factory=dict)
    base: Attention = sdpa_attention
    given_mask: Tensor | None = None
    key_bias_BK: Tensor | None = None

    @cached_property
    def softmax(self) -> Softmax:
        """How scores become weights where slots are not the tokens of the text in their order.

        Raises:
            UserError: the model adds a bias by position, which slots do not know.
        """
        if self.further.get(BIAS) is not None:
            raise UserError(
                f"{type(self.module).__name__}: adds a bias by position to its attention scores, which a cache that evicts or "
                "codes does not know; use PreallocatedCache() or the model's stock cache"
            )
        cap, sink_H = self.further.get(CAP), self.further.get(SINK)
        return PLAIN if cap is None and sink_H is None else Softmax(cap, sink_H)

    @cached_property
    def tokens(self) -> int:
        """T."""
        return self.query_BHTD.shape[2]

    @property
    def in_order(self) -> bool:
        """The new tokens are the next ones of the text, so that over all slots in their order `stock` serves it."""
        return True

    @cached_property
    def position_BT(self) -> Tensor:
        """The number of each new token in its text; ``-1 - number`` where it is padding."""
        B, T, device = len(self.query_BHTD), self.tokens, self.query_BHTD.device
        number_BT = torch.arange(self.start, self.start + T, device=device).expand(B, T)
        if self.mask_B1TK is None:
            return number_BT
        # A token that does not even see itself is padding.
        real_BT = self.mask_B1TK[:, 0].diagonal(self.start, -2, -1)
        return torch.where(real_BT, number_BT, -1 - number_BT)

    @property
    def padding_B(self) -> Tensor | int:
        """How many of the new tokens are padding."""
        return 0 if self.mask_B1TK is None else (self.position_BT < 0).sum(-1)

    def mask(self, part: slice) -> Tensor | None:
        """``[B, 1, t, K]``: `mask_B1TK` for some of the queries; none: each of them looks at all up to itself."""
        return None if self.mask_B1TK is None else self.mask_B1TK[:, :, part]

    def written_mask(self, part: slice) -> Tensor | None:
        """The same, written out where the fused kernel would only be told that it is causal."""
        mask_B1tK = self.mask(part)
        if mask_B1tK is not None or self.tokens == 1:
            return mask_B1tK
        number_t = torch.arange(self.start + part.start, self.start + part.stop, device=self.query_BHTD.device)
        column_K = torch.arange(self.start + self.tokens, device=number_t.device)
        return (column_K[None] <= number_t[:, None])[None, None].expand(len(self.query_BHTD), 1, -1, -1)

    def stock(self, keys: Tensor, values: Tensor) -> Tensor:
        """The model's own attention over all tokens, ``[B, T, H, D]``, or the same bits sooner.

        Args:
            keys, values: ``[B, G, K, D]``, in the order of the text.
        """
        further = self.further
        if self.given_mask is None and self.base is sdpa_attention and not further.get("dropout"):
            if further.get(CAP) is None and further.get(BIAS) is None:
                out_B1HD = stock_attention(self.query_BHTD, keys, values, self.scaling)
                if out_B1HD is not None:
                    return out_B1HD
        mask = self.given_mask
        if mask is None and self.base is not sdpa_attention and self.tokens > 1:
            # Only torch's fused attention is causal by itself.
            allowed = self.written_mask(slice(0, self.tokens))
            assert allowed is not None
            mask = torch.zeros_like(allowed, dtype=keys.dtype).masked_fill(~allowed, torch.finfo(keys.dtype).min)
        out, _ = self.base(self.module, self.query_BHTD, keys, values, mask, scaling=self.scaling, **further)
        return out


class KVLayer(CacheLayerMixin):
    """What every memory's layer promises: a length in tokens, whatever is kept, and attention of its own.

    Attributes:
        seen: tokens that have been through, padding counted, forgotten or not.
        record_past: tokens may yet be taken back, so nothing is forgotten before `crop` says which stay.
        hold: more passes of the same tokens come, so nothing is evicted before `release`.
        positions: position id of each slot, `None` where slots count on from the first one; see `slots_per_token`.
        slots_per_token: slots in a row that share a position.
        expected: the attention module that this layer is for has been called with it.
        pending: new keys have come, and the attention call that belongs to them has not been served yet.
    """

    holds: ClassVar[tuple[str, ...]]
    """The names of the attributes that are all it holds of a text, beside `seen`."""

    shared: ClassVar[tuple[str, ...]] = ("method", "coders")
    """Attributes that copies share."""

    is_sliding = False
    is_croppable = True
    supports_early_init = False

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0
        self.record_past = self.expected = self.pending = self.hold = False
        self.positions: Tensor | None = None
        self.slots_per_token = 1

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Takes dtype and device from the first keys."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Gives the new keys and values back; the attention call that follows is served by `__call__`."""
        if not self.expected:
            raise UserError(
                "this cache was handed to a model that it was not made for, or to attention that never says which cache it "
                "reads; make a cache for this model: method.cache(model)"
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.expected, self.pending = False, True
        self.seen += key_states.shape[2]
        return key_states, value_states

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
        """Serves the attention call of the new keys; see `pondera.cache.attention.Server`.

        Raises:
            UserError: the call does not belong to new keys, or its mask is not over all tokens seen.
        """
        if not self.pending:
            raise UserError(
                f"{type(module).__name__}: calls attention more than once for the keys of a layer, or without putting them "
                "into the cache; use the model's stock cache"
            )
        start = self.seen - key.shape[2]
        scaling = float(query.shape[-1] ** -0.5) if scaling is None else scaling
        mask = None if attention_mask is None else as_boolean(module, attention_mask, self.seen)
        out_BTHD = self.attend(
            AttentionCall(module, query, key, value, mask, scaling, start, kwargs, base, attention_mask)
        )
        self.pending = False
        return out_BTHD, None

    @abstractmethod
    def attend(self, call: AttentionCall) -> Tensor:
        """Takes in the new tokens and attends to what is kept; returns ``[B, T, H, D]``."""

    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of the storage that it holds."""

    @abstractmethod
    def rollback(self, tokens: int) -> None:
        """Forgets the tokens from this number on, and lets go of what was only kept for their sake."""

    def keep_columns(self, keep_C: Tensor) -> None:
        """Forgets the slots where `keep_C` is false, which the newest slots are; the others close up.

        Args:
            keep_C: ``[C]``, of every slot seen. For one sequence without padding.
        """
        raise UserError(
            f"{type(self).__name__}: cannot take back some of the latest slots; decode without draft tokens"
        )

    def release(self, prompt: bool) -> None:
        """All passes of a call have run: evicts or codes what was held back.

        Args:
            prompt: the tokens of the call were a prompt.
        """
        self.hold = False

    def clone(self) -> Self:
        """A copy that shares nothing that is written to."""
        keep = {id(value): value for name in self.shared if (value := getattr(self, name, None)) is not None}
        twin = copy.copy(self)
        vars(twin).update(copy.deepcopy(vars(self), keep))
        return twin

    @abstractmethod
    def select(self, rows: Tensor) -> None:
        """Keeps these rows of the batch, in this order."""

    @abstractmethod
    def clear(self) -> None:
        """Forgets everything."""

    @abstractmethod
    def batch(self) -> int:
        """Rows of the batch; 0 where nothing was seen."""

    def get_seq_length(self) -> int:
        """Tokens seen; what positions, masks and stopping go by."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Masks are over tokens, forgotten or not; the layer picks the columns of those that it keeps."""
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        """No limit."""
        return -1

    def activate_past_recording(self) -> None:
        """Tokens that come may be drafts: nothing is forgotten until `crop` says which of them stay."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Takes the last tokens back (a negative number, as transformers has it); 0 settles what was recorded."""
        if tokens_to_remove > 0:
            raise UserError(f"crop({tokens_to_remove}): give the tokens to remove as a negative number, or 0")
        kept = self.seen + tokens_to_remove
        if kept < 0:
            raise UserError(f"crop({tokens_to_remove}): only {self.seen} tokens have been seen")
        if self.batch():
            self.rollback(kept)
        self.seen = kept

    def reset(self) -> None:
        """Forgets everything."""
        self.clear()
        self.seen = 0
        self.is_initialized = self.record_past = self.expected = self.pending = self.hold = False
        self.positions = None

    def reorder_cache(self, beam_idx: LongTensor) -> None:
        """Rearranges the batch for beam search."""
        if self.batch():
            self.select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps these rows of the batch."""
        if self.batch():
            self.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each row of the batch."""
        self.batch_select_indices(torch.arange(self.batch()).repeat_interleave(repeats))

    def offload(self) -> None:
        """Refused: what is kept is small, and is needed in every step."""
        raise UserError(
            f"{type(self).__name__}: a memory is not offloaded; make its budget smaller, or use DynamicCache(offloading=True)"
        )

    def prefetch(self) -> None:
        """See `offload`."""
        self.offload()


def as_boolean(module: nn.Module, mask: Tensor, seen: int) -> Tensor:
    """``[B, 1, T, K]``: true where a query may look, of a mask as the model's own attention takes it.

    Args:
        module: the attention layer.
        mask: booleans, or what is added to scores: 0 and very low numbers.
        seen: K, tokens seen and new.

    Raises:
        UserError: a mask that says more than that, or is not over all tokens.
    """
    name = type(module).__name__
    if not isinstance(mask, Tensor) or mask.ndim != 4 or mask.shape[1] != 1 or mask.shape[-1] != seen:
        raise UserError(
            f"attention_mask: {name} gives one that is not [B, 1, tokens, tokens seen]; give the model the ordinary mask of "
            "ones and zeros, [B, tokens], or none, and load it with attn_implementation='sdpa'"
        )
    if mask.dtype == torch.bool:
        return mask
    allowed = mask == 0
    if not mask.is_floating_point() or not bool((allowed | (mask <= torch.finfo(mask.dtype).min / 2)).all()):
        raise UserError(
            f"attention_mask: {name} adds numbers to its scores by way of the mask, which a cache that evicts or codes does "
            "not know; use the model's stock cache, and the ordinary mask of ones and zeros, or none"
        )
    return allowed
