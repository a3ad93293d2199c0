"""The numbers of a codebook's health against what they must be exactly."""

from __future__ import annotations

import json
import math

import pytest
import torch

from pondera.methods.quantize.common import health as module
from pondera.methods.quantize.common.health import effective_rank, health, perplexity, usage

torch.manual_seed(0)


def near(value: float) -> object:
    return pytest.approx(value, rel=1e-9)


def lookup(codes_N: torch.Tensor, table_KC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the rows stand for, codes and table, in the shapes of one group and level."""
    return table_KC[codes_N], codes_N[:, None, None], table_KC[None, None]


def test_perplexity_is_all_codes_when_used_alike_and_one_when_one_is():
    for size in (1, 2, 7, 256):
        assert perplexity(torch.full((size,), 3)) == near(size)
        one = torch.zeros(size, dtype=torch.long)
        one[size // 2] = 5
        assert perplexity(one) == 1
        assert usage(one) == 1 / size
    assert perplexity(torch.zeros(4)) == usage(torch.zeros(4)) == 0


def test_perplexity_is_at_most_the_codes_in_use():
    for seed in range(50):
        counts_K = torch.randint(0, 4, (37,), generator=torch.Generator().manual_seed(seed)) ** 3
        p = [count / counts_K.sum().item() for count in counts_K.tolist() if count]
        assert perplexity(counts_K) == near(math.exp(-sum(share * math.log(share) for share in p)))
        assert perplexity(counts_K) <= usage(counts_K) * 37 + 1e-9


def test_usage_of_data_with_fewer_clusters_than_codes():
    """64 clusters and 256 codes: a healthy codebook has a usage of 0.25 and a perplexity of 64."""
    codes_N = torch.arange(640) % 64
    found = health(torch.randn(640, 4), *lookup(codes_N, torch.randn(256, 4)))
    assert found.usage == [[0.25]] and found.perplexity == [[near(64)]]


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_effective_rank_of_orthonormal_rows(rank: int):
    """Each with its negative, so that the set is centred."""
    rows = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))[0][:rank]
    both = torch.cat([rows, -rows])
    assert effective_rank(both) == near(rank)
    assert effective_rank(both + 1000) == pytest.approx(rank, rel=1e-6)
    assert effective_rank((both + 1000).float()) == pytest.approx(rank, rel=1e-2)


def test_effective_rank_is_that_of_singular_values(monkeypatch: pytest.MonkeyPatch):
    x_ND = torch.randn(50, 6) * torch.tensor([5, 3, 1, 1, 0.1, 0.0]) + 2
    weights_N = torch.randint(0, 4, (50,))
    repeated_ND = x_ND.repeat_interleave(weights_N, 0).double()
    share = torch.linalg.svdvals(repeated_ND - repeated_ND.mean(0)).square()
    share = share / share.sum()
    expected = torch.special.entr(share).sum().exp().item()
    monkeypatch.setattr(module, "CHUNK", 7)
    assert effective_rank(x_ND, weights_N) == near(expected)
    assert effective_rank(repeated_ND) == near(expected)


def test_effective_rank_of_vectors_that_are_all_the_same_is_zero():
    same_ND = torch.full((7, 3), 0.1)
    assert effective_rank(same_ND) == effective_rank(same_ND[:1]) == effective_rank(same_ND[:0]) == 0
    for seed in range(20):
        weights_N = torch.rand(7, generator=torch.Generator().manual_seed(seed))
        assert effective_rank(same_ND.double() + seed / 7, weights_N.double()) == 0


def test_codes_are_weighted_by_use():
    """A codebook of full rank of which only two rows are used has one direction."""
    table_KC = torch.randn(64, 8)
    codes_N = torch.tensor([3, 5] * 20)
    x_ND = torch.randn(40, 8)
    found = health(x_ND, *lookup(codes_N, table_KC))
    assert found.effective_rank_codes == [pytest.approx(1, rel=1e-6)]
    assert found.effective_rank_input == [near(effective_rank(x_ND))]
    assert effective_rank(x_ND) > 5


def test_groups_are_parts_side_by_side():
    x_ND = torch.cat([torch.randn(30, 1) * torch.ones(4), torch.randn(30, 4)], 1)
    codes_NGR = torch.stack([torch.zeros(30).long(), torch.arange(30)], 1)[..., None]
    found = health(x_ND, x_ND, codes_NGR, torch.randn(2, 1, 30, 4))
    assert found.effective_rank_input == [pytest.approx(1, rel=1e-5), pytest.approx(effective_rank(x_ND[:, 4:]))]
    assert found.perplexity == [[1.0], [near(30)]]
    assert found.split_error == 0


def test_split_error_is_a_share_of_the_variance():
    x_ND = torch.randn(500, 3) * 4 + 7
    mean_ND = x_ND.mean(0).expand(500, 3)
    codes_NGR = torch.zeros(500, 1, 1, dtype=torch.long)
    found = health(x_ND, mean_ND, codes_NGR)
    assert found.split_error == pytest.approx(1, rel=1e-6)
    assert found.variance == pytest.approx(torch.cov(x_ND.T.double(), correction=0).trace().item())
    shifted = health(x_ND, x_ND + 1, codes_NGR)
    assert shifted.split_error and shifted.variance
    assert shifted.split_error * shifted.variance == pytest.approx(3, rel=1e-5)


def test_masked_vectors_and_levels_left_off_do_not_count():
    x = torch.randn(2, 6, 4)
    q, table = x + 0.1, torch.randn(1, 2, 5, 4)
    codes = torch.randint(5, (2, 6, 1, 2))
    codes[:, 4:] = -1
    codes[0, :, :, 1] = -1
    found = health(x, q, codes, table)
    assert found.vectors == 8
    first, second = codes[:, :4, 0, 0].flatten(), codes[1, :4, 0, 1]
    assert found.perplexity[0] == [perplexity(first.bincount()), perplexity(second.bincount())]
    kept = slice(None), slice(4)
    assert found.split_error == pytest.approx(health(x[kept], q[kept], codes[kept], table).split_error)
    codes[..., 1] = -1
    none = health(x, q, codes, table)
    assert none.usage[0][1] is none.perplexity[0][1] is None


def test_crowding_is_the_share_of_rows_with_another_close_by(monkeypatch: pytest.MonkeyPatch):
    table_KC = torch.randn(40, 8)
    table_KC[10:20] = table_KC[:10] + 1e-3
    table_KC[20] = table_KC[21]
    distances_KK = torch.cdist(table_KC, table_KC, compute_mode="donot_use_mm_for_euclid_dist")
    median = distances_KK[*torch.triu_indices(40, 40, 1)].median()
    expected = (distances_KK.fill_diagonal_(math.inf).amin(1) <= 0.1 * median).double().mean().item()
    assert expected == 22 / 40
    codes_NGR = torch.zeros(1, 1, 2, dtype=torch.long)
    spread_KC = torch.eye(8).repeat(5, 1) * torch.arange(1, 6).repeat_interleave(8)[:, None]
    table = torch.stack([table_KC, spread_KC])[None]
    assert health(torch.randn(1, 8), torch.randn(1, 8), codes_NGR, table).crowding == [[expected, 0.0]]
    assert health(torch.randn(1, 8), torch.randn(1, 8), codes_NGR, torch.ones(1, 2, 3, 8)).crowding == [[1.0, 1.0]]
    monkeypatch.setattr(module, "PROBED", 20)  # every other row is probed, for all others to be near to
    probed = table_KC[::2]
    near_PK = torch.cdist(probed, table_KC, compute_mode="donot_use_mm_for_euclid_dist")
    near_PK[torch.arange(20), torch.arange(0, 40, 2)] = math.inf
    share = (near_PK.amin(1) <= 0.1 * torch.pdist(probed).median()).double().mean().item()
    assert health(torch.randn(1, 8), torch.randn(1, 8), codes_NGR, table).crowding == [[share, 0.0]]
    assert share > 0


def test_sizes_of_codebooks_that_differ():
    table = torch.zeros(2, 1, 8, 2)
    angle_K = torch.arange(8) * torch.pi / 4  # as far from each other as rows can be: none is crowded
    table[0, 0] = torch.stack([angle_K.cos(), angle_K.sin()], dim=1)
    table[1, 0, :4] = table[0, 0, ::2]
    codes_NGR = torch.arange(4).view(4, 1, 1).expand(4, 2, 1)
    x_ND = torch.randn(4, 4)
    found = health(x_ND, x_ND, codes_NGR, table, torch.tensor([[8], [4]]))
    assert found.usage == [[0.5], [1.0]]
    assert found.crowding == [[0.0], [0.0]]  # rows that fill up are no rows
    assert health(x_ND, x_ND, codes_NGR, None, torch.tensor([[8], [4]])).usage == [[0.5], [1.0]]


def test_without_a_table_neither_usage_nor_crowding_is_known():
    x_ND = torch.randn(9, 3)
    found = health(x_ND, x_ND, torch.arange(9).view(9, 1, 1) % 3)
    assert found.usage == [[None]] and found.crowding is None
    assert found.perplexity == [[near(3)]]


def test_without_codes_every_vector_counts():
    x_ND = torch.randn(9, 3)
    found = health(x_ND, x_ND, torch.zeros(9, 0, 0, dtype=torch.long))
    assert found.vectors == 9 and found.usage == found.perplexity == []
    assert found.effective_rank_input == [near(effective_rank(x_ND))]


@pytest.mark.parametrize("vectors", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_vectors_give_no_nan_and_plain_types(vectors: int, dtype: torch.dtype):
    x = torch.randn(vectors, 1, 4, dtype=dtype, requires_grad=True)
    codes = torch.zeros(vectors, 1, 2, 1, dtype=torch.long)
    found = health(x, x + 1, codes, torch.randn(2, 1, 1, 2, requires_grad=True)).to_dict()
    json.dumps(found, allow_nan=False)
    assert found["vectors"] == vectors
    if vectors == 0:
        assert found["split_error"] is found["variance"] is found["usage"][0][0] is None
        assert found["effective_rank_codes"] == [None, None]
    if vectors == 1:
        assert found["variance"] == 0 and found["split_error"] is None
    assert found["crowding"] == [[None], [None]]  # there is only one row
