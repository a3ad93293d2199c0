"""PIE: a KV cache follows an edit in the middle of its text.

Shapes: B batch, G KV heads, T tokens, D head width, P pairs of rotated coordinates.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

import torch
from torch import Tensor

from pondera.arch.families import family
from pondera.cache.rollback import roll_back
from pondera.cache.token_cache import TokenCache
from pondera.cache.token_rows import append, has_padding, keeps_all, rows_from, sequences
from pondera.core.errors import UserError
from pondera.core.evaluation_mode import as_it_was
from pondera.core.hf import CACHE, Cache, DynamicCache, DynamicLayer, PreTrainedModel
from pondera.models.rotary import rotary_frequencies, rotate_by_position

CHECKED, SHIFT = 6, 5
"""Tokens of the self-check, and the positions by which it moves them."""
INSTEAD = "encode the edited text with a new cache"


@dataclass(frozen=True)
class Edit:
    """Where the cache of an edited text comes from, in tokens.

    Args:
        unchanged: tokens before the first edit, whose keys and values stay; exact.
        moved: later tokens whose values stay and whose keys are rotated to their new positions; approximate.
        recomputed: tokens that the model computes, including the last token, which the next call computes.
    """

    unchanged: int
    moved: int
    recomputed: int

    @property
    def tokens(self) -> int:
        """The length of the edited text."""
        return self.unchanged + self.moved + self.recomputed


@dataclass(frozen=True)
class EqualRun:
    """Tokens that an edit leaves in order: `length` tokens from `old` in the old text, from `new` in the new one."""

    old: int
    new: int
    length: int

    def without_first(self, tokens: int) -> EqualRun:
        """The run without its first tokens."""
        cut = min(tokens, self.length)
        return EqualRun(self.old + cut, self.new + cut, self.length - cut)


class PIE:
    """Re-use of a KV cache after edits in the middle of its text: later keys are rotated to their new positions.

    After an edit, a stock cache is valid only up to the edit, and all later tokens are computed again. This method computes
    only the inserted tokens. Tokens after the edit keep their values, and their keys are rotated by the difference of their
    positions, so that relative positions are right everywhere.

    What is exact: tokens before the first edit; inserted tokens of the first edit, whose context is exact; in the first
    layer, all tokens, because its keys and values depend on one token and its position only. What is approximate: from the
    second layer on, keys and values of moved tokens, which still encode the old text, and inserted tokens after them. In
    bfloat16, each edit rounds the moved keys once more.

    Source: He et al., Let the Code LLM Edit Itself When You Edit the Code, arXiv 2407.03157 (Positional Integrity Encoding).
    Cost: one call of the model per edited place, over its tokens; one rotation of the later keys per layer, and a copy of
    them during the edit.
    When not to use it: for edits that change the meaning of the text after them, such as another value in a table that
    later text sums up; after many edits in a row, encode the text again.
    Resolved: the authors have not published code. The method finds the edits itself: the common beginning and end, and
    between them runs of at least `least` equal tokens (several edits at once). Shorter runs are computed again. With
    `refresh`, our addition, the first tokens after each edit are computed again, too, from left to right; where it covers
    all later tokens, the cache equals that of the new text.

    Args:
        model: any causal LM of transformers with rotary positions of fixed frequencies in all layers, or an `AdaptiveLM`
            without a think, chunk or memory method. A few tokens at two positions check that rotated keys are right.
        refresh: number of tokens after each edit that are computed again although they did not change.
        least: the shortest run of equal tokens that is re-used.

    Raises:
        UserError: the model is not supported; the reason.

    Example:
        >>> from transformers import AutoModelForCausalLM, LlamaConfig
        >>> sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        >>> model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=97, **sizes)).eval()
        >>> old, new, cache = [*range(40)], [*range(10), 90, 91, 92, *range(10, 40)], DynamicCache(config=model.config)
        >>> pie = PIE(model)
        >>> pie.edit(cache, [], old).recomputed, pie.edit(cache, old, new), cache.get_seq_length()
        (40, Edit(unchanged=10, moved=29, recomputed=4), 42)
    """

    def __init__(self, model: PreTrainedModel, refresh: int = 0, least: int = 8) -> None:
        for name, given, allowed in (("refresh", refresh, 0), ("least", least, 1)):
            if isinstance(given, bool) or not isinstance(given, int) or given < allowed:
                raise UserError(f"{name}={given!r}: give a number of tokens, {allowed} or more")
        if getattr(model, "method", None) is not None:
            raise UserError(
                f"PIE: {type(model).__name__} has a think, chunk or memory method, whose slots are not those of single tokens; "
                + INSTEAD
            )
        self.model, self.refresh, self.least = model, refresh, least
        config = model.config.get_text_config(decoder=True)
        self._frequency_P = rotary_frequencies(model, INSTEAD)
        self._interleaved = family(config).interleaved
        self._check(config)

    @torch.no_grad()
    def edit(self, cache: Cache, old_ids: Sequence[int] | Tensor, new_ids: Sequence[int] | Tensor) -> Edit:
        """Turns the cache of one text into that of another, except for its last token.

        Afterwards ``model.generate(new_ids, past_key_values=cache)`` continues the new text; it computes the last token.

        Args:
            cache: the stock cache of the model or one of `PreallocatedCache`, for one sequence without padding. If a call
                of the model fails, it is empty.
            old_ids: the token ids in the cache; further ids at their end are allowed, such as the last generated token.
            new_ids: the token ids of the new text.

        Raises:
            UserError: the cache or the token ids are not supported; the cache is unchanged.
        """
        old, new = _listed("old_ids", old_ids), _listed("new_ids", new_ids)
        if not new:
            raise UserError("new_ids: no tokens; give at least one")
        held = _check_cache(cache, old)
        unchanged, runs = self._plan(old, new, held)
        rows = [rows_from(layer, unchanged) for layer in cache.layers] if runs else []
        roll_back(cache.layers, unchanged, held - unchanged)
        done = unchanged
        try:
            with as_it_was(self.model):
                for run in runs:
                    self._compute(cache, new[done : run.new])
                    for layer, (key_BGTD, value_BGTD) in zip(cache.layers, rows, strict=True):
                        part = slice(run.old - unchanged, run.old - unchanged + run.length)
                        append(layer, self._moved(key_BGTD[:, :, part], run.new - run.old), value_BGTD[:, :, part])
                    done = run.new + run.length
                self._compute(cache, new[done:-1])
        except BaseException:
            cache.reset()  # half of the new text would be continued as if it were all of the old one
            raise
        moved = sum(run.length for run in runs)
        return Edit(unchanged, moved, len(new) - unchanged - moved)

    def _plan(self, old: list[int], new: list[int], held: int) -> tuple[int, list[EqualRun]]:
        """The length of the common beginning, and the runs to move, in the order of the text."""
        unchanged, *others = equal_runs(old, new, self.least)
        last = len(new) - 1
        beginning = min(unchanged.length, held, last)
        runs = []
        for run in others:
            run = run.without_first(self.refresh)
            length = min(run.length, held - run.old, last - run.new)
            if length >= self.least:
                runs.append(EqualRun(run.old, run.new, length))
        return beginning, runs

    def _compute(self, cache: Cache, ids: list[int]) -> None:
        """Runs the model on the next tokens."""
        if ids:
            ids_1T = torch.tensor([ids], device=self.model.device)
            self.model.get_decoder()(input_ids=ids_1T, **{CACHE: cache}, use_cache=True)

    def _moved(self, key_BGTD: Tensor, distance: int) -> Tensor:
        """Keys rotated by a number of positions, back if it is negative."""
        if not distance:
            return key_BGTD
        wide = key_BGTD.to(torch.promote_types(key_BGTD.dtype, torch.float32))
        frequency_P = self._frequency_P.to(wide.device)
        by_1 = torch.tensor([distance], device=wide.device)
        return rotate_by_position(wide, by_1, frequency_P, self._interleaved).to(key_BGTD.dtype)

    @torch.no_grad()
    def _check(self, config: Any) -> None:
        """Raises unless a few tokens at later positions have the same values, and keys rotated by the difference."""
        name = f"PIE: {config.model_type}"
        cache = DynamicCache(config=config)
        others = sorted({type(layer).__name__ for layer in cache.layers if type(layer) is not DynamicLayer})
        if others:
            raise UserError(f"{name}: a {others[0]} does not keep the keys and values of all tokens; {INSTEAD}")
        ids_T = torch.arange(CHECKED, device=self.model.device) * (config.vocab_size // CHECKED) + 1
        position_2T = torch.arange(CHECKED, device=ids_T.device) + torch.tensor([[0], [SHIFT]], device=ids_T.device)
        call: dict[str, Any] = {"input_ids": ids_T.expand(2, -1), "attention_mask": torch.ones_like(position_2T)}
        with as_it_was(self.model):
            self.model.get_decoder()(**call, position_ids=position_2T, use_cache=True, **{CACHE: cache})
        layers: list[Any] = cache.layers
        for number, layer in enumerate(layers):
            keys, values = layer.keys, layer.values
            tolerance = torch.finfo(keys.dtype).eps ** 0.5
            moved = self._moved(keys[:1], SHIFT)
            for what, found, right in (("keys", moved, keys[1:]), ("values", values[:1], values[1:])):
                error = float((found.float() - right.float()).norm() / right.float().norm().clamp(min=1e-12))
                if not error <= tolerance:
                    raise UserError(
                        f"{name}: the {what} of layer {number} at other positions are not those of rotary positions (relative "
                        f"error {error:.2g}); {INSTEAD}"
                    )


def equal_runs(old: list[int], new: list[int], least: int) -> Iterator[EqualRun]:
    """The common beginning, then the runs of at least `least` equal tokens, in the order of both texts, then the common end.

    Example:
        >>> [(run.old, run.new, run.length) for run in equal_runs([1, 2, 3, 4, 5, 6, 7], [1, 9, 3, 4, 5, 8, 7], 2)]
        [(0, 0, 1), (2, 2, 3), (6, 6, 1)]
    """
    shorter = min(len(old), len(new))
    begin = next((at for at in range(shorter) if old[at] != new[at]), shorter)
    yield EqualRun(0, 0, begin)
    rest = shorter - begin
    end = next((back for back in range(rest) if old[-1 - back] != new[-1 - back]), rest)
    old_end, new_end = len(old) - end, len(new) - end
    # Groups of tokens are compared because single tokens repeat so often that the comparison would be quadratic.
    groups = (_groups(old[begin:old_end], least), _groups(new[begin:new_end], least))
    old_done, new_done = begin, begin
    for block in SequenceMatcher(None, *groups, autojunk=False).get_matching_blocks()[:-1]:
        run = EqualRun(begin + block.a, begin + block.b, block.size + least - 1)
        run = run.without_first(max(old_done - run.old, new_done - run.new, 0))  # neighboring groups share tokens
        old_done, new_done = run.old + run.length, run.new + run.length
        if run.length >= least:
            yield run
    yield EqualRun(old_end, new_end, end)


def _groups(ids: list[int], size: int) -> list[tuple[int, ...]]:
    """Each token with the `size` - 1 tokens after it."""
    return [tuple(ids[at : at + size]) for at in range(len(ids) - size + 1)]


def _listed(name: str, ids: Sequence[int] | Tensor) -> list[int]:
    """Token ids as a list."""
    if isinstance(ids, Tensor):
        if ids.ndim == 2 and len(ids) != 1:
            raise UserError(f"{name}: {len(ids)} sequences; edit them one by one, each with a cache of its own")
        ids = ids.flatten().tolist()
    return list(ids)


def _check_cache(cache: Any, old: list[int]) -> int:
    """The number of tokens in a cache.

    Raises:
        UserError: an edit of this cache is not supported, or it contains other tokens.
    """
    if isinstance(cache, TokenCache) or not isinstance(cache, Cache) or getattr(cache, "offloading", False):
        raise UserError(
            f"PIE: a {type(cache).__name__} is not supported; give a DynamicCache or PreallocatedCache().cache(model)"
        )
    if other := next((layer for layer in cache.layers if not keeps_all(layer)), None):
        what = repr(method) if (method := getattr(cache, "method", None)) is not None else type(other).__name__
        raise UserError(
            f"PIE: a cache of {what} does not keep the keys and values of all tokens; give a DynamicCache or "
            "PreallocatedCache().cache(model)"
        )
    held = cache.get_seq_length()
    if any(getattr(layer, "drafted", False) for layer in cache.layers):
        raise UserError("PIE: the cache may contain draft tokens; crop(0) keeps them, crop(-n) rolls back the last n")
    if held > len(old):
        raise UserError(f"old_ids: {len(old)} tokens, and the cache contains {held}; give the tokens in the cache")
    if held and (sequences(cache.layers[0]) != 1 or has_padding(cache.layers[0])):
        raise UserError(
            "PIE: the cache contains several sequences or padding; edit each sequence in a cache of its own"
        )
    return held
