"""The contract tests of quantizers, for every quantizer in the index and all its forms.

Encoding and decoding agree with quantizing. Masked vectors have no effect. Folded and loaded quantizers equal the original.
Splitting a batch changes nothing, and packing codes is invertible.
"""

from __future__ import annotations

import functools
import math

import pytest
import torch
from helpers.fresh_process import copies
from torch import Tensor

from pondera import UserError
from pondera.core import spec
from pondera.methods.quantize.base import ABSENT, MERGES, Quantized, Quantizer
from pondera.methods.quantize.common.packing import pack, unpack

WIDTH = 6

DECLARED = [(name, text) for method in spec.index(("quantize",)).values() for name, text in method.examples.items()]
CASES = [text for _, text in DECLARED]
CODED = [text for text in CASES if spec.build(text, "quantize").build(6).levels]
NO_GRADIENT = [text for name, text in DECLARED if name.endswith("no gradient")]
OWN_GRADIENT = [text for name, text in DECLARED if name.endswith("own gradient")]
RESPAWN = [text for name, text in DECLARED if "respawn" in name]
SHAPES = [(0,), (), (1,), (3, 0, 2), (2, 3, 4)]


def vectors(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, WIDTH, generator=torch.Generator().manual_seed(seed))


@functools.cache
def described(case: str) -> Quantizer:
    return spec.build(case, "quantize")


@copies
def built(case: str, seed: int = 0) -> Quantizer:
    """A quantizer in training mode after three training steps."""
    torch.manual_seed(seed)
    quantizer = described(case).build(WIDTH).train()
    for step in range(3):
        quantizer.begin_step(step, 7)
        quantizer(vectors(64, seed=step))
    return quantizer


def most(quantizer: Quantizer) -> int:
    """The number of codes of the largest codebook."""
    return max(quantizer.sizes.flatten().tolist(), default=0)


def state(quantizer: Quantizer) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in quantizer.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor], **tolerance: float) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], **(tolerance or {"atol": 0, "rtol": 0}), msg=name)


def shown(found: Quantized) -> dict[str, Tensor]:
    """The fields of a result that must agree between two calls."""
    sums = {name: torch.as_tensor(term.sum.detach()) for name, term in found.terms.items()}
    counts = {f"num_{name}": torch.as_tensor(float(term.count)) for name, term in found.terms.items()}
    return {"out": found.out.detach(), "codes": found.codes} | sums | counts


@pytest.mark.parametrize("name", sorted(spec.index(("quantize",))))
def test_it_declares_how_it_is_tested(name: str):
    examples = spec.index(("quantize",))[name].examples
    assert examples, f'{name}: add the class attribute examples = {{"plain": "{name}(...)"}}'
    assert all(text.startswith(f"{name}(") for text in examples.values())


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_every_field_has_its_shape_and_type(case: str, shape: tuple[int, ...], training: bool):
    quantizer, x = built(case).train(training), vectors(*shape)
    found = quantizer(x)
    groups, levels = quantizer.groups, quantizer.levels
    assert found.out.shape == x.shape and found.out.dtype == x.dtype
    assert found.codes.shape == (*shape, groups, levels) and found.codes.dtype == torch.int64
    assert quantizer.sizes.shape == (groups, levels) and quantizer.sizes.dtype == torch.int64
    assert found.given is not None and torch.equal(found.given, x) and not found.given.requires_grad
    assert found.loss.shape == () and found.loss.isfinite()
    for term in found.terms.values():
        assert term.sum.shape == () and (float(term.count) > 0) == (x.numel() > 0)
    for table in (found.table, quantizer.table()):
        if table is not None:
            assert table.shape[:3] == (groups, levels, most(quantizer))
    assert found.table is None or not found.table.requires_grad
    assert found.health.vectors == math.prod(shape) and isinstance(found.health.to_dict(), dict)


@pytest.mark.parametrize("case", CODED)
def test_codes_are_found_and_stand_for_the_output(case: str):
    quantizer, x = built(case).eval(), vectors(4, 9)
    found = quantizer(x)
    codes = quantizer.encode(x)
    assert torch.equal(codes, found.codes)
    assert (codes >= 0).all() and (codes < quantizer.sizes).all()
    assert torch.equal(quantizer.decode(codes), found.out)
    assert len(codes.unique()) > 1 or most(quantizer) == 1


@pytest.mark.parametrize("case", CASES)
def test_how_vectors_lie_in_memory_changes_nothing(case: str):
    quantizer, x = built(case).eval(), vectors(5, 3)
    found = quantizer(x.transpose(0, 1))
    same(shown(found), shown(quantizer(x.transpose(0, 1).contiguous())))
    one_by_one = torch.stack([quantizer(row).codes for row in x.flatten(0, 1)]).view(5, 3, *found.codes.shape[-2:])
    assert torch.equal(found.codes.transpose(0, 1), one_by_one)


class TestMask:
    """Masked vectors have no effect."""

    @pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
    @pytest.mark.parametrize("case", CASES)
    def test_masked_places_do_not_count(self, case: str, training: bool):
        mask = torch.rand(8, 5, generator=torch.Generator().manual_seed(1)) < 0.6
        x = torch.where(mask[..., None], vectors(8, 5), 1e4)
        quantizer, alone = built(case).train(training), built(case).train(training)
        found, expected = quantizer(x, mask), alone(x[mask])
        assert torch.equal(found.out[~mask], x[~mask])
        assert (found.codes[~mask] == ABSENT).all()
        same(shown(expected), shown(found) | {"out": found.out[mask], "codes": found.codes[mask]})
        for one in (quantizer, alone):
            one.begin_step(9, 0)
        same(state(quantizer), state(alone))
        if quantizer.levels:  # statistics leave out vectors with the code ABSENT
            assert found.health == expected.health

    @pytest.mark.parametrize("case", CASES)
    def test_gradients_are_those_of_what_is_left(self, case: str):
        mask = torch.tensor([True, False, True, True])
        grads = []
        for masked in (True, False):
            quantizer, x = built(case), vectors(4).requires_grad_()
            found = quantizer(x, mask) if masked else quantizer(x[mask])
            kept = found.out[mask] if masked else found.out
            ((kept * 3).sum() + found.loss).backward()
            grads.append({"x": x.grad} | {name: weight.grad for name, weight in quantizer.named_parameters()})
        for name, gradient in grads[0].items():
            torch.testing.assert_close(gradient, grads[1][name], msg=name)

    @pytest.mark.parametrize("case", CASES)
    def test_encode_masks_as_forward_does(self, case: str):
        mask = torch.tensor([[True, False, True], [False, False, True]])
        quantizer, x = built(case).eval(), vectors(2, 3)
        assert torch.equal(quantizer.encode(x, mask), quantizer(x, mask).codes)

    @pytest.mark.parametrize("case", CASES)
    def test_nothing_left(self, case: str):
        quantizer, x = built(case), vectors(3)
        found = quantizer(x, torch.zeros(3, dtype=torch.bool))
        assert torch.equal(found.out, x) and (found.codes == ABSENT).all() and float(found.loss.detach()) == 0
        assert found.health.vectors == (0 if quantizer.levels else 3)


class TestLevels:
    """The codes of the first levels are a coarser code."""

    @pytest.mark.parametrize("case", CODED)
    def test_a_prefix(self, case: str):
        quantizer, x = built(case).eval(), vectors(2, 7)
        whole = quantizer.encode(x)
        for levels in range(1, quantizer.levels + 1):
            codes = quantizer.encode(x, levels=levels)
            assert torch.equal(codes[..., :levels], whole[..., :levels]) and (codes[..., levels:] == ABSENT).all()
            assert torch.equal(quantizer.decode(codes), quantizer.decode(whole[..., :levels]))
            found = quantizer(x, levels=levels)
            assert torch.equal(found.codes, codes) and torch.equal(found.out, quantizer.decode(codes))

    @pytest.mark.parametrize("case", CODED)
    def test_no_level_is_nothing(self, case: str):
        quantizer = built(case)
        codes = quantizer.encode(vectors(2, 3))
        nothing = quantizer.decode(codes[..., :0])
        assert torch.equal(nothing, torch.zeros(2, 3, WIDTH))
        assert torch.equal(quantizer.decode(torch.full_like(codes, ABSENT)), nothing)

    @pytest.mark.parametrize("case", CODED)
    def test_other_numbers_are_refused(self, case: str):
        quantizer = built(case)
        for levels in (0, quantizer.levels + 1):
            for call in (quantizer, quantizer.encode):
                with pytest.raises(UserError, match=f"levels={levels}"):
                    call(vectors(2), levels=levels)


class TestSoftDecode:
    """Decoding of scores in place of codes, for quantizers with a table."""

    def tabled(self, case: str) -> Quantizer:
        """A quantizer with a table; for one without, tests that it refuses scores, and skips the rest."""
        quantizer = built(case).eval()
        if quantizer.table() is None:
            name = case.partition("(")[0]
            with pytest.raises(UserError, match=f"{name} has no table"):
                quantizer.soft_decode(torch.zeros(1, quantizer.groups, quantizer.levels, most(quantizer)))
            pytest.skip(f"{name} has no table; it refuses scores by name")
        return quantizer

    def one_hot(self, quantizer: Quantizer, codes: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(codes, most(quantizer)).float()

    @pytest.mark.parametrize("case", CODED)
    def test_one_hot_scores_are_the_codes(self, case: str):
        quantizer = self.tabled(case)
        codes = quantizer.encode(vectors(3, 4))
        scores, expected = self.one_hot(quantizer, codes), quantizer.decode(codes)
        for merge, logits in (("raw_logits", scores), ("softmax", 1e4 * scores), ("hard", scores)):
            torch.testing.assert_close(quantizer.soft_decode(logits, merge), expected)

    @pytest.mark.parametrize("case", CODED)
    def test_raw_scores_are_linear_and_all_but_hard_learn(self, case: str):
        quantizer = self.tabled(case)
        shape = (5, quantizer.groups, quantizer.levels, most(quantizer))
        a, b = (torch.randn(shape, requires_grad=True) for _ in range(2))

        def soft(logits: Tensor) -> Tensor:
            return quantizer.soft_decode(logits, "raw_logits")

        torch.testing.assert_close(soft(2 * a - 3 * b), 2 * soft(a) - 3 * soft(b), atol=1e-3, rtol=1e-4)
        for merge in MERGES:
            out = quantizer.soft_decode(a, merge)
            gradient = torch.autograd.grad(out.square().sum(), a, allow_unused=True)[0] if out.requires_grad else None
            assert (gradient is not None and bool(gradient.any())) == (merge != "hard" and shape[-1] > 1) or (
                merge == "raw_logits"
            )

    @pytest.mark.parametrize("case", CODED)
    def test_scores_of_codes_that_are_not_there_count_for_nothing(self, case: str):
        quantizer = self.tabled(case)
        sizes, codes = quantizer.sizes, torch.arange(most(quantizer))
        logits = torch.randn(2, *sizes.shape, len(codes))
        loud = torch.where(codes < sizes[..., None], logits, 50.0)
        for merge in MERGES:
            assert torch.equal(quantizer.soft_decode(logits, merge), quantizer.soft_decode(loud, merge))

    def test_errors_say_what_to_write(self):
        with pytest.raises(UserError, match="did you mean 'softmax'"):
            built("VQ(5)").soft_decode(torch.zeros(1, 1, 1, 5), "sotfmax")
        with pytest.raises(UserError, match="Identity has no table"):
            built("Identity()").soft_decode(torch.zeros(1, 0, 0, 5))


class TestFold:
    """Folding replaces trained parameters by plain tables."""

    @pytest.mark.parametrize("case", CASES)
    def test_it_is_exact_and_learns_nothing(self, case: str):
        quantizer = built(case).eval()
        before = state(quantizer)
        folded, x = quantizer.fold(), vectors(6, 3, seed=9)
        codes = quantizer.encode(x)
        assert torch.equal(folded.encode(x), codes) and torch.equal(folded(x).out, quantizer(x).out)
        if folded.discrete and codes.numel():
            for levels in range(quantizer.levels + 1):
                assert torch.equal(folded.decode(codes[..., :levels]), quantizer.decode(codes[..., :levels]))
        assert torch.equal(folded.sizes, quantizer.sizes) and folded.bits == quantizer.bits
        assert not any(weight.requires_grad for weight in folded.parameters())
        same(before, state(quantizer))

    @pytest.mark.parametrize("case", CASES)
    def test_training_does_not_change_it(self, case: str):
        quantizer = built(case)
        folded = quantizer.fold().train()
        codes, before = folded.encode(vectors(9)), state(folded)
        for step in range(3, 6):
            for one in (folded, quantizer):
                one.begin_step(step, 0)
                one(vectors(64, seed=step) + 5)
        assert torch.equal(folded.encode(vectors(9)), codes)
        moved = [name for name, value in state(folded).items() if not torch.equal(value, before[name])]
        assert all(name.rpartition(".")[2] == "step" for name in moved)


@pytest.mark.parametrize("case", CODED)
def test_packed_codes_take_the_bytes_it_says(case: str):
    quantizer = built(case).eval()
    for number in (0, 1, 13):
        codes = quantizer.encode(vectors(number))
        data = pack(codes, quantizer.sizes)
        bits = sum(math.ceil(math.log2(size)) for size in quantizer.sizes.flatten().tolist())
        assert quantizer.bits == bits
        assert data.dtype == torch.uint8 and len(data) == quantizer.nbytes(number) == math.ceil(number * bits / 8)
        assert torch.equal(unpack(data, number, quantizer.sizes), codes)


class TestState:
    """A checkpoint contains the whole state."""

    @pytest.mark.parametrize("case", CASES)
    def test_saved_and_loaded_it_goes_on_alike(self, case: str):
        quantizer, other = built(case), built(case, seed=1)
        other.load_state_dict(quantizer.state_dict())
        same(shown(quantizer.eval()(vectors(8))), shown(other.eval()(vectors(8))))
        for one in (quantizer.train(), other.train()):
            one.begin_step(3, 0)
            one(vectors(32, seed=5))
            one.begin_step(4, 0)
        same(state(quantizer), state(other))

    @pytest.mark.parametrize("case", CASES)
    def test_evaluating_changes_nothing(self, case: str):
        quantizer = built(case)
        quantizer.begin_step(3, 0)
        before = state(quantizer.eval())
        found = quantizer(vectors(40, seed=3) * 3)
        quantizer.encode(vectors(4)), found.health, quantizer.table(), quantizer.fold()
        same(before, state(quantizer))

    @pytest.mark.parametrize("case", CASES)
    def test_encoding_in_training_mode_changes_nothing(self, case: str):
        quantizer = built(case)
        before = state(quantizer)
        codes = quantizer.encode(vectors(4))
        assert not codes.requires_grad
        same(before, state(quantizer))

    @pytest.mark.parametrize("case", CASES)
    def test_processes_with_equal_steps_and_vectors_agree(self, case: str):
        a, b = built(case), built(case)
        for step in range(3, 9):
            for one in (a, b):
                one.begin_step(step, 1)
            same(shown(a(vectors(30, seed=step))), shown(b(vectors(30, seed=step))))
        same(state(a), state(b))


@pytest.mark.parametrize("case", CASES)
def test_splitting_a_batch_changes_nothing(case: str):
    whole, split, x = built(case), built(case), vectors(40, seed=4)
    for one in (whole, split):
        one.begin_step(200, 0)
    expected, parts = shown(whole(x)), [shown(split(part)) for part in x.split([3, 20, 0, 17])]
    assert torch.equal(torch.cat([part["codes"] for part in parts]), expected["codes"])
    for name in set(expected) - {"out", "codes"}:
        torch.testing.assert_close(torch.stack([part[name] for part in parts]).sum(0), expected[name], msg=name)
    if case not in RESPAWN:  # the vectors that replace dead codes depend on the parts
        for one in (whole, split):
            one.begin_step(201, 0)
        same(state(whole), state(split), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_16_bit_vectors(case: str):
    quantizer, x = built(case).eval(), vectors(5, 8).bfloat16()
    found, exact = quantizer(x), quantizer(x.float())
    assert found.out.dtype == torch.bfloat16 and torch.equal(found.codes, exact.codes)
    assert torch.equal(found.out, exact.out.bfloat16())
    assert quantizer.train()(x).loss.isfinite()


class TestGradient:
    """The gradient of the input from the output."""

    @pytest.mark.parametrize("case", CASES)
    def test_straight_through_none_or_its_own(self, case: str):
        quantizer, x = built(case), vectors(7).requires_grad_()
        quantizer.begin_step(300, 0)
        weight = torch.randn(7, WIDTH)
        found = quantizer(x)
        if found.out.requires_grad:
            (found.out * weight).sum().backward()
        if case in OWN_GRADIENT:
            assert x.grad is not None and x.grad.isfinite().all() and x.grad.any()
            assert not torch.allclose(x.grad, weight)
        elif case in NO_GRADIENT:
            assert x.grad is None or not x.grad.any()
        else:
            torch.testing.assert_close(x.grad, weight)

    @pytest.mark.parametrize("case", CASES)
    def test_weights_all_get_one_where_the_loss_is_trained(self, case: str):
        """Distributed training waits for the gradient of every weight."""
        quantizer = built(case)
        for step in range(3, 7):
            quantizer.begin_step(step, 0)
            quantizer.zero_grad()
            found = quantizer(vectors(7).requires_grad_())
            (found.out.sum() + found.loss).backward()
            assert all(weight.grad is not None for weight in quantizer.parameters() if weight.requires_grad)


class TestWarmUp:
    """Vectors pass unchanged until the start step, and until data has initialized the codebooks."""

    @pytest.mark.parametrize(
        "case",
        [
            "VQ(5, start_step=2)",
            "VQ(5, init='kmeans', start_step=2)",
            "SimVQ(5, init='match', start_step=2)",
            "Residual(VQ(5, init='kmeans', start_step=2), levels=3)",
            "Product(Residual(VQ(5, start_step=2), levels=2), groups=2)",
            "Residual(Product(SimVQ(4, init='match', start_step=2), groups=3), levels=2)",
        ],
    )
    def test_vectors_pass(self, case: str):
        quantizer = described(case).build(WIDTH)
        for step in range(4):
            quantizer.begin_step(step, 0)
            x = vectors(64, seed=step).requires_grad_()
            found = quantizer(x)
            assert torch.equal(found.codes, quantizer.encode(x))
            if step < 2:
                assert torch.equal(found.out, x) and not found.terms and (found.codes == ABSENT).all()
                assert torch.autograd.grad(found.out.sum(), x)[0].eq(1).all()
            else:
                assert (found.codes != ABSENT).all() and torch.equal(found.out, quantizer.decode(found.codes))

    def test_waiting_for_vectors(self):
        quantizer = described("Product(VQ(5, init='kmeans'), groups=2)").build(WIDTH)
        assert torch.equal(quantizer.eval()(vectors(3)).out, vectors(3))
        with pytest.raises(UserError, match="before folding"):
            quantizer.fold()
        quantizer.train()(vectors(50))
        assert (quantizer.eval().encode(vectors(3)) >= 0).all()


class TestDescription:
    """A quantizer is a description until `build` creates it for a width."""

    @pytest.mark.parametrize("case", CASES)
    def test_it_reads_as_its_spec(self, case: str):
        text = repr(described(case))
        assert text == case == repr(spec.build(text, "quantize")) == repr(built(case))

    @pytest.mark.parametrize("case", CASES)
    def test_it_can_be_built_often_but_what_is_built_cannot(self, case: str):
        plain = described(case)
        one, other = plain.build(WIDTH), plain.build(WIDTH)
        weights = {id(weight) for weight in one.parameters()} & {id(weight) for weight in other.parameters()}
        assert not weights and not list(plain.parameters()) and plain.dim == 0 and one.dim == WIDTH
        with pytest.raises(UserError, match="already built"):
            one.build(WIDTH)
        with pytest.raises(UserError, match="description"):
            plain(vectors(2))

    @pytest.mark.parametrize("width", [0, -1, True, 2.0])
    def test_no_width(self, width: object):
        with pytest.raises(UserError, match="1 or more"):
            spec.build("VQ(5)", "quantize").build(width)

    @pytest.mark.parametrize("case", CASES)
    def test_what_does_not_fit_is_refused_by_name(self, case: str):
        quantizer = built(case)
        name = case.partition("(")[0]
        for call in (quantizer, quantizer.encode):
            with pytest.raises(UserError, match=rf"(?s)({name}|{WIDTH}).*{WIDTH + 1}"):
                call(torch.zeros(2, WIDTH + 1))
            with pytest.raises(UserError, match="mask"):
                call(vectors(2), torch.ones(3, dtype=torch.bool))

    @pytest.mark.parametrize("case", CASES)
    def test_what_it_says_of_itself(self, case: str):
        quantizer = described(case)
        assert quantizer.paper and quantizer.cost


# Vectors that contain inf or nan

BROKEN = [float("nan"), float("inf"), -float("inf")]


@pytest.mark.parametrize("stepped", [True, False], ids=["begin_step", "alone"])
@pytest.mark.parametrize("broken", BROKEN, ids=str)
@pytest.mark.parametrize("case", CODED)
def test_a_broken_vector_is_left_out_of_all_statistics(case: str, broken: float, stepped: bool):
    """From the first batch on, the state after a batch with such a vector equals the state after a batch without it."""
    x = vectors(2, 40)
    x[0, 3, 2], x[1, 5, 0] = broken, broken
    states = []
    for given in (x[0], x[0][x[0].isfinite().all(-1)]):
        torch.manual_seed(0)
        quantizer = described(case).build(WIDTH).train()
        for step, batch in enumerate((given, vectors(40, seed=1), vectors(40, seed=2))):
            if stepped:
                quantizer.begin_step(step, 7)
            quantizer(batch)
        states.append(state(quantizer))
    same(*states, atol=1e-6, rtol=1e-5)
    assert all(value.isfinite().all() for value in states[0].values() if value.is_floating_point())


@pytest.mark.parametrize("broken", BROKEN, ids=str)
@pytest.mark.parametrize("case", CODED)
def test_a_broken_vector_gets_codes_that_exist_and_spoils_no_other(case: str, broken: float):
    quantizer, x = built(case).eval(), vectors(12)
    bad = x.clone()
    bad[3, 2] = broken
    codes, others = quantizer(bad).codes, torch.arange(12) != 3
    assert ((codes >= 0) & (codes < quantizer.sizes)).all()
    assert torch.equal(codes[others], quantizer(x).codes[others])
    assert torch.equal(quantizer.encode(bad), codes)
    assert quantizer.decode(codes).isfinite().all()
    assert quantizer(bad).health.vectors == 11


@pytest.mark.parametrize("masked", [False, True])
def test_it_is_said_once(masked: bool, caplog: pytest.LogCaptureFixture):
    quantizer = (
        spec.build("Residual(Product(VQ(4, update='ema'), groups=2), levels=2)", "quantize").build(WIDTH).train()
    )
    x = vectors(20)
    x[3] = float("nan")
    mask = torch.arange(20) != 3 if masked else None
    for _ in range(3):
        quantizer(x, mask)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == (0 if masked else 1)
    assert masked or "1 of 20 vectors contain inf or nan" in said[0]


def test_a_batch_of_nothing_else_is_no_batch():
    for case in ("VQ(4, update='ema', init='kmeans', respawn=0.5)", "Scalar(4)", "LFQ()", "SimVQ(4, init='match')"):
        torch.manual_seed(0)
        quantizer = described(case).build(WIDTH).train()
        before = state(quantizer)
        quantizer(vectors(20) * float("nan"))
        after = state(quantizer)
        same(
            {name: after[name] for name in after if name != "step"},
            {name: before[name] for name in before if name != "step"},
        )
