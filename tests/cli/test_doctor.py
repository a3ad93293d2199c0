import json
import sys

import pytest
import torch

from pondera.cli.main import main
from pondera.comparison import doctor
from pondera.core import run_config, spec
from pondera.kernels import build
from pondera.training.build import new_model

SMALL = {"backbone.hidden_size": 32, "backbone.intermediate_size": 64, "backbone.num_hidden_layers": 2}


@pytest.fixture
def examine(monkeypatch):
    """Every finding on `plain`, changed by some settings, as (level, topic) -> text."""
    monkeypatch.setattr(doctor, "matmul_speed", lambda device, dtype: 1e11)
    monkeypatch.setattr(build, "why_not", lambda name: "")

    def run(overrides):
        found = doctor.examine(run_config.load("plain", SMALL | overrides))
        return {(finding.level, finding.topic): finding.text for finding in found}

    return run


def problems(found):
    return {topic: text for (level, topic), text in found.items() if level == "problem"}


def test_a_recipe_that_fits(examine):
    found = examine({"think": "PonderLM2(thoughts=1)", "train.steps": 1000})
    assert {level for level, _ in found} == {"ok"}
    count = sum(parameter.numel() for parameter in new_model(run_config.load("plain", SMALL), 2048).parameters())
    said = found["ok", "model"]
    assert said.startswith(f"llama, {count:,} parameters, 2048 tokens")
    assert said.endswith("PonderLM2(thoughts=1) with 2 passes per token")
    assert found["ok", "python"] == sys.version.split()[0]
    assert found["ok", "torch"].startswith(torch.__version__)
    assert found["ok", "training"].startswith("2.05 million tokens")


NEEDED = {"SentenceKV": "ends=[5]"}
"""Arguments of methods that have no default for them."""


@pytest.mark.parametrize(("method", "seam"), [(one.name, one.seam) for one in spec.index(spec.SEAMS).values()])
def test_every_method_is_examined(method: str, seam: str, examine):
    """Also those that multiply more than the decoder does."""
    found = examine({"think": None, seam: f"{method}({NEEDED.get(method, '')})"})
    assert not problems(found) and ("ok", "memory") in found or ("warning", "memory") in found


def test_native_kernels(examine, monkeypatch):
    """In use, turned off, or missing, with the reason."""
    monkeypatch.setattr(build, "why_not", lambda name: "")
    assert examine({})["ok", "native"] == "kernels in use: " + ", ".join(build.kernels())
    monkeypatch.setattr(build, "why_not", lambda name: build.OFF)
    assert examine({})["ok", "native"].endswith("so the slower torch code runs: disabled by PONDERA_NATIVE=0")
    monkeypatch.setattr(build, "why_not", lambda name: "no C compiler")
    assert examine({})["warning", "native"].endswith("so the slower torch code runs: no C compiler")


def test_time_follows_the_price(examine):
    def hours(overrides):
        text = examine({"train.steps": 10**6, **overrides})["ok", "time"]
        number, unit = text.split()[1:3]
        return float(number.replace(",", "")) * {"hours:": 1, "days:": 24}[unit]

    plain = hours({})
    assert hours({"train.batch_size": 16}) == pytest.approx(2 * plain, rel=0.1)
    assert 1.05 * plain < hours({"train.gradient_checkpointing": True}) < 4 / 3 * plain  # all but the head, once more
    assert 5 < hours({"think": "PonderLM2(thoughts=1)"}) / plain < 9


@pytest.mark.parametrize(
    ("overrides", "topic", "message"),
    [
        (
            {"think": "PonderLM2(thoghts=1)"},
            "model",
            "unknown argument of PonderLM2 'thoghts'; did you mean 'thoughts'?",
        ),
        ({"think": "PonderLM2(thoughts=-1)"}, "model", "thoughts=-1: give 0"),
        ({"backbone.model_type": "lama"}, "model", "unknown backbone model_type 'lama'; did you mean 'llama'"),
        ({"backbone.hiden_size": 8}, "model", "did you mean 'backbone.hidden_size'"),
        ({"backbone.num_attention_heads": 5}, "model", "backbone: invalid settings of llama"),
        ({"init": "scald"}, "model", "unknown init 'scald'; did you mean 'scaled'?"),
        ({"backbone.vocab_size": 100}, "model", "the backbone has 100 tokens and the tokenizer 'bpe-2048' has 2048"),
        ({"backbone.max_position_embeddings": 128}, "model", "256 tokens exceed the 128 positions of the backbone"),
        ({"data.tokenizer": "bpe-3"}, "model", "'bpe-N' takes N from 257"),
        ({"data.tokenizer": "./no/such"}, "model", "data.tokenizer: no such folder: './no/such'"),
        ({"data.text": "./no/such.txt"}, "text", "data.text: no such file or folder: './no/such.txt'"),
        ({"data.context": 0}, "context", "a window needs at least 1 token, got 0"),
        ({"train.steps": 0}, "train", "train.steps: at least 1, got 0"),
        ({"train.dtype": "float16"}, "train", "unknown train.dtype 'float16'"),
        (
            {"think": "AdaptiveLatentCoT()", "train.gradient_checkpointing": True},
            "train",
            "train.gradient_checkpointing: AdaptiveLatentCoT()",
        ),
        (
            {
                "backbone": {"model_type": "qwen3_next", "num_hidden_layers": 4},
                "init": "hf",
                "think": "AdaptiveLatentCoT()",
            },
            "model",
            "AdaptiveLatentCoT does not fit qwen3_next: its linear-attention layers",
        ),
        ({"train.keep": 10**9}, "disk", "1000000000 checkpoints need about"),
    ],
)
def test_what_cannot_run(examine, overrides, topic, message):
    if "backbone" in overrides:  # a whole backbone: the small sizes are not for it
        overrides = {**{key: None for key in SMALL}, **overrides}
    found = problems(examine(overrides))
    assert list(found) == [topic] and message in found[topic]


def test_what_is_only_worth_a_warning(examine, monkeypatch):
    found = examine({"train.dtype": "bfloat16", "train.micro_batch_size": 3, "data.text": "some/dataset"})
    assert not problems(found)
    assert "compare the time below" in found["warning", "dtype"]
    assert found["warning", "batch"].startswith("8 windows give micro-batches of 3 and one of 2")
    assert "will be loaded as a HF dataset" in found["warning", "text"]
    assert "a smaller --train.micro_batch_size" in examine({"train.batch_size": 10**6})["warning", "memory"]
    monkeypatch.setattr(doctor, "KNOWN_GOOD", {"torch": "<2", "no-such-package": ">=1"})
    found = examine({})
    assert "not among the versions known to work" in found["warning", "torch"]
    assert problems(found) == {"no-such-package": 'not installed; pip install "no-such-package>=1"'}


def test_the_installed_transformers_is_held_against_those_that_were_tested(examine, monkeypatch):
    assert f"tested: {', '.join(doctor.passed())}" in examine({})["ok", "transformers"]
    monkeypatch.setattr(doctor, "was_tested", lambda version: False)
    said = examine({})["warning", "transformers"]
    assert "is not tested" in said and f'pip install "transformers=={doctor.passed()[-1]}"' in said


def test_windows_are_shared_by_processes(examine, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert "8 windows cannot be split over 3 processes" in problems(examine({}))["train"]
    assert examine({"train.batch_size": 9})["ok", "batch"] == "9 windows per step, 3 per process on 3 processes"


def test_an_architecture_without_a_price(examine):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    found = examine({**{key: None for key in SMALL}, "backbone": {"model_type": "phi", **sizes}})
    assert not problems(found)
    assert "cannot be estimated: no cost model for model_type 'phi'" in found["warning", "time"]


def test_sliding_windows(examine):
    backbone = {"model_type": "mistral", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    backbone |= {"num_attention_heads": 2, "num_key_value_heads": 2, "sliding_window": 64}
    found = examine({**{key: None for key in SMALL}, "backbone": backbone, "think": "PonderLM2(thoughts=2)"})
    assert found["ok", "window"] == "layers with a sliding window see 64 tokens (192 KV slots, 3 per token)"


def test_a_checkpoint_is_examined_without_its_weights(examine, tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 300, **sizes}))
    wrapped = {**{key: None for key in SMALL}, "backbone": str(tmp_path), "init": "hf"}
    found = examine(wrapped | {"data.tokenizer": "bpe-300"})
    assert not problems(found) and found["ok", "model"].startswith("llama, ")
    assert f"--data.tokenizer {tmp_path}" in problems(examine(wrapped))["model"]
    assert (
        "would overwrite the weights"
        in problems(examine(wrapped | {"init": "scaled", "data.tokenizer": "bpe-300"}))["model"]
    )


@pytest.mark.parametrize(
    "think", [None, "PonderLM2(thoughts=1, train_rounds=(2, 2))", "AdaptiveLatentCoT(steps=2, halting='fixed')"]
)
def test_memory_is_about_what_autograd_keeps(think):
    config = run_config.load("plain", {"data.context": 64, "train.batch_size": 2, "think": think})
    model = new_model(config, 97).train()
    model.begin_step(0, 0)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    ids_BT = torch.randint(97, (2, 64))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = model(ids_BT, labels=ids_BT)
    assert out.loss is not None
    needed = doctor.training_bytes(config, model)
    assert needed["activations"] == pytest.approx(sum(size for size, _ in kept.values()), rel=0.2)
    assert needed["state"] == 16 * sum(parameter.numel() for parameter in model.parameters())


def test_speed_is_measured():
    assert 1e7 < doctor.matmul_speed("cpu", "float32", seconds=0.0) < 1e15


def test_the_command(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "matmul_speed", lambda device, dtype: 1e11)
    monkeypatch.chdir(tmp_path)
    assert main(["doctor", "plain", "--backbone.hidden_size", "32"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("checking plain\n  ok       python") and out.endswith("ready to run\n")
    assert main(["doctor", "--train.steps", "-1"]) == 2
    out = capsys.readouterr().out
    assert "  problem  train" in out and out.endswith("cannot run: see the problems above\n")
    assert not any(tmp_path.iterdir())


def test_products_of_a_few_rows(examine, monkeypatch):
    """Which instruction set decoding uses, or why it uses torch."""
    from pondera.kernels import products

    monkeypatch.setattr(products, "why_not_used", lambda: "")
    monkeypatch.setattr(products, "instruction_set", lambda: "AVX2")
    assert examine({})["ok", "products"].startswith(
        "decoding on the CPU in float32 and bfloat16 uses AVX2 for up to 8 rows"
    )
    monkeypatch.setattr(products, "why_not_used", lambda: build.OFF)
    assert examine({})["ok", "products"] == f"decoding uses the slower products of torch: {build.OFF}"
    monkeypatch.setattr(products, "why_not_used", lambda: "cc does not compile products.c")
    assert examine({})["warning", "products"].endswith("products of torch: cc does not compile products.c")
