"""Sweep of KV cache methods on one model: bytes against quality, and the elbow as the recommendation.

Shapes: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pondera.core import spec
from pondera.core.errors import UserError
from pondera.evaluation.chunked_forward import chunked_forward
from pondera.evaluation.fitted_tables import fit
from pondera.evaluation.windows import HeldOutWindows
from pondera.inference.load import Loaded
from pondera.methods.kv_cache.base import KVCacheMethod, compressible
from pondera.models.config import IMPOSSIBLE

if TYPE_CHECKING:
    from pondera.models.adaptive_lm import AdaptiveLM

SWEEP = (
    "StreamingLLM(0.5)",
    "StreamingLLM(0.25)",
    "H2O(0.5)",
    "H2O(0.25)",
    "KIVI(4)",
    "KIVI(2)",
)
"""The default sweep ..."""
FITTED = ("VQKV(4.0)", "VQKV(2.75)")
"""... and the methods added to it if there is calibration text."""
FULL = "PreallocatedCache()"


@dataclass(frozen=True)
class SweepRow:
    """Size and quality of one KV cache method.

    Args:
        method: its spec string.
        cache_bytes: bytes of the cache of one sequence at the end of a window, including unused capacity.
        of_full: `cache_bytes` as a share of the full cache.
        bits_per_byte: of the held-out text after each window's prompt, fed in chunks.
        agreement: top-1 agreement: share of the predicted next tokens that equal those of the full cache.
        recall: share of the tokens of an earlier passage that are predicted correctly after its beginning is repeated.
        tokens_per_second: speed of the chunked forward, measured on this machine.
        table_bytes: bytes of the calibrated tables, shared by all sequences.
    """

    method: str
    cache_bytes: float
    of_full: float
    bits_per_byte: float
    agreement: float
    recall: float
    tokens_per_second: float
    table_bytes: int = 0


def sweep(
    loaded: Loaded,
    memories: Sequence[str],
    windows: HeldOutWindows,
    calibration: Sequence[Tensor] = (),
    say: Callable[[str], None] = lambda _: None,
) -> tuple[list[SweepRow], dict[str, KVCacheMethod]]:
    """Measures KV cache methods on one model, the full cache first.

    Args:
        loaded: a model without a trained memory; it may have a think or chunk method.
        memories: spec strings; empty for those methods of `SWEEP` and `FITTED` that support this model.
        windows: the held-out text.
        calibration: token ids ``[B, T]`` for methods that need calibration.
        say: receives progress messages.

    Returns:
        A row for each method, and the calibrated methods by spec string.

    Raises:
        UserError: a method does not exist or does not support the model, or the model has a trained memory.
    """
    model = loaded.model
    if model.memory is not None:
        memory = model.config.memory
        raise UserError(
            f"{loaded.name}: memory: {memory} and a kv_cache method cannot be combined: {IMPOSSIBLE['memory', 'kv_cache']}"
        )
    texts = [spec.format(spec.parse(text)) for text in memories or (*SWEEP, *(FITTED if calibration else ()))]
    for text in memories:  # fails before anything is measured
        _build(model, text, bool(calibration))
    rows: list[SweepRow] = []
    built: dict[str, KVCacheMethod] = {}
    expected_NT: Tensor | None = None
    for text in dict.fromkeys([FULL, *texts]):
        began = time.perf_counter()
        try:
            built[text] = ready(model, text, calibration, say)
            measured, predicted_NT = _measure(model, text, built[text], windows, rows[0] if rows else None, expected_NT)
        except UserError as error:
            if memories or text == FULL:
                raise
            say(f"{text}: skipped: {error}")  # some methods of the default sweep may not support this model
            continue
        expected_NT = predicted_NT if expected_NT is None else expected_NT
        rows.append(measured)
        say(
            f"{text}: {measured.bits_per_byte:.4f} bits per byte at {100 * measured.of_full:.1f} % "
            f"({time.perf_counter() - began:.0f} s)"
        )
    return rows, built


def ready(model: AdaptiveLM, text: str, calibration: Sequence[Tensor], say: Callable[[str], None]) -> KVCacheMethod:
    """A method for this model, calibrated if necessary."""
    method = _build(model, text, bool(calibration))
    method.to(model.device)
    if not method.fitted:
        say(f"{text}: calibrating")
        fit(method, model, calibration)
    return method


def _build(model: AdaptiveLM, text: str, has_calibration: bool) -> KVCacheMethod:
    """A method for this model, not calibrated yet.

    Args:
        model: the model that will use it.
        text: its spec string.
        has_calibration: whether there is calibration text.
    """
    method = spec.build(text, "kv_cache")
    config = model.backbone.config
    method.bind(config)
    if method.fitted:
        method.check(config, compressible(config))
        if model.think is not None:
            method.check_passes()
    elif not has_calibration:
        raise UserError(f"{text} needs calibration text: give it with --calibrate TEXT (in Python: calibrate=TEXT)")
    return method


def new_cache(model: AdaptiveLM, method: KVCacheMethod) -> Any:
    """An empty cache of the model with this KV cache method."""
    before, model.kv_cache = model.kv_cache, method
    try:
        return model.new_cache()
    finally:
        model.kv_cache = before


def table_bytes(method: KVCacheMethod) -> int:
    """Bytes of the calibrated tables, which all sequences share."""
    return sum(tensor.numel() * tensor.element_size() for tensor in method.state_dict().values())


@torch.no_grad()
def _measure(
    model: AdaptiveLM,
    text: str,
    method: KVCacheMethod,
    windows: HeldOutWindows,
    full: SweepRow | None,
    expected_NT: Tensor | None,
) -> tuple[SweepRow, Tensor]:
    """A row, and the predicted next tokens after the prompts, ``[N, T]``."""
    nats, total_bytes, seconds, predicted = 0.0, 0, 0.0, []
    for ids_T in windows.ids_NT.to(model.device):
        cache, tops = new_cache(model, method), []
        began = time.perf_counter()
        for start, logits_BTV in chunked_forward(model, cache, ids_T[None, :-1], windows.prompt):
            if start < windows.prompt:
                began = time.perf_counter()
                continue
            labels_T = ids_T[start + 1 : start + 1 + logits_BTV.shape[1]]
            nats += float(F.cross_entropy(logits_BTV[0].float(), labels_T, reduction="sum"))
            tops.append(logits_BTV[0].argmax(-1))
        seconds += time.perf_counter() - began
        total_bytes += cache.nbytes()
        predicted.append(torch.cat(tops))
    predicted_NT = torch.stack(predicted)
    agreement = 1.0 if expected_NT is None else float((predicted_NT == expected_NT).float().mean())
    cache_bytes = total_bytes / len(windows.ids_NT)
    measured = SweepRow(
        method=text,
        cache_bytes=cache_bytes,
        of_full=1.0 if full is None else cache_bytes / full.cache_bytes,
        bits_per_byte=nats / math.log(2) / windows.num_bytes,
        agreement=agreement,
        recall=_recall(model, method, windows),
        tokens_per_second=predicted_NT.numel() / seconds,
        table_bytes=table_bytes(method),
    )
    return measured, predicted_NT


@torch.no_grad()
def _recall(model: AdaptiveLM, method: KVCacheMethod, windows: HeldOutWindows) -> float:
    """The share of an early passage that is predicted correctly when its beginning is repeated at the end."""
    right = total = 0
    for ids_T in windows.asked_NT.to(model.device):
        context = len(ids_T) - windows.asked
        for start, logits_BTV in chunked_forward(model, new_cache(model, method), ids_T[None], context, 1):
            if start >= context + windows.asked // 3 - 1 and start + 1 < len(ids_T):
                right += int(logits_BTV[0, -1].argmax() == ids_T[start + 1])
                total += 1
    return right / total


NEAR = 0.01
"""How much worse than the best score a smaller cache may be, as a share, if there are too few rows for a curve."""


def elbow(rows: Sequence[SweepRow]) -> SweepRow:
    """The recommended row: the elbow of the curve of bits per byte over bytes.

    Both axes are scaled to [0, 1]. Among the Pareto-optimal rows, the elbow is the one furthest below the straight line
    from the smallest cache to the best score. With fewer than three such rows there is no curve; then it is the smallest
    cache whose bits per byte are within 1 % of the best score.

    Example:
        >>> row = lambda share, bits: SweepRow(f"{share}", share, share, bits, 1.0, 1.0, 1.0)
        >>> elbow([row(1.0, 2.0), row(0.5, 2.01), row(0.25, 2.02), row(0.125, 2.5), row(0.3, 2.4)]).method
        '0.25'
    """
    front = sorted((row for row in rows if not any(_beats(other, row) for other in rows)), key=lambda row: row.of_full)
    if len(front) < 3:
        best = min(row.bits_per_byte for row in front)
        return next(row for row in front if row.bits_per_byte <= (1 + NEAR) * best)
    wide = front[-1].of_full - front[0].of_full
    high = front[0].bits_per_byte - front[-1].bits_per_byte

    def below(row: SweepRow) -> float:
        along, up = (row.of_full - front[0].of_full) / wide, (row.bits_per_byte - front[-1].bits_per_byte) / high
        return 1 - along - up

    return max(front, key=below)


def _beats(other: SweepRow, row: SweepRow) -> bool:
    """Whether `other` dominates `row`: not worse in size and score, and better in one of them."""
    a, b = (other.of_full, other.bits_per_byte), (row.of_full, row.bits_per_byte)
    return a != b and a[0] <= b[0] and a[1] <= b[1]


def save(loaded: Loaded, method: KVCacheMethod, text: str, out: Path) -> Path:
    """Saves the model with its KV cache method, as a folder for `load`, ``AutoModelForCausalLM`` and every command.

    Args:
        loaded: the model that the method was calibrated on.
        method: calibrated, if it needs calibration.
        text: its spec string.
        out: the folder; it must be new or empty.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: this path exists already and is not an empty folder; give another folder")
    model = loaded.model
    model.config.kv_cache, model.kv_cache = text, method
    model.save_pretrained(out)
    loaded.tokenizer.save_pretrained(out)
    return out


def as_json(rows: Sequence[SweepRow]) -> list[dict[str, Any]]:
    """Rows as plain data."""
    return [asdict(row) for row in rows]
