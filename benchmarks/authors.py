"""Training speed of PonderLM-2 and PonderLM compared with the authors' public code, in one run.

    git clone https://github.com/LUMIA-Group/PonderLM-2 /tmp/ponderlm2
    git clone https://github.com/LUMIA-Group/PonderingLM /tmp/ponderinglm
    python -m venv peers
    peers/bin/pip install torch==2.13.0 transformers==4.46.1 "numpy<2" safetensors
    python benchmarks/authors.py --ponderlm2 /tmp/ponderlm2 --ponderinglm /tmp/ponderinglm \\
        --python peers/bin/python --out results/authors.json

The authors' code needs transformers 4.46, so it runs in an environment of its own, with the same torch as Pondera. Each
side runs in its own process, and the two take turns. Both use the same architecture, weights, tokens, loss, precision,
Jacobi rounds and threads. Before timing, Pondera loads the authors' weights, and the script compares loss, logits and
gradients of one step. torch's counter counts the FLOPs of both sides.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pondera.core.run_folder import write_atomic

WORKER = Path(__file__).with_name("authors_worker.py")
TOLERANCE = 1e-4
"""Maximum relative difference of the gradients; above it, the two sides do not compute the same thing."""
MODELING = "src/llamafactory/model/modeling"
SIZES = {
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "vocab_size": 8192,
    "max_position_embeddings": 1024,
}
LLAMA = {"model_type": "llama", "intermediate_size": 1024, "rms_norm_eps": 1e-5, **SIZES}
GPT_NEOX = {"model_type": "gpt_neox", "intermediate_size": 1536, **SIZES}


@dataclass(frozen=True)
class Pair:
    """A method of Pondera and the authors' model to compare it with.

    Args:
        think: the spec string of the method.
        checkout: which of the authors' repositories.
        file: the modelling file in that repository.
        model: the class in that file.
        backbone: the config of both sides.
        settings: the settings that the authors' loader adds to the config.
        renamed: modules that transformers has renamed since then.
        note: how the two computations differ; empty if they are the same.
    """

    think: str
    checkout: str
    file: str
    model: str
    backbone: dict[str, Any]
    settings: dict[str, Any]
    renamed: dict[str, str] = field(default_factory=dict)
    note: str = ""


JACOBI = {
    "recurrent_model": True,
    "scale_embeds": True,
    "interpolation": False,
    "num_latent_thoughts": 1,
    "num_jacobi_iterations": 2,
    "random_jacobi_iterations": False,
}
PONDERING = {
    "ponderinglm": True,
    "pondering_steps": 3,
    "scale_embeds": True,
    "mutiply_pondering_steps": False,
    "checkpoint_num_layers": 100,
}
PONDERLM2 = Pair(
    "PonderLM2(thoughts=1, train_rounds=(2, 2))",
    "ponderlm2",
    f"{MODELING}/modeling_llama.py",
    "LlamaForCausalLM",
    LLAMA,
    JACOBI,
)
# The authors' runs used their GPT-NeoX file; their Llama file reads a setting that nothing sets.
PONDERLM = Pair(
    "PonderLM(steps=3, top_k=None)",
    "ponderinglm",
    f"{MODELING}/modeling_gpt_neox.py",
    "GPTNeoXForCausalLM",
    GPT_NEOX,
    PONDERING,
    {"embed_out": "lm_head"},
)
TOP_100 = replace(
    PONDERLM, think="PonderLM(steps=3)", note="ours mixes the 100 likeliest tokens, as the paper; theirs all of them"
)
PAIRS = {
    "PonderLM-2, K=1, R=2": PONDERLM2,
    "PonderLM, s=3, all tokens mixed": PONDERLM,
    "PonderLM, s=3": TOP_100,
    "PonderLM, s=3, their vocabulary": replace(TOP_100, backbone=GPT_NEOX | {"vocab_size": 50304}),
}


class Side:
    """A worker process that answers each line with one line of JSON."""

    def __init__(self, python: str, job: dict[str, Any], folder: Path) -> None:
        path = folder / f"{job['side']}.json"
        path.write_text(json.dumps(job))
        environment = {**os.environ, "OMP_NUM_THREADS": str(job["threads"])}
        if job["side"] == "theirs":
            environment.pop("PYTHONPATH", None)  # the other side needs its own transformers
        self.process = subprocess.Popen(
            [python, str(WORKER), str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def ask(self, line: str) -> dict[str, Any]:
        """Sends a line and waits for its answer."""
        assert self.process.stdin is not None and self.process.stdout is not None
        answer = ""
        with contextlib.suppress(BrokenPipeError):
            print(line, file=self.process.stdin, flush=True)
            answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"{self.process.args}: ended at the command {line!r}; see its message above")
        return json.loads(answer)

    def close(self) -> None:
        """Ends the process."""
        with contextlib.suppress(BrokenPipeError):
            self.process.communicate()


def start(pair: Pair, args: argparse.Namespace, folder: Path) -> dict[str, Side]:
    """The two workers of a pair."""
    job = {"backbone": pair.backbone, "threads": args.threads, "batch": args.batch, "context": args.context}
    path = str(Path(getattr(args, pair.checkout)) / pair.file)
    theirs = {"side": "theirs", "file": path, "model": pair.model, "settings": pair.settings}
    ours = {"side": "ours", "think": pair.think, "renamed": pair.renamed}
    return {"theirs": Side(args.python, job | theirs, folder), "ours": Side(sys.executable, job | ours, folder)}


def agree(pair: Pair, sides: dict[str, Side], folder: Path) -> dict[str, Any]:
    """Copies the authors' weights to our model and compares the two; stops if they differ and the pair has no note."""
    weights = str(folder / "weights.safetensors")
    theirs, ours = sides["theirs"].ask(f"write {weights}"), sides["ours"].ask(f"compare {weights}")
    if not pair.note and not ours["gradient_difference"] <= TOLERANCE:
        raise SystemExit(f"the two sides do not compute the same thing: theirs {theirs}, ours {ours}")
    loss = {"theirs": theirs["loss"], "ours": ours.pop("loss")}
    return {"parameters": theirs["parameters"], "note": pair.note, "loss": loss, **ours}


def race(sides: dict[str, Side], rounds: int, tokens: int) -> dict[str, Any]:
    """FLOPs and speed; the sides alternate in each round, so that both see the same load of the machine."""
    flops = {name: side.ask("flops")["flops"] for name, side in sides.items()}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds):
        for name, side in sides.items():
            seconds[name].append(side.ask("go")["seconds"])
        last = ", ".join(f"{name} {values[-1]:.3f} s" for name, values in seconds.items())
        print(f"  round {number + 1} of {rounds}: {last}", flush=True)
    ratios = [a / b for a, b in zip(seconds["theirs"], seconds["ours"], strict=True)]
    return {
        "train_flops_per_token": {name: count / tokens for name, count in flops.items()},
        "tokens_per_second": {name: tokens / statistics.median(values) for name, values in seconds.items()},
        "ratio": statistics.median(ratios),
        "ratio_lowest": min(ratios),
        "ratio_highest": max(ratios),
        "ratio_by_arithmetic": flops["theirs"] / flops["ours"],
    }


def measure(pair: Pair, args: argparse.Namespace) -> dict[str, Any]:
    """The result row of a pair."""
    with tempfile.TemporaryDirectory() as name:
        sides = start(pair, args, Path(name))
        try:
            software = {name: side.ask("describe") for name, side in sides.items()}
            results = agree(pair, sides, Path(name)) | race(sides, args.rounds, args.batch * args.context)
        finally:
            for side in sides.values():
                side.close()
    return {
        "ours": pair.think,
        "theirs": f"{pair.checkout}: {pair.file}",
        "commit": commit(Path(getattr(args, pair.checkout))),
        "backbone": pair.backbone,
        "settings": pair.settings,
        "software": software,
        **results,
    }


def commit(checkout: Path) -> str | None:
    """The commit of the authors' code, if the folder is a clone."""
    done = subprocess.run(["git", "-C", str(checkout), "rev-parse", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip() or None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ponderlm2", help="checkout of LUMIA-Group/PonderLM-2 (default: not measured)")
    parser.add_argument("--ponderinglm", help="checkout of LUMIA-Group/PonderingLM (default: not measured)")
    parser.add_argument("--python", required=True, help="python of the environment for the authors' code")
    parser.add_argument("--out", type=Path, default=Path("results/authors.json"))
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument(
        "--threads", type=int, default=os.cpu_count(), help="threads of each side; the sides take turns"
    )
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--context", type=int, default=256)
    args = parser.parse_args()
    pairs = {name: pair for name, pair in PAIRS.items() if getattr(args, pair.checkout)}
    if not pairs:
        parser.error("nothing to measure: give --ponderlm2, --ponderinglm or both")
    rows = {}
    for name, pair in pairs.items():
        print(name, flush=True)
        rows[name] = measure(pair, args)
        row = rows[name]
        print(f"  {row['ratio']:.3f} times their tokens/s ({row['ratio_lowest']:.3f} to {row['ratio_highest']:.3f})")
    result = {
        "command": "python benchmarks/authors.py",
        "machine": platform.machine(),
        "threads": args.threads,
        "rounds": args.rounds,
        "batch": args.batch,
        "context": args.context,
        "rows": rows,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(args.out, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
