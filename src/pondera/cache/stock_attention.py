"""A native kernel that is bit-identical to torch's fused attention of one query, and reads shared keys and values once.

Decoding is memory-bound, and torch's kernel reads keys and values once for every query head. The native kernel processes
all query heads of a block of keys while the block is in the cache of a core. It calls torch's own matrix product, and does
all other operations in torch's order. Before first use with a head width, a test on this machine compares the bits.

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
"""Numbers of keys in the test of bits: with and without incomplete blocks and vectors."""
WIDEST = 256
"""The largest head width with which transformers lets torch share keys among heads."""

log = logging.getLogger(__name__)


class _Stock(ctypes.Structure):
    """The arguments of the kernel; the same struct is defined in ``stock.c``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("gemm", "query", "keys", "values")),
        *((name, ctypes.c_int64) for name in ("B", "G", "R", "S", "D", "heads", "threads")),
        *((name, ctypes.c_int64) for name in ("query_B", "query_H", "keys_B", "keys_G", "keys_S")),
        *((name, ctypes.c_int64) for name in ("values_B", "values_G", "values_S")),
        ("scaling", ctypes.c_double),
        ("out", ctypes.c_void_p),
    )


def stock_attention(query_BH1D: Tensor, keys_BGSD: Tensor, values_BGSD: Tensor, scaling: float) -> Tensor | None:
    """Attention without a mask, ``[B, 1, H, D]``, bit-identical to `torch.nn.functional.scaled_dot_product_attention`.

    Cost: one read of keys and values; torch's matrix products of one row each take most of the remaining time.

    Args:
        query_BH1D: one query per head; with more queries the kernel is not faster.
        keys_BGSD, values_BGSD: keys and values, of fewer heads than the queries; any strides except in the last dimension.
        scaling: the factor of the dot products.

    Returns:
        The output, or `None` if the kernel is not faster, is not available, or is not bit-identical.
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
    # One task per KV head, or more tasks if some threads would otherwise be idle.
    parts = min(R, -(-threads // (B * G)))
    out_B1HD = query_BH1D.new_empty(B, 1, H, D)
    arguments = _Stock(
        gemm,
        *(query_BH1D.data_ptr(), keys_BGSD.data_ptr(), values_BGSD.data_ptr()),
        *(B, G, R, S, D, -(-R // parts), threads),
        *query_BH1D.stride()[:2],
        *keys_BGSD.stride()[:3],
        *values_BGSD.stride()[:3],
        scaling,
        out_B1HD.data_ptr(),
    )
    return None if kernel.stock(ctypes.byref(arguments)) else out_B1HD


def _fits(query_BH1D: Tensor, keys_BGSD: Tensor, values_BGSD: Tensor) -> bool:
    """Whether torch would use its fused kernel in float32 for these tensors, and the native kernel supports them."""
    return (
        torch.get_float32_matmul_precision() == "highest"
        and torch.backends.cuda.flash_sdp_enabled()
        and fit_rows(query_BH1D, keys_BGSD, values_BGSD)
        and keys_BGSD.shape == values_BGSD.shape
        and min(keys_BGSD.stride(2), values_BGSD.stride(2)) >= keys_BGSD.shape[-1]
        and query_BH1D.shape[-1] <= WIDEST
    )


@functools.cache
def _gemm() -> int | None:
    """The address of the matrix product that torch's kernel calls, or `None` if torch does not contain it."""
    library_file = next((Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*"), None)
    try:
        product = ctypes.CDLL(str(library_file)).sgemm_
    except (OSError, AttributeError):
        return None
    return ctypes.cast(product, ctypes.c_void_p).value


@functools.cache
def _same_bits(width: int, threads: int) -> bool:
    """Whether the kernel is bit-identical to torch for heads of this width; `threads` is torch's number of threads."""
    draw = torch.Generator().manual_seed(0)
    for keys in TRIED:
        query, rows = (torch.randn(shape, generator=draw) for shape in ((2, 8, 1, width), (2, 2, 2, keys + 3, width)))
        keys_BGSD, values_BGSD = rows[:, :, :, 1 : keys + 1].unbind(0)
        scaling = 3 * width**-0.5
        output = _run(query, keys_BGSD, values_BGSD, scaling)
        stock = F.scaled_dot_product_attention(query, keys_BGSD, values_BGSD, scale=scaling, enable_gqa=True)
        if output is None or not torch.equal(output, stock.transpose(1, 2)):
            log.info("torch computes attention of shared heads: the native kernel is missing or not bit-identical")
            return False
    return True
