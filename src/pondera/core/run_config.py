"""RunConfig: all settings of a run, as one nested dataclass.

A run is written as YAML (a recipe or a file of the user). The command line can override any field by its dotted name:
``--data.text books/ --train.steps 500 --backbone.hidden_size 256``. The text of each field is its help, which
``pondera train --help`` prints. A file can extend another one with ``base: plain``, and have other settings for runs on a
task (``on_task:``) and for runs from a checkpoint (``on_checkpoint:``).

The YAML follows version 1.2: ``1e-3`` is a number, ``yes``, ``on`` and dates are text. In addition, ``none`` is null.
"""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml

from pondera.core.errors import UserError, unknown
from pondera.core.seams import SeamSettings, option

RECIPES = Path(__file__).parent.parent / "recipes"
FLOWS = "flows"
GROUPS: dict[str, Callable[[dict[str, Any]], bool]] = {
    "on_task": lambda tree: bool((tree.get("data") or {}).get("task")),
    "on_checkpoint": lambda tree: isinstance(tree.get("backbone"), str),
}
"""Groups of a recipe whose settings replace the others: if the run trains on a task, and if it continues from a checkpoint."""


@dataclass
class DataConfig:
    """Training data: the ``data`` part of a run."""

    text: str = option(
        "stdlib", "a text file, a folder, 'stdlib' (the sources and docs of this Python), or a HF dataset name"
    )
    tokenizer: str = option(
        "bpe-2048", "'bpe-N' trains a byte-level BPE of N pieces on the text; or a tokenizer folder or hub name"
    )
    context: int = option(256, "tokens per training window")
    column: str = option("text", "the text column of a JSON, CSV or Parquet file or HF dataset")
    validation: float = option(0.05, "share of documents held out, chosen by the hash of their name")
    document_mask: bool = option(False, "tokens attend within their own document only (slower: the masks are dense)")
    max_bytes: int | None = option(None, "limit of training text in bytes; whole documents are used, in a fixed order")
    task: str | None = option(
        None,
        "a synthetic task in place of text, e.g. StateTracking(group='S3', reset=0.25); `pondera methods` lists them",
    )
    windows: int = option(100_000, "training windows of a task; fewer are drawn again in another order")
    known_difficulty: bool = option(
        False, "a control: each token of a task takes 1 + (its difficulty) passes, at most those of the method"
    )


@dataclass
class TrainConfig:
    """Optimization: the ``train`` part of a run."""

    steps: int = option(500, "optimizer steps")
    freeze_backbone_steps: int = option(
        0, "freeze a pretrained backbone for this many steps; only the parameters of the methods train"
    )
    lora: int = option(
        0,
        "rank of LoRA: the pretrained backbone is frozen, and each of its attention and MLP matrices learns an update of "
        "this rank; methods train fully; 0: off",
    )
    lora_alpha: float = option(16.0, "LoRA's updates are multiplied by lora_alpha / lora")
    batch_size: int = option(8, "windows per optimizer step, over all processes")
    micro_batch_size: int | None = option(
        None, "windows per forward pass and process; without it, the whole step in one pass"
    )
    lr: float = option(2e-3, "peak learning rate (AdamW)")
    lr_scale: float = option(
        1.0,
        "factor of the learning rate of the parameters that methods add to the backbone; 0.1 lets the heads and codebooks "
        "of ConceptLM learn at a tenth of the rate",
    )
    warmup: float = option(0.05, "share of the steps for the linear warm-up; then cosine decay to min_lr")
    min_lr: float = option(0.1, "final learning rate as a share of the peak")
    weight_decay: float = option(0.1, "AdamW weight decay, on matrices only")
    beta1: float = option(0.9, "AdamW beta 1")
    beta2: float = option(0.95, "AdamW beta 2")
    grad_clip: float = option(1.0, "largest gradient norm")
    dtype: str = option("float32", "float32, or bfloat16 (autocast; slow on most CPUs)")
    seed: int = option(0, "random seed of weights, data order and randomised methods")
    log_every: int = option(10, "steps between two lines of metrics.jsonl")
    eval_every: int = option(100, "steps between two validations; the last step is always validated")
    eval_tokens: int = option(32768, "validation tokens per validation during training")
    save_every: int = option(100, "steps between two checkpoints")
    keep: int = option(2, "checkpoints kept")
    gradient_checkpointing: bool = option(
        False, "recompute activations in the backward pass: less memory, up to a third more compute"
    )


@dataclass
class StartSettings:
    """The name of a run, and the backbone that it starts from."""

    name: str = option("run", "name of the run in tables")
    about: str = option("", "one sentence that describes the recipe")
    backbone: Any = option(
        None, "a Hugging Face config as a mapping (model_type: llama, ...), a checkpoint folder, or a run to start from"
    )
    init: str = option(
        "hf", "'hf': the architecture's own initialisation; 'scaled': std sqrt(2/5D), embeddings scaled to unit RMS"
    )


@dataclass
class RunConfig(SeamSettings, StartSettings):
    """All settings of a run."""

    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def to_dict(self) -> dict[str, Any]:
        """The config as plain mappings, ready for YAML or JSON."""
        return dataclasses.asdict(self)


Kind = TypeVar("Kind")


def recipe_names() -> list[str]:
    """Names of the shipped recipes of language models."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def flow_recipe_names() -> list[str]:
    """Names of the shipped recipes of GFlowNets, in a folder of their own."""
    return sorted(path.stem for path in (RECIPES / FLOWS).glob("*.yaml"))


def read(source: str | Path, overrides: dict[str, Any] | None = None) -> dict[str, Any]:
    """The mapping of a recipe or YAML file, merged over that of its ``base``.

    ``base: plain`` extends a recipe, ``base: mine.yaml`` a file (relative to the extending file). Groups are merged key by
    key, except that a backbone of another ``model_type`` replaces the whole group. ``name`` and ``about`` are not inherited.
    The groups ``on_task`` and ``on_checkpoint`` have settings that replace those of the same file if the run trains on a task,
    and if its backbone is a checkpoint.

    Args:
        source: a recipe name (``"ponderlm2"``) or the path of a YAML file.
        overrides: dotted field -> value, which decide the groups together with the files; they are not merged.

    Raises:
        UserError: no such recipe or file, not a YAML mapping, or circular bases.
    """
    path = _locate(source)
    tree = _read(path, (), frozenset())
    for dotted in ("data.task", "backbone"):
        if overrides and dotted in overrides:
            value = overrides[dotted]
            assign(tree, dotted, scalar(value) if isinstance(value, str) else value)
    return _read(path, (), frozenset(name for name, applies in GROUPS.items() if applies(tree)))


def _read(path: Path, above: tuple[Path, ...], chosen: frozenset[str]) -> dict[str, Any]:
    tree = _mapping(path)
    base, groups = tree.pop("base", None), {name: tree.pop(name, None) or {} for name in GROUPS}
    for name, group in groups.items():
        if not isinstance(group, dict):
            raise UserError(f"{path}: {name}: expected a group of settings, got {group!r}")
        if name in chosen:
            tree = _merge(tree, group)
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
        raise UserError(f"{path}: base: the files extend each other in a circle ({circle}); remove one base")
    inherited = _read(below, chain, chosen)
    return _merge({key: value for key, value in inherited.items() if key not in ("name", "about")}, tree)


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        old = below.get(key)
        if isinstance(old, dict) and value is None:
            continue  # an empty group overrides nothing
        if isinstance(old, dict) and isinstance(value, dict):
            same_kind = value.get("model_type", old.get("model_type")) == old.get("model_type")
            value = _merge(old, value) if same_kind else value
        merged[key] = value
    return merged


def _locate(source: str | Path, folder: Path = Path()) -> Path:
    recipes = recipe_names()
    named = RECIPES / FLOWS if str(source) in flow_recipe_names() else RECIPES if str(source) in recipes else None
    path = named / f"{source}.yaml" if named else folder / Path(source).expanduser()
    recipes = [*recipes, *flow_recipe_names()]
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


def load(source: str | Path, overrides: dict[str, Any] | None = None, kind: type[Kind] = RunConfig) -> Kind:
    """Reads a recipe or YAML file and applies dotted overrides.

    Args:
        source: a recipe name or the path of a YAML file.
        overrides: dotted field -> value. A string is kept if the setting is text, else parsed by `scalar`.
        kind: the dataclass of the settings.

    Raises:
        UserError: an unknown field (with the nearest name) or a value of the wrong type.

    Example:
        >>> load("ponderlm2", {"train.steps": "20"}).train.steps
        20
    """
    tree = read(source, overrides)
    tree.setdefault("name", Path(source).stem)
    for dotted, value in (overrides or {}).items():
        assign(tree, dotted, _override(dotted, value, kind) if isinstance(value, str) else value)
    return from_dict(tree, kind)


def scalar(text: str) -> Any:
    """Parses one command-line value: a number, bool, null, ``[list]`` or ``{mapping}``; anything else is text.

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
    """Sets ``tree["a"]["b"] = value`` for ``dotted == "a.b"``; missing or empty groups are created.

    Raises:
        UserError: a part of the path is a value, not a group.
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


def from_dict(tree: dict[str, Any], kind: type[Kind] = RunConfig) -> Kind:
    """Builds a checked config from nested mappings.

    Args:
        tree: the settings.
        kind: the dataclass of the settings.

    Raises:
        UserError: an unknown field (with the nearest name) or a value of the wrong type, or a run of another kind.

    Example:
        >>> from_dict({"think": "PonderLM2(thoughts=1)", "train": {"lr": 1}}).train.lr
        1.0
    """
    if kind is RunConfig and is_flow(tree):
        raise UserError(
            "these are the settings of a GFlowNet (they have an environment), not of a language model; "
            "`pondera train` trains it"
        )
    return _build(kind, tree, "", kind)


def is_flow(tree: Any) -> bool:
    """Whether settings are those of a GFlowNet (`pondera.core.flow_config`): they have an environment."""
    return isinstance(tree, dict) and "environment" in tree


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
    """Checks that a value has the annotated type; converts int to float, list to tuple, and 1e3 to 1000.

    Args:
        hint: a type or a union of types; checked only if all are plain (bool, int, float, str, containers, `None`).
        value: the value given by the user.
        name: its name in the error message.

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


def _build(cls: type, tree: Any, prefix: str, kind: type) -> Any:
    if not isinstance(tree, dict):
        raise UserError(f"{prefix.rstrip('.')}: expected a group of settings, got {tree!r}")
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    for key, value in tree.items():
        if key not in hints:
            raise _unknown_setting(f"{prefix}{key}", [f"{prefix}{name}" for name in hints], kind)
        if dataclasses.is_dataclass(hints[key]):
            values[key] = _build(hints[key], {} if value is None else value, f"{prefix}{key}.", kind)
        else:
            values[key] = typed(hints[key], value, f"{prefix}{key}")
    return cls(**values)


def _unknown_setting(given: str, siblings: list[str], kind: type) -> UserError:
    leaf = given.rpartition(".")[2]
    elsewhere = [name for name in fields(kind) if name.rpartition(".")[2] == leaf]
    if elsewhere:
        return UserError(f"unknown setting {given!r}; did you mean {' or '.join(map(repr, elsewhere))}?")
    return unknown("setting", given, siblings)


def _override(dotted: str, text: str, kind: type) -> Any:
    """Parses the value of an override; for a setting of type text, ``7`` and ``true`` stay text."""
    item = fields(kind).get(dotted)
    kinds = str(item.type).split(" | ") if item else []
    value = scalar(text)
    return text if "str" in kinds and not ("None" in kinds and value is None) else value


class _Yaml(yaml.SafeLoader):
    """PyYAML with the scalars of YAML 1.2, where 1e-3 is a number and `no` is text; `none` is null."""

    yaml_implicit_resolvers = {}


for _kind, _pattern in {
    "null": r"|~|null|Null|NULL|none|None",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?(0|[1-9][0-9_]*)",
    "float": r"[-+]?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
    "merge": r"<<",
}.items():
    _Yaml.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(rf"(?:{_pattern})\Z"), None)
