"""Builds the model of a RunConfig and checks that it fits its tokenizer and text."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pondera.arch.dimensions import LINEAR, layer_kinds
from pondera.core.errors import UserError
from pondera.core.run_config import DataConfig, RunConfig, TrainConfig
from pondera.core.run_folder import Run, is_run
from pondera.core.spec import SEAMS, build
from pondera.data.text import HUB_NAME
from pondera.data.tokenizer import bpe_size, load_tokenizer
from pondera.inference.default_model import model_folder
from pondera.models import checkpoints

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from pondera.models.adaptive_lm import AdaptiveLM
    from pondera.models.config import AdaptiveConfig


def resolve(config: RunConfig) -> RunConfig:
    """Fills in the backbone path and the tokenizer: a checkpoint uses its own tokenizer, a run its final model.

    A tokenizer other than the default is kept, unless it would be trained again for a checkpoint of Pondera.

    Raises:
        UserError: the backbone is a folder that does not exist, or a run that is not finished; or LoRA without a checkpoint.
    """
    if not isinstance(config.backbone, str):
        if config.train.lora:
            raise UserError(
                f"train.lora: {config.train.lora}: LoRA freezes the backbone, and this one has new weights; give a trained "
                "one, e.g. --backbone smollm2 or --backbone RUN, or leave train.lora out"
            )
        return config
    path = _model_folder(str(model_folder(config.backbone)))
    config, folder, chosen = dataclasses.replace(config, backbone=path), Path(path), config.data.tokenizer
    if folder.is_dir() and not any(folder.glob("tokenizer*")):
        return config
    if chosen == DataConfig.tokenizer or (_is_ours(folder) and bpe_size(chosen)):
        return dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=path))
    return config


def _model_folder(path: str) -> str:
    """The final model of a run; any other path, or a hub name, unchanged.

    A running job rotates its checkpoints, so its newest checkpoint cannot serve as a backbone.
    """
    run = Run(Path(path).expanduser())
    if not run.path.is_dir() and not HUB_NAME.fullmatch(path):
        raise UserError(f"backbone: no such folder: {path!r}; give a run, a model folder, or a hub name")
    if not is_run(run.path):
        return path
    if (run.model_dir / "config.json").is_file():
        return str(run.model_dir)
    saved = run.checkpoints()
    either = f", or give one of its checkpoints, e.g. {saved[-1]}" if saved else ""
    raise UserError(f"backbone: the run {path!r} is not finished; finish it with --resume{either}")


def _is_ours(folder: Path) -> bool:
    """Whether Pondera wrote this model folder."""
    try:
        return json.loads((folder / "config.json").read_bytes())["model_type"] == "pondera"
    except (OSError, ValueError, KeyError, TypeError):
        return False


def new_model(config: RunConfig, vocab_size: int) -> AdaptiveLM:
    """The model of a run before its first step, in float32, initialised from ``train.seed`` or a checkpoint.

    Args:
        config: the config of the run.
        vocab_size: vocabulary size of the tokenizer; the default for a backbone given as a mapping.

    Raises:
        UserError: there is no backbone, its vocabulary differs from the tokenizer's, the context exceeds its positions,
            the checkpoint is damaged, ``train.freeze_backbone_steps`` or ``train.lr_scale`` names parameters that the
            model does not have, or ``train.lora`` does not fit its layers.

    Example:
        >>> from pondera.core.run_config import from_dict
        >>> sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        >>> model = new_model(from_dict({"backbone": {"model_type": "llama", **sizes}}), vocab_size=97)
        >>> model.backbone.config.vocab_size
        97
    """
    import torch

    from pondera.models.adaptive_lm import AdaptiveLM

    adaptive = adaptive_config(config, vocab_size)
    folder = Path(config.backbone) if isinstance(config.backbone, str) else None
    if folder and (folder / checkpoints.MANIFEST).is_file() and (damage := checkpoints.find_damage(folder)):
        raise UserError(f"backbone: {folder} is damaged ({damage}); copy it again or give another folder")
    torch.manual_seed(config.train.seed)
    model = AdaptiveLM(adaptive).float()
    check_freeze_backbone(model, config.train)
    check_lr_scale(model, config.train)
    if config.train.lora:
        from pondera.training.lora import put_lora

        put_lora(model, config.train)
    return model


def check_freeze_backbone(model: AdaptiveLM, settings: TrainConfig) -> None:
    """Refuses ``freeze_backbone_steps`` if no parameter would train in these steps."""
    steps = settings.freeze_backbone_steps
    if steps < 0:
        raise UserError(f"train.freeze_backbone_steps: at least 0, got {steps}")
    if steps and (what := _nothing_added(model)):
        raise UserError(
            f"train.freeze_backbone_steps: {what}, so nothing would train in the first {steps} steps; "
            "use --train.freeze_backbone_steps 0"
        )


def check_lr_scale(model: AdaptiveLM, settings: TrainConfig) -> None:
    """Refuses an ``lr_scale`` that would scale nothing."""
    if settings.lr_scale != 1 and (what := _nothing_added(model)):
        raise UserError(
            f"train.lr_scale: {what}, so there is no learning rate to scale by {settings.lr_scale:g}; leave "
            "train.lr_scale out, and use --train.lr for the backbone"
        )


def _nothing_added(model: AdaptiveLM) -> str:
    """Why no method adds a parameter to the backbone; empty if one does."""
    if any(parameter.numel() for parameter in model.added_parameters()):
        return ""
    return f"{model.chosen} adds no parameters" if model.method is not None else "there is no method with parameters"


def reads_as_before(config: RunConfig) -> bool:
    """Whether the backbone is a checkpoint that uses the tokenizer of its own folder."""
    if not isinstance(config.backbone, str):
        return False
    if config.backbone == config.data.tokenizer:
        return True
    folders = [Path(name).expanduser() for name in (config.backbone, config.data.tokenizer)]
    return all(folder.is_dir() for folder in folders) and folders[0].samefile(folders[1])


def set_special_tokens(model: AdaptiveLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Sets the special token ids of the tokenizer on a new model, so that `generate` stops at the end of a text."""
    end = tokenizer.eos_token_id
    pad = end if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    for place in (model.backbone.config, model.backbone.lm.generation_config, model.generation_config):
        place.bos_token_id, place.eos_token_id, place.pad_token_id = tokenizer.bos_token_id, end, pad


def add_end_token(model: AdaptiveLM, end: int) -> None:
    """Adds the tokenizer's EOS to the end tokens of a checkpoint; training ends every document with it."""
    known = model.generation_config.eos_token_id
    ends = [] if known is None else known if isinstance(known, list) else [known]
    if end not in ends:
        model.generation_config.eos_token_id = [*ends, end] if ends else end


def adaptive_config(config: RunConfig, vocab_size: int) -> AdaptiveConfig:
    from pondera.models.config import AdaptiveConfig

    given = config.backbone
    if not isinstance(given, (dict, str)) or not given:
        raise UserError(
            f"backbone: {given!r}; give a mapping, e.g. {{model_type: llama, hidden_size: 128, num_hidden_layers: 3}}, "
            "or a checkpoint folder"
        )
    tree = {"vocab_size": vocab_size, **given} if isinstance(given, dict) else given
    parts: dict[str, Any] = {seam: getattr(config, seam) for seam in SEAMS}
    adaptive = AdaptiveConfig(backbone=tree, init=config.init, **parts)
    if isinstance(given, dict) and adaptive.head:
        build(adaptive.head, "head").check_untrained()
    inner = adaptive.get_text_config()
    _check_vocabulary(config, inner.vocab_size, vocab_size)
    _check_same_tokens(config)
    if config.data.document_mask and LINEAR in layer_kinds(inner):
        raise UserError(
            f"data.document_mask: the linear-attention layers of {inner.model_type} carry their state from one document "
            "to the next; use data.document_mask: false"
        )
    context, limit = config.data.context, getattr(inner, "max_position_embeddings", None)
    if limit is not None and limit < context:
        names = {"max_position_embeddings", inner.attribute_map.get("max_position_embeddings")}
        if isinstance(given, str) or names & given.keys():
            raise UserError(
                f"data.context: {context} tokens exceed the {limit} positions of the backbone; use --data.context "
                f"{limit}" + ("" if isinstance(given, str) else f" or --backbone.max_position_embeddings {context}")
            )
        inner.max_position_embeddings = context
    return adaptive


def _check_vocabulary(config: RunConfig, model_size: int, tokenizer_size: int) -> None:
    """Refuses a backbone whose vocabulary size differs from the tokenizer's.

    A checkpoint may have more embeddings than its tokenizer has tokens. Its own tokenizer may also have more tokens than
    embeddings; `train` then checks the text.
    """
    own = isinstance(config.backbone, str)
    padded = own and not bpe_size(config.data.tokenizer) and tokenizer_size < model_size
    if tokenizer_size == model_size or padded or reads_as_before(config):
        return
    advice = (
        f"use the checkpoint's own tokenizer: --data.tokenizer {config.backbone}"
        if own
        else f"leave backbone.vocab_size out, or set it to {tokenizer_size}"
    )
    raise UserError(
        f"backbone.vocab_size: the backbone has {model_size} tokens and the tokenizer {config.data.tokenizer!r} has "
        f"{tokenizer_size}; {advice}"
    )


def _check_same_tokens(config: RunConfig) -> None:
    """Refuses a tokenizer whose tokens differ from those in the folder of a Pondera checkpoint, even at equal size."""
    chosen, folder = config.data.tokenizer, config.backbone
    if not isinstance(folder, str) or chosen == folder or not _is_ours(Path(folder)):
        return
    if any(Path(folder).glob("tokenizer*")):
        own, given = (load_tokenizer(spec).get_vocab() for spec in (folder, chosen))
        if not own.items() <= given.items():
            raise UserError(
                f"data.tokenizer: the tokens of {chosen!r} differ from those of {folder!r}; leave data.tokenizer out, "
                f"or use --data.tokenizer {folder}"
            )
