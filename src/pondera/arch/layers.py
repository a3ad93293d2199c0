"""What one decoder layer multiplies and remembers; `pondera.cost.model` adds the layers up.

A layer is a few weight matrices, which every row meets, and a mixer, which looks at earlier rows. Each function at the end
describes the layers of some families from their configs; `pondera.arch.families` says which families these are.

A multiply-add is two FLOPs. Counted are matrix products, convolutions and attention, the last over the whole
query x key rectangle that its kernel is given. Norms, softmax, rotations and look-ups are free.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from pondera.arch.dimensions import LINEAR, SLIDING, head_dim, kv_heads, layer_kinds


class MixerCall(Protocol):
    """What the cost of a mixer depends on: a `pondera.cost.schedule.DecoderPass`."""

    @property
    def queries(self) -> float:
        """Rows that run."""
        ...

    @property
    def keys(self) -> float:
        """Rows each query is scored against, new ones included."""
        ...

    @property
    def cached(self) -> bool:
        """A cache held earlier rows."""
        ...

    @property
    def wider(self) -> int:
        """Coordinates that queries, keys and values of every head have beyond the architecture's own."""
        ...


@dataclass(frozen=True)
class Attention:
    """Softmax attention; with a `window`, the cache keeps only that many rows."""

    heads: int
    kv_heads: int
    head_dim: int
    window: int | None
    fused: bool

    def forward(self, call: MixerCall) -> float:
        return 2 * self._product(call)  # scores, and their mix of the values

    def backward(self, call: MixerCall) -> float:
        # Four gradients; a fused kernel has kept no scores and computes them again.
        return (5 if self.fused else 4) * self._product(call)

    def _product(self, call: MixerCall) -> float:
        """FLOPs of queries x keys, once: the window only masks, unless the cache has already dropped the rows."""
        keys = call.keys
        if call.cached and self.window is not None:
            keys = min(call.keys - call.queries, self.window - 1) + call.queries
        return 2 * self.heads * (self.head_dim + call.wider) * call.queries * keys

    def cache_bytes(self, slots: int, dtype_bytes: int, drops_window_rows: bool, newest: int) -> int:
        row = 2 * self.kv_heads * self.head_dim * dtype_bytes
        if self.window is None or not drops_window_rows:
            return slots * row
        # What is kept is a view of the last window - 1 rows, but a view of the concatenation with the newest call's rows,
        # whose storage stays whole. The layer also holds the window's length as an int64 tensor.
        return min(slots, self.window - 1 + newest) * row + 8


@dataclass(frozen=True)
class DeltaRule:
    """The gated delta rule behind a short depthwise convolution, as transformers runs it in plain PyTorch."""

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    kernel: int

    CHUNK = 64  # rows per chunk; the last chunk is padded

    @property
    def channels(self) -> int:
        return 2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim

    def forward(self, call: MixerCall) -> float:
        return self._convolution(call) + self.value_heads * self._chunks(call) * self._products()

    def backward(self, call: MixerCall) -> float:
        # Each product has two gradients, and each of the two triangular solves a product in its own. Four are saved:
        # the state before the first chunk, in two products, needs none, and the state after the last is not used.
        chunks = self._chunks(call)
        solves = 2 * self.CHUNK**2 * (self.key_dim + self.value_dim)
        unused = 4 * 2 * self.CHUNK * self.key_dim * self.value_dim if chunks else 0
        scan = chunks * (2 * self._products() + solves) - unused
        return 2 * self._convolution(call) + self.value_heads * scan

    def _convolution(self, call: MixerCall) -> float:
        # The convolution is padded on both sides, and a cache puts its last `kernel` rows in front.
        if not call.cached:
            rows = call.queries + self.kernel - 1
        else:
            rows = 2 if call.queries == 1 else call.queries + 2 * self.kernel - 1
        return 2 * rows * self.channels * self.kernel

    def _chunks(self, call: MixerCall) -> float:
        # The recurrent step is elementwise, so it is free here as in the counter.
        return 0 if call.cached and call.queries == 1 else -(-call.queries // self.CHUNK)

    def _products(self) -> int:
        """FLOPs of one chunk of one head: keys and queries x keys, scores x values, three products with the state."""
        inside = self.CHUNK**2 * (2 * self.key_dim + self.value_dim)
        return 2 * (inside + 3 * self.CHUNK * self.key_dim * self.value_dim)

    def cache_bytes(self, slots: int, dtype_bytes: int, drops_window_rows: bool, newest: int) -> int:
        if slots == 0:
            return 0
        state = self.value_heads * self.key_dim * self.value_dim * 4  # always float32
        return self.channels * self.kernel * dtype_bytes + state


@dataclass(frozen=True)
class Layer:
    """One decoder layer.

    Args:
        weights: matrix entries that each row is multiplied with.
        mixer: how a row sees earlier rows.
        extra: parameters that multiply no row: norms, biases, convolution filters, experts not chosen.
        borders: rows plus columns of all attention and MLP matrices, which is what LoRA adds per rank; 0: not known.
    """

    weights: int
    mixer: Attention | DeltaRule
    extra: int
    borders: int = 0


@dataclass(frozen=True)
class Stack:
    """A whole backbone: its layers, embedding tables, final norm and output head (whose weights may be tied)."""

    layers: tuple[Layer, ...]
    embedding: int
    norm: int
    head: int
    tied: bool


def _attention(config: Any, index: int) -> Attention:
    return Attention(
        heads=config.num_attention_heads,
        kv_heads=kv_heads(config),
        head_dim=head_dim(config),
        window=config.sliding_window if layer_kinds(config)[index] == SLIDING else None,
        fused=config._attn_implementation != "eager",  # unset: transformers will choose sdpa
    )


def _projections(config: Any, attention: Attention, gate: int = 0) -> tuple[int, int]:
    """Weights and biases of query, key, value and output projections; `gate` is the width of an output gate."""
    queries, values = attention.heads * attention.head_dim, attention.kv_heads * attention.head_dim
    biases = queries + gate + 2 * values + config.hidden_size if getattr(config, "attention_bias", False) else 0
    return config.hidden_size * (2 * queries + gate + 2 * values), biases


def gated(config: Any, index: int, norms: int = 2, head_norms: bool = False) -> Layer:
    """The Llama family: separate projections, a gated MLP, RMS norms (also on the heads of queries and keys)."""
    width, inner = config.hidden_size, config.intermediate_size
    attention = _attention(config, index)
    weights, biases = _projections(config, attention)
    if getattr(config, "mlp_bias", False):
        biases += 2 * inner + width
    extra = biases + norms * width + (2 * attention.head_dim if head_norms else 0)
    queries, values = attention.heads * attention.head_dim, attention.kv_heads * attention.head_dim
    borders = 2 * (width + queries) + 2 * (width + values) + 3 * (width + inner)
    return Layer(weights + 3 * width * inner, attention, extra, borders)


def gated_normed(config: Any, index: int) -> Layer:
    """As `gated`, with norms on the heads of queries and keys."""
    return gated(config, index, head_norms=True)


def gated_sandwiched(config: Any, index: int) -> Layer:
    """As `gated_normed`, with norms before and after attention and MLP."""
    return gated(config, index, norms=4, head_norms=True)


def gpt(config: Any, index: int) -> Layer:
    """The GPT family: projections as wide as the model, a two-matrix MLP, layer norms and biases."""
    width = config.hidden_size
    inner = getattr(config, "n_inner", None) or getattr(config, "intermediate_size", None) or 4 * width
    biases = inner + width + (4 * width if getattr(config, "attention_bias", True) else 0)
    borders = (width + 3 * width) + 2 * width + 2 * (width + inner)
    return Layer(4 * width**2 + 2 * width * inner, _attention(config, index), biases + 4 * width, borders)


def qwen3_next(config: Any, index: int) -> Layer:
    """Qwen3-Next: gated softmax attention or the gated delta rule, then an MLP or a mixture of experts."""
    width = config.hidden_size
    if layer_kinds(config)[index] == LINEAR:
        mixer = DeltaRule(
            key_heads=config.linear_num_key_heads,
            value_heads=config.linear_num_value_heads,
            key_dim=config.linear_key_head_dim,
            value_dim=config.linear_value_head_dim,
            kernel=config.linear_conv_kernel_dim,
        )
        values = mixer.value_heads * mixer.value_dim
        weights = width * (mixer.channels + 2 * values + 2 * mixer.value_heads)  # in: q, k, v, z, b, a; out
        extra = mixer.channels * mixer.kernel + 2 * mixer.value_heads + mixer.value_dim  # filters, decay, norm
    else:
        mixer = _attention(config, index)
        weights, biases = _projections(config, mixer, gate=mixer.heads * mixer.head_dim)
        extra = biases + 2 * mixer.head_dim
    chosen, idle = _experts(config, index)
    return Layer(weights + chosen, mixer, extra + idle + 2 * width)


def _experts(config: Any, index: int) -> tuple[int, int]:
    """MLP weights that a row of Qwen3-Next meets, and those of the experts that it does not."""
    width, experts = config.hidden_size, config.num_experts
    if index in config.mlp_only_layers or not experts or (index + 1) % config.decoder_sparse_step:
        return 3 * width * config.intermediate_size, 0
    expert = 3 * width * config.moe_intermediate_size
    shared = 3 * width * config.shared_expert_intermediate_size
    chosen = config.num_experts_per_tok
    return chosen * expert + shared + width * (experts + 1), (experts - chosen) * expert  # + 1: the shared one's gate
