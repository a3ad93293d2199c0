"""Attention in the space of codes equals decoding first, with the kernel and without."""

from __future__ import annotations

import pytest
import torch

from pondera.kernels.build import why_not
from pondera.methods.kv_cache.common.lut_attention import look_up, sum_by_code

SHAPES = [  # B, G, heads of the book, N, S, C, K, D
    (1, 1, 1, 1, 1, 1, 2, 3),
    (1, 2, 2, 4, 600, 44, 256, 16),
    (2, 3, 1, 5, 77, 6, 200, 8),
    (2, 1, 1, 8, 9000, 3, 16, 4),
]


@pytest.fixture(params=["kernel", "torch"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "torch":
        monkeypatch.setenv("PONDERA_NATIVE", "0")
    elif reason := why_not("codes"):
        pytest.skip(reason)
    return request.param


def case(shape: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
    """Queries, weights, a book, codes within larger storage, and the rows that they stand for, in float64."""
    B, G, heads, N, S, C, K, D = shape
    torch.manual_seed(S)
    book, query, weight = torch.randn(heads, C, K, D), torch.randn(B, G, N, D), torch.rand(B, G, N, S)
    codes = torch.randint(K, (B, G, S + 7, C), dtype=torch.uint8)[:, :, 3 : S + 3]
    rows = torch.zeros(B, G, S, D, dtype=torch.float64)
    for b in range(B):
        for g in range(G):
            for c in range(C):  # slow and obvious
                rows[b, g] += book[g % heads, c].double()[codes[b, g, :, c].long()]
    return query, weight / S, book, codes, rows


def dot(query: torch.Tensor, book: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Products of queries with coded rows."""
    return look_up(book.flatten(1, 2) @ query.mT, codes)


def mix(weight: torch.Tensor, book: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Coded rows, weighed and added."""
    return sum_by_code(weight, codes, book.shape[2]).mT @ book.flatten(1, 2)


@pytest.mark.parametrize("shape", SHAPES)
def test_equals_decoding_first(shape: tuple[int, ...], form: str):
    query, weight, book, codes, rows = case(shape)
    score, mixed = dot(query, book, codes), mix(weight, book, codes)
    torch.testing.assert_close(score, (query.double() @ rows.mT).float(), atol=2e-4, rtol=1e-5)
    torch.testing.assert_close(mixed, (weight.double() @ rows).float(), atol=1e-5, rtol=1e-5)


def test_any_number_of_threads_gives_the_same():
    threads, (query, weight, book, codes, _) = torch.get_num_threads(), case(SHAPES[3])
    found = []
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            found.append((dot(query, book, codes), mix(weight, book, codes)))
    finally:
        torch.set_num_threads(threads)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)


def test_other_codes_and_gradients_take_the_way_of_torch():
    query, weight, book, codes, rows = case(SHAPES[2])
    expected = (query.double() @ rows.mT).float()
    torch.testing.assert_close(dot(query, book, codes.int()), expected, atol=2e-4, rtol=1e-5)
    query.requires_grad_()
    dot(query, book, codes).sum().backward()
    assert query.grad is not None and query.grad.abs().sum() > 0
