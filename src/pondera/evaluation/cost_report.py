"""The cost of a token: FLOPs and cache bytes of a model with its method."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pondera.core.effort import FULL, Effort
from pondera.cost.measure import live_cache_bytes
from pondera.cost.model import CostModel
from pondera.cost.schedule import CostSchedule, DecoderPass

if TYPE_CHECKING:
    from pondera.models.adaptive_lm import AdaptiveLM


def cost_report(
    model: AdaptiveLM,
    context: int,
    recompute: bool = False,
    shares: Sequence[float] | None = None,
    budget: Effort = FULL,
    lora: int = 0,
) -> dict[str, float]:
    """The analytic cost of one token.

    Args:
        model: only its configs are read.
        context: tokens per window.
        recompute: the backward pass runs each layer forward a second time (gradient checkpointing).
        shares: the measured share of the tokens that takes each pass (default: `None`, every token takes all passes).
        budget: the effort at which `shares` were measured; the method uses it to exclude work that is not a pass.
        lora: rank of LoRA in training; the backbone is then frozen. Inference does not depend on it.

    Returns:
        ``inference_flops_per_token`` of decoding with half a context cached, ``training_flops_per_token`` (forward and
        backward, at the mean number of random rounds), and ``kv_bytes_per_token`` of a cache that holds a whole context
        in the dtype of the model. With a KV cache method the bytes are measured, because they may depend on the input.

    Raises:
        UserError: the cost of this architecture is not known.
    """
    prices = CostModel(model.backbone.config, None if model.head is None else model.head.weights, lora)
    method = None if model.method is None else model.method.at_budget(budget)
    shares = shares and [share for share in shares if share]  # measured shares end with the passes that no token took
    cached, newest, slots = context // 2, 1.0, float(context)
    if method is None:
        decoding, training = [DecoderPass(1, cached + 1, cached=True)], [DecoderPass(context, context)]
    else:
        decoding = method.cost_schedule(1, context=cached, shares=shares)
        training = method.cost_schedule(context, training=True, shares=shares)
        newest = next(
            call.queries for call in reversed(decoding) if isinstance(call, DecoderPass) and call.layers is None
        )
        slots = method.slots(context, shares)
    drops_window_rows = method is None or method.drops_window_rows
    trained = prices.training(CostSchedule(tuple(training), context, context), recompute)
    number_bytes = next(model.parameters()).element_size()
    cache_bytes = prices.cache_bytes(round(slots), number_bytes, drops_window_rows, newest=round(newest))
    if model.kv_cache is not None and model.kv_cache.fitted and model.device.type != "meta":
        cache_bytes = _kept_bytes(model, context, budget)
    if method is not None:
        cache_bytes += method.extra_cache_bytes(context, number_bytes)
    return {
        "inference_flops_per_token": prices.forward(CostSchedule(tuple(decoding), head_rows=1, tokens=1)),
        "training_flops_per_token": trained / context,
        "kv_bytes_per_token": cache_bytes / context,
    }


def _kept_bytes(model: AdaptiveLM, context: int, budget: Effort) -> float:
    """Measured bytes of a model's compressed cache after `context` tokens, including unused capacity."""
    import torch

    from pondera.evaluation.chunked_forward import chunked_forward

    draw = torch.Generator().manual_seed(0)
    ids_1T = torch.randint(model.backbone.config.vocab_size, (1, context), generator=draw).to(model.device)
    cache, was_training = model.new_cache(), model.training
    model.eval()
    effort = {"effort": budget.effort, "max_passes": budget.max_passes} if model.method is not None else None
    for _ in chunked_forward(model, cache, ids_1T, prompt=context // 2, budget=effort):
        pass
    model.train(was_training)
    return float(live_cache_bytes(cache))
