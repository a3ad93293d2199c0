"""The contract tests of quantizers, for every quantizer in the index and all its forms: results and descriptions.

Masked vectors have no effect, and neither has the memory layout. Splitting a batch changes nothing. A quantizer reads as its
spec string. `test_quantize_codes.py` and `test_quantize_training.py` belong to the same suite.
"""

from __future__ import annotations

import math

import pytest
import torch
from helpers.quantizers import CASES, CODED, RESPAWN, SHAPES, WIDTH, built, described, most, same, shown, state, vectors

from pondera import UserError
from pondera.core import spec
from pondera.methods.quantize.base import ABSENT


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
