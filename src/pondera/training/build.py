"""From a RunConfig to a model that can be trained on its text."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pondera.arch.dimensions import LINEAR, layer_kinds
from pondera.core.errors import UserError
from pondera.core.run_config import DataConfig, RunConfig, TrainConfig
from pondera.core.run_folder import Run, is_run
from pondera.core.spec import SEAMS
from pondera.data.text import HUB_NAME
from pondera.data.tokenizer import bpe_size, load_tokenizer
from pondera.models import checkpoints

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from pondera.models.adaptive_lm import AdaptiveLM
    from pondera.models.config import AdaptiveConfig


def resolve(config: RunConfig) -> RunConfig:
    """`config` with what follows from it written out: a checkpoint is read with its own tokenizer, a run by its model.

    A tokenizer that was chosen, that is any but the default, stays; but to a model of ours none is trained anew.

    Raises:
        UserError: the backbone is a folder that is not there, or a run that has not come to its end.
    """
    if not isinstance(config.backbone, str):
        return config
    path = _model_folder(config.backbone)
    config, folder, chosen = dataclasses.replace(config, backbone=path), Path(path), config.data.tokenizer
    if folder.is_dir() and not any(folder.glob("tokenizer*")):
        return config
    if chosen == DataConfig.tokenizer or (_is_ours(folder) and bpe_size(chosen)):
        return dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=path))
    return config


def _model_folder(path: str) -> str:
    """The final model of a run; any other path, or a hub name, as it is.

    Checkpoints of a run that goes on come and go, so no other run is built on whichever is the newest.
    """
    run = Run(Path(path).expanduser())
    if not run.path.is_dir() and not HUB_NAME.fullmatch(path):
        raise UserError(f"backbone: no such folder: {path!r}; give a run, a model folder, or a hub name")
    if not is_run(run.path):
        return path
    if (run.model_dir / "config.json").is_file():
        return str(run.model_dir)
    found = run.checkpoints()
    either = f", or give one of its checkpoints, such as {found[-1]}" if found else ""
    raise UserError(f"backbone: the run {path!r} is not finished; go on with it with --resume{either}")


def _is_ours(folder: Path) -> bool:
    """Whether a model folder was written by Pondera."""
    try:
        return json.loads((folder / "config.json").read_bytes())["model_type"] == "pondera"
    except (OSError, ValueError, KeyError, TypeError):
        return False


def new_model(config: RunConfig, vocab_size: int) -> AdaptiveLM:
    """The model of a run before its first step, in float32, with weights from ``train.seed`` or the checkpoint.

        Args:
            config: what it is made of.
            vocab_size: of the tokenizer; a backbone given as a mapping takes it over.

        Raises:
            UserError: no backbone, a vocabulary that is not the tokenizer's, a context that does not fit, a checkpoint that
                is damaged, or nothing to learn in the steps of ``train.freeze_backbone_steps``.

        Example:
            >>> from pondera.arch.dimensions import LINEAR, layer_kinds
    from pondera.core.run_config import from_dict
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
        raise UserError(f"backbone: {folder} is damaged ({damage}); copy it again or give another one")
    torch.manual_seed(config.train.seed)
    model = AdaptiveLM(adaptive).float()
    check_freeze_backbone(model, config.train)
    return model


def check_freeze_backbone(model: AdaptiveLM, settings: TrainConfig) -> None:
    """Refuses a first phase of training in which nothing could learn."""
    steps = settings.freeze_backbone_steps
    if steps < 0:
        raise UserError(f"train.freeze_backbone_steps: at least 0, got {steps}")
    if steps and not (model.method is not None and any(p.numel() for p in model.method.parameters())):
        what = f"{model.chosen} adds no parameters" if model.method is not None else "there is no think method"
        raise UserError(
            f"train.freeze_backbone_steps: {what}, so nothing would learn in the first {steps} steps; use --train.freeze_backbone_steps 0"
        )


def reads_as_before(config: RunConfig) -> bool:
    """Whether a checkpoint is read with the tokenizer in its own folder."""
    if not isinstance(config.backbone, str):
        return False
    if config.backbone == config.data.tokenizer:
        return True
    folders = [Path(name).expanduser() for name in (config.backbone, config.data.tokenizer)]
    return all(folder.is_dir() for folder in folders) and folders[0].samefile(folders[1])


def set_special_tokens(model: AdaptiveLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Tells a new model the ids of its tokenizer's special tokens, so that `generate` knows where a text ends."""
    end = tokenizer.eos_token_id
    pad = end if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    for place in (model.backbone.config, model.backbone.lm.generation_config, model.generation_config):
        place.bos_token_id, place.eos_token_id, place.pad_token_id = tokenizer.bos_token_id, end, pad


def add_end_token(model: AdaptiveLM, end: int) -> None:
    """Adds a tokenizer's EOS, which ends every document in training, to the end tokens of a checkpoint."""
    known = model.generation_config.eos_token_id
    ends = [] if known is None else known if isinstance(known, list) else [known]
    if end not in ends:
        model.generation_config.eos_token_id = [*ends, end] if ends else end


def adaptive_config(config: RunConfig, vocab_size: int) -> AdaptiveConfig:
    from pondera.models.config import AdaptiveConfig

    given = config.backbone
    if not isinstance(given, (dict, str)) or not given:
        raise UserError(
            f"backbone: {given!r}; give a mapping such as {{model_type: llama, hidden_size: 128, num_hidden_layers: 3}}, "
            "or a checkpoint folder"
        )
    tree = {"vocab_size": vocab_size, **given} if isinstance(given, dict) else given
    parts: dict[str, Any] = {seam: getattr(config, seam) for seam in SEAMS}
    adaptive = AdaptiveConfig(backbone=tree, init=config.init, **parts)
    inner = adaptive.get_text_config()
    _check_vocabulary(config, inner.vocab_size, vocab_size)
    _check_same_tokens(config)
    if config.data.document_mask and LINEAR in layer_kinds(inner):
        raise UserError(
            f"data.document_mask: {inner.model_type} has linear-attention layers, whose state runs on from one document into "
            "the next; use data.document_mask: false"
        )
    context, limit = config.data.context, getattr(inner, "max_position_embeddings", None)
    if limit is not None and limit < context:
        names = {"max_position_embeddings", inner.attribute_map.get("max_position_embeddings")}
        if isinstance(given, str) or names & given.keys():
            raise UserError(
                f"data.context: {context} tokens do not fit the {limit} positions of the backbone; use --data.context "
                f"{limit}" + ("" if isinstance(given, str) else f" or --backbone.max_position_embeddings {context}")
            )
        inner.max_position_embeddings = context
    return adaptive


def _check_vocabulary(config: RunConfig, model_size: int, tokenizer_size: int) -> None:
    """Equal, but for a checkpoint: its vocabulary is often padded beyond its tokenizer's, and its own tokenizer may have
    more tokens than it embeds, which `train` looks for in the text."""
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
    """A tokenizer of the right size may still have other tokens; those of a model of ours stand beside it."""
    chosen, folder = config.data.tokenizer, config.backbone
    if not isinstance(folder, str) or chosen == folder or not _is_ours(Path(folder)):
        return
    if any(Path(folder).glob("tokenizer*")):
        own, given = (load_tokenizer(spec).get_vocab() for spec in (folder, chosen))
        if not own.items() <= given.items():
            raise UserError(
                f"data.tokenizer: {chosen!r} has other tokens than {folder!r} was trained with; leave data.tokenizer out, "
                f"or use --data.tokenizer {folder}"
            )
