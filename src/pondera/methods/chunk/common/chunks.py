"""Chunks of k tokens: which ones are complete, their pooled vectors, and the prediction that each token may use.

Chunks are counted from the first token of each document (with padding and a single document, from the first token of
each sequence), so they do not depend on neighboring documents. Only complete chunks count.

Shapes: B batch, T new tokens, M chunks completed by them (the maximum over the batch), S new and earlier tokens, D
width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from pondera.core.errors import unknown
from pondera.models.backbone import token_positions

POOLINGS = ("mean", "first", "last")


@dataclass(frozen=True)
class Chunks:
    """The chunks that the new tokens of a call complete.

    Args:
        size: k, tokens per chunk.
        position_BT: position of each new token in its document.
        complete_BT: true at the last token of a chunk.
        end_BM: column of each chunk's last token; undefined where `valid_BM` is false.
        valid_BM: false beyond the chunks that the sequence completes.
        document_BM: document number of each chunk; 1 if there is only one document.

    Example:
        >>> Chunks.of(3, batch=1, tokens=8).end_BM.tolist()
        [[2, 5]]
    """

    size: int
    position_BT: Tensor
    complete_BT: Tensor
    end_BM: Tensor
    valid_BM: Tensor
    document_BM: Tensor

    @classmethod
    def of(
        cls,
        size: int,
        batch: int,
        tokens: int,
        mask: Tensor | None = None,
        seen: int = 0,
        device: torch.device | None = None,
    ) -> Chunks:
        """Finds the chunks.

        Args:
            size: k.
            batch: B.
            tokens: T, number of new tokens.
            mask: ``[B, seen + T]``, 0 = padding, else the document number; default: ``None``, one document, no padding.
            seen: number of earlier tokens.
            device: device of the result.
        """
        device = device or torch.device("cpu")
        mask = None if mask is None else mask[:, : seen + tokens].to(device)
        position_BT = token_positions(tokens, mask, seen, device).expand(batch, -1)
        complete_BT = position_BT % size == size - 1
        if mask is None:  # all sequences are alike, so the chunks follow from the positions
            end_BM = torch.arange(tokens, device=device)[(-1 - seen) % size :: size].expand(batch, -1)
            every_BM = torch.ones_like(end_BM)
            return cls(size, position_BT, complete_BT, end_BM, every_BM.bool(), every_BM)
        document_BT = mask[:, -tokens:].long().expand(batch, -1)
        complete_BT = complete_BT & (document_BT > 0)
        count_B = complete_BT.sum(-1)
        most = int(count_B.max()) if complete_BT.numel() else 0
        # A stable sort moves the columns where chunks end to the front, in order.
        end_BM = (~complete_BT).int().argsort(dim=-1, stable=True)[:, :most]
        valid_BM = torch.arange(most, device=device) < count_B[:, None]
        return cls(size, position_BT, complete_BT, end_BM, valid_BM, document_BT.gather(1, end_BM))

    @property
    def most(self) -> int:
        """M."""
        return self.end_BM.shape[1]

    @property
    def follows_BM(self) -> Tensor:
        """``[B, M - 1]``: true if the next chunk belongs to the same document."""
        return self.valid_BM[:, 1:] & (self.document_BM[:, 1:] == self.document_BM[:, :-1])

    def pool(self, h_BSD: Tensor, how: str = "mean") -> Tensor:
        """One vector per chunk, ``[B, M, D]``.

        Args:
            h_BSD: the states of the last k - 1 earlier tokens, then of the new tokens, S = k - 1 + T.
            how: mean, first or last state of the chunk.
        """
        if how not in POOLINGS:
            raise unknown("pooling", how, POOLINGS)
        if how == "mean":
            offset_k = torch.arange(self.size, device=h_BSD.device)
            return self._rows(h_BSD, self.end_BM[..., None] + offset_k).mean(2)
        return self._rows(h_BSD, self.end_BM + (0 if how == "first" else self.size - 1))

    def spread(self, concept_BMD: Tensor, before_BD: Tensor | None = None) -> Tensor:
        """For every token, the prediction made after the last complete chunk, ``[B, T, D]``.

        The token at position p of its document gets prediction (p + 1) // k - 1, counted from 0, and zeros if this is
        -1. Exactly those tokens that predict the tokens of a chunk get the prediction of this chunk.

        Args:
            concept_BMD: the prediction made after each chunk.
            before_BD: the prediction made after the last chunk before the new tokens; default: ``None``, no prediction.
        """
        if before_BD is None:
            before_BD = concept_BMD.new_zeros(concept_BMD.shape[0], concept_BMD.shape[2])
        chosen_BTD = before_BD[:, None]  # the prediction for all tokens, if they complete no chunk
        if self.most:
            every_BND = torch.cat([chosen_BTD, concept_BMD], dim=1)
            chosen_BTD = self._rows(every_BND, self.complete_BT.long().cumsum(-1))
        return chosen_BTD * (self.position_BT >= self.size - 1)[..., None]

    def _rows(self, x_BSD: Tensor, column: Tensor) -> Tensor:
        batch_B = torch.arange(len(x_BSD), device=x_BSD.device)
        return x_BSD[batch_B.view(-1, *[1] * (column.dim() - 1)), column]


def behind(before_BSD: Tensor | None, h_BTD: Tensor, count: int) -> Tensor:
    """Prepends the last `count` earlier states to the new states; zeros where there are fewer.

    Example:
        >>> behind(None, torch.ones(1, 2, 1), 2).flatten().tolist()
        [0.0, 0.0, 1.0, 1.0]
    """
    if before_BSD is not None and count:
        h_BTD = torch.cat([before_BSD[:, -count:], h_BTD], dim=1)
        count -= min(count, before_BSD.shape[1])
    return F.pad(h_BTD, (0, 0, count, 0))
