from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import saved
import torch
import yaml

from pondera.ground.errors import UserError
from pondera.jobs.generate import generate
from pondera.jobs.load import load

pytest.importorskip("lm_eval", reason="pip install pondera[eval]")

from lm_eval import simple_evaluate  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from pondera.jobs import harness  # noqa: E402

EXAMPLES = Path(__file__).parents[2] / "examples" / "lm_eval"
ROWS = [
    {"start": "The quick brown fox", "ends": [" jumps over the dog", " is 🙂"], "right": 0},
    {"start": "", "ends": ["The lazy dog", "dog lazy The fox"], "right": 1},
    {"start": "Naïve", "ends": [" fox", " dog", " quick brown"], "right": 2},
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {name: saved.save(folder / name, name) for name in saved.THINKS}


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


@pytest.mark.parametrize("name", list(saved.THINKS))
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
    lm = harness.PonderaLM(pretrained=str(models[name]), device="cpu", batch_size=2)
    settings = {"until": ["\0never"], "max_gen_toks": 8, "do_sample": False}
    requests = [Instance("generate_until", {}, (prompt, settings), index) for index, prompt in enumerate(prompts)]
    alone = [generate(str(models[name]), prompt, 8, temperature=0).text for prompt in prompts]
    assert lm.generate_until(requests, disable_tqdm=True) == alone


def test_limits_come_from_the_model(models: dict[str, Path]):
    lm = harness.PonderaLM(pretrained=str(models["cot"]), device="cuda:0" if not torch.cuda.is_available() else "cpu")
    assert lm.max_length == 96 and lm.device.type == "cpu"
    assert harness.PonderaLM(pretrained=str(models["cot"]), device="cpu", max_length=20).max_length == 20
    with pytest.raises(TypeError, match="dtype"):  # not ignored in silence
        harness.PonderaLM(pretrained=str(models["cot"]), dtype="float16")  # pyright: ignore[reportCallIssue]
    with pytest.raises(UserError, match="no such folder"):
        harness.PonderaLM(pretrained="no/such/run")


def test_the_harness_own_command_knows_pondera(models: dict[str, Path], task: dict, tmp_path: Path):
    """`lm_eval --model pondera` as a user types it, in a program that never imported us."""
    path = tmp_path / "local_choice.yaml"
    path.write_text(yaml.safe_dump(task))
    command = [str(Path(sys.executable).with_name("lm_eval")), "--model", "pondera", "--tasks", str(path)]
    command += ["--model_args", f"pretrained={models['ponderlm2']}", "--device", "cpu", "--batch_size", "2"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert "|local_choice|" in done.stdout.replace(" ", ""), done.stderr
