"""Calibration of codebooks on the keys and values of a frozen model.

Shapes: B batch, T tokens of a sample, G KV heads, D head width, N vectors, C width of a codebook, K codes, L stages.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pondera.cache.compressed_slots import CompressedSlotCache
from pondera.core.errors import UserError
from pondera.core.hf import CACHE, DynamicCache, PreTrainedModel
from pondera.methods.quantize.base import Quantizer
from pondera.methods.quantize.common.kmeans import kmeans
from pondera.methods.quantize.common.nearest import nearest

Stage = Callable[[Tensor, torch.Generator], Tensor]
"""Fits a codebook ``[K, C]`` to vectors ``[N, C]`` with a root mean square of 1."""

BATCH = 4096
"""Number of vectors per training step."""
SAY_EVERY = 10.0
"""Seconds between two lines of progress."""

log = logging.getLogger(__name__)


class FitProgress:
    """Logs how many codebooks are fitted and how long the others will take, at most once in `SAY_EVERY` seconds.

    Args:
        name: of the method.
        codebooks: number of codebooks to fit.
    """

    def __init__(self, name: str, codebooks: int) -> None:
        self.name, self.codebooks, self.fitted = name, codebooks, 0
        self._began = self._said = time.monotonic()

    def counted(self, stage: Stage) -> Stage:
        """A stage that counts the codebooks that it fits."""

        def count(x_NC: Tensor, generator: torch.Generator) -> Tensor:
            table_KC = stage(x_NC, generator)
            self.fitted += 1
            now = time.monotonic()
            if self.fitted < self.codebooks and now - self._said >= SAY_EVERY:
                left = int((now - self._began) / self.fitted * (self.codebooks - self.fitted))
                done = f"{self.fitted} of {self.codebooks} codebooks fitted"
                log.info("%s: %s, about %d:%02d left", self.name, done, left // 60, left % 60)
                self._said = now
            return table_KC

        return count


@torch.no_grad()
def collect(
    model: PreTrainedModel, samples: Iterable[Tensor], layers: list[int], skip: int, most: int
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Collects keys (after rotary embedding) and values of some layers, as in a KV cache.

    Args:
        model: frozen; its weights and mode do not change.
        samples: token ids, ``[B, T]`` each, without padding.
        layers: indices of the layers.
        skip: number of first tokens of each sample to omit.
        most: maximum number of tokens; the function reads no more samples than necessary.

    Returns:
        Keys and values of each layer, ``[G, N, D]`` in float32, and the positions, ``[N]``.
    """
    keys: list[list[Tensor]] = [[] for _ in layers]
    values: list[list[Tensor]] = [[] for _ in layers]
    positions: list[Tensor] = []
    tokens, training = 0, model.training
    model.eval()
    try:
        for sample in samples:
            ids_BT = torch.as_tensor(sample).reshape(-1, sample.shape[-1]).to(model.device)
            for sequence in _slots(model, ids_BT, layers):
                for place, (keys_GSD, values_GSD) in enumerate(sequence.rows):
                    keys[place].append(keys_GSD[:, skip:].float())
                    values[place].append(values_GSD[:, skip:].float())
                positions.append(sequence.position_S[skip:])
                tokens += len(positions[-1])
            if tokens >= most:
                break
    finally:
        model.train(training)
    if not positions:
        return [], [], torch.empty(0)
    joined = [[torch.cat(parts, 1)[:, :most] for parts in kept] for kept in (keys, values)]
    return joined[0], joined[1], torch.cat(positions)[:most]


@dataclass
class _Slots:
    """The KV slots of one sequence.

    Args:
        rows: keys and values of each layer, ``[G, S, D]`` each.
        position_S: their position ids.
    """

    rows: list[tuple[Tensor, Tensor]]
    position_S: Tensor


def _slots(model: Any, ids_BT: Tensor, layers: list[int]) -> Iterator[_Slots]:
    """Runs a model on some sequences and yields their KV slots: one per token, or one per pass of a think method."""
    thinks = getattr(model, "method", None) is not None
    cache: Any = _exact_cache(model) if thinks else DynamicCache(config=model.config.get_text_config(decoder=True))
    model(input_ids=ids_BT, logits_to_keep=1, **{CACHE: cache})
    for number in layers:
        layer = cache.layers[number] if number < len(cache.layers) else None
        if not thinks and getattr(layer, "keys", None) is None:
            raise UserError(
                f"{type(model).__name__}: its layer {number} adds no keys to the stock cache; calibration needs them"
            )
    for row in range(len(ids_BT)):
        if isinstance(cache, CompressedSlotCache):
            by_layer: Any = cache.layers
            tables = [by_layer[number].rows[row].tables[0] for number in layers]
            rows = [(table.keys[0], table.values[0]) for table in tables]
            position_S = cache.columns[row].position_C
        else:
            stores = [cache.layers[number].tables[0] if thinks else cache.layers[number] for number in layers]
            rows = [(each.keys[row], each.values[row]) for each in stores]
            slots = cache.slots_per_token if thinks else 1
            position_S = torch.arange(rows[0][0].shape[1], device=ids_BT.device).div(slots, rounding_mode="floor")
        yield _Slots(rows, position_S)


def _exact_cache(model: Any) -> Any:
    """An empty cache that keeps every KV slot, for a model with a think method."""
    from pondera.methods.kv_cache.preallocated_cache import PreallocatedCache

    before, model.kv_cache = model.kv_cache, PreallocatedCache()
    try:
        return model.new_cache()
    finally:
        model.kv_cache = before


def residual_tables(x_NC: Tensor, stages: int, stage: Stage, seed: int) -> Tensor:
    """``[L, K, C]``: residual codebooks, each fitted to the error of the ones before.

    The codebooks are float16 from the start, so that later stages also correct rounding errors of earlier ones.

    Args:
        x_NC: vectors.
        stages: L.
        stage: fits one codebook.
        seed: seed of the random choices.
    """
    generator = torch.Generator().manual_seed(seed)
    tables, rest_NC = [], x_NC
    for _ in range(stages):
        scale = rest_NC.square().mean().sqrt().clamp(min=1e-8)
        tables.append((stage(rest_NC / scale, generator) * scale).half())
        table_KC = tables[-1].float()
        rest_NC = rest_NC - table_KC[nearest(rest_NC, table_KC)]
    return torch.stack(tables)


def learned(description: Quantizer, steps: int, rate: float = 3e-3) -> Stage:
    """A stage that trains a codebook with Adam.

    The learning rate warms up for a tenth of the steps and then decays to 0.

    Args:
        description: quantizer with one codebook, such as ``SimVQ(256, init="match")``.
        steps: number of steps with `BATCH` vectors each.
        rate: the highest learning rate.
    """

    def stage(x_NC: Tensor, generator: torch.Generator) -> Tensor:
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
            book = description.build(x_NC.shape[1]).to(x_NC.device).train()
            optimizer = torch.optim.Adam(book.parameters(), lr=rate) if any(True for _ in book.parameters()) else None
            for step in range(steps):
                drawn = torch.randint(len(x_NC), (min(BATCH, len(x_NC)),), generator=generator)
                book.begin_step(step, 0)
                output = book(x_NC[drawn.to(x_NC.device)])
                if optimizer is None:
                    continue
                rise = max(1, steps // 10)
                optimizer.param_groups[0]["lr"] = rate * min((step + 1) / rise, (steps - step) / (steps - rise + 1))
                optimizer.zero_grad()
                output.loss.backward()
                optimizer.step()
        table = book.fold().table()
        assert table is not None
        return table[0, 0].detach()

    return stage


def clustered(codes: int, most: int = 2**15) -> Stage:
    """A stage that fits a codebook by k-means.

    Args:
        codes: K.
        most: maximum number of vectors for k-means; of more vectors it takes a random sample.
    """

    def stage(x_NC: Tensor, generator: torch.Generator) -> Tensor:
        if len(x_NC) > most:
            x_NC = x_NC[torch.randperm(len(x_NC), generator=generator)[:most].to(x_NC.device)]
        return kmeans(x_NC, codes, generator)[0]

    return stage
