"""What README.md, the quickstart and the guides show is executed at small size, and their links and numbers are checked."""

from __future__ import annotations

import ast
import json
import lzma
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from helpers import gguf_files

import pondera
from pondera.cli.main import main
from pondera.core import run_config, spec
from pondera.core.effort import Effort

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "docs/quickstart.md", *sorted((ROOT / "docs/guides").glob("*.md"))]
HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
CHECKPOINT = "my_checkpoint"  # what stands in for it here
WIDTH = "--backbone.hidden_size 32 --backbone.intermediate_size 64 --data.tokenizer bpe-300".split()
SHORT = (
    """--data.context 32 --train.steps 14 --train.batch_size 2 --train.eval_tokens 64 --train.save_every 7""".split()
)


def shown(page: Path) -> str:
    """A page, with a local checkpoint in place of the one on the hub."""
    return page.read_text().replace(HUB, CHECKPOINT)


def blocks(page: Path) -> list[tuple[str, str]]:
    """The language and the text of each block of code."""
    return re.findall(r"^```(\w+)\n(.*?)^```", shown(page), re.DOTALL | re.MULTILINE)


def commands(page: Path) -> list[str]:
    return [line for language, block in blocks(page) if language == "bash" for line in block.splitlines()]


def write_books(folder: Path) -> None:
    books = folder / "my_books"
    books.mkdir()
    for number in range(12):
        lines = (f"Chapter {number}, line {line}: the sea was {'very ' * (line % 4)}calm.\n" for line in range(300))
        (books / f"book{number}.txt").write_text("".join(lines))
    (books / "letters.txt").write_text("Dear friend, the sea is calm today and I am well.\n" * 40)


def write_tasks(folder: Path) -> None:
    """Two rows each in the form of BLiMP and LAMBADA."""
    pairs = [{"sentence_good": "The sea was calm.", "sentence_bad": "The sea were calm.", "UID": uid} for uid in "ab"]
    texts = [{"text": "Dear friend, the sea is calm"}, {"text": "I am well"}]
    for name, rows in {"blimp": pairs, "lambada_test": texts}.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl.xz").write_bytes(lzma.compress(lines.encode()))


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the pages assume it: some books, and a checkpoint of transformers with its tokenizer."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("start")
    write_books(folder)
    books, run = str(folder / "my_books"), str(folder / "run")
    assert main(["train", "plain", "--data.text", books, "--out", run, *WIDTH, *SHORT, "--train.steps", "1"]) == 0
    tokenizer = AutoTokenizer.from_pretrained(f"{run}/model")
    tokenizer.save_pretrained(folder / CHECKPOINT)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder / CHECKPOINT)
    gguf_files.write(folder / "model.gguf", gguf_files.llama())
    return folder


@pytest.fixture
def folder(start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("my_books", CHECKPOINT):
        shutil.copytree(start / name, tmp_path / name)
    shutil.copytree(start / CHECKPOINT, tmp_path / "smollm2")
    shutil.copy(start / "model.gguf", tmp_path)
    (tmp_path / "graph.yaml").write_text("edges: [[start, a], [start, x], [a, x]]\nrewards: {x: 1.0}\n")
    write_tasks(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_a_page_shows_runs(page: Path, folder: Path, monkeypatch: pytest.MonkeyPatch):
    names: dict[str, object] = {}
    absent: set[str] = set()
    for language, block in blocks(page):
        if language == "bash":
            for line in block.splitlines():
                run(line, monkeypatch)
        elif language == "python":
            file = re.match(r"# (my_methods/\S+)\n", block)
            if file:
                (folder / file[1]).parent.mkdir(parents=True)
                (folder / file[1]).write_text(block)
            elif missing := {name for name in imported(block) if not hasattr(pondera, name)}:
                absent |= missing
            else:
                exec(compile(block, f"{page.name}, Python", "exec"), names)
        else:
            assert language in ("yaml", "text"), language
    if absent:
        pytest.skip(f"everything else ran; pondera does not offer {', '.join(sorted(absent))} yet")


def run(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs a command at small size; what it is told to write must be there then."""
    words = shlex.split(line, comments=True)
    if words[:2] == ["pip", "install"] or words[0] == "make":
        return
    with monkeypatch.context() as patch:
        while "=" in words[0]:
            patch.setenv(*words.pop(0).split("=", 1))
        assert words.pop(0) == "pondera", line
        assert main([*words, *smaller(words)]) == 0, line
    for flag, value in zip(words, words[1:], strict=False):
        assert flag not in ("--out", "--plot") or Path(value).exists(), f"{line}: no {value}"


def smaller(words: list[str]) -> list[str]:
    """What makes a command short."""
    if words[0] == "compress" and "--for" in words:
        return ["--tokens", "800"]
    if words[0] == "compress":
        return ["--data.context", "64", "--calibrate-tokens", "8192"]
    if words[0] == "bench":
        return ["--tokens", "700", "--contexts", "2"]
    if words[0] not in ("train", "compare", "doctor") or "--resume" in words:
        return []
    if words[1:] and words[1].startswith("flow-"):
        return ["--train.steps", "14"]
    return SHORT if "--backbone" in words else WIDTH + SHORT


def imported(block: str) -> set[str]:
    """What a block imports from the package itself."""
    found = [
        node for node in ast.walk(ast.parse(block)) if isinstance(node, ast.ImportFrom) and node.module == "pondera"
    ]
    return {alias.name for node in found for alias in node.names}


def test_the_first_screen_installs_loads_and_shows_a_number():
    first = "\n".join((ROOT / "README.md").read_text().splitlines()[:45])
    for wanted in ("pip install", "from pondera import load", "](docs/figures/", "| what you get |", "times as fast"):
        assert wanted in first, wanted


def test_the_readme_begins_with_the_description_of_the_package():
    about = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["description"]
    bold = re.search(r"\*\*(.*?)\*\*", (ROOT / "README.md").read_text(), re.DOTALL)
    assert bold and " ".join(bold[1].split()) == about


def test_the_advice_on_effort_is_what_effort_does():
    assert [Effort(share).passes(2) for share in (0, 0.25, 0.5, 0.51, 1)] == [1, 1, 1, 2, 2]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_methods_and_commands_in_the_text_exist(page: Path, capsys: pytest.CaptureFixture[str]):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for code in re.findall(r"`([^`\n]+)`", text):
        for written in re.findall(r'^[A-Z]\w+\(.*\)$|(?<=kv_cache=")[^"]+|(?<=--kv-cache ")[^"]+', code):
            name = spec.parse(written).name
            assert spec.build(written, spec.find(name).seam), written
        if code.startswith("pondera "):
            with pytest.raises(SystemExit) as ended:
                main([code.split()[1], "--help"])
            assert ended.value.code == 0, code
    capsys.readouterr()


def test_yaml_is_a_run():
    trees = [yaml.safe_load(block) for page in PAGES for language, block in blocks(page) if language == "yaml"]
    assert trees
    for tree in trees:
        tree["train"]["lr"] = float(
            tree["train"]["lr"]
        )  # plain YAML 1.1 reads 2e-3 as text; pondera's own reader does not
        assert run_config.from_dict(tree).think == tree["think"]


def test_make_targets_exist():
    text = "".join(page.read_text() for page in PAGES)
    targets = set(re.findall(r"`make (\w+)`|^make (\w+)", text, re.MULTILINE))
    makefile = (ROOT / "Makefile").read_text()
    assert targets and all(f"\n{one or other}:" in makefile for one, other in targets)


def test_generated_parts_say_what_the_results_say():
    words = [sys.executable, "-m", "tools.docs.build", "--check"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PONDERA_METHODS": ""})
    assert done.returncode == 0, f"{done.stdout}{done.stderr}\nrun: make docs"


def test_links_lead_somewhere():
    pages = (ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), ROOT / "results/README.md")
    links = {(page, link) for page in pages for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text())}
    assert not {f"{page.relative_to(ROOT)}: {link}" for page, link in links if not (page.parent / link).exists()}


def test_the_demo_goes_from_nothing_to_a_report(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    from pondera.comparison import demo
    from pondera.evaluation import kv_demo
    from pondera.evaluation.kv_bench import BenchSettings

    small = {"data.windows": 600, "train.eval_tokens": 160, "train.steps": 2, "train.batch_size": 2}
    monkeypatch.setattr(demo, "SETTINGS", {**demo.SETTINGS, **small})
    short = BenchSettings(("Needles(2)",), ("StreamingLLM(0.25)",), tokens=300, contexts=2)
    monkeypatch.setattr(kv_demo, "SETTINGS", short)
    assert main(["demo", "--out", "demo"]) == 0
    said = capsys.readouterr().out
    for expected in (
        "plain",
        "ponderlm2",
        "adaptivelatentcot",
        "error rate",
        "difficulty",
        "passes per token",
        "report.html",
    ):
        assert expected in said
    assert (folder / "demo/report.html").is_file()
