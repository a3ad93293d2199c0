"""Which vectors may enter statistics.

Shapes: N vectors, C width.
"""

from __future__ import annotations

import logging
from typing import Any, Self

from torch import Tensor

log = logging.getLogger(__name__)


class FiniteVectors:
    """Leaves vectors with inf or nan out of what a quantizer keeps: averages, ranges, vectors to start or respawn from.

    One such vector would make a moving average nan for good. The vector itself is still coded, and the loss of its batch is
    not finite, so training notices it. The first time it happens a warning is logged; copies of a quantizer and the parts
    that are built from one description share this object, so that they warn once together.
    """

    def __init__(self) -> None:
        self.warned = False

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def of(self, x_NC: Tensor, name: str) -> Tensor | None:
        """Numbers of the finite vectors; `None`: all of them.

        Args:
            x_NC: the vectors.
            name: of the quantizer, for the warning.
        """
        finite_N = x_NC.isfinite().all(1)
        if finite_N.all():
            return None
        if not self.warned:
            self.warned = True
            log.warning(
                "%s: %d of %d vectors hold inf or nan; it leaves such vectors out of its statistics (said once)",
                name,
                int((~finite_N).sum()),
                len(x_NC),
            )
        return finite_N.nonzero()[:, 0]
