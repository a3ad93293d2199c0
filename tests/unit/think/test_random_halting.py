"""The random control: as many tokens go on as it is told, and no two of them share their fate.

Shapes: B batch, T tokens.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pondera.core.stateless_random import prefix_hash
from pondera.methods.think.common.halting import Halting
from pondera.models.adaptive_lm import AdaptiveLM
from pondera.models.config import AdaptiveConfig

BACKBONE = {
    "model_type": "llama",
    "vocab_size": 1000,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
SHARE = 0.8
METHODS = [
    f"AdaptiveLatentCoT(steps=2, halting='random', continue_prob={SHARE})",
    f"AdaPonderLM(steps=2, halting='random', continue_prob={SHARE})",
    f"PonderLM3(thoughts=2, halting='random', continue_prob={SHARE}, train_rounds=(1, 1), eval_rounds=1)",
    f"ThinkAtHard(steps=2, halting='random', continue_prob={SHARE})",
    f"UniversalTransformer(steps=2, halting='random', continue_prob={SHARE})",
]


def halting(share: float) -> Halting:
    return Halting("random", "router", share)


def ids(batch: int, tokens: int, seed: int = 0) -> Tensor:
    return torch.randint(1000, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def mask(control: Halting, ids_BT: Tensor | None, tokens: int, depth: int = 1) -> Tensor:
    """The tokens that go on to `depth`, ``[B, T]``."""
    positions = torch.arange(tokens)[None]
    hashes = None if ids_BT is None else prefix_hash(ids_BT, positions)
    found = control.continue_mask(depth, positions, None, pytest.fail, hashes)
    assert found is not None
    return found


def agreement(one_BT: Tensor, other_BT: Tensor) -> float:
    return (one_BT == other_BT).double().mean().item()


def by_chance(share: float) -> float:
    """How often two independent decisions agree."""
    return share**2 + (1 - share) ** 2


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("known", [True, False], ids=["ids", "no-ids"])
def test_share_of_tokens_that_go_on(share, known):
    """Within 2 % at each depth, and independent of the depth before; with token ids and by position alone."""
    control, ids_BT = halting(share), ids(8, 50_000) if known else None
    tokens = 50_000 if known else 400_000
    first, second = (mask(control, ids_BT, tokens, depth) for depth in (1, 2))
    assert first.double().mean().item() == pytest.approx(share, rel=0.02)
    assert second.double().mean().item() == pytest.approx(share, rel=0.02)
    error = (share * (1 - share) / int(first.sum())) ** 0.5
    assert second[first].double().mean().item() == pytest.approx(share, abs=4 * error)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_none_or_all(share):
    assert mask(halting(share), ids(2, 1000), 1000).double().mean().item() == share


@pytest.mark.parametrize("share", [0.3, 0.5])
def test_rows_with_other_tokens_decide_independently(share):
    """Equal tokens at equal positions decide alike, as caching and padding need."""
    control, ids_BT = halting(share), ids(2, 50_000)
    row, other = mask(control, torch.cat([ids_BT, ids_BT[:1]]), 50_000)[:2]
    assert agreement(row, other) == pytest.approx(by_chance(share), abs=0.01)
    assert torch.equal(mask(control, torch.cat([ids_BT, ids_BT[:1]]), 50_000)[2], row)


@pytest.mark.parametrize("share", [0.3, 0.5])
def test_steps_of_training_decide_independently(share):
    control, ids_BT, seen = halting(share), ids(1, 50_000), []
    for draw in (0, 1, 2, 1000):  # 0 is evaluation
        control.draw = draw
        seen.append(mask(control, ids_BT, 50_000))
    for number, one in enumerate(seen):
        for other in seen[number + 1 :]:
            assert agreement(one, other) == pytest.approx(by_chance(share), abs=0.01)


@pytest.fixture(scope="module", params=METHODS, ids=lambda text: text.partition("(")[0])
def model(request) -> AdaptiveLM:
    torch.manual_seed(0)
    return AdaptiveLM(AdaptiveConfig(backbone=BACKBONE, init="scaled", think=request.param))


@torch.no_grad()
def passes(model: AdaptiveLM, ids_BT: Tensor) -> Tensor:
    return model(ids_BT, logits_to_keep=1).passes


def test_measured_passes_are_those_asked_for(model):
    """Of all tokens SHARE take the second pass, and of these SHARE the third one."""
    passes_BT = passes(model.eval(), ids(64, 128))
    assert (passes_BT >= 2).double().mean().item() == pytest.approx(SHARE, rel=0.02)
    assert (passes_BT >= 3).double().mean().item() == pytest.approx(SHARE**2, rel=0.03)
    assert passes_BT.max() == 3


def test_no_row_and_no_step_repeats_another(model):
    one_BT, other_BT = passes(model.eval(), ids(2, 512)) >= 2
    assert agreement(one_BT, other_BT) == pytest.approx(by_chance(SHARE), abs=0.08)
    steps = []
    for step in (0, 1):
        model.train().begin_step(step, seed=0)
        steps.append(passes(model, ids(2, 512)) >= 2)
    assert agreement(*steps) == pytest.approx(by_chance(SHARE), abs=0.08)
    assert torch.equal(passes(model.eval(), ids(2, 512))[0] >= 2, one_BT), "evaluation does not depend on training"
