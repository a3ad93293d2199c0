"""torch's fused attention of one query to many keys, to the last bit, but reading them once for all heads that share them.

Decoding waits for memory, and torch's kernel fetches keys and values once for every query head. The native one lets the heads
that share a block of keys take turns while the block is in a core's cache; products are torch's own, and all else is done in
torch's order. That the bits are torch's is tried on this machine, with rows of each width, before any are handed out.

Shapes: B batch, G KV heads, R query heads per KV head, H = G R, S keys, D head width.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from pondera.kernels.build import library
from pondera.kernels.call import fit_rows

TRIED = (1, 9, 512, 513, 1100, 2048)
"""Numbers of keys on which the bits are tried: a block, whole vectors, and what is over."""
WIDEST = 256
"""Width of a head up to which transformers has torch share keys among heads."""

log = logging.getLogger(__name__)


class _Stock(ctypes.Structure):
    """As in ``stock.c``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("gemm", "query", "keys", "values")),
        *((name, ctypes.c_int64) for name in ("B", "G", "R", "S", "D", "heads", "threads")),
        *((name, ctypes.c_int64) for name in ("query_B", "query_H", "keys_B", "keys_G", "keys_S")),
        *((name, ctypes.c_int64) for name in ("values_B", "values_G", "values_S")),
        ("scaling", ctypes.c_double),
        ("out", ctypes.c_void_p),
    )


def stock_attention(query_BH1D: Tensor, keys_BGSD: Tensor, values_BGSD: Tensor, scaling: float) -> Tensor | None:
    """What `torch.nn.functional.scaled_dot_product_attention` gives without a mask, the same bits, ``[B, 1, H, D]``.

    Args:
        query_BH1D: one query per head; more, and there is nothing to gain.
        keys_BGSD, values_BGSD: of fewer heads than the queries; any strides but in the last dimension.
        scaling: of the products.

    Returns:
        None where that would be no faster, where there is no kernel, or where its bits are not torch's.

    Cost: keys and values are read from memory once; torch's products of one row each are what is left of the time.
    """
    B, H, T, D = query_BH1D.shape
    G = keys_BGSD.shape[1]
    if T != 1 or G == H or not _fits(query_BH1D, keys_BGSD, values_BGSD) or not _same_bits(D, torch.get_num_threads()):
        return None
    return _run(query_BH1D, keys_BGSD, values_BGSD, scaling)


def _run(query_BH1D: Tensor, keys_BGSD: Tensor, values_BGSD: Tensor, scaling: float) -> Tensor | None:
    kernel, gemm = library("stock"), _gemm()
    if kernel is None or gemm is None:
        return None
    B, H, _, D = query_BH1D.shape
    G, S = keys_BGSD.shape[1:3]
    R, threads = H // G, torch.get_num_threads()
    # All heads of a group together, unless threads would be left without work.
    parts = min(R, -(-threads // (B * G)))
    out_B1HD = query_BH1D.new_empty(B, 1, H, D)
    told = _Stock(
        gemm,
        *(x.data_ptr() for x in (query_BH1D, keys_BGSD, values_BGSD)),
        *(B, G, R, S, D, -(-R // parts), threads),
        *query_BH1D.stride()[:2],
        *keys_BGSD.stride()[:3],
        *values_BGSD.stride()[:3],
        scaling,
        out_B1HD.data_ptr(),
    )
    return None if kernel.stock(ctypes.byref(told)) else out_B1HD


def _fits(*tensors: Tensor) -> bool:
    """Whether torch would take its fused kernel for these, with products in float32, and the native one can read them."""
    return (
        torch.get_float32_matmul_precision() == "highest"
        and torch.backends.cuda.flash_sdp_enabled()
        and fit_rows(*tensors)
        and tensors[1].shape == tensors[2].shape
        and all(rows.stride(2) >= rows.shape[-1] for rows in tensors[1:])
        and tensors[0].shape[-1] <= WIDEST
    )


@functools.cache
def _gemm() -> int | None:
    """The address of the matrix product that torch's kernel calls, where torch brings it along."""
    found = next((Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*"), None)
    try:
        product = ctypes.CDLL(str(found)).sgemm_
    except (OSError, AttributeError):
        return None
    return ctypes.cast(product, ctypes.c_void_p).value


@functools.cache
def _same_bits(width: int, threads: int) -> bool:
    """Whether the kernel gives torch's bits for rows of this width, tried once; ``threads`` are those torch has now."""
    draw = torch.Generator().manual_seed(0)
    for keys in TRIED:
        query, rows = (torch.randn(shape, generator=draw) for shape in ((2, 8, 1, width), (2, 2, 2, keys + 3, width)))
        keys_BGSD, values_BGSD = rows[:, :, :, 1 : keys + 1].unbind(0)
        scaling = 3 * width**-0.5
        found = _run(query, keys_BGSD, values_BGSD, scaling)
        stock = F.scaled_dot_product_attention(query, keys_BGSD, values_BGSD, scale=scaling, enable_gqa=True)
        if found is None or not torch.equal(found, stock.transpose(1, 2)):
            log.info("attention to shared heads is left to torch: the native kernel has other bits, or there is none")
            return False
    return True
