"""What a model costs per token, with the method that it was given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pondera.core.effort import FULL, Effort
from pondera.cost.model import CostModel, CostSchedule, DecoderPass, live_cache_bytes

if TYPE_CHECKING:
    from pondera.models.adaptive_lm import AdaptiveLM


def cost_report(
    model: AdaptiveLM,
    context: int,
    recompute: bool = False,
    shares: Sequence[float] | None = None,
    budget: Effort = FULL,
) -> dict[str, float]:
    """The analytic price of one token.

    Args:
        model: only its configs are read.
        context: tokens per window.
        recompute: training runs the layers forward once more in the backward pass (gradient checkpointing).
        shares: of the tokens that take each pass, as measured; none: every token takes all that the method has.
        budget: what `shares` were measured with; it tells what a method leaves out that is no pass.

    Returns:
        ``inference_flops_per_token`` of decoding with half a context cached, ``training_flops_per_token`` (forward and
        backward, at the mean number of random rounds), and ``kv_bytes_per_token`` of a cache that holds a whole context
        in the dtype of the model; with a memory it is measured, as what is kept depends on what is read.

    Raises:
        UserError: an architecture that has no price yet.
    """
    prices = CostModel(model.backbone.config, None if model.head is None else model.head.weights)
    method = None if model.method is None else model.method.at_budget(budget)
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
    trained = prices.training(CostSchedule(tuple(training), context, context))
    if recompute:
        trained += sum(prices.step(call) for call in training if isinstance(call, DecoderPass))
    number_bytes = next(model.parameters()).element_size()
    held = prices.cache_bytes(round(slots), number_bytes, drops_window_rows, newest=round(newest))
    if model.kv_cache is not None and model.kv_cache.fitted and model.device.type != "meta":
        held = _kept_bytes(model, context, budget)
    elif method is not None:
        held += method.extra_cache_bytes(context, number_bytes)
    return {
        "inference_flops_per_token": prices.forward(CostSchedule(tuple(decoding), head_rows=1, tokens=1)),
        "training_flops_per_token": trained / context,
        "kv_bytes_per_token": held / context,
    }


def _kept_bytes(model: AdaptiveLM, context: int, budget: Effort) -> float:
    """Bytes of the cache of a model with a KV-cache method after `context` tokens, spare room included."""
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
