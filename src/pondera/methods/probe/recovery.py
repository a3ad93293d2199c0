"""Recovery: how well tokens are read off their noisy embeddings, by readers that need no training.

Shapes: T tokens of a window, D width of the embeddings, V vocabulary, N noise levels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

from pondera.core.errors import UserError
from pondera.data.tokenizer import encode
from pondera.methods.probe.base import Plot, Probe, Shown, observed

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerFast

    from pondera.models.adaptive_lm import AdaptiveLM

READERS = ("nearest", "pointwise", "context")
UNSEEN = 0.1
"""Count of a token that the rest of the text does not have."""
LOWEST, HIGHEST = -5.5, 2.5
"""The first and the last noise level, from the middle of the window by arithmetic."""
LOW, HIGH = 0.05, 0.95
"""The noise window: where the pointwise reader has lost between these shares of what it can lose."""


class Recovery(Probe):
    """Shows at which noise a token can still be read off its embedding, and how much of the loss its context brings back.

    A continuous diffusion model ends with noisy embeddings that must become tokens. The probe adds Gaussian noise to the
    embeddings of a text and reads the tokens back in three ways: the nearest embedding; the likeliest token by the noise
    and the frequencies of the text (no reader of single positions can do better); and the likeliest token by the noise and
    the model's own prediction from the tokens before. It also prints the window of noise in which everything happens,
    which is where a diffusion process should spend its steps.

    Source: the question of CoDAR (arXiv 2603.02547): how much of the error of continuous diffusion comes from reading
    tokens one by one. The readers are exact posteriors.
    Cost: one forward pass over ``windows × window`` tokens, and two products of these with the embedding table for all
    noise levels. The probabilities of one window are in memory at a time (T V numbers).
    When not to use it: to judge a trained diffusion model, whose states are not embeddings with independent noise.
    Resolved: noise is variance preserving, ``sqrt(s) e + sqrt(1 - s) n`` with ``s = sigmoid(logSNR)``, and embeddings are
    scaled to a mean square of 1 over the tokens of the text, without a shift. The context is the true one, so the share of
    windows that are right as a whole is that of greedy decoding from left to right, too. Frequencies are those of the text
    outside of the windows, with 0.1 for tokens that do not occur.

    Args:
        windows: number of windows, spread over the text; fewer if the text is short.
        window: T, tokens of a window.
        points: N, number of noise levels.
        seed: seed of the noise.

    Example:
        >>> Recovery(windows=8)
        Recovery(8)
    """

    def __init__(self, windows: int = 32, window: int = 48, points: int = 21, seed: int = 0) -> None:
        for name, value, least in (("windows", windows, 1), ("window", window, 1), ("points", points, 2)):
            if value < least:
                raise UserError(f"{name}={value}: give {least} or more")
        self.windows, self.window, self.points, self.seed = windows, window, points, seed

    def run(self, model: AdaptiveLM, tokenizer: PreTrainedTokenizerFast, text: str) -> dict[str, Any]:
        """See `Probe.run`.

        Returns:
            ``levels``: for each noise level its ``log_snr`` and, by reader, ``accuracy``, ``nats`` per token and ``whole``
            (the share of windows without an error); ``tokens`` and ``windows`` that were read; ``prior_tokens``: how many
            tokens the frequencies come from; ``prior_nats`` and ``model_nats``: nats per token without any state;
            ``noise_window``: the noise levels at which the pointwise reader loses 95 and 5 % of `prior_nats`, or `None`.
        """
        import torch

        windows, rest = self._windows(model, tokenizer, text)
        table_VD = cast("Tensor", cast(Any, model.get_input_embeddings()).weight).detach().float()
        read = torch.tensor([token for window in windows for token in window], device=table_VD.device)
        table_VD = table_VD / table_VD[read].square().mean().sqrt()
        if not bool(table_VD.isfinite().all()):
            raise UserError("the embeddings have NaN or infinite values, or are all 0, so nothing can be read off them")
        prior_V = _prior(rest, len(table_VD)).to(table_VD.device)
        start = _start(tokenizer)
        generator = torch.Generator().manual_seed(self.seed)
        levels = self._levels(table_VD.shape)
        sums = torch.zeros(len(levels), len(READERS), 3, dtype=torch.float64)
        nats = torch.zeros(2, dtype=torch.float64)
        with observed(model, record=False):
            for window in windows:
                ids_T = torch.tensor(window, device=table_VD.device)
                context_TV = _context(model, start, ids_T, len(table_VD))
                noise_TD = torch.randn(len(window), table_VD.shape[1], generator=generator).to(table_VD.device)
                for number, evidence_TV in enumerate(_evidence(table_VD, ids_T, noise_TD, levels)):
                    for reader, known_V in enumerate((None, prior_V, context_TV)):
                        sums[number, reader] += _read(evidence_TV, known_V, ids_T)
                nats -= torch.stack([prior_V[ids_T].sum(), context_TV[range(len(window)), ids_T].sum()]).double().cpu()
        return self._result(levels, sums, nats, [len(window) for window in windows], len(rest))

    def show(self, found: dict[str, Any]) -> Shown:
        """One row per noise level: accuracy and nats of each reader, and the share of windows that are right."""
        columns = ["logSNR", *(f"{name}: right, nats" for name in READERS), "whole windows right"]
        rows = []
        for level in found["levels"]:
            cells = [f"{level['accuracy'][name]:.3f}  {level['nats'][name]:.3f}" for name in READERS]
            whole = " / ".join(f"{100 * level['whole'][name]:.0f} %" for name in READERS)
            rows.append([f"{level['log_snr']:+.2f}", *cells, whole])
        lines = {name: [(one["log_snr"], one["accuracy"][name]) for one in found["levels"]] for name in READERS}
        plots = [Plot("Tokens read off noisy embeddings", "log signal-to-noise ratio", "share right", lines)]
        return Shown(columns, rows, _summary(found), plots)

    def _windows(
        self, model: AdaptiveLM, tokenizer: PreTrainedTokenizerFast, text: str
    ) -> tuple[list[list[int]], list[int]]:
        """The windows, spread over the text, and all other tokens."""
        ids = next(encode([text], tokenizer, model.embedded))[0].tolist()
        if len(ids) < 2:
            raise UserError("the text is empty or has one token; give one with at least two")
        size = int(min(self.window, len(ids), (model.positions or math.inf) - 1))
        count = min(self.windows, len(ids) // size)
        starts = [number * (len(ids) - size) // max(count - 1, 1) for number in range(count)]
        chosen = {place for start in starts for place in range(start, start + size)}
        rest = [token for place, token in enumerate(ids) if place not in chosen]
        return [ids[start : start + size] for start in starts], rest

    def _levels(self, shape: Any) -> list[float]:
        """Noise levels around the one at which a state tells about as much as there is to know: ln(2 ln V / D)."""
        middle = math.log(2 * math.log(shape[0]) / shape[1])
        return [middle + LOWEST + (HIGHEST - LOWEST) * number / (self.points - 1) for number in range(self.points)]

    def _result(
        self, levels: list[float], sums: Tensor, nats: Tensor, sizes: list[int], prior_tokens: int
    ) -> dict[str, Any]:
        found: list[dict[str, Any]] = []
        for level, of_readers in zip(levels, sums.tolist(), strict=True):
            named = dict(zip(READERS, of_readers, strict=True))
            found.append(
                {
                    "log_snr": level,
                    "accuracy": {name: right / sum(sizes) for name, (right, _, _) in named.items()},
                    "nats": {name: lost / sum(sizes) for name, (_, lost, _) in named.items()},
                    "whole": {name: whole / len(sizes) for name, (_, _, whole) in named.items()},
                }
            )
        prior, alone = (nats / sum(sizes)).tolist()
        curve = [(one["log_snr"], one["nats"]["pointwise"]) for one in found]
        edges = [_crossing(curve, share * prior) for share in (HIGH, LOW)]
        return {
            "levels": found,
            "tokens": sum(sizes),
            "windows": len(sizes),
            "prior_tokens": prior_tokens,
            "prior_nats": prior,
            "model_nats": alone,
            "noise_window": None if None in edges else edges,
        }


def _start(tokenizer: PreTrainedTokenizerFast) -> int:
    """The token before a window."""
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is None:
        raise UserError("the tokenizer has neither BOS nor EOS, so there is no start token; set its eos_token")
    return cast(int, start)


def _prior(rest: list[int], size: int) -> Tensor:
    """Log-frequencies of the tokens ``[V]``."""
    import torch

    count_V = torch.bincount(torch.tensor(rest, dtype=torch.long), minlength=size).double() + UNSEEN
    return (count_V / count_V.sum()).log().float()


def _context(model: AdaptiveLM, start: int, ids_T: Tensor, size: int) -> Tensor:
    """The model's log-probability of each token at each place, from the tokens before ``[T, V]``."""
    import torch

    before_1T = torch.cat([ids_T.new_tensor([start]), ids_T[:-1]])[None]
    context_TV = cast("Tensor", model(before_1T).logits)[0, :, :size].float().log_softmax(-1)
    if context_TV.shape[-1] < size:  # tokens without an output can be in no text
        context_TV = torch.nn.functional.pad(context_TV, (0, size - context_TV.shape[-1]), value=-math.inf)
    return context_TV


def _evidence(table_VD: Tensor, ids_T: Tensor, noise_TD: Tensor, levels: list[float]) -> Iterator[Tensor]:
    """The log-likelihood of each token given the noisy state, up to a constant ``[T, V]``, for each level.

    The state is ``a e + s n``, so the products of the table with ``e`` and with ``n`` serve all levels.
    """
    signal_TV, noise_TV = table_VD[ids_T] @ table_VD.T, noise_TD @ table_VD.T
    square_V = table_VD.square().sum(-1)
    for level in levels:
        a, s = (1 / (1 + math.exp(-level))) ** 0.5, (1 / (1 + math.exp(level))) ** 0.5
        yield (a / s) ** 2 * (signal_TV - square_V / 2) + (a / s) * noise_TV


def _read(evidence_TV: Tensor, known_V: Tensor | None, ids_T: Tensor) -> Tensor:
    """Tokens that are right, nats that are lost, and 1 if all tokens are right."""
    import torch

    score_TV = evidence_TV if known_V is None else evidence_TV + known_V
    right_T = score_TV.argmax(-1) == ids_T
    own_T = score_TV.gather(-1, ids_T[:, None])[:, 0]
    return torch.stack([right_T.sum(), (score_TV.logsumexp(-1) - own_T).sum(), right_T.all()]).double().cpu()


def _crossing(curve: list[tuple[float, float]], value: float) -> float | None:
    """Where a falling curve takes a value, by linear interpolation; `None` if it does not."""
    for (x, above), (next_x, below) in zip(curve, curve[1:], strict=False):
        if above >= value >= below:
            return x if above == below else x + (next_x - x) * (above - value) / (above - below)
    return None


def _summary(found: dict[str, Any]) -> str:
    """The noise window, and what context brings back where the pointwise reader loses half."""
    half = min(found["levels"], key=lambda one: abs(one["nats"]["pointwise"] - found["prior_nats"] / 2))
    lost, kept = half["nats"]["pointwise"], half["nats"]["context"]
    window = found["noise_window"]
    said = "no noise window was found between these levels"
    if window is not None:
        said = (
            f"noise window: logSNR {window[0]:+.2f} to {window[1]:+.2f}, where a reader of single positions loses 95 to 5 % "
            f"of the {found['prior_nats']:.2f} nats per token"
        )
    return (
        f"{found['tokens']:,} tokens; {said}. At logSNR {half['log_snr']:+.2f} it loses {lost:.2f} nats, and context brings "
        f"back {100 * (1 - kept / max(lost, 1e-9)):.0f} % of them; the model alone loses {found['model_nats']:.2f}"
    )
