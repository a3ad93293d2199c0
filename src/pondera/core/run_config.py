"""RunConfig: everything that decides a run, as one nested dataclass.

A run is written as YAML (a recipe, or the user's own file) and any field, at any depth, can be overridden from the
command line: ``--data.text books/ --train.steps 500 --backbone.hidden_size 256``. The text behind each field is its
help (``pondera train --help`` prints it). A file may build on another one: ``base: plain``.

The YAML is the one people expect: ``1e-3`` is a number, ``none`` is null, while ``yes``, ``on`` and dates are text.
"""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from pondera.core.errors import UserError, unknown
from pondera.core.seams import SeamSettings, option

RECIPES = Path(__file__).parent.parent / "recipes"


@dataclass
class DataConfig:
    """What is read: the ``data`` part of a run."""

    text: str = option(
        "stdlib", "a text file, a folder, 'stdlib' (the sources and docs of this Python), or a HF dataset name"
    )
    tokenizer: str = option(
        "bpe-2048", "'bpe-N' trains a byte-level BPE of N pieces on the text; or a tokenizer folder or hub name"
    )
    context: int = option(256, "tokens per training window")
    column: str = option("text", "the text column of a JSON, CSV or Parquet file or HF dataset")
    validation: float = option(0.05, "share of documents held out, chosen by the hash of their name")
    document_mask: bool = option(
        False, "tokens of a window attend within their own document only (slower: masks are dense)"
    )
    max_bytes: int | None = option(
        None, "read at most this many bytes of training text, whole documents in their fixed order; none: all of it"
    )


@dataclass
class TrainConfig:
    """How it is learned: the ``train`` part of a run."""

    steps: int = option(500, "optimizer steps")
    freeze_backbone_steps: int = option(
        0, "in the first so many steps only what the think method adds learns, for a backbone that was trained before"
    )
    batch_size: int = option(8, "windows per optimizer step, over all processes")
    micro_batch_size: int | None = option(
        None, "windows per forward pass on one process (none: the whole step at once)"
    )
    lr: float = option(2e-3, "peak learning rate (AdamW)")
    warmup: float = option(0.05, "share of the steps spent warming up; then cosine to min_lr")
    min_lr: float = option(0.1, "final learning rate as a share of the peak")
    weight_decay: float = option(0.1, "AdamW weight decay, on matrices only")
    beta1: float = option(0.9, "AdamW beta 1")
    beta2: float = option(0.95, "AdamW beta 2")
    grad_clip: float = option(1.0, "largest gradient norm")
    dtype: str = option("float32", "float32, or bfloat16 (autocast; slow on most CPUs)")
    seed: int = option(0, "seed of weights, data order and thinking rounds")
    log_every: int = option(10, "steps between two lines of metrics.jsonl")
    eval_every: int = option(100, "steps between two validations; the last step is always validated")
    eval_tokens: int = option(32768, "validation tokens used while training")
    save_every: int = option(100, "steps between two checkpoints")
    keep: int = option(2, "checkpoints kept")
    gradient_checkpointing: bool = option(
        False, "recompute activations in the backward pass: less memory, up to a third more compute"
    )


@dataclass
class StartSettings:
    """The name of a run, and the backbone that it starts from."""

    name: str = option("run", "what to call the run in tables")
    about: str = option("", "one sentence on what the recipe is for")
    backbone: Any = option(
        None, "a HF config as a mapping (model_type: llama, ...), a checkpoint folder, or a run to go on from"
    )
    init: str = option(
        "hf", "'hf': the architecture's own initialisation; 'scaled': std sqrt(2/5D), embeddings scaled to unit RMS"
    )


@dataclass
class RunConfig(SeamSettings, StartSettings):
    """Everything that decides a run."""

    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def to_dict(self) -> dict[str, Any]:
        """The config as plain mappings, ready for YAML or JSON."""
        return dataclasses.asdict(self)


def recipe_names() -> list[str]:
    """Names of the shipped recipes."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def read(source: str | Path) -> dict[str, Any]:
    """The mapping in a recipe or YAML file, laid over the one that its ``base`` names.

    ``base: plain`` builds on a recipe, ``base: mine.yaml`` on a file (seen from the file that says so). Groups are
    merged key by key, except that a backbone of another ``model_type`` starts afresh; ``name`` and ``about`` are each
    file's own.

    Args:
        source: a recipe name (``"ponderlm2"``) or the path of a YAML file.

    Raises:
        UserError: no such recipe or file, not a YAML mapping, or bases that go round in a circle.
    """
    return _read(_locate(source), ())


def _read(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    tree = _mapping(path)
    base = tree.pop("base", None)
    if base is None:
        return tree
    try:
        if not isinstance(base, str):
            raise UserError(f"give the name of a recipe or file, not {base!r}")
        below = _locate(base, path.parent)
    except UserError as error:
        raise UserError(f"{path}: base: {error}") from None
    chain = (*above, path.resolve())
    if below.resolve() in chain:
        circle = " -> ".join(step.name for step in (*chain, below))
        raise UserError(f"{path}: base: goes round in a circle ({circle}); one of these files must stand by itself")
    inherited = _read(below, chain)
    return _merge({key: value for key, value in inherited.items() if key not in ("name", "about")}, tree)


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        old = below.get(key)
        if isinstance(old, dict) and value is None:
            continue  # an empty group changes nothing
        if isinstance(old, dict) and isinstance(value, dict):
            same_kind = value.get("model_type", old.get("model_type")) == old.get("model_type")
            value = _merge(old, value) if same_kind else value
        merged[key] = value
    return merged


def _locate(source: str | Path, folder: Path = Path()) -> Path:
    recipes = recipe_names()
    path = RECIPES / f"{source}.yaml" if str(source) in recipes else folder / Path(source).expanduser()
    if path.is_file():
        return path
    if path.suffix in (".yaml", ".yml") or len(Path(source).parts) > 1:
        listing = f"a recipe ({', '.join(recipes)})" if recipes else "a recipe"
        raise UserError(f"no such file: {str(source)!r}; give a YAML file or {listing}")
    raise unknown("recipe", str(source), recipes)


def _mapping(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _Yaml)
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise UserError(f"{path}: not valid YAML: {line}{error.problem}") from None
    except (yaml.YAMLError, UnicodeDecodeError):
        raise UserError(f"{path}: not a text file; give a YAML file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    if not isinstance(tree, dict):
        found = "nothing" if tree is None else f"{tree!r:.60}"
        raise UserError(f"{path}: expected a mapping of settings (backbone:, think:, data:, train:), found {found}")
    return tree


def load(source: str | Path, overrides: dict[str, Any] | None = None) -> RunConfig:
    """Reads a recipe or YAML file and applies dotted overrides.

    Args:
        source: a recipe name or the path of a YAML file.
        overrides: dotted field -> value. Text is taken as it is where the setting is text, else read by `scalar`.

    Raises:
        UserError: an unknown field (with the nearest name) or a value of the wrong type.

    Example:
        >>> load("ponderlm2", {"train.steps": "20"}).train.steps
        20
    """
    tree = read(source)
    tree.setdefault("name", Path(source).stem)
    for dotted, value in (overrides or {}).items():
        assign(tree, dotted, _override(dotted, value) if isinstance(value, str) else value)
    return from_dict(tree)


def scalar(text: str) -> Any:
    """Reads one command-line value: a number, truth value, null, ``[list]`` or ``{mapping}``; all else is text.

    Example:
        >>> [scalar(text) for text in ("1e-3", "true", "none", "[1, 2]", "note: a", "C:/data")]
        [0.001, True, None, [1, 2], 'note: a', 'C:/data']
    """
    try:
        value = yaml.load(text, _Yaml)
    except yaml.YAMLError:
        return text
    plain = text.lstrip()[:1] not in ("[", "{", "'", '"')
    return text if plain and isinstance(value, (str, list, dict)) else value


def assign(tree: dict[str, Any], dotted: str, value: Any) -> None:
    """Sets ``tree["a"]["b"] = value`` for ``dotted == "a.b"``; absent or empty groups on the way are made.

    Raises:
        UserError: something on the way is a value, not a group.
    """
    *path, last = dotted.split(".")
    node = tree
    for key in path:
        child = node.get(key)
        if child is None:
            child = node[key] = {}
        if not isinstance(child, dict):
            raise UserError(f"--{dotted}: {key!r} is {child!r} here, not a group of settings")
        node = child
    node[last] = value


def from_dict(tree: dict[str, Any]) -> RunConfig:
    """Builds a checked `RunConfig` from nested mappings.

    Raises:
        UserError: an unknown field (with the nearest name) or a value of the wrong type.

    Example:
        >>> from_dict({"think": "PonderLM2(thoughts=1)", "train": {"lr": 1}}).train.lr
        1.0
    """
    return _build(RunConfig, tree, "")


def fields(cls: type = RunConfig, prefix: str = "") -> dict[str, dataclasses.Field[Any]]:
    """Every settable field by its dotted name, groups flattened."""
    found: dict[str, dataclasses.Field[Any]] = {}
    hints = typing.get_type_hints(cls)
    for item in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[item.name]):
            found |= fields(hints[item.name], f"{prefix}{item.name}.")
        else:
            found[prefix + item.name] = item
    return found


def typed(hint: Any, value: Any, name: str) -> Any:
    """`value` if it is what `hint` asks for; whole numbers and lists may stand for floats and tuples, and 1e3 for 1000.

    Args:
        hint: a type or a union of types; checked only if all are plain (numbers, truth values, text, containers, none).
        value: what the user gave.
        name: what to call it in the error.

    Raises:
        UserError: the value has another type.

    Example:
        >>> typed(float | None, 3, "train.lr")
        3.0
    """
    union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    kinds = [typing.get_origin(kind) or kind for kind in (typing.get_args(hint) if union else (hint,))]
    if type(value) in kinds or not set(kinds) <= {bool, int, float, str, tuple, list, dict, types.NoneType}:
        return value
    if float in kinds and type(value) is int:
        return float(value)
    if int in kinds and type(value) is float and value.is_integer():
        return int(value)
    if tuple in kinds and type(value) is list:
        return tuple(value)
    names = " or ".join("none" if kind is types.NoneType else kind.__name__ for kind in kinds)
    quotes = " (quote it to make it text)" if str in kinds and isinstance(value, (int, float)) else ""
    raise UserError(f"{name}: expected {names}, got {value!r}{quotes}")


def _build(cls: type, tree: Any, prefix: str) -> Any:
    if not isinstance(tree, dict):
        raise UserError(f"{prefix.rstrip('.')}: expected a group of settings, got {tree!r}")
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    for key, value in tree.items():
        if key not in hints:
            raise _unknown_setting(f"{prefix}{key}", [f"{prefix}{name}" for name in hints])
        if dataclasses.is_dataclass(hints[key]):
            values[key] = _build(hints[key], {} if value is None else value, f"{prefix}{key}.")
        else:
            values[key] = typed(hints[key], value, f"{prefix}{key}")
    return cls(**values)


def _unknown_setting(given: str, siblings: list[str]) -> UserError:
    leaf = given.rpartition(".")[2]
    elsewhere = [name for name in fields() if name.rpartition(".")[2] == leaf]
    if elsewhere:
        return UserError(f"unknown setting {given!r}; did you mean {' or '.join(map(repr, elsewhere))}?")
    return unknown("setting", given, siblings)


def _override(dotted: str, text: str) -> Any:
    """One override's text as its setting wants it: where the setting is text, ``7`` and ``true`` are text too."""
    item = fields().get(dotted)
    kinds = str(item.type).split(" | ") if item else []
    value = scalar(text)
    return text if "str" in kinds and not ("None" in kinds and value is None) else value


class _Yaml(yaml.SafeLoader):
    """PyYAML with the rules of YAML 1.2, in which 1e-3 is a number and `no` is a word; and `none` for null."""

    yaml_implicit_resolvers = {}


for _kind, _pattern in {
    "null": r"|~|null|Null|NULL|none|None",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?(0|[1-9][0-9_]*)",
    "float": r"[-+]?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
    "merge": r"<<",
}.items():
    _Yaml.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(rf"(?:{_pattern})\Z"), None)
