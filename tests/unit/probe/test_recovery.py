"""Recovery: the readers are exact posteriors, and their limits are known."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from helpers import saved_models
from torch.distributions import Normal

from pondera.core.errors import UserError
from pondera.inference.load import Loaded, load
from pondera.methods.probe import recovery
from pondera.methods.probe.recovery import READERS, Recovery

TEXT = "The quick brown fox jumps over the lazy dog, and nobody knows why. " * 30


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    return load(saved_models.save(tmp_path_factory.mktemp("model")), "cpu")


def test_evidence_is_the_gaussian_likelihood():
    torch.manual_seed(0)
    table_VD, ids_T, noise_TD = torch.randn(11, 5).double(), torch.tensor([3, 3, 10]), torch.randn(3, 5).double()
    levels = [-4.0, 0.0, 3.0]
    for level, evidence_TV in zip(levels, recovery._evidence(table_VD, ids_T, noise_TD, levels), strict=True):
        a, s = torch.tensor(level).double().sigmoid().sqrt(), torch.tensor(-level).double().sigmoid().sqrt()
        state_T1D = (a * table_VD[ids_T] + s * noise_TD)[:, None]
        right_TV = Normal(a * table_VD, s).log_prob(state_T1D).sum(-1)
        assert torch.allclose(evidence_TV.log_softmax(-1), right_TV.log_softmax(-1), atol=1e-6)


def test_the_context_reader_is_the_posterior_by_enumeration(loaded: Loaded):
    """Of two tokens: p(w_2 | x_2, w_1) from the joint of all pairs."""
    model, size = loaded.model, loaded.model.embedded
    ids_T = torch.tensor([40, 77])
    table_VD = model.get_input_embeddings().weight.detach()
    noise_TD = torch.randn(2, table_VD.shape[1], generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        context_TV = recovery._context(model, 0, ids_T, size)
        first_V = model(torch.tensor([[0]])).logits[0, -1].log_softmax(-1)
        pairs = torch.stack([torch.zeros(size, dtype=torch.long), torch.arange(size)], dim=1)
        second_VV = model(pairs).logits[:, -1].log_softmax(-1)
    joint_VV = first_V[:, None] + second_VV
    [evidence_TV] = recovery._evidence(table_VD, ids_T, noise_TD, [-1.0])
    posterior_V = (joint_VV + evidence_TV[1])[ids_T[0]].log_softmax(-1)
    assert torch.allclose((evidence_TV + context_TV)[1].log_softmax(-1), posterior_V, atol=1e-4)


def test_without_signal_each_reader_knows_what_it_knew_before_and_without_noise_everything(loaded: Loaded):
    probe = Recovery(windows=6, window=20, points=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recovery, "LOWEST", -60.0)
        patch.setattr(recovery, "HIGHEST", 60.0)
        found = probe.run(loaded.model, loaded.tokenizer, TEXT)
    none, _, all_ = found["levels"]
    assert none["nats"]["nearest"] == pytest.approx(math.log(loaded.model.embedded), abs=1e-4)
    assert none["nats"]["pointwise"] == pytest.approx(found["prior_nats"], abs=1e-4)
    assert none["nats"]["context"] == pytest.approx(found["model_nats"], abs=1e-4)
    for name in READERS:
        assert all_["accuracy"][name] == all_["whole"][name] == 1 and all_["nats"][name] == pytest.approx(0, abs=1e-6)


def test_frequencies_help_and_the_noise_window_lies_inside(loaded: Loaded):
    found = Recovery(points=41).run(loaded.model, loaded.tokenizer, TEXT)
    nats = {name: [level["nats"][name] for level in found["levels"]] for name in READERS}
    assert all(one <= other + 1e-9 for one, other in zip(nats["pointwise"], nats["nearest"], strict=True))
    assert all(later <= before + 0.05 for before, later in zip(nats["pointwise"], nats["pointwise"][1:], strict=False))
    low, high = found["noise_window"]
    assert found["levels"][0]["log_snr"] <= low < high <= found["levels"][-1]["log_snr"]
    at_low = min(found["levels"], key=lambda level: abs(level["log_snr"] - low))
    assert at_low["nats"]["pointwise"] == pytest.approx(0.95 * found["prior_nats"], rel=0.05)
    shown = Recovery(points=41).show(found)
    assert len(shown.rows) == 41 and f"noise window: logSNR {low:+.2f} to {high:+.2f}" in shown.note
    assert len(shown.plots[0].lines) == 3


def test_windows_spread_over_the_text_and_do_not_overlap(loaded: Loaded):
    windows, rest = Recovery(windows=5, window=16)._windows(loaded.model, loaded.tokenizer, TEXT)
    ids = loaded.tokenizer(TEXT).input_ids
    assert [len(window) for window in windows] == [16] * 5 and len(rest) == len(ids) - 80
    assert windows[0] == ids[:16] and windows[-1] == ids[-16:]
    short, rest = Recovery()._windows(loaded.model, loaded.tokenizer, "The fox")
    assert len(short) == 1 and not rest


def test_the_seed_decides_the_noise(loaded: Loaded):
    one, same, other = (
        Recovery(windows=2, points=3, seed=seed).run(loaded.model, loaded.tokenizer, TEXT) for seed in (0, 0, 1)
    )
    assert one == same != other


def test_what_cannot_be_read_is_refused(loaded: Loaded, tmp_path: Path):
    for arguments in ({"windows": 0}, {"window": 0}, {"points": 1}):
        with pytest.raises(UserError, match="or more"):
            Recovery(**arguments)
    with pytest.raises(UserError, match="is empty or has one token"):
        Recovery().run(loaded.model, loaded.tokenizer, "")
    broken = load(saved_models.save(tmp_path), "cpu")
    broken.model.get_input_embeddings().weight.data[5] = math.nan
    with pytest.raises(UserError, match="NaN or infinite"):
        Recovery().run(broken.model, broken.tokenizer, TEXT)
