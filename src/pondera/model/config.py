"""AdaptiveConfig: a backbone's config plus at most one method per seam, as spec strings."""

from __future__ import annotations

import importlib
from typing import Any, ClassVar

from pondera.ground import spec
from pondera.ground.errors import UserError, unknown
from pondera.model.hf_config import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, SubConfigSpec

INITS = ("hf", "scaled")


class AdaptiveConfig(PreTrainedConfig):
    """What an `AdaptiveLM` is made of. Saved as ``config.json`` with ``model_type: pondera``.

    Args:
        backbone: a transformers config, the same as a mapping with ``model_type``, or the folder (or hub name) of a
            checkpoint; the weights of a checkpoint are loaded when an `AdaptiveLM` is built from this config. Of another
            Pondera model the backbone is taken over, and of its method what the new method has, too.
        think: how much to compute for each token, e.g. ``"PonderLM2(thoughts=1)"``; none: one pass.
        memory: how much of the past to keep; none: all of it.
        segment: how much to say at once; none: a token.
        head: what makes scores of the vocabulary, e.g. ``"VQLogits(codes=512)"``; none: the backbone's output matrix.
        init: ``"hf"`` keeps the architecture's own initialisation; ``"scaled"`` draws linear and embedding weights
            from a truncated normal with std sqrt(2/5D), divides output projections by sqrt(2 layers) and multiplies
            embeddings by `embed_scale` so that they enter at unit RMS (the recipe of the PonderLM papers). A Pondera
            model keeps what it was drawn with, whatever is said here.
        embed_scale: what token embeddings are multiplied with; none: decided by `init` and the think method, or by the
            Pondera model that `backbone` names.

    Raises:
        UserError: an unknown architecture, backbone field, method or argument.

    Example:
        >>> config = AdaptiveConfig(backbone={"model_type": "llama", "hidden_size": 64}, think="PonderLM2(thoughts=1)")
        >>> config.backbone.hidden_size
        64
    """

    model_type: ClassVar[str] = "pondera"
    sub_configs_defaults: ClassVar[dict[str, Any]] = {"backbone": SubConfigSpec(AutoConfig, model_type="llama")}

    backbone: dict | PreTrainedConfig | str | None = None
    think: str | None = None
    memory: str | None = None
    segment: str | None = None
    head: str | None = None
    init: str = "hf"
    embed_scale: float | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        # Whoever holds a config may ask AutoModelForCausalLM for its model, which registers itself when imported.
        importlib.import_module("pondera.model.lm")
        self._checkpoint: str | None = None
        self._retrofit = False
        if isinstance(self.backbone, str):
            self._checkpoint, found = self.backbone, _checkpoint_config(self.backbone)
            self._retrofit = isinstance(found, AdaptiveConfig)
            if isinstance(found, AdaptiveConfig):
                found, self.init = found.get_text_config(), found.init
            self.backbone = found
        elif not isinstance(self.backbone, PreTrainedConfig):
            self.backbone = backbone_config(self.backbone or {"model_type": "llama"})
        if self.init not in INITS:
            raise unknown("init", str(self.init), INITS)
        if self._checkpoint and not self._retrofit and self.init != "hf":
            raise UserError(f"init: {self.init!r} would overwrite the weights of {self._checkpoint!r}; use init: hf")
        if self.think is not None and self.segment is not None:
            raise UserError(
                f"think: {self.think} and segment: {self.segment} both decide what the layers are run on, which is not "
                "combined yet; leave one of them out"
            )
        if self.memory is not None and (other := self.think or self.segment):
            raise UserError(
                f"memory: {self.memory} and {other} both decide what the cache holds, which is not combined yet; leave one "
                "of them out"
            )
        for seam in spec.SEAMS:
            if getattr(self, seam) is not None:
                parsed = spec.parse(getattr(self, seam))
                spec.find(parsed.name, seam)
                setattr(self, seam, spec.format(parsed))
        kwargs.setdefault("tie_word_embeddings", getattr(self.backbone, "tie_word_embeddings", False))
        kernel = kwargs.get("attn_implementation") or self.backbone._attn_implementation
        super().__post_init__(**kwargs)
        if kernel is not None:
            self._attn_implementation = kernel  # of the backbone, too

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """From a ``config.json``, whose backbone must be written out: a name would fetch weights from elsewhere.

        The backbone may have fields that its config class does not declare, as those of many checkpoints do.
        """
        if isinstance(config_dict.get("backbone"), str) or "_checkpoint" in config_dict:
            raise UserError(
                "config.json names another checkpoint (backbone), whose weights would be fetched; what Pondera saved does "
                "not: give the folder of a trained model"
            )
        if isinstance(backbone := config_dict.get("backbone"), dict):
            config_dict = {**config_dict, "backbone": backbone_config(backbone, saved=True)}
        return super().from_dict(config_dict, **kwargs)

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """The backbone's config: what transformers asks for head counts, vocabulary and layer types."""
        return self.backbone if isinstance(self.backbone, PreTrainedConfig) else self

    def to_dict(self) -> dict[str, Any]:
        """The config as plain mappings; where weights once came from is left out, they are saved beside it."""
        tree = super().to_dict()
        for mark in ("_checkpoint", "_retrofit"):
            tree.pop(mark, None)
        return tree


def backbone_config(tree: dict[str, Any], saved: bool = False) -> PreTrainedConfig:
    """A transformers config from a mapping, with unknown architectures and fields refused by name.

    Args:
        tree: ``model_type`` and any fields of that architecture's config.
        saved: the mapping is from a saved model. Its unknown fields are kept, as transformers keeps them.
    """
    tree = dict(tree)
    name = tree.pop("model_type", None)
    if not isinstance(name, str):
        raise UserError("backbone: needs a model_type (llama, mistral, qwen3, gemma3_text, gpt_neox, gpt2, ...)")
    if name not in CONFIG_MAPPING:
        raise unknown("backbone model_type", name, CONFIG_MAPPING.keys())
    config_class = CONFIG_MAPPING[name]
    if not saved:
        _check_fields(tree, name)
    try:
        return config_class(**tree)
    except Exception as error:
        raise UserError(f"backbone: {name} refuses these settings: {str(error).splitlines()[-1].strip()}") from error


def _check_fields(tree: dict[str, Any], name: str) -> None:
    default = CONFIG_MAPPING[name]()
    allowed = set(default.to_dict()) | set(type(default).attribute_map) | {"attn_implementation", "dtype"}
    for key in tree:
        # A leading underscore or a generation field may stand in a config.json that transformers itself wrote.
        if key not in allowed and not key.startswith("_") and not hasattr(default, key):
            raise unknown(f"{name} setting", f"backbone.{key}", [f"backbone.{field}" for field in allowed])


def _checkpoint_config(path: str) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(path)
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(
            f"backbone: {path!r} is neither a checkpoint folder (with config.json) nor a model that could be fetched: "
            f"{str(error).splitlines()[0]}"
        ) from None


AutoConfig.register(AdaptiveConfig.model_type, AdaptiveConfig, exist_ok=True)
