"""Objectives with α: plain forms at ½, telescoping, and agreement with torchgfn. Exact optima are in tests/unit/flows."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pondera.core import spec
from pondera.core.errors import UserError
from pondera.methods.objective.base import FlowBatch
from pondera.methods.objective.common.offset import log_odds
from pondera.methods.objective.common.schedule import remaining_share
from pondera.methods.objective.common.stop_form import stop_flows
from pondera.methods.objective.db import DB, detailed_balance
from pondera.methods.objective.fl_db import FLDB, forward_looking_balance
from pondera.methods.objective.fm import FM, flow_matching
from pondera.methods.objective.sub_tb import SubTB, sub_trajectory_balance
from pondera.methods.objective.tb import TB, trajectory_balance

LENGTHS = [4, 1, 3]


def numbers(seed: int = 0, lengths: list[int] = LENGTHS) -> dict[str, Tensor]:
    """A batch of random numbers; what lies after the end of a trajectory is NaN or infinite and must not be read."""
    generator = torch.Generator().manual_seed(seed)
    count, steps = len(lengths), max(lengths)
    mask = torch.arange(steps) < torch.tensor(lengths)[:, None]

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    after = torch.arange(steps + 1) >= torch.tensor(lengths)[:, None]
    return {
        "log_pf": (-drawn(count, steps).abs()).masked_fill(~mask, -math.inf).requires_grad_(),
        "log_pb": (-drawn(count, steps).abs()).masked_fill(~mask, -math.inf).requires_grad_(),
        "log_F": drawn(count, steps + 1).masked_fill(after, math.nan).requires_grad_(),
        "log_partial": drawn(count, steps + 1),
        "log_R": drawn(count),
        "mask": mask,
    }


def batch(given: dict[str, Tensor]) -> FlowBatch:
    return FlowBatch(given["mask"], *(given[name] for name in ("log_R", "log_pf", "log_pb", "log_F", "log_partial")))


def plain(name: str, given: dict[str, Tensor]) -> Tensor:
    """The ordinary losses, without any α."""
    mask = given["mask"]
    pf, pb = (given[key].masked_fill(~mask, 0.0) for key in ("log_pf", "log_pb"))
    ended = torch.arange(mask.shape[1] + 1) >= mask.sum(1, keepdim=True)
    flow = torch.where(ended, given["log_R"][:, None], given["log_F"])
    if name == "TB":
        return (given["log_F"][:, 0] + pf.sum(1) - given["log_R"] - pb.sum(1)).pow(2).mean()
    if name == "DB":
        return (flow[:, :-1] + pf - flow[:, 1:] - pb).masked_fill(~mask, 0.0).pow(2).sum() / mask.sum()
    if name == "FLDB":
        rest = given["log_F"].masked_fill(ended, 0.0)
        partial = torch.where(ended, given["log_R"][:, None], given["log_partial"])
        score = rest[:, :-1] + pf - rest[:, 1:] - pb - (partial[:, 1:] - partial[:, :-1])
        return score.masked_fill(~mask, 0.0).pow(2).sum() / mask.sum()
    assert name == "SubTB"
    level = flow - torch.nn.functional.pad((pf - pb).cumsum(1), (1, 0))
    states = torch.arange(mask.shape[1] + 1)
    there = states <= mask.sum(1, keepdim=True)
    pairs = (states[:, None] < states) & there[:, :, None] & there[:, None, :]
    weight = torch.exp((states - states[:, None]).clamp_min(0).double() * math.log(0.99)) * pairs
    score = (level[:, :, None] - level[:, None, :]).masked_fill(~pairs, 0.0)
    return ((weight * score.pow(2)).sum((1, 2)) / weight.sum((1, 2))).sum() / len(mask)


@pytest.mark.parametrize("name", ["TB", "DB", "FLDB", "SubTB"])
@pytest.mark.parametrize("lengths", [LENGTHS, [1]])
def test_alpha_one_half_is_the_plain_loss_bit_for_bit_with_its_gradients(name: str, lengths: list[int]):
    ours, reference = numbers(1, lengths), numbers(1, lengths)
    loss = spec.build(f"{name}()", "objective").loss(batch(ours), 0.5)
    expected = plain(name, reference)
    assert torch.equal(loss, expected)
    loss.backward()
    expected.backward()
    for key in ("log_pf", "log_pb", "log_F"):
        assert (
            ours[key].grad is None and reference[key].grad is None or torch.equal(ours[key].grad, reference[key].grad)
        )
        assert ours[key].grad is None or torch.isfinite(ours[key].grad).all()


def test_flow_matching_at_one_half_is_the_plain_loss_bit_for_bit():
    log_in, log_out = (torch.randn(5, 3, dtype=torch.float64).requires_grad_() for _ in range(2))
    log_in.data[0, 1:] = -math.inf
    ours = flow_matching(log_in, log_out, 0.5).pow(2).mean()
    expected = (log_in.logsumexp(-1) - log_out.logsumexp(-1)).pow(2).mean()
    assert torch.equal(ours, expected)
    assert torch.equal(torch.autograd.grad(ours, log_in)[0], torch.autograd.grad(expected, log_in)[0])


@pytest.mark.parametrize("lam", [0.5, 1.0, 1.9])
def test_sub_trajectories_equal_loops_over_all_pairs(lam: float):
    given, alpha = {key: value.detach() for key, value in numbers(2).items()}, 0.7
    flow, total = given["log_F"].clone(), 0.0
    for row, length in enumerate(LENGTHS):
        flow[row, length] = given["log_R"][row]
        top = bottom = 0.0
        for i in range(length):
            for j in range(i + 1, length + 1):
                steps = given["log_pf"][row, i:j].sum() - given["log_pb"][row, i:j].sum() + (j - i) * log_odds(alpha)
                top += lam ** (j - i) * float(flow[row, i] + steps - flow[row, j]) ** 2
                bottom += lam ** (j - i)
        total += top / bottom / len(LENGTHS)
    assert SubTB(lam=lam).loss(batch(given), alpha).item() == pytest.approx(total, rel=1e-12)


def test_a_large_lambda_on_a_long_trajectory_does_not_overflow():
    given = numbers(3, [400])
    loss = SubTB(lam=1e3).loss(batch(given), 0.6)
    assert torch.isfinite(loss) and loss.item() == pytest.approx(TB().loss(batch(given), 0.6).item(), rel=0.05)


@pytest.mark.parametrize("exit_edge", [False, True])
def test_residuals_of_detailed_balance_add_up_to_those_of_parts_and_of_the_trajectory(exit_edge: bool):
    given, alpha = numbers(4), 0.8
    args = [given[name] for name in ("log_pf", "log_pb", "log_F", "log_R", "mask")]
    single = detailed_balance(*args, alpha, exit_edge)
    parts, pairs = sub_trajectory_balance(*args, alpha, exit_edge)
    whole = trajectory_balance(args[0], args[1], given["log_F"][:, 0], args[3], args[4], alpha, exit_edge)
    for row, length in enumerate(LENGTHS):
        assert pairs[row].sum() == length * (length + 1) // 2
        for i in range(length):
            for j in range(i + 1, length + 1):
                torch.testing.assert_close(parts[row, i, j], single[row, i:j].sum(), rtol=0, atol=1e-12)
        torch.testing.assert_close(single[row].sum(), whole[row], rtol=0, atol=1e-12)
    assert not parts[~pairs].any() and not single[~given["mask"]].any()


def test_only_chosen_states_end_parts():
    given = numbers(5)
    ends = torch.zeros(3, 5, dtype=torch.bool)
    ends[:, 0] = ends[0, 2] = ends[0, 4] = ends[1, 1] = ends[2, 4] = True  # the last one lies after the end
    args = [given[name] for name in ("log_pf", "log_pb", "log_F", "log_R", "mask")]
    every, _ = sub_trajectory_balance(*args, 0.7)
    some, pairs = sub_trajectory_balance(*args, 0.7, ends_BS=ends)
    assert pairs.nonzero().tolist() == [[0, 0, 2], [0, 0, 4], [0, 2, 4], [1, 0, 1]]
    assert torch.equal(some[pairs], every[pairs])


def test_forward_looking_is_detailed_balance_of_the_whole_flow():
    given = numbers(6)
    args = [given[name] for name in ("log_pf", "log_pb")]
    looking = forward_looking_balance(*args, given["log_F"], given["log_partial"], given["log_R"], given["mask"], 0.7)
    whole = detailed_balance(*args, given["log_F"] + given["log_partial"], given["log_R"], given["mask"], 0.7)
    torch.testing.assert_close(looking, whole, rtol=0, atol=1e-12)


def grid_numbers() -> tuple[dict[str, Tensor], list[Tensor]]:
    """Walks on a grid of 3 × 3 with tables in place of networks, as in the command below."""
    tables = [
        (0.5 * torch.sin(torch.arange(9 * columns).double() * 1.7 + shift)).view(9, columns).requires_grad_()
        for columns, shift in ((3, 0.1), (2, 0.2), (1, 0.3))
    ]
    walks = [[1, 2], [1, 0, 1, 0, 2], [1, 2], [1, 2], [2], [1, 2], [1, 2], [1, 2]]
    steps = max(map(len, walks))
    log_pf, log_pb = torch.zeros(8, steps, dtype=torch.float64), torch.zeros(8, steps, dtype=torch.float64)
    log_F, log_R = torch.zeros(8, steps + 1, dtype=torch.float64), torch.zeros(8, dtype=torch.float64)
    for row, walk in enumerate(walks):
        place = [0, 0]
        for column, action in enumerate(walk):
            index = place[0] * 3 + place[1]
            log_F[row, column] = tables[2][index, 0]
            allowed = torch.tensor([place[0] < 2, place[1] < 2, True])
            log_pf[row, column] = tables[0][index].masked_fill(~allowed, -math.inf).log_softmax(0)[action]
            if action == 2:
                log_R[row] = math.log(0.1 + 0.5 * (place[0] != 1 and place[1] != 1))
                continue
            place[action] += 1
            back = torch.tensor([place[0] > 0, place[1] > 0])
            after = tables[1][place[0] * 3 + place[1]]
            log_pb[row, column] = after.masked_fill(~back, -math.inf).log_softmax(0)[action]
    mask = torch.arange(steps) < torch.tensor([len(walk) for walk in walks])[:, None]
    return {"log_pf": log_pf, "log_pb": log_pb, "log_F": log_F, "log_R": log_R, "mask": mask}, tables


# From torchgfn 2.4.1 in float64: HyperGrid(ndim=2, height=3, validate_modes=False), DiscretePolicyEstimator and
# ScalarEstimator on modules that look up `tables` by 3x + y, 8 trajectories of Sampler(pf) after torch.manual_seed(5), and
# `flow.loss(env, flow.to_training_samples(trajectories))` of TBGFlowNet(pf, pb, init_logZ=0.4), DBGFlowNet(pf, pb, logF) and
# SubTBGFlowNet(pf, pb, logF, weighting="geometric_within", lamda=0.8). Gradients: the sum of those of each table, times
# cos(0, 1, ...).
TORCHGFN = {
    "TB": (1.325630858812887, [1.4941811617008587, 0.19027515451076218, 0.0]),
    "DB": (1.8308209096740176, [0.831245600603935, 0.05553880491420866, 0.1173362226408865]),
    "SubTB": (1.776268302375837, [1.089933567320667, 0.10876299146334292, 0.24113201962002152]),
}
LOG_Z_GRADIENT = 1.006130373276398


@pytest.mark.parametrize("name", TORCHGFN)
def test_values_and_gradients_agree_with_torchgfn(name: str):
    given, tables = grid_numbers()
    log_z = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    if name == "TB":
        given["log_F"] = log_z.expand(given["log_F"].shape)
    objective = SubTB(lam=0.8) if name == "SubTB" else spec.build(f"{name}()", "objective")
    found = batch(given | {"log_partial": given["log_F"]})
    loss = objective.loss(found, 0.5)
    loss.backward()
    value, gradients = TORCHGFN[name]
    assert loss.item() == pytest.approx(value, rel=1e-12)
    for table, expected in zip(tables, gradients, strict=True):
        weights = torch.cos(torch.arange(table.numel()).double())
        gradient = 0.0 if table.grad is None else float((table.grad.flatten() * weights).sum())
        assert gradient == pytest.approx(expected, rel=1e-10, abs=1e-12)
    if name == "TB":
        assert log_z.grad is not None and log_z.grad.item() == pytest.approx(LOG_Z_GRADIENT, rel=1e-12)


def test_alpha_tb_and_tb_with_a_higher_log_z_take_the_same_steps():
    """One length n: 100 Adam steps from log Z = 0 with α, and from n · log c without, give the same weights."""
    steps, alpha = 5, 0.9
    ended: list[Tensor] = []
    for offset, weight in ((0.0, alpha), (steps * log_odds(alpha), 0.5)):
        generator = torch.Generator().manual_seed(0)
        logits = torch.zeros(7, steps, 3, dtype=torch.float64).requires_grad_()
        log_z = torch.zeros((), dtype=torch.float64).requires_grad_()
        optimizer = torch.optim.Adam([{"params": [logits], "lr": 1e-2}, {"params": [log_z], "lr": 0.1}])
        log_R = torch.randn(7, generator=generator, dtype=torch.float64)
        log_pb = -torch.rand(7, steps, generator=generator, dtype=torch.float64)
        for _ in range(100):
            log_pf = logits.log_softmax(-1)[..., 0]
            mask = torch.ones(7, steps, dtype=torch.bool)
            loss = trajectory_balance(log_pf, log_pb, log_z + offset, log_R, mask, weight).pow(2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        ended.append(torch.cat([logits.detach().flatten(), log_z.detach()[None]]))
    torch.testing.assert_close(*ended, rtol=0, atol=1e-12)


def test_schedules_hold_decay_and_land():
    for form, hold in (("exp", 0.9), ("exp", 0.8), ("exact", 0.9), ("exact", 0.0)):
        shares = [remaining_share(step, 1000, form, hold) for step in range(1001)]
        assert shares[0] == shares[int(1000 * hold)] == 1.0
        assert all(after <= before for before, after in zip(shares, shares[1:], strict=False))
        assert shares[-1] == (0.0 if form == "exact" else pytest.approx(math.exp(-4)))
    assert TB(alpha=0.7, anneal="exp").alpha_at(1000, 1000) == pytest.approx(
        0.5037, abs=5e-5
    )  # a stored value of the authors
    exact = TB(alpha=0.9, anneal="exact", hold=0.5)
    assert exact.alpha_at(0, 100) == exact.alpha_at(50, 100) == 0.9
    assert all(
        exact.alpha_at(step, 100) == 0.5 and log_odds(exact.alpha_at(step, 100)) == 0.0 for step in range(90, 100)
    )
    assert all(TB(alpha=0.9, anneal="exact").alpha_at(steps - 1, steps) == 0.5 for steps in (1, 2, 7, 800))
    assert {DB(alpha=0.3).alpha_at(step, 10) for step in range(10)} == {0.3}


@pytest.mark.parametrize("alpha", [0.0, 1.0, -0.1, 1.5, math.nan, math.inf])
@pytest.mark.parametrize("name", ["TB", "DB", "FLDB", "SubTB", "FM"])
def test_alpha_is_between_zero_and_one(name: str, alpha: float):
    with pytest.raises(UserError, match=r"alpha=.*: give a number between 0 and 1"):
        {"TB": TB, "DB": DB, "FLDB": FLDB, "SubTB": SubTB, "FM": FM}[name](alpha=alpha)
    with pytest.raises(UserError, match="between 0 and 1"):
        flow_matching(torch.zeros(1, 1), torch.zeros(1, 1), alpha)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["TB", "DB", "FLDB", "SubTB"])
def test_a_reward_that_is_not_finite_is_refused_with_its_place(name: str, value: float):
    given = numbers(7)
    given["log_R"][1] = value
    with pytest.raises(UserError, match=r"log_R: object 1 has the log reward"):
        spec.build(f"{name}()", "objective").loss(batch(given), 0.5)
    with pytest.raises(UserError, match=r"log_R: object 1, 0 has"):
        stop_flows(torch.tensor([[0.0], [value]]), torch.zeros(2, 1))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("TB(anneal='cosine')", "unknown anneal 'cosine'"),
        ("TB(hold=1.0)", "hold=1.0: give the share"),
        ("TB(compensate=True)", "compensate: α does not move"),
        ("SubTB(lam=0.0)", "lam=0.0: give a number above 0"),
        ("TD()", "unknown objective method 'TD'"),
        ("FM(compensate=True)", "unknown argument of FM 'compensate'"),
    ],
)
def test_wrong_settings_are_refused(text: str, message: str):
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        spec.build(text, "objective")


def test_a_batch_without_what_an_objective_needs_is_refused():
    given = numbers(8)
    with pytest.raises(UserError, match="needs log_partial"):
        FLDB().loss(FlowBatch(given["mask"], given["log_R"], given["log_pf"], given["log_pb"], given["log_F"]), 0.5)
    with pytest.raises(UserError, match="needs log_in"):
        FM().loss(batch(given), 0.5)
