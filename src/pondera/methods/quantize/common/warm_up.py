"""Warm-up gate: vectors pass through unquantized until the codebook is initialized from them.

Shapes: N vectors of a batch, M vectors kept, C width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pondera.methods.quantize.common.ranks import gathered

KEPT_PER_CODE = 32
"""Number of vectors kept per code for initialization."""


class WarmUp(nn.Module):
    """A gate that opens once, with a buffer of the latest vectors before it opens.

    The gate starts closed if quantization starts at a later step, or if codes are initialized from future vectors. Its
    buffer is the same on every rank and is saved, so a resumed run opens the gate with the same vectors.

    Source: arXiv 2603.17052 and 2605.06870: continuous first, discrete later.
    Cost: memory for `most` vectors if codes are initialized from vectors, during and after the warm-up; `fold` frees
    it.
    Resolved: the buffer keeps the latest vectors, not a sample of all, because earlier vectors come from an outdated
    encoder.

    Args:
        start_step: the first optimizer step that quantizes.
        most: number of vectors to keep; 0: none.
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
        """True while vectors pass through unquantized."""
        return not self.is_open

    @property
    def wants_vectors(self) -> bool:
        """True if codes are initialized from vectors."""
        return len(self.latest_MC) > 0

    @torch.no_grad()
    def keep(self, x_NC: Tensor) -> None:
        """Stores the vectors of a batch, from all ranks."""
        if self.wants_vectors:
            new_MC = gathered(x_NC).to(self.latest_MC)
            known_MC = torch.cat([self.vectors(), new_MC])[-len(self.latest_MC) :]
            self.latest_MC[: len(known_MC)] = known_MC
            self.kept.fill_(len(known_MC))
            self.per_batch.fill_(len(new_MC))

    def vectors(self) -> Tensor:
        """``[M, C]``: the latest vectors, oldest first."""
        return self.latest_MC[: int(self.kept)]

    def is_due(self, step: int) -> bool:
        """True if the gate can open at this step."""
        return step >= self.start_step and (not self.wants_vectors or int(self.kept) > 0)
