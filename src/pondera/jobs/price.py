"""What a model costs per token, with the method that it was given."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pondera.ground.cost import Call, Prices, Schedule

if TYPE_CHECKING:
    from pondera.model.lm import AdaptiveLM


def price(model: AdaptiveLM, context: int, recompute: bool = False) -> dict[str, float]:
    """The analytic price of one token.

    Args:
        model: only its configs are read.
        context: tokens per window.
        recompute: training runs the layers forward once more in the backward pass (gradient checkpointing).

    Returns:
        ``inference_flops_per_token`` of decoding with half a context cached, ``training_flops_per_token`` (forward and
        backward, at the mean number of random rounds), and ``kv_bytes_per_token`` of a cache that holds a whole context
        in the dtype of the model.

    Raises:
        UserError: an architecture that has no price yet.
    """
    prices, think = Prices(model.backbone.config), model.think
    cached = context // 2
    if think is None:
        decoding, training = [Call(1, cached + 1, cached=True)], [Call(context, context)]
    else:
        decoding, training = think.calls(1, context=cached), think.calls(context, training=True)
    slots = context * (think.slots_per_token if think is not None else 1)
    slides = think is None or think.slides
    trained = prices.training(Schedule(tuple(training), context, context))
    if recompute:
        trained += sum(map(prices.step, training))
    number_bytes = next(model.parameters()).element_size()
    return {
        "inference_flops_per_token": prices.forward(Schedule(tuple(decoding), head_rows=1, tokens=1)),
        "training_flops_per_token": trained / context,
        "kv_bytes_per_token": prices.cache_bytes(slots, number_bytes, slides, newest=decoding[-1].queries) / context,
    }
