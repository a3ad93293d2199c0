"""The demo of KV cache methods: a chat model reads a long text, its cache is compressed, and the same questions are asked."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from pondera.core.errors import UserError
from pondera.data.questions.base import AskedContext, Question
from pondera.evaluation.kv_bench import BenchRow, BenchSettings, bench, contexts
from pondera.evaluation.kv_sweep import new_cache, ready
from pondera.evaluation.question_score import decoded
from pondera.inference.default_model import NAME
from pondera.inference.load import Loaded, load

SETTINGS = BenchSettings(("Needles(6)",), ("KVzip(0.25)", "SnapKV(0.25)", "KIVI(4)"), tokens=1500, contexts=2)
SHOWN = 4
"""Questions whose answers are shown."""


@dataclass(frozen=True)
class Answers:
    """A question, the right answer, and what the model says with each cache.

    Args:
        question: the question.
        right: the right answer.
        given: the decoded answer by method.
    """

    question: str
    right: str
    given: dict[str, str]


@dataclass(frozen=True)
class KVDemo:
    """What the demo measured.

    Args:
        name: of the model.
        why: why it is not the real model; empty if it is.
        tokens: the length of a context.
        rows: one for each method, the full cache first.
        answers: some questions and their answers.
    """

    name: str
    why: str
    tokens: int
    rows: list[BenchRow]
    answers: list[Answers]


def kv_demo(
    settings: BenchSettings | None = None, store: Path | None = None, say: Callable[[str], None] = lambda _: None
) -> KVDemo:
    """Asks a real chat model, or a tiny one of random weights where the package index cannot be reached.

    Args:
        settings: what is measured, with one kind of questions; default: `None`, those of the demo.
        store: a file that keeps every finished row; see `pondera.evaluation.kv_bench.bench`.
        say: receives progress messages.
    """
    settings = settings or SETTINGS
    loaded, why = _model()
    rows = bench(loaded, settings, store=store, say=say)
    asked = contexts(loaded, settings, settings.questions[0])[0]
    shown = asked.questions[:SHOWN]
    given = {row.method: _answers(loaded, row.method, asked, shown) for row in rows}
    answers = [
        Answers(_plain(question), question.answer.strip(), {method: texts[number] for method, texts in given.items()})
        for number, question in enumerate(shown)
    ]
    return KVDemo(loaded.name, why, settings.tokens, rows, answers)


def _model() -> tuple[Loaded, str]:
    """The default model; if it cannot be had, a tiny one, and why."""
    try:
        return load(NAME), ""
    except UserError as error:
        return _tiny(), str(error)


def _tiny() -> Loaded:
    """A Llama of random weights with a tokenizer of the standard library's language reference."""
    from pondera.data.questions.common.prose import paragraphs
    from pondera.data.tokenizer import train_tokenizer
    from pondera.models.adaptive_lm import AdaptiveLM
    from pondera.models.config import AdaptiveConfig

    tokenizer = train_tokenizer(list(paragraphs("stdlib", random.Random(0))), 2048)
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4, "num_attention_heads": 4}
    more = {"vocab_size": len(tokenizer), "num_key_value_heads": 2, "max_position_embeddings": 8192}
    config = AdaptiveConfig(backbone={"model_type": "llama", **sizes, **more})
    return Loaded(AdaptiveLM(config).eval(), tokenizer, "a tiny model of random weights")


@torch.no_grad()
def _answers(loaded: Loaded, text: str, asked: AskedContext, shown: tuple[Question, ...]) -> list[str]:
    """The greedy answers with the cache of one method."""
    method = ready(loaded.model, text, (), lambda _: None)
    cache = new_cache(loaded.model, method)
    return decoded(loaded, cache, asked.context, shown)


def _plain(question: Question) -> str:
    """The question without the words around it."""
    return question.text.strip().removeprefix("Question: ").partition("\n")[0]
