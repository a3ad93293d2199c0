"""Small autoencoders with a quantizer between encoder and decoder: data, training and measurements.

Shapes: N vectors, D width of the data, C width between encoder and decoder.

There are three kinds of vectors: 64 Gaussian clusters in 32 dimensions; generated images of 16 x 16 pixels (bars, discs, rings
and crosses); and hidden states of a small language model on the text of Python's standard library. This model is not trained: a
transformer with random weights already mixes tokens, positions and context. All results are measured on held-out vectors, in
eval mode.
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
"""Training vectors."""
JUDGED_BY = ("usage", "perplexity", "split_error", "reachable_perplexity", "reachable_error", "effective_rank_input")
"""The measures behind the verdict of `pondera probe collapse`, on half of the held-out vectors; k-means uses the other half."""


@dataclass(frozen=True)
class Setting:
    """One setting of the experiment.

    Args:
        quantizer: the spec of the quantizer.
        encoder: width of the hidden layers of the encoder.
        warmup: steps before quantization starts.
    """

    quantizer: str
    encoder: int = 128
    warmup: int = 0


def clusters(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
    """Vectors around 64 centres of scale 2, with noise of 0.3, and the index of the centre."""
    centres_KD = 2 * torch.randn(CLUSTERS, 32, generator=torch.Generator().manual_seed(1234))
    label_N = torch.randint(CLUSTERS, (count,), generator=generator)
    return centres_KD[label_N] + 0.3 * torch.randn(count, 32, generator=generator), label_N


def images(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
    """Flattened grey images of 256 pixels with one of four shapes of random place, size and brightness, and its index."""
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
    """Hidden states of a random transformer on the text of the standard library."""
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
        states_D = [model.backbone.step(model.backbone.embed(windows[at]["input_ids"][None]))[0] for at in range(count)]
    return torch.cat(states_D)


def states(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
    """Text states: the first ones for training, the last ones held out."""
    return (_states()[:count] if count == LEARNT_ON else _states()[-count:]), None


DATA: dict[str, Callable[[int, torch.Generator], tuple[Tensor, Tensor | None]]] = {
    "clusters": clusters,
    "images": images,
    "states": states,
}


def network(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """A multilayer perceptron with two hidden layers."""
    return nn.Sequential(
        nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, outputs)
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
        quantized = quantizer(encoder(batch_ND))
        loss = (decoder(quantized.out) - batch_ND).square().mean() + quantized.loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    measured = _measured(parts, test_ND, label_N)
    return {**measured, "bits": quantizer.bits, "after_warmup": warm, "seconds": time.perf_counter() - began}


@torch.no_grad()
def _measured(parts: nn.ModuleList, test_ND: Tensor, label_N: Tensor | None) -> dict[str, Any]:
    """Codebook health on held-out vectors, reconstruction error with and without quantization, and purity of the codes."""
    parts.eval()
    encoder, decoder, quantizer = parts
    z_ND = encoder(test_ND)
    quantized = quantizer(z_ND)
    health, scale = quantized.health.to_dict(), (test_ND - test_ND.mean(0)).square().mean()
    measures = {key: health[key] for key in ("split_error", "variance")}
    for key in ("usage", "perplexity", "crowding"):
        measures[key] = health[key][0][0] if health[key] else None
    measures["effective_rank_codes"] = health["effective_rank_codes"][0]
    measures["effective_rank_input"] = effective_rank(z_ND)  # during a warm-up, health has no rank of the input
    for name, vectors_ND in (("coded", quantized.out), ("continuous", z_ND)):
        measures[f"error_{name}"] = float((decoder(vectors_ND) - test_ND).square().mean() / scale)
    if isinstance(quantizer, Codebook) and not quantizer.gate.closed:
        code_N, table_KC = quantized.codes.flatten(), quantizer.table()[0, 0]
        if label_N is not None:
            kinds = int(label_N.max()) + 1
            together = torch.bincount(code_N * kinds + label_N, minlength=len(table_KC) * kinds).view(-1, kinds)
            measures["purity"] = float(together.amax(1).sum() / len(label_N))
        if len(z_ND) >= ENOUGH * len(table_KC):
            diagnosis = diagnose(z_ND, table_KC).to_dict()
            measures["diagnosis"] = {key: diagnosis[key] for key in (*JUDGED_BY, "width")}
    parts.train()
    return measures


def _job(setting: Setting, data: str, seed: int, steps: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    return learn(setting, data, seed, steps)


def sweep(doc: str | None, kind: str, settings: Callable[[int], dict[str, Setting]], steps: int) -> None:
    """The command line of an experiment: every setting on every kind of vectors, over seeds.

    Each setting is written when it is done; finished settings are not repeated.

    Args:
        doc: the docstring of the script.
        kind: the name of the experiment's folder and of its results file.
        settings: returns the settings by name, in the order of the table, for a number of steps.
        steps: the default number of steps.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", choices=list(DATA), default=list(DATA))
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--jobs", type=int, default=2, help="processes in parallel, with one thread each")
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
