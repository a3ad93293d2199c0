"""How many Jacobi rounds does evaluation need? Loss of one trained PonderLM-2 by rounds R, and the exact rollout.

    python -m experiments.thinking.rounds RUN --out results/thinking/rounds.json      --tokens 512: a quick check

For R = 0..6 it writes the validation loss, bits per byte and the largest change of any thought in the last round. It also
writes the loss of the exact sequential rollout. All use the same windows.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from pondera.core.run_folder import Run, write_atomic
from pondera.data.corpus import prepare
from pondera.evaluation.score import score
from pondera.inference.load import load


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--out", type=Path, default=Path("results/thinking/rounds.json"))
    args = parser.parse_args()
    config, model = Run.open(args.run).config, load(str(args.run)).model
    split, context = prepare(config.data).validation, config.data.context
    think = model.think
    assert think is not None, f"{args.run} has no think method"
    rows = []
    for rounds in [0, 1, 2, 3, 4, 5, 6, "exact"]:
        think.eval_rounds = rounds
        row = {"rounds": rounds, **score(model, split, context, args.tokens, batch_size=16)}
        if isinstance(rounds, int) and rounds:
            think.record = True
            window = split.windows(context)[0]
            with torch.no_grad():
                row["residuals"] = model(window["input_ids"][None].to(model.device)).trace["residuals"]
            think.record = False
        rows.append(row)
        print(rounds, f"{row['bits_per_byte']:.4f} bits per byte", flush=True)
    result = {"command": f"python -m experiments.thinking.rounds {args.run} --tokens {args.tokens}", "rows": rows}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(args.out, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
