"""The shipped recipes, how one builds on another, and that the packaging agrees with the code."""

import dataclasses
import re
import tomllib
from pathlib import Path

import pytest

from pondera.core import run_config, spec
from pondera.core.errors import UserError

ROOT = Path(__file__).parents[2]


def error(call, *args) -> str:
    with pytest.raises(UserError) as caught:
        call(*args)
    return str(caught.value)


@pytest.mark.parametrize("name", run_config.recipe_names())
def test_every_recipe_loads(name):
    config = run_config.load(name)
    assert config.name == name and config.about.endswith(".")
    assert config.backbone["model_type"] in ("llama", "gpt_neox") and config.init == (
        "hf" if name.endswith("-stock") else "scaled"
    )
    if config.think:
        spec.find(spec.parse(config.think).name, "think")
    text = (run_config.RECIPES / f"{name}.yaml").read_text()
    assert text.startswith("# pondera ") and all(len(line) <= 120 for line in text.splitlines())


def test_arms_differ_only_in_what_they_are_about():
    plain = run_config.load("plain")
    for name in ("doubledepth", "ponderlm2", "adaptivelatentcot", "pausetoken"):
        config = run_config.load(name)
        assert (config.data, config.train, config.init) == (plain.data, plain.train, plain.init)
        changed = {key for key in plain.backbone if plain.backbone[key] != config.backbone[key]}
        assert changed == ({"num_hidden_layers"} if name == "doubledepth" else set())
    assert run_config.load("doubledepth").backbone["num_hidden_layers"] == 2 * plain.backbone["num_hidden_layers"]
    deep, stock = run_config.load("doubledepth"), run_config.load("doubledepth-stock")
    assert (stock.data, stock.backbone, stock.think) == (deep.data, deep.backbone, None)
    assert stock.init == "hf" and stock.train == dataclasses.replace(deep.train, weight_decay=0.01)
    train = run_config.load("ponderlm2-paper").train
    tokens = train.steps * train.batch_size * run_config.load("ponderlm2-paper").data.context
    assert round(tokens / 1e9, 1) == 26.2


# base


@pytest.fixture
def write(tmp_path):
    def write(name, text):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write


def test_a_base_is_merged_key_by_key(write):
    write("low.yaml", "base: plain\nname: low\nabout: Low.\ntrain: {lr: 1, steps: 7}\nbackbone: {hidden_size: 64}\n")
    config = run_config.load(write("top.yaml", "base: low.yaml\ntrain: {lr: 2}\ndata:\nthink: none\n"))
    plain = run_config.load("plain")
    assert (config.train.lr, config.train.steps) == (2, 7)
    assert config.backbone == {**plain.backbone, "hidden_size": 64}
    assert config.data == plain.data, "an empty group changes nothing"
    assert (config.name, config.about) == ("top", ""), "a name is each file's own"
    assert run_config.load(write("thinks.yaml", "base: ponderlm2\nthink: none\n")).think is None


def test_a_base_is_seen_from_its_file(write, tmp_path, monkeypatch):
    write("low.yaml", "train: {steps: 7}")
    write("sub/top.yaml", "base: ../low.yaml")
    monkeypatch.chdir("/")
    assert run_config.load(tmp_path / "sub" / "top.yaml").train.steps == 7


def test_another_architecture_starts_afresh(write):
    config = run_config.load(write("a.yaml", "base: plain\nbackbone: {model_type: gpt2, n_embd: 64}\n"))
    assert config.backbone == {"model_type": "gpt2", "n_embd": 64}
    assert run_config.load(write("b.yaml", "base: plain\nbackbone: some/folder\n")).backbone == "some/folder"


def test_bases_that_cannot_be(write):
    file = write("a.yaml", "base: plian")
    assert error(run_config.load, file).startswith(f"{file}: base: unknown recipe 'plian'; did you mean 'plain'?")
    assert "base: no such file: 'gone.yaml'" in error(run_config.load, write("b.yaml", "base: gone.yaml"))
    assert "base: give the name of a recipe or file, not ['plain']" in error(
        run_config.load, write("c.yaml", "base: [plain]")
    )
    file = write("self.yaml", "base: self.yaml")
    assert "the files extend each other in a circle (self.yaml -> self.yaml)" in error(run_config.load, file)
    write("one.yaml", "base: two.yaml")
    assert "(one.yaml -> two.yaml -> one.yaml)" in error(
        run_config.load, write("two.yaml", "base: one.yaml").with_name("one.yaml")
    )
    write("bad.yaml", "- list")
    assert "bad.yaml: expected a mapping" in error(run_config.load, write("on_bad.yaml", "base: bad.yaml"))


# Packaging


def test_dependencies_agree():
    from pondera.comparison.doctor import KNOWN_GOOD

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for package, good in KNOWN_GOOD.items():
        assert package + good in project["dependencies"]
    pinned = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")
    )
    pinned = {name.lower().replace("_", "-"): version for name, version in pinned.items()}
    extras = [line for lines in project["optional-dependencies"].values() for line in lines]
    for line in project["dependencies"] + extras:
        name = re.split(r"[\[<>=]", line)[0].lower().replace("_", "-")
        assert name == "pondera" or name in pinned, f"{name} has no pin in constraints.txt"
    assert pinned["torch"] == "2.13.0"
    assert "Apache License" in (ROOT / "LICENSE").read_text()
