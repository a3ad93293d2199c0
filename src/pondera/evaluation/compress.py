"""Compares KV cache methods on one model, and writes the model with the one to take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pondera.core import spec
from pondera.core.errors import UserError
from pondera.evaluation.kv_sweep import SweepRow, elbow, ready, save, sweep
from pondera.evaluation.uses import Measured, choose, find_use, measure, share_of
from pondera.evaluation.windows import CONTEXT, calibration, held_out
from pondera.inference.load import load

if TYPE_CHECKING:
    from pondera.methods.kv_cache.base import KVCacheMethod


CALIBRATION = 65536
"""Tokens of the calibration text that are read."""


@dataclass(frozen=True)
class Compression:
    """What `compress` measured.

    Args:
        name: of the model.
        context: tokens that each cache has read when it is measured.
        rows: one per method, the full cache first.
        elbow: the row to take, see `pondera.evaluation.kv_sweep.elbow`; with one method, the row of that method.
        written: the spec string that the model in `out` has; `None`: nothing was written.
    """

    name: str
    context: int
    rows: list[SweepRow]
    elbow: SweepRow
    written: str | None = None


def compress(
    name: str | Path,
    kv_cache: str | KVCacheMethod | Sequence[str | KVCacheMethod] = (),
    text: str | None = None,
    *,
    context: int | None = None,
    column: str | None = None,
    windows: int = 8,
    calibrate: str | None = None,
    calibrate_tokens: int = CALIBRATION,
    out: str | Path | None = None,
    keep: str | KVCacheMethod | None = None,
    budget: str | float | None = None,
    device: str | None = None,
    dtype: str | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Compression:
    """Measures KV cache methods on one model: bytes, bits per byte of held-out text, agreement and recall.

    Args:
        name: a run folder, a model folder, or a hub name.
        kv_cache: one method or several, e.g. ``["H2O(0.25)", "SnapKV(1024)"]``; default: a sweep.
        text: held-out text: a file, folder or dataset; default: what a run held out of its own, else the standard library of
            this Python.
        context: tokens of a window; default: the run's own, or 1,024.
        column: the text column of a JSON, CSV or Parquet file or dataset.
        windows: how many windows are measured.
        calibrate: text to fit codebooks to; default: what a run trained on.
        calibrate_tokens: how many of its tokens are read.
        out: a new folder, to write the model with the elbow's method there.
        keep: with `out`, this method in place of the elbow's.
        budget: a share of the full cache, such as ``"25%"``: the row with the fewest bits per byte within it is taken, not the
            elbow.
        device, dtype: see `pondera.load`.
        say: called with a line for each step, for progress.

    Raises:
        UserError: a method, model or text that does not exist or does not fit, or `out` exists.

    Example::

        found = compress("path/to/model", ["H2O(0.25)", "H2O(0.5)"], text="book.txt", out="compressed")
        print(found.elbow.method, found.elbow.of_full)
    """
    if budget is not None:  # fails before the model is loaded
        share_of(budget)
    several = [kv_cache] if isinstance(kv_cache, str) or not isinstance(kv_cache, Sequence) else kv_cache
    wanted = [*map(_text, several), *([_text(keep)] if keep is not None else [])]
    if keep is not None and out is None:
        raise UserError("keep: says what is written to out, and out is not given; give out=FOLDER")
    if out is not None and Path(out).exists():
        raise UserError(f"out: {str(out)!r}: something is there already; give another folder")
    loaded = load(name, device, dtype=dtype)
    given = {"data.text": text, "data.context": context, "data.column": column}
    data: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    held = held_out(loaded, data, windows)
    tokens = held.ids_NT.shape[1] - 1
    rows, methods = sweep(loaded, wanted, held, calibration(loaded, calibrate, calibrate_tokens, tokens), say)
    chosen, written = _chosen(rows, len(wanted) == 1, None if budget is None else share_of(budget)), None
    if out is not None:
        written = chosen.method if keep is None else _text(keep)
        save(loaded, methods[written], written, Path(out))
    return Compression(loaded.name, tokens, rows, chosen, written)


def _chosen(rows: list[SweepRow], one: bool, share: float | None) -> SweepRow:
    """The row to take: who names one method wants that one."""
    if one:
        return rows[-1]
    if share is None:
        return elbow(rows)
    if not (fitting := [row for row in rows if row.of_full <= share]):
        least = min(rows, key=lambda row: row.of_full)
        raise UserError(
            f"budget: no method was within {100 * share:g} % of the bytes; the smallest cache is that of {least.method}, "
            f"{100 * least.of_full:.1f} %; give a larger budget or other methods"
        )
    return min(fitting, key=lambda row: row.bits_per_byte)


@dataclass(frozen=True)
class ForUse:
    """What `compress_for` measured.

    Args:
        name: of the model.
        rows: one per method, the full cache first.
        chosen: the row to take.
        written: the spec string that the model in `out` has; `None`: nothing was written.
    """

    name: str
    rows: list[Measured]
    chosen: Measured
    written: str | None = None


def compress_for(
    name: str | Path,
    use: str,
    budget: str | float | None = None,
    *,
    kv_cache: Sequence[str] = (),
    tokens: int | None = None,
    contexts: int = 4,
    calibrate: str | None = None,
    out: str | Path | None = None,
    device: str | None = None,
    dtype: str | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> ForUse:
    """Measures the KV cache methods that fit a use with questions about long contexts, and takes one within a budget.

    Args:
        name: see `compress`.
        use: ``"questions"``: a context is read once and asked about later; ``"prompts"``: each ends with its question.
        budget: a share of the full cache, such as ``"25%"``; default: `None`, the smallest cache that keeps nearly what the
            best one keeps.
        kv_cache: methods in place of those of the use.
        tokens, contexts: see `pondera.evaluation.uses.measure`.
        calibrate: text to fit codebooks to.
        out: a new folder, to write the model with the chosen method there.
        device, dtype: see `pondera.load`.
        say: called with a line for each step, for progress.

    Raises:
        UserError: see `compress`; or no method is within the budget.

    Example::

        found = compress_for("smollm2", "questions", "25%")
        print(found.chosen.method, found.chosen.kept)
    """
    find_use(use)
    share = None if budget is None else share_of(budget)
    texts = [_text(each) for each in kv_cache]
    if out is not None and Path(out).exists():
        raise UserError(f"out: {str(out)!r}: something is there already; give another folder")
    loaded = load(name, device, dtype=dtype)
    samples = calibration(loaded, calibrate, CALIBRATION, min(CONTEXT, loaded.model.positions or CONTEXT))
    rows = measure(loaded, use, share, methods=texts, tokens=tokens, contexts=contexts, calibration=samples, say=say)
    chosen = choose(rows, share)
    if out is not None:
        save(loaded, ready(loaded.model, chosen.method, samples, say), chosen.method, Path(out))
    return ForUse(loaded.name, rows, chosen, None if out is None else chosen.method)


def _text(given: str | KVCacheMethod) -> str:
    """The spec string of a method on the seam kv_cache."""
    parsed = spec.parse(given if isinstance(given, str) else repr(given))
    spec.find(parsed.name, "kv_cache")
    return spec.format(parsed)
