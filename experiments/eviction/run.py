"""What is lost when the KV cache is cut? Recall and loss of every eviction and selection policy at equal budgets.

    python -m experiments.eviction.run                            all of it, half an hour of two free cores
    python -m experiments.eviction.run --seeds 1 --texts 8        a first look
    python -m experiments.eviction.run --smoke      a check that it runs

For each seed a Llama of 3 layers is trained on the sequences of `sequences.py`, in which something has to be recalled; `Full`
shows that it has learnt to. Every policy prefills the prompt in one call, with the question as its last token, and then gets
the answer token by token. Measured are the share of these tokens that are ranked first and the loss; for sequences without a
question the loss alone. ``later`` gives the question after the prompt, so that no policy knows it when it evicts. Budgets are
KV slots per layer and KV head, as shares of the prompt; for policies that keep everything and attend to a part, the slots
that they attend to (for `LazyLLM` after its first layer, which attends to all). Each row is written when it is done, and
finished rows are not run again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from experiments.common.publishing import write_json
from experiments.eviction.sequences import KINDS, PROMPT, SIZES, Texts, trained
from pondera.cache.slot_layer import KVStoreLayer
from pondera.core import spec

SHARES = (0.5, 0.25, 0.125)
TASKS = ("needle", "needle, later", "list", "copy", "text")
POLICIES = {
    "PreallocatedCache": "PreallocatedCache()",
    "StreamingLLM": "StreamingLLM({n})",
    "RandomEviction": "RandomEviction({n}, recent=8, sinks=4)",
    "H2O": "H2O({n})",
    "A2SF": "A2SF({n}, alpha=0.9)",
    "Keyformer": "Keyformer({n})",
    "TreeKV": "TreeKV({n})",
    "SnapKV": "SnapKV({n}, window=8, kernel=5)",
    "DapQ": "DapQ(SnapKV({n}, window=8, kernel=5))",
    "AdaKV": "AdaKV(SnapKV({n}, window=8, kernel=5), safeguard=0.2)",
    "FastKV": "FastKV(SnapKV({n}, window=8, kernel=5), tsp=0.5)",
    "TokenSelect": "TokenSelect({n} - 8, sinks=4, recent=4)",
    "RefreshKV": "RefreshKV({n}, stride=5, similarity=0.85, kernel=5)",
    "LazyLLM": "LazyLLM({share}, layers=[0])",
}
"""By name, as specs; n is the budget, share that of the prompt."""


def policy(name: str, slots: int) -> str:
    """The spec of a policy with a budget of so many slots."""
    spec_text = POLICIES[name].replace("{share}", str(slots / PROMPT))
    return spec_text.replace("{n} - 8", str(slots - 8)).replace("{n}", str(slots))


@torch.no_grad()
def measure(lm: Any, memory: str, texts: Texts, later: bool) -> dict[str, float]:
    """Reads prompts in one call and what is asked for token by token.

    Args:
        lm: the model.
        memory: spec of a policy.
        texts: of one kind.
        later: the last token of the prompts comes after what is read in one call.
    """
    prompt = texts.prompt - later
    cache = spec.build(memory, "kv_cache").cache(lm)
    ids_BT = texts.ids_BT
    logits = [lm(ids_BT[:, :prompt], past_key_values=cache, logits_to_keep=1).logits]
    for at in range(prompt, ids_BT.shape[1] - 1):
        logits.append(lm(ids_BT[:, at : at + 1], past_key_values=cache).logits)
    logits_BTV, label_BT = torch.cat(logits, dim=1)[:, -(ids_BT.shape[1] - texts.prompt) :], ids_BT[:, texts.prompt :]
    tables = [table for layer in cache.kept if isinstance(layer, KVStoreLayer) for table in layer.tables]
    held = [table.real.sum(-1).float().mean() for table in tables]
    return {
        "recall": float((logits_BTV.argmax(-1) == label_BT).float().mean()),
        "loss": float(torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), label_BT.flatten())),
        "slots": float(torch.stack(held).mean()),
        "bytes": cache.nbytes() / len(ids_BT),
    }


def arms() -> list[tuple[str, float]]:
    """Policies and shares; all is kept once only."""
    return [("PreallocatedCache", 1.0), *((name, share) for share in SHARES for name in POLICIES if name != "PreallocatedCache")]


def run_seed(seed: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """All rows of one seed; those that are there already are not run again."""
    torch.set_num_threads(1)
    lm = trained(seed, args.steps, args.batch, args.out / f"seed-{seed}")
    file = args.out / f"seed-{seed}.json"
    rows = json.loads(file.read_text())["rows"] if file.is_file() else []
    there = {(row["policy"], row["share"], row["task"]) for row in rows}
    for (name, share), (number, task) in itertools.product(arms(), enumerate(TASKS)):
        if (name, share, task) in there:
            continue
        began, memory = time.perf_counter(), policy(name, int(share * PROMPT))
        texts = KINDS[task.partition(",")[0]](args.texts, torch.Generator().manual_seed(10_000 + 100 * seed + number))
        found = measure(lm, memory, texts, later="later" in task)
        rows.append({"policy": name, "spec": memory, "share": share, "task": task, "seed": seed, **found})
        said = f"recall {found['recall']:.3f}, loss {found['loss']:.3f}, {time.perf_counter() - began:.1f} s"
        print(f"seed {seed}, {name} at {share}, {task}: {said}", flush=True)
        write_json(file, {"rows": rows})
    return rows


def main() -> None:
    """Runs what is missing, seeds side by side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1600, help="of training")
    parser.add_argument("--batch", type=int, default=8, help="texts of each kind in a step")
    parser.add_argument("--texts", type=int, default=32, help="that are measured, of each kind")
    parser.add_argument("--jobs", type=int, default=2, help="seeds side by side")
    parser.add_argument("--out", type=Path, default=Path("runs/eviction"), help="where weights and rows go")
    parser.add_argument("--results", type=Path, default=Path("results/eviction/recall.json"))
    parser.add_argument("--smoke", action="store_true", help="4 steps, one seed, 2 sequences, to runs/smoke/ only")
    args = parser.parse_args()
    if args.smoke:
        args.seeds, args.steps, args.texts = 1, 4, 2
        args.out, args.results = Path("runs/smoke/runs/eviction"), Path("runs/smoke/results/eviction/recall.json")
    args.out.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(args.jobs) as pool:
        rows = [row for found in pool.map(run_seed, range(args.seeds), itertools.repeat(args)) for row in found]
    told = {name: getattr(args, name) for name in ("seeds", "steps", "batch", "texts")}
    command = " ".join(["python -m experiments.eviction.run", *(f"--{name} {value}" for name, value in told.items())])
    write_json(args.results, {"command": command, "prompt": PROMPT, "model": SIZES, "rows": rows})
    print("done")


if __name__ == "__main__":
    main()
