"""Finite-value filter: keeps vectors with inf or nan out of statistics.

Shapes: N vectors, C width.
"""

from __future__ import annotations

import logging
from typing import Any, Self

from torch import Tensor

log = logging.getLogger(__name__)


class FiniteVectors:
    """Excludes vectors with inf or nan from stored statistics: averages, ranges, vectors for initialization or respawn.

    One such vector would make a moving average nan forever. The vector itself is still coded, and the loss of its batch
    is not finite, so training detects it. The first time, it logs a warning; copies of a quantizer, and the parts built
    from one description, share this object, so they warn only once.
    """

    def __init__(self) -> None:
        self.warned = False

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def of(self, x_NC: Tensor, name: str) -> Tensor | None:
        """Indices of the finite vectors; ``None``: all.

        Args:
            x_NC: the vectors.
            name: name of the quantizer, for the warning.
        """
        finite_N = x_NC.isfinite().all(1)
        if finite_N.all():
            return None
        if not self.warned:
            self.warned = True
            log.warning(
                "%s: %d of %d vectors contain inf or nan; its statistics exclude such vectors (shown once)",
                name,
                int((~finite_N).sum()),
                len(x_NC),
            )
        return finite_N.nonzero()[:, 0]
