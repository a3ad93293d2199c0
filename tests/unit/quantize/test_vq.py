"""VQ against brute force, and what its four choices promise: table, update rule, start and estimator."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from pondera import UserError
from pondera.core import spec
from pondera.methods.quantize.base import ABSENT
from pondera.methods.quantize.common.estimator import ESTIMATORS
from pondera.methods.quantize.common.update import UPDATES
from pondera.methods.quantize.common.warm_up import KEPT_PER_CODE
from pondera.methods.quantize.vq import VQ

C = 4


def vectors(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, C, generator=torch.Generator().manual_seed(seed))


def built(codes: int = 6, **options) -> VQ:
    torch.manual_seed(0)
    return VQ(codes, **options).build(C).train()


def state(quantizer: VQ) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in quantizer.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("update", UPDATES)
def test_codes_are_those_of_brute_force(update: str):
    quantizer, x = built(update=update).eval(), vectors(5, 7)
    found = quantizer(x)
    for vector, code, out in zip(x.view(-1, C), found.codes.flatten(), found.out.view(-1, C), strict=True):
        distances = [float((vector - row).square().sum()) for row in quantizer.rows_KC.detach()]
        assert int(code) == distances.index(min(distances))
        assert torch.equal(out, quantizer.rows_KC[code])


def test_half_precision_finds_what_single_finds():
    quantizer, x = built(64), vectors(50).bfloat16()
    found, wide = quantizer(x), quantizer(x.float())
    assert found.out.dtype == torch.bfloat16 and torch.equal(found.codes, wide.codes)
    assert torch.equal(found.out, wide.out.bfloat16()) and torch.equal(found.loss, wide.loss)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(quantizer(x.float()).codes, wide.codes) and torch.equal(quantizer.encode(x), wide.codes)


class TestGradients:
    @pytest.mark.parametrize("update", UPDATES)
    def test_who_learns_from_the_terms(self, update: str):
        quantizer, x = built(update=update), vectors(3).requires_grad_()
        found = quantizer(x)
        found.loss.backward()
        assert set(found.terms) == ({"codebook", "commitment"} if update == "gradient" else {"commitment"})
        torch.testing.assert_close(x.grad, 0.25 * 2 * (x - found.out).detach() / x.numel())
        if update == "gradient":
            moved = quantizer.rows_KC.grad.abs().sum(-1) > 0
            assert moved.nonzero().flatten().tolist() == sorted(set(found.codes.flatten().tolist()))
        else:
            assert not list(quantizer.parameters())

    @pytest.mark.parametrize("detach_target", [True, False])
    @pytest.mark.parametrize("update", UPDATES)
    def test_a_detached_input_gets_exactly_nothing(self, update: str, detach_target: bool):
        encoder = torch.nn.Linear(C, C)
        quantizer = built(update=update, detach_input=True, detach_target=detach_target)
        found = quantizer(encoder(vectors(9)))
        gradients = torch.autograd.grad(found.loss + 0 * found.out.sum(), encoder.parameters())
        assert all(gradient.abs().max() == 0 for gradient in gradients)
        attached = built(update=update)(encoder(vectors(9)))
        assert torch.autograd.grad(attached.loss, encoder.weight)[0].abs().max() > 0

    @pytest.mark.parametrize("estimator", ESTIMATORS)
    def test_the_output_passes_what_the_estimator_passes(self, estimator: str):
        quantizer, x = built(estimator=estimator), vectors(3).requires_grad_()
        gradients = torch.autograd.grad(quantizer(x).out.sum(), (x, quantizer.rows_KC), allow_unused=True)
        assert (gradients[0] is None or not gradients[0].any()) == (estimator == "none")
        assert (gradients[1] is not None) == (estimator == "none")
        if estimator == "straight_through":
            assert torch.equal(gradients[0], torch.ones(3, C))

    def test_masked_places_pass_gradient_unchanged(self):
        quantizer, x = built(estimator="none"), vectors(3).requires_grad_()
        (2 * quantizer(x, torch.tensor([True, False, True])).out).sum().backward()
        assert torch.equal(x.grad, torch.tensor([[0.0], [2.0], [0.0]]).expand(3, C))


class TestWarmUp:
    @pytest.mark.parametrize("start", ["random", "kmeans"])
    def test_vectors_pass_until_it_is_over(self, start: str):
        quantizer, x = built(init=start, start_step=3), vectors(2, 5).requires_grad_()
        for step in range(5):
            quantizer.begin_step(step, 0)
            found = quantizer(x)
            open_ = step >= 3
            assert bool((found.codes >= 0).all()) == open_ and bool((found.codes == ABSENT).all()) != open_
            assert bool(found.terms) == open_ and torch.equal(found.out, x) != open_
            assert torch.equal(quantizer.encode(x), found.codes)
            if not open_:
                assert torch.equal(torch.autograd.grad((3 * found.out).sum(), x)[0], torch.full((2, 5, C), 3.0))
                with pytest.raises(UserError, match="warming up"):
                    quantizer.fold()

    def test_where_nobody_tells_each_call_in_training_is_a_step(self):
        quantizer, x = built(start_step=2), vectors(5)
        seen = [len(quantizer(x).terms) for _ in range(2)]
        quantizer.eval()
        seen += [len(quantizer(x).terms) for _ in range(3)]
        quantizer.train()
        assert [*seen, len(quantizer(x).terms)] == [0, 0, 0, 0, 0, 2]

    def test_leaving_training_closes_nothing(self):
        quantizer = built(start_step=1)
        quantizer.begin_step(1, 0)
        quantizer(vectors(3))
        quantizer.begin_step(-1, 0)
        assert quantizer.eval()(vectors(3)).terms and int(quantizer.step) == 1

    def test_every_weight_is_in_the_graph(self):
        """Processes that average gradients wait for it."""
        quantizer = built(start_step=9)
        quantizer(vectors(3)).out.sum().backward()
        assert quantizer.rows_KC.grad is not None and not quantizer.rows_KC.grad.any()

    def test_the_latest_vectors_are_kept(self):
        quantizer = built(codes=2, init="kmeans", start_step=99)
        batches = [vectors(30, seed=seed) for seed in range(4)]
        for number, batch in enumerate(batches):
            quantizer(batch)
            seen = torch.cat(batches[: number + 1])
            assert torch.equal(quantizer.gate.vectors(), seen[-2 * KEPT_PER_CODE :])
        assert len(quantizer.gate.vectors()) == 64


class TestKmeansStart:
    @pytest.mark.parametrize("warm_up", [0, 2])
    def test_usage_is_that_of_the_assignment(self, warm_up: int):
        quantizer = built(init="kmeans", start_step=warm_up, respawn=0.01)
        batches = [vectors(40, seed=seed) for seed in range(warm_up + 1)]
        for step, batch in enumerate(batches):
            quantizer.begin_step(step, 0)
            found = quantizer(batch)
        hits = quantizer.eval().encode(torch.cat(batches)).flatten().bincount(minlength=6)
        torch.testing.assert_close(quantizer.statistics.hits_K, hits / (warm_up + 1))  # hits per step of 40 vectors
        if not warm_up:
            assert torch.equal(found.codes.flatten().bincount(minlength=6), hits)

    @pytest.mark.parametrize("update", UPDATES)
    def test_rows_are_means_of_their_vectors(self, update: str):
        """On two far clusters that nothing can get wrong."""
        quantizer = built(codes=2, update=update, init="kmeans")
        x = 0.1 * vectors(20) + torch.tensor([[10.0], [-10.0]]).repeat(10, 1)
        quantizer(x)
        rows = quantizer.rows_KC.detach()
        torch.testing.assert_close(rows[rows[:, 0].argsort()], torch.stack([x[1::2].mean(0), x[::2].mean(0)]))

    def test_fewer_vectors_than_codes(self):
        quantizer = built(codes=8, init="kmeans", update="ema")
        assert quantizer(vectors(3)).out.isfinite().all() and quantizer.rows_KC.isfinite().all()

    def test_nothing_to_start_from_yet(self):
        quantizer = built(init="kmeans")
        assert not quantizer(vectors(2), torch.zeros(2, dtype=torch.bool)).terms
        assert quantizer(vectors(2)).terms


class TestUpdates:
    def test_averages_come_to_rest_on_the_clusters(self):
        quantizer = built(codes=2, update="ema", init=[[1.0] * C, [-1.0] * C], decay=0.5)
        x = vectors(40) + torch.tensor([[8.0], [-8.0]]).repeat(20, 1)
        for _ in range(30):
            quantizer(x)
        torch.testing.assert_close(quantizer.rows_KC, torch.stack([x[::2].mean(0), x[1::2].mean(0)]), atol=1e-3, rtol=0)

    def test_a_step_meets_one_codebook(self):
        """However many parts it is given in; only the next step meets the moved rows."""
        x = vectors(12)
        whole, split = built(update="ema"), built(update="ema")
        for step in range(3):
            for quantizer in (whole, split):
                quantizer.begin_step(step, 0)
            before = whole.rows_KC.clone()
            whole(x)
            split(x[:5])
            split(x[5:])
            assert torch.equal(whole.rows_KC, before)
            torch.testing.assert_close(split.rows_KC, before)
        assert not torch.equal(whole.rows_KC, built(update="ema").rows_KC)

    def test_dead_codes_become_vectors_of_the_batch(self):
        quantizer, x = built(codes=8, scale=50.0, respawn=0.5, decay=0.1), vectors(30)
        used = quantizer(x).codes.unique()
        before = quantizer.rows_KC.detach().clone()
        quantizer.begin_step(1, 0)
        dead = torch.ones(8, dtype=torch.bool).index_fill_(0, used, False)
        assert 0 < int(dead.sum()) < 8 and torch.equal(quantizer.rows_KC[~dead], before[~dead])
        assert all((x == row).all(-1).any() for row in quantizer.rows_KC[dead])
        assert len(quantizer.eval().encode(x).unique()) > len(used)
        quantizer.rows_KC.sum().backward()  # still a parameter that learns

    @pytest.mark.parametrize("update", UPDATES)
    def test_evaluation_touches_nothing(self, update: str):
        quantizer = built(update=update, init="kmeans", respawn=0 if update == "none" else 0.5)
        for step in range(2):
            quantizer(vectors(20, seed=step))
        quantizer.eval()
        before = state(quantizer)
        quantizer(vectors(20, seed=2)).health.to_dict()
        quantizer.encode(vectors(20, seed=3))
        assert same(before, state(quantizer))


@pytest.mark.parametrize("stop", range(6))
def test_a_model_that_is_loaded_goes_on_exactly(stop: int):
    """Stopped in the warm-up, at its end, and with statistics that have not moved the rows yet."""

    def run(quantizer: VQ, steps: range) -> None:
        for step in steps:
            quantizer.begin_step(step, 5)
            quantizer(vectors(12, seed=step) * (1 if step < 4 else 9))

    options = {"codes": 5, "update": "ema", "init": "kmeans", "start_step": 2, "respawn": 0.8, "decay": 0.6}
    alone, stopped, loaded = built(**options), built(**options), built(**options)
    run(alone, range(8))
    run(stopped, range(stop))
    loaded.load_state_dict(state(stopped))
    run(loaded, range(stop, 8))
    assert same(state(alone), state(loaded))


@pytest.mark.parametrize(
    "options", [{}, {"update": "ema", "respawn": 0.5, "init": "kmeans"}, {"update": "none"}], ids=str
)
def test_folded_is_the_same_and_learns_nothing(options: dict):
    quantizer = built(**options)
    for step in range(2):
        quantizer(vectors(20, seed=step))
    drawn = torch.get_rng_state()
    folded = quantizer.fold()
    assert torch.equal(torch.get_rng_state(), drawn)
    x, before = vectors(40, seed=9), state(folded)
    quantizer.eval()
    for training in (True, False):
        found, expected = folded.train(training)(x), quantizer(x)
        assert torch.equal(found.codes, expected.codes) and torch.equal(found.out, expected.out)
    folded.begin_step(1, 0)
    before["step"] = torch.tensor(1)
    assert not list(folded.parameters()) and same(before, state(folded))
    quantizer.rows_KC.data.zero_()
    assert torch.equal(folded(x).out, expected.out), "it has a table of its own"


class TestStart:
    def test_random_rows_have_the_scale(self):
        assert float(built(2000, scale=0.3).rows_KC.detach().std()) == pytest.approx(0.3, rel=0.05)

    def test_given_rows_are_copied(self):
        rows = vectors(6)
        quantizer = built(init=rows)
        assert torch.equal(quantizer.rows_KC, rows)
        rows.zero_()
        assert quantizer.rows_KC.abs().min() > 0
        assert built(1, init=[[1, 2, 3, 4]]).rows_KC.tolist() == [[1.0, 2.0, 3.0, 4.0]]

    def test_scale_decides_how_many_codes_are_found(self):
        """The collapse that the notes measured, and what k-means makes of it."""
        x = 2 * vectors(64, seed=3).repeat_interleave(8, 0) + 0.1 * vectors(512, seed=4)
        used = {}
        for name, options in {"far": {"scale": 50.0}, "kmeans": {"init": "kmeans"}}.items():
            quantizer = built(64, **options)
            used[name] = len(quantizer(x).codes.unique())
        assert used["far"] < 16 < 48 < used["kmeans"]


def test_it_is_named_by_a_spec():
    described = spec.build("VQ(256, update='ema', init='kmeans', respawn=0.01)", "quantize")
    assert isinstance(described, VQ) and described.build(C).sizes.tolist() == [[256]] and described.bits == 8
    assert not copy.deepcopy(described).dim


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"codes": 0}, "codes=0"),
        ({"codes": 2.5}, "codes=2.5"),
        ({"update": "emma"}, "did you mean 'ema'"),
        ({"init": "k-means"}, "did you mean 'kmeans'"),
        ({"init": [[1.0]]}, r"\(6, 4\)"),
        ({"estimator": "rotate"}, "did you mean 'rotation'"),
        ({"scale": 0.0}, "scale=0.0"),
        ({"start_step": -1}, "start_step=-1"),
        ({"commitment": -1.0}, "commitment=-1.0"),
        ({"decay": 1.0}, "decay=1.0"),
        ({"respawn": -0.1}, "respawn=-0.1"),
        ({"respawn": 0.1, "update": "none"}, "update='none'"),
    ],
    ids=str,
)
def test_bad_arguments_say_what_to_type(options: dict, complaint: str):
    with pytest.raises(UserError, match=complaint):
        built(**options)


def test_codes_of_another_shape():
    with pytest.raises(UserError, match=r"\[\.\.\., 1, 1\]"):
        built().decode(torch.zeros(3, 2, 1, dtype=torch.long))
