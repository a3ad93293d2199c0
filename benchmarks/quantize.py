"""Quantizer speed compared with vector-quantize-pytorch, a plain loop and the machine's matmul rate, in one run.

    python -m venv peers
    peers/bin/pip install torch==2.13.0 vector-quantize-pytorch==1.32.0
    python benchmarks/quantize.py --python peers/bin/python --out results/quantize.json

Tasks: ``assign``, codes for all vectors (the other package also looks up the rows); ``train``, a training step (forward,
backward, moving averages, respawn); ``residual``, encoding with eight levels; ``kmeans`` (ours also does a k-means++ style
initialisation). Tasks and sizes can be measured in several calls, which add their rows to the same file.

FLOPs are those of the scores alone: 2 N K d per level or iteration. ``matmul`` is torch.mm of two large square matrices and
gives the maximum rate of the machine. ``loop`` is the obvious code: addmm and argmin, in chunks. Each package runs in a
process of its own, and the two take turns. Seconds are the minimum over all rounds, because other load only adds time. They
are compared per vector: ours gets `--vectors`, the others get fewer if they are slow or need too much memory. Memory is the
rise of the resident set of a process (Linux).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from process import Process, resident
from torch import Tensor

LEVELS, ITERATIONS, BATCH = 8, 5, 65536
"""Levels of the residual quantizer, iterations of k-means, vectors of k-means."""
PEER_SCORES = 2**26
"""Scores that the other package computes in one call: it keeps several matrices of them, one in int64."""
SECONDS, MOST = 0.5, 9
"""A round repeats a task for this many seconds, at most this many times."""
SQUARE = 1024
TASKS = ("assign", "train", "residual", "kmeans")
SIDES = {"matmul": "ours", "loop": "ours", "ours": "ours", "theirs": "theirs"}
"""The sides of the comparison, and the process of each."""
Work = Callable[[], Tensor | None]


# the tasks of each side


def matmul(task: str, x_ND: Tensor, table_KD: Tensor) -> Work:
    """A matrix product at the maximum rate of the machine."""
    a, out = torch.randn(SQUARE, SQUARE), torch.empty(SQUARE, SQUARE)
    return lambda: torch.mm(a, a, out=out)


def loop(task: str, x_ND: Tensor, table_KD: Tensor) -> Work | None:
    """A plain chunked loop."""

    def work() -> Tensor:
        squares_K = table_KD.square().sum(1)
        codes = [torch.addmm(squares_K, x_nD, table_KD.T, alpha=-2).argmin(1) for x_nD in x_ND.split(8192)]
        return torch.cat(codes)

    return work if task == "assign" else None


def ours(task: str, x_ND: Tensor, table_KD: Tensor) -> Work:
    from pondera.methods.quantize.common.kmeans import kmeans
    from pondera.methods.quantize.common.nearest import nearest
    from pondera.methods.quantize.residual import Residual
    from pondera.methods.quantize.vq import VQ

    codes, dim = table_KD.shape

    def assign() -> Tensor:
        return nearest(x_ND, table_KD)

    def clusters() -> None:
        kmeans(x_ND, codes, torch.Generator().manual_seed(0), iterations=ITERATIONS)

    if task == "residual":
        residual = Residual(VQ(codes), levels=LEVELS).build(dim).eval()
        return lambda: residual.encode(x_ND)
    if task == "train":
        vq = VQ(codes, init=table_KD, update="ema", respawn=0.01).build(dim)
        x_ND.requires_grad_()
        step, gradient_ND = iter(range(10**9)), torch.ones(x_ND.shape)

        def train() -> None:
            vq.begin_step(next(step), 0)
            found = vq(x_ND)
            torch.autograd.grad([found.out, found.loss], x_ND, [gradient_ND, None])

        return train
    return {"assign": assign, "kmeans": clusters}[task]


def theirs(task: str, x_ND: Tensor, table_KD: Tensor) -> Work | None:
    from vector_quantize_pytorch import ResidualVQ, VectorQuantize  # pyright: ignore[reportMissingImports]
    from vector_quantize_pytorch.vector_quantize_pytorch import kmeans  # pyright: ignore[reportMissingImports]

    codes, dim = table_KD.shape
    if task == "kmeans":
        return lambda: kmeans(x_ND[None], codes, ITERATIONS)[0]
    if task == "residual":
        model = ResidualVQ(dim=dim, codebook_size=codes, num_quantizers=LEVELS).eval()
    else:
        model = VectorQuantize(
            dim=dim,
            codebook_size=codes,
            decay=0.99,
            commitment_weight=0.25,
            threshold_ema_dead_code=0.01,
            rotation_trick=False,
        )
        model._codebook.embed.data.copy_(table_KD)

    @torch.no_grad()
    def encode() -> Tensor:
        return torch.cat([model(x_nD[None])[1][0] for x_nD in x_ND.split(PEER_SCORES // codes)])

    if task == "train":
        x_ND.requires_grad_()
        gradient_1ND = torch.ones(1, *x_ND.shape)

        def train() -> None:
            out, _, loss = model(x_ND[None])
            torch.autograd.grad([out, loss.sum()], x_ND, [gradient_1ND, None])

        return train
    model.eval()
    return encode


MAKERS = {"matmul": matmul, "loop": loop, "ours": ours, "theirs": theirs}


# one process


class Worker:
    """Prepares tasks and runs them on request."""

    def __init__(self, threads: int) -> None:
        torch.set_num_threads(threads)
        self.work: dict[str, Work] = {}

    def prepare(self, by: str, task: str, vectors: int, dim: int, codes: int) -> dict[str, Any]:
        """Prepares a task and runs it once; returns its memory and its first codes."""
        self.work.pop(by, None)
        x_ND = torch.randn(vectors, dim, generator=torch.Generator().manual_seed(0))
        table_KD = torch.randn(codes, dim, generator=torch.Generator().manual_seed(1))
        torch.manual_seed(0)
        work = MAKERS[by](task, x_ND, table_KD)
        if work is None:
            return {"able": False}
        self.work[by] = work
        before = resident("VmRSS")
        if before is not None:
            Path("/proc/self/clear_refs").write_text("5")
        found = work()
        peak = resident("VmHWM")
        rise = None if before is None or peak is None else max(0, peak - before)
        return {
            "able": True,
            "memory": rise,
            "codes": found[:4096].tolist() if task == "assign" and by != "matmul" else [],
        }

    def go(self, by: str) -> dict[str, float]:
        """Seconds of one run of a task; the minimum of several runs for a short task."""
        spent: list[float] = []
        while sum(spent) < SECONDS and len(spent) < MOST:
            start = time.perf_counter()
            self.work[by]()
            spent.append(time.perf_counter() - start)
        return {"seconds": min(spent)}

    def serve(self) -> None:
        """Answers each line of JSON with one line of JSON."""
        answers, sys.stdout = sys.stdout, sys.stderr  # keeps prints of libraries out of the answers
        for line in sys.stdin:
            request = json.loads(line)
            print(json.dumps(getattr(self, request.pop("do"))(**request)), file=answers, flush=True)


# the comparison


def measure(task: str, dim: int, codes: int, sides: dict[str, Process], args: argparse.Namespace) -> dict[str, Any]:
    """The result row of a task."""
    repeats = {"residual": LEVELS, "kmeans": ITERATIONS}.get(task, 1)
    most = {"kmeans": BATCH, "residual": min(args.vectors, 2**30 // codes)}.get(task, args.vectors)
    fewer = min(most, args.peer_vectors // repeats)
    # A training step of the other package needs the scores of all vectors at once.
    rarest = most if task == "kmeans" else min(fewer, 2 * PEER_SCORES // repeats // codes)
    flops = 2 * codes * dim * repeats
    vectors = {"ours": most, "matmul": 2 * SQUARE**3 // flops, "loop": fewer, "theirs": rarest}
    asked = {
        by: sides[side].ask(do="prepare", by=by, task=task, vectors=vectors[by], dim=dim, codes=codes)
        for by, side in SIDES.items()
        if side in sides
    }
    able = [by for by in asked if asked[by]["able"]]
    each: dict[str, list[float]] = {by: [] for by in able}
    for round_number in range(args.rounds):
        for by in able if round_number % 2 else reversed(able):
            each[by].append(sides[SIDES[by]].ask(do="go", by=by)["seconds"] / vectors[by])
    least = {by: min(each[by]) for by in able}
    ratio = {by: least[by] / least["ours"] for by in able}
    row: dict[str, Any] = {
        "task": task,
        "dim": dim,
        "codes": codes,
        "vectors": {by: vectors[by] for by in able},
        "flops_per_vector": flops,
        "nanoseconds_per_vector": {by: 1e9 * least[by] for by in able},
        "gflops_per_second": {by: flops / least[by] / 1e9 for by in able},
        "share_of_matmul_rate": ratio["matmul"],
        "times_as_fast_as": {by: ratio[by] for by in able if by in ("loop", "theirs")},
        "memory_bytes": {by: asked[by]["memory"] for by in able},
    }
    if task == "assign":
        own = asked["ours"]["codes"]
        for by in set(able) & {"loop", "theirs"}:
            pairs = list(zip(own, asked[by]["codes"], strict=False))
            row.setdefault("same_codes", {})[by] = sum(a == b for a, b in pairs) / len(pairs)
    return row


def name_of(row: dict[str, Any]) -> tuple[int, int, int]:
    """The key of a row, which also gives the order of the rows."""
    return TASKS.index(row["task"]), row["dim"], row["codes"]


def show(row: dict[str, Any]) -> None:
    times = ", ".join(f"{ratio:.1f} x {by}" for by, ratio in row["times_as_fast_as"].items())
    memory = row["memory_bytes"]["ours"]
    print(
        f"{row['task']:9} d {row['dim']:4} K {row['codes']:5}  {row['nanoseconds_per_vector']['ours']:9.0f} ns/vector  "
        f"{100 * row['share_of_matmul_rate']:3.0f} % of {row['gflops_per_second']['matmul']:.0f} GFLOP/s  {times or '-'}  "
        f"{'?' if memory is None else round(memory / 2**20)} MiB",
        flush=True,
    )


def keep(row: dict[str, Any], args: argparse.Namespace) -> None:
    """Adds a row to the results file."""
    from pondera.core.run_folder import write_atomic

    result: dict[str, Any] = {
        "command": "python benchmarks/quantize.py",
        "machine": platform.machine(),
        "torch": torch.__version__,
        "threads": args.threads,
        "rounds": args.rounds,
    }
    known = json.loads(args.out.read_text()) if args.out.exists() else result | {"rows": []}
    if {key: known[key] for key in result} != result:
        raise SystemExit(f"{args.out} was measured with other settings than {result}; give another --out")
    others = [other for other in known["rows"] if name_of(other) != name_of(row)]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(args.out, json.dumps(result | {"rows": sorted([*others, row], key=name_of)}, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--python", help="python of an environment with vector-quantize-pytorch (default: not measured)"
    )
    parser.add_argument("--out", type=Path, default=Path("results/quantize.json"))
    parser.add_argument("--vectors", type=int, default=1_000_000)
    parser.add_argument("--peer-vectors", type=int, default=131_072)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--dims", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--codes", type=int, nargs="+", default=[256, 1024, 8192])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--threads", type=int, default=os.cpu_count(), help="threads of each side; the sides take turns"
    )
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        Worker(args.threads).serve()
        return

    pythons = {"ours": sys.executable} | ({"theirs": args.python} if args.python else {})
    for task in [(task, dim, codes) for task in args.tasks for dim in args.dims for codes in args.codes]:
        sides = {
            name: Process(__file__, python, args.threads) for name, python in pythons.items()
        }  # new processes, so that memory is measured from the start
        try:
            row = measure(*task, sides, args)
        finally:
            for side in sides.values():
                side.close()
        show(row)
        keep(row, args)


if __name__ == "__main__":
    main()
