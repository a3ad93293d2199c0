"""What a concept stands for: the chunks of a text that each code was given to.

Shapes: B batch (1), M chunks, G segments, R levels.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pondera.core.errors import UserError
from pondera.core.escape import escape
from pondera.data.tokenizer import encode
from pondera.methods.probe.base import Probe, Shown, observed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from pondera.models.adaptive_lm import AdaptiveLM

WINDOW = 256
"""Tokens read at a time, or as many as the model has positions."""


@dataclass(frozen=True)
class CodedChunk:
    """A chunk of a text.

    Args:
        text: its tokens.
        codes: of its concept, one per segment (of several levels the first).
        predicted: those that the model had predicted for it; none where nothing stood before it.
    """

    text: str
    codes: list[int]
    predicted: list[int] | None


def read(model: AdaptiveLM, tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> list[CodedChunk]:
    """The complete chunks of a text, which is read a window at a time.

    Raises:
        UserError: the model has no concepts, or its codebooks have not begun.
    """
    import torch

    window = min(WINDOW, model.positions or WINDOW)
    found = []
    with observed(model):
        for start in range(0, len(ids), window):
            piece = ids[start : start + window]
            trace = model(torch.tensor([piece], device=model.device)).trace
            if "concepts" not in trace:
                raise UserError(
                    "this model has no concepts, so there is nothing to read; give one that was trained with "
                    'chunk: "ConceptLM()"'
                )
            size, before, ends = trace["chunk"], None, trace["ends"][0].tolist()
            codes, predicted = (trace[name][0, :, :, 0].tolist() for name in ("concepts", "predicted"))
            if any(code < 0 for end, own in zip(ends, codes, strict=True) if end >= 0 for code in own):
                raise UserError("its codebooks have not begun yet; train it past its warm-up (start_step)")
            for end, own, following in zip(ends, codes, predicted, strict=True):
                if end >= 0:
                    words = tokenizer.decode(piece[end + 1 - size : end + 1], clean_up_tokenization_spaces=False)
                    found.append(CodedChunk(str(words), own, before))
                    before = following
    return found


class Concepts(Probe):
    """Lists for each code of a concept model the chunks it was given to, so that one can read what it means.

    A concept has one code per segment; a segment's codes are listed by use, each with the chunks that it stood for most
    often. A code whose chunks have something in common to a reader's eye means that; one whose chunks have not may still
    mean something to the model.

    Source: reading off what units respond to is common practice; of concepts (ConceptLM, arXiv 2602.08984) it is ours.
    Cost: one pass over the text.
    When not to use it: to measure whether concepts help; ``pondera eval --effort 0,1`` leaves them out and compares.
    Resolved: the code shown is that of the chunk itself, not the one that was predicted for it.

    Args:
        top: chunks shown per code.
        codes: codes shown per segment, the most used first.
        segments: segments shown.
        max_tokens: tokens of the text's beginning to read.

    Example:
        >>> Concepts(top=5)
        Concepts(5)
    """

    def __init__(self, top: int = 6, codes: int = 4, segments: int = 4, max_tokens: int = 16384) -> None:
        for name, value in (("top", top), ("codes", codes), ("segments", segments), ("max_tokens", max_tokens)):
            if value < 1:
                raise UserError(f"{name}={value}: give 1 or more")
        self.top, self.codes, self.segments, self.max_tokens = top, codes, segments, max_tokens

    def run(self, model: AdaptiveLM, tokenizer: PreTrainedTokenizerFast, text: str) -> dict[str, Any]:
        """See `Probe.run`.

        Returns:
            ``chunks``: how many were read; ``segments``: for each its number, ``used`` (codes that some chunk has) and its
            ``codes``, each with its number, the ``share`` of chunks that have it and their most frequent texts.
        """
        if not text:
            raise UserError("the text is empty; give one of a few thousand tokens")
        ids, _ = next(encode([text], tokenizer, model.embedded))
        found: dict[int, dict[int, Counter[str]]] = {}
        for chunk in read(model, tokenizer, ids[: self.max_tokens].tolist()):
            for segment, code in enumerate(chunk.codes):
                found.setdefault(segment, {}).setdefault(code, Counter())[chunk.text] += 1
        if not found:
            raise UserError("the text is shorter than one chunk; give a longer one")
        chunks = sum(sum(counter.values()) for counter in found[0].values())
        segments = []
        for segment in list(found)[: self.segments]:
            by_use = sorted(found[segment].items(), key=lambda item: -sum(item[1].values()))
            codes = [
                {
                    "code": code,
                    "share": sum(counter.values()) / chunks,
                    "chunks": [{"text": text, "count": count} for text, count in counter.most_common(self.top)],
                }
                for code, counter in by_use[: self.codes]
            ]
            segments.append({"segment": segment, "used": len(by_use), "codes": codes})
        return {"chunks": chunks, "segments": segments}

    def show(self, found: dict[str, Any]) -> Shown:
        """A line per code."""
        rows = [
            [
                str(segment["segment"] + 1),
                str(code["code"]),
                f"{code['share']:.1%}",
                "  ".join(f"{cell(chunk['text'])} ×{chunk['count']}" for chunk in code["chunks"]),
            ]
            for segment in found["segments"]
            for code in segment["codes"]
        ]
        used = ", ".join(str(segment["used"]) for segment in found["segments"])
        note = f"{found['chunks']} chunks read; codes in use by segment: {used}"
        return Shown(["segment", "code", "chunks", "most often"], rows, note)


def cell(text: str) -> str:
    """A chunk in a table: quoted, on one line, safe to print."""
    return "“" + escape(text).replace("\n", "").replace("\t", "⇥") + "”"
