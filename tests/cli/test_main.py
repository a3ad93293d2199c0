"""The command line as a user meets it: help, mistakes and exit codes, mostly in processes of their own."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pondera import __version__
from pondera.cli import main as cli
from pondera.cli.main import VERBS, main
from pondera.core import run_config, spec
from pondera.core.errors import Failure, Interrupted
from pondera.core.run_config import RunConfig
from pondera.core.run_folder import Run

SOURCES = Path(cli.__file__).parents[2]
HEAVY = ("torch", "transformers", "tokenizers", "datasets", "matplotlib", "rich")


def pondera(*words, **given):
    """Runs the command in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(SOURCES), "COLUMNS": "120"}
    return subprocess.run(
        [sys.executable, "-m", "pondera", *words], capture_output=True, text=True, timeout=60, env=environment, **given
    )


@pytest.fixture
def said(capsys):
    """Runs the command here; returns its exit code and what it wrote to stdout and stderr."""

    def run(*words):
        code = main(words)
        return code, *capsys.readouterr()

    return run


# Help


def test_help_of_everything_loads_nothing_heavy():
    script = f"""
import sys
from pondera.cli.main import VERBS, main
codes = [main(["--help"]), main([]), main(["--version"]), main(["methods"]), main(["methods", "PonderLM2"])]
for verb in VERBS:
    try:
        main([verb, "--help"])
    except SystemExit as exit:
        codes.append(exit.code)
mistakes = ("trian", "train plian", "train plain --train.stesp 1", "eval ./no", "eval ./no --data.text ./no", "doctor no")
mistakes += ("generate ./no --prompt a", "report no", "compare plain plian")
for words in mistakes:
    codes.append(main(words.split()))
print(codes, [name for name in {HEAVY} if name in sys.modules])
"""
    environment = {**os.environ, "PYTHONPATH": str(SOURCES)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, env=environment)
    assert done.stdout.splitlines()[-1] == f"{[0] * (5 + len(VERBS)) + [2] * 9} []", done.stdout + done.stderr


def test_version_and_help_as_processes():
    assert pondera("--version").stdout == f"pondera {__version__}\n"
    done = pondera("train", "--help")
    assert done.returncode == 0 and done.stderr == ""
    for name, field in run_config.fields().items():
        assert f"--{name} VALUE" in done.stdout
        assert field.metadata["help"].split(",")[0][:40] in done.stdout
    for recipe in run_config.recipe_names():
        assert f"\n  {recipe}\n" in done.stdout


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_says_what_it_does_by_example(verb, capsys):
    with pytest.raises(SystemExit) as exit:
        main([verb, "--help"])
    assert exit.value.code == 0
    assert f"\n  pondera {verb}" in capsys.readouterr().out.partition("examples:")[2]


def test_help_names_every_verb(said):
    code, out, _ = said("--help")
    assert code == 0
    assert all(f"\n  {verb} " in out and module.SUMMARY in out for verb, module in VERBS.items())


# Mistakes


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("trian", "unknown verb 'trian'; did you mean 'train'?"),
        ("--verson", "unknown option '--verson'; did you mean '--version'?"),
        ("train", "the following arguments are required: RECIPE; `pondera train --help`"),
        ("train plian", "unknown recipe 'plian'; did you mean 'plain'?"),
        ("train nowhere.yaml", "no such file: 'nowhere.yaml'; give a YAML file or a recipe (adaponderlm,"),
        ("train plain more", "unrecognized arguments: more;"),
        ("train plain --steps 3", "unknown option --steps; did you mean --train.steps?"),
        ("train plain --resum", "unknown option --resum; did you mean --resume"),
        ("train plain --xyzzy 3", "unknown option --xyzzy (`pondera train --help` lists them all)"),
        ("train plain --train.stpes 3", "unknown setting 'train.stpes'; did you mean 'train.steps'"),
        ("train plain --trian.steps 3", "unknown option --trian.steps; did you mean --train.steps?"),
        ("train plain --train.steps", "--train.steps needs a value"),
        ("train plain --train.steps --resume", "--train.steps needs a value"),
        ("train plain --train.steps many", "train.steps: expected int, got 'many'"),
        ("train plain --backbone.a.b 1 --backbone.a 2 --train.lr x", "train.lr: expected float, got 'x'"),
        ("train plain --train.lr.x 1", "--train.lr.x: 'lr' is 0.006 here, not a group of settings"),
        ("train plain --backbone ./nowhere", "backbone: no such folder: './nowhere'"),
        ("train plain --think PonderLLM3", "think: unknown think method 'PonderLLM3'; did you mean 'PonderLM3'"),
        ("train plain --think PonderLM2(", "think: cannot read this spec"),
        ("train plain --memory PonderLM2", "memory: PonderLM2 is a think method; write think: PonderLM2(...)"),
        ("compare plain --seeds 0", "argument --seeds: expected a whole number of at least 1, got '0'"),
        ("compare plain --seeds 1.5", "argument --seeds: expected a whole number"),
        ("compare plain --equal time", "argument --equal: invalid choice: 'time'"),
        ("compare plain --flops -3", "argument --flops: expected a number above 0, got '-3'"),
        ("compare plain plian", "unknown recipe 'plian'"),
        ("eval ./nowhere", "no such folder: './nowhere'"),
        ("eval ./nowhere --train.lr 1", "unknown option --train.lr"),
        ("eval ./nowhere --data.txt x", "unknown setting 'data.txt'; did you mean 'text'"),
        ("eval ./nowhere --max-tokens 0", "argument --max-tokens: expected a whole number of at least 1"),
        ("generate ./nowhere", "the following arguments are required: --prompt"),
        ("generate ./nowhere --promt a", "unknown option --promt; did you mean --prompt?"),
        ("generate ./nowhere --prompt a --greedy --temperature 1", "--greedy does not sample"),
        ("generate ./nowhere --prompt a --temperature nan", "argument --temperature: expected a number at least 0"),
        ("generate ./nowhere --prompt a --top-p 0", "argument --top-p: expected a number above 0 and at most 1"),
        ("report nowhere", "no such folder: 'nowhere'"),
        ("report .", "no run in '.'"),
        ("methods pondrlm", "unknown method or seam 'pondrlm'; did you mean 'PonderLM'"),
        ("methods kvcache", "unknown method or seam 'kvcache'; did you mean 'kv_cache'"),
        ("doctor plian", "unknown recipe 'plian'"),
        ("doctor plain --jason", "unknown option --jason"),
    ],
)
def test_mistakes(words, message, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = said(*words.split(" "))
    assert (code, out) == (2, "")
    assert err.startswith("pondera: ") and message in err and "Traceback" not in err
    assert not any(tmp_path.iterdir()), "nothing is written before the input is found good"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"train: {steps: 3", "not valid YAML: line 1"),
        (b"\xff\xfe", "not a text file"),
        (b"- a list", "expected a mapping of settings"),
        (b"base: plian", "base: unknown recipe 'plian'; did you mean 'plain'?"),
        (b"tarin: {steps: 3}", "unknown setting 'tarin'; did you mean 'train'"),
    ],
)
def test_files_that_are_no_recipe(content, message, said, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_bytes(content)
    for verb in ("train", "compare", "doctor"):
        code, out, err = said(verb, str(file))
        assert (code, out) == (2, "") and message in err


def test_a_prompt_that_is_no_text():
    done = pondera("generate", "./nowhere", "--prompt", b"\xff")
    assert done.returncode == 2 and "--prompt: not UTF-8 text" in done.stderr


# Exit codes


@pytest.mark.parametrize(
    ("raised", "code", "message"),
    [
        (Failure("the disk is full"), 1, "pondera: the disk is full\n"),
        (Interrupted("stopped after step 3"), 130, "pondera: stopped after step 3\n"),
        (KeyboardInterrupt(), 130, "pondera: interrupted\n"),
    ],
)
def test_failures_end_without_a_traceback(raised, code, message, said, monkeypatch):
    def fail(seams):
        raise raised

    monkeypatch.setattr(spec, "index", fail)
    assert said("methods") == (code, "", message)


def test_a_terminal_obeys_no_message(said, monkeypatch):
    """Messages quote what files hold: a document's name may carry anything."""
    evil = "windows 3 (a\x1b[2J\x9b31m\u202e)\r\nWhat to try"
    for error in (Failure(evil), ValueError(evil)):
        monkeypatch.setattr(spec, "index", lambda seams, error=error: (_ for _ in ()).throw(error))
        code, _, err = said("methods")
        assert code == 1 and r"windows 3 (a\x1b[2J\x9b31m\u202e)\r" in err
        assert all(character.isprintable() or character == "\n" for character in err)


def test_a_bug_keeps_its_traceback(said, monkeypatch):
    monkeypatch.setattr(spec, "index", lambda seams: 1 // 0)
    code, _, err = said("methods")
    assert code == 1 and "Traceback" in err and "ZeroDivisionError" in err
    assert "please report it" in err.splitlines()[-1]


def test_a_reader_that_has_seen_enough():
    command = f"{sys.executable} -m pondera methods | true; echo ${{PIPESTATUS[0]}}"
    environment = {**os.environ, "PYTHONPATH": str(SOURCES)}
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, env=environment)
    assert "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr
    assert done.stdout.strip() in ("0", "1"), "0 if all of it had been written before the reader left"


# Verbs that need no model


def test_methods_as_json(said):
    code, out, err = said("methods", "--json")
    listed = json.loads(out)
    assert code == 0 and err == ""
    assert [entry["name"] for entry in listed] == list(spec.index(spec.SEAMS + spec.PARTS + spec.TASKS + spec.FLOWS))
    assert all(
        entry["seam"] in spec.SEAMS + spec.PARTS + spec.TASKS + spec.FLOWS and entry["summary"] for entry in listed
    )
    one = json.loads(said("methods", "PonderLM2", "--json")[1])
    assert one["paper"] == "PonderLM-2, arXiv 2509.23184"
    assert one["documentation"].startswith(one["summary"]) and "Args:" in one["documentation"]


def test_methods_are_listed_under_their_seam(said):
    """Each seam has one heading, with as many methods below it as it says."""
    code, out, _ = said("methods")
    headings = re.findall(r"^== (\w+) \((\d+)\): .+ ==$", out, re.MULTILINE)
    seams = spec.SEAMS + spec.PARTS + spec.TASKS + spec.FLOWS
    counts = {seam: sum(method.seam == seam for method in spec.index(seams).values()) for seam in seams}
    assert code == 0 and {seam: int(count) for seam, count in headings} == counts
    assert out.index("== think") < out.index("PonderLM2: ") < out.index("== kv_cache") < out.index("SnapKV: ")


@pytest.mark.parametrize(
    ("asked", "there", "not_there"),
    [
        ("kv_cache", ["SnapKV: ", "VQKV: "], ["PonderLM2: ", "== think"]),
        ("kv-cache", ["SnapKV: "], ["PonderLM2: "]),
        ("task", ["StateTracking: "], ["SnapKV: "]),
        ("kv", ["SnapKV: ", "VQKV: "], ["PonderLM2: "]),
        ("ponder", ["AdaPonderLM: ", "PonderLM3: "], ["ThinkAtHard: "]),
    ],
)
def test_methods_of_a_seam_or_with_a_name(asked, there, not_there, said):
    code, out, _ = said("methods", asked)
    assert code == 0 and all(text in out for text in there) and not any(text in out for text in not_there)
    names = {entry["name"] for entry in json.loads(said("methods", asked, "--json")[1])}
    assert {text.removesuffix(": ") for text in there} <= names


def test_one_method_in_any_case(said):
    assert said("methods", "ponderlm2") == said("methods", "PonderLM2")
    assert "Args:" in said("methods", "vqkv")[1]


def test_methods_of_ones_own(said, tmp_path, monkeypatch):
    (tmp_path / "think").mkdir()
    (tmp_path / "think" / "my_idea.py").write_text('import missing\nclass MyIdea:\n    """Thinks."""\n    cost = "2"\n')
    monkeypatch.setenv("PONDERA_METHODS", str(tmp_path))
    assert "MyIdea: Thinks." in said("methods")[1]
    assert "think: MyIdea()" in said("methods", "MyIdea")[1]


def test_report_finds_the_runs_in_a_folder(said, tmp_path):
    for name in ("a", "deep/b"):
        run = Run.create(tmp_path / "runs" / name, RunConfig(name=name))
        run.log(step=10, tokens=100, loss=3.0)
    page = tmp_path / "page.html"
    code, out, err = said("report", str(tmp_path / "runs"), str(tmp_path / "runs" / "a"), "--out", str(page))
    assert (code, err) == (0, "")
    assert out.startswith(f"{page}: 2 runs")
    assert "<html" in page.read_text()
    code, _, err = said("report", str(tmp_path / "runs" / "a"), "--out", str(tmp_path))
    assert code == 2 and "is a folder" in err
