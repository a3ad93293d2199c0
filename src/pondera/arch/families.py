"""FLOPs and cache bytes of one layer of each architecture; `pondera.cost.model` sums over layers.

A layer has weight matrices, which multiply every row, and a mixer, which attends to earlier rows. To add an architecture,
write a function that describes its layer and enter it in `ARCHITECTURES`.

A multiply-add is two FLOPs. Matrix products, convolutions and attention count, attention over the full query x key
rectangle of the kernel. Norms, softmax, rotary embeddings and table look-ups are free.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from pondera.core.errors import UserError


@dataclass(frozen=True)
class DecoderPass:
    """One call of the decoder stack, or of additional layers of the same kind, for one sequence.

    Args:
        queries: number of input rows (KV slots).
        keys: keys per query, including the new ones.
        cached: a cache has earlier rows; a linear-attention layer then runs its recurrent step if ``queries == 1``.
        repeats: number of such calls; a fraction if the number is random and this is its mean.
        wider: additional coordinates of the queries, keys and values of every head.
        layers: number of layers, each at the mean cost of the stack; default: `None`, the whole stack.
    """

    queries: float
    keys: float
    cached: bool = False
    repeats: float = 1
    wider: int = field(default=0, repr=False)
    layers: int | None = field(default=None, repr=False)


@dataclass(frozen=True)
class MatMul:
    """A matrix product of a method outside of the decoder stack, for one sequence.

    Args:
        rows: number of rows; may be a fraction as in `DecoderPass`.
        weights: number of entries of the matrix; ``"head"`` for the output head or the embedding table, which have one size.
        trained: false if no gradient flows through the product, or only through a few of its results.
    """

    rows: float
    weights: int | Literal["head"]
    trained: bool = True


@dataclass(frozen=True)
class Attention:
    """Softmax attention; with a `window`, the cache keeps at most that many rows."""

    heads: int
    kv_heads: int
    head_dim: int
    window: int | None
    fused: bool

    def forward(self, call: DecoderPass) -> float:
        return 2 * self._product(call)  # scores, and the weighted sum of the values

    def backward(self, call: DecoderPass) -> float:
        # Four gradients; a fused kernel recomputes the scores.
        return (5 if self.fused else 4) * self._product(call)

    def _product(self, call: DecoderPass) -> float:
        """FLOPs of queries x keys. The window only masks, unless the cache has dropped the rows outside of it."""
        keys = call.keys
        if call.cached and self.window is not None:
            keys = min(call.keys - call.queries, self.window - 1) + call.queries
        return 2 * self.heads * (self.head_dim + call.wider) * call.queries * keys

    def cache_bytes(self, slots: int, dtype_bytes: int, drops_window_rows: bool, newest: int) -> int:
        row = 2 * self.kv_heads * self.head_dim * dtype_bytes
        if self.window is None or not drops_window_rows:
            return slots * row
        # The layer keeps a view of the last window - 1 rows, but the storage of the whole concatenation with the rows of the
        # newest call stays allocated. It also stores the length of the window as an int64 tensor.
        return min(slots, self.window - 1 + newest) * row + 8


@dataclass(frozen=True)
class DeltaRule:
    """The gated delta rule after a short depthwise convolution, in the PyTorch implementation of transformers."""

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    kernel: int

    CHUNK = 64  # rows per chunk; the last chunk is padded

    @property
    def channels(self) -> int:
        return 2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim

    def forward(self, call: DecoderPass) -> float:
        return self._convolution(call) + self.value_heads * self._chunks(call) * self._products()

    def backward(self, call: DecoderPass) -> float:
        # Each product has two gradients, and the gradient of each of the two triangular solves is one product. Four products
        # are not needed: two with the state before the first chunk, two with the state after the last one.
        chunks = self._chunks(call)
        solves = 2 * self.CHUNK**2 * (self.key_dim + self.value_dim)
        unused = 4 * 2 * self.CHUNK * self.key_dim * self.value_dim if chunks else 0
        scan = chunks * (2 * self._products() + solves) - unused
        return 2 * self._convolution(call) + self.value_heads * scan

    def _convolution(self, call: DecoderPass) -> float:
        # The convolution is padded on both sides, and a cache prepends its last `kernel` rows.
        if not call.cached:
            rows = call.queries + self.kernel - 1
        else:
            rows = 2 if call.queries == 1 else call.queries + 2 * self.kernel - 1
        return 2 * rows * self.channels * self.kernel

    def _chunks(self, call: DecoderPass) -> float:
        # The recurrent step is elementwise, so it is free, as in the counter of torch.
        return 0 if call.cached and call.queries == 1 else -(-call.queries // self.CHUNK)

    def _products(self) -> int:
        """FLOPs of one chunk and head: keys x keys, queries x keys, scores x values, three products with the state."""
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
        weights: matrix entries per row.
        mixer: attention or another sequence mixer.
        extra: parameters without a product: norms, biases, convolution filters, unused experts.
    """

    weights: int
    mixer: Attention | DeltaRule
    extra: int


@dataclass(frozen=True)
class Stack:
    """A backbone: layers, embedding tables, final norm and output head (whose weights may be tied)."""

    layers: tuple[Layer, ...]
    embedding: int
    norm: int
    head: int
    tied: bool


@dataclass(frozen=True)
class Architecture:
    """A model type: its function `layer(config, index)`, vectors per norm (two with a bias), learned positions or not."""

    layer: Callable[[Any, int], Layer]
    norm_vectors: int = 1
    learned_positions: bool = False


def describe(config: Any) -> Stack:
    """Describes the backbone of a text config.

    Raises:
        UserError: the architecture has no entry in `ARCHITECTURES`.
    """
    if config.model_type not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise UserError(
            f"no cost model for model_type {config.model_type!r}; use one of {known}, "
            "or add its layer to pondera/arch/families.py"
        )
    architecture = ARCHITECTURES[config.model_type]
    width, vocabulary = config.hidden_size, config.vocab_size
    return Stack(
        layers=tuple(architecture.layer(config, index) for index in range(config.num_hidden_layers)),
        embedding=width * (vocabulary + (config.max_position_embeddings if architecture.learned_positions else 0)),
        norm=width * architecture.norm_vectors,
        head=width * vocabulary,
        tied=bool(config.tie_word_embeddings),
    )


def _attention(config: Any, index: int) -> Attention:
    heads = config.num_attention_heads
    window = getattr(config, "sliding_window", None)
    layer_types = getattr(config, "layer_types", None)
    if layer_types is not None and layer_types[index] != "sliding_attention":
        window = None
    return Attention(
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        window=window,
        fused=config._attn_implementation != "eager",  # `None`: transformers selects sdpa
    )


def _projections(config: Any, attention: Attention, gate: int = 0) -> tuple[int, int]:
    """Weights and biases of query, key, value and output projections; `gate` is the width of an output gate."""
    queries, values = attention.heads * attention.head_dim, attention.kv_heads * attention.head_dim
    biases = queries + gate + 2 * values + config.hidden_size if getattr(config, "attention_bias", False) else 0
    return config.hidden_size * (2 * queries + gate + 2 * values), biases


def _gated(config: Any, index: int, norms: int = 2, head_norms: bool = False) -> Layer:
    """The Llama family: separate projections, a gated MLP, RMS norms (also on the heads of queries and keys)."""
    width, inner = config.hidden_size, config.intermediate_size
    attention = _attention(config, index)
    weights, biases = _projections(config, attention)
    if getattr(config, "mlp_bias", False):
        biases += 2 * inner + width
    extra = biases + norms * width + (2 * attention.head_dim if head_norms else 0)
    return Layer(weights + 3 * width * inner, attention, extra)


def _normed(config: Any, index: int) -> Layer:
    return _gated(config, index, head_norms=True)


def _sandwiched(config: Any, index: int) -> Layer:
    return _gated(config, index, norms=4, head_norms=True)


def _classic(config: Any, index: int) -> Layer:
    """The GPT family: projections as wide as the model, a two-matrix MLP, layer norms and biases."""
    width = config.hidden_size
    inner = getattr(config, "n_inner", None) or getattr(config, "intermediate_size", None) or 4 * width
    biases = inner + width + (4 * width if getattr(config, "attention_bias", True) else 0)
    return Layer(4 * width**2 + 2 * width * inner, _attention(config, index), biases + 4 * width)


def _qwen3_next(config: Any, index: int) -> Layer:
    width = config.hidden_size
    if config.layer_types[index] == "linear_attention":
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
    """MLP weights of Qwen3-Next that are used per row, and those of the unused experts."""
    width, experts = config.hidden_size, config.num_experts
    if index in config.mlp_only_layers or not experts or (index + 1) % config.decoder_sparse_step:
        return 3 * width * config.intermediate_size, 0
    expert = 3 * width * config.moe_intermediate_size
    shared = 3 * width * config.shared_expert_intermediate_size
    chosen = config.num_experts_per_tok
    # + 1: gate of the shared expert
    return chosen * expert + shared + width * (experts + 1), (experts - chosen) * expert


ARCHITECTURES = {
    "llama": Architecture(_gated),
    "mistral": Architecture(_gated),
    "qwen3": Architecture(_normed),
    "gemma3_text": Architecture(_sandwiched),
    "gpt_neox": Architecture(_classic, norm_vectors=2),
    "gpt2": Architecture(_classic, norm_vectors=2, learned_positions=True),
    "qwen3_next": Architecture(_qwen3_next),
}
