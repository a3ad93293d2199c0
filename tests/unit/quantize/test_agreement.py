"""VQ and SimVQ against vector-quantize-pytorch, values and gradients, where both define the same.

Their SimVQ has a map without bias, and their EMA changes rows at once where ours waits for the step to end.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pondera.methods.quantize.sim_vq import SimVQ
from pondera.methods.quantize.vq import VQ

peers = pytest.importorskip("vector_quantize_pytorch", reason="vector-quantize-pytorch is not installed")

K, C = 12, 6
ESTIMATORS = pytest.mark.parametrize("estimator", ["straight_through", "rotation"])


def vectors(seed: int = 0) -> Tensor:
    return torch.randn(2, 9, C, generator=torch.Generator().manual_seed(seed))


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def results(quantize, parameters: list[Tensor]) -> list[Tensor]:
    """Output, codes, loss, and the gradients of a loss on all of it."""
    x = vectors().requires_grad_()
    out, codes, loss = quantize(x)
    gradients = torch.autograd.grad((out * vectors(1)).sum() + 3 * loss, [x, *parameters])
    return [out.detach(), codes.flatten(), loss.detach().squeeze(), *gradients]


def ours(quantizer):
    """A call like theirs."""

    def quantize(x: Tensor):
        found = quantizer(x)
        return found.out, found.codes, found.loss

    return quantize


def agree(found: list[Tensor], expected: list[Tensor]) -> None:
    assert torch.equal(found[1], expected[1])
    for a, b in zip(found, expected, strict=True):
        close(a, b.view_as(a))


@ESTIMATORS
def test_simvq(estimator: str):
    peer = peers.SimVQ(C, K, rotation_trick=estimator == "rotation")
    quantizer = SimVQ(K, estimator=estimator).build(C).train()
    last = quantizer.map[0]
    with torch.no_grad():
        quantizer.base_KC.copy_(peer.frozen_codebook)
        last.weight.copy_(peer.code_transform.weight)
        last.bias.zero_()
    agree(results(ours(quantizer), [last.weight]), results(peer, [peer.code_transform.weight]))


@ESTIMATORS
def test_vq_by_gradient(estimator: str):
    """Theirs has one term without stop-gradients, which is ours with both weights at one."""
    peer = peers.VectorQuantize(
        C, codebook_size=K, learnable_codebook=True, ema_update=False, rotation_trick=estimator == "rotation"
    )
    rows = peer._codebook.embed
    quantizer = VQ(K, init=rows.detach()[0], estimator=estimator, commitment=1.0).build(C).train()
    found, expected = results(ours(quantizer), [quantizer.rows_KC]), results(peer, [rows])
    found[2] = found[2] / 2  # we name their one term twice, for either side
    agree(found, expected)


@ESTIMATORS
def test_vq_by_moving_averages(estimator: str):
    peer = peers.VectorQuantize(
        C, codebook_size=K, decay=0.8, commitment_weight=0.25, rotation_trick=estimator == "rotation"
    )
    quantizer = VQ(K, "ema", peer._codebook.embed[0], estimator=estimator, decay=0.8).build(C).train()
    for step in range(4):
        quantizer.begin_step(step, 0)
        agree(results(ours(quantizer), []), results(peer, []))
    quantizer.begin_step(4, 0)
    close(quantizer.rows_KC, peer._codebook.embed[0])
    close(quantizer.statistics.hits_K, peer._codebook.cluster_size[0])
