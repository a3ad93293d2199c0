"""Packed run folders: what is unpacked is what was packed, and the same files give the same bytes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pondera.cli.main import main
from pondera.core.archive import ARCHIVE, pack, unpack
from pondera.core.errors import UserError
from pondera.core.run_config import RunConfig
from pondera.core.run_folder import Run


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    for name in ("plain-seed0", "deep-seed0"):
        run = Run.create(tmp_path / "runs" / name, RunConfig(name=name))
        run.log(step=10, tokens=100, loss=3.0)
        run.write_result({"bits_per_byte": 2.5})
    (tmp_path / "runs" / "plain-seed0" / "odd").write_bytes(bytes(range(256)) * 9)
    (tmp_path / "runs" / "plain-seed0" / "empty").touch()
    return tmp_path / "runs"


def test_unpack_restores_what_was_packed(runs: Path, tmp_path: Path):
    assert pack(runs, tmp_path / ARCHIVE) == len(contents(runs)) == 10
    found = unpack(tmp_path / ARCHIVE, tmp_path / "again")
    assert [path.name for path in found] == ["deep-seed0", "plain-seed0"]
    assert contents(tmp_path / "again") == contents(runs)


def test_the_same_files_give_the_same_bytes(runs: Path, tmp_path: Path):
    pack(runs, tmp_path / "first")
    for path in runs.rglob("*"):
        os.utime(path, (1, 1))
        path.chmod(0o700)
    pack(runs, tmp_path / "second")
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()
    (runs / "plain-seed0" / "odd").write_bytes(b"other")
    pack(runs, tmp_path / "second")
    assert (tmp_path / "first").read_bytes() != (tmp_path / "second").read_bytes()


def test_what_cannot_be_packed_or_unpacked_is_refused(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    for folder in ("empty", "missing"):
        with pytest.raises(UserError, match="nothing to pack"):
            pack(tmp_path / folder, tmp_path / ARCHIVE)
    (tmp_path / "broken").write_bytes(b"this is not an archive")
    for archive in ("broken", "missing", "empty"):
        with pytest.raises(UserError, match=f"cannot unpack .*{archive}"):
            unpack(tmp_path / archive, tmp_path / "out")


def test_a_report_reads_packed_runs(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """From the archive, from its folder, and beside loose runs, each run once; the page shows where they are packed."""
    pack(runs, tmp_path / "packed" / ARCHIVE)
    page = tmp_path / "page.html"
    for given in (["packed"], [f"packed/{ARCHIVE}"], ["packed", f"packed/{ARCHIVE}"]):
        assert main(["report", *(str(tmp_path / name) for name in given), "--out", str(page)]) == 0
        assert f"{page}: 2 runs" in capsys.readouterr().out
        assert f"<small>{tmp_path}/packed/{ARCHIVE}/deep-seed0" in page.read_text()
    assert main(["report", str(tmp_path), "--out", str(page)]) == 0
    assert f"{page}: 4 runs" in capsys.readouterr().out
    assert contents(tmp_path / "packed").keys() == {ARCHIVE}
