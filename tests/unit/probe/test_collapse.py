"""Collapse: the verdicts on codebooks whose state is known, from tensors in files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pondera.cli.main import main
from pondera.core.errors import UserError
from pondera.methods.quantize.common.diagnosis import ENOUGH, KINDS, diagnose


def vectors(count: int = 4096, width: int = 8, directions: int = 8) -> torch.Tensor:
    draw = torch.Generator().manual_seed(0)
    return torch.randn(count, directions, generator=draw) @ torch.randn(directions, width, generator=draw)


def clusters(count: int, width: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    centres = 4 * torch.randn(count, width, generator=draw)
    noise = 0.1 * torch.randn(4096, width, generator=draw)
    return centres[torch.randint(count, (4096,), generator=draw)] + noise, centres


HEALTHY = vectors()[:64]


@pytest.mark.parametrize(
    ("x", "table", "kind"),
    [
        (vectors(), HEALTHY, "healthy"),
        (vectors(), 30 + HEALTHY, "token collapse"),  # far away: one row is nearest to nearly all
        (vectors(), 0.01 * HEALTHY, "token collapse"),  # crowded around the mean
        (vectors(directions=1), vectors(directions=1)[:64], "embedding collapse"),
        (vectors(directions=1), 30 + HEALTHY, "both"),
    ],
)
def test_verdicts(x: torch.Tensor, table: torch.Tensor, kind: str):
    found = diagnose(x, table)
    assert found.kind == kind and bool(found.cure) == (kind != "healthy")
    assert f"{found.usage:.0%} of 64 codes" in found.why


def test_a_quarter_of_the_codes_is_healthy_where_the_data_has_no_more_clusters():
    """The trap of codebook usage: one row in each of 16 clusters, the other rows far from everything."""
    x, centres = clusters(16)
    found = diagnose(x, torch.cat([centres, 1000 + torch.rand(240, 8)]))
    assert found.usage == 16 / 256 and found.kind == "healthy", found
    assert diagnose(x, torch.cat([centres[:4], 1000 + torch.rand(252, 8)])).kind == "token collapse"


def test_a_known_rank_is_the_yardstick():
    x = vectors(directions=4)
    assert diagnose(x, x[:64]).kind == "healthy"
    assert diagnose(x, x[:64], rank=20.0).kind == "embedding collapse"


def test_the_same_is_found_twice_and_scale_does_not_matter():
    once = diagnose(vectors(), HEALTHY)
    assert diagnose(vectors(), HEALTHY) == once
    other = diagnose(1000 * vectors(), 1000 * HEALTHY)
    assert other.kind == once.kind and other.split_error == pytest.approx(once.split_error, rel=1e-3)


def test_what_cannot_be_judged_is_refused():
    with pytest.raises(UserError, match=f"give {ENOUGH * 64} or more"):
        diagnose(vectors(ENOUGH * 64 - 1), HEALTHY)
    with pytest.raises(UserError, match="latents are 8 wide and the codebook's rows 5"):
        diagnose(vectors(), HEALTHY[:, :5])


@pytest.fixture
def said(capsys):
    def run(*words):
        capsys.readouterr()
        code = main(["probe", *map(str, words)])
        return code, *capsys.readouterr()

    return run


def test_a_file_is_told_in_words_and_drawn(said, tmp_path: Path):
    file, page = tmp_path / "codes.safetensors", tmp_path / "plots" / "page.html"
    save_file({"latents": vectors(), "codebook": 30 + HEALTHY}, file)
    code, out, err = said("collapse", file, "--plot", page)
    assert (code, err) == (0, "") and "token collapse" in out and "init='kmeans'" in out
    html = page.read_text()
    assert html.count("<svg") >= 2 and "Code usage" in html and "<script" not in html and "http" not in html
    found = json.loads(said("collapse", file, "--json")[1])
    assert found["name"] == "codes.safetensors" and found["codebooks"][0]["kind"] in KINDS


def test_mistakes(said, tmp_path: Path):
    good, missing, flat, junk = (tmp_path / f"{name}.safetensors" for name in ("good", "missing", "flat", "junk"))
    save_file({"latents": vectors(), "codebook": HEALTHY}, good)
    save_file({"latents": vectors(), "codes": HEALTHY}, missing)
    save_file({"latents": vectors().flatten(), "codebook": HEALTHY}, flat)
    junk.write_bytes(b"\x80\x04\x95 a pickle, for all we know")
    for words, message in (
        (["collapse", missing], "no tensor 'codebook'; it needs latents and codebook, and has: codes, latents"),
        (["collapse", flat], "latents: give a matrix of floats, got torch.float32 of shape [32768]"),
        (["collapse", junk], "cannot be read as safetensors"),
        (["collapse", tmp_path / "no.safetensors"], "no such file"),
        (["collapse", good, "--text", "a"], "is a file of tensors, which reads no text"),
        (["collapse", good, "--plot", tmp_path], "is a folder; give a file"),
        (["think_trace", good], "ThinkTrace analyzes a model that reads a text"),
    ):
        code, out, err = said(*words)
        assert code == 2 and message in err and "Traceback" not in err, (words, err)
