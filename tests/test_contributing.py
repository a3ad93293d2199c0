"""The worked examples of CONTRIBUTING.md, as a reader would try them: in a folder, tested by the contract suites, trained."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from pondera.cli.main import main

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "CONTRIBUTING.md").read_text()


def block(marker: str) -> str:
    found = re.search(rf"<!-- worked example: {re.escape(marker)} -->\n```\w+\n(.*?)```", TEXT, re.DOTALL)
    assert found, f"CONTRIBUTING.md has no block marked {marker!r}"
    return found[1]


@pytest.fixture
def methods(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    file = tmp_path / "my_methods" / "think" / "read_twice.py"
    file.parent.mkdir(parents=True)
    file.write_text(block("my_methods/think/read_twice.py"))
    monkeypatch.setenv("PONDERA_METHODS", str(tmp_path / "my_methods"))
    return tmp_path


EXAMPLES = {
    "KeyNorm": "kv_cache/key_norm.py",
    "Grid": "quantize/grid.py",
    "ReadTwice": "think/read_twice.py",
}
OTHERS = "gemma3 or qwen3 or mistral or gpt_neox or gpt2"
"""Backbones that are left out here, for speed."""


@pytest.mark.parametrize("name", EXAMPLES)
def test_it_passes_the_contract_suite_of_its_seam(name: str, tmp_path: Path):
    """The suite that tests Pondera's own methods, told of the example by nothing but its folder."""
    file = tmp_path / "my_methods" / EXAMPLES[name]
    file.parent.mkdir(parents=True)
    file.write_text(block(f"my_methods/{EXAMPLES[name]}"))
    suite = sorted((ROOT / "tests" / "contracts").glob(f"test_{file.parent.name}*.py"))
    words = [*suite, "-q", "-rs", "-p", "no:cacheprovider", "-k", f"{name} and not ({OTHERS})"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *map(str, words)],
        cwd=ROOT,
        env=os.environ | {"PONDERA_METHODS": str(tmp_path / "my_methods")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 10
    skipped = re.findall(r"SKIPPED.*?: (.*)", done.stdout)
    assert set(skipped) <= {"ReadTwice declares no identity form", "Grid has no table; it refuses scores by name"}


def test_the_guide_shows_the_same_example():
    file = "my_methods/kv_cache/key_norm.py"
    guide = (ROOT / "docs/guides/add-a-method.md").read_text()
    assert re.findall(r"```python\n(.*?)```", guide, re.DOTALL) == [f"# {file}\n{block(file)}"]


def test_the_contract_command_comes_after_what_it_needs():
    before, command, _ = TEXT.partition("PONDERA_METHODS=my_methods python -m pytest tests/contracts/")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert command and 'pip install ".[dev]"' in before and any(one.startswith("pytest>") for one in extras["dev"])


def test_its_command_trains(methods: Path, monkeypatch: pytest.MonkeyPatch):
    text = methods / "text.txt"
    text.write_text("".join(f"Line {n} of a text that says {n * n} and little else.\n" for n in range(3000)))
    words = block("command").strip().removeprefix("PONDERA_METHODS=my_methods pondera ").replace('"', "").split()
    small = ["--data.text", "text.txt", "--data.tokenizer", "bpe-300", "--data.context", "32", "--train.steps", "2"]
    monkeypatch.chdir(methods)
    assert main([*words, *small, "--train.eval_tokens", "256"]) == 0
    assert (methods / "runs" / "read-twice" / "model" / "model.safetensors").is_file()
