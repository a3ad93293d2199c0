"""What one layer of each architecture multiplies and remembers; `pondera.cost.model` adds the layers up.

A layer is a few weight matrices, which every row meets, and a mixer, which looks at earlier rows. To price another
architecture, write a function that describes its layer and its ends, and enter it in `ARCHITECTURES`.

A multiply-add is two FLOPs. Counted are matrix products, convolutions and attention, the last over the whole
query x key rectangle that its kernel is given. Norms, softmax, rotations and look-ups are free.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from pondera.core.errors import UserError


@dataclass(frozen=True)
class DecoderPass:
    """One call of the decoder stack, or of further layers that are like its own, for one sequence.

    Args:
        queries: rows (slots) that run.
        keys: rows each attention query is scored against, including the new ones.
        cached: a cache held earlier rows; a linear-attention layer then takes the recurrent step when ``queries == 1``.
        repeats: how many times it is made; a fraction where the number is random and this is its mean.
        wider: coordinates that queries, keys and values of every head have beyond the architecture's own.
        layers: how many layers run, each at the mean price of the stack's; none: the stack.
    """

    queries: float
    keys: float
    cached: bool = False
    repeats: float = 1
    wider: int = field(default=0, repr=False)
    layers: int | None = field(default=None, repr=False)


@dataclass(frozen=True)
class MatMul:
    """Rows that a method multiplies with a matrix outside of the decoder stack, for one sequence.

    Args:
        rows: how many, fractions as in `DecoderPass`.
        weights: entries of the matrix; ``"head"``: of the output head or the embedding table, which are of one size.
        trained: false where no gradient goes through it, or only through a few of its results.
    """

    rows: float
    weights: int | Literal["head"]
    trained: bool = True


@dataclass(frozen=True)
class Attention:
    """Softmax attention; with a `window`, the cache keeps only that many rows."""

    heads: int
    kv_heads: int
    head_dim: int
    window: int | None
    fused: bool

    def forward(self, call: DecoderPass) -> float:
        return 2 * self._product(call)  # scores, and their mix of the values

    def backward(self, call: DecoderPass) -> float:
        # Four gradients; a fused kernel has kept no scores and computes them again.
        return (5 if self.fused else 4) * self._product(call)

    def _product(self, call: DecoderPass) -> float:
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

    def forward(self, call: DecoderPass) -> float:
        return self._convolution(call) + self.value_heads * self._chunks(call) * self._products()

    def backward(self, call: DecoderPass) -> float:
        # Each product has two gradients, and each of the two triangular solves a product in its own. Four are saved:
        # the state before the first chunk, in two products, needs none, and the state after the last is not used.
        chunks = self._chunks(call)
        solves = 2 * self.CHUNK**2 * (self.key_dim + self.value_dim)
        unused = 4 * 2 * self.CHUNK * self.key_dim * self.value_dim if chunks else 0
        scan = chunks * (2 * self._products() + solves) - unused
        return 2 * self._convolution(call) + self.value_heads * scan

    def _convolution(self, call: DecoderPass) -> float:
        # The convolution is padded on both sides, and a cache puts its last `kernel` rows in front.
        if not call.cached:
            rows = call.queries + self.kernel - 1
        else:
            rows = 2 if call.queries == 1 else call.queries + 2 * self.kernel - 1
        return 2 * rows * self.channels * self.kernel

    def _chunks(self, call: DecoderPass) -> float:
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
    """

    weights: int
    mixer: Attention | DeltaRule
    extra: int


@dataclass(frozen=True)
class Stack:
    """A whole backbone: its layers, embedding tables, final norm and output head (whose weights may be tied)."""

    layers: tuple[Layer, ...]
    embedding: int
    norm: int
    head: int
    tied: bool


@dataclass(frozen=True)
class Architecture:
    """How a model type is built: its `layer(config, index)`, vectors per norm (two with a bias), learned positions."""

    layer: Callable[[Any, int], Layer]
    norm_vectors: int = 1
    learned_positions: bool = False


def describe(config: Any) -> Stack:
    """The backbone that a text config describes.

    Raises:
        UserError: an architecture that has no entry in `ARCHITECTURES`.
    """
    if config.model_type not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise UserError(
            f"no price is known for model_type {config.model_type!r}; use one of {known}, "
            "or describe its layer in pondera/arch/families.py"
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
        fused=config._attn_implementation != "eager",  # unset: transformers will choose sdpa
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
    """MLP weights that a row of Qwen3-Next meets, and those of the experts that it does not."""
    width, experts = config.hidden_size, config.num_experts
    if index in config.mlp_only_layers or not experts or (index + 1) % config.decoder_sparse_step:
        return 3 * width * config.intermediate_size, 0
    expert = 3 * width * config.moe_intermediate_size
    shared = 3 * width * config.shared_expert_intermediate_size
    chosen = config.num_experts_per_tok
    return chosen * expert + shared + width * (experts + 1), (experts - chosen) * expert  # + 1: the shared one's gate


ARCHITECTURES = {
    "llama": Architecture(_gated),
    "mistral": Architecture(_gated),
    "qwen3": Architecture(_normed),
    "gemma3_text": Architecture(_sandwiched),
    "gpt_neox": Architecture(_classic, norm_vectors=2),
    "gpt2": Architecture(_classic, norm_vectors=2, learned_positions=True),
    "qwen3_next": Architecture(_qwen3_next),
}
