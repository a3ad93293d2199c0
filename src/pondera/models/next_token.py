"""The next-token loss, and the sum of all loss terms of a call.

Shapes: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from pondera.core.loss_terms import LossTerm

IGNORED = -100
"""Label of tokens without a loss, as in transformers."""


def shifted(labels_BT: Tensor) -> Tensor:
    """The label of each token's successor, ``[B, T]``; -100 after the last token."""
    return F.pad(labels_BT, (0, 1), value=IGNORED)[:, 1:]


def next_token_term(logits_BTV: Tensor, shift_labels_BT: Tensor) -> LossTerm:
    """Cross-entropy of each next token, in float32, as a sum and a count of the labels that are not -100."""
    flat = shift_labels_BT.reshape(-1).to(logits_BTV.device)
    total = F.cross_entropy(logits_BTV.float().flatten(0, 1), flat, ignore_index=IGNORED, reduction="sum")
    return LossTerm(total, (flat != IGNORED).sum())


def total_loss(terms: dict[str, LossTerm], items: Tensor | int | None = None) -> Tensor:
    """The weighted sum of the means of the loss terms.

    Args:
        terms: the loss terms by name; ``next_token`` is one of them.
        items: the number of labels in the whole optimizer step; the result is then the share of this call in the loss of the
            step. Default: `None`, the loss of this call.
    """
    loss = torch.stack([term.weight * term.mean() for term in terms.values()]).sum()
    if items is None:
        return loss
    return loss * (terms["next_token"].count / torch.as_tensor(items, device=loss.device).reshape(-1)[0].clamp(min=1))
