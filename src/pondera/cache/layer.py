"""Base class of cache layers that compute their own attention.

transformers passes new keys and values to a cache layer, and queries, keys and a mask to an attention function; neither
gets all of them. The `update` of a `KVLayer` therefore returns the new keys and values unchanged, and the layer serves the
attention call that follows (`pondera.cache.attention`), which has all of them. If no attention call follows, the hooks of
`pondera.cache.attention` raise an error.

Shapes: B batch, H query heads, G KV heads, R = H / G, T new tokens, K tokens seen and new, D head width.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pondera.cache.attention import Attention
from pondera.cache.slot_attention import PLAIN, Softmax
from pondera.cache.state import CacheLayer
from pondera.cache.stock_attention import stock_attention
from pondera.core.errors import UserError
from pondera.core.hf import sdpa_attention

CAP, SINK, BIAS = "softcap", "s_aux", "position_bias"
"""The names in transformers of further arguments of attention functions: score capping, sink logits, position bias."""


@dataclass
class AttentionCall:
    """The arguments of one attention call of one layer; not frozen, because one is made for every token and layer.

    Args:
        module: the attention module.
        query_BHTD: queries of the new tokens, after rotary embedding.
        key_BGTD, value_BGTD: keys (after rotary embedding) and values of the new tokens.
        mask_B1TK: true where a query may attend, over all tokens seen, evicted or not. `None`: plain causal attention.
        scaling: the factor of the dot products.
        start: the number of tokens seen before this call.
        further: further keyword arguments of the attention function.
        base: the model's own attention function.
        given_mask: the mask in the form that `base` takes.
        key_bias_BK: added to the attention scores of each key, earlier and new; default: `None`, nothing is added.
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

    in_order: ClassVar[bool] = True
    """Whether the new tokens continue the sequence, so that `stock` over all slots in order is correct."""

    @cached_property
    def softmax(self) -> Softmax:
        """The softmax of attention over KV slots, which need not be all tokens of a sequence in order.

        Raises:
            UserError: the model adds a bias by position, which is not supported over KV slots.
        """
        if self.further.get(BIAS) is not None:
            raise UserError(
                f"{type(self.module).__name__}: adds a bias by position to its attention scores, which a cache that evicts "
                "or codes does not support; use PreallocatedCache() or the model's stock cache"
            )
        cap, sink_H = self.further.get(CAP), self.further.get(SINK)
        return PLAIN if cap is None and sink_H is None else Softmax(cap, sink_H)

    @cached_property
    def tokens(self) -> int:
        """The number of new tokens, T."""
        return self.query_BHTD.shape[2]

    @cached_property
    def position_BT(self) -> Tensor:
        """The index of each new token in its batch row; ``-1 - index`` for padding."""
        B, _, T, _ = self.query_BHTD.shape
        device = self.query_BHTD.device
        number_BT = torch.arange(self.start, self.start + T, device=device).expand(B, T)
        if self.mask_B1TK is None:
            return number_BT
        # A token that does not attend to itself is padding.
        real_BT = self.mask_B1TK[:, 0].diagonal(self.start, -2, -1)
        return torch.where(real_BT, number_BT, -1 - number_BT)

    @property
    def position(self) -> Tensor | int:
        """`position_BT`; for one token without a mask its index, the same in all batch rows."""
        return self.start if self.mask_B1TK is None and self.tokens == 1 else self.position_BT

    def real(self, part: slice) -> Tensor:
        """``[B, t]``: which of these new tokens are not padding."""
        if self.mask_B1TK is None:
            return torch.ones(
                len(self.query_BHTD), part.stop - part.start, dtype=torch.bool, device=self.query_BHTD.device
            )
        return self.position_BT[:, part] >= 0

    @property
    def padding_B(self) -> Tensor | int:
        """The number of padding tokens among the new ones."""
        return 0 if self.mask_B1TK is None else (self.position_BT < 0).sum(-1)

    def mask(self, part: slice) -> Tensor | None:
        """``[B, 1, t, K]``: `mask_B1TK` for some of the queries; `None`: plain causal attention."""
        return None if self.mask_B1TK is None else self.mask_B1TK[:, :, part]

    def written_mask(self, part: slice) -> Tensor | None:
        """As `mask`, but with an explicit causal mask in place of `None` if there is more than one new token."""
        mask_B1tK = self.mask(part)
        if mask_B1tK is not None or self.tokens == 1:
            return mask_B1tK
        number_t = torch.arange(self.start + part.start, self.start + part.stop, device=self.query_BHTD.device)
        column_K = torch.arange(self.start + self.tokens, device=number_t.device)
        return (column_K[None] <= number_t[:, None])[None, None].expand(len(self.query_BHTD), 1, -1, -1)

    def stock(self, keys: Tensor, values: Tensor) -> Tensor:
        """The model's own attention over all tokens, ``[B, T, H, D]``, or a faster kernel with bit-identical results.

        Args:
            keys, values: ``[B, G, K, D]``, in the order of the sequence.
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


class KVLayer(CacheLayer):
    """Base class of the layers of KV-cache methods: the length counts all tokens seen, and `attend` computes attention.

    Attributes:
        seen: the number of tokens seen, including padding and evicted tokens.
        record_past: new tokens may be draft tokens, so nothing is evicted before `crop`; see `activate_past_recording`.
        drafted: the tokens of the latest call may be draft tokens, and no `crop` has followed.
        cropped: a `crop` has followed since `activate_past_recording`.
        in_graph: backward passes may need the storage as it is.
        in_inference: some of the storage may be inference tensors.
        hold: further passes of the same tokens follow, so nothing is evicted before `release`.
        positions: position id of each slot; `None` if positions follow from the index of a slot; see `slots_per_token`.
        slots_per_token: the number of consecutive slots with the same position.
        expected: the attention module of this layer has been called with the cache.
        pending: the layer has new keys whose attention call has not been served yet.
    """

    holds: ClassVar[tuple[str, ...]] = ("seen",)
    shared: ClassVar[tuple[str, ...]] = ("method", "coders")
    supports_early_init = False

    def __init__(self) -> None:
        super().__init__()
        self.slots_per_token = 1

    def __getstate__(self) -> Any:
        raise UserError(
            "a cache of a KV-cache method is not pickled, because it belongs to a model object: write it with cache.save(path) "
            "and read it with load_cache, or copy it with copy.deepcopy(cache)"
        )

    def clear(self) -> None:
        """See `CacheState.clear`."""
        self.seen = 0
        self.record_past = self.drafted = self.cropped = self.expected = self.pending = self.hold = False
        self.in_graph = self.in_inference = False
        self.positions: Tensor | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Returns the new keys and values unchanged; `__call__` serves the attention call that follows."""
        if not self.expected:
            raise UserError(
                "this cache was passed to a model that it was not created for, or to an attention module without a cache "
                "argument; create a cache for this model: method.cache(model)"
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.in_graph or self.in_inference:
            self.renew()
        if self.drafted and self.cropped:
            self.end_recording()
        self.in_graph = self.in_graph or key_states.requires_grad or value_states.requires_grad
        self.in_inference = self.in_inference or torch.is_inference_mode_enabled()
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
            UserError: the layer has no new keys for this call, or the mask does not cover all tokens seen.
        """
        if not self.pending:
            raise UserError(
                f"{type(module).__name__}: calls attention more than once for the keys of a layer, or does not put them "
                "into the cache; use the model's stock cache"
            )
        start = self.seen - key.shape[2]
        scaling = float(query.shape[-1] ** -0.5) if scaling is None else scaling
        mask = None if attention_mask is None else as_boolean(module, attention_mask, self.seen)
        out_BTHD = self.attend(
            AttentionCall(module, query, key, value, mask, scaling, start, kwargs, base, attention_mask)
        )
        self.pending = False
        if not self.hold:
            self.drafted = self.record_past
        return out_BTHD, None

    @abstractmethod
    def attend(self, call: AttentionCall) -> Tensor:
        """Stores the new tokens and attends to the kept slots; returns ``[B, T, H, D]``."""

    @abstractmethod
    def rollback(self, tokens: int) -> None:
        """See `CacheState.rollback`."""

    def set_length(self, tokens: int) -> None:
        """See `CacheState.set_length`."""
        self.seen = tokens

    def check_columns(self, keep_C: Tensor) -> None:
        """Raises if `keep_columns` would refuse, before anything changes.

        Raises:
            UserError: the slots cannot be rolled back.
        """
        raise UserError(
            f"{type(self).__name__}: cannot roll back some of the latest slots; decode without draft tokens"
        )

    def keep_columns(self, keep_C: Tensor) -> None:
        """Rolls back the slots where `keep_C` is false, after `check_columns`; later slots move up.

        Args:
            keep_C: ``[C]``, for every slot seen. The layer must contain one sequence without padding.
        """
        self.check_columns(keep_C)

    def release(self, prompt: bool) -> None:
        """Ends a call whose passes have all run: evicts or codes what `hold` deferred.

        Args:
            prompt: whether the tokens of the call were a prompt.
        """
        self.hold = False
        self.drafted, self.cropped = self.record_past, False  # one call of a think method may end several times

    def get_seq_length(self) -> int:
        """The number of tokens seen, which determines positions, masks and stopping."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Width and offset of masks, which cover all tokens, evicted or not; the layer selects the columns of kept ones."""
        return self.seen + query_length, 0

    def activate_past_recording(self) -> None:
        """Declares that new tokens may be draft tokens: nothing is evicted until `crop`.

        `generate` calls it once, before several calls that a `crop` follows each, and does not tell when it ends. Recording
        therefore ends with two calls in a row that no `crop` follows, or, in a cache of a think or chunk method, with the
        next `generate`. Before the first `crop`, the tokens of any number of calls may be draft tokens.
        """
        self.record_past, self.cropped = True, False

    def end_recording(self) -> None:
        """Ends recording, and evicts or codes: the tokens since the latest `crop` were no draft tokens."""
        self.record_past = self.drafted = self.cropped = False
        if self.batch():
            self.rollback(self.seen)

    def renew(self) -> None:
        """Copies the storage if it may not be changed in place: see `in_graph` and `in_inference`."""
        if self.in_graph or (self.in_inference and not torch.is_inference_mode_enabled()):
            self.copy_storage()
            self.in_graph = self.in_graph and torch.is_grad_enabled()
            self.in_inference = torch.is_inference_mode_enabled()

    def copy_storage(self) -> None:
        """Replaces every tensor of the state by a copy, through which gradients pass."""
        if rows := self.batch():
            self.select(torch.arange(rows))

    def crop(self, tokens_to_remove: int) -> None:
        """See `CacheState.crop`."""
        self.renew()
        super().crop(tokens_to_remove)
        self.drafted, self.cropped = False, self.record_past

    def offload(self) -> None:
        """Not supported: the kept slots are few, and every step needs them."""
        raise UserError(
            f"{type(self).__name__}: a KV-cache method is not offloaded; give a smaller budget, or use "
            "DynamicCache(offloading=True)"
        )

    def prefetch(self) -> None:
        """See `offload`."""
        self.offload()


def begin_generate(cache: Any) -> None:
    """Ends recording in all layers where every call was followed by a `crop`: an earlier `generate` began to record.

    Args:
        cache: the cache that is passed to `generate`.
    """
    for layer in getattr(cache, "layers", ()):
        if isinstance(layer, KVLayer) and layer.cropped:
            layer.end_recording()


def as_boolean(module: nn.Module, mask: Tensor, seen: int) -> Tensor:
    """Converts a mask of the model's own attention to booleans ``[B, 1, T, K]``, true where a query may attend.

    Args:
        module: the attention module.
        mask: booleans, or numbers to add to the scores: 0 and very low numbers.
        seen: K, the number of earlier and new tokens.

    Raises:
        UserError: the mask contains other numbers, or does not cover all tokens.
    """
    name = type(module).__name__
    if not isinstance(mask, Tensor) or mask.ndim != 4 or mask.shape[1] != 1 or mask.shape[-1] != seen:
        raise UserError(
            f"attention_mask: the mask of {name} is not [B, 1, tokens, tokens seen]; pass the model a mask of ones and zeros, "
            "[B, tokens], or no mask, and load it with attn_implementation='sdpa'"
        )
    if mask.dtype == torch.bool:
        return mask
    allowed = mask == 0
    if not mask.is_floating_point() or not bool((allowed | (mask <= torch.finfo(mask.dtype).min / 2)).all()):
        raise UserError(
            f"attention_mask: the mask of {name} adds numbers to attention scores, which a cache that evicts or codes does "
            "not support; use the model's stock cache, and a mask of ones and zeros, or no mask"
        )
    return allowed
