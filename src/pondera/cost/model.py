"""The price of a token: FLOPs, cache bytes and parameters, worked out from a config.

`CostModel` needs only the config of a backbone; `pondera.cost.measure` looks at what really happens, and the tests hold the
two together. What is counted, and how a layer is described, is in `pondera.arch.layers`.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from pondera.arch.families import describe
from pondera.cost.schedule import CostSchedule, DecoderPass, MatMul

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class CostModel:
    """What a backbone costs, by arithmetic on its config.

    FLOPs follow ``torch.utils.flop_counter``: a multiply-add is two; matrix products, convolutions and attention count,
    the last over the full query x key rectangle; the rest is free. Attention's backward pass is that of the config's
    attention implementation: every one but ``"eager"`` is a fused kernel, which computes the scores a second time.

    Args:
        config: text config of the backbone.
        head: numbers that a row is multiplied with where another head than the architecture's scores the vocabulary.

    Raises:
        UserError: a model type that has no price yet; the message names those that do.

    Example:
        >>> from transformers import LlamaConfig
        >>> prices = CostModel(LlamaConfig(hidden_size=64, num_attention_heads=4, num_hidden_layers=2,
        ...                             intermediate_size=96, vocab_size=97))
        >>> prices.forward(CostSchedule(calls=(DecoderPass(queries=8, keys=8),), head_rows=8, tokens=8)) / 8
        155776.0
        >>> prices.cache_bytes(slots=8)
        8192
    """

    def __init__(self, config: PretrainedConfig, head: int | None = None) -> None:
        self._stack = describe(config)
        self._head = self._stack.head if head is None else head
        self._layers = Counter(self._stack.layers)  # few are distinct, and each is priced once

    def step(self, call: DecoderPass | MatMul) -> float:
        """Forward FLOPs of one pass through the decoder stack (no output head), or of a product beside it."""
        if isinstance(call, MatMul):
            return 2.0 * call.rows * (self._head if call.weights == "head" else call.weights)
        rows = 2 * call.queries
        once = sum(n * (rows * layer.weights + layer.mixer.forward(call)) for layer, n in self._layers.items())
        return float(self._times(call) * once)

    def head(self, rows: int) -> float:
        """Forward FLOPs of the output head on `rows` rows."""
        return 2.0 * self._head * rows

    def forward(self, schedule: CostSchedule) -> float:
        """Forward FLOPs of a schedule."""
        return self.head(schedule.head_rows) + sum(self.step(call) for call in schedule.calls)

    def training(self, schedule: CostSchedule) -> float:
        """FLOPs of a schedule, forward and backward, with every parameter trainable and no activation recomputed."""
        return self.forward(schedule) + 2 * self.head(schedule.head_rows) + sum(map(self._backward, schedule.calls))

    def _backward(self, call: DecoderPass | MatMul) -> float:
        if isinstance(call, MatMul):
            return 2 * self.step(call) if call.trained else 0.0
        # Twice a matrix's forward: the gradient of its weights and, as the embedding is trained too, of its input.
        rows = 4 * call.queries
        once = sum(n * (rows * layer.weights + layer.mixer.backward(call)) for layer, n in self._layers.items())
        return float(self._times(call) * once)

    def _times(self, call: DecoderPass) -> float:
        """How many times the whole stack is run, for its price."""
        count = len(self._stack.layers)
        return call.repeats * (count if call.layers is None else call.layers) / count

    def cache_bytes(self, slots: int, dtype_bytes: int = 4, drops_window_rows: bool = True, newest: int = 1) -> int:
        """Bytes that a ``DynamicCache(config=config)`` holds for one sequence after `slots` rows.

        Sliding-window layers are capped at their window (as they are after any decoding step; a longer prompt given in
        one piece stays in memory until then) and linear-attention layers hold states of a fixed size.

        Args:
            slots: rows that have been through the decoder.
            dtype_bytes: bytes per cached number: 4 for float32, 2 for bfloat16.
            newest: rows of the newest call, which a sliding-window layer's storage keeps whole.
            slides: false for a cache of a method's own whose sliding-window layers mask old rows instead of dropping them.
        """
        return sum(
            n * layer.mixer.cache_bytes(slots, dtype_bytes, drops_window_rows, newest)
            for layer, n in self._layers.items()
        )

    def parameters(self) -> dict[str, int]:
        """Parameters: ``embedding`` (with learned positions), ``head`` (0 if tied), ``body``, their sum ``total``."""
        stack = self._stack
        body = stack.norm + sum(layer.weights + layer.extra for layer in stack.layers)
        head = 0 if stack.tied else stack.head
        return {"total": stack.embedding + head + body, "embedding": stack.embedding, "head": head, "body": body}
