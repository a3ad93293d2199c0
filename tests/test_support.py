"""The table of served architectures is what its tool finds: a sample of it, tried again."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers

ROOT = Path(__file__).parents[1]
SAMPLE = ("llama", "gemma2", "deepseek_v3", "gpt_oss", "jetmoe", "stablelm", "diffllama", "gptj", "bloom", "qwen3_next")


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import support

    yield support
    sys.modules.pop("support"), sys.modules.pop("tiny_models")


@pytest.fixture(scope="module")
def committed() -> dict:
    return json.loads((ROOT / "results" / "support.json").read_text())


@pytest.mark.parametrize("kind", SAMPLE)
def test_a_sample_comes_out_as_the_table_says(kind: str, tool, committed: dict):
    if committed["transformers"] != transformers.__version__:
        pytest.skip(f"the table is of transformers {committed['transformers']}")
    model = tool.tiny_model(kind)
    with torch.no_grad():
        found = {name: tool.word(tool.attempt(tool.try_cache, model, name)) for name in ("PreallocatedCache", "H2O")}
        found["PonderLM3"] = tool.word(tool.attempt(tool.try_thinking, kind, "PonderLM3"))
    assert found == {name: tool.word(committed["found"][kind][name]) for name in found}


def test_nothing_is_silently_wrong_and_the_page_is_that_of_the_results(tool, committed: dict):
    verdicts = {tool.word(said) for each in committed["found"].values() for said in each.values()}
    assert verdicts <= {"exact", "close", "refused", "not built"}
    lines = (ROOT / "docs" / "support.md").read_text().splitlines()
    if committed["transformers"] == transformers.__version__:
        assert lines == tool.page(committed["found"]).splitlines()
