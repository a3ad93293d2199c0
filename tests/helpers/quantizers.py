"""Every quantizer in the index in all its declared forms, and what their contract tests share."""

from __future__ import annotations

import functools

import torch
from helpers.fresh_process import copies
from torch import Tensor

from pondera.core import spec
from pondera.methods.quantize.base import Quantized, Quantizer

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
