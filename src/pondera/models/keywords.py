"""What else a forward may be called with: known keywords are taken, others are refused by name.

Shapes: B batch, T tokens.
"""

from __future__ import annotations

from typing import Any

import torch

from pondera.core.errors import UserError, unknown

SHIFT_LABELS = "shift_labels"
"""``[B, T]``, the token after each input. Not a parameter of its own: transformers' Trainer takes every parameter with
"label" in its name for one that each batch must have, and computes no evaluation loss where it is missing."""

PASSED = frozenset(
    {
        # by `generate`, to every model; the tokenizer is for its stopping criteria
        "assistant_tokenizer",
        "cache_position",
        "tokenizer",
        "output_router_logits",
        "is_first_iteration",
        # by data collators that lay texts end to end, beside the position ids that say the same
        "cu_seq_lens_q",
        "cu_seq_lens_k",
        "max_length_q",
        "max_length_k",
        "seq_idx",
    }
)
"""Keywords that transformers passes and that change nothing here."""

LENGTHS = frozenset({"cu_seq_lens_q", "cu_seq_lens_k", "seq_idx"})

_INSTEAD = {
    "output_hidden_states": "set model.method.record = True and read out.trace, or call model.backbone.lm(...)",
    "output_attentions": "call model.backbone.lm(..., output_attentions=True)",
}


def check_keywords(given: dict[str, Any], parameters: list[str], positioned: bool) -> None:
    """Refuses what a forward was given beyond its parameters and cannot heed.

    Args:
        given: keywords that are no parameter; those that are `None` or `False` ask for nothing.
        parameters: the forward's own.
        positioned: position ids were given, too.

    Raises:
        UserError: an unknown keyword (with the nearest known one), or a known one that asks for what is not there.
    """
    for name, value in given.items():
        asked = value is not None and value is not False
        if name in _INSTEAD:
            if asked:
                raise UserError(f"{name}: an AdaptiveLM returns final states only; {_INSTEAD[name]}")
        elif name == "token_type_ids":
            if asked and bool(torch.as_tensor(value).any()):
                raise UserError("token_type_ids: causal models know one type of token; leave it out")
        elif name in LENGTHS:
            if asked and not positioned:
                raise UserError(f"{name}: where texts begin is read from position_ids; pass position_ids, too")
        elif name not in PASSED:
            allowed = {*parameters, SHIFT_LABELS, "past_key_values", "cache"}
            raise unknown("keyword of forward", name, allowed - {"self", "kwargs"})
