import dataclasses

import pytest

from pondera.core import run_config
from pondera.core.errors import UserError
from pondera.core.run_config import RunConfig


@pytest.fixture
def recipes(tmp_path, monkeypatch):
    """A folder of recipes with one, ``tiny``; returns the folder."""
    monkeypatch.setattr(run_config, "RECIPES", tmp_path)
    (tmp_path / "tiny.yaml").write_text("backbone: {model_type: llama}\nthink: PonderLM2(thoughts=1)\ntrain:\n")
    return tmp_path


def error(call, *args) -> str:
    with pytest.raises(UserError) as caught:
        call(*args)
    return str(caught.value)


# Reading


def test_defaults_and_round_trip():
    config = run_config.from_dict({})
    assert config == RunConfig()
    config = run_config.from_dict({"name": "a", "backbone": {"model_type": "llama"}, "train": {"steps": 3}})
    assert config.train.steps == 3 and config.data == RunConfig().data
    assert run_config.from_dict(config.to_dict()) == config


def test_load_a_recipe_or_a_file(recipes, tmp_path):
    assert run_config.recipe_names() == ["tiny"]
    config = run_config.load("tiny")
    assert (config.name, config.think, config.train) == ("tiny", "PonderLM2(thoughts=1)", RunConfig().train)
    mine = tmp_path / "deep" / "mine.yml"
    mine.parent.mkdir()
    mine.write_text("name: other\ntrain: {lr: 1e-3, steps: 1e3, micro_batch_size: none}\ndata: {text: no}\n")
    config = run_config.load(mine)
    assert (config.name, config.train.lr, config.train.steps) == ("other", 1e-3, 1000)
    assert type(config.train.steps) is int
    assert config.train.micro_batch_size is None
    assert config.data.text == "no", "a word, not a truth value"
    assert run_config.load(str(mine)) == config


def test_merge_keys_and_anchors_work(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("data: &d {context: 8}\nbackbone: {<<: *d, x: 1}\n")
    assert run_config.read(file)["backbone"] == {"context": 8, "x": 1}


def test_missing_sources(recipes):
    assert error(run_config.load, "tinny") == "unknown recipe 'tinny'; did you mean 'tiny'? (allowed: tiny)"
    for source in ("tinny.yaml", "runs/tinny", str(recipes / "tiny")):
        assert error(run_config.load, source) == f"no such file: {source!r}; give a YAML file or a recipe (tiny)"
    (recipes / "tiny.yaml").unlink()
    assert error(run_config.load, "a.yaml") == "no such file: 'a.yaml'; give a YAML file or a recipe"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"train: {steps: 3\ndata: x", "not valid YAML: line 2:"),
        (b"a: 1\n\tb: 2", "not valid YAML: line 2: found character '\\t' that cannot start any token"),
        (b"when: !!python/object:os.system x", "not valid YAML: line 1: could not determine a constructor"),
        (b"\xff\xfe\xfa", "not a text file"),
        (b"a: \x01", "not a text file"),
        (b"- a\n- b", "expected a mapping of settings (backbone:, think:, data:, train:), found ['a', 'b']"),
        (b"just words", "found 'just words'"),
        (b"# nothing yet", "found nothing"),
    ],
)
def test_bad_files(tmp_path, content, message):
    file = tmp_path / "bad.yaml"
    file.write_bytes(content)
    said = error(run_config.load, file)
    assert said.startswith(f"{file}: ") and message in said


# Checking


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (
            {"bakcbone": {}},
            "unknown setting 'bakcbone'; did you mean 'backbone'? (allowed: about, backbone, chunk, data,",
        ),
        ({"train": {"step": 3}}, "unknown setting 'train.step'; did you mean 'train.steps'"),
        ({"lr": 1}, "unknown setting 'lr'; did you mean 'train.lr'?"),
        ({"train": {"context": 1}}, "unknown setting 'train.context'; did you mean 'data.context'?"),
        ({1: 2}, "unknown setting '1'"),
        ({"train": {"steps": "many"}}, "train.steps: expected int, got 'many'"),
        ({"train": {"steps": 1.5}}, "train.steps: expected int, got 1.5"),
        ({"train": {"steps": True}}, "train.steps: expected int, got True"),
        ({"train": {"steps": None}}, "train.steps: expected int, got None"),
        ({"train": {"lr": "fast"}}, "train.lr: expected float, got 'fast'"),
        ({"train": {"lr": False}}, "train.lr: expected float, got False"),
        ({"train": {"gradient_checkpointing": 1}}, "train.gradient_checkpointing: expected bool, got 1"),
        ({"train": {"micro_batch_size": "x"}}, "train.micro_batch_size: expected int or none, got 'x'"),
        ({"think": ["PonderLM2"]}, "think: expected str or none, got ['PonderLM2']"),
        ({"name": 7}, "name: expected str, got 7 (quote it to make it text)"),
        ({"train": 3}, "train: expected a group of settings, got 3"),
        ({"train": 0}, "train: expected a group of settings, got 0"),
        ({"data": "books"}, "data: expected a group of settings, got 'books'"),
        ([], "expected a group of settings, got []"),
    ],
)
def test_refused(tree, message):
    assert message in error(run_config.from_dict, tree)


def test_anything_goes_below_backbone():
    tree = {"model_type": "llama", "rope_scaling": {"factor": 2.0, "list": [1, None]}}
    assert run_config.from_dict({"backbone": tree}).backbone == tree


@pytest.mark.parametrize(
    ("hint", "value", "expected"),
    [
        (float, 3, 3.0),
        (int, 3.0, 3),
        (int | None, None, None),
        (tuple[int, ...], [1, 2], (1, 2)),
        (tuple[int, int] | None, (1, 2), (1, 2)),
        (int | str, "exact", "exact"),
        (RunConfig, 3, 3),
        (RunConfig | None, "unchecked", "unchecked"),
    ],
)
def test_typed(hint, value, expected):
    got = run_config.typed(hint, value, "x")
    assert got == expected and type(got) is type(expected)


# Overrides


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("-3", -3),
        ("1_000", 1000),
        ("1e-3", 1e-3),
        ("1E5", 1e5),
        ("-.5", -0.5),
        ("2.", 2.0),
        ("true", True),
        ("False", False),
        ("null", None),
        ("none", None),
        ("~", None),
        ("", None),
        ("[1, 2]", [1, 2]),
        ("[1e-3, a, 'b: c']", [1e-3, "a", "b: c"]),
        ("{a: 1}", {"a": 1}),
        ("'3'", "3"),
        ('"a b"', "a b"),
        ("yes", "yes"),
        ("on", "on"),
        ("007", "007"),
        ("1e", "1e"),
        ("e-3", "e-3"),
        ("1.2.3", "1.2.3"),
        ("12:30:00", "12:30:00"),
        ("2024-01-01", "2024-01-01"),
        ("a: b", "a: b"),
        ("- a", "- a"),
        ("books/", "books/"),
        ("/data/my books", "/data/my books"),
        ("C:\\data\\new", "C:\\data\\new"),
        ("C:/data", "C:/data"),
        ("hub:user/name@main", "hub:user/name@main"),
        ("*.txt", "*.txt"),
        ("@home", "@home"),
        ("[draft] notes.txt", "[draft] notes.txt"),
        ("[1, 2", "[1, 2"),
        ("PonderLM2(thoughts=1, feedback='vocab')", "PonderLM2(thoughts=1, feedback='vocab')"),
    ],
)
def test_scalar(text, value):
    got = run_config.scalar(text)
    assert got == value and type(got) is type(value)


def test_overrides(recipes):
    overrides = {
        "train.steps": "20",  # into the recipe's empty `train:`
        "train.lr": "1e-3",
        "train.gradient_checkpointing": "true",
        "data.text": "C:\\data: new",
        "data.max_bytes": "none",
        "name": "7",
        "about": "",
        "think": "none",
        "kv_cache": "VQKV(bits=2.75, sizes=[1, 2])",
        "backbone.hidden_size": "64",
        "backbone.rope.scaling.factor": 2.0,
    }
    config = run_config.load("tiny", overrides)
    assert (config.train.steps, config.train.lr, config.train.gradient_checkpointing) == (20, 1e-3, True)
    assert (config.data.text, config.data.max_bytes) == ("C:\\data: new", None)
    assert (config.name, config.about, config.think) == ("7", "", None)
    assert config.kv_cache == "VQKV(bits=2.75, sizes=[1, 2])"
    assert config.backbone == {"model_type": "llama", "hidden_size": 64, "rope": {"scaling": {"factor": 2.0}}}


def test_an_override_replaces_a_whole_group(recipes):
    assert run_config.load("tiny", {"backbone": "checkpoints/a"}).backbone == "checkpoints/a"
    assert run_config.load("tiny", {"train": "{steps: 2}"}).train.steps == 2


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"train.stesp": "3"}, "unknown setting 'train.stesp'; did you mean 'train.steps'"),
        ({"train.steps": "x"}, "train.steps: expected int, got 'x'"),
        ({"steps": "3"}, "unknown setting 'steps'; did you mean 'train.steps'?"),
        ({"data": "books"}, "data: expected a group of settings, got 'books'"),
        ({"think.thoughts": "3"}, "--think.thoughts: 'think' is 'PonderLM2(thoughts=1)' here, not a group of settings"),
    ],
)
def test_refused_overrides(recipes, overrides, message):
    assert message in error(run_config.load, "tiny", overrides)


# Help


def test_every_field_has_help():
    found = run_config.fields()
    assert {"name", "backbone", "data.text", "train.lr"} <= found.keys() and "train" not in found
    for name, item in found.items():
        assert len(item.metadata["help"]) > 8, name
        assert item.default is not dataclasses.MISSING, name


def test_every_field_can_be_given():
    for name, item in run_config.fields().items():
        tree = {}
        run_config.assign(tree, name, item.default)
        assert run_config.from_dict(tree) == RunConfig()


def test_a_run_on_a_task_has_the_settings_for_tasks(recipes, tmp_path):
    (tmp_path / "own.yaml").write_text("on_task: {train: {lr: 0.5}}\ntrain: {steps: 7, lr: 0.1}\n")
    (tmp_path / "deeper.yaml").write_text("base: own.yaml\ntrain: {steps: 8}\non_task: {train: {batch_size: 3}}\n")
    deeper = str(tmp_path / "deeper.yaml")
    text, task = run_config.load(deeper), run_config.load(deeper, {"data.task": "StateTracking"})
    assert (text.train.steps, text.train.lr, text.train.batch_size) == (8, 0.1, 8)
    assert (task.train.steps, task.train.lr, task.train.batch_size) == (8, 0.5, 3)
    assert run_config.load(deeper, {"data.task": "StateTracking", "train.lr": "2"}).train.lr == 2
    assert run_config.load(deeper, {"data.task": "none"}) == run_config.load(deeper, {"data.task": None})


def test_a_file_can_name_its_task(tmp_path):
    (tmp_path / "own.yaml").write_text("data: {task: StateTracking}\non_task: {train: {lr: 0.5}}\n")
    assert run_config.load(tmp_path / "own.yaml").train.lr == 0.5
    assert run_config.load(tmp_path / "own.yaml", {"data.task": "none"}).train.lr != 0.5


def test_a_run_from_a_checkpoint_has_the_settings_for_checkpoints(tmp_path):
    (tmp_path / "own.yaml").write_text("on_checkpoint: {train: {lr: 0.5}}\ntrain: {lr: 0.1}\n")
    (tmp_path / "deeper.yaml").write_text("base: own.yaml\nbackbone: some/model\n")
    for source, overrides, lr in (
        ("own.yaml", {}, 0.1),
        ("own.yaml", {"backbone": "runs/plain"}, 0.5),
        ("own.yaml", {"backbone": "{model_type: llama}"}, 0.1),
        ("own.yaml", {"backbone.hidden_size": "64"}, 0.1),
        ("own.yaml", {"backbone": "runs/plain", "train.lr": "0.2"}, 0.2),
        ("deeper.yaml", {}, 0.5),
    ):
        assert run_config.load(tmp_path / source, overrides).train.lr == lr, (source, overrides)
    for recipe in run_config.recipe_names():  # a rate for a new model would ruin a trained one
        assert run_config.load(recipe, {"backbone": "some/model"}).train.lr <= 5e-4, recipe


@pytest.mark.parametrize("group", ["on_task", "on_checkpoint"])
def test_settings_for_tasks_must_be_a_group(tmp_path, group):
    (tmp_path / "own.yaml").write_text(f"{group}: 3\n")
    with pytest.raises(UserError, match=f"{group}: expected a group of settings, got 3"):
        run_config.load(tmp_path / "own.yaml")


def test_a_larger_model_of_the_user_stays_larger_on_a_task(tmp_path):
    (tmp_path / "own.yaml").write_text("base: plain\nbackbone: {num_hidden_layers: 9}\n")
    backbone = run_config.load(tmp_path / "own.yaml", {"data.task": "StateTracking"}).backbone
    assert (backbone["num_hidden_layers"], backbone["hidden_size"]) == (9, 64)
