"""Small autoencoders with a quantizer between encoder and decoder: what they learn on, how, and what is measured.

Shapes: N vectors, D width of the data, C width between encoder and decoder.

Three kinds of vectors: 64 Gaussian clusters in 32 dimensions; images of 16 x 16 that are drawn here (bars, discs, rings and
crosses); and hidden states of a small language model on the text of this Python's standard library, which needs no
training: a transformer with random weights already mixes tokens, positions and what stood before. What is reported was
measured on vectors that no step has seen, in eval mode.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from experiments.common.publishing import SEEDS, write_json
from pondera.core import spec
from pondera.methods.quantize.base import Quantizer
from pondera.methods.quantize.common.codebook import Codebook
from pondera.methods.quantize.common.diagnosis import ENOUGH, diagnose
from pondera.methods.quantize.common.health import effective_rank

WIDTH, BATCH, HELD_OUT, CLUSTERS = 16, 512, 8192, 64
LEARNT_ON = 65536
"""Vectors that the steps draw from."""
JUDGED_BY = ("usage", "perplexity", "split_error", "reachable_perplexity", "reachable_error", "effective_rank_input")
"""What `pondera probe collapse` reaches its verdict by, on half of the held-out vectors; k-means learns on the other."""


@dataclass(frozen=True)
class Setting:
    """One way to begin.

    Args:
        quantizer: the spec of its codebook.
        encoder: width of the encoder's hidden layers.
        warmup: steps without the codebook.
    """

    quantizer: str
    encoder: int = 128
    warmup: int = 0


def clusters(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
    """Vectors around 64 centres of scale 2, with noise of 0.3; and which centre."""
    centres_KD = 2 * torch.randn(CLUSTERS, 32, generator=torch.Generator().manual_seed(1234))
    label_N = torch.randint(CLUSTERS, (count,), generator=generator)
    return centres_KD[label_N] + 0.3 * torch.randn(count, 32, generator=generator), label_N


def images(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
    """Grey images, 256 pixels in a row: one of four shapes at any place, of any size and brightness; and which shape."""
    across = torch.linspace(-1, 1, 16)
    y_HW, x_HW = torch.meshgrid(across, across, indexing="ij")
    at = 1.2 * torch.rand(count, 2, generator=generator) - 0.6
    size = 0.2 + 0.4 * torch.rand(count, 1, 1, generator=generator)
    dx, dy = x_HW - at[:, 0, None, None], y_HW - at[:, 1, None, None]
    far = (dx.square() + dy.square()).sqrt()
    shapes = torch.stack(
        [
            dx.abs() - size / 3,  # a bar
            far - size,  # a disc
            (far - size).abs() - 0.1,  # a ring
            torch.minimum(
                torch.maximum(dx.abs() - 0.1, dy.abs() - size), torch.maximum(dy.abs() - 0.1, dx.abs() - size)
            ),
        ]
    )
    label_N = torch.randint(4, (count,), generator=generator)
    ink = torch.sigmoid(-16 * shapes[label_N, torch.arange(count)])
    light = 0.5 + torch.rand(count, 1, 1, generator=generator)
    return (4 * light * ink).flatten(1), label_N


@cache
def _states() -> Tensor:
    """Hidden states of a random transformer on the standard library's text."""
    from pondera import AdaptiveConfig, AdaptiveLM
    from pondera.core.run_config import DataConfig
    from pondera.data.corpus import prepare

    windows = prepare(DataConfig(text="stdlib", tokenizer="bpe-2048", context=256)).train.windows(256)
    sizes = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(1234)
    model = AdaptiveLM(
        AdaptiveConfig(backbone={"model_type": "llama", "vocab_size": 2048, **sizes}, init="scaled")
    ).eval()
    with torch.no_grad():
        count = (LEARNT_ON + HELD_OUT) // 256
        found = [model.backbone.step(model.backbone.embed(windows[at]["input_ids"][None]))[0] for at in range(count)]
    return torch.cat(found)


def states(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
    """Text states: the first are learnt on, the last are held out."""
    return (_states()[:count] if count == LEARNT_ON else _states()[-count:]), None


DATA: dict[str, Callable[[int, torch.Generator], tuple[Tensor, Tensor | None]]] = {
    "clusters": clusters,
    "images": images,
    "states": states,
}


def network(given: int, hidden: int, made: int) -> nn.Sequential:
    """Two hidden layers."""
    return nn.Sequential(
        nn.Linear(given, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, made)
    )


def learn(setting: Setting, data: str, seed: int, steps: int) -> dict[str, Any]:
    """Trains one autoencoder and measures it on held-out vectors."""
    began, draw = time.perf_counter(), torch.Generator().manual_seed(seed)
    x_ND, _ = DATA[data](LEARNT_ON, draw)
    test_ND, label_N = DATA[data](HELD_OUT, torch.Generator().manual_seed(10_000 + seed))
    torch.manual_seed(seed)
    encoder, decoder = network(x_ND.shape[1], setting.encoder, WIDTH), network(WIDTH, 128, x_ND.shape[1])
    quantizer: Quantizer = spec.build(setting.quantizer, "quantize").build(WIDTH)
    parts = nn.ModuleList([encoder, decoder, quantizer]).train()
    optimizer = torch.optim.Adam(parts.parameters(), lr=1e-3)
    warm = None
    for step in range(steps):
        if step == setting.warmup and step:
            warm = _measured(parts, test_ND, None)
        quantizer.begin_step(step, seed)
        batch_ND = x_ND[torch.randint(len(x_ND), (BATCH,), generator=draw)]
        found = quantizer(encoder(batch_ND))
        loss = (decoder(found.out) - batch_ND).square().mean() + found.loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    measured = _measured(parts, test_ND, label_N)
    return {**measured, "bits": quantizer.bits, "after_warmup": warm, "seconds": time.perf_counter() - began}


@torch.no_grad()
def _measured(parts: nn.ModuleList, test_ND: Tensor, label_N: Tensor | None) -> dict[str, Any]:
    """Health on held-out vectors, what the decoder makes of codes and of vectors, and how pure codes are."""
    parts.eval()
    encoder, decoder, quantizer = parts
    z_ND = encoder(test_ND)
    found = quantizer(z_ND)
    health, scale = found.health.to_dict(), (test_ND - test_ND.mean(0)).square().mean()
    said = {key: health[key] for key in ("split_error", "variance")}
    for key in ("usage", "perplexity", "crowding"):
        said[key] = health[key][0][0] if health[key] else None
    said["effective_rank_codes"] = health["effective_rank_codes"][0]
    said["effective_rank_input"] = effective_rank(z_ND)  # health knows none of vectors that pass a warm-up uncoded
    for name, vectors_ND in (("coded", found.out), ("continuous", z_ND)):
        said[f"error_{name}"] = float((decoder(vectors_ND) - test_ND).square().mean() / scale)
    if isinstance(quantizer, Codebook) and not quantizer.gate.closed:
        code_N, table_KC = found.codes.flatten(), quantizer.table()[0, 0]
        if label_N is not None:
            kinds = int(label_N.max()) + 1
            together = torch.bincount(code_N * kinds + label_N, minlength=len(table_KC) * kinds).view(-1, kinds)
            said["purity"] = float(together.amax(1).sum() / len(label_N))
        if len(z_ND) >= ENOUGH * len(table_KC):
            deferred = diagnose(z_ND, table_KC).to_dict()
            said["diagnosis"] = {key: deferred[key] for key in (*JUDGED_BY, "width")}
    parts.train()
    return said


def _job(setting: Setting, data: str, seed: int, steps: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    return learn(setting, data, seed, steps)


def sweep(doc: str | None, kind: str, settings: Callable[[int], dict[str, Setting]], steps: int) -> None:
    """The command line of an experiment: every setting on every kind of vectors, over seeds.

    A setting is written as it ends, and what is there is not run again.

    Args:
        doc: of the script.
        kind: the question: the name of the experiment's folder and of its file of results.
        settings: by name, in the order of the table, given the number of steps.
        steps: unless others are asked for.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", choices=list(DATA), default=list(DATA))
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--jobs", type=int, default=2, help="side by side, one thread each")
    parser.add_argument("--out", type=Path, default=Path(f"results/{kind}.json"))
    parser.add_argument("--smoke", action="store_true", help="4 steps and one seed on clusters, to runs/smoke/ only")
    args = parser.parse_args()
    if args.smoke:
        args.data, args.seeds, args.steps, args.out = ["clusters"], 1, 4, Path(f"runs/smoke/results/{kind}.json")
    rows = json.loads(args.out.read_text())["rows"] if args.out.is_file() else []
    there = {(row["setting"], row["data"], row["seed"], row["steps"]) for row in rows}
    by_name, kinds = settings(args.steps), list(DATA)
    wanted = [(name, data, seed) for data in args.data for name in by_name for seed in range(args.seeds)]
    with ProcessPoolExecutor(args.jobs) as pool:
        running = {
            pool.submit(_job, by_name[name], data, seed, args.steps): (name, data, seed)
            for name, data, seed in wanted
            if (name, data, seed, args.steps) not in there
        }
        for done in as_completed(running):
            (name, data, seed), found = running[done], done.result()
            which = {"setting": name, "data": data, "seed": seed, "steps": args.steps}
            rows.append({**which, **vars(by_name[name]), **found})
            print(f"{data}, {name}, seed {seed}: error {found['error_coded']:.3f}")
            rows.sort(key=lambda row: (kinds.index(row["data"]), list(by_name).index(row["setting"]), row["seed"]))
            args.out.parent.mkdir(parents=True, exist_ok=True)
            write_json(args.out, {"command": f"python -m experiments.{kind}.run --seeds {args.seeds}", "rows": rows})
    print("done")
