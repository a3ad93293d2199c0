"""Losses and statistics against loops written out, and two processes against one.

As a script: one process of several, ``test_update.py FOLDER RANK NUMBER``.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pondera.methods.quantize.common import update
from pondera.methods.quantize.common.update import Statistics, losses
from pondera.methods.quantize.vq import VQ


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def vectors(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=draws(seed))


class TestLosses:
    def test_they_are_means_over_elements(self):
        x, q = vectors(2, 3, 4), vectors(2, 3, 4, seed=1)
        terms = losses(x, q, commitment=0.5)
        for term in terms.values():
            torch.testing.assert_close(term.mean(), F.mse_loss(x, q))
            assert term.count == 24
        assert {name: term.weight for name, term in terms.items()} == {"codebook": 1.0, "commitment": 0.5}

    def test_parts_add_up_to_the_whole(self):
        x, q = vectors(7, 4), vectors(7, 4, seed=1)
        whole, first, second = losses(x, q), losses(x[:2], q[:2]), losses(x[2:], q[2:])
        for name in whole:
            torch.testing.assert_close(first[name].sum + second[name].sum, whole[name].sum)
            assert first[name].count + second[name].count == whole[name].count

    @pytest.mark.parametrize("detach_target", [True, False])
    @pytest.mark.parametrize("detach_input", [True, False])
    def test_which_side_moves(self, detach_input: bool, detach_target: bool):
        x, q = vectors(5, 4).requires_grad_(), vectors(5, 4, seed=1).requires_grad_()
        terms = losses(x, q, detach_input=detach_input, detach_target=detach_target)
        towards = 2 * (q - x).detach()
        expected = {
            "codebook": (0 if detach_input or detach_target else -1, 1),
            "commitment": (0 if detach_input else -1, 0 if detach_target else 1),
        }
        for name, signs in expected.items():
            term = terms[name].sum
            assert term.requires_grad == any(signs)
            found = torch.autograd.grad(term, (x, q), allow_unused=True) if any(signs) else (None, None)
            for gradient, sign in zip(found, signs, strict=True):
                torch.testing.assert_close(torch.zeros(5, 4) if gradient is None else gradient, sign * towards)


class TestEma:
    @pytest.mark.parametrize("smoothing", [update.SMOOTHING, 0.5])
    def test_it_is_the_rule_written_out(self, smoothing: float, monkeypatch):
        monkeypatch.setattr(update, "SMOOTHING", smoothing)
        K, C, decay = 3, 2, 0.8
        rows = vectors(K, C)
        statistics = Statistics(rows, decay, ema=True, respawn=0)
        hits, sums = [1.0] * K, [row.double() for row in rows]
        moved = rows.clone()
        for step in range(5):
            x, codes = vectors(9, C, seed=step), torch.randint(K - 1, (9,), generator=draws(step))  # one is never hit
            for piece in (slice(0, 4), slice(4, 9)):  # micro-batches
                statistics.gather(x[piece], codes[piece], draws())
            statistics.settle(moved)
            for k in range(K):
                own = x[codes == k].double()
                hits[k] = decay * hits[k] + (1 - decay) * len(own)
                sums[k] = decay * sums[k] + (1 - decay) * own.sum(0)
            mass = sum(hits)
            expected = [sums[k] / ((hits[k] + smoothing) / (mass + K * smoothing) * mass) for k in range(K)]
            torch.testing.assert_close(moved, torch.stack(expected).float())
            torch.testing.assert_close(statistics.hits_K, torch.tensor(hits))

    def test_a_step_without_vectors_is_none(self):
        statistics = Statistics(vectors(3, 2), 0.5, ema=True, respawn=0.5)
        rows, before = vectors(3, 2), {name: value.clone() for name, value in statistics.state_dict().items()}
        statistics.gather(torch.zeros(0, 2), torch.zeros(0, dtype=torch.long), draws())
        statistics.settle(rows)
        assert torch.equal(rows, vectors(3, 2))
        assert all(torch.equal(before[name], value) for name, value in statistics.state_dict().items())

    def test_averages_stay_in_float32(self):
        rows = vectors(3, 2)
        statistics = Statistics(rows, 0.99, ema=True, respawn=0.1).to(torch.bfloat16)
        assert {value.dtype for value in statistics.buffers() if value.is_floating_point()} == {torch.float32}
        assert torch.equal(statistics.sums_KC, rows)
        assert statistics.to("meta").hits_K.device.type == "meta"


class TestRespawn:
    def settled(self, respawn: float, ema: bool, vectors_of_step: Tensor) -> tuple[Statistics, Tensor]:
        """Four codes, of which the third and fourth get no hits."""
        rows = torch.tensor([[0.0, 0.0], [1.0, 1.0], [50.0, 50.0], [60.0, 60.0]])
        statistics = Statistics(rows, 0.5, ema, respawn)
        codes = torch.arange(len(vectors_of_step)) % 2
        statistics.gather(vectors_of_step, codes, draws())
        statistics.settle(rows)
        return statistics, rows

    @pytest.mark.parametrize("ema", [False, True])
    def test_dead_rows_become_vectors_of_the_step(self, ema: bool):
        x = vectors(8, 2)
        statistics, rows = self.settled(0.6, ema, x)
        found = [(x == row).all(-1).nonzero().flatten().tolist() for row in rows[2:]]
        assert all(len(places) == 1 for places in found) and found[0] != found[1]
        assert torch.equal(rows[:2], self.settled(0.0, ema, x)[1][:2])
        assert statistics.hits_K[2:].tolist() == [2.0, 2.0]  # eight vectors over four codes
        if ema:
            torch.testing.assert_close(statistics.sums_KC[2:], 2 * rows[2:])

    def test_a_code_dies_under_the_threshold_only(self):
        rows = self.settled(0.5, False, vectors(8, 2))[1]  # unhit codes are at 0.5 now
        assert torch.equal(rows[2:], torch.tensor([[50.0, 50.0], [60.0, 60.0]]))

    def test_more_dead_than_vectors(self):
        x = vectors(1, 2)  # so that the second code is not hit either
        rows = self.settled(0.6, False, x)[1]
        assert torch.equal(rows[1], x[0]) and rows[2:].tolist() == [[50.0, 50.0], [60.0, 60.0]]

    def test_a_masked_batch_leaves_what_the_one_before_brought(self):
        rows = torch.tensor([[0.0], [50.0]])
        statistics = Statistics(rows, 0.5, False, 0.6)
        statistics.gather(torch.tensor([[3.0]]), torch.tensor([0]), draws())
        statistics.gather(torch.zeros(0, 1), torch.zeros(0, dtype=torch.long), draws())
        statistics.settle(rows)
        assert rows.tolist() == [[0.0], [3.0]]


# Several processes


def fit(share: slice, respawn: float) -> dict[str, Tensor]:
    """Five steps on this part of every batch: two of warm-up, then k-means, averages and respawn."""
    torch.manual_seed(0)
    quantizer = VQ(6, update="ema", init="kmeans", start_step=2, respawn=respawn, decay=0.5).build(3).train()
    for step in range(5):
        quantizer.begin_step(step, seed=1)
        x = vectors(24, 3, seed=step)
        x = 100 + 1e-3 * x if step == 4 else x  # far off and all alike, so that codes die
        quantizer(x[share])
    quantizer.begin_step(5, seed=1)
    return quantizer.state_dict()


def test_two_processes_are_as_one(tmp_path: Path):
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[3] / "src"),
        "OMP_NUM_THREADS": "1",
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
    }
    command = [sys.executable, __file__, str(tmp_path)]
    running = [subprocess.Popen([*command, str(rank)], env=environment) for rank in range(2)]
    assert [process.wait(timeout=120) for process in running] == [0, 0]
    for respawn in (0.0, 3.0):
        first, second = (torch.load(tmp_path / f"{rank}-{respawn}.pt", weights_only=True) for rank in range(2))
        assert all(torch.equal(first[name], second[name]) for name in first), "replicas agree to the bit"
        if respawn:  # which vectors are drawn depends on who has them, but not what they are
            last = 100 + 1e-3 * vectors(24, 3, seed=4)
            born = [(row == last).all(-1).any() for row in first["rows_KC"]]
            assert 0 < sum(map(bool, born)) < 6
        else:
            alone = fit(slice(0, 24), respawn)
            for name in first:
                torch.testing.assert_close(first[name], alone[name], msg=name)


if __name__ == "__main__":
    folder, rank = Path(sys.argv[1]), int(sys.argv[2])
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    for respawn in (0.0, 3.0):
        torch.save(fit(slice(0, 7) if rank == 0 else slice(7, 24), respawn), folder / f"{rank}-{respawn}.pt")
    torch.distributed.destroy_process_group()
