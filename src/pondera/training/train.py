"""`train`: trains a RunConfig into a run folder with metrics, checkpoints, a model and its result.

With several processes (torchrun, accelerate launch), all of them call `train` and the first one writes.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pondera.core.errors import Failure, Interrupted, UserError, unknown
from pondera.core.resume import again, check_free, reopened
from pondera.core.run_config import RunConfig, TrainConfig
from pondera.core.run_folder import Run
from pondera.core.stop_signals import stop_signals
from pondera.data.tokenizer import check_ids
from pondera.training.build import add_end_token, new_model, reads_as_before, resolve, set_special_tokens

if TYPE_CHECKING:
    from pondera.data.corpus import AnyCorpus, AnySplit
    from pondera.models.adaptive_lm import AdaptiveLM
    from pondera.training.callback import RunCallback
    from pondera.training.trainer import NotFinite, PonderaTrainer

FREE = {"log_every", "eval_every", "eval_tokens", "save_every", "keep"}
"""Settings of ``train`` that may change when a run is resumed: they affect logging and saving, not the weights."""

MOST_STEPS = 10**9

log = logging.getLogger(__name__)


def train(config: RunConfig, out: Path, resume: bool = False, progress: bool = True) -> Run:
    """Trains one model into a run folder.

    With ``resume=True`` an interrupted run continues from its newest intact checkpoint. It ends with the same weights,
    byte for byte, as an uninterrupted run. A finished run is returned unchanged.

    Args:
        config: the config of the run.
        out: the run folder; it must be new or empty, unless `resume`.
        resume: continue the run in `out`.
        progress: show a progress bar, or lines if stderr is not a terminal.

    Raises:
        UserError: settings, text, backbone or folder cannot be used.
        Failure: the disk is full, or the loss is not finite; the last checkpoint is intact.
        Interrupted: the process received SIGINT or SIGTERM; it finished and saved the current step.

    Example::

        run = train(load("ponderlm2", {"train.steps": 20}), Path("runs/first"))
        run.result()["bits_per_byte"]
    """
    check_settings(config.train)
    config, main = resolve(config), int(os.environ.get("RANK", 0)) == 0
    run = reopened(out, config, {f"train.{name}" for name in FREE}) if resume else Run(out)
    if resume and run.result() is not None:
        return run
    if main and not resume:
        check_free(out)

    from pondera.data.corpus import prepare

    corpus = prepare(config.data)
    with _quiet():
        from pondera.training.callback import RunCallback
        from pondera.training.trainer import NotFinite, PonderaTrainer, arguments

        model, start = _restored(run, corpus, main) if resume else (None, None)
        if model is None:
            model = new_model(config, corpus.vocab_size)
            _set_special_tokens(model, config, corpus)
        check_tokens(model, corpus)
        check_gradient_checkpointing(model, config.train)
        args = arguments(config.train, str(out), _num_processes())
        recorder = RunCallback(run, config, corpus, model, start, show=progress and main)
        windows = corpus.train.windows(config.data.context, config.data.document_mask)
        trainer = PonderaTrainer(model, args, config.train, windows, recorder.first_step, [recorder])
        trainer.accelerator.wait_for_everyone()  # all processes have checked the folder before it is created
        if main and not resume:
            Run.create(out, config)
        try:
            with stop_signals(trainer.ask_to_stop, trainer.is_world_process_zero()), recorder.watch:
                recorder.trainer = trainer
                trainer.train()
        except NotFinite as error:
            raise _explained(error, run, corpus.train, config) from None
        if recorder.stopped:
            raise Interrupted(f"stopped after step {trainer.state.global_step}; continue with: {again(run.path)}")
        _finish(recorder, trainer)
    return run


def _set_special_tokens(model: AdaptiveLM, config: RunConfig, corpus: AnyCorpus) -> None:
    """Sets the special tokens of the model; a checkpoint with its own tokenizer keeps its end tokens."""
    tokenizer: Any = corpus.tokenizer()
    if reads_as_before(config):
        add_end_token(model, tokenizer.eos_token_id)
    else:
        set_special_tokens(model, tokenizer)


def check_tokens(model: AdaptiveLM, corpus: AnyCorpus) -> None:
    """Refuses a corpus with a token that the model does not embed."""
    if corpus.vocab_size > model.embedded:  # otherwise no id can be too large
        for split in (corpus.train, corpus.validation):
            check_ids(split.ids, corpus.tokenizer(), model.embedded)


def _finish(recorder: RunCallback, trainer: PonderaTrainer) -> None:
    """Writes the final model, the traces and the result."""
    from pondera.models import checkpoints
    from pondera.training.lora import merge, merged

    run = recorder.run
    result = recorder.result()
    weights, _ = merged(trainer.snapshot()[0], run.config.train)
    recorder.on_main(lambda: checkpoints.export(run, recorder.model, weights, recorder.corpus.tokenizer_path))
    if trainer.args.world_size == 1:  # a forward pass of a sharded model needs all processes
        merge(recorder.model)  # the traces are those of the saved model, also of methods that read its weights
        recorder.on_main(recorder.write_sample)
    recorder.on_main(lambda: run.write_result(result))


def check_settings(settings: TrainConfig) -> None:
    """Refuses training settings that are out of range."""
    for name in ("steps", "batch_size", "log_every", "eval_every", "eval_tokens", "save_every", "keep"):
        if getattr(settings, name) < 1:
            raise UserError(f"train.{name}: at least 1, got {getattr(settings, name)}")
    if settings.steps > MOST_STEPS:
        raise UserError(f"train.steps: at most {MOST_STEPS:,}, got {settings.steps:.3g}")
    if settings.micro_batch_size is not None and settings.micro_batch_size < 1:
        raise UserError(f"train.micro_batch_size: at least 1, or null; got {settings.micro_batch_size}")
    for name in ("lr", "lr_scale", "grad_clip"):
        if not 0 < getattr(settings, name) < math.inf:
            raise UserError(f"train.{name}: a number above 0, got {getattr(settings, name)}")
    if not 0 <= settings.weight_decay < math.inf:
        raise UserError(f"train.weight_decay: a number of at least 0, got {settings.weight_decay}")
    for name in ("beta1", "beta2"):
        if not 0 <= getattr(settings, name) < 1:
            raise UserError(f"train.{name}: from 0 to below 1, got {getattr(settings, name)}")
    for name in ("warmup", "min_lr"):
        if not 0 <= getattr(settings, name) <= 1:
            raise UserError(f"train.{name}: a share from 0 to 1, got {getattr(settings, name)}")
    _check_lora(settings)
    if not 0 <= settings.seed < 2**32:
        raise UserError(f"train.seed: an integer from 0 to 2**32 - 1, got {settings.seed}")
    if settings.dtype not in ("float32", "bfloat16"):
        raise unknown("train.dtype", settings.dtype, ("float32", "bfloat16"))
    if settings.batch_size % _num_processes():
        raise UserError(
            f"train.batch_size: {settings.batch_size} windows cannot be split over {_num_processes()} processes; "
            f"use a multiple of {_num_processes()}"
        )


def _check_lora(settings: TrainConfig) -> None:
    """Refuses settings of LoRA that are out of range, or do nothing."""
    if settings.lora < 0:
        raise UserError(f"train.lora: a rank of at least 0 (0: off), got {settings.lora}")
    if not 0 < settings.lora_alpha < math.inf:
        raise UserError(f"train.lora_alpha: a number above 0, got {settings.lora_alpha}")
    if not settings.lora and settings.lora_alpha != TrainConfig.lora_alpha:
        raise UserError(
            f"train.lora_alpha: {settings.lora_alpha:g} scales nothing without LoRA; add --train.lora 8, or leave it out"
        )
    if settings.lora and settings.freeze_backbone_steps > 0:
        raise UserError(
            f"train.lora: {settings.lora} and train.freeze_backbone_steps: {settings.freeze_backbone_steps}: with LoRA the "
            "backbone is frozen in all steps; leave one of them out"
        )


def check_gradient_checkpointing(model: AdaptiveLM, settings: TrainConfig) -> None:
    """Refuses gradient checkpointing for a method that cannot recompute its passes."""
    if settings.gradient_checkpointing and model.method is not None and not model.method.supports_recompute:
        raise UserError(
            f"train.gradient_checkpointing: {model.chosen} reads a cache in training, so its passes cannot be recomputed; "
            "leave gradient_checkpointing out and use a smaller train.micro_batch_size"
        )


def _restored(run: Run, corpus: AnyCorpus, main: bool) -> tuple[AdaptiveLM | None, Path | None]:
    """The model of the newest intact checkpoint and its folder; `None` if there is no checkpoint yet."""
    from pondera.inference.load import load
    from pondera.models import checkpoints

    folder, complaints = checkpoints.newest_intact(run)
    if folder is None and complaints:
        raise Failure(f"no checkpoint is intact: {'; '.join(complaints)}; start again with another --out")
    if folder is not None and checkpoints.read_state(folder)["corpus"] != corpus.digest:
        raise UserError(
            f"the text or the tokenizer has changed since {folder.name} was saved; restore it, or start again with "
            "another --out"
        )
    if main:
        for complaint in complaints:
            log.warning("%s; the checkpoint was renamed to damaged-*", complaint)
        checkpoints.quarantine(run, folder)
        log.info("resuming from %s", folder.name if folder else "the start: there is no checkpoint yet")
        run.truncate_after(checkpoints.read_state(folder)["step"] if folder else 0)
    if folder is None:
        return None, None
    model = load(folder, device="cpu", kernels="torch").model.float()
    if run.config.train.lora:
        from pondera.training.lora import restore

        restore(model, new_model(run.config, corpus.vocab_size), folder)
    return model, folder


def _explained(error: NotFinite, run: Run, split: AnySplit, config: RunConfig) -> Failure:
    """The error message for a loss that is not finite: the batch, the last checkpoint and what to try."""
    context, windows = config.data.context, sorted(error.windows)
    named = []
    for window in windows[:8]:
        first, last = (split.document_at(token) for token in (window * context, (window + 1) * context))
        named.append(f"{window} ({first if first == last else f'{first} to {last}'})")
    more = f" and {len(windows) - 8} more" if len(windows) > 8 else ""
    folders = run.checkpoints()
    saved = f"the last good checkpoint is {folders[-1]}" if folders else "there is no checkpoint yet"
    return Failure(
        f"step {error.step}: the loss is {error.measured.loss} and the gradient norm {error.measured.grad_norm}, so "
        f"training stopped; {saved}.\nThe batch: windows {', '.join(named)}{more}.\n"
        f"Try a lower learning rate (--train.lr {config.train.lr / 3:.1g}), a longer warmup (--train.warmup "
        f"{min(1.0, 2 * config.train.warmup + 0.05):.2g}) or --train.dtype float32, or check these documents."
    )


def _num_processes() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences the logging and progress bars of transformers and accelerate."""
    from transformers.utils import logging as theirs

    verbosity, bars = theirs.get_verbosity(), theirs.is_progress_bar_enabled()
    accelerate = logging.getLogger("accelerate")
    level = accelerate.level
    theirs.set_verbosity_error()
    theirs.disable_progress_bar()
    accelerate.setLevel(logging.ERROR)
    try:
        yield
    finally:
        theirs.set_verbosity(verbosity)
        accelerate.setLevel(level)
        if bars:
            theirs.enable_progress_bar()
