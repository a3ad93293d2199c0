"""What ``import pondera`` offers: every method by name, `load` and `compress`, without loading torch before it is needed."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import saved_models

import pondera
from pondera.core import spec
from pondera.core.errors import UserError
from pondera.inference.load import load as load_model
from pondera.methods.kv_cache.base import KVCacheMethod

EVERY = spec.SEAMS + spec.PARTS + spec.PROBES
TEXT = "The quick brown fox jumps over the lazy dog. It does so every morning, and nobody knows why. " * 30
GREEDY = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama as transformers writes it."""
    return saved_models.checkpoint(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("texts") / "fox.txt"
    file.write_text(TEXT)
    return file


def test_importing_loads_neither_torch_nor_transformers():
    code = (
        "import sys, pondera, pondera.methods.kv_cache; dir(pondera); pondera.UserError;"
        "print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_the_import_alone_reads_no_method_file():
    code = (
        "import sys, pondera, pondera.methods.think; print('pondera.core.spec' in sys.modules, 'yaml' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False False\n"


@pytest.mark.parametrize("seam", EVERY)
def test_every_method_can_be_imported_from_the_top_and_from_its_seam(seam: str):
    package = importlib.import_module(f"pondera.methods.{seam}")
    found = spec.index((seam,))
    assert set(found) == set(dir(package)) == set(package.__all__)
    for name, method in found.items():
        cls = getattr(importlib.import_module(method.module), name)
        assert getattr(pondera, name) is getattr(package, name) is cls


def test_all_and_dir_list_what_there_is():
    names = {*spec.index(EVERY), "AdaptiveLM", "AdaptiveConfig", "UserError", "load", "compress"}
    assert names <= set(pondera.__all__) == set(dir(pondera))
    everything: dict[str, object] = {}
    exec("from pondera import *", everything)
    assert names <= set(everything)


@pytest.mark.parametrize(
    ("name", "near"), [("H20", "H2O"), ("PonderLM4", "PonderLM"), ("laod", "load"), ("vqkv", "VQKV")]
)
def test_unknown_names_come_with_the_nearest(name: str, near: str):
    with pytest.raises(AttributeError, match=f"no attribute '{name}'.*(did you mean '{near}|lists all names)"):
        getattr(pondera, name)


def test_a_method_of_the_users_own_is_there_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "quantize").mkdir()
    (tmp_path / "quantize" / "coin.py").write_text('class Coin:\n    """A coin."""\n')
    monkeypatch.setenv("PONDERA_METHODS", str(tmp_path))
    assert pondera.Coin.__doc__ == "A coin." and "Coin" in dir(pondera)


class TestLoad:
    """One call gives a model for plain `generate`."""

    def test_a_plain_checkpoint_generates_as_in_transformers(self, checkpoint: Path):
        from transformers import AutoModelForCausalLM

        model, tokenizer = pondera.load(checkpoint, device="cpu")
        prompt = tokenizer("The quick", return_tensors="pt")
        theirs = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
        assert isinstance(model, pondera.AdaptiveLM) and model.method is None and model.kv_cache is None
        assert torch.equal(model.generate(**prompt, **GREEDY), theirs.generate(**prompt, **GREEDY))

    @pytest.mark.parametrize("form", ["text", "object"])
    def test_a_kv_cache_method_is_what_generate_uses(self, checkpoint: Path, form: str):
        given = "StreamingLLM(8, sinks=2)" if form == "text" else pondera.StreamingLLM(8, sinks=2)
        model, tokenizer = pondera.load(checkpoint, kv_cache=given, device="cpu")
        prompt = tokenizer("The quick brown fox jumps over the lazy dog.", return_tensors="pt")
        plain, _ = pondera.load(checkpoint, device="cpu")
        expected = plain.generate(**prompt, **GREEDY, past_key_values=pondera.StreamingLLM(8, sinks=2).cache(plain))
        assert torch.equal(model.generate(**prompt, **GREEDY), expected)
        assert model.config.kv_cache == "StreamingLLM(8, sinks=2)"
        cache = model.generate(**prompt, **GREEDY, return_dict_in_generate=True).past_key_values
        assert all(layer.tables[0].position.shape[-1] < cache.get_seq_length() for layer in cache.kept)

    def test_think_is_built_on_the_weights_of_the_checkpoint(self, checkpoint: Path):
        model, tokenizer = pondera.load(checkpoint, think="PonderLM2(thoughts=0)", device="cpu")
        plain, _ = pondera.load(checkpoint, device="cpu")
        prompt = tokenizer("The quick", return_tensors="pt")
        assert type(model.think).__name__ == "PonderLM2" and not model.training
        assert torch.equal(model(**prompt).logits, plain(**prompt).logits)
        assert model.generation_config.eos_token_id == plain.generation_config.eos_token_id
        deeper, _ = pondera.load(checkpoint, think="PonderLM2(thoughts=1)", device="cpu")
        assert deeper(**prompt).passes.unique().tolist() == [2]

    def test_dtype_is_that_of_all_weights(self, checkpoint: Path):
        for think in (None, "PonderLM2(thoughts=1)"):
            model, _ = pondera.load(checkpoint, think=think, dtype="bfloat16", device="cpu")
            assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}

    def test_what_is_fitted_needs_text_and_gets_it(self, checkpoint: Path, text: Path):
        fast = "VQKV(4.0, window=8, codes=16, fitting='kmeans', vectors=256)"
        with pytest.raises(UserError, match="add calibrate="):
            pondera.load(checkpoint, kv_cache=fast, device="cpu")
        model, tokenizer = pondera.load(checkpoint, kv_cache=fast, calibrate=str(text), device="cpu")
        assert isinstance(model.kv_cache, KVCacheMethod) and model.kv_cache.fitted
        again, _ = pondera.load(checkpoint, kv_cache=model.kv_cache, device="cpu")
        prompt = tokenizer(TEXT[:80], return_tensors="pt")
        assert torch.equal(again.generate(**prompt, **GREEDY), model.generate(**prompt, **GREEDY))

    @pytest.mark.parametrize(
        ("arguments", "says"),
        [
            ({"kv_cache": "H20(8)"}, "did you mean 'H2O'"),
            ({"think": "PonderLm2()"}, "did you mean 'PonderLM2'"),
            ({"kv_cache": "PonderLM2()"}, "is a think method"),
            ({"kv_cache": 8}, "expected text such as"),
            ({"dtype": "bfloat61"}, "did you mean 'bfloat16'"),
            ({"calibrate": "book.txt"}, "none is named"),
            (
                {"device_map": "auto"},
                r"argument of load 'device_map': the whole model goes to one device: give device=",
            ),
            ({"torch_dtype": "bfloat16"}, "argument of load 'torch_dtype': its name here is dtype"),
            ({"head": "VQLogits(8)"}, "argument of load 'head': a head is trained with its model: pondera train"),
            ({"kv_cach": "H2O(8)"}, "argument of load 'kv_cach'; did you mean 'kv_cache'"),
        ],
    )
    def test_what_cannot_be_used_is_refused_in_words(self, checkpoint: Path, arguments: dict, says: str):
        with pytest.raises(UserError, match=says):
            pondera.load(checkpoint, device="cpu", **arguments)

    def test_the_inner_loader_refuses_in_words_too(self, checkpoint: Path):
        for name, says in {
            "kv_cache": r"pondera.load takes it: pondera.load\(MODEL, kv_cache=",
            "devise": "did you mean 'device'",
            "device_map": "give device=",
        }.items():
            with pytest.raises(UserError, match=f"unknown argument of load '{name}'.*{says}"):
                load_model(checkpoint, **{name: "x"})

    def test_an_unknown_folder_comes_with_the_nearest(self, checkpoint: Path):
        with pytest.raises(UserError, match="did you mean '.*llama'"):
            pondera.load(checkpoint.with_name("lama"), device="cpu")


def test_compress_measures_and_writes(checkpoint: Path, text: Path, tmp_path: Path):
    said: list[str] = []
    methods = ["H2O(0.5)", pondera.StreamingLLM(9)]
    found = pondera.compress(
        checkpoint,
        methods,
        str(text),
        windows=2,
        out=tmp_path / "small",
        keep=methods[1],
        device="cpu",
        say=said.append,
    )
    assert [row.method for row in found.rows] == ["PreallocatedCache()", "H2O(0.5)", "StreamingLLM(9)"]
    assert found.elbow in found.rows and found.written == "StreamingLLM(9)" and len(said) == 3
    model, _ = pondera.load(tmp_path / "small", device="cpu")
    assert model.config.kv_cache == "StreamingLLM(9)"
    with pytest.raises(UserError, match="something is there already"):
        pondera.compress(checkpoint, methods, str(text), out=tmp_path / "small")
    with pytest.raises(UserError, match="did you mean 'H2O'"):
        pondera.compress(checkpoint, "H20(0.5)", str(text))


def test_compress_takes_the_only_method_that_is_named(checkpoint: Path, text: Path, tmp_path: Path):
    found = pondera.compress(checkpoint, "StreamingLLM(9)", str(text), windows=2, out=tmp_path / "one", device="cpu")
    assert found.elbow.method == found.written == "StreamingLLM(9)"


def test_without_a_curve_the_smallest_cache_near_the_best_score_is_taken():
    from pondera.evaluation.kv_sweep import SweepRow, elbow

    def row(share: float, bits: float) -> SweepRow:
        return SweepRow(f"{share}", share, share, bits, 1.0, 1.0, 1.0)

    assert elbow([row(1.0, 2.0), row(0.5, 2.01)]).method == "0.5"
    assert elbow([row(1.0, 2.0), row(0.5, 2.1)]).method == "1.0"


def test_load_takes_methods_and_dtypes_as_objects(checkpoint: Path):
    think = pondera.PonderLM2(thoughts=2)
    model, _ = pondera.load(checkpoint, think=think, kv_cache=pondera.H2O(16), device="cpu", dtype=torch.bfloat16)
    assert model.config.think == "PonderLM2(2)" and model.config.kv_cache == "H2O(16)" and model.dtype == torch.bfloat16
    with pytest.raises(UserError, match="think: expected text"):
        pondera.load(checkpoint, think=3, device="cpu")
    config = pondera.AdaptiveConfig(backbone=str(checkpoint), chunk=pondera.ConceptLM(chunk=3, codes=8, segments=4))
    assert config.chunk == "ConceptLM(3, codes=8, segments=4)"


def test_effort_without_passes_is_refused(checkpoint: Path):
    model, _ = pondera.load(checkpoint, device="cpu")
    with pytest.raises(UserError, match="always runs one pass"):
        model.generate(torch.tensor([[1, 2]]), max_new_tokens=1, effort="low")
