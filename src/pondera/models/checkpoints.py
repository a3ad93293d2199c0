"""Checkpoints: Hugging Face folders that training can go on from, whole or not there at all.

    RUN/checkpoints/step-000100/
      config.json, model.safetensors, tokenizer...   loads with AutoModelForCausalLM by itself
      optimizer.pt                                   AdamW's moments by parameter name, on any number of processes
      state.json                                     the step, and what was being averaged for the next metrics line
      manifest.json                                  sizes and hashes of all of these

The final model, RUN/model, is such a folder without the optimizer and the state.

Nothing else has to be kept: learning rate, data order and random numbers are functions of the step and the seed.
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

MANIFEST, STATE, OPTIMIZER = "manifest.json", "state.json", "optimizer.pt"


def save(
    run: Run,
    step: int,
    model: AdaptiveLM,
    weights: dict[str, Tensor],
    optimizer: dict[str, Any],
    state: dict[str, Any],
    tokenizer: Path,
    keep: int,
) -> None:
    """Writes a checkpoint, then forgets all but the newest `keep`.

    Args:
        run: the run that it belongs to.
        step: optimizer steps done.
        model: for its configs.
        weights: all of them, by name.
        optimizer: state of the optimizer, by parameter name.
        state: what else training needs to go on; JSON.
        tokenizer: a tokenizer folder.
        keep: how many checkpoints to keep, this one included.

    Raises:
        Failure: it could not be written, or the weights are not finite. Earlier checkpoints are as they were.
    """
    import torch

    try:
        with run.saving(step) as folder:
            write_model(folder, model, weights, tokenizer)
            torch.save(optimizer, folder / OPTIMIZER)
            (folder / STATE).write_text(json.dumps(state))
            _seal(folder)
        _flush(run.checkpoints_dir)
    except Failure:
        raise
    except Exception as error:  # each library has its own way to say that the disk is full
        last = run.checkpoints()
        kept = f"{last[-1].name} is intact: make room, then go on with --resume" if last else "there is none yet"
        raise Failure(
            f"the checkpoint of step {step} could not be written ({error}); the last checkpoint: {kept}"
        ) from error
    for path in run.checkpoints()[:-keep]:
        shutil.rmtree(path, ignore_errors=True)


def export(run: Run, model: AdaptiveLM, weights: dict[str, Tensor], tokenizer: Path) -> None:
    """Writes the final model to ``RUN/model``, in one move.

    Raises:
        Failure: it could not be written, or the weights are not finite.
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
            f"the model could not be written ({error}); make room, then finish the run with --resume"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_model(folder: Path, model: AdaptiveLM, weights: dict[str, Tensor], tokenizer: Path) -> None:
    """A folder that ``AutoModelForCausalLM`` and ``AutoTokenizer`` load."""
    bad = next((name for name, tensor in weights.items() if not tensor.isfinite().all()), None)
    if bad is not None:
        raise Failure(f"{bad} has weights that are not finite, so nothing was saved; try a lower learning rate")
    tied = model.all_tied_weights_keys  # gathered from shards, tied weights come as copies
    model.save_pretrained(folder, state_dict={name: tensor for name, tensor in weights.items() if name not in tied})
    shutil.copytree(tokenizer, folder, dirs_exist_ok=True)


def newest_intact(run: Run) -> tuple[Path | None, list[str]]:
    """The checkpoint to go on from, and what is wrong with newer ones.

    Returns:
        The folder, or none if there is no checkpoint that is whole; and a sentence for each damaged one passed over.
    """
    complaints = []
    for folder in reversed(run.checkpoints()):
        damage = find_damage(folder)
        if damage is None:
            return folder, complaints
        complaints.append(f"{folder} is damaged ({damage})")
    return None, complaints


def find_damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint or final model, or none if all its files are what was written."""
    try:
        files = json.loads((folder / MANIFEST).read_bytes())
        for name, wanted in files.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != wanted["bytes"]:
                return f"{name} has {path.stat().st_size} bytes instead of {wanted['bytes']}"
            if _sha256(path) != wanted["sha256"]:
                return f"{name} has other content than was written"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"no readable {MANIFEST}"
    return None


def quarantine(run: Run, keep: Path | None) -> None:
    """Renames the checkpoints that are newer than `keep`, so that no one takes them for whole."""
    for folder in reversed(run.checkpoints()):
        if folder == keep:
            return
        aside = folder.with_name(f"damaged-{folder.name}")
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)


def read_state(folder: Path) -> dict[str, Any]:
    """The `state` that a checkpoint was saved with."""
    return json.loads((folder / STATE).read_bytes())


def read_optimizer(folder: Path) -> dict[str, Any]:
    """The `optimizer` that a checkpoint was saved with; tensors only, nothing that could run."""
    import torch

    return torch.load(folder / OPTIMIZER, map_location="cpu", weights_only=True)


def _seal(folder: Path) -> None:
    """Writes the manifest of a folder that is whole, and has all of it put on the disk."""
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
    """Has the system put a folder and the files in it on the disk, so that a power cut cannot take them back."""
    for path in [*folder.iterdir(), folder]:
        if path.is_file() or path == folder:
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
