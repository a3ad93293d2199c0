"""Checkpoints: Hugging Face folders that training can resume from, written atomically.

    RUN/checkpoints/step-000100/
      config.json, model.safetensors, tokenizer...   loads with AutoModelForCausalLM
      lora.safetensors                               the factors of LoRA, which the weights above contain, if the run has it
      optimizer.pt                                   AdamW moments by parameter name, for any number of processes
      state.json                                     the step, and the running averages of the next metrics line
      manifest.json                                  sizes and hashes of all files

The final model, RUN/model, is such a folder without optimizer and state.

Nothing else is needed: learning rate, data order and random numbers are functions of step and seed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pondera.core.errors import Failure
from pondera.core.run_folder import Run

if TYPE_CHECKING:
    from torch import Tensor

    from pondera.models.adaptive_lm import AdaptiveLM

MANIFEST, STATE, OPTIMIZER, LORA = "manifest.json", "state.json", "optimizer.pt", "lora.safetensors"


def save(
    run: Run,
    step: int,
    model: AdaptiveLM,
    weights: dict[str, Tensor],
    optimizer: dict[str, Any],
    state: dict[str, Any],
    tokenizer: Path,
    keep: int,
    lora: dict[str, Tensor] | None = None,
) -> None:
    """Writes a checkpoint, then deletes all but the newest `keep`.

    Args:
        run: the run of the checkpoint.
        step: number of completed optimizer steps.
        model: provides the configs.
        weights: all weights, by name.
        optimizer: optimizer state, by parameter name.
        state: other state of the training, as JSON.
        tokenizer: a tokenizer folder.
        keep: number of checkpoints to keep, including this one.
        lora: the factors of LoRA, by name; default: `None`, the run has no LoRA.

    Raises:
        Failure: writing failed, or weights are not finite. Earlier checkpoints are unchanged.
    """
    import torch
    from safetensors.torch import save_file

    try:
        with run.saving(step) as folder:
            write_model(folder, model, weights, tokenizer)
            if lora:
                save_file({name: tensor.contiguous() for name, tensor in lora.items()}, folder / LORA)
            torch.save(optimizer, folder / OPTIMIZER)
            (folder / STATE).write_text(json.dumps(state))
            _seal(folder)
        _flush(run.checkpoints_dir)
    except Failure:
        raise
    except Exception as error:  # libraries raise different exceptions for a full disk
        last = run.checkpoints()
        kept = f"{last[-1].name} is intact: free disk space, then continue with --resume" if last else "none"
        raise Failure(
            f"the checkpoint of step {step} could not be written ({error}); the last checkpoint: {kept}"
        ) from error
    for path in run.checkpoints()[:-keep]:
        shutil.rmtree(path, ignore_errors=True)


def export(run: Run, model: AdaptiveLM, weights: dict[str, Tensor], tokenizer: Path) -> None:
    """Writes the final model to ``RUN/model`` atomically.

    Raises:
        Failure: writing failed, or weights are not finite.
    """
    partial = run.model_dir.with_name(f".{run.model_dir.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        write_model(partial, model, weights, tokenizer)
        _seal(partial)
        shutil.rmtree(run.model_dir, ignore_errors=True)
        os.replace(partial, run.model_dir)
    except Failure:
        raise
    except Exception as error:
        raise Failure(
            f"the model could not be written ({error}); free disk space, then finish the run with --resume"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_model(folder: Path, model: AdaptiveLM, weights: dict[str, Tensor], tokenizer: Path) -> None:
    """Writes a folder that ``AutoModelForCausalLM`` and ``AutoTokenizer`` can load."""
    bad = next((name for name, tensor in weights.items() if not tensor.isfinite().all()), None)
    if bad is not None:
        raise Failure(f"{bad} has non-finite weights, so nothing was saved; try a lower learning rate")
    tied = model.all_tied_weights_keys  # weights gathered from shards include copies of tied ones
    model.save_pretrained(folder, state_dict={name: tensor for name, tensor in weights.items() if name not in tied})
    shutil.copytree(tokenizer, folder, dirs_exist_ok=True)


def newest_intact(run: Run) -> tuple[Path | None, list[str]]:
    """Finds the newest intact checkpoint.

    Returns:
        The folder, or `None` if there is no intact checkpoint; and a message for each newer damaged one.
    """
    complaints = []
    for folder in reversed(run.checkpoints()):
        damage = find_damage(folder)
        if damage is None:
            return folder, complaints
        complaints.append(f"{folder} is damaged ({damage})")
    return None, complaints


def find_damage(folder: Path) -> str | None:
    """Describes the damage of a checkpoint or final model; `None` if all files match the manifest."""
    try:
        files = json.loads((folder / MANIFEST).read_bytes())
        for name, wanted in files.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != wanted["bytes"]:
                return f"{name} has {path.stat().st_size} bytes instead of {wanted['bytes']}"
            if _sha256(path) != wanted["sha256"]:
                return f"{name} does not match its hash"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"no readable {MANIFEST}"
    return None


def quarantine(run: Run, keep: Path | None) -> None:
    """Renames the damaged checkpoints that are newer than `keep`, so that they are not loaded."""
    for folder in reversed(run.checkpoints()):
        if folder == keep:
            return
        aside = folder.with_name(f"damaged-{folder.name}")
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)


def read_state(folder: Path) -> dict[str, Any]:
    """Reads the `state` of a checkpoint."""
    return json.loads((folder / STATE).read_bytes())


def read_optimizer(folder: Path) -> dict[str, Any]:
    """Reads the `optimizer` of a checkpoint; only tensors are unpickled."""
    import torch

    return torch.load(folder / OPTIMIZER, map_location="cpu", weights_only=True)


def _seal(folder: Path) -> None:
    """Writes the manifest of a complete folder and flushes its files to disk."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    described = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in files
    }
    (folder / MANIFEST).write_text(json.dumps(described, indent=1))
    _flush(folder)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(folder: Path) -> None:
    """Flushes a folder and its files to disk, so that they survive a power failure."""
    for path in [*folder.iterdir(), folder]:
        if path.is_file() or path == folder:
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
