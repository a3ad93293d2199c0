"""Top-k logits with a backward pass over the k selected rows of the head only.

Shapes: B batch, T tokens, N = B * T, k selected, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F


class TopLogits(torch.autograd.Function):
    """The highest products of hidden states with the rows of a table, and the indices of these rows.

    Equals ``(h @ weight.mT).topk(count)``, whose backward pass would store all logits and run two products over the whole
    table. Here it uses only the k selected rows.
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
            # The rows weighted by the gradient give the gradient of the state; its gradient is that of the table.
            table_VD = weight_VD.detach().requires_grad_(ctx.needs_input_grad[1])
            bags_ND = F.embedding_bag(ids_BTk.flatten(0, 1), table_VD, per_sample_weights=weights_Nk, mode="sum")
        grad_VD = None
        if ctx.needs_input_grad[1]:
            (grad_VD,) = torch.autograd.grad(bags_ND, table_VD, h_BTD.flatten(0, 1).to(table_VD.dtype))
        return bags_ND.detach().view_as(h_BTD).to(h_BTD.dtype), grad_VD, None


def top_logits(h_BTD: Tensor, weight_VD: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` highest logits of each hidden state and their token ids, ``[B, T, count]`` each.

    Example:
        >>> logits, ids = top_logits(torch.tensor([[[1.0, 2.0]]]), torch.eye(2), count=1)
        >>> logits.tolist(), ids.tolist()
        ([[[2.0]]], [[[1]]])
    """
    return cast("tuple[Tensor, Tensor]", TopLogits.apply(h_BTD, weight_VD, count))
