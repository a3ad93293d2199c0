"""What each token of a text took, and how surprising it was.

Shapes: B batch (1), T tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pondera.ground.errors import UserError
from pondera.ground.tokens import encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from pondera.model.lm import AdaptiveLM

TRACED = 200  # tokens, at most


def trace(model: AdaptiveLM, tokenizer: PreTrainedTokenizerFast, text: str, context: int) -> dict[str, list]:
    """What each token of a text's beginning took, and how surprising it was.

    Args:
        model: any mode; left as it was.
        tokenizer: its tokenizer.
        text: its first tokens (as many as 200, or `context` - 1) are traced; they are read after the token that starts
            a text, so that the first has a loss too.
        context: most tokens that the model may see.

    Returns:
        ``tokens`` (the text that each completes), ``passes`` that each took, and ``nll``, the negative log-likelihood
        of each in nats.

    Raises:
        UserError: no token to trace, or no token that starts a text.
    """
    import torch
    from torch.nn import functional as F

    from pondera.jobs.generate import Stream, start_token

    ids, _ = next(encode([text], tokenizer))
    traced = ids[: min(TRACED, context - 1)].tolist()
    if not traced:
        raise UserError("there is no token to trace: the text is empty, or the context has room for its start only")
    ids_BT = torch.tensor([[start_token(tokenizer), *traced]])
    stream = Stream(tokenizer)
    stream.put(ids_BT[0, 1:])
    stream.end()
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            out = model(ids_BT.to(model.device))
    finally:
        model.train(was_training)
    nll_T = F.cross_entropy(out.logits[0, :-1].float(), ids_BT[0, 1:].to(model.device), reduction="none")
    return {"tokens": stream.tokens, "passes": out.passes[0, 1:].double().tolist(), "nll": nll_T.tolist()}
