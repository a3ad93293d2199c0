"""Log-probabilities of many short texts, each in a row of its own: what minimal pairs and last words share.

Shapes: B batch, T tokens, V vocabulary, K scored positions.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from pondera.core.errors import UserError
from pondera.core.evaluation_mode import as_it_was
from pondera.evaluation.chunked_forward import chunked_outputs
from pondera.evaluation.perplexity import context_of
from pondera.inference.generate import start_token
from pondera.inference.load import Loaded
from pondera.models.next_token import IGNORED

if TYPE_CHECKING:
    from pondera.models.adaptive_lm import AdaptiveLM

TOGETHER = 2048
"""Approximate tokens of a batch."""
EVERY = 5.0
"""Seconds between two messages on the progress."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Scored:
    """The tokens of one text, and which of them are scored.

    Args:
        ids: all tokens, beginning with the start token of a document, if the text is whole.
        first: the index of the first scored token, at least 1; all tokens from there on are scored.
        starts: whether the first token is the start token.
    """

    ids: tuple[int, ...]
    first: int = 1
    starts: bool = True


@dataclass
class TextScores:
    """The scores of texts, in the order in which they were given.

    Args:
        nats: the sum of -log p over the scored tokens of each text.
        greedy: whether every scored token of a text is the most probable one after the true tokens before it.
        tokens: the tokens that the model read, without padding.
        passes: the sum of their passes.
        seconds: the time that it took.
    """

    nats: list[float]
    greedy: list[bool]
    tokens: int = 0
    passes: float = 0.0
    seconds: float = 0.0

    def cost(self, rows: int) -> dict[str, Any]:
        """The measures of cost: ``tokens`` read, ``passes_per_token``, and ``rows_per_second`` on this machine."""
        per_second = rows / self.seconds
        return {"tokens": self.tokens, "passes_per_token": self.passes / self.tokens, "rows_per_second": per_second}


def score_texts(
    loaded: Loaded, texts: Sequence[Scored], budget: dict[str, Any] | None = None, batch_size: int | None = None
) -> TextScores:
    """Scores texts in batches of similar length.

    The scores do not depend on the batch: shorter texts are padded on the right and masked. A model with a KV cache method
    reads a few tokens per call through its cache, as in ``pondera eval``; its batches have texts of one length, because
    padding would take part in what the cache evicts. Equal texts are scored once, so that their scores are equal exactly.

    Args:
        loaded: the model; its mode and all random states stay as they are. If its run was trained with
            ``data.document_mask``, a text does not attend to the start token, as in training.
        texts: the texts.
        budget: ``effort`` and ``max_passes``, as the model takes them.
        batch_size: texts per forward pass (default: `None`, as many as have about `TOGETHER` tokens).
    """
    model, masked = loaded.model, _document_mask(loaded)
    unique = {text: number for number, text in enumerate(dict.fromkeys(texts))}
    order = sorted(
        unique, key=lambda text: len(text.ids), reverse=True
    )  # the longest first: memory runs out at once or never
    nats, greedy = [0.0] * len(unique), [False] * len(unique)
    found = TextScores([], [])
    began = told = time.monotonic()
    done = 0
    with as_it_was(model):
        for batch in _batches(order, batch_size, equal=model.kv_cache is not None):
            nats_B, greedy_B, passes = _score_batch(model, batch, budget or {}, masked)
            for text, one, right in zip(batch, nats_B.tolist(), greedy_B.tolist(), strict=True):
                nats[unique[text]], greedy[unique[text]] = one, right
            found.tokens += sum(len(text.ids) - 1 for text in batch)
            found.passes += passes
            done += len(batch)
            if time.monotonic() - told > EVERY:
                told = time.monotonic()
                log.info("%d of %d texts scored, after %.0f s", done, len(order), told - began)
    found.seconds = time.monotonic() - began
    found.nats, found.greedy = [nats[unique[text]] for text in texts], [greedy[unique[text]] for text in texts]
    return found


def check_counts(max_rows: int | None, batch_size: int | None) -> None:
    """Refuses numbers below 1."""
    for name, given in {"max_rows": max_rows, "batch_size": batch_size}.items():
        if given is not None and given < 1:
            raise UserError(f"{name}={given}: give 1 or more, or leave it out")


def document_start(loaded: Loaded) -> int:
    """The token that stands before the first token of a text.

    Pondera trains without BOS: a document follows the EOS token of the document before it. Other models get BOS, or EOS if
    their tokenizer has no BOS.
    """
    eos = loaded.tokenizer.eos_token_id
    return start_token(loaded.tokenizer) if loaded.foreign or eos is None else cast(int, eos)


def most_tokens(loaded: Loaded, context: int | None) -> int | None:
    """How many tokens of a text a model may read: the given context, or the one that its run was trained with, or the
    positions of a model without a run (`None`: no limit)."""
    return loaded.model.positions if context is None and loaded.run is None else context_of(context, loaded)


def _document_mask(loaded: Loaded) -> bool:
    return loaded.run is not None and loaded.run.config.data.document_mask and loaded.model.kv_cache is None


def _batches(order: list[Scored], batch_size: int | None, equal: bool) -> Iterator[list[Scored]]:
    """Texts in the order given, in batches; with `equal`, of one length each."""
    batch: list[Scored] = []
    for text in order:
        most = batch_size or max(1, TOGETHER // len(batch[0].ids)) if batch else 1
        if batch and (len(batch) == most or (equal and len(text.ids) != len(batch[0].ids))):
            yield batch
            batch = []
        batch.append(text)
    if batch:
        yield batch


def _score_batch(
    model: AdaptiveLM, batch: list[Scored], budget: dict[str, Any], masked: bool
) -> tuple[Tensor, Tensor, float]:
    """The summed nats and whether all scored tokens are the most probable, ``[B]`` each; and the sum of all passes."""
    longest = max(len(text.ids) for text in batch)
    ids_BT = torch.tensor([[*text.ids, *[text.ids[0]] * (longest - len(text.ids))] for text in batch])
    at_T = torch.arange(longest)
    first_B1, length_B1 = (
        torch.tensor(each)[:, None] for each in zip(*((t.first, len(t.ids)) for t in batch), strict=True)
    )
    labels_BT = ids_BT.where((at_T >= first_B1) & (at_T < length_B1), IGNORED)[:, 1:].to(model.device)
    real_BT = (at_T < length_B1 - 1)[:, :-1].to(model.device)
    kept_K = (labels_BT != IGNORED).any(0).nonzero()[:, 0]
    given: dict[str, Any] = {}
    if masked:
        starts_B1 = torch.tensor([text.starts for text in batch])[:, None]
        documents_BT = 1 + (starts_B1 & (at_T > 0))[:, :-1].long()
        given["document_ids"] = documents_BT.to(model.device) * real_BT
    elif not bool(real_BT.all()):
        given["attention_mask"] = real_BT.long()
    logits_BKV, passes_BT = _outputs(model, ids_BT[:, :-1].to(model.device), kept_K, given, budget)
    labels_BK = labels_BT[:, kept_K]
    nats_N = F.cross_entropy(
        logits_BKV.float().flatten(0, 1), labels_BK.flatten(), ignore_index=IGNORED, reduction="none"
    )
    right_BK = (logits_BKV.argmax(-1) == labels_BK) | (labels_BK == IGNORED)
    return nats_N.view_as(labels_BK).double().sum(1), right_BK.all(1), float((passes_BT * real_BT).sum())


def _outputs(
    model: AdaptiveLM, ids_BT: Tensor, kept_K: Tensor, given: dict[str, Any], budget: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Logits at the kept positions ``[B, K, V]``, and passes ``[B, T]``."""
    if model.kv_cache is None:
        out = model(ids_BT, logits_to_keep=kept_K, **given, **budget)
        return out.logits, out.passes
    outs = [out for _, out in chunked_outputs(model, model.new_cache(), ids_BT, budget=budget)]
    logits, passes = ([cast(Tensor, getattr(out, name)) for out in outs] for name in ("logits", "passes"))
    return torch.cat(logits, 1)[:, kept_K], torch.cat(passes, 1)
