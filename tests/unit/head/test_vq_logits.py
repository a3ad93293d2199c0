"""VQ-Logits: the full scatter, the log-sum-exp form of the loss and drawing in two steps are one distribution."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from pondera.core.errors import UserError
from pondera.methods.head.base import IGNORED
from pondera.methods.head.vq_logits import VQLogits

V, D = 50, 12


def made(seed: int = 0, **settings) -> VQLogits:
    torch.manual_seed(seed)
    head = VQLogits(**{"codes": 7, **settings})
    head.bind(V, D, settings.pop("rows", None))
    with torch.no_grad():
        head.table_GKC.normal_()
        if head.bias_V is not None:
            head.bias_V.normal_(std=2.0)
    return head


def states(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, D, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("groups", [1, 2, 3])
@pytest.mark.parametrize("bias", [True, False])
def test_logits_are_the_sums_of_the_scores_of_a_tokens_codes(groups: int, bias: bool):
    head, h_BTD = made(groups=groups, bias=bias), states(2, 3)
    logits_BTV = head(h_BTD)
    for v in range(V):
        want = sum(
            h_BTD.unflatten(-1, (groups, -1))[..., g, :] @ head.table_GKC[g, head.code_VG[v, g]] for g in range(groups)
        )
        want = want + (head.bias_V[v] if head.bias_V is not None else 0.0)
        torch.testing.assert_close(logits_BTV[..., v], want)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("bias", [True, False])
def test_the_loss_is_the_cross_entropy_of_the_logits_with_its_gradients(groups: int, bias: bool):
    labels_BT = torch.tensor([[0, 3, IGNORED], [49, 17, 48]])
    grads = []
    for exact in (False, True):
        head, h_BTD = made(groups=groups, bias=bias).double(), states(2, 3).double().requires_grad_()
        term = head.term(h_BTD, labels_BT)
        want = F.cross_entropy(head(h_BTD).flatten(0, 1), labels_BT.flatten(), ignore_index=IGNORED, reduction="sum")
        assert term.count == 5
        torch.testing.assert_close(term.sum.double(), want, rtol=1e-5, atol=1e-5)
        (want if exact else term.sum.double()).backward()
        grads.append([h_BTD.grad, head.table_GKC.grad] + ([head.bias_V.grad] if bias else []))
    for one, other in zip(*grads, strict=True):
        assert one is not None and one.abs().max() > 0
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_drawing_a_code_and_then_one_of_its_tokens_is_the_same_distribution():
    head, h_ND = made().double(), states(4).double()
    codes_NK = (head.scores(h_ND)[:, 0] + head.shares()).log_softmax(-1)
    within_V = head._biases() - head.shares()[head.code_VG[:, 0]]
    both_NV = codes_NK[:, head.code_VG[:, 0]] + within_V
    torch.testing.assert_close(both_NV, head(h_ND[None])[0].log_softmax(-1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(both_NV.exp().sum(-1), torch.ones(4).double(), rtol=1e-5, atol=1e-5)


def test_tokens_of_one_code_differ_by_their_biases_whatever_the_context():
    head = made()
    logits_NV = head(states(5)[None])[0]
    one, other = (head.code_VG[:, 0] == 6).nonzero().flatten()[:2].tolist()
    assert head.bias_V is not None
    gap = (head.bias_V[one] - head.bias_V[other]).expand(5)
    torch.testing.assert_close(logits_NV[:, one] - logits_NV[:, other], gap)


def test_with_a_code_for_each_token_it_is_the_output_matrix():
    rows_VD = torch.randn(V, D, generator=torch.Generator().manual_seed(3))
    head = VQLogits(codes=V, bias=False)
    head.bind(V, D)
    assert torch.equal(head.code_VG[:, 0], torch.arange(V))
    with torch.no_grad():
        head.table_GKC.copy_(rows_VD[None])
    torch.testing.assert_close(head(states(2, 3)), states(2, 3) @ rows_VD.T)


def test_trained_rows_are_clustered_and_the_nearest_code_taken():
    centres_KD = 5 * torch.randn(4, D, generator=torch.Generator().manual_seed(3))
    rows_VD = centres_KD[torch.arange(V) % 4] + 0.01 * torch.randn(V, D, generator=torch.Generator().manual_seed(4))
    head = VQLogits(codes=4, bias=False)
    head.bind(V, D, rows_VD)
    torch.testing.assert_close(head(states(2, 3)), states(2, 3) @ rows_VD.T, rtol=0.05, atol=0.5)
    same = head.code_VG[:, 0]
    assert all(len(set(same[at::4].tolist())) == 1 for at in range(4)) and len(set(same.tolist())) == 4


def test_of_ids_alone_frequent_tokens_own_a_code_and_combinations_differ():
    head = VQLogits(codes=8)
    head.bind(V, D)
    hits = torch.bincount(head.code_VG[:, 0], minlength=8)
    assert hits[:4].tolist() == [1, 1, 1, 1] and hits.sum() == V and hits[4:].max() - hits[4:].min() <= 1
    pairs = VQLogits(codes=8, groups=2)
    pairs.bind(V, D)
    assert len({tuple(row) for row in pairs.code_VG.tolist()}) == V


@pytest.mark.parametrize("shape", [(1, 1), (2, 0), (3, 4)])
def test_odd_shapes_and_no_known_label(shape: tuple[int, int]):
    head = made()
    assert head(states(*shape)).shape == (*shape, V)
    term = head.term(states(*shape), torch.full(shape, IGNORED))
    assert term.sum == 0 and term.count == 0


def test_a_code_without_tokens_has_no_share_and_no_nan():
    head = VQLogits(codes=100)
    head.bind(V, D)
    assert head.shares()[V:].eq(-math.inf).all()
    term = head.term(states(2, 3).requires_grad_(), torch.ones(2, 3, dtype=torch.long))
    term.sum.backward()
    assert head.bias_V is not None and head.bias_V.grad is not None
    assert term.sum.isfinite() and head.bias_V.grad.isfinite().all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"codes": 0}, "codes=0: give 1 or more"),
        ({"init": "kmean"}, "did you mean 'kmeans'"),
        ({"groups": 5}, "groups=5 does not divide the width 12; the nearest divisor is 4"),
        ({"init": "kmeans"}, "needs a trained backbone"),
    ],
)
def test_mistakes(settings: dict, message: str):
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        VQLogits(**settings).bind(V, D)


def test_its_text_builds_it_again():
    from pondera.core import spec

    assert repr(spec.build(repr(VQLogits(3, 2, False)), "head")) == repr(VQLogits(3, 2, False))
