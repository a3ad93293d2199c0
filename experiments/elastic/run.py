"""Does a memory of earlier blocks help, and which? Elastic Memory, simpler memories of equal size, and no memory.

    python -m experiments.elastic.run --scale cpu --text books.long.jsonl.xz      about half an hour on two cores
    python -m experiments.elastic.run --scale gpu --text books.long.jsonl.xz --minutes 8.5   call it again until it says "done"
    python -m experiments.elastic.run --scale cpu --smoke      a check that it runs

The language models read windows of eight blocks: without memory (``blocks``); with the last KV slots before each block
(``transformer-xl``); with mean rows (``mean-pool``); with 16 samples of 16 or 64 Legendre coefficients (``elastic-16``,
``elastic-64``); with all rows before the block, where each query of the last layer attends to its nearest 16
(``memorizing``); and with attention to the whole window (``plain``). All use the same text, the same number of tokens and
the same number of memory rows. The loss of the trained models is measured by the position of the block in its sequence, also
in sequences of four times the training length, and with the samples of Elastic Memory moved to the recent past.

Then small models learn two tasks on random tokens. *Slow signal*: the mean of all bits so far, whose rate changes with every
block. *Needle*: each of 16 keys has one value in the past, and the last block asks for the values; Elastic Memory is not
made for this. Everything is resumable; results go to ``results/elastic/``.
"""

from __future__ import annotations

import json
import math
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from experiments.common.publishing import GPU, Experiment, arguments, in_pieces, plan, publish, write_json, write_recipe
from pondera.comparison.compare import compare
from pondera.comparison.plan import folder_of, with_seed
from pondera.comparison.rows import spread
from pondera.core.run_config import RunConfig, load
from pondera.core.run_folder import Run
from pondera.data.corpus import prepare
from pondera.data.sampler import collate
from pondera.inference.load import load as load_model
from pondera.methods.memory.elastic_memory import ElasticMemory
from pondera.models.adaptive_lm import AdaptiveLM
from pondera.models.config import AdaptiveConfig
from pondera.models.method import TokenBatch

SCALES = {
    "cpu": {
        "data.context": 512,
        "train.batch_size": 4,
        "train.steps": 200,
        "train.eval_tokens": 32768,
        "train.eval_every": 200,
        "train.save_every": 100,
    },
    "gpu": GPU | {"data.context": 1024, "train.batch_size": 32},
}
BLOCK = {"cpu": 64, "gpu": 128}
HELD_OUT = {"cpu": 65536, "gpu": 524288}
"""Held-out tokens for the loss by position."""
LONGER = 4
"""Length of the long evaluation sequences, in training windows."""
ROWS = 16
TASKS = ("slow-signal", "needle")
TASK_BLOCK, TASK_BLOCKS, KEYS, NOISE = 32, 8, 16, 16
TASK_BATCH, TASK_TESTS = 8, 256


def memories(block: int, blocks: int, rows: int = ROWS) -> dict[str, str | None]:
    """The variants by name, for sequences of `blocks` blocks of `block` tokens."""
    pool = block * (blocks - 1) // rows
    pool = next(size for size in range(pool, block + 1) if block % size == 0)  # the rows must cover the whole past
    return {
        "plain": None,
        "blocks": f"TransformerXL(block={block}, mems=0)",
        "transformer-xl": f"TransformerXL(block={block}, mems={rows}, tbptt=2)",
        "mean-pool": f"MeanPool(block={block}, samples={rows}, pool={pool})",
        "memorizing": f"MemorizingTransformer(block={block}, memory={block * (blocks - 1)}, top_k={rows})",
        "elastic-16": f"ElasticMemory(block={block}, order=16, samples={rows})",
        "elastic-64": f"ElasticMemory(block={block}, order=64, samples={rows})",
    }


# Loss by position


@torch.no_grad()
def nats_by_block(model: AdaptiveLM, windows: list[dict[str, Tensor]], block: int, batch: int) -> list[float]:
    """Summed next-token loss of the tokens of each block."""
    total = torch.zeros(len(windows[0]["input_ids"]) // block)
    for first in range(0, len(windows), batch):
        inputs = {name: x.to(model.device) for name, x in collate(windows[first : first + batch]).items()}
        logits_BTV = model(input_ids=inputs["input_ids"]).logits
        nats_BT = F.cross_entropy(logits_BTV.transpose(1, 2).float(), inputs["shift_labels"], reduction="none")
        total += nats_BT.unflatten(1, (-1, block)).sum((0, 2)).cpu()
    return total.tolist()


def places(arms: list[RunConfig], it: Experiment, block: int, tokens: int, target: Path) -> None:
    """Loss by block of every trained model; existing rows are not repeated."""
    rows = json.loads(target.read_text())["rows"] if target.is_file() else []
    done = {(row["arm"], row["seed"], row["context"], row["points"]) for row in rows}
    for config in arms:
        context, points = config.data.context, ["uniform"]
        if "Elastic" in (config.memory or ""):
            points.append("recent")
        lengths = [context] if config.memory is None else [context, LONGER * context]
        for seed in range(it.seeds):
            wanted = [(n, at) for n in lengths for at in points if (config.name, seed, n, at) not in done]
            if not wanted:
                continue
            run = Run.open(folder_of(with_seed(config, seed), it.out))
            model, held_out = load_model(str(run.path)).model.eval(), prepare(config.data).validation
            for length, at in wanted:
                if isinstance(model.memory, ElasticMemory):
                    model.memory.look(at)
                split = held_out.windows(length)
                count = min(len(split), tokens // length)
                nats = nats_by_block(model, [split[i] for i in range(count)], block, config.train.batch_size)
                share = held_out.num_bytes_of(1, count * length + 1) / len(nats)
                bits = [one / math.log(2) / share for one in nats]
                rows.append({"arm": config.name, "seed": seed, "context": length, "points": at, "bits_per_byte": bits})
                write_json(target, {"command": it.command, "block": block, "rows": rows})


def by_place(target: Path) -> None:
    """Means over seeds for some ranges of blocks, and the differences to the variant without memory."""
    found = json.loads(target.read_text())
    table = []
    keys = dict.fromkeys((row["arm"], row["context"], row["points"]) for row in found["rows"])
    base = {(row["seed"], row["context"]): row["bits_per_byte"] for row in found["rows"] if row["arm"] == "blocks"}
    for arm, context, points in keys:
        own = [row for row in found["rows"] if (row["arm"], row["context"], row["points"]) == (arm, context, points)]
        blocks = len(own[0]["bits_per_byte"])
        for first, stop in [(0, 1), (1, 2), (2, 4), (4, 8), (8, 16), (16, 32)]:
            if stop <= blocks:
                score = [sum(row["bits_per_byte"][first:stop]) / (stop - first) for row in own]
                against = [sum(base[row["seed"], context][first:stop]) / (stop - first) for row in own]
                gap = [one - other for one, other in zip(score, against, strict=True)]
                where = {"arm": arm, "context": context, "points": points, "blocks": [first, stop]}
                table.append(where | {"bits_per_byte": spread(score), "against_blocks": spread(gap)})
    write_json(target, found | {"table": table})


# Two tasks


def slow_signal(count: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random bits with a new rate in each block, and the mean of all bits so far; ``[count, T]`` each."""
    rate = torch.rand(count, TASK_BLOCKS, 1, generator=draw)
    bits = (torch.rand(count, TASK_BLOCKS, TASK_BLOCK, generator=draw) < rate).flatten(1).long()
    return bits, bits.cumsum(1) / torch.arange(1, bits.shape[1] + 1)


def needle(count: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Noise with one key-value token per key in the earlier blocks, and the keys alone in the last block.

    Returns:
        The tokens, and the labels: the value at each key of the last block, otherwise -100; ``[count, T]`` each.
    """
    past = TASK_BLOCK * (TASK_BLOCKS - 1)
    tokens = torch.randint(NOISE, (count, past + TASK_BLOCK), generator=draw)
    value = torch.randint(KEYS, (count, KEYS), generator=draw)
    place = torch.rand(count, past, generator=draw).argsort(1)[:, :KEYS]
    tokens.scatter_(1, place, NOISE + KEYS * torch.arange(KEYS) + value)
    asked = past + torch.rand(count, TASK_BLOCK, generator=draw).argsort(1)[:, :KEYS]
    tokens.scatter_(1, asked, (NOISE + KEYS * KEYS + torch.arange(KEYS)).expand(count, -1))
    return tokens, torch.full_like(tokens, -100).scatter(1, asked, value)


def learn(task: str, memory: str | None, seed: int, steps: int) -> dict[str, float]:
    """Trains a small model on a task and measures it on the last block of new sequences."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2, "num_attention_heads": 2}
    words = {"vocab_size": NOISE + KEYS * (KEYS + 1), "tie_word_embeddings": False}
    backbone = {"model_type": "llama", **sizes, **words}
    model = AdaptiveLM(AdaptiveConfig(backbone=backbone, memory=memory, init="scaled")).train()
    out = nn.Linear(64, 1 if task == "slow-signal" else KEYS)
    draw = torch.Generator().manual_seed(1000 + seed)
    parameters = [*(p for n, p in model.named_parameters() if "lm_head" not in n), *out.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)

    def answers(tokens: Tensor) -> Tensor:
        h_BTD, position_ids = model.backbone.embed(tokens), torch.arange(tokens.shape[1])[None]
        if model.method is None:
            return out(model.backbone.step(h_BTD, None, None, position_ids))
        return out(model.method(model.backbone, TokenBatch(h_BTD, position_ids)).h_BTD)

    for _ in range(steps):
        tokens, wanted = (slow_signal if task == "slow-signal" else needle)(TASK_BATCH, draw)
        given = answers(tokens)
        if task == "slow-signal":
            loss = (given[..., 0] - wanted).square().mean()
        else:
            loss = F.cross_entropy(given.transpose(1, 2), wanted)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
    model.eval()
    with torch.no_grad():
        tokens, wanted = (slow_signal if task == "slow-signal" else needle)(
            TASK_TESTS, torch.Generator().manual_seed(1)
        )
        given = torch.cat([answers(part) for part in tokens.split(64)])[:, -TASK_BLOCK:]
        wanted = wanted[:, -TASK_BLOCK:]
        if task == "slow-signal":
            error = (given[..., 0] - wanted).square().mean() / (wanted - wanted.mean()).square().mean()
            return {"error": float(error)}
        asked = wanted >= 0
        return {"accuracy": float((given.argmax(-1)[asked] == wanted[asked]).float().mean())}


def _job(task: str, arm: str, seed: int, steps: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    memory = memories(TASK_BLOCK, TASK_BLOCKS)[arm]
    return {"task": task, "arm": arm, "seed": seed, "steps": steps, **learn(task, memory, seed, steps)}


def tasks(it: Experiment, steps: int, target: Path) -> None:
    """All variants on both tasks; existing rows are not repeated."""
    rows = json.loads(target.read_text())["rows"] if target.is_file() else []
    there = {(row["task"], row["arm"], row["seed"], row["steps"]) for row in rows}
    arms = list(memories(TASK_BLOCK, TASK_BLOCKS))
    wanted = [(task, arm, seed) for seed in range(it.seeds) for task in TASKS for arm in arms]
    with ProcessPoolExecutor(it.jobs) as pool:
        jobs = [pool.submit(_job, *one, steps) for one in wanted if (*one, steps) not in there]
        for job in as_completed(jobs):
            rows.append(job.result())
            rows.sort(key=lambda row: (TASKS.index(row["task"]), arms.index(row["arm"]), row["seed"]))
            print(rows[-1], flush=True)
            table = []
            for task, arm in dict.fromkeys((row["task"], row["arm"]) for row in rows):
                own = [row for row in rows if (row["task"], row["arm"]) == (task, arm)]
                measure = "error" if task == "slow-signal" else "accuracy"
                table.append({"task": task, "arm": arm, measure: spread([row[measure] for row in own])})
            write_json(target, {"command": it.command, "seeds": it.seeds, "rows": rows, "table": table})


def main() -> None:
    parser = arguments(__doc__, list(SCALES))
    parser.add_argument("--task-steps", type=int, default=400, help="training steps for the two tasks")
    args = parser.parse_args()
    if args.smoke:
        args.task_steps = 2
    further = ("--task-steps", str(args.task_steps)) if args.task_steps != 400 else ()
    it, block = plan(args, "elastic", SCALES[args.scale], further), BLOCK[args.scale]
    it.results.mkdir(parents=True, exist_ok=True)
    with in_pieces(args.minutes):
        base = load("plain", it.overrides)
        arms = [
            load("plain", {**it.overrides, "name": name} | ({"memory": memory} if memory else {}))
            for name, memory in memories(block, base.data.context // block).items()
        ]
        arms = [arms[1], *arms[2:], arms[0]]  # the first is the baseline
        recipes = [write_recipe(config, it.out / "recipes") for config in arms]
        found = compare(recipes, it.seeds, "tokens", None, it.out, jobs=it.jobs)
        publish(it.out, it.results, "tokens", it.command)
        places(arms, it, block, 4096 if args.smoke else HELD_OUT[args.scale], it.results / "places.json")
        by_place(it.results / "places.json")
        tasks(it, args.task_steps, it.results / "tasks.json")
        print(*found["verdict"], sep="\n  ")


if __name__ == "__main__":
    main()
