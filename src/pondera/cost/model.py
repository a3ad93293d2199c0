"""Cost per token: FLOPs, cache bytes and parameters, computed from a config.

`CostModel` needs only the config of a backbone; `pondera.cost.measure` measures a running model, and the tests compare both.
`pondera.arch.layers` defines what counts.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from pondera.arch.families import describe
from pondera.cost.schedule import CostSchedule, DecoderPass, MatMul

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class CostModel:
    """Computes the cost of a backbone from its config.

    FLOPs follow ``torch.utils.flop_counter``: a multiply-add is two; matrix products, convolutions and attention count,
    attention over the full query x key rectangle; the rest is free. The backward pass of attention depends on the attention
    implementation of the config: all but ``"eager"`` are fused kernels, which recompute the scores.

    Args:
        config: text config of the backbone.
        head: multiplications per row of the output head; default: `None`, those of the output matrix.
        lora: rank of LoRA in `training`; the backbone is then frozen, its output matrix included (an own `head` is not).
            Default: 0, all parameters train.

    Raises:
        UserError: a model type without a cost model; the message lists the known ones.

    Example:
        >>> from transformers import LlamaConfig
        >>> cost = CostModel(LlamaConfig(hidden_size=64, num_attention_heads=4, num_hidden_layers=2,
        ...                              intermediate_size=96, vocab_size=97))
        >>> cost.forward(CostSchedule(calls=(DecoderPass(queries=8, keys=8),), head_rows=8, tokens=8)) / 8
        155776.0
        >>> cost.cache_bytes(slots=8)
        8192
    """

    def __init__(self, config: PretrainedConfig, head: int | None = None, lora: int = 0) -> None:
        self._stack, self._lora = describe(config), lora
        self._frozen_head = lora > 0 and head is None
        self._head = self._stack.head if head is None else head
        self._layers = Counter(self._stack.layers)  # few are distinct, and each is computed once

    def step(self, call: DecoderPass | MatMul) -> float:
        """Forward FLOPs of one pass through the decoder stack (without output head), or of a matrix product."""
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

    def training(self, schedule: CostSchedule, recompute: bool = False) -> float:
        """Forward and backward FLOPs of a schedule.

        With LoRA a matrix of the backbone costs two thirds: its own gradient is not computed. The gradient of the inputs is
        counted in every layer, although the first attention needs none where the inputs are frozen embeddings.

        Args:
            schedule: the operations.
            recompute: the backward pass runs each decoder pass forward a second time (gradient checkpointing).
        """
        passes = [call for call in schedule.calls if isinstance(call, DecoderPass)]
        added = sum(map(self._low_rank, passes))
        head = (1 if self._frozen_head else 2) * self.head(schedule.head_rows)
        total = self.forward(schedule) + head + sum(map(self._backward, schedule.calls)) + 3 * added
        return total + (sum(map(self.step, passes)) + added if recompute else 0)

    def _backward(self, call: DecoderPass | MatMul) -> float:
        if isinstance(call, MatMul):
            frozen = self._frozen_head and call.weights == "head"
            return (1 if frozen else 2) * self.step(call) if call.trained else 0.0
        # Twice the forward pass: gradients of the weights and, because the embedding is trained, of the input.
        rows = (2 if self._has_lora(call) else 4) * call.queries
        once = sum(n * (rows * layer.weights + layer.mixer.backward(call)) for layer, n in self._layers.items())
        return float(self._times(call) * once)

    def _low_rank(self, call: DecoderPass) -> float:
        """Forward FLOPs of the products that LoRA adds to a pass."""
        rows = 2 * call.queries * self._lora if self._has_lora(call) else 0
        return float(self._times(call) * rows * sum(n * layer.borders for layer, n in self._layers.items()))

    def _has_lora(self, call: DecoderPass) -> bool:
        return self._lora > 0 and call.layers is None  # the layers that a method adds train fully

    def _times(self, call: DecoderPass) -> float:
        """Number of passes through the whole stack; a part of the layers counts as a fraction."""
        count = len(self._stack.layers)
        return call.repeats * (count if call.layers is None else call.layers) / count

    def cache_bytes(self, slots: int, dtype_bytes: int = 4, drops_window_rows: bool = True, newest: int = 1) -> int:
        """Bytes of a ``DynamicCache(config=config)`` for one sequence after `slots` KV slots.

        Sliding-window layers store at most their window (as after any decode step; a longer prompt in one call stays in
        memory until then), and linear-attention layers store states of fixed size.

        Args:
            slots: KV slots that the decoder has processed.
            dtype_bytes: bytes per number: 4 for float32, 2 for bfloat16.
            drops_window_rows: false if the cache masks rows outside of a sliding window instead of dropping them.
            newest: KV slots of the newest call, which stay in the storage of a sliding-window layer.
        """
        return sum(
            n * layer.mixer.cache_bytes(slots, dtype_bytes, drops_window_rows, newest)
            for layer, n in self._layers.items()
        )

    def parameters(self) -> dict[str, int]:
        """Number of parameters: ``embedding`` (with learned positions), ``head`` (0 if tied), ``body``, and ``total``."""
        stack = self._stack
        body = stack.norm + sum(layer.weights + layer.extra for layer in stack.layers)
        head = 0 if stack.tied else stack.head
        return {"total": stack.embedding + head + body, "embedding": stack.embedding, "head": head, "body": body}
