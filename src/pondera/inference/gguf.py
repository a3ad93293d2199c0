"""Converts a GGUF file into a model folder of safetensors, once, in the cache folder."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from pondera.core.errors import UserError
from pondera.core.paths import cache_folder
from pondera.data.text import first_line

FORMAT = 1  # increase it whenever the folder of the same file changes
MAGIC = b"GGUF"
EXTRA = 'pip install "pondera[gguf]"'

log = logging.getLogger(__name__)


def is_gguf(path: Path) -> bool:
    """Whether a path is a file that is named as a GGUF file."""
    return path.suffix.lower() == ".gguf" and path.is_file()


def convert(file: Path, cache_dir: Path | None = None) -> Path:
    """The folder of the converted file: float32 weights, config, tokenizer and chat template.

    transformers reads the file and rounds nothing: each weight is the number that its code stands for. The folder is named
    after the sha256 of the file and written once; concurrent processes wait for the first.

    Args:
        file: a GGUF file of an architecture that transformers reads.
        cache_dir: where the folder goes; default: ``$PONDERA_CACHE`` or ``~/.cache/pondera``.

    Raises:
        UserError: the file is not GGUF or damaged, its architecture is not supported, the package ``gguf`` is not
            installed, or the cache folder cannot be written.

    Cost: the float32 weights on disk, 0.54 GB for 135 M parameters; later calls only hash the file.

    Example::

        folder = convert(Path("SmolLM2-135M-Instruct.Q4_1.gguf"))
    """
    from filelock import FileLock

    digest = _digest(file)
    folder = cache_folder(cache_dir) / "models" / f"{file.stem}-{digest[:16]}"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not (folder / "config.json").is_file():
                _write(file, folder)
    except OSError as error:
        raise UserError(
            f"cannot write the converted weights of {file.name} to {str(folder)!r} ({error.strerror or first_line(error)}); "
            "set PONDERA_CACHE to a writable folder with free space"
        ) from None
    return folder


def _digest(file: Path) -> str:
    """The sha256 of the file; refuses what does not begin as a GGUF file."""
    found = hashlib.sha256(str(FORMAT).encode())
    try:
        with file.open("rb") as stream:
            if (begin := stream.read(len(MAGIC))) != MAGIC:
                raise UserError(f"{str(file)!r} is not a GGUF file (it begins with {begin!r}); download it again")
            found.update(begin)
            while block := stream.read(1 << 22):
                found.update(block)
    except OSError as error:
        raise UserError(f"{str(file)!r} cannot be read ({error.strerror})") from None
    return found.hexdigest()


def _write(file: Path, folder: Path) -> None:
    """Writes the folder completely or not at all."""
    if importlib.util.find_spec("gguf") is None:
        raise UserError(f"{str(file)!r}: a GGUF file is read with the package gguf, which is not installed; {EXTRA}")
    log.warning("converting %s to %s, once", file.name, folder)
    parts = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    try:
        model, tokenizer = _read(file)
        model.save_pretrained(parts)
        tokenizer.save_pretrained(parts)
        os.replace(parts, folder)
    finally:
        shutil.rmtree(parts, ignore_errors=True)


def _read(file: Path) -> tuple[Any, Any]:
    """The model, without the mark of its quantizer, which could not be saved, and the tokenizer."""
    import torch
    from transformers import AutoTokenizer

    from pondera.core.hf import AutoModelForCausalLM

    place: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True}
    try:
        loading: Any = AutoModelForCausalLM.from_pretrained(
            str(file.parent), dtype=torch.float32, output_loading_info=True, **place
        )
        (read, info), tokenizer = loading, AutoTokenizer.from_pretrained(str(file.parent), **place)
    except Exception as error:  # a damaged file can raise anything
        raise UserError(
            f"{str(file)!r} cannot be converted ({first_line(error)}); give a GGUF file of a causal language model whose "
            "architecture transformers reads, or the folder of the original weights"
        ) from error
    if missing := sorted(info["missing_keys"]):
        raise UserError(
            f"{str(file)!r}: the weights are incomplete: missing {', '.join(missing[:3])}; download it again"
        )
    config = read.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        model = type(read)(config)
    model.load_state_dict(read.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = read.generation_config
    return model, tokenizer
