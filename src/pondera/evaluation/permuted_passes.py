"""A control for learned decisions: the passes of a window, given to its tokens in random order.

Shapes: B batch, C context.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pondera.core.metric import SCORES
from pondera.core.mixed_seed import mixed_seed

if TYPE_CHECKING:
    from pondera.models.adaptive_lm import AdaptiveLM


def can_permute(model: AdaptiveLM) -> bool:
    """Whether the method of a model decides the passes of each token, and accepts other decisions in one call."""
    method = model.method
    return (
        method is not None
        and model.kv_cache is None
        and bool(getattr(method, "adaptive", False))
        and method.accepts_passes
    )


def permuted_scores(model: AdaptiveLM, score: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    """The scores with permuted passes, named ``permuted_error`` and so on; empty if the model decides no passes.

    Args:
        model: the model.
        score: returns the scores; takes ``permute``.
    """
    found = score(permute=True) if can_permute(model) else {}
    return {f"permuted_{name}": found[name] for name in (*SCORES, "accuracy") if name in found}


def run_windows(
    model: AdaptiveLM, given: Mapping[str, Any], windows: Sequence[Mapping[str, Tensor]], permute: bool = False
) -> Any:
    """The output of the model on a batch; with `permute` it runs twice, the second time with permuted passes.

    As many tokens take as many passes, and the read-out is the same; only the choice of the tokens is lost. The order
    depends on the number of the window only.

    Args:
        model: in evaluation mode.
        given: the arguments of the model.
        windows: the windows of the batch, with their ``index``.
        permute: give the passes of each window to its tokens in random order.
    """
    out = model(**given)
    if not permute:
        return out
    return model(**given, passes=permuted(out.passes, [int(window["index"]) for window in windows]))


def permuted(passes_BC: Tensor, numbers: Sequence[int]) -> Tensor:
    """The entries of each row in an order that depends on the number of the row.

    Example:
        >>> permuted(torch.tensor([[1, 2, 3, 4]]), numbers=[7]).sort().values.tolist()
        [[1, 2, 3, 4]]
    """
    rows = []
    for passes_C, number in zip(passes_BC, numbers, strict=True):
        generator = torch.Generator("cpu").manual_seed(mixed_seed(number))
        rows.append(passes_C[torch.randperm(len(passes_C), generator=generator, device="cpu").to(passes_C.device)])
    return torch.stack(rows)
