"""Elastic Memory: past keys and values as Legendre coefficients, sampled as extra attention slots.

Shapes: B batch, H key and value heads, L tokens of a block, N order, S samples, d head width.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from pondera.core.errors import UserError, unknown
from pondera.cost.schedule import MatMul
from pondera.methods.memory.common import legendre
from pondera.methods.memory.common.segment_layer import RecurrentState
from pondera.methods.memory.common.segment_recurrence import SegmentRecurrence

MEASURES = ("legs", "legt")
POINTS = ("uniform", "recent")


class ElasticMemory(SegmentRecurrence):
    """Compresses each layer's past keys and values, as signals of time, to their N lowest Legendre coefficients.

    The method reads a sequence in blocks. When a block is complete, two matrices, which depend only on the block's
    index, add its keys (before RoPE) and values to the coefficients. The next block then attends to S extra slots,
    sampled from the polynomials at S points of the past, together with its own slots in one softmax. The method has no
    parameters, and `look` can change the sampling points at any time.

    Source: "Towards Compressive and Scalable Recurrent Memory", arXiv 2602.11212, Algorithm 1, no public code; HiPPO,
    arXiv 2008.07669.
    Cost: per token S extra slots in attention, and 1/L of ``2 H d (N^2 + N L + S N)`` multiplications per layer. Per
    layer the cache contains ``2 H d N`` float32 numbers, S slots and the open block, plus the same data of the previous
    block for rollback; nothing grows with the sequence. In training, all blocks of a window are in one graph, so
    `tbptt` limits the reach of gradients but not the activation memory; and memory starts empty in each window.
    When not to use it: to recall single tokens. N coefficients over T tokens keep only N/T of a signal that is
    independent from token to token; only what varies smoothly with time can be recovered. With FSDP on isolated
    documents (``data.document_mask``), because processes would make different numbers of decoder calls.
    Resolved: all matrices are exact for signals that are constant over a token (the paper does not give its
    discretization). Keys are compressed before RoPE. Memory slots are not rotated, but queries are, by positions
    counted from the block's first token, so all memory slots are at the start of the block (as in Algorithm 1, which
    does not define the origin). The first block of a sequence has no memory slots, because zero keys would take softmax
    probability. Each key and value head has its own coefficients; sampled keys are not normalized. Sampling points lie
    inside (0, 1), where the basis functions are smallest. The paper does not give the reach of gradients; here it is
    two blocks. Blocks do not overlap, so the first token of a block has no exact earlier tokens except those of
    `local_context`. Coefficients are float32 under any dtype.

    Args:
        block: L, tokens per block.
        order: N, coefficients per coordinate.
        samples: S, memory slots; 0: blocks without memory.
        points: sampling points from 0 (oldest) to 1 (newest): ``"uniform"``, ``"recent"`` (denser near the newest,
            ``1 - (1 - u)^2``), or a list of S points.
        measure: ``"legs"``: all tokens with equal weight; ``"legt"``: a window of the last `theta` tokens.
        theta: window length of ``"legt"``, in tokens.
        local_context: number of last tokens before a block whose keys and values are kept exactly.
        tbptt: gradients are cut at every `tbptt`-th block boundary; ``None``: never. Default: 2.
        layers: indices of the layers with memory; default: ``None``, all layers without a sliding window.

    Example:
        >>> memory = ElasticMemory(block=4, order=3, samples=2)
        >>> state = memory.update_memory({}, torch.ones(1, 1, 4, 1), torch.ones(1, 1, 4, 1), [0])
        >>> state["coefficients_v"].flatten().round(decimals=4).abs().tolist(), state["rows_v"].flatten().tolist()
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
                f"measure={measure!r}, theta={theta}: 'legt' needs theta > 0, a window in tokens; 'legs' takes no theta"
            )
        self.order, self.measure, self.theta = order, measure, theta
        self.points: tuple[float, ...] = ()
        self.look(points, samples)

    def look(self, points: str | list[float], samples: int | None = None) -> None:
        """Changes the sampling points, starting with the next block; the coefficients do not change.

        Within a sequence the points may change, but their number may change only for new sequences.

        Args:
            points: see the constructor.
            samples: new number of slots; default: ``None``, as before, or the length of the list `points`.

        Raises:
            UserError: unknown or invalid points.
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
        self, state: RecurrentState, key_BHLd: Tensor, value_BHLd: Tensor, blocks: list[int]
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
                    coefficients_BHNd = stretch @ state[f"coefficients_{name}"] + coefficients_BHNd
                new[f"coefficients_{name}"] = coefficients_BHNd
                new[f"rows_{name}"] = (read @ coefficients_BHNd).to(x_BHLd.dtype)
        return new

    def _matrices(self, blocks: int, kind: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        return _matrices(self.block, self.order, self.points, self.theta, blocks, kind, device)

    def products(self, blocks: int, gradient: bool = False) -> list[MatMul]:
        """See `SegmentRecurrence.products`: products of block, coefficients and samples, for keys and values."""
        if not self.samples or self.shape is None:
            return []
        columns, cut = 2 * self.shape.kv_numbers, self.tbptt is not None and (blocks + 1) % self.tbptt == 0
        begins = self.tbptt is not None and blocks % self.tbptt == 0
        products = [(self.order * self.block, gradient and not cut), (self.order * self.samples, gradient and not cut)]
        if blocks:
            products.append((self.order**2, gradient and not cut and not begins))
        # The matrices are constants: the backward pass adds one product, not two.
        return [MatMul(columns * (1 + back), weights, trained=False) for weights, back in products]


@lru_cache(maxsize=256)
def _matrices(
    block: int, order: int, points: tuple[float, ...], theta: float | None, blocks: int, kind: torch.dtype, device: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """The matrices that add a block after `blocks` others: P, W and the sampling matrix, on the given device.

    A window that is not yet full is sampled only where it contains tokens.
    """
    x_S = torch.tensor(points, dtype=torch.float64)
    if theta is None:
        ratio = blocks / (blocks + 1)  # independent of the block length
        update = legendre.stretch(ratio, order), legendre.entry(blocks * block, block, order)
    else:
        update = _window(theta, block, order)
        x_S = 1 - (1 - x_S) * min(1.0, (blocks + 1) * block / theta)
    stretch, entry, read = (matrix.to(device, kind) for matrix in (*update, legendre.basis(x_S, order)))
    return stretch, entry, read


_window = lru_cache(maxsize=16)(legendre.window)
