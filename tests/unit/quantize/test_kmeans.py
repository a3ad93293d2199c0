"""k-means against Lloyd's algorithm written as a loop, and what a codebook may expect of it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pondera import UserError
from pondera.methods.quantize.common.kmeans import kmeans
from pondera.methods.quantize.common.nearest import nearest


def seed(number: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def error(x_NC: Tensor, centres_KC: Tensor) -> float:
    """Mean squared distance to the nearest centre."""
    return (x_NC[:, None] - centres_KC).square().sum(-1).amin(1).mean().item()


def clusters(count: int, each: int, noise: float = 0.1) -> tuple[Tensor, Tensor]:
    means_KC = 4 * torch.randn(count, 16, generator=seed(7))
    return means_KC, (means_KC[:, None] + noise * torch.randn(count, each, 16, generator=seed(8))).flatten(0, 1)


def test_counts_are_those_of_the_centres_that_it_returns():
    x_NC = torch.randn(500, 3, generator=seed())
    centres_KC, counts_K = kmeans(x_NC, 20, seed())
    assert centres_KC.shape == (20, 3) and counts_K.sum() == 500
    assert torch.equal(counts_K, nearest(x_NC, centres_KC).bincount(minlength=20))


def test_an_iteration_is_lloyds():
    x_NC = torch.randn(300, 4, generator=seed())
    before_KC, _ = kmeans(x_NC, 9, seed(), iterations=0)
    after_KC, _ = kmeans(x_NC, 9, seed(), iterations=1)
    codes_N = torch.cdist(x_NC, before_KC).argmin(1)
    expected_KC = torch.stack([x_NC[codes_N == code].mean(0) for code in range(9)])
    torch.testing.assert_close(after_KC, expected_KC)


def test_the_start_is_rows_of_the_data_and_far_better_than_chance():
    means_KC, x_NC = clusters(64, 20)
    centres_KC, _ = kmeans(x_NC, 64, seed(), iterations=0)
    assert all((x_NC == row).all(1).any() for row in centres_KC)
    assert len(centres_KC.unique(dim=0)) == 64
    chance_KC = x_NC[torch.randperm(len(x_NC), generator=seed())[:64]]
    assert error(x_NC, centres_KC) < 0.6 * error(x_NC, chance_KC)
    hit = {int(code) for code in nearest(centres_KC, means_KC)}
    assert len(hit) >= 45  # chance hits 40 of 64


def test_it_finds_the_clusters_that_there_are():
    _, x_NC = clusters(12, 60)
    for number in range(3):
        centres_KC, counts_K = kmeans(x_NC, 24, seed(number))
        assert error(x_NC, centres_KC) < 1.05 * 16 * 0.1**2
        assert (counts_K > 0).all()


def test_error_never_grows():
    x_NC = torch.randn(400, 2, generator=seed())
    errors = [error(x_NC, kmeans(x_NC, 16, seed(), iterations=count)[0]) for count in range(8)]
    assert all(after <= before + 1e-6 for before, after in zip(errors, errors[1:], strict=False))
    assert errors[-1] < 0.9 * errors[0]


def test_centres_that_nothing_is_nearest_to_move_to_where_they_are_needed():
    """Two heaps of copies and a few rows far off: centres that start on copies are of use only elsewhere."""
    rest_NC = 50 + 10 * torch.randn(8, 2, generator=seed())
    x_NC = torch.cat([torch.zeros(200, 2), torch.ones(200, 2), rest_NC])
    for number in range(5):
        centres_KC, counts_K = kmeans(x_NC, 10, seed(number))
        assert error(x_NC, centres_KC) < 1e-6
        assert (counts_K > 0).all()


@pytest.mark.parametrize("vectors", [1, 3, 10])
def test_fewer_vectors_than_centres_are_repeated_with_a_jitter(vectors: int):
    x_NC = torch.randn(vectors, 4, generator=seed())
    centres_KC, counts_K = kmeans(x_NC, 10, seed())
    assert centres_KC.shape == (10, 4) and counts_K.sum() == vectors
    assert torch.equal(centres_KC[:vectors], x_NC) and (counts_K[:vectors] == 1).all()
    torch.testing.assert_close(centres_KC, x_NC[torch.arange(10) % vectors], rtol=0, atol=0.02)
    assert len(centres_KC.unique(dim=0)) == 10


def test_the_same_generator_gives_the_same_codebook():
    x_NC = torch.randn(200, 3, generator=seed())
    assert torch.equal(kmeans(x_NC, 12, seed(1))[0], kmeans(x_NC, 12, seed(1))[0])
    assert not torch.equal(kmeans(x_NC, 12, seed(1))[0], kmeans(x_NC, 12, seed(2))[0])
    state = torch.get_rng_state()
    kmeans(x_NC, 12, seed(1))
    assert torch.equal(torch.get_rng_state(), state)  # nothing is drawn from torch's own


def test_one_centre_half_precision_and_vectors_that_are_all_the_same():
    x_NC = torch.randn(50, 3, generator=seed())
    centres_KC, counts_K = kmeans(x_NC, 1, seed())
    torch.testing.assert_close(centres_KC[0], x_NC.mean(0))
    assert counts_K.tolist() == [50]
    half_KC, _ = kmeans(x_NC.bfloat16(), 4, seed())
    assert half_KC.dtype == torch.float32
    centres_KC, counts_K = kmeans(torch.ones(50, 3), 4, seed())
    assert torch.equal(centres_KC, torch.ones(4, 3)) and counts_K.sum() == 50


def test_what_cannot_be_clustered_is_refused():
    for x_NC, size in ((torch.empty(0, 3), 4), (torch.ones(5, 3), 0)):
        with pytest.raises(UserError, match="at least one of each"):
            kmeans(x_NC, size, seed())
    with pytest.raises(UserError, match="finite"):
        kmeans(torch.tensor([[1.0], [torch.nan]]), 1, seed())
