"""Think trace: the next tokens that a model predicts after each of its passes.

Shapes: B batch (1), T tokens, N passes, D width, V vocabulary, K candidates.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, cast

from pondera.core.errors import UserError
from pondera.core.escape import escape
from pondera.data.tokenizer import encode
from pondera.methods.probe.base import Probe, Shown, observed

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerFast

    from pondera.models.adaptive_lm import AdaptiveLM

BLANKS = str.maketrans({" ": "␣", "\t": "⇥", "\n": None})  # `escape` writes a newline as an arrow and the newline


class ThinkTrace(Probe):
    """Shows the most likely next tokens after each pass, and whether later passes make the correct token more likely.

    The probe applies the model's head to the state of a token after each pass, as if the model had stopped there. A
    token that halted early shows only the passes that it took. The text follows a start token (BOS, else EOS), as in
    the traces of a run.

    Source: the logit lens (nostalgebraist, 2020), over passes instead of layers.
    Cost: one forward pass over the text, and one evaluation of the head per pass.
    When not to use it: to measure whether thinking helps. A few dozen tokens are an illustration; ``pondera compare``
    measures it.
    Resolved: the head is trained on the last pass only (unless a method supervises the other passes), so an early state
    may contain more than its readout shows.

    Args:
        top: K, number of candidates per pass.
        max_tokens: maximum number of tokens to show, from the beginning of the text; limited by the model's positions.

    Example:
        >>> ThinkTrace(top=3)
        ThinkTrace(3)
    """

    def __init__(self, top: int = 5, max_tokens: int = 32) -> None:
        for name, value in (("top", top), ("max_tokens", max_tokens)):
            if value < 1:
                raise UserError(f"{name}={value}: give 1 or more")
        self.top, self.max_tokens = top, max_tokens

    def run(self, model: AdaptiveLM, tokenizer: PreTrainedTokenizerFast, text: str) -> dict[str, Any]:
        """See `Probe.run`.

        Returns:
            ``tokens``, each with ``token``, ``id``, ``passes`` and ``target`` (the next token of the text; ``None`` at
            the end); ``after``: for each pass the ``top`` candidates (``token``, ``id``, ``probability``) and the
            ``target_probability``; and ``rose``: true if the target is more likely after the last pass than after the
            first (``None`` without a target or with only one pass). ``nll``: mean negative log-likelihood of the
            targets after each pass, in nats; halted tokens keep their last value.
        """
        import torch

        from pondera.models.next_token import IGNORED

        ids, targets = self._read(model, tokenizer, text)
        labels = [IGNORED if target is None else target for target in targets]  # the oracle control reads labels
        with observed(model):
            ids_BT, labels_BT = torch.tensor([[ids], [labels]], device=model.device)
            out = model(ids_BT, shift_labels=labels_BT)
            states = out.trace.get("states")
            if not states:
                raise _nothing_recorded(model)
            logs_NTV = torch.stack([model.backbone.head(state_BTD)[0].float().log_softmax(-1) for state_BTD in states])
        passes = out.passes[0].tolist()
        tokens = [
            self._token(tokenizer, (ids[at - 1], ids[at], targets[at]), passes[at], logs_NTV[:, at].exp())
            for at in range(1, len(ids))  # the start token is read, but not shown
        ]
        known = [at for at in range(1, len(ids)) if targets[at] is not None]
        nll_N = -logs_NTV[:, known, [cast(int, targets[at]) for at in known]].mean(1)
        return {"tokens": tokens, "nll": nll_N.tolist() if known else []}

    def show(self, found: dict[str, Any]) -> Shown:
        """One row per token: the token, its passes, the candidates after each pass, its target and whether it rose."""
        most = max(len(token["after"]) for token in found["tokens"])
        columns = ["token", "passes", *(f"after pass {number}" for number in range(1, most + 1)), "next", "rose"]
        rows = []
        for token in found["tokens"]:
            cells = ["  ".join(map(_candidate, after["top"])) for after in token["after"]]
            cells += [""] * (most - len(cells))
            rows.append([_cell(token["token"]), f"{token['passes']:g}", *cells, *_target(token)])
        return Shown(columns, rows, _summary(found))

    def _read(
        self, model: AdaptiveLM, tokenizer: PreTrainedTokenizerFast, text: str
    ) -> tuple[list[int], list[int | None]]:
        """The input ids, including the start token, and the next id of each."""
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if start is None:
            raise UserError("the tokenizer has neither BOS nor EOS, so there is no start token; set its eos_token")
        whole, _ = next(encode([text], tokenizer, model.embedded))
        room = (model.positions or math.inf) - 1
        ids = [cast(int, start), *whole[: int(min(self.max_tokens, room, len(whole)))].tolist()]
        if len(ids) == 1:
            raise UserError("the text is empty; give one with at least one token")
        following = [*whole[: len(ids)].tolist(), None]
        return ids, following[: len(ids)]

    def _token(
        self,
        tokenizer: PreTrainedTokenizerFast,
        neighbours: tuple[int, int, int | None],
        passes: float,
        probabilities_NV: Tensor,
    ) -> dict[str, Any]:
        """The trace of one token; `neighbours` are the ids of the previous token, the token and its target."""
        before, own, target = neighbours
        after = []
        for probabilities_V in probabilities_NV[: max(1, math.ceil(passes))]:
            best_K = probabilities_V.topk(min(self.top, len(probabilities_V)))
            pairs = zip(best_K.values.tolist(), best_K.indices.tolist(), strict=True)
            after.append(
                {
                    "top": [
                        {"token": _spelled(tokenizer, own, token), "id": token, "probability": value}
                        for value, token in pairs
                    ],
                    "target_probability": None if target is None else probabilities_V[target].item(),
                }
            )
        first, last = after[0]["target_probability"], after[-1]["target_probability"]
        return {
            "token": _spelled(tokenizer, before, own),
            "id": own,
            "passes": passes,
            "target": None if target is None else {"token": _spelled(tokenizer, own, target), "id": target},
            "after": after,
            "rose": None if target is None or len(after) == 1 else last > first,
        }


def _nothing_recorded(model: AdaptiveLM) -> UserError:
    if model.think is None:
        return UserError(
            "this model takes one pass per token and does not think, so there is nothing to trace; give one that was "
            'trained with a think method, such as "PonderLM2(thoughts=1)"'
        )
    return UserError(
        f"{model.config.think} does not record its states, so the probe cannot read them; give a model whose method "
        'does (with `record` set, the method returns trace["states"]: the final states [B, T, D] after each pass)'
    )


def _spelled(tokenizer: PreTrainedTokenizerFast, before: int, token: int) -> str:
    """The text that a token adds after the previous token: some tokenizers drop the leading space of a single token."""
    first, both, alone = (
        cast(str, tokenizer.decode(ids, clean_up_tokenization_spaces=False))
        for ids in ([before], [before, token], [token])
    )
    return both[len(first) :] if both.startswith(first) else alone


def _cell(token: str) -> str:
    return escape(token).translate(BLANKS) or "–"


def _candidate(candidate: dict[str, Any]) -> str:
    return f"{_cell(candidate['token'])} {candidate['probability']:.2f}"


def _target(token: dict[str, Any]) -> list[str]:
    """The target with its first and last probability, and whether the probability rose."""
    if token["target"] is None:
        return ["", ""]
    values = [after["target_probability"] for after in token["after"]]
    ends = f"{values[0]:.2g}" + (f" → {values[-1]:.2g}" if len(values) > 1 else "")
    return [f"{_cell(token['target']['token'])} {ends}", {None: "", True: "yes", False: "no"}[token["rose"]]]


def _summary(found: dict[str, Any]) -> str:
    rose = [token["rose"] for token in found["tokens"] if token["rose"] is not None]
    summary = f"the next token became more likely from the first pass to the last at {sum(rose)} of {len(rose)} tokens"
    losses = ", ".join("–" if value is None else f"{value:.3f}" for value in found["nll"])
    return summary + (f"; mean loss after each pass: {losses} nats" if losses else "")
