"""What remembering less costs: memories side by side on one model, by bytes and by quality, and the one to take.

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
"""What is tried where nothing is named ..."""
FITTED = ("VQKV(4.0)", "VQKV(2.75)")
"""... and where there is text to fit it to."""
FULL = "PreallocatedCache()"


@dataclass(frozen=True)
class SweepRow:
    """What one memory costs and what it is worth.

    Args:
        method: its spec string.
        cache_bytes: of one text at the end of a window, spare room included.
        of_full: the share of what a full cache holds then.
        bits_per_byte: of the held-out text, read piece by piece behind each window's prompt.
        agreement: share of the next tokens that are what the full cache would have said.
        recall: share of the tokens of an earlier passage, asked for by its beginning, that come back.
        tokens_per_second: while reading piece by piece, here and now.
        table_bytes: of what was fitted, once for the model.
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
    """Measures memories on one model, the full cache first.

    Args:
        loaded: a model without a trained memory; it may think or predict concepts.
        memories: spec strings; none: those of `SWEEP` and `FITTED` that this model can have.
        windows: the text that they are measured on.
        calibration: token ids ``[B, T]`` for those that are fitted.
        say: is told what is going on.

    Returns:
        A row for each, and the fitted memories by spec string.

    Raises:
        UserError: a memory that does not exist or does not fit, or a model that has a cache of its own.
    """
    model = loaded.model
    if model.memory is not None:
        memory = model.config.memory
        raise UserError(
            f"{loaded.name}: memory: {memory} and a kv_cache method cannot be combined: {IMPOSSIBLE['memory', 'kv_cache']}"
        )
    texts = [spec.format(spec.parse(text)) for text in memories or (*SWEEP, *(FITTED if calibration else ()))]
    for text in memories:  # what cannot be had is told before anything is measured
        _made(model, text, bool(calibration))
    rows: list[SweepRow] = []
    built: dict[str, KVCacheMethod] = {}
    said_BT: Tensor | None = None
    for text in dict.fromkeys([FULL, *texts]):
        began = time.perf_counter()
        try:
            built[text] = _ready(model, text, calibration, say)
            measured, said_NT = _measure(model, text, built[text], windows, rows[0] if rows else None, said_BT)
        except UserError as error:
            if memories or text == FULL:
                raise
            say(f"{text}: left out: {error}")  # of a sweep some may ask for more than this model has
            continue
        said_BT = said_NT if said_BT is None else said_BT
        rows.append(measured)
        say(
            f"{text}: {measured.bits_per_byte:.4f} bits per byte at {100 * measured.of_full:.1f} % "
            f"({time.perf_counter() - began:.0f} s)"
        )
    return rows, built


def _ready(model: AdaptiveLM, text: str, calibration: Sequence[Tensor], say: Callable[[str], None]) -> KVCacheMethod:
    """A memory for this model, fitted if it has to be."""
    method = _made(model, text, bool(calibration))
    method.to(model.device)
    if not method.fitted:
        say(f"{text}: fitting")
        method.fit(model, calibration)
    return method


def _made(model: AdaptiveLM, text: str, fits: bool) -> KVCacheMethod:
    """A memory for this model, not fitted yet.

    Args:
        model: that it is for.
        text: its spec string.
        fits: there is text to fit it to.
    """
    method = spec.build(text, "kv_cache")
    config = model.backbone.config
    method.bind(config)
    if method.fitted:
        method.check(config, compressible(config))
        if model.think is not None:
            method.check_passes()
    elif not fits:
        raise UserError(f"{text} needs calibration text: give some with --calibrate TEXT (in Python: calibrate=TEXT)")
    return method


def _cache(model: AdaptiveLM, method: KVCacheMethod) -> Any:
    """An empty cache of the model, whose slots this method keeps."""
    before, model.kv_cache = model.kv_cache, method
    try:
        return model.new_cache()
    finally:
        model.kv_cache = before


@torch.no_grad()
def _measure(
    model: AdaptiveLM,
    text: str,
    method: KVCacheMethod,
    windows: HeldOutWindows,
    full: SweepRow | None,
    expected_NT: Tensor | None,
) -> tuple[SweepRow, Tensor]:
    """A row, and the likeliest next tokens behind the prompts, ``[N, T]``."""
    nats, held, seconds, found = 0.0, 0, 0.0, []
    for ids_T in windows.ids_NT.to(model.device):
        cache, said = _cache(model, method), []
        began = time.perf_counter()
        for start, logits_BTV in chunked_forward(model, cache, ids_T[None, :-1], windows.prompt):
            if start < windows.prompt:
                began = time.perf_counter()
                continue
            labels_T = ids_T[start + 1 : start + 1 + logits_BTV.shape[1]]
            nats += float(F.cross_entropy(logits_BTV[0].float(), labels_T, reduction="sum"))
            said.append(logits_BTV[0].argmax(-1))
        seconds += time.perf_counter() - began
        held += cache.nbytes()
        found.append(torch.cat(said))
    said_NT = torch.stack(found)
    agreement = 1.0 if expected_NT is None else float((said_NT == expected_NT).float().mean())
    cache_bytes = held / len(windows.ids_NT)
    measured = SweepRow(
        method=text,
        cache_bytes=cache_bytes,
        of_full=1.0 if full is None else cache_bytes / full.cache_bytes,
        bits_per_byte=nats / math.log(2) / windows.num_bytes,
        agreement=agreement,
        recall=_recall(model, method, windows),
        tokens_per_second=said_NT.numel() / seconds,
        table_bytes=sum(tensor.numel() * tensor.element_size() for tensor in method.state_dict().values()),
    )
    return measured, said_NT


@torch.no_grad()
def _recall(model: AdaptiveLM, method: KVCacheMethod, windows: HeldOutWindows) -> float:
    """How much of an early passage comes back when its beginning is repeated at the end."""
    right = total = 0
    for ids_T in windows.asked_NT.to(model.device):
        context = len(ids_T) - windows.asked
        for start, logits_BTV in chunked_forward(model, _cache(model, method), ids_T[None], context, 1):
            if start >= context + windows.asked // 3 - 1 and start + 1 < len(ids_T):
                right += int(logits_BTV[0, -1].argmax() == ids_T[start + 1])
                total += 1
    return right / total


def elbow(rows: Sequence[SweepRow]) -> SweepRow:
    """The row to take: on the way from the smallest cache to the full one, where more bytes begin to buy little.

    Of the rows that no other beats in both bytes and bits per byte, the one furthest below the straight line between the
    cheapest and the best, both axes scaled to what they span. With two such rows or fewer: the best.

    Example:
        >>> row = lambda share, bits: SweepRow(f"{share}", share, share, bits, 1.0, 1.0, 1.0)
        >>> elbow([row(1.0, 2.0), row(0.5, 2.01), row(0.25, 2.02), row(0.125, 2.5), row(0.3, 2.4)]).method
        '0.25'
    """
    front = sorted((row for row in rows if not any(_beats(other, row) for other in rows)), key=lambda row: row.of_full)
    if len(front) < 3:
        return min(front, key=lambda row: row.bits_per_byte)
    wide = front[-1].of_full - front[0].of_full
    high = front[0].bits_per_byte - front[-1].bits_per_byte

    def below(row: SweepRow) -> float:
        along, up = (row.of_full - front[0].of_full) / wide, (row.bits_per_byte - front[-1].bits_per_byte) / high
        return 1 - along - up

    return max(front, key=below)


def _beats(other: SweepRow, row: SweepRow) -> bool:
    """No worse in either, and better in one."""
    a, b = (other.of_full, other.bits_per_byte), (row.of_full, row.bits_per_byte)
    return a != b and a[0] <= b[0] and a[1] <= b[1]


def save(loaded: Loaded, method: KVCacheMethod, text: str, out: Path) -> Path:
    """Writes the model with its method, as a model folder that `load`, ``AutoModelForCausalLM`` and every verb take.

    Args:
        loaded: the model that it was fitted to.
        method: fitted.
        text: its spec string.
        out: the folder; it must not exist, or be empty.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: something is there already; give another folder")
    model = loaded.model
    model.config.kv_cache, model.kv_cache = text, method
    model.save_pretrained(out)
    loaded.tokenizer.save_pretrained(out)
    return out


def as_json(rows: Sequence[SweepRow]) -> list[dict[str, Any]]:
    """Rows as plain data."""
    return [asdict(row) for row in rows]
