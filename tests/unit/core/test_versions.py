"""What differs between versions of transformers is known in one place, and said where it matters."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
import torch
from helpers.architectures import BACKBONES, ids
from packaging.specifiers import SpecifierSet

from pondera import AdaptiveConfig, AdaptiveLM
from pondera.core.hf import CACHE, DynamicCache
from pondera.core.versions import installed, passed, was_tested
from pondera.models.backbone import Backbone

ROOT = Path(__file__).parents[3]


def test_what_may_be_installed_was_tested():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    allowed = SpecifierSet(
        next(line for line in listed if line.startswith("transformers")).removeprefix("transformers")
    )
    assert passed() and all(allowed.contains(version) for version in passed())
    assert not allowed.contains("99.0") and not was_tested("99.0") and was_tested(passed()[0])


def test_only_one_file_says_what_a_cache_is_called():
    for file in (ROOT / "src/pondera/model").glob("*.py"):
        if file.name not in ("hf.py", "lm.py", "keywords.py", "config.py"):  # the last three know both names
            assert '"past_key_values"' not in file.read_text(), file.name


@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_past_is_seen_by_the_name_that_this_version_gives_it(backbone: str):
    """A keyword that a version does not know would be swallowed, and decoding go on without a past."""
    torch.manual_seed(0)
    model, x = AdaptiveLM(AdaptiveConfig(backbone=dict(BACKBONES[backbone]))).eval(), ids(1, 9)
    inner: Backbone = model.backbone
    with torch.no_grad():
        whole = inner.lm(x).logits
        cache = DynamicCache(config=inner.config)
        inner.lm(x[:, :5], **{CACHE: cache})
        assert cache.get_seq_length() == 5, installed()
        rest = inner.head(inner.step(inner.embed(x[:, 5:]), cache))
    torch.testing.assert_close(rest, whole[:, 5:], atol=1e-5, rtol=1e-5)
