"""ElasticMemory: the past as polynomials of time, written exactly and sampled as rows of attention.

Shapes: B batch, H key and value heads, L tokens of a block, N order, S samples, d head width.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from pondera.core.errors import UserError, unknown
from pondera.cost.model import MatMul
from pondera.methods.memory.common import legendre
from pondera.methods.memory.common.segment_layer import RecurrentState
from pondera.methods.memory.common.segment_recurrence import SegmentRecurrence

MEASURES = ("legs", "legt")
POINTS = ("uniform", "recent")


class ElasticMemory(SegmentRecurrence):
    """Each layer's past keys and values are signals of time; their N lowest Legendre coefficients are all that is kept.

    A text is read in blocks. When a block is full, its keys (without positions) and values enter the coefficients by two
    matrices that depend on the block's number alone. Beside the next block stand S rows, sampled from the polynomials at S
    points of the past, and compete with the block's own rows in one softmax. Nothing of it is learned, and where is sampled
    may be changed at any time (`look`).

    Source: "Towards Compressive and Scalable Recurrent Memory", arXiv 2602.11212, Algorithm 1, of which no code is public;
    HiPPO, arXiv 2008.07669.
    Cost: per token S further rows in attention, and a L-th of ``2 H d (N^2 + N L + S N)`` multiplications per layer. A cache
    holds ``2 H d N`` float32 numbers and S rows per layer, the open block, and all of this once more as it was one block
    before, so that drafts can be taken back; nothing grows with the text. In training all blocks of a window are one graph,
    so `tbptt` bounds how far gradients reach, not what activations take; and memory begins anew with each window.
    When not to use it: for a single token of the past. N coefficients over T tokens keep N/T of a signal that is independent
    from token to token; what the layers write must be smooth in time for it to be read again. Nor with FSDP on isolated
    documents (``data.document_mask``), as processes would then call the decoder different numbers of times.
    Resolved: P and the other matrices are exact for signals that are constant over a token (the paper's discretisation is
    not known). Keys are compressed before rotation; memory rows are not rotated and queries are, counted from the block's
    first token, so all memory rows stand at the block's beginning (as Algorithm 1 has it; the origin is not said there).
    Beside a text's first block there are no memory rows: zeros would take softmax mass. Each key and value head has
    coefficients of its own; sampled keys are not normalised. Points lie inside (0, 1), where the basis is bounded best. The
    horizon of gradients is not known; here it is two blocks. Blocks do not overlap, so a block's first token has no exact
    neighbour but those of `local_context`. Coefficients are float32 under any dtype.

    Args:
        block: L, tokens.
        order: N, coefficients per coordinate.
        samples: S, memory rows; 0: blocks without memory.
        points: where they are sampled, 0 = oldest, 1 = newest: ``"uniform"``, ``"recent"`` (denser towards the newest,
            ``1 - (1 - u)^2``), or the points themselves, whose number is then S.
        measure: ``"legs"``, all that was read, evenly; ``"legt"``, a window of the last `theta` tokens.
        theta: of ``"legt"``.
        local_context: rows of the last tokens before a block, kept as they are.
        tbptt: gradients are cut at every so many-th border of blocks; none: never.
        layers: numbers of the layers that have memory; none: all without a sliding window.

    Example:
        >>> memory = ElasticMemory(block=4, order=3, samples=2)
        >>> held = memory.update_memory({}, torch.ones(1, 1, 4, 1), torch.ones(1, 1, 4, 1), [0])
        >>> held["coefficients_v"].flatten().round(decimals=4).abs().tolist(), held["rows_v"].flatten().tolist()
        ([1.0, 0.0, 0.0], [1.0, 1.0])
    """

    paper: ClassVar[str] = "Elastic Memory, arXiv 2602.11212"
    cost: ClassVar[str] = "1 pass; S more rows in attention; memory that does not grow"
    examples: ClassVar[dict[str, str]] = {
        "exact": "ElasticMemory(block=4, order=6, samples=3)",
        "exact-mems": "ElasticMemory(block=4, order=6, points=[0.2, 0.9], measure='legt', theta=7.0, local_context=6)",
        "exact-layers": "ElasticMemory(block=4, order=6, samples=3, layers=[1], local_context=1)",
    }

    def __init__(
        self,
        block: int = 128,
        order: int = 64,
        samples: int = 64,
        points: str | list[float] = "uniform",
        measure: str = "legs",
        theta: float | None = None,
        local_context: int = 0,
        tbptt: int | None = 2,
        layers: list[int] | None = None,
    ) -> None:
        super().__init__(block, local_context, tbptt, layers)
        for name, value, least in (("order", order, 1), ("samples", samples, 0)):
            if value < least:
                raise UserError(f"{name}={value}: give {least} or more")
        if measure not in MEASURES:
            raise unknown("measure", measure, MEASURES)
        if (measure == "legt") != (theta is not None) or (theta is not None and theta <= 0):
            raise UserError(
                f"measure={measure!r}, theta={theta}: 'legt' needs a window of theta tokens, more than 0; 'legs' has none"
            )
        self.order, self.measure, self.theta = order, measure, theta
        self.points: tuple[float, ...] = ()
        self.look(points, samples)

    def look(self, points: str | list[float], samples: int | None = None) -> None:
        """Changes where memory is sampled, from the next block that begins; coefficients stay as they are.

        Within a text the points may move; their number may change only for texts that begin.

        Args:
            points: as the method's argument.
            samples: another number of rows; none: as many as before, or as there are points.

        Raises:
            UserError: points that are not there.
        """
        if isinstance(points, str):
            if points not in POINTS:
                raise unknown("points", points, POINTS)
            count = len(self.points) if samples is None else samples
            middles = [(index + 0.5) / count for index in range(count)]
            self.points = tuple(u if points == "uniform" else 1 - (1 - u) ** 2 for u in middles)
            return
        if not points or not all(0 <= point <= 1 for point in points):
            raise UserError(f"points={points}: give numbers from 0 (the oldest) to 1 (the newest), at least one")
        self.points = tuple(points)

    @property
    def samples(self) -> int:
        """S."""
        return len(self.points)

    def rows(self, blocks: int) -> int:
        """See `SegmentRecurrence.rows`."""
        return self.samples if blocks else 0

    def numbers(self, blocks: int) -> int:
        """See `SegmentRecurrence.numbers`."""
        return self.order if blocks and self.samples else 0

    def update_memory(
        self, held: RecurrentState, key_BHLd: Tensor, value_BHLd: Tensor, blocks: list[int]
    ) -> RecurrentState:
        """See `SegmentRecurrence.update_memory`."""
        if not self.samples:
            return {}
        kind = torch.promote_types(key_BHLd.dtype, torch.float32)
        numbers = blocks[:1] if len(set(blocks)) == 1 else blocks
        each = [self._matrices(number, kind, key_BHLd.device) for number in numbers]
        if len(each) == 1:
            stretch, entry, read = each[0]
        else:
            stretch, entry, read = (torch.stack(kinds)[:, None] for kinds in zip(*each, strict=True))
        new: RecurrentState = {}
        with torch.autocast(key_BHLd.device.type, enabled=False):
            for name, x_BHLd in (("k", key_BHLd), ("v", value_BHLd)):
                coefficients_BHNd = entry @ x_BHLd.to(kind)
                if any(blocks):
                    coefficients_BHNd = stretch @ held[f"coefficients_{name}"] + coefficients_BHNd
                new[f"coefficients_{name}"] = coefficients_BHNd
                new[f"rows_{name}"] = (read @ coefficients_BHNd).to(x_BHLd.dtype)
        return new

    def _matrices(self, blocks: int, kind: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        return _matrices(self.block, self.order, self.points, self.theta, blocks, kind, device)

    def products(self, blocks: int, gradient: bool = False) -> list[MatMul]:
        """See `SegmentRecurrence.products`: block, coefficients and samples, keys and values."""
        if not self.samples or self.shape is None:
            return []
        columns, cut = 2 * self.shape.kv_numbers, self.tbptt is not None and (blocks + 1) % self.tbptt == 0
        begins = self.tbptt is not None and blocks % self.tbptt == 0
        found = [(self.order * self.block, gradient and not cut), (self.order * self.samples, gradient and not cut)]
        if blocks:
            found.append((self.order**2, gradient and not cut and not begins))
        # Their matrices are constants: backward there is one product more, not two.
        return [MatMul(columns * (1 + back), weights, trained=False) for weights, back in found]


@lru_cache(maxsize=256)
def _matrices(
    block: int, order: int, points: tuple[float, ...], theta: float | None, blocks: int, kind: torch.dtype, device: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """What a block that comes after `blocks` others is put behind them by: P, W and the rows of samples, on their device.

    A window that is not full yet is sampled where it is.
    """
    x_S = torch.tensor(points, dtype=torch.float64)
    if theta is None:
        ratio = blocks / (blocks + 1)  # whatever the length of blocks is
        found = legendre.stretch(ratio, order), legendre.entry(blocks * block, block, order)
    else:
        found = _window(theta, block, order)
        x_S = 1 - (1 - x_S) * min(1.0, (blocks + 1) * block / theta)
    stretch, entry, read = (matrix.to(device, kind) for matrix in (*found, legendre.basis(x_S, order)))
    return stretch, entry, read


_window = lru_cache(maxsize=16)(legendre.window)
