"""The warm-up gate: vectors pass unquantized until they are worth a codebook, which is then made from them.

Shapes: N vectors of a batch, M vectors kept, C width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pondera.methods.quantize.common.ranks import gathered

KEPT_PER_CODE = 32
"""Vectors kept for each code that is to be made from them."""


class WarmUp(nn.Module):
    """A gate that opens once, and the latest vectors that came before it did.

    It is closed where quantizing begins at a later step, or where codes are to be made from vectors that are yet to come.
    What it keeps is the same on every rank, and is saved, so that a run that is resumed opens it with the same vectors.

    Source: arXiv 2603.17052 and 2605.06870: continuous first, discrete later.
    Cost: `most` vectors of memory where codes are made from vectors, during the warm-up and after; folding drops them.
    Resolved: the latest vectors are kept, not a sample of all, as the encoder that made earlier ones is gone.

    Args:
        start_step: the first optimizer step that quantizes.
        most: vectors to keep; 0: none are wanted.
        width: C.
    """

    latest_MC: Tensor
    kept: Tensor
    per_batch: Tensor
    is_open: Tensor

    def __init__(self, start_step: int, most: int, width: int) -> None:
        super().__init__()
        self.start_step = start_step
        self.register_buffer("latest_MC", torch.zeros(most, width))
        self.register_buffer("kept", torch.zeros((), dtype=torch.long))
        self.register_buffer("per_batch", torch.zeros((), dtype=torch.long))
        self.register_buffer("is_open", torch.tensor(start_step == 0 and most == 0))

    @property
    def closed(self) -> bool:
        """Whether vectors still pass unquantized."""
        return not self.is_open

    @property
    def wants_vectors(self) -> bool:
        """Whether codes are to be made from what came."""
        return len(self.latest_MC) > 0

    @torch.no_grad()
    def keep(self, x_NC: Tensor) -> None:
        """Notes the vectors of a batch, those of all ranks."""
        if self.wants_vectors:
            new_MC = gathered(x_NC).to(self.latest_MC)
            known_MC = torch.cat([self.vectors(), new_MC])[-len(self.latest_MC) :]
            self.latest_MC[: len(known_MC)] = known_MC
            self.kept.fill_(len(known_MC))
            self.per_batch.fill_(len(new_MC))

    def vectors(self) -> Tensor:
        """``[M, C]``: the latest that came, oldest first."""
        return self.latest_MC[: int(self.kept)]

    def is_due(self, step: int) -> bool:
        """Whether the gate can open at this step."""
        return step >= self.start_step and (not self.wants_vectors or int(self.kept) > 0)
