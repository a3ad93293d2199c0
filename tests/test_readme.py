"""What README.md shows is executed: the commands in their order, the Python, the YAML, and the numbers against results/."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pondera.cli.main import main
from pondera.core import run_config

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SMALL = """--data.tokenizer bpe-300 --data.context 32 --train.steps 14 --train.batch_size 2 --train.eval_tokens 64
--backbone.hidden_size 32 --backbone.intermediate_size 64 --train.save_every 7""".split()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as the README assumes it: some books, and a checkpoint of the reader's own."""
    books = tmp_path / "my_books"
    books.mkdir()
    for number in range(12):
        lines = (f"Chapter {number}, line {line}: the sea was {'very ' * (line % 4)}calm.\n" for line in range(300))
        (books / f"book{number}.txt").write_text("".join(lines))
    (books / "letters.txt").write_text("Dear friend, the sea is calm today and I am well.\n" * 40)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_commands_and_python(folder: Path):
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    commands = [line for block in blocks("bash") for line in block.splitlines() if line.startswith("pondera")]
    assert len(commands) == 18
    for command in commands:
        words = shlex.split(command)[1:]
        small = SMALL if words[0] in ("train", "compare", "doctor") and "--resume" not in words else []
        small = SMALL[2:10] if "--backbone" in words else small  # the backbone and its tokenizer are given
        assert main([*words, *small]) == 0, command
    assert (
        (folder / "collapse.html").is_file()
        and (folder / "report.html").is_file()
        and (folder / "runs/compared/results.json").is_file()
    )

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=300, **sizes)).save_pretrained("my_checkpoint")
    AutoTokenizer.from_pretrained("runs/first/model").save_pretrained("my_checkpoint")
    (folder / "shown.py").write_text("\n".join(blocks("python")))
    done = subprocess.run([sys.executable, "shown.py"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "The sea" in done.stdout and (folder / "my_thinking_model/model.safetensors").is_file()

    (inline,) = re.findall(r"`(pondera train plain --backbone .*?)`", README)
    tokenizer = ["--data.tokenizer", "runs/first/model"]
    small = ["--data.text", "my_books", "--train.steps", "2", "--data.context", "32", "--train.eval_tokens", "64"]
    vocab_size = json.loads(Path("runs/first/model/config.json").read_text())["backbone"]["vocab_size"]
    LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, **sizes)).save_pretrained("my_checkpoint")
    assert main([*shlex.split(inline)[1:], *tokenizer, *small]) == 0


def test_yaml_is_a_run():
    (tree,) = (yaml.safe_load(block) for block in blocks("yaml"))
    tree["train"]["lr"] = float(tree["train"]["lr"])  # plain YAML 1.1 reads 2e-3 as text; pondera's own reader does not
    assert run_config.from_dict(tree).think == "PonderLM2(thoughts=1)"


def test_make_targets_exist():
    targets = re.findall(r"^make (\w+)", blocks("bash")[0], re.MULTILINE)
    makefile = (ROOT / "Makefile").read_text()
    assert targets == ["demo", "test"] and all(f"\n{target}:" in makefile for target in targets)


def test_generated_parts_say_what_the_results_say():
    done = subprocess.run(
        [sys.executable, "-m", "tools.docs.build", "--check"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


def test_links_lead_somewhere():
    for page in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), ROOT / "results/README.md"):
        for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_the_demo_goes_from_nothing_to_a_report(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    from pondera.comparison import demo

    small = {"data.text": "my_books", "data.tokenizer": "bpe-300", "data.context": 32, "train.eval_tokens": 64}
    monkeypatch.setattr(demo, "SETTINGS", {**small, "train.steps": 2, "train.batch_size": 2})
    assert main(["demo", "--out", "demo"]) == 0
    said = capsys.readouterr().out
    for expected in ("plain", "doubledepth", "adaptivelatentcot", "bits per byte", "every token", "report.html"):
        assert expected in said
    assert (folder / "demo/report.html").is_file()
