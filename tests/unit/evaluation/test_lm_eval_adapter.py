from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from helpers import saved_models

from pondera.cli.main import main
from pondera.core.errors import UserError
from pondera.evaluation.score import sum_scores
from pondera.inference.generate import generate
from pondera.inference.load import load
from pondera.models.adaptive_lm import AdaptiveLM
from pondera.models.config import AdaptiveConfig

pytest.importorskip("lm_eval", reason='in a clone: pip install ".[eval]"')

from lm_eval import simple_evaluate  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from pondera.evaluation import lm_eval_adapter  # noqa: E402

EXAMPLES = Path(__file__).parents[3] / "examples" / "lm_eval"
ROWS = [
    {"start": "The quick brown fox", "ends": [" jumps over the dog", " is 🙂"], "right": 0},
    {"start": "", "ends": ["The lazy dog", "dog lazy The fox"], "right": 1},
    {"start": "Naïve", "ends": [" fox", " dog", " quick brown"], "right": 2},
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {name: saved_models.save(folder / name, name) for name in saved_models.THINKS}


@pytest.fixture
def task(tmp_path: Path) -> dict:
    """A multiple-choice task whose data lie in a local file."""
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in ROWS))
    return {
        "task": "local_choice",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(tmp_path / "cache")},
        "output_type": "multiple_choice",
        "test_split": "test",
        "num_fewshot": 0,
        "doc_to_text": "{{start}}",
        "doc_to_choice": "{{ends}}",
        "doc_to_target": "{{right}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    }


def shipped(name: str, folder: Path, rows: list[dict]) -> dict:
    """A task of the examples, with its file in the current folder."""
    found = yaml.safe_load((EXAMPLES / f"{name}_local.yaml").read_text())
    Path(f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found["dataset_kwargs"]["cache_dir"] = str(folder / "cache")
    return found


def results(path: Path, task: dict) -> dict:
    """What the harness says of a model on a task, samples included."""
    found = simple_evaluate(
        model="pondera",
        model_args={"pretrained": str(path)},
        tasks=[task],
        task_manager=TaskManager(include_defaults=False),
        batch_size=4,
        device="cpu",
        log_samples=True,
        bootstrap_iters=0,
    )
    assert found is not None
    return found


def by_hand(path: Path, start: str, end: str) -> float:
    """Log-likelihood of `end` after `start` (or after BOS), alone and without a cache."""
    found = load(path, "cpu")
    before = found.tokenizer.encode(start) or [found.tokenizer.bos_token_id]
    whole = torch.tensor([*before, *found.tokenizer.encode(end)])
    with torch.no_grad():
        log_p = found.model(whole[None, :-1]).logits[0].log_softmax(-1)
    return float(log_p[torch.arange(len(before) - 1, len(whole) - 1), whole[len(before) :]].sum())


@pytest.mark.parametrize("name", list(saved_models.THINKS))
def test_log_likelihoods_are_our_own(name: str, models: dict[str, Path], task: dict):
    """In batches of 4, whose shorter requests are padded, each request scores as it does alone."""
    found, hits = results(models[name], task), 0
    for sample in found["samples"]["local_choice"]:
        row = sample["doc"]
        expected = [by_hand(models[name], row["start"], end) for end in row["ends"]]
        assert [float(reply[0]) for reply in sample["filtered_resps"]] == pytest.approx(expected, rel=1e-4)
        hits += expected.index(max(expected)) == row["right"]
    assert found["results"]["local_choice"]["acc,none"] == pytest.approx(hits / len(ROWS))


def test_the_blimp_example(models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    pairs = [("The dogs jump.", "The dogs jumps."), ("A fox is quick.", "A fox are quick."), ("Go over.", "Over go.")]
    rows = [{"sentence_good": good, "sentence_bad": bad, "UID": "agreement"} for good, bad in pairs]
    found = results(models["plain"], shipped("blimp", tmp_path, rows))["results"]["blimp_local"]["acc,none"]
    hits = sum(by_hand(models["plain"], "", good) > by_hand(models["plain"], "", bad) for good, bad in pairs)
    assert found == pytest.approx(hits / 3)


def test_the_lambada_example(models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    passages = ["the quick brown fox jumps over the lazy dog", "over the dog jumps a 'naïve' fox"]
    rows = [{"text": passage} for passage in passages]
    found = results(models["plain"], shipped("lambada", tmp_path, rows))["results"]["lambada_local"]
    nats = [-by_hand(models["plain"], *split_last(passage)) for passage in passages]
    assert found["perplexity,none"] == pytest.approx(math.exp(sum(nats) / 2), rel=1e-4)
    assert found["acc,none"] in (0, 0.5, 1)


def split_last(passage: str) -> tuple[str, str]:
    """All but the last word, and that one with its space."""
    start, _, last = passage.rpartition(" ")
    return start, f" {last}"


@pytest.mark.parametrize("name", ["plain", "exact"])
def test_writes_what_generate_writes(name: str, models: dict[str, Path]):
    """Prompts of two lengths in one batch: the shorter one is padded on the left."""
    prompts = ["The quick", "The quick brown fox jumps over"]
    lm = lm_eval_adapter.PonderaLM(pretrained=str(models[name]), device="cpu", batch_size=2)
    settings = {"until": ["\0never"], "max_gen_toks": 8, "do_sample": False}
    requests = [Instance("generate_until", {}, (prompt, settings), index) for index, prompt in enumerate(prompts)]
    alone = [generate(str(models[name]), prompt, 8, temperature=0).text for prompt in prompts]
    assert lm.generate_until(requests, disable_tqdm=True) == alone


def test_limits_come_from_the_model(models: dict[str, Path]):
    lm = lm_eval_adapter.PonderaLM(
        pretrained=str(models["cot"]), device="cuda:0" if not torch.cuda.is_available() else "cpu"
    )
    assert lm.max_length == 96 and lm.device.type == "cpu"
    assert lm_eval_adapter.PonderaLM(pretrained=str(models["cot"]), device="cpu", max_length=20).max_length == 20
    with pytest.raises(UserError, match="no such folder"):
        lm_eval_adapter.PonderaLM(pretrained="no/such/run")


def test_command(models: dict[str, Path], task: dict, tmp_path: Path):
    """`pondera lm-eval` as a user types it."""
    path = tmp_path / "local_choice.yaml"
    path.write_text(yaml.safe_dump(task))
    command = [
        sys.executable,
        "-m",
        "pondera",
        "lm-eval",
        "--model",
        "pondera",
        "--tasks",
        str(path),
        "--device",
        "cpu",
    ]
    command += ["--batch_size", "2", "--trust_remote_code", "--model_args", f"pretrained={models['ponderlm2']}"]
    done = subprocess.run([*command[:-1], f"{command[-1]},dtype=float32,effort=0"], capture_output=True, text=True)
    assert "|local_choice|" in done.stdout.replace(" ", ""), done.stderr
    assert "effort=0" in done.stdout.replace("'", "").replace(": ", "="), done.stdout


def test_mistakes_on_the_command_line(models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture):
    task = str(EXAMPLES / "lambada_local.yaml")
    given = f"pretrained={models['plain']},efort=1"
    assert main(["lm-eval", "--model", "pondera", "--model_args", given, "--tasks", task]) == 2
    assert "unknown model argument 'efort'; did you mean 'effort'?" in capsys.readouterr().err
    assert main(["lm-eval", "--model", "pondera", "--tasks", str(tmp_path / "none.yaml")]) == 1
    assert "lm-eval failed" in capsys.readouterr().err


def test_without_lm_eval_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    monkeypatch.setitem(sys.modules, "lm_eval.models", None)
    assert main(["lm-eval", "ls", "tasks"]) == 2
    assert 'pip install ".[eval]"' in capsys.readouterr().err


# Arguments of the model


def test_arguments_reach_the_model(models: dict[str, Path], tmp_path: Path):
    saved_models.tokenizer().save_pretrained(tmp_path / "tokenizer")
    lm = lm_eval_adapter.PonderaLM(
        str(models["cot"]),
        device="cpu",
        dtype="bfloat16",
        trust_remote_code=True,
        tokenizer=str(tmp_path / "tokenizer"),
        revision="main",
    )
    assert lm.model.dtype == torch.bfloat16
    assert lm.tokenizer.name_or_path == str(tmp_path / "tokenizer")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"dtpye": "float16"}, "unknown model argument 'dtpye'; did you mean 'dtype'"),
        ({"parallelize": True}, "unknown model argument 'parallelize'"),
        ({"dtype": "flaot16"}, "unknown dtype 'flaot16'; did you mean 'float16'"),
        ({"revision": "v2"}, "is a folder and has no revisions"),
        ({"tokenizer": "./nowhere"}, "tokenizer: no such folder"),
        ({"effort": "lots"}, "effort"),
        ({"max_passes": 0}, "max_passes"),
    ],
)
def test_arguments_that_do_not_fit(arguments: dict, complaint: str, models: dict[str, Path]):
    with pytest.raises(UserError, match=complaint):
        lm_eval_adapter.PonderaLM(str(models["cot"]), device="cpu", **arguments)


def test_effort_of_a_model_that_cannot_think(models: dict[str, Path]):
    with pytest.raises(UserError, match="one pass per token"):
        lm_eval_adapter.PonderaLM(str(models["plain"]), device="cpu", effort=0.5)


@pytest.mark.parametrize("budget", [{"effort": 0.0}, {"max_passes": 1}])
def test_effort_is_that_of_the_model(budget: dict, models: dict[str, Path]):
    lm, full = (lm_eval_adapter.PonderaLM(str(models["cot"]), device="cpu", **given) for given in (budget, {}))
    ids = torch.tensor([lm.tok_encode("The quick brown fox")])
    with torch.no_grad():
        expected = lm.adaptive(ids, **budget).logits
    assert torch.equal(lm._model_call(ids), expected)
    assert not torch.allclose(full._model_call(ids), expected)
    settings = {"until": ["\0never"], "max_gen_toks": 8, "do_sample": False}
    request = Instance("generate_until", {}, ("The quick", settings), 0)
    alone = generate(str(models["cot"]), "The quick", 8, temperature=0, **budget).text
    assert lm.generate_until([request], disable_tqdm=True) == [alone]


# Models with a cache method

MEMORIES = (
    "StreamingLLM(12)",
    "H2O(0.25)",
    "SnapKV(36)",
    "KIVI(2, window=8, group=8)",
    "TransformerXL(block=8, mems=8)",
)


@pytest.fixture(scope="module")
def with_memory(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for memory in MEMORIES:
        folder = tmp_path_factory.mktemp("memory") / "model"
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
        words = {"vocab_size": 280, "max_position_embeddings": 96, "initializer_range": 0.3}
        backbone = {"model_type": "llama", **sizes, **words}
        AdaptiveLM(
            AdaptiveConfig(backbone=backbone, **{"memory" if "XL" in memory else "kv_cache": memory})
        ).save_pretrained(folder)
        saved_models.tokenizer().save_pretrained(folder)
        found[memory] = folder
    return found


TEXT = "The quick brown fox jumps over the lazy dog; a naïve zebra vexes it. " * 2


def rolling(lm: lm_eval_adapter.PonderaLM, text: str) -> float:
    request = Instance("loglikelihood_rolling", {}, (text,), 0)
    return float(lm.loglikelihood_rolling([request], disable_tqdm=True)[0])


@pytest.mark.parametrize("memory", MEMORIES)
def test_scores_are_those_of_eval(memory: str, with_memory: dict[str, Path]):
    lm = lm_eval_adapter.PonderaLM(str(with_memory[memory]), device="cpu")
    ids = torch.tensor([[lm.prefix_token_id, *lm.tok_encode(TEXT)]])[:, :60]
    text = lm.tokenizer.decode(ids[0, 1:])
    window = {"input_ids": ids[0, :-1], "targets": ids[0, 1:], "index": torch.tensor(0)}
    assert -rolling(lm, text) == pytest.approx(sum_scores(lm.adaptive, [window]).nats, rel=1e-5)
    with torch.no_grad():
        at_once = lm.adaptive(ids[:, :-1]).logits[0].log_softmax(-1).gather(1, ids[0, 1:, None]).sum()
    if memory != "TransformerXL(block=8, mems=8)":  # it reads block by block in one call, too
        assert rolling(lm, text) != pytest.approx(float(at_once), rel=1e-4), "nothing was evicted"


@pytest.mark.parametrize("memory", MEMORIES)
def test_padding_changes_no_score(memory: str, with_memory: dict[str, Path]):
    texts = [("The quick brown fox jumps over the", " lazy dog"), ("", "fox"), ("A fox", " " + "jumps over " * 8)]
    requests = [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(texts)]
    together, alone = (
        lm_eval_adapter.PonderaLM(str(with_memory[memory]), device="cpu", batch_size=size).loglikelihood(
            requests, disable_tqdm=True
        )
        for size in (3, 1)
    )
    assert [score for score, _ in together] == pytest.approx([score for score, _ in alone], rel=1e-4)
