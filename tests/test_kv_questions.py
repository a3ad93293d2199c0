"""Questions after compression: what a share of the gain is, and that the cache goes back to its context."""

from __future__ import annotations

import json
import lzma
from pathlib import Path
from typing import Any

import pytest
from helpers import scripts
from helpers.architectures import ids
from helpers.policy_reference import kept, model, run

from pondera.methods.kv_cache.kv_zip import KVzip

BENCHMARK: Any = scripts.load("kv_questions", "benchmarks")


class Letters:
    """A tokenizer whose tokens are letters."""

    def __call__(self, text: str, **_: Any) -> Any:
        return type("Encoded", (), {"input_ids": [ord(letter) % 97 for letter in text]})


def test_what_is_kept_is_a_share_of_the_gain_of_the_full_cache():
    logp = {"full cache": [-2.0, -4.0], "no context": [-12.0, -8.0], "half": [-7.0, -6.0], "first": [-2.0, -8.0]}
    found = {name: [{"logp": one, "bytes": 8, "prefill_s": 1.0} for one in each] for name, each in logp.items()}
    rows = {row["method"]: row for row in BENCHMARK.shares(found)}
    assert [row["kept"] for row in rows.values()] == pytest.approx([1, 0, 0.5, 10 / 14])
    assert rows["first"]["kept_by_context"] == [1, 0] and "bytes" not in rows["no context"]


@pytest.mark.parametrize("packed", [False, True])
def test_a_context_is_of_whole_paragraphs_with_questions_about_them(packed: bool, tmp_path: Path):
    paragraphs = [
        {"context": letter * 8, "qas": [{"question": f"{letter}{n}", "answers": [{"text": "x"}]} for n in range(3)]}
        for letter in "abc"
    ]
    text, file = json.dumps({"data": [{"paragraphs": paragraphs}]}), tmp_path / ("a.json.xz" if packed else "a.json")
    file.write_bytes(lzma.compress(text.encode()) if packed else text.encode())
    ((tokens, questions),) = BENCHMARK.contexts(file, Letters(), 25, 2)  # the last context may be cut short
    assert tokens == Letters()("aaaaaaaa\n\nbbbbbbbb\n\n").input_ids
    assert [one.asked for one in questions] == [Letters()(f"Question: {q}\nAnswer:").input_ids for q in ("a0", "b0")]
    assert questions[0].answer == Letters()(" x").input_ids


def test_a_question_leaves_no_trace_and_its_answer_is_scored():
    lm, context = model(), ids(1, 40)
    cache = run(KVzip(40), context, [40])
    question = BENCHMARK.Question([5, 6, 7], [8, 9])
    said = [BENCHMARK.answered(lm, question, cache) for _ in range(2)]
    logits = lm(context.new_tensor([[*context[0].tolist(), 5, 6, 7, 8, 9]])).logits[0].log_softmax(-1)
    assert said[0] == said[1] == pytest.approx(float(logits[42, 8] + logits[43, 9]), abs=1e-3)
    assert kept(cache) == [[[*range(40)]] * 2] * 2
