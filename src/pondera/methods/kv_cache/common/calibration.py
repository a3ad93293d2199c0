"""Codebooks from the keys and values that a frozen model makes of text.

Shapes: B batch, T tokens of a sample, G KV heads, D head width, N vectors, C width of a codebook, K codes, L stages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from pondera.core.errors import UserError
from pondera.core.hf import DynamicCache, PreTrainedModel
from pondera.methods.quantize.base import Quantizer
from pondera.methods.quantize.common.kmeans import kmeans
from pondera.methods.quantize.common.nearest import nearest

Stage = Callable[[Tensor, torch.Generator], Tensor]
"""A table ``[K, C]`` for vectors ``[N, C]`` of unit root mean square."""

BATCH = 4096
"""Vectors of a step."""


@torch.no_grad()
def collect(
    model: PreTrainedModel, samples: Iterable[Tensor], layers: list[int], skip: int, most: int
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Keys after rotary embedding and values of some layers, as a plain cache holds them.

    Args:
        model: frozen; its weights and mode stay as they are.
        samples: token ids, ``[B, T]`` each, without padding.
        layers: numbers of the layers.
        skip: first tokens of each sample to leave out.
        most: tokens; no further samples are read once there are as many.

    Returns:
        For each layer keys, and values, ``[G, N, D]`` in float32; and the positions, ``[N]``.
    """
    keys: list[list[Tensor]] = [[] for _ in layers]
    values: list[list[Tensor]] = [[] for _ in layers]
    positions: list[Tensor] = []
    tokens, training = 0, model.training
    model.eval()
    try:
        for sample in samples:
            ids_BT = torch.as_tensor(sample).reshape(-1, sample.shape[-1]).to(model.device)
            cache = DynamicCache(config=model.config.get_text_config(decoder=True))
            model(input_ids=ids_BT, past_key_values=cache, logits_to_keep=1)
            for place, number in enumerate(layers):
                held: Any = cache.layers[number] if number < len(cache.layers) else None
                if getattr(held, "keys", None) is None:
                    raise UserError(
                        f"{type(model).__name__}: its layer {number} puts no keys into the stock cache, so there is nothing to "
                        "fit codes to"
                    )
                for kept, rows_BGTD in ((keys, held.keys), (values, held.values)):
                    kept[place].append(rows_BGTD[:, :, skip:].transpose(0, 1).flatten(1, 2).float())
            B, T = ids_BT.shape
            positions.append(torch.arange(skip, T, device=model.device).repeat(B) if T > skip else ids_BT.new_empty(0))
            tokens += len(positions[-1])
            if tokens >= most:
                break
    finally:
        model.train(training)
    if not positions:
        return [], [], torch.empty(0)
    joined = [[torch.cat(parts, 1)[:, :most] for parts in kept] for kept in (keys, values)]
    return joined[0], joined[1], torch.cat(positions)[:most]


def residual_tables(x_NC: Tensor, stages: int, stage: Stage, seed: int) -> Tensor:
    """``[L, K, C]``: one codebook after another, each for what those before it left.

    Tables are in float16 from the start, so that later stages also mend what the rounding of earlier ones left.

    Args:
        x_NC: vectors.
        stages: L.
        stage: makes one of them.
        seed: of what is drawn.
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
    """Stages that learn by Adam; the rate rises over a tenth of the steps and then falls to 0.

    Args:
        description: of one codebook, such as ``SimVQ(256, init="match")``.
        steps: of `BATCH` vectors.
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
                found = book(x_NC[drawn.to(x_NC.device)])
                if optimizer is None:
                    continue
                rise = max(1, steps // 10)
                optimizer.param_groups[0]["lr"] = rate * min((step + 1) / rise, (steps - step) / (steps - rise + 1))
                optimizer.zero_grad()
                found.loss.backward()
                optimizer.step()
        table = book.fold().table()
        assert table is not None
        return table[0, 0].detach()

    return stage


def clustered(codes: int, most: int = 2**15) -> Stage:
    """Stages by k-means.

    Args:
        codes: K.
        most: vectors that centres are sought for; more are drawn from.
    """

    def stage(x_NC: Tensor, generator: torch.Generator) -> Tensor:
        if len(x_NC) > most:
            x_NC = x_NC[torch.randperm(len(x_NC), generator=generator)[:most].to(x_NC.device)]
        return kmeans(x_NC, codes, generator)[0]

    return stage
