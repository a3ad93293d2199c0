"""The worked example of CONTRIBUTING.md, as a reader would try it: saved to a folder, trained, held to the contract."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from helpers.architectures import BACKBONES, VOCAB

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


def test_it_keeps_the_contract(methods: Path):
    from pondera import AdaptiveConfig, AdaptiveLM
    from pondera.cost.measure import measured_flops
    from pondera.cost.model import CostModel
    from pondera.cost.schedule import CostSchedule

    torch.manual_seed(0)
    model = AdaptiveLM(AdaptiveConfig(backbone=dict(BACKBONES["llama"]), think="ReadTwice()")).eval()
    x = torch.randint(VOCAB, (2, 8), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        whole, cache = model(x).logits, model.new_cache()
        pieces = [model(x[:, t : t + 1], past_key_values=cache).logits for t in range(8)]
        torch.testing.assert_close(torch.cat(pieces, dim=1), whole, atol=1e-5, rtol=1e-5)
        spent = measured_flops(lambda: model(x[:1]))
    schedule = CostSchedule(tuple(model.think.cost_schedule(8)), head_rows=8, tokens=8)
    assert spent == pytest.approx(CostModel(model.backbone.config).forward(schedule), rel=0.02)


def test_its_command_trains(methods: Path, monkeypatch: pytest.MonkeyPatch):
    text = methods / "text.txt"
    text.write_text("".join(f"Line {n} of a text that says {n * n} and little else.\n" for n in range(3000)))
    words = block("command").strip().removeprefix("PONDERA_METHODS=my_methods pondera ").replace('"', "").split()
    small = ["--data.text", "text.txt", "--data.tokenizer", "bpe-300", "--data.context", "32", "--train.steps", "2"]
    monkeypatch.chdir(methods)
    assert main([*words, *small, "--train.eval_tokens", "256"]) == 0
    assert (methods / "runs" / "read-twice" / "model" / "model.safetensors").is_file()
