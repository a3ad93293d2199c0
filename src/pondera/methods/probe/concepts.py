"""Concept inspection: the chunks of a text to which a model assigns each code.

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
"""Maximum number of tokens read at a time; fewer if the model has fewer positions."""


@dataclass(frozen=True)
class Chunk:
    """A chunk of a text.

    Args:
        text: its tokens as text.
        codes: the codes of its concept, one per segment (with several levels, the first).
        predicted: the codes that the model predicted for it; ``None`` for the first chunk of a window.
    """

    text: str
    codes: list[int]
    predicted: list[int] | None


def read(model: AdaptiveLM, tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> list[Chunk]:
    """Reads a text window by window and returns its complete chunks.

    Raises:
        UserError: the model has no concepts, or its codebooks are not initialized.
    """
    import torch

    window = min(WINDOW, model.positions or WINDOW)
    chunks = []
    with observed(model):
        for start in range(0, len(ids), window):
            piece = ids[start : start + window]
            trace = model(torch.tensor([piece], device=model.device)).trace
            if "concepts" not in trace:
                raise UserError(
                    "this model has no concepts, so there is nothing to read; give a model that was trained with "
                    'chunk: "ConceptLM()"'
                )
            size, before, ends = trace["chunk"], None, trace["ends"][0].tolist()
            codes, predicted = (trace[name][0, :, :, 0].tolist() for name in ("concepts", "predicted"))
            if any(code < 0 for end, own in zip(ends, codes, strict=True) if end >= 0 for code in own):
                raise UserError("the codebooks are not initialized yet; train the model past its warm-up (start_step)")
            for end, own, following in zip(ends, codes, predicted, strict=True):
                if end >= 0:
                    words = tokenizer.decode(piece[end + 1 - size : end + 1], clean_up_tokenization_spaces=False)
                    chunks.append(Chunk(str(words), own, before))
                    before = following
    return chunks


class Concepts(Probe):
    """Lists, for each code of a concept model, the chunks that have this code, so that a reader can interpret it.

    A concept has one code per segment. The codes of a segment are sorted by use; each code is shown with its most
    frequent chunks. If these chunks have something in common, this is the meaning of the code. If not, the code may
    still mean something to the model.

    Source: interpreting units by the inputs that activate them is common practice; applying this to concepts
    (ConceptLM, arXiv 2602.08984) is ours.
    Cost: one pass over the text.
    When not to use it: to measure whether concepts help; ``pondera eval --effort 0,1`` compares with and without them.
    Resolved: the probe shows the code of the chunk itself, not the code predicted for it.

    Args:
        top: number of chunks per code.
        codes: number of codes per segment, the most used first.
        segments: number of segments.
        max_tokens: maximum number of tokens to read, from the beginning of the text.

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
            ``chunks``: the number of chunks; ``segments``: for each segment its number, ``used`` (number of codes that
            occur) and its ``codes``, each with its number, its ``share`` of the chunks and its most frequent texts.
        """
        if not text:
            raise UserError("the text is empty; give one of a few thousand tokens")
        ids, _ = next(encode([text], tokenizer, model.embedded))
        counters: dict[int, dict[int, Counter[str]]] = {}
        for chunk in read(model, tokenizer, ids[: self.max_tokens].tolist()):
            for segment, code in enumerate(chunk.codes):
                counters.setdefault(segment, {}).setdefault(code, Counter())[chunk.text] += 1
        if not counters:
            raise UserError("the text is shorter than one chunk; give a longer one")
        chunks = sum(sum(counter.values()) for counter in counters[0].values())
        segments = []
        for segment in list(counters)[: self.segments]:
            by_use = sorted(counters[segment].items(), key=lambda item: -sum(item[1].values()))
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
        """One row per code."""
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
        return Shown(["segment", "code", "chunks", "most frequent"], rows, note)


def cell(text: str) -> str:
    """Formats a chunk for a table: quoted, on one line, safe to print."""
    return "“" + escape(text).replace("\n", "").replace("\t", "⇥") + "”"
