"""Questions after compression: how much of what a context tells a model is left in its compressed KV cache.

    python benchmarks/kv_questions.py --model MODEL --data xquad.en.json

A context is a number of consecutive paragraphs of a file in the format of SQuAD. It is read and compressed before any of its
questions is known; the cache then goes back to it after each question. What a method keeps is the gain in log-probability of
the answers, as a share of the gain with the full cache; the model without context gains nothing.
"""

from __future__ import annotations

import argparse
import json
import lzma
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pondera.core import spec
from pondera.core.hf import CACHE

METHODS = (
    "KVzip(0.25)",
    "ExpectedAttention(0.25)",
    "KeyDiff(0.25, recent=32, sinks=4)",
    "SnapKV(0.25)",
    "RandomEviction(0.25)",
)
FULL, NONE = "full cache", "no context"


@dataclass(frozen=True)
class Question:
    """A question, with its answer, as token ids."""

    asked: list[int]
    answer: list[int]


def contexts(data: Path, tokenizer: Any, tokens: int, questions: int) -> Iterator[tuple[list[int], list[Question]]]:
    """Contexts of at most `tokens` tokens, and `questions` of the questions about each, evenly spread.

    Args:
        data: a JSON file in the format of SQuAD, or one compressed by xz.
        tokenizer: of the model.
        tokens: most tokens of a context.
        questions: number of questions per context.
    """
    opened = lzma.open(data, "rt") if data.suffix == ".xz" else data.open()
    with opened as file:
        articles = json.load(file)["data"]
    paragraphs = [paragraph for article in articles for paragraph in article["paragraphs"]]
    ids: list[int] = []
    asked: list[Question] = []
    for paragraph in paragraphs:
        new = tokenizer(paragraph["context"] + "\n\n", add_special_tokens=False).input_ids
        if ids and len(ids) + len(new) > tokens:
            yield ids, asked[:: max(1, len(asked) // questions)][:questions]
            ids, asked = [], []
        ids = ids + new
        for one in paragraph["qas"]:
            question = tokenizer(f"Question: {one['question']}\nAnswer:", add_special_tokens=False).input_ids
            answer = tokenizer(f" {one['answers'][0]['text']}", add_special_tokens=False).input_ids
            asked.append(Question(question, answer))


@torch.no_grad()
def answered(model: Any, question: Question, cache: Any = None) -> float:
    """The log-probability of the right answer in nats, after what is in the cache; the cache stays as it was."""
    ids_1T = torch.tensor([question.asked + question.answer])
    if cache is not None:
        cache.activate_past_recording()
    logits_AV = model(ids_1T, **{CACHE: cache}, logits_to_keep=len(question.answer) + 1).logits[0, :-1]
    if cache is not None:
        cache.crop(-ids_1T.shape[1])
    answer_A1 = torch.tensor(question.answer)[:, None]
    return float(logits_AV.log_softmax(-1).gather(1, answer_A1).sum())


@torch.no_grad()
def measured(model: Any, method: str, ids: list[int], questions: list[Question]) -> dict[str, Any]:
    """The sum of the log-probabilities of all answers about one context, and the bytes of the compressed cache."""
    if method == NONE:
        return {"logp": sum(answered(model, question) for question in questions)}
    cache = spec.build("PreallocatedCache()" if method == FULL else method, "kv_cache").cache(model)
    start = time.perf_counter()
    model(torch.tensor([ids]), **{CACHE: cache}, logits_to_keep=1)
    seconds, slots = time.perf_counter() - start, cache.nbytes()
    return {
        "logp": sum(answered(model, each, cache) for each in questions),
        "bytes": slots,
        "prefill_s": round(seconds, 1),
    }


def shares(found: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """What each method keeps of the gain of the full cache: over all contexts, and of each."""
    rows = []
    full, none = ([one["logp"] for one in found[name]] for name in (FULL, NONE))
    for method, results in found.items():
        logp = [one["logp"] for one in results]
        each = [(a - n) / (f - n) for a, f, n in zip(logp, full, none, strict=True)]
        row = {"method": method, "kept": (sum(logp) - sum(none)) / (sum(full) - sum(none)), "kept_by_context": each}
        if method != NONE:
            row["bytes"] = sum(one["bytes"] for one in results) / len(results)
            row["prefill_s"] = sum(one["prefill_s"] for one in results) / len(results)
        rows.append(row)
    return rows


def main() -> None:
    """Measures all methods on all contexts; the file is rewritten after each context."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or hub name")
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--method", action="append", help=f"spec string of a method; default: {', '.join(METHODS)}")
    parser.add_argument("--contexts", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=1900)
    parser.add_argument("--questions", type=int, default=10, help="per context")
    parser.add_argument("--out", type=Path, default=Path("results/kv-questions.json"))
    args = parser.parse_args()
    model: Any = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in (FULL, NONE, *(args.method or METHODS))}
    for number, (ids, questions) in enumerate(contexts(args.data, tokenizer, args.tokens, args.questions)):
        if number == args.contexts:
            break
        for method, results in found.items():
            results.append(measured(model, method, ids, questions))
        rows = shares(found)
        said = {
            "command": "python benchmarks/kv_questions.py --model MODEL --data xquad.en.json",
            "model": f"{model.config.model_type}, {model.num_parameters() / 1e6:.0f} M parameters",
            "contexts": number + 1,
            "tokens": args.tokens,
            "questions": args.questions,
            "rows": rows,
        }
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(said, indent=1) + "\n")
        print(f"{number + 1} contexts: " + ", ".join(f"{row['method']} {row['kept']:.0%}" for row in rows), flush=True)


if __name__ == "__main__":
    main()
