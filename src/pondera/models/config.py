"""AdaptiveConfig: the config of a backbone plus at most one method per seam, as spec strings."""

from __future__ import annotations

import copy
import importlib
from typing import Any, ClassVar

from pondera.arch.families import listed
from pondera.core import spec
from pondera.core.errors import UserError, unknown
from pondera.core.hf_config import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, SubConfigSpec, written_by_transformers
from pondera.core.seams import SeamSettings
from pondera.core.spec_repr import SpecRepr
from pondera.core.versions import installed
from pondera.models.peft_defaults import announce_to_peft

INITS = ("hf", "scaled")
DTYPES = ("auto", "bfloat16", "float16", "float32", "float64")
TEXT_CONFIG = "text_config"
SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)
"""Fields of a backbone that must be positive."""
FORMER_ROPE = {
    "rope_theta": "rope_theta",
    "rotary_emb_base": "rope_theta",
    "rope_local_base_freq": "rope_theta",
    "rotary_pct": "partial_rotary_factor",
    "partial_rotary_factor": "partial_rotary_factor",
    "rope_scaling": "factor",
}
"""Fields of config files of earlier transformers that config classes convert, and their names in `rope_parameters`."""
SETTINGS = ("backbone", *spec.SEAMS, "init", "embed_scale", "dtype")


IMPOSSIBLE = {
    ("think", "chunk"): (
        "both decide what the decoder layers run on: the same tokens again, or chunks of tokens; leave one of them out, or "
        "think within the concept module: ConceptLM(think=...)"
    ),
    ("think", "memory"): (
        "a trained memory runs the layers once per block and keeps a state in place of older slots, and a later pass of a "
        "token reads those slots; leave one of them out"
    ),
    ("chunk", "memory"): (
        "a trained memory runs all layers block by block, and a chunk method runs the first and the last layers apart; leave "
        "one of them out"
    ),
    ("memory", "kv_cache"): (
        "a trained memory keeps slots of one block and a state of fixed size, so there are no further slots to evict or to "
        "code; leave one of them out"
    ),
}
"""Pairs of seams that cannot be combined, and why."""


class AdaptiveConfig(PreTrainedConfig, SeamSettings):
    """Config of an `AdaptiveLM`, saved as ``config.json`` with ``model_type: pondera``.

    Args:
        backbone: a transformers config, a mapping with ``model_type``, or the folder (or hub name) of a checkpoint, whose
            weights are loaded when an `AdaptiveLM` is built from this config. If it is another Pondera model, its backbone
            is used, and the parameters that its method shares with the new one.
        think: compute per token, e.g. ``"PonderLM2(thoughts=1)"``; default: `None`, one pass.
        kv_cache: compression of the KV cache without training, e.g. ``"SnapKV(1024)"``; default: `None`, the full cache.
        memory: a trained recurrent memory, e.g. ``"ElasticMemory(block=64)"``; default: `None`.
        chunk: tokens predicted at once, e.g. ``"ConceptLM(chunk=4)"``; default: `None`, one.
        head: the output head, e.g. ``"VQLogits(codes=512)"``; default: `None`, the output matrix of the backbone.
        init: ``"hf"`` keeps the initialisation of the architecture; ``"scaled"`` draws linear and embedding weights
            from a truncated normal with std sqrt(2/5D), divides output projections by sqrt(2 layers) and multiplies
            embeddings by `embed_scale` to unit RMS (the recipe of the PonderLM papers). For a Pondera model as backbone its
            own `init` is used.
        embed_scale: factor of the token embeddings; default: `None`, determined by `init` and the think method, or by
            a Pondera model as backbone.
        dtype: dtype of all weights, e.g. ``"bfloat16"``; default: `None`, that of the checkpoint.

    Raises:
        UserError: an unknown setting, architecture, backbone field, method or argument.

    Example:
        >>> config = AdaptiveConfig(backbone={"model_type": "llama", "hidden_size": 64}, think="PonderLM2(thoughts=1)")
        >>> config.backbone.hidden_size
        64
    """

    model_type: ClassVar[str] = "pondera"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "cache", "passes", "terms", "trace"]
    sub_configs_defaults: ClassVar[dict[str, Any]] = {"backbone": SubConfigSpec(AutoConfig, model_type="llama")}

    backbone: dict | PreTrainedConfig | str | None = None
    init: str = "hf"
    embed_scale: float | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        # transformers can look up the model of any config, so it is registered here.
        model = importlib.import_module("pondera.models.adaptive_lm").AdaptiveLM
        importlib.import_module("pondera.core.hf").register(AdaptiveConfig, model)
        kwargs.pop(TEXT_CONFIG, None)
        if strange := next((name for name in kwargs if not _known(name)), None):
            raise unknown("setting of AdaptiveConfig", strange, SETTINGS)
        self._checkpoint: str | None = None
        self._retrofit = False
        if isinstance(self.backbone, str):
            self._checkpoint, found = self.backbone, _checkpoint_config(self.backbone)
            self._retrofit = isinstance(found, AdaptiveConfig)
            if isinstance(found, AdaptiveConfig):
                found, self.init = found.get_text_config(), found.init
            self.backbone = found
        elif not isinstance(self.backbone, PreTrainedConfig):
            self.backbone = backbone_config(_mapping(self.backbone) or {"model_type": "llama"})
        if self.init not in INITS:
            raise unknown("init", str(self.init), INITS)
        if self._checkpoint and not self._retrofit and self.init != "hf":
            raise UserError(f"init: {self.init!r} would overwrite the weights of {self._checkpoint!r}; use init: hf")
        if isinstance(self.dtype, str) and self.dtype not in DTYPES:
            raise unknown("dtype", self.dtype, DTYPES)
        for (first, second), reason in IMPOSSIBLE.items():
            if (one := getattr(self, first)) and (other := getattr(self, second)):
                raise UserError(f"{first}: {one} and {second}: {other} cannot be combined: {reason}")
        for seam in spec.SEAMS:
            if getattr(self, seam) is not None:
                parsed = spec.parse(_spec_text(seam, getattr(self, seam)))
                spec.find(parsed.name, seam)
                setattr(self, seam, spec.format(parsed))
        kwargs.setdefault("tie_word_embeddings", getattr(self.backbone, "tie_word_embeddings", False))
        kernel = kwargs.get("attn_implementation") or self.backbone._attn_implementation
        super().__post_init__(**kwargs)
        if self.dtype is not None:
            self.backbone.dtype = self.dtype
        if kernel is not None:
            self._attn_implementation = kernel  # of the backbone, too

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Builds a config from ``config.json``, where the backbone must be a mapping; a name would download other weights.

        The backbone can have fields that its config class does not declare, as in many checkpoints.
        """
        if isinstance(config_dict.get("backbone"), str) or "_checkpoint" in config_dict:
            raise UserError(
                "config.json names another checkpoint as backbone, whose weights would be downloaded; a model saved by "
                "Pondera does not: give the folder of a trained model"
            )
        if "backbone" in config_dict and config_dict["backbone"] is None:
            raise UserError("config.json: the backbone is null, and a saved model has one; copy the folder again")
        if isinstance(backbone := config_dict.get("backbone"), dict):
            config_dict = {**config_dict, "backbone": backbone_config(backbone, saved=True)}
        if config_dict.get("transformers_version") not in (None, installed()):
            # Another version can write fields that are unknown to this one; they are ignored.
            foreign = [name for name in config_dict if not _known(name) and name not in SETTINGS]
            config_dict = {name: value for name, value in config_dict.items() if name not in foreign}
        return super().from_dict(config_dict, **kwargs)

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """The ``config.json`` of a Pondera model.

        Raises:
            UserError: the config belongs to another model type.
        """
        tree, unused = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if tree and tree.get("model_type", cls.model_type) != cls.model_type:
            name = str(pretrained_model_name_or_path)
            raise UserError(
                f"{name}: a {tree['model_type']} checkpoint, not a Pondera model; to use its weights, write "
                f'AdaptiveLM(AdaptiveConfig(backbone="{name}", think="..."))'
            )
        return tree, unused

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """The config of the backbone, where transformers reads head counts, vocabulary size and layer types."""
        return self.backbone if isinstance(self.backbone, PreTrainedConfig) else self

    def to_dict(self) -> dict[str, Any]:
        """The config as plain mappings, without the source of the initial weights."""
        tree = super().to_dict()
        for mark in ("_checkpoint", "_retrofit"):
            tree.pop(mark, None)
        # PEFT reads sizes from this mapping, where it looks for a part called text_config.
        announce_to_peft(self.model_type)
        tree[TEXT_CONFIG] = tree.get("backbone")
        return tree

    def to_diff_dict(self) -> dict[str, Any]:
        """The saved fields, without duplicates."""
        tree = super().to_diff_dict()
        tree.pop(TEXT_CONFIG, None)
        return tree


def _known(name: str) -> bool:
    """Whether a config may have this field: ours, or one that transformers writes or accepts."""
    return name in SETTINGS or name.startswith("_") or name in written_by_transformers()


def _spec_text(seam: str, given: Any) -> str:
    """The spec string of a method, given as text or as an object."""
    if isinstance(given, str):
        return given
    if isinstance(given, SpecRepr):
        return repr(given)
    name = getattr(given, "__name__", type(given).__name__)
    raise UserError(f'{seam}: expected text such as {seam}="{name}(...)", got {_shown(given)}; write it as text')


def _mapping(backbone: Any) -> dict | None:
    if backbone is None or isinstance(backbone, dict):
        return backbone
    advice = (
        "save it and give its folder, or give its .config for new weights"
        if hasattr(backbone, "save_pretrained")
        else "give a config, a mapping with model_type, or a checkpoint's folder"
    )
    raise UserError(f"backbone: got {_shown(backbone)}; {advice}")


def _shown(given: Any) -> str:
    return f"the class {given.__name__}" if isinstance(given, type) else f"a {type(given).__name__} object"


def backbone_config(tree: dict[str, Any], saved: bool = False) -> PreTrainedConfig:
    """Builds a transformers config from a mapping; unknown architectures and fields raise.

    Args:
        tree: ``model_type`` and fields of its config.
        saved: the mapping is from a saved model; unknown fields are kept, as in transformers.
    """
    tree = dict(tree)
    name = tree.pop("model_type", None)
    if not isinstance(name, str):
        raise UserError(f"backbone: needs a model_type ({listed(lambda each: each.modules)}, ...)")
    if name not in CONFIG_MAPPING:
        raise unknown("backbone model_type", name, CONFIG_MAPPING.keys())
    config_class = CONFIG_MAPPING[name]
    if not saved:
        _check_fields(tree, name)
    try:
        config = config_class(**copy.deepcopy(tree))  # transformers completes the mappings that it is given
    except Exception as error:
        raise UserError(f"backbone: invalid settings of {name}: {str(error).splitlines()[-1].strip()}") from error
    if not saved:
        _check_converted(tree, name, config)
    return config


def _check_fields(tree: dict[str, Any], name: str) -> None:
    default = CONFIG_MAPPING[name]()
    allowed = (
        set(default.to_dict()) | set(type(default).attribute_map) | {"attn_implementation", "dtype", "torch_dtype"}
    )
    rope = (default.rope_parameters or {}) if "rope_parameters" in allowed else None
    # Most architectures turn all dimensions, whatever their config says.
    former = {
        key for key, inside in FORMER_ROPE.items() if rope is not None and (inside in rope or "partial" not in inside)
    }
    for key in SIZES:
        if isinstance(value := tree.get(key), (int, float)) and value < 1:
            raise UserError(f"backbone.{key}={value}: give 1 or more")
    for key in tree:
        # transformers can write fields with a leading underscore and generation fields into config.json.
        if key not in allowed | former and not key.startswith("_") and not hasattr(default, key):
            raise unknown(f"{name} setting", f"backbone.{key}", [f"backbone.{field}" for field in allowed])


def _check_converted(tree: dict[str, Any], name: str, config: PreTrainedConfig) -> None:
    """Refuses a former field that the config class has not converted, or that contradicts the field that replaced it."""
    declared = set(CONFIG_MAPPING[name]().to_dict()) | set(config.attribute_map)
    for key, inside in FORMER_ROPE.items():
        if tree.get(key) is None or key in declared:
            continue
        example = {"rope_type": "default", inside: tree[key]} if inside != "factor" else tree[key]
        advice = f"write backbone.rope_parameters: {example}".replace("'", "")
        if key in config.to_dict():
            raise UserError(f"backbone.{key}: {name} does not have it; {advice}")
        if tree.get("rope_parameters"):
            raise UserError(f"backbone.{key}: rope_parameters, its new place, is given as well; {advice}")
        if inside != "factor" and not (isinstance(tree[key], (int, float)) and tree[key] > 0):
            raise UserError(f"backbone.{key}: expected a number above 0, got {tree[key]!r}")
    former, dtype = (str(tree.get(key)).removeprefix("torch.") for key in ("torch_dtype", "dtype"))
    if "None" not in (former, dtype) and former != dtype:
        raise UserError(
            f"backbone.torch_dtype: {former}, and backbone.dtype, its new name, is {dtype}; give one of them"
        )


def _checkpoint_config(path: str) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(path)
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(
            f"backbone: {path!r} is neither a checkpoint folder (with config.json) nor a model that could be downloaded: "
            f"{str(error).splitlines()[0]}"
        ) from None


AutoConfig.register(AdaptiveConfig.model_type, AdaptiveConfig, exist_ok=True)
