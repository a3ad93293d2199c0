"""Scores of questions about a context whose KV cache was compressed before they were asked.

Shapes: B batch (always 1), T tokens, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pondera.cache.slot_layer import KVStoreLayer
from pondera.core.errors import UserError
from pondera.core.hf import CACHE
from pondera.data.questions.base import AskedContext, Question
from pondera.evaluation.kv_sweep import new_cache
from pondera.inference.load import Loaded
from pondera.methods.kv_cache.base import KVCacheMethod

if TYPE_CHECKING:
    from pondera.models.adaptive_lm import AdaptiveLM

STEPS = 16
"""Decoding steps that are timed."""


@dataclass(frozen=True)
class ContextScore:
    """What a method makes of one context.

    Args:
        nats: for each question, the log-probability of its answer, in nats.
        right: for each question, whether greedy decoding gives the answer.
        cache_bytes: bytes of the cache after the context, without storage for later tokens; 0 without a context.
        prefill_seconds: time to read and compress the context.
        step_seconds: median time of a decoding step after it; 0 if it was not measured.
    """

    nats: tuple[float, ...]
    right: tuple[bool, ...]
    cache_bytes: int = 0
    prefill_seconds: float = 0.0
    step_seconds: float = 0.0


def encode(loaded: Loaded, text: str, start: bool) -> list[int]:
    """Token ids of a text; with the special tokens that the tokenizer puts before one if it is the start."""
    ids: list[int] = loaded.tokenizer(text, add_special_tokens=start).input_ids
    return ids


@torch.no_grad()
def score_context(loaded: Loaded, method: KVCacheMethod, asked: AskedContext, timed: bool = False) -> ContextScore:
    """Reads a context in one call, which compresses it, and asks each question on a copy of the cache.

    Args:
        loaded: the model, in eval mode.
        method: the KV cache method, ready for this model.
        asked: the context and its questions.
        timed: measure the time of a decoding step, too.

    Raises:
        UserError: context and question are longer than the positions of the model.
    """
    model, ids = loaded.model, _context_ids(loaded, asked, max)
    cache, seconds, size = _read(model, method, ids)
    found = [_answered(loaded, question, cache.clone()) for question in asked.questions]
    nats, right = zip(*found, strict=True)
    return ContextScore(nats, right, size, seconds, step_seconds(model, cache) if timed else 0.0)


@torch.no_grad()
def score_known(loaded: Loaded, method: KVCacheMethod, asked: AskedContext, timed: bool = False) -> ContextScore:
    """Reads the context with each question but its last token in one call, which compresses it, and then the rest.

    The method can choose what the question needs; the whole answer is predicted with the compressed cache. Arguments and errors
    are those of `score_context`; each question takes a prefill.
    """
    model, ids = loaded.model, _context_ids(loaded, asked, max)
    found, seconds, sizes, step = [], [], [], 0.0
    for number, question in enumerate(asked.questions):
        text = encode(loaded, question.text, False)
        cache, taken, size = _read(model, method, ids + text[:-1])
        seconds.append(taken)
        sizes.append(size)
        if timed and number == 0:
            step = step_seconds(model, cache.clone())
        found.append(_predicted(loaded, text[-1:], encode(loaded, question.answer, False), cache))
    nats, right = zip(*found, strict=True)
    return ContextScore(nats, right, sum(sizes) // len(sizes), sorted(seconds)[len(seconds) // 2], step)


@torch.no_grad()
def score_turns(loaded: Loaded, method: KVCacheMethod, asked: AskedContext, timed: bool = False) -> ContextScore:
    """Reads the context with the first question but its last token, which compresses both; a conversation follows.

    Each question follows the right answer to the one before, in the same cache. The first question is not scored: all that are
    were unknown when the cache was compressed, as in a chat. Arguments and errors are those of `score_context`.
    """
    model, ids, first = loaded.model, _context_ids(loaded, asked, sum), encode(loaded, _several(asked)[0].text, False)
    cache, seconds, size = _read(model, method, ids + first[:-1])
    step = step_seconds(model, cache.clone()) if timed else 0.0
    return replace(
        _conversation(loaded, first[-1:], asked, cache), cache_bytes=size, prefill_seconds=seconds, step_seconds=step
    )


@torch.no_grad()
def score_turns_without(loaded: Loaded, method: KVCacheMethod, asked: AskedContext) -> ContextScore:
    """The same conversation without the context, with the cache of `method`, which is to be the full one."""
    first = encode(loaded, _several(asked)[0].text, True)
    return _conversation(loaded, first, asked, new_cache(loaded.model, method))


def _conversation(loaded: Loaded, next_: list[int], asked: AskedContext, cache: Any) -> ContextScore:
    """Scores of all questions but the first, whose tokens that are not in the cache are `next_`."""
    found = []
    for number, question in enumerate(asked.questions):
        answer = encode(loaded, question.answer, False)
        text = encode(loaded, question.text, False) if number else []
        found.append(_predicted(loaded, next_ + text, answer, cache))
        next_ = answer[-1:]
    nats, right = zip(*found[1:], strict=True)
    return ContextScore(nats, right)


def _several(asked: AskedContext) -> Sequence[Question]:
    """The questions; refuses a single one."""
    if len(asked.questions) < 2:
        raise UserError(
            "questions in turns: a context needs at least 2 questions, and this kind has 1; give another kind, such as "
            "Needles(8), or ask after the context"
        )
    return asked.questions


def _context_ids(loaded: Loaded, asked: AskedContext, together: Callable[[Iterable[int]], int]) -> list[int]:
    """The token ids of the context; refuses one that leaves no positions for the longest question (`max`) or all (`sum`)."""
    ids, limit = encode(loaded, asked.context, True), loaded.model.positions
    needed = together(len(encode(loaded, one.text + one.answer, False)) for one in asked.questions)
    if limit is not None and len(ids) + needed > limit:
        raise UserError(
            f"a context of {len(ids)} tokens and {needed} tokens of questions exceed the {limit} positions of this model; "
            "shorten it"
        )
    return ids


def _read(model: AdaptiveLM, method: KVCacheMethod, ids: Sequence[int]) -> tuple[Any, float, int]:
    """A cache that has read these tokens in one call, the seconds it took, and the bytes of the cache."""
    cache = new_cache(model, method)
    began = time.perf_counter()
    model(_row(model, ids), logits_to_keep=1, **{CACHE: cache})
    seconds = time.perf_counter() - began
    unused = sum(layer.unused_bytes() for layer in getattr(cache, "layers", ()) if isinstance(layer, KVStoreLayer))
    return cache, seconds, cache.nbytes() - unused


@torch.no_grad()
def score_without(loaded: Loaded, asked: AskedContext) -> ContextScore:
    """The same questions without the context: what the model knows or guesses."""
    found = [_answered(loaded, question, None) for question in asked.questions]
    nats, right = zip(*found, strict=True)
    return ContextScore(nats, right)


def _answered(loaded: Loaded, question: Question, cache: Any) -> tuple[float, bool]:
    """The log-probability of the answer, and whether each of its tokens is the likeliest."""
    return _predicted(
        loaded, encode(loaded, question.text, cache is None), encode(loaded, question.answer, False), cache
    )


def _predicted(loaded: Loaded, text: list[int], answer: list[int], cache: Any) -> tuple[float, bool]:
    """The same for token ids; the text has at least one."""
    model = loaded.model
    out = model(_row(model, text + answer[:-1]), **({} if cache is None else {CACHE: cache}))
    logits_TV = out.logits[0, -len(answer) :].float()
    answer_T = torch.tensor(answer, device=logits_TV.device)
    chosen_T = logits_TV.log_softmax(-1).gather(-1, answer_T[:, None])[:, 0]
    return float(chosen_T.sum()), bool((logits_TV.argmax(-1) == answer_T).all())


@torch.no_grad()
def decoded(loaded: Loaded, cache: Any, context: str, questions: Sequence[Question]) -> list[str]:
    """Reads a context into an empty cache and decodes an answer to each question, as long as the right one."""
    model = loaded.model
    model(_row(model, encode(loaded, context, True)), logits_to_keep=1, **{CACHE: cache})
    found = []
    for question in questions:
        copy, ids, answer = cache.clone(), encode(loaded, question.text, False), []
        for _ in encode(loaded, question.answer, False):
            out = model(_row(model, ids), logits_to_keep=1, **{CACHE: copy})
            ids = [int(out.logits[0, -1].argmax())]
            answer += ids
        found.append(str(loaded.tokenizer.decode(answer)).strip())
    return found


def step_seconds(model: AdaptiveLM, cache: Any, steps: int = STEPS) -> float:
    """The median time of a greedy decoding step after what the cache holds; the cache grows."""
    times, next_BT = [], torch.zeros(1, 1, dtype=torch.long, device=model.device)
    for _ in range(steps):
        began = time.perf_counter()
        next_BT = model(next_BT, **{CACHE: cache}).logits[:, -1:].argmax(-1)
        next_BT.sum().item()  # waits for an accelerator
        times.append(time.perf_counter() - began)
    return sorted(times)[len(times) // 2]


def _row(model: AdaptiveLM, ids: Sequence[int]) -> Tensor:
    return torch.tensor([list(ids)], device=model.device)


def pairs(scores: Sequence[ContextScore]) -> Iterator[tuple[float, bool]]:
    """All answers of several contexts."""
    for score in scores:
        yield from zip(score.nats, score.right, strict=True)
