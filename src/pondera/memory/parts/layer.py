"""Where queries, new keys and the past meet: cache layers that do their attention themselves.

transformers hands a cache layer new keys and values, and an attention function queries, keys and a mask; neither sees
all. A `MemoryLayer` marks the keys that it returns, and the attention function registered here hands everything to the
layer that marked them. Keys without a mark, of any other cache, go to torch's fused attention as they always did.

Shapes: B batch, H query heads, G KV heads, R = H / G, T new tokens, K tokens seen and new, D head width.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import LongTensor, Tensor, nn

from pondera.ground.errors import UserError
from pondera.memory.parts.stock_attention import stock_attention
from pondera.model.hf import AttentionInterface, AttentionMaskInterface, CacheLayerMixin, sdpa_attention, sdpa_mask

MEMORY = "pondera_memory"
"""The attention implementation that knows memories."""
_MARK = "pondera_layer"
FURTHER = ("softcap", "position_bias")
"""What an attention function may be given that makes it another one, where it is not none."""


@dataclass(frozen=True)
class Call:
    """One forward of one attention layer.

    Args:
        module: the attention layer.
        query_BHTD: after rotary embedding, as keys.
        key_BGTD, value_BGTD: of the new tokens only.
        mask_B1TK: true where a query may look, over all tokens seen, forgotten or not; none: causally at all of them.
        scaling: of the products.
        start: tokens seen before.
        further: what else the attention function was given.
    """

    module: nn.Module
    query_BHTD: Tensor
    key_BGTD: Tensor
    value_BGTD: Tensor
    mask_B1TK: Tensor | None
    scaling: float
    start: int
    further: dict[str, Any]

    @property
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
        """transformers' own attention over all tokens, ``[B, T, H, D]``, or the same bits sooner.

        Args:
            keys, values: ``[B, G, K, D]``, in the order of the text.
        """
        others = [name for name in FURTHER if self.further.get(name) is not None]
        if self.mask_B1TK is None and not others and not self.further.get("dropout"):
            out_B1HD = stock_attention(self.query_BHTD, keys, values, self.scaling)
            if out_B1HD is not None:
                return out_B1HD
        out, _ = sdpa_attention(
            self.module, self.query_BHTD, keys, values, self.mask_B1TK, scaling=self.scaling, **self.further
        )
        return out


class MemoryLayer(CacheLayerMixin):
    """What every memory's layer promises: a length in tokens, whatever is kept, and attention of its own.

    Attributes:
        seen: tokens that have been through, padding counted, forgotten or not.
        record_past: tokens may yet be taken back, so nothing is forgotten before `crop` says which stay.
    """

    holds: ClassVar[tuple[str, ...]]
    """The names of the attributes that are all it holds of a text, beside `seen`."""

    is_sliding = False
    is_croppable = True
    supports_early_init = False

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0
        self.record_past = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Takes dtype and device from the first keys."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Gives the new keys back, marked, so that attention finds this layer."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        marked = key_states.view(key_states.shape)
        setattr(marked, _MARK, self)
        self.seen += key_states.shape[2]
        return marked, value_states

    @abstractmethod
    def attend(self, call: Call) -> Tensor:
        """Takes in the new tokens and attends to what is kept; returns ``[B, T, H, D]``."""

    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of the storage that it holds."""

    @abstractmethod
    def take_back(self, tokens: int) -> None:
        """Forgets the tokens from this number on, and lets go of what was only kept for their sake."""

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
            self.take_back(kept)
        self.seen = kept

    def reset(self) -> None:
        """Forgets everything."""
        self.clear()
        self.seen = 0
        self.is_initialized = self.record_past = False

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


def memory_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention by the layer that marked the keys; torch's fused attention where none did."""
    layer: MemoryLayer | None = getattr(key, _MARK, None)
    if layer is None:
        return sdpa_attention(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    scaling = float(query.shape[-1] ** -0.5) if scaling is None else scaling
    if attention_mask is not None and attention_mask.dtype != torch.bool:
        raise UserError("attention_mask: a memory needs the ordinary mask of ones and zeros, [B, tokens], or none")
    call = Call(module, query, key, value, attention_mask, scaling, layer.seen - key.shape[2], kwargs)
    return layer.attend(call), None


AttentionInterface.register(MEMORY, memory_attention)
AttentionMaskInterface.register(MEMORY, sdpa_mask)
