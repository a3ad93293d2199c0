"""Builds the kernels of this folder with the user's C compiler, once for each machine, and loads them.

A library is found again by what it was made of: sources, flags, and the macros that the compiler defines, which tell its
version and what the CPU can do. Its file also has the digest of its bytes in its name, so one that was cut short or
changed is seen, and built again. It appears under that name in one move; processes that build the same one at once do the
work twice and harm no one.

Kernels have threads of their own, made for a call and gone after it (``parallel.h``). OpenMP would keep them, and a process
that was forked after it used OpenMP waits for them for ever, as torch itself does there.
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
"""No -ffast-math: kernels rely on infinities, and on comparisons with what is no number."""
FOR_THIS_CPU = (("-march=native",), ("-mcpu=native",), ())
"""The first of these that the compiler takes."""
DIGITS = 16
"""Of a digest, in the name of a file."""
OFF = "PONDERA_NATIVE=0 turns them off"
PATIENCE = 300
"""Seconds for a compiler."""

log = logging.getLogger(__name__)


class Unavailable(Exception):
    """Why there are no native kernels."""


def library(name: str) -> ctypes.CDLL | None:
    """The kernels of ``NAME.c``, built at first use; None where they are off or cannot be built.

    ``PONDERA_NATIVE=0`` turns all of them off; the environment variable CC names another compiler. Why one cannot be built
    is said once in the log. Calls of its functions let other Python threads run.

    Args:
        name: of the source, without ``.c``.

    Example:
        >>> kernels = library("nearest")
        >>> kernels is None or hasattr(kernels, "nearest")
        True
    """
    if _off():
        return None
    found = _found(name)
    return None if isinstance(found, str) else found


def why_not(name: str) -> str:
    """Why `library` has no such kernels; empty where it has. Builds them if it can."""
    if _off():
        return OFF
    found = _found(name)
    return found if isinstance(found, str) else ""


def kernels() -> list[str]:
    """The names of all that there are."""
    return sorted(source.stem for source in HERE.glob("*.c"))


def _off() -> bool:
    return os.environ.get("PONDERA_NATIVE", "1") == "0"


@functools.cache
def _found(name: str) -> ctypes.CDLL | str:
    """The library, or why there is none; the same for as long as the process lives."""
    try:
        return load(HERE / f"{name}.c", cache_folder() / "native")
    except Unavailable as reason:
        _say(str(reason))
        return str(reason)


@functools.cache
def _say(reason: str) -> None:
    """Once for all kernels."""
    log.warning("no native kernels: %s; what they do goes on more slowly (PONDERA_NATIVE=0 silences this)", reason)


def load(source: Path, cache: Path) -> ctypes.CDLL:
    """The library of a source, from a folder of libraries, where it is left if it has to be built.

    Raises:
        Unavailable: no compiler, one that fails, or a folder that cannot be written to.
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
    """The command that compiles for this CPU, and the macros that it defines."""
    given = shlex.split(os.environ.get("CC", ""))
    path = shutil.which(given[0]) if given else next(filter(None, map(shutil.which, COMPILERS)), None)
    if path is None:
        raise Unavailable(f"no C compiler ({given[0] if given else ', '.join(COMPILERS)} is not there)")
    said = ""
    for for_this_cpu in FOR_THIS_CPU:
        command = [path, *given[1:], *FLAGS, *for_this_cpu]
        macros = _run([*command, "-dM", "-E", "-x", "c", os.devnull])
        if macros.returncode == 0:
            return command, macros.stdout
        said = said or macros.stderr
    raise Unavailable(f"{path} does not compile: {_gist(said)}")


def _built(command: list[str], source: Path, name: Path) -> Path:
    """Compiles to a file beside the final one, which it then becomes."""
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


def _gist(said: str) -> str:
    """The first error of what a compiler said."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return next((line for line in lines if "error" in line), lines[-1] if lines else "it does not say why")
