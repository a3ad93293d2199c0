"""Traces of a model on text: passes and negative log-likelihood of each token.

Shapes: B batch, C context, T tokens, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from pondera.core.errors import UserError
from pondera.data.corpus import AnyCorpus
from pondera.data.tokenizer import encode
from pondera.evaluation.halting_stats import halting_stats
from pondera.methods.probe.base import observed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from pondera.models.adaptive_lm import AdaptiveLM

TRACED = 200  # maximum number of traced tokens
COUNTED = 1_000_000  # training tokens used to rank tokens by frequency; the documents are shuffled


def trace(model: AdaptiveLM, tokenizer: PreTrainedTokenizerFast, text: str, context: int) -> dict[str, list]:
    """Passes and negative log-likelihood of each token at the beginning of a text.

    Args:
        model: in any mode, which stays as it is.
        tokenizer: the tokenizer of the model.
        text: its first tokens are traced, at most 200 and at most `context` - 1. A start token precedes them, so the
            first one has a loss too.
        context: maximum number of tokens that the model may see.

    Returns:
        ``tokens`` (the text that each token completes), the ``passes`` of each token, and ``nll``, the negative
        log-likelihood of each token in nats.

    Raises:
        UserError: there is no token to trace, or the tokenizer has no start token.
    """
    import torch
    from torch.nn import functional as F

    from pondera.inference.generate import Stream, start_token

    ids, _ = next(encode([text], tokenizer, model.embedded))
    traced = ids[: min(TRACED, context - 1)].tolist()
    if not traced:
        raise UserError("there is no token to trace: the text is empty, or data.context is 1; give a longer one")
    ids_BT = torch.tensor([[start_token(tokenizer), *traced]])
    stream = Stream(tokenizer)
    stream.put(ids_BT[0, 1:])
    stream.end()
    with observed(model, record=False):
        ids_on_device = ids_BT.to(model.device)
        out = model(ids_on_device, labels=ids_on_device)  # the oracle control reads the labels, as in scoring
    nll_T = F.cross_entropy(out.logits[0, :-1].float(), ids_on_device[0, 1:], reduction="none")
    return {"tokens": stream.tokens, "passes": out.passes[0, 1:].double().tolist(), "nll": nll_T.tolist()}


def trace_halting(
    model: AdaptiveLM,
    corpus: AnyCorpus,
    context: int,
    max_tokens: int,
    batch_size: int = 8,
    document_mask: bool = False,
) -> dict[str, Any]:
    """Halting statistics over the first windows of the held-out text.

    Args:
        model: in any mode, which stays as it is.
        corpus: the training corpus of the model.
        context: tokens per window.
        max_tokens: read at most this many tokens, but at least one window.
        batch_size: windows per forward pass.
        document_mask: tokens attend within their own document only.

    Returns:
        What `halting_stats` returns. If the method refines its thoughts in Jacobi rounds, also ``residuals``: the largest
        change in each round, over the first windows.

    Raises:
        UserError: the sample has fewer than two tokens, so no token has a loss.
    """
    import torch
    from torch.nn import functional as F

    from pondera.data.sampler import collate

    windows = corpus.validation.windows(context, document_mask)
    count = min(len(windows), max(1, max_tokens // context))
    if count * context < 2:
        raise UserError("there is no token to trace: the sample has only one token; use a larger data.context")
    passes, nll, residuals = [], [], []
    for first in range(0, count, batch_size):
        batch = collate([windows[index] for index in range(first, min(first + batch_size, count))])
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        with observed(model, record=first == 0):
            out = model(**batch)
        passes.append(out.passes.flatten().double().cpu().numpy())
        targets_T = batch["shift_labels"].flatten()
        nll.append(F.cross_entropy(out.logits.flatten(0, 1).float(), targets_T, reduction="none").cpu())
        residuals += out.trace.get("residuals", [])
    ids_T, nll_T = corpus.validation.ids[: count * context].astype(np.int64), torch.cat(nll).double().numpy()
    # The model predicts each token at the token before it, also across windows; only the first token has no loss.
    stats = halting_stats(
        _texts(ids_T, corpus.tokenizer())[1:],
        np.concatenate(passes)[1:],
        read=nll_T[:-1],
        predicted=nll_T[1:],
        ranks=_ranks(corpus)[ids_T[1:]],
    )
    return stats | ({"residuals": residuals} if residuals else {})


def _texts(ids_T: np.ndarray, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """The text that each token completes; empty for special tokens."""
    import torch

    from pondera.inference.generate import Stream

    stream = Stream(tokenizer)
    stream.put(torch.from_numpy(ids_T))
    special = set(tokenizer.all_special_ids)
    return ["" if token in special else text for token, text in zip(ids_T.tolist(), stream.tokens, strict=True)]


def _ranks(corpus: AnyCorpus) -> np.ndarray:
    """The frequency rank of each id of the vocabulary in the training text, starting at 1: ``[V]``."""
    counts_V = np.bincount(corpus.train.ids[:COUNTED].astype(np.int64), minlength=corpus.vocab_size)
    ranks_V = np.empty_like(counts_V)
    ranks_V[np.argsort(-counts_V, kind="stable")] = np.arange(1, len(counts_V) + 1)
    return ranks_V
