"""The search and the sums by code against their obvious forms in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pondera import UserError
from pondera.kernels.build import why_not
from pondera.methods.quantize.common import nearest as module
from pondera.methods.quantize.common.nearest import cluster_sums, nearest, nearest_by_levels


@pytest.fixture(autouse=True, params=["torch", "native"])
def small_tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    """Every search goes by tiles, and few numbers make many of them; or by the native kernel."""
    if request.param == "torch":
        monkeypatch.setenv("PONDERA_NATIVE", "0")
    elif why_not("nearest"):
        pytest.skip(f"no native kernels: {why_not('nearest')}")
    torch.manual_seed(0)
    monkeypatch.setattr(module, "SMALL", 0)
    monkeypatch.setattr(module, "ROWS", 64)
    monkeypatch.setattr(module, "SCORES", 64 * 37)
    monkeypatch.setattr(module, "SUMMED", 50)


def squared(x_NC: Tensor, table_KC: Tensor) -> Tensor:
    """All squared distances, the direct way."""
    return (x_NC.double()[:, None] - table_KC.double()).square().sum(-1)


def check(x_NC: Tensor, table_KC: Tensor, rounding: float = 1e-6) -> None:
    """No row is nearer than the chosen one by more than rounding; where it is clear, it is the one."""
    codes_N = nearest(x_NC, table_KC)
    assert codes_N.dtype == torch.int64 and codes_N.shape == x_NC.shape[:1]
    distances_NK = squared(x_NC, table_KC)
    least_N, best_N = distances_NK.min(1)
    scale = squared(x_NC, table_KC.double().mean(0, keepdim=True)).max() + distances_NK.max()
    chosen_N = distances_NK.gather(1, codes_N[:, None])[:, 0]
    assert (chosen_N - least_N).max() <= rounding * scale
    second_N = distances_NK.scatter(1, best_N[:, None], torch.inf).amin(1)
    clear_N = second_N - least_N > rounding * scale
    assert torch.equal(codes_N[clear_N], best_N[clear_N])
    assert x_NC.shape[1] == 1 or clear_N.sum() > 0.9 * len(x_NC)  # on a line, a thousand rows are close to each other


@pytest.mark.parametrize("codes", [2, 15, 16, 17, 63, 64, 65, 200, 1000])
@pytest.mark.parametrize("width", [1, 7, 64])
def test_the_least_distance_of_all(codes: int, width: int):
    generator = torch.Generator().manual_seed(codes * width)
    table_KC = torch.randn(codes, width, generator=generator)
    near_NC = table_KC[torch.randint(codes, (150,), generator=generator)]
    check(near_NC + torch.randn(150, width, generator=generator) * 2.0**-7 / codes, table_KC)
    if width > 1:
        check(torch.randn(151, width, generator=generator), table_KC)


@pytest.mark.parametrize("levels", [1, 2, 5])
def test_levels_code_what_is_left(levels: int):
    table_RKC = torch.randn(levels, 41, 6) * 2.0 ** -torch.arange(levels)[:, None, None]
    rest_NC = x_NC = torch.randn(300, 6)
    codes_NR = nearest_by_levels(x_NC, table_RKC)
    for table_KC, codes_N in zip(table_RKC, codes_NR.T, strict=True):
        assert torch.equal(codes_N, nearest(rest_NC, table_KC))
        rest_NC = rest_NC - table_KC[codes_N]
    assert rest_NC.norm() < 0.8**levels * x_NC.norm()
    assert torch.equal(
        nearest_by_levels(x_NC.bfloat16(), table_RKC), nearest_by_levels(x_NC.bfloat16().float(), table_RKC)
    )
    assert nearest_by_levels(x_NC[:0], table_RKC).shape == (0, levels)


def test_kernel_and_torch_choose_alike(monkeypatch: pytest.MonkeyPatch):
    """Many vectors in several threads, at sizes around those of the kernel's panels, tiles and items."""
    for N, K, C in ((2000, 300, 64), (193, 17, 3), (191, 15, 1), (7, 1000, 129), (192, 16, 4)):
        x_NC, table_KC = torch.randn(N, C), torch.randn(K, C)
        found_N = nearest(x_NC, table_KC)
        with monkeypatch.context() as other:
            other.setenv("PONDERA_NATIVE", "0")
            expected_N = nearest(x_NC, table_KC)
        gap_N = squared(x_NC, table_KC).gather(1, torch.stack([found_N, expected_N], 1)).diff(dim=1)
        assert gap_N.abs().max() < 1e-4 and (found_N == expected_N).double().mean() > 0.99


@pytest.mark.parametrize("small", [0, 10**9])
@pytest.mark.parametrize("whole", [40, 2**24])
def test_a_common_offset_costs_no_precision(monkeypatch: pytest.MonkeyPatch, small: int, whole: int):
    monkeypatch.setattr(module, "SMALL", small)
    monkeypatch.setattr(module, "WHOLE", whole)
    x_NC, table_KC = torch.randn(200, 8) + 1000, torch.randn(70, 8) + 1000
    check(x_NC, table_KC)


def test_the_short_way_and_the_tiles_agree(monkeypatch: pytest.MonkeyPatch):
    x_GNC, table_GKC = torch.randn(3, 120, 5), torch.randn(3, 70, 5)
    tiled_GN = nearest(x_GNC, table_GKC)
    assert torch.equal(tiled_GN, torch.stack([nearest(x, t) for x, t in zip(x_GNC, table_GKC, strict=True)]))
    monkeypatch.setattr(module, "SMALL", 10**9)
    assert torch.equal(nearest(x_GNC, table_GKC), tiled_GN)


@pytest.mark.parametrize("small", [0, 10**9])
def test_of_rows_that_are_the_same_the_first_wins(monkeypatch: pytest.MonkeyPatch, small: int):
    monkeypatch.setattr(module, "SMALL", small)
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randn(9, 33, generator=generator)
        which_K = torch.randint(9, (333,), generator=generator)
        first = torch.tensor([which_K.tolist().index(row) for row in range(9)])
        x_NC = rows.repeat(30, 1) + 0.1 * torch.randn(270, 33, generator=generator)
        assert torch.equal(nearest(x_NC, rows[which_K]), first.repeat(30))
    assert nearest(torch.randn(99, 3), torch.ones(70, 3)).eq(0).all()


def test_shapes_and_types():
    table_KC = torch.randn(70, 6)
    wide_NC = torch.randn(90, 12)
    x_NC = wide_NC[:, ::2]
    assert torch.equal(nearest(x_NC, table_KC), nearest(x_NC.contiguous(), table_KC))
    assert torch.equal(nearest(x_NC, table_KC[:, :].T.contiguous().T), nearest(x_NC, table_KC))
    assert nearest(x_NC[:0], table_KC).shape == (0,)
    assert nearest(x_NC[:0].expand(3, 0, 6), table_KC.expand(3, 70, 6)).shape == (3, 0)
    assert torch.equal(nearest(x_NC[3:4], table_KC), nearest(x_NC, table_KC)[3:4])
    assert nearest(x_NC, table_KC[:1]).eq(0).all()
    half_NC = x_NC.bfloat16()
    assert torch.equal(nearest(half_NC, table_KC), nearest(half_NC.float(), table_KC))
    assert torch.equal(nearest(x_NC.double(), table_KC), squared(x_NC, table_KC).argmin(1))
    x_NC.requires_grad_()
    assert not nearest(x_NC, table_KC.requires_grad_()).requires_grad


@pytest.mark.parametrize("small", [0, 10**9])
def test_mixed_precision_does_not_reach_the_search(monkeypatch: pytest.MonkeyPatch, small: int):
    monkeypatch.setattr(module, "SMALL", small)
    x_NC, table_KC = torch.randn(500, 16), torch.randn(500, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        codes_N = nearest(x_NC, table_KC)
    assert torch.equal(codes_N, nearest(x_NC, table_KC))


def test_every_vector_gets_a_code_that_exists():
    x_NC = torch.randn(90, 4)
    x_NC[3] = torch.nan
    x_NC[5, 2] = torch.inf
    x_NC[7] = -torch.inf
    codes_N = nearest(x_NC, torch.randn(67, 4))
    assert ((codes_N >= 0) & (codes_N < 67)).all()
    clean_N = x_NC.isfinite().all(1)
    assert len(codes_N[clean_N].unique()) > 20


@pytest.mark.parametrize("small", [0, 10**9])
def test_cosine_is_the_smallest_angle(monkeypatch: pytest.MonkeyPatch, small: int):
    monkeypatch.setattr(module, "SMALL", small)
    x_NC, table_KC = torch.randn(200, 5) + 1, torch.randn(90, 5) * torch.rand(90, 1) + 1
    cosines_NK = torch.cosine_similarity(x_NC.double()[:, None], table_KC.double(), dim=-1)
    codes_N = nearest(x_NC, table_KC, "cosine")
    assert torch.equal(codes_N, cosines_NK.argmax(1))
    assert not torch.equal(codes_N, nearest(x_NC, table_KC))
    with pytest.raises(UserError, match="did you mean 'cosine'"):
        nearest(x_NC, table_KC, "cosin")


def test_memory_does_not_grow_with_vectors_times_codes():
    """No tensor of the search has more numbers than its input, or than a tile has scores."""

    class Largest(TorchFunctionMode):
        numbers = 0

        def __torch_function__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            tensors = out if isinstance(out, tuple) else (out,)
            self.numbers = max([self.numbers, *(each.numel() for each in tensors if isinstance(each, Tensor))])
            return out

    x_NC, table_KC = torch.randn(1000, 4), torch.randn(300, 4)
    with Largest() as largest:
        nearest(x_NC, table_KC)
    assert 0 < largest.numbers <= max(x_NC.numel(), 2 * module.SCORES * torch.get_num_threads()) < 1000 * 300 / 10


# sums by code


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_sums_are_those_of_a_loop(weighted: bool, dtype: torch.dtype):
    x_NC = torch.randn(333, 5).to(dtype)
    codes_N = torch.randint(-1, 20, (333,))
    codes_N[codes_N == 7] = 8
    weight_N = torch.rand(333) if weighted else None
    sums_KC, counts_K = cluster_sums(x_NC, codes_N, 22, weight_N)
    assert sums_KC.dtype == counts_K.dtype == torch.promote_types(dtype, torch.float32)
    for code in range(22):
        w_n = torch.ones(333)[codes_N == code] if weight_N is None else weight_N[codes_N == code]
        torch.testing.assert_close(counts_K[code].float(), w_n.sum())
        expected_C = (w_n[:, None].double() * x_NC[codes_N == code].double()).sum(0)
        torch.testing.assert_close(sums_KC[code].double(), expected_C, rtol=1e-5, atol=1e-5)


def test_vectors_without_a_code_do_not_count_whatever_they_hold():
    x_NC = torch.full((4, 2), torch.nan)
    x_NC[1] = 3
    sums_KC, counts_K = cluster_sums(x_NC, torch.tensor([-1, 0, -1, -7]), 2)
    assert sums_KC.tolist() == [[3, 3], [0, 0]] and counts_K.tolist() == [1, 0]
    sums_KC, counts_K = cluster_sums(x_NC[:0], torch.empty(0, dtype=torch.long), 2)
    assert not sums_KC.any() and not counts_K.any()
    assert not cluster_sums(x_NC, torch.full((4,), -1), 2)[0].any()


def test_sums_are_the_same_to_the_bit_for_any_number_of_threads():
    x_NC, codes_N, threads = torch.randn(20000, 8), torch.randint(9, (20000,)), torch.get_num_threads()
    module.SUMMED = 2**14
    found = []
    try:
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            found.append(cluster_sums(x_NC, codes_N, 9)[0])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1]) and torch.equal(found[1], found[2])


def test_sums_of_many_vectors_stay_precise(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.undo()
    x_NC = torch.full((2**20, 1), 0.1)
    sums_KC, _ = cluster_sums(x_NC, torch.zeros(2**20, dtype=torch.long), 1)
    assert sums_KC.item() == pytest.approx(2**20 * x_NC[0, 0].item(), rel=1e-3)
