"""Checks additional keywords of a forward call, and arguments with two names; unknown ones raise.

Shapes: B batch, T tokens.
"""

from __future__ import annotations

from typing import Any

import torch

from pondera.core.errors import UserError, unknown
from pondera.core.hf import Cache

SHIFT_LABELS = "shift_labels"
"""``[B, T]``, the token after each input. Not a parameter: transformers' Trainer expects every parameter with "label" in its
name in each batch, and computes no evaluation loss if one is missing."""

PASSED = frozenset(
    {
        # passed by `generate`; the tokenizer is for its stopping criteria
        "assistant_tokenizer",
        "cache_position",
        "tokenizer",
        "output_router_logits",
        "is_first_iteration",
        # passed by data collators that pack documents, in addition to position ids with the same information
        "cu_seq_lens_q",
        "cu_seq_lens_k",
        "max_length_q",
        "max_length_k",
        "seq_idx",
    }
)
"""Keywords that transformers passes and that are ignored."""

LENGTHS = frozenset({"cu_seq_lens_q", "cu_seq_lens_k", "seq_idx"})

_INSTEAD = {
    "output_hidden_states": "set model.method.record = True and read out.trace, or call model.backbone.lm(...)",
    "output_attentions": "call model.backbone.lm(..., output_attentions=True)",
}


def check_keywords(given: dict[str, Any], parameters: list[str], positioned: bool) -> None:
    """Raises for keywords of a forward call that are unknown or not supported.

    Args:
        given: keywords that are not parameters; `None` and `False` are always accepted.
        parameters: parameters of the forward.
        positioned: whether position ids were given.

    Raises:
        UserError: an unknown keyword (with the nearest known one), or a request that is not supported.
    """
    for name, value in given.items():
        asked = value is not None and value is not False
        if name in _INSTEAD:
            if asked:
                raise UserError(f"{name}: an AdaptiveLM returns final hidden states only; {_INSTEAD[name]}")
        elif name == "token_type_ids":
            if asked and bool(torch.as_tensor(value).any()):
                raise UserError("token_type_ids: causal models have one token type; leave it out")
        elif name in LENGTHS:
            if asked and not positioned:
                raise UserError(f"{name}: the start of each document is read from position_ids; pass position_ids, too")
        elif name not in PASSED:
            allowed = {*parameters, SHIFT_LABELS, "past_key_values", "cache"}
            raise unknown("keyword of forward", name, allowed - {"self", "kwargs"})


def one_cache(cache: Cache | None, past_key_values: Cache | None) -> Cache | None:
    """The cache of a call, which has two names in transformers."""
    if cache is None:
        return past_key_values
    if past_key_values is not None and past_key_values is not cache:
        raise UserError(
            "cache and past_key_values are two names of one argument, but two different caches were given; give one"
        )
    return cache
