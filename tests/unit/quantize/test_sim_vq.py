"""SimVQ: the table stays, the map learns, all rows move; and a map that is matched to what it codes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pondera import UserError
from pondera.methods.quantize.common.kmeans import kmeans
from pondera.methods.quantize.sim_vq import SimVQ

C = 4


def vectors(*shape: int, seed: int = 0) -> Tensor:
    """Not centred, and of different scales in different directions."""
    plain = torch.randn(*shape, C, generator=torch.Generator().manual_seed(seed))
    return plain @ torch.tensor([[5.0, 1, 0, 0], [0, 2, 0, 0], [0, 0, 0.1, 3], [0, 0, 0, 0.5]]) + 7


def built(codes: int = 32, **options) -> SimVQ:
    torch.manual_seed(0)
    return SimVQ(codes, **options).build(C).train()


def spread(rows: Tensor) -> Tensor:
    """``[C, C]``."""
    return torch.cov(rows.detach().double().T, correction=0)


def test_rows_are_the_map_of_a_frozen_gaussian_table():
    quantizer = built(4000)
    assert float(quantizer.base_KC.std()) == pytest.approx(C**-0.5, rel=0.05)
    weight, bias = quantizer.map[0].weight, quantizer.map[0].bias
    torch.testing.assert_close(quantizer.rows(), quantizer.base_KC @ weight.T + bias)
    assert {name for name, _ in quantizer.named_parameters()} == {"map.0.weight", "map.0.bias"}


def test_two_layers_with_a_relu():
    quantizer = built(hidden=9)
    inner = (quantizer.base_KC @ quantizer.map[0].weight.T + quantizer.map[0].bias).clamp(min=0)
    assert inner.shape == (32, 9)
    torch.testing.assert_close(quantizer.rows(), inner @ quantizer.map[2].weight.T + quantizer.map[2].bias)


@pytest.mark.parametrize("hidden", [None, 9])
def test_one_vector_moves_every_row_and_not_the_table(hidden: int | None):
    quantizer = built(hidden=hidden)
    before, base = quantizer.rows().detach(), quantizer.base_KC.clone()
    optimizer = torch.optim.SGD(quantizer.parameters(), lr=0.1)
    quantizer(vectors(1)).loss.backward()
    optimizer.step()
    assert ((quantizer.rows() - before).abs().amax(-1) > 0).all() and torch.equal(quantizer.base_KC, base)


def test_autocast_maps_in_single_precision():
    quantizer, x = built(), vectors(40)
    expected = quantizer(x)
    with torch.autocast("cpu", torch.bfloat16):
        found = quantizer(x)
        assert torch.equal(quantizer.encode(x), expected.codes)
    assert torch.equal(found.codes, expected.codes) and torch.equal(found.out, expected.out)


@pytest.mark.parametrize("hidden", [None, 9])
def test_folding_changes_no_bit(hidden: int | None):
    quantizer, x = built(hidden=hidden, init="match"), vectors(40)
    quantizer(x)
    folded = quantizer.fold()
    expected, found = quantizer.eval()(x), folded(x)
    assert torch.equal(found.codes, expected.codes) and torch.equal(found.out, expected.out)
    assert torch.equal(folded.table(), quantizer.table()) and not list(folded.parameters())


def test_a_detached_input_gets_exactly_nothing():
    encoder = torch.nn.Linear(C, C)
    found = built(detach_input=True)(encoder(vectors(9)))
    assert torch.autograd.grad(found.loss + 0 * found.out.sum(), encoder.weight)[0].abs().max() == 0
    assert torch.autograd.grad(built()(encoder(vectors(9))).loss, encoder.weight)[0].abs().max() > 0


class TestMatch:
    @pytest.mark.parametrize("warm_up", [0, 2])
    @pytest.mark.parametrize("hidden", [None, 16])
    def test_rows_get_the_mean_and_covariance_of_the_vectors(self, hidden: int | None, warm_up: int):
        quantizer = built(hidden=hidden, init="match", start_step=warm_up)
        batches = [vectors(100, seed=seed) for seed in range(warm_up + 1)]
        for batch in batches:
            found = quantizer(batch)
        assert found.terms
        torch.testing.assert_close(quantizer.rows().mean(0), torch.cat(batches).mean(0), atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(spread(quantizer.rows()), spread(torch.cat(batches)), atol=1e-2, rtol=1e-3)

    def test_it_happens_once(self):
        quantizer = built(init="match")
        quantizer(vectors(50))
        before = quantizer.rows().detach()
        quantizer(100 * vectors(50))
        assert torch.equal(quantizer.rows(), before)

    @pytest.mark.parametrize("number", [1, 2])
    def test_few_vectors_are_no_nan(self, number: int):
        quantizer = built(codes=3, init="match")
        assert quantizer(vectors(number)).out.isfinite().all() and quantizer.rows().isfinite().all()
        torch.testing.assert_close(quantizer.rows().mean(0), vectors(number).mean(0), atol=1e-3, rtol=1e-3)

    def test_least_squares_to_centres_would_lose_the_scale(self):
        """Why it is not done: what regression keeps of the variance is about C/K."""
        x = torch.randn(2000, 8, generator=torch.Generator().manual_seed(1))
        centres, _ = kmeans(x, 256, torch.Generator().manual_seed(2))
        torch.manual_seed(0)
        quantizer = SimVQ(256, init="match").build(8).train()
        regressed = quantizer.base_KC @ torch.linalg.lstsq(quantizer.base_KC, centres).solution
        quantizer(x)
        kept = float(spread(regressed).trace() / spread(centres).trace())
        assert kept < 2 * 8 / 256
        assert float(spread(quantizer.rows()).trace() / spread(x).trace()) == pytest.approx(1, rel=1e-3)

    def test_it_finds_codes_where_an_unmatched_map_finds_few(self):
        used = {start: len(built(64, init=start)(vectors(500)).codes.unique()) for start in ("random", "match")}
        assert used["random"] < 16 < 48 < used["match"]


@pytest.mark.parametrize("hidden", [None, 16])
def test_gaussian_vectors_come_to_use_all_codes(hidden: int | None):
    """From a map that finds half of them: the claim of the paper, small."""
    x = 5 * torch.randn(2048, C, generator=torch.Generator().manual_seed(3))
    quantizer = built(64, hidden=hidden)
    optimizer = torch.optim.Adam(quantizer.parameters(), lr=0.03)
    used = []
    for _ in range(200):
        found = quantizer(x)
        used.append(len(found.codes.unique()))
        optimizer.zero_grad()
        found.loss.backward()
        optimizer.step()
    assert used[0] < 45 and used[-1] > 60


@pytest.mark.parametrize("stop", range(4))
def test_a_model_that_is_loaded_goes_on_exactly(stop: int):
    def run(quantizer: SimVQ, steps: range) -> Tensor:
        for step in steps:
            quantizer.begin_step(step, 5)
            quantizer(vectors(12, seed=step))
        return quantizer.eval()(vectors(12)).out

    alone, stopped, loaded = (built(init="match", start_step=2) for _ in range(3))
    run(stopped, range(stop))
    loaded.map[0].weight.data.zero_()
    loaded.load_state_dict(stopped.state_dict())
    assert torch.equal(run(loaded, range(stop, 5)), run(alone, range(5)))


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"codes": -3}, "codes=-3"),
        ({"hidden": 0}, "hidden=0"),
        ({"init": "kmeans"}, "unknown init 'kmeans'"),
        ({"estimator": "straight"}, "did you mean 'straight_through'"),
    ],
    ids=str,
)
def test_bad_arguments_say_what_to_type(options: dict, complaint: str):
    with pytest.raises(UserError, match=complaint):
        built(**options)
