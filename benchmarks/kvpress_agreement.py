"""Kept tokens of Pondera compared with kvpress, on the same models and sequences, for policies with the same score.

    python -m venv peers
    peers/bin/pip install torch==2.13.0 kvpress==0.5.5
    python benchmarks/kvpress_agreement.py --python peers/bin/python

kvpress 0.5.5 needs transformers below 5.3, so it runs in an environment of its own; this file runs in both. Models are random
Llamas in float64 with two query heads per KV head. A kept set is the set of tokens kept in one sequence, layer and KV head.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

PROMPT, SEEDS = 192, (0, 1, 2)
SIZES = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
PAIRS = {
    "StreamingLLM": ("StreamingLLM({n}, sinks=4)", "StreamingLLMPress({r}, n_sink=4)"),
    "SnapKV": (
        "SnapKV({n}, window=16, kernel=5, pool='mean')",
        "SnapKVPress({r}, window_size=16, kernel_size=5)",
    ),
    "AdaKV(SnapKV)": (
        "AdaKV(SnapKV({n}, window=16, kernel=5, pool='mean'), safeguard=0.25)",
        "AdaKVPress(SnapKVPress({r}, window_size=16, kernel_size=5), alpha_safeguard=0.25)",
    ),
    "KVzip": ("KVzip({n}, prompt=[3, 5, 2, 7], sinks=0)", "KVzipPress({r}, n_sink=0)"),
    "KVzip, by layer": (
        "KVzip({n}, level='layer', prompt=[3, 5, 2, 7], sinks=0)",
        "KVzipPress({r}, layerwise=True, n_sink=0)",
    ),
    "ExpectedAttention": (
        "ExpectedAttention({n}, future=64, epsilon=0.02)",
        "ExpectedAttentionPress({r}, n_future_positions=64, epsilon=0.02)",
    ),
    "KeyDiff": ("KeyDiff({n})", "KeyDiffPress({r})"),
    "TOVA": ("TOVA({n})", "TOVAPress({r})"),
    # Ranks are tied across partitions; with these sizes each of the 24 ranked ones keeps 3, 1 or 0 tokens.
    "LagKV": ("LagKV({n}, lag=7, sinks=11)", "LagKVPress({r}, lag_size=7, n_sink=11)"),
    "CurDKV": ("CurDKV({n}, window=16, sinks=4)", "CURPress({r}, local_window_size=16, num_sinks=4)"),
    # Without a short last chunk, whose missing keys CompactorPress counts, and without the random sketch.
    "Compactor": (
        "Compactor({n}, blending=0.35, chunk=36, sketch=None, sinks=8, recent=4)",
        "CompactorPress({r}, blending=0.35, chunk_size=36, sketch_dimension=16, sink_size_start=8, sink_size_end=4)",
    ),
}
"""By name: Pondera's spec with the number of slots, kvpress's expression with the share to evict."""
SHARES = (0.5, 0.25, 0.125)

IDS = {"": [], "\n": [7]}
"""Token ids of the texts of KVzipPress, as random models have no tokenizer; those of its instruction are 3, 5, 2."""

Kept = list[list[list[int]]]
"""By layer and KV head: sorted token indices."""


def make(folder: Path, seed: int) -> None:
    """Saves a random model, with weights large enough for peaked attention, and a sequence."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, initializer_range=0.1)).double()
    torch.save(model.state_dict(), folder / f"{seed}.pt")
    torch.save(torch.randint(SIZES["vocab_size"], (1, PROMPT)), folder / f"{seed}-ids.pt")


def load(folder: Path, seed: int) -> tuple[Any, torch.Tensor]:
    """Loads the model and the sequence, in either environment."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**SIZES)).double().eval()
    model.load_state_dict(torch.load(folder / f"{seed}.pt"))
    return model, torch.load(folder / f"{seed}-ids.pt")


def ours(model: Any, ids_BT: torch.Tensor, memory: str) -> Kept:
    """The tokens that a policy of Pondera keeps."""
    from pondera.core import spec

    cache = spec.build(memory, "kv_cache").cache(model)
    model(ids_BT, past_key_values=cache)
    heads = [[head for table in layer.tables for head in table.position[0]] for layer in cache.kept]
    return [[sorted(head[head >= 0].tolist()) for head in layer] for layer in heads]


class Tokenizer:
    """Encodes the texts of KVzipPress."""

    chat_template = None

    @classmethod
    def from_pretrained(cls, name: str) -> Tokenizer:
        """In place of `AutoTokenizer`."""
        return cls()

    def encode(self, text: str, **_: Any) -> torch.Tensor:
        """``[1, tokens]``."""
        return torch.tensor([IDS.get(text, [3, 5, 2])], dtype=torch.long)


class WithoutSketch:
    """torch, with the identity in place of the random sketch of LeverageScorePress."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def randn(*shape: int, **kind: Any) -> torch.Tensor:
        """Square matrices of this shape; LeverageScorePress divides them by the root of their width."""
        return (torch.eye(shape[-1], **kind) * shape[-1] ** 0.5).expand(shape)


def theirs(model: Any, ids_BT: torch.Tensor, expression: str) -> Kept:
    """The tokens that a press keeps: keys of the full cache that remain and are not marked as masked."""
    import kvpress
    import kvpress.presses.kvzip_press
    import kvpress.presses.leverage_press
    from transformers import DynamicCache

    kvpress.presses.kvzip_press.AutoTokenizer = Tokenizer
    kvpress.presses.leverage_press.torch = WithoutSketch()
    torch.set_default_dtype(torch.float64)  # of the mask that KVzipPress makes

    whole, cut = DynamicCache(), DynamicCache()
    model(ids_BT, past_key_values=whole)
    press = eval(expression, vars(kvpress).copy())  # one of PAIRS above, nothing else
    with press(model):
        model(ids_BT, past_key_values=cut)
    masked = [getattr(layer.self_attn, "masked_key_indices", None) for layer in model.model.layers]
    kept_sets: Kept = []
    for layer, before, after in zip(masked, whole.layers, cut.layers, strict=True):
        gone = set() if layer is None else set(zip(layer[1].tolist(), layer[2].tolist(), strict=True))
        heads = []
        for head, (all_TD, left_SD) in enumerate(zip(before.keys[0], after.keys[0], strict=True)):
            place = {tuple(row): number for number, row in enumerate(all_TD.tolist())}
            numbers = sorted(place[tuple(row)] for row in left_SD.tolist())
            heads.append([number for number in numbers if (head, number) not in gone])
        kept_sets.append(heads)
    return kept_sets


def kept(side: str, folder: Path) -> dict[str, Kept]:
    """All kept sets of one side, by name, share and seed."""
    found = {}
    with torch.no_grad():
        for seed in SEEDS:
            for name, (our_spec, press) in PAIRS.items():
                for share in SHARES:
                    model, ids_BT = load(folder, seed)
                    if side == "ours":
                        one = ours(model, ids_BT, our_spec.replace("{n}", str(int(share * PROMPT))))
                    else:
                        one = theirs(model, ids_BT, press.replace("{r}", f"compression_ratio={1 - share}"))
                    found[f"{name} {share} {seed}"] = one
    return found


def compare(mine: dict[str, Kept], other: dict[str, Kept]) -> list[dict[str, Any]]:
    """For each policy and share: the number of identical kept sets, and the share of tokens that both keep."""
    rows = []
    for name in PAIRS:
        for share in SHARES:
            pairs = [
                (set(a), set(b))
                for seed in SEEDS
                for one, two in zip(mine[f"{name} {share} {seed}"], other[f"{name} {share} {seed}"], strict=True)
                for a, b in zip(one, two, strict=True)
            ]
            both, kept_by_us = sum(len(a & b) for a, b in pairs), sum(len(a) for a, _ in pairs)
            same = sum(a == b for a, b in pairs)
            rows.append(
                {"policy": name, "share": share, "sets": len(pairs), "same": same, "overlap": both / kept_by_us}
            )
    return rows


def agreement(python: str) -> dict[str, Any]:
    """Runs both sides, kvpress with the given Python."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for seed in SEEDS:
            make(folder, seed)
        command = [python, str(Path(__file__).resolve()), "--theirs", name]
        answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        other = json.loads(answer.splitlines()[-1])
        return {
            "peer": other["peer"],
            "prompt": PROMPT,
            "model": SIZES,
            "rows": compare(kept("ours", folder), other["kept"]),
        }


def main() -> None:
    """Compares both sides, or runs as the kvpress side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=sys.executable, help="python of an environment with kvpress")
    parser.add_argument("--out", type=Path, default=Path("results/kvpress.json"))
    parser.add_argument("--theirs", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.theirs:
        from importlib.metadata import version

        peer = " ".join(f"{name} {version(name)}" for name in ("kvpress", "transformers"))
        print(json.dumps({"peer": peer, "kept": kept("theirs", args.theirs)}))
        return
    found = {"command": "python benchmarks/kvpress_agreement.py --python peers/bin/python", **agreement(args.python)}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(found, indent=1) + "\n")
    for row in found["rows"]:
        print(f"{row['policy']} at {row['share']}: {row['same']} of {row['sets']} kept sets are the same")


if __name__ == "__main__":
    main()
