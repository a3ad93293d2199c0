"""The contract tests of probes: every probe in the index returns plain data about a model and does not change the model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers import halting_reference, saved_models

from pondera.core import spec
from pondera.core.errors import UserError
from pondera.inference.load import Loaded, load
from pondera.methods.probe.base import Probe, observed

PROBES = sorted(spec.index(spec.PROBES))
TEXT = "The quick\x1b[2J brown fox.\n\tIt jumps over naïve 東京 🦊 dogs, lazily."


OF_CONCEPTS = {"Collapse", "Concepts"}
"""Probes of models with codebooks; the others are probes of models with a think method."""
OF_ANY = {"Recovery"}
"""Probes of every model."""


@pytest.fixture(scope="module")
def subjects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Loaded]:
    """A model with a think method, and one with concepts."""
    folder = tmp_path_factory.mktemp("probe")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PONDERA_METHODS", str(halting_reference.write_method(folder / "methods")))
        patch.setitem(saved_models.THINKS, "halting", "Halting()")
        return {name: load(saved_models.save(folder / name, name), "cpu") for name in ("halting", "concept")}


@pytest.fixture
def loaded(subjects: dict[str, Loaded], request: pytest.FixtureRequest) -> Loaded:
    """The model that the probe of the test supports."""
    return subjects["concept" if request.node.callspec.params.get("name") in OF_CONCEPTS else "halting"]


def probe(name: str) -> Probe:
    return spec.build(name, "probe")


def test_there_are_probes():
    assert PROBES and all(isinstance(probe(name), Probe) for name in PROBES)
    assert not set(PROBES) & set(spec.index()), "a probe must not be a method of a run"


@pytest.mark.parametrize("name", PROBES)
def test_what_it_finds_survives_json(name: str, loaded: Loaded):
    found = probe(name).run(loaded.model, loaded.tokenizer, TEXT)
    assert found and json.loads(json.dumps(found, allow_nan=False)) == found
    assert probe(name).run(loaded.model, loaded.tokenizer, TEXT) == found, "a second run must give the same result"


@pytest.mark.parametrize("think", sorted(spec.index(("think",))))
@pytest.mark.parametrize("name", sorted(set(PROBES) - OF_CONCEPTS))
def test_every_method_can_be_looked_at(name: str, think: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(saved_models.THINKS, "it", f"{think}()")
    one = load(saved_models.save(tmp_path / "model", "it"), "cpu")
    assert probe(name).run(one.model, one.tokenizer, TEXT)


@pytest.mark.parametrize("name", PROBES)
@pytest.mark.parametrize("training", [True, False])
def test_it_leaves_the_model_as_it_was(name: str, training: bool, loaded: Loaded):
    model = loaded.model.train(training)
    assert model.method is not None
    before = {key: value.clone() for key, value in model.state_dict().items()}
    random = torch.random.get_rng_state()
    probe(name).run(model, loaded.tokenizer, TEXT)
    assert model.training == training and not model.method.record
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.random.get_rng_state(), random)


@pytest.mark.parametrize("name", PROBES)
def test_its_table_is_rectangular_and_safe_to_print(name: str, loaded: Loaded):
    shown = probe(name).show(probe(name).run(loaded.model, loaded.tokenizer, TEXT))
    assert shown.rows and all(len(row) == len(shown.columns) for row in shown.rows)
    assert all(text.isprintable() for row in shown.rows for text in row) and shown.note.isprintable()


@pytest.mark.parametrize("name", PROBES)
def test_it_refuses_an_empty_text(name: str, loaded: Loaded):
    with pytest.raises(UserError, match="empty"):
        probe(name).run(loaded.model, loaded.tokenizer, "")


@pytest.mark.parametrize("name", sorted(set(PROBES) - OF_ANY))
def test_a_model_without_what_it_looks_for_is_refused(name: str, subjects: dict[str, Loaded]):
    other = subjects["halting" if name in OF_CONCEPTS else "concept"]
    with pytest.raises(UserError, match="give (one|a model)"):
        probe(name).run(other.model, other.tokenizer, TEXT)


@pytest.mark.parametrize("record", [True, False])
def test_observing_restores_what_it_changed_even_on_an_error(record: bool, subjects: dict[str, Loaded]):
    model = subjects["halting"].model.train()
    assert model.think is not None
    model.think.record = record
    with pytest.raises(ZeroDivisionError), observed(model, record=not record):
        assert not model.training and model.think.record != record and not torch.is_grad_enabled()
        raise ZeroDivisionError
    assert model.training and model.think.record == record and torch.is_grad_enabled()
    model.think.record = False
