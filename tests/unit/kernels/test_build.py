"""Native kernels: built once, found again, never trusted blindly, and never missed where they cannot be built."""

from __future__ import annotations

import ctypes
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pondera.kernels import build
from pondera.kernels.call import fit

needs_compiler = pytest.mark.skipif(not any(map(shutil.which, build.COMPILERS)), reason="no C compiler here")

SQUARES = """
#include "parallel.h"
static void square(void *task, long item) { long *numbers = task; numbers[item] *= numbers[item]; }
void squares(long *numbers, long count, long threads) { parallel(count, threads, square, numbers); }
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A kernel of its own."""
    shutil.copy(build.HERE / "parallel.h", tmp_path)
    file = tmp_path / "squares.c"
    file.write_text(SQUARES)
    return file


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def forgetful(monkeypatch: pytest.MonkeyPatch):
    """A process that has not asked for any kernel."""
    build._found.cache_clear()
    build._say.cache_clear()
    yield
    build._found.cache_clear()


def python(code: str, *arguments: Path) -> subprocess.Popen[str]:
    """Starts a process with this package."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    path = {"PYTHONPATH": str(build.HERE.parents[2])}
    return subprocess.Popen(command, stdin=-1, stdout=-1, text=True, env=os.environ | path)


def squares(library: ctypes.CDLL, threads: int, count: int = 1000) -> list[int]:
    numbers = (ctypes.c_long * count)(*range(count))
    library.squares(numbers, ctypes.c_long(count), ctypes.c_long(threads))
    return list(numbers)


def compilations(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Grows by one with each."""
    found: list[Path] = []
    compile_it = build._built
    monkeypatch.setattr(build, "_built", lambda *given: found.append(given[1]) or compile_it(*given))
    return found


@needs_compiler
def test_built_once_for_the_same_source_and_flags(source: Path, cache: Path, monkeypatch: pytest.MonkeyPatch):
    done = compilations(monkeypatch)
    for threads in (1, 2, 1000):
        assert squares(build.load(source, cache), threads) == [n * n for n in range(1000)]
    assert len(done) == 1
    source.write_text(SQUARES.replace("*=", "+="))
    assert squares(build.load(source, cache), 2) == [2 * n for n in range(1000)]
    (source.parent / "parallel.h").write_text("/* changed */" + (source.parent / "parallel.h").read_text())
    build.load(source, cache)
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-DOTHER"))
    build.load(source, cache)
    assert len(done) == 4 and len(list(cache.iterdir())) == 4


@needs_compiler
@pytest.mark.parametrize("harm", [lambda data: b"", lambda data: data[:5000], lambda data: data[:-1] + b"!"])
def test_a_broken_file_is_built_again(source: Path, cache: Path, harm, monkeypatch: pytest.MonkeyPatch):
    build.load(source, cache)
    (file,) = cache.iterdir()
    data = file.read_bytes()
    file.unlink()  # the one that is loaded stays as it was
    file.write_bytes(harm(data))
    done = compilations(monkeypatch)
    assert squares(build.load(source, cache), 1, 3) == [0, 1, 4]
    assert len(done) == 1 and [each.read_bytes() for each in cache.iterdir()] == [data]


@needs_compiler
def test_processes_that_build_at_once_do_not_harm_each_other(source: Path, cache: Path):
    code = (
        "import sys, pathlib, ctypes; from pondera.kernels import build; sys.stdin.readline();"
        "library = build.load(*map(pathlib.Path, sys.argv[1:]));"
        "numbers = (ctypes.c_long * 2)(3, 4); library.squares(numbers, ctypes.c_long(2), ctypes.c_long(2));"
        "print(list(numbers))"
    )
    processes = [python(code, source, cache) for _ in range(3)]
    for process in processes:  # all have imported what they need, and now start
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    assert [process.communicate(timeout=100)[0] for process in processes] == ["[9, 16]\n"] * 3
    assert {file.suffix for file in cache.iterdir()} == {".so"}


@needs_compiler
def test_a_forked_child_uses_kernels_after_its_parent_did(source: Path, cache: Path):
    code = (
        "import os, sys, signal, pathlib, ctypes, torch; from pondera.kernels import build\n"
        "torch.set_num_threads(2); torch.exp(torch.randn(300_000))  # its threads are there\n"
        "library = build.load(*map(pathlib.Path, sys.argv[1:]))\n"
        "numbers = (ctypes.c_long * 100)(*[2] * 100)\n"
        "library.squares(numbers, ctypes.c_long(100), ctypes.c_long(4))\n"
        "if child := os.fork():\n"
        "    sys.exit(os.waitpid(child, 0)[1])\n"
        "signal.alarm(20)\n"
        "library.squares(numbers, ctypes.c_long(100), ctypes.c_long(4))\n"
        "os._exit(set(numbers) != {16})\n"
    )
    process = python(code, source, cache)
    assert process.wait(timeout=100) == 0


def test_without_a_compiler_it_is_said_once(forgetful, caplog: pytest.LogCaptureFixture, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    with caplog.at_level(logging.WARNING):
        assert build.library("nearest") is None and build.library("nearest") is None and build.library("other") is None
    assert len(caplog.messages) == 1 and "no C compiler (cc, gcc, clang not found)" in caplog.messages[0]
    assert build.why_not("nearest").startswith("no C compiler")
    monkeypatch.setenv("CC", "no-such-compiler -O2")
    build._found.cache_clear()
    assert "no-such-compiler not found" in build.why_not("nearest")


@needs_compiler
def test_a_source_that_does_not_compile_says_why(source: Path, cache: Path):
    source.write_text(SQUARES + "\nint broken(void) { return nothing; }\n")
    with pytest.raises(build.Unavailable, match=r"does not compile squares\.c: .*error.*nothing"):
        build.load(source, cache)
    assert not list(cache.iterdir())


@needs_compiler
def test_a_folder_that_cannot_be_written_to(source: Path, tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(build.Unavailable, match="Not a directory.*PONDERA_CACHE"):
        build.load(source, tmp_path / "file" / "cache")


def test_turned_off(forgetful, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PONDERA_NATIVE", "0")
    assert build.library("nearest") is None
    assert build.why_not("nearest") == build.OFF


def test_what_kernels_take():
    x = torch.randn(4, 6)
    assert fit(x, torch.nn.Parameter(x), x[1:]) and not fit(x, x[:, 1:])
    assert not fit(x.double()) and not fit(x.to("meta"))
    taken = []

    @torch.compile(backend="eager")
    def traced(x: torch.Tensor) -> torch.Tensor:
        taken.append(fit(x))
        return x + 1

    traced(x)
    assert taken == [False]
