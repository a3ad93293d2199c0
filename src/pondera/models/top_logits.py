"""The highest logits alone: what a mixture of a few tokens needs of the head, in the backward pass, too.

Shapes: B batch, T tokens, N tokens of all texts, k chosen, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F


class TopLogits(torch.autograd.Function):
    """States times the rows of a table, the highest products and the rows they belong to.

    Equals ``(h @ weight.mT).topk(count)``, whose backward pass would run two products over the whole table, with all
    logits kept for it. Here only the chosen rows take part: k instead of V of them.
    """

    @staticmethod
    def forward(ctx: Any, h_BTD: Tensor, weight_VD: Tensor, count: int) -> tuple[Tensor, Tensor]:
        logits_BTk, ids_BTk = (h_BTD @ weight_VD.mT).topk(count, dim=-1)
        ctx.save_for_backward(h_BTD, weight_VD, ids_BTk)
        ctx.mark_non_differentiable(ids_BTk)
        return logits_BTk, ids_BTk

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor, Tensor | None, None]:
        h_BTD, weight_VD, ids_BTk = ctx.saved_tensors
        weights_Nk = grad_outputs[0].flatten(0, 1).to(weight_VD.dtype).contiguous()
        with torch.enable_grad():
            # A bag of rows weighted by the gradient is the gradient of the state; the bag's own gradient is the table's.
            table_VD = weight_VD.detach().requires_grad_(ctx.needs_input_grad[1])
            bags_ND = F.embedding_bag(ids_BTk.flatten(0, 1), table_VD, per_sample_weights=weights_Nk, mode="sum")
        grad_VD = None
        if ctx.needs_input_grad[1]:
            (grad_VD,) = torch.autograd.grad(bags_ND, table_VD, h_BTD.flatten(0, 1).to(table_VD.dtype))
        return bags_ND.detach().view_as(h_BTD).to(h_BTD.dtype), grad_VD, None


def top_logits(h_BTD: Tensor, weight_VD: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` highest logits of each state and their tokens, ``[B, T, count]`` each.

    Example:
        >>> logits, ids = top_logits(torch.tensor([[[1.0, 2.0]]]), torch.eye(2), count=1)
        >>> logits.tolist(), ids.tolist()
        ([[[2.0]]], [[[1]]])
    """
    return cast("tuple[Tensor, Tensor]", TopLogits.apply(h_BTD, weight_VD, count))
