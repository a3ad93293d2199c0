"""The run folder survives crashes, full disks and NaN, and says what is wrong with a folder that is none."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys

import pytest

from pondera.core.errors import UserError
from pondera.core.run_config import RunConfig, TrainConfig
from pondera.core.run_folder import Run, is_run, write_atomic


@pytest.fixture
def run(tmp_path):
    return Run.create(tmp_path / "deep" / "run", RunConfig(name="plain", train=TrainConfig(seed=7)))


def test_create_then_open(run):
    assert is_run(run.path)
    opened = Run.open(run.path)
    assert opened.config == RunConfig(name="plain", train=TrainConfig(seed=7))
    assert opened.env["seed"] == 7 and opened.env["python"] and opened.env["cpus"] == os.cpu_count()
    assert opened.metrics() == [] and opened.result() is None and opened.traces() == {} and opened.checkpoints() == []


def test_create_refuses_what_is_there(run, tmp_path):
    with pytest.raises(UserError, match="already contains a run"):
        Run.create(run.path, RunConfig())
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty"):
        Run.create(tmp_path, RunConfig())
    with pytest.raises(UserError, match="is a file"):
        Run.create(tmp_path / "notes.txt", RunConfig())
    run.log(step=1)
    assert Run.create(run.path, RunConfig(name="again"), exist_ok=True).config.name == "again"
    assert run.metrics() == [{"step": 1}]


def test_open_says_what_is_missing(run, tmp_path):
    with pytest.raises(UserError, match="no such run folder"):
        Run.open(tmp_path / "nowhere")
    with pytest.raises(UserError, match="config.yaml and env.json missing"):
        Run.open(tmp_path)
    run.env_file.unlink()
    with pytest.raises(UserError, match="not a run folder: env.json missing"):
        Run.open(run.path)


def test_damaged_config_names_its_file(run):
    run.config_file.write_text("trian: {}\n")
    with pytest.raises(UserError, match=r"config\.yaml: .*trian.*did you mean 'train'"):
        run.config  # noqa: B018


def test_not_a_number_becomes_null(run):
    class Scalar:
        def tolist(self):
            return float("inf")

    run.log(step=1, loss=float("nan"), terms={"ponder": float("-inf"), "list": [1.0, float("nan")], "array": Scalar()})
    run.write_result({"loss": float("nan")})
    [line] = run.metrics_file.read_text().splitlines()
    strict = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert strict == {"step": 1, "loss": None, "terms": {"ponder": None, "list": [1.0, None], "array": None}}
    assert run.result() == {"loss": None}


@pytest.mark.parametrize("torn", [b'{"step": 2, "lo', b'{"step": 2}', b"\x00\x00\xff"])
def test_torn_last_line_is_dropped_and_healed(run, torn):
    run.log(step=1)
    with open(run.metrics_file, "ab") as file:
        file.write(torn)
    assert run.metrics() == [{"step": 1}]
    run.log(step=3)
    assert run.metrics() == [{"step": 1}, {"step": 3}]


def test_torn_first_line_is_healed(run):
    run.metrics_file.write_bytes(b'{"st')
    run.log(step=1)
    assert run.metrics() == [{"step": 1}]


@pytest.mark.parametrize("line", ["oops", "[1]"])
def test_damage_elsewhere_is_named(run, line):
    run.metrics_file.write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
    with pytest.raises(UserError, match="line 2: not a JSON object"):
        run.metrics()


def test_lines_are_on_disk_at_once(run):
    run.log(step=1, text="é\u2028")
    assert Run.open(run.path).metrics() == [{"step": 1, "text": "é\u2028"}]


def test_truncate_after_forgets_later_steps(run):
    for step in (10, 20, 30):
        run.log(step=step, loss=0.1 + step)
    run.truncate_after(20)
    assert run.metrics() == [{"step": 10, "loss": 10.1}, {"step": 20, "loss": 20.1}]


def test_checkpoints_are_complete_and_ordered(run):
    for step in (1_000_000, 200, 100):
        with run.saving(step) as folder:
            (folder / "model.safetensors").write_bytes(b"x")
    with pytest.raises(RuntimeError), run.saving(300) as folder:
        (folder / "model.safetensors").write_bytes(b"x")
        raise RuntimeError
    for stray in ("step-000400", "step-000500.partial", ".step-000600.partial", "other"):
        (run.checkpoints_dir / stray).mkdir()
    (run.checkpoints_dir / "step-000500.partial" / "half").write_text("")
    assert [path.name for path in run.checkpoints()] == ["step-000100", "step-000200", "step-1000000"]
    with run.saving(100) as folder:
        (folder / "newer").write_text("")
    assert [file.name for file in run.checkpoints()[0].iterdir()] == ["newer"]


def test_traces_by_name(run):
    run.write_trace("sample", {"tokens": ["a"], "passes": [2], "nll": [float("nan")]})
    assert run.traces() == {"sample": {"tokens": ["a"], "passes": [2], "nll": [None]}}


def test_full_disk_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch):
    path = tmp_path / "file.json"
    write_atomic(path, "old")

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(path, b"new" * 1000)
    assert path.read_text() == "old" and [file.name for file in tmp_path.iterdir()] == ["file.json"]


def test_write_atomic_replaces(tmp_path):
    path = tmp_path / "file"
    write_atomic(path, "é")
    write_atomic(path, b"\x00")
    assert path.read_bytes() == b"\x00" and len(list(tmp_path.iterdir())) == 1


def test_importing_it_loads_no_torch():
    code = (
        "import sys, pondera.core.run_folder, pondera.report.page; print({'torch', 'transformers'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout == b"set()\n"
