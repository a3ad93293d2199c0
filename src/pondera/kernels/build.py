"""Compiles the C kernels with the compiler of the user, once per machine, and loads them.

The cache key of a library is the hash of its sources, flags, and the macros that the compiler defines, which depend on its
version and the CPU. The file name also has the digest of the file, so a damaged library is detected and rebuilt. A library is
renamed to its final name atomically; concurrent builds are redundant but harmless.

Kernels create threads per call (``parallel.h``). OpenMP would keep its threads, and a process that is forked after using OpenMP
would wait for them forever, as torch does in that case.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

from pondera.core.paths import cache_folder

HERE = Path(__file__).parent / "c"
COMPILERS = ("cc", "gcc", "clang")
FLAGS = ("-std=gnu11", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fPIC", "-shared", "-pthread")
"""No -ffast-math: kernels rely on infinities and on comparisons with NaN."""
FOR_THIS_CPU = (("-march=native",), ("-mcpu=native",), ())
"""The first of these that the compiler supports is used."""
DIGITS = 16
"""Number of digits of a digest in a file name."""
OFF = "disabled by PONDERA_NATIVE=0"
PATIENCE = 300
"""Time limit of the compiler in seconds."""

log = logging.getLogger(__name__)


class Unavailable(Exception):
    """A native kernel is not available; the message has the reason."""


def library(name: str) -> ctypes.CDLL | None:
    """The library of ``NAME.c``, compiled on first use, or `None` if kernels are disabled or cannot be compiled.

    ``PONDERA_NATIVE=0`` disables all kernels; the environment variable CC selects the compiler. The reason of a failure is
    logged once. Calls of the functions release the GIL.

    Args:
        name: name of the source file, without ``.c``.

    Example:
        >>> kernels = library("nearest")
        >>> kernels is None or hasattr(kernels, "nearest")
        True
    """
    found = OFF if os.environ.get("PONDERA_NATIVE") == "0" else _found(name)
    return None if isinstance(found, str) else found


def why_not(name: str) -> str:
    """The reason why `library` returns `None`; empty if the kernel is available. Compiles it if necessary."""
    found = OFF if os.environ.get("PONDERA_NATIVE") == "0" else _found(name)
    return found if isinstance(found, str) else ""


def kernels() -> list[str]:
    """The names of all kernels."""
    return sorted(source.stem for source in HERE.glob("*.c"))


@functools.cache
def _found(name: str) -> ctypes.CDLL | str:
    """The library or the reason why it is not available, cached for the process."""
    try:
        return load(HERE / f"{name}.c", cache_folder() / "native")
    except Unavailable as reason:
        _say(str(reason))
        return str(reason)


@functools.cache
def _say(reason: str) -> None:
    """Logs a reason once."""
    log.warning(
        "no native kernels: %s; the slower torch implementation is used (PONDERA_NATIVE=0 silences this)", reason
    )


def load(source: Path, cache: Path) -> ctypes.CDLL:
    """Loads the library of a source from a cache folder; compiles it if it is missing or damaged.

    Raises:
        Unavailable: no compiler, a failed compilation, or a folder that is not writable.
    """
    command, macros = _compiler()
    parts = [source, *sorted(source.parent.glob("*.h"))]
    made_of = [*command, macros, *(part.read_text() for part in parts)]
    key = hashlib.sha256("\0".join(made_of).encode()).hexdigest()[:DIGITS]
    try:
        for file in cache.glob(f"{source.stem}-{key}-*.so"):
            if file.stem.rpartition("-")[2] == _digest(file):
                return ctypes.CDLL(str(file))
            file.unlink(missing_ok=True)
        cache.mkdir(parents=True, exist_ok=True)
        return ctypes.CDLL(str(_built(command, source, cache / f"{source.stem}-{key}")))
    except OSError as error:
        raise Unavailable(f"{error.strerror or error} ({cache}, which PONDERA_CACHE sets)") from None


def _compiler() -> tuple[list[str], str]:
    """The command that compiles for this CPU, and the macros that the compiler defines."""
    given = shlex.split(os.environ.get("CC", ""))
    path = shutil.which(given[0]) if given else next(filter(None, map(shutil.which, COMPILERS)), None)
    if path is None:
        raise Unavailable(f"no C compiler ({given[0] if given else ', '.join(COMPILERS)} not found)")
    errors = ""
    for for_this_cpu in FOR_THIS_CPU:
        command = [path, *given[1:], *FLAGS, *for_this_cpu]
        macros = _run([*command, "-dM", "-E", "-x", "c", os.devnull])
        if macros.returncode == 0:
            return command, macros.stdout
        errors = errors or macros.stderr
    raise Unavailable(f"{path} does not compile: {_gist(errors)}")


def _built(command: list[str], source: Path, name: Path) -> Path:
    """Compiles to a temporary file in the same folder and renames it."""
    handle, draft = tempfile.mkstemp(suffix=".draft", dir=name.parent)
    os.close(handle)
    try:
        done = _run([*command, str(source), "-o", draft, "-lm"])
        if done.returncode:
            raise Unavailable(f"{command[0]} does not compile {source.name}: {_gist(done.stderr)}")
        with open(draft, "rb+") as file:
            os.fsync(file)
        final = name.parent / f"{name.name}-{_digest(Path(draft))}.so"
        os.replace(draft, final)
        return final
    finally:
        Path(draft).unlink(missing_ok=True)


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=PATIENCE,
            env={**os.environ, "LC_ALL": "C"},
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"{command[0]} does not run: {error}") from None


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:DIGITS]


def _gist(output: str) -> str:
    """The first error line in the output of a compiler."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return next((line for line in lines if "error" in line), lines[-1] if lines else "no error message")
