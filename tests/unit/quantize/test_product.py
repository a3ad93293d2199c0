"""Product quantization against its parts run one by one."""

from __future__ import annotations

import pytest
import torch

from pondera import UserError
from pondera.methods.quantize.common.estimator import rotate
from pondera.methods.quantize.product import Product
from pondera.methods.quantize.residual import Residual
from pondera.methods.quantize.sim_vq import SimVQ
from pondera.methods.quantize.vq import VQ


def made(quantizer: Product, dim: int = 6, seed: int = 0) -> Product:
    torch.manual_seed(seed)
    return quantizer.build(dim)


ORDER = [4, 0, 3, 5, 2, 1]


@pytest.mark.parametrize("of", [VQ(5), SimVQ(5, hidden=4), Residual(VQ(5), levels=2)], ids=repr)
@pytest.mark.parametrize("order", [None, ORDER], ids=["in order", "permuted"])
def test_every_part_is_quantized_alone(of, order: list[int] | None):
    quantizer, x = made(Product(of, groups=3, order=order)), torch.randn(4, 5, 6)
    found, out = quantizer(x), torch.zeros_like(x)
    dims = torch.tensor(order or range(6)).view(3, 2)
    alone = [part(x[..., mine]) for part, mine in zip(quantizer.each(), dims, strict=True)]
    for result, mine in zip(alone, dims, strict=True):
        out[..., mine] = result.out
    assert torch.equal(found.out, out)
    assert torch.equal(found.codes, torch.stack([result.codes[..., 0, :] for result in alone], -2))
    for name in ("codebook", "commitment"):
        torch.testing.assert_close(
            found.terms[name].mean(), torch.stack([result.terms[name].mean() for result in alone]).mean()
        )
    assert quantizer.sizes.tolist() == [[5] * of.levels if isinstance(of, VQ | SimVQ) else [5, 5]] * 3


def test_parts_differ():
    tables = made(Product(VQ(5), groups=3)).table()
    assert tables.shape == (3, 1, 5, 2) and len(tables.flatten(1).unique(dim=0)) == 3


def test_a_dimension_moves_only_the_part_that_it_is_read_in():
    quantizer = made(Product(VQ(64), groups=3, order=ORDER))
    x = torch.zeros(1, 6)
    for dim in range(6):
        changed = x.clone()
        changed[0, dim] = 5
        found = quantizer.encode(changed) != quantizer.encode(x)
        assert found.flatten().tolist() == [part == ORDER.index(dim) // 2 for part in range(3)]


def test_pairs_of_a_rotation_can_stay_together():
    """Halves of two heads of width 4 are rotated against each other; fast pairs go into one branch, slow into another."""
    width, heads = 4, 2
    fast = [head * width + half * width // 2 for head in range(heads) for half in range(2)]
    order = fast + [dim + 1 for dim in fast]
    quantizer = made(Product(VQ(16), groups=2, order=order), dim=8)
    x = torch.randn(3, 8)
    assert torch.equal(quantizer.each()[0].encode(x[:, [0, 2, 4, 6]]), quantizer.encode(x)[:, :1])


def test_each_part_is_rotated_by_itself():
    quantizer, x = (
        made(Product(SimVQ(5, estimator="rotation"), groups=3, order=ORDER)),
        torch.randn(7, 6, requires_grad=True),
    )
    weight, found = torch.randn(7, 6), quantizer(x)
    (gradient,) = torch.autograd.grad((found.out * weight).sum(), x)
    for mine in torch.tensor(ORDER).view(3, 2):
        part = x[:, mine].detach().requires_grad_()
        (rotate(part, found.out[:, mine].detach()) * weight[:, mine]).sum().backward()
        torch.testing.assert_close(gradient[:, mine], part.grad)


def test_soft_decode_takes_scores_per_group():
    quantizer, logits = made(Product(SimVQ(5), groups=3, order=ORDER)), torch.randn(2, 3, 1, 5)
    expected = torch.zeros(2, 6)
    for group, mine in enumerate(torch.tensor(ORDER).view(3, 2)):
        expected[:, mine] = logits[:, group, 0].softmax(-1) @ quantizer.table()[group, 0].detach()
    torch.testing.assert_close(quantizer.soft_decode(logits).detach(), expected)


def test_folded_parts_are_plain_tables():
    folded = made(Product(SimVQ(5), groups=3)).fold()
    assert [type(part) for part in folded.each()] == [VQ] * 3


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda: Product(VQ(4), groups=4).build(6), "4 groups do not divide the width 6"),
        (lambda: Product(VQ(4), groups=0), "give 1 or more"),
        (lambda: Product("VQ(4)", groups=2), "give a quantizer"),
        (lambda: Product(VQ(4), groups=2, order=[0, 1, 1, 3]), "every dimension from 0 to 3 exactly once"),
        (lambda: Product(VQ(4), groups=2, order=[1, 0]).build(4), "2 dimensions for vectors of width 4"),
    ],
)
def test_bad_arguments(wrong, said: str):
    with pytest.raises(UserError, match=said):
        wrong()
