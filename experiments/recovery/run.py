"""At which noise can tokens be read off their embeddings, and how much of the loss does context bring back?

    python -m experiments.recovery.run --text books.jsonl.xz      a quarter of an hour of one core
    python -m experiments.recovery.run --text books.jsonl.xz --model path/to/model --name mine
    python -m experiments.recovery.run --text books.jsonl.xz --smoke      a check that it runs

The probe `Recovery` on a pretrained model and the documents of a held-out text, with three seeds of the noise. The table
goes to ``results/recovery/``.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from experiments.common.publishing import write_json
from pondera.data.text import open_text
from pondera.inference.load import load
from pondera.methods.probe.recovery import READERS, Recovery

SEEDS = 3
WINDOWS = 64
PIECE = 400_000
"""Characters of each document."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", required=True, help="as data.text")
    parser.add_argument("--model", default="smollm2", help="as `pondera probe` takes it (default: %(default)s)")
    parser.add_argument("--name", help="name of the results (default: that of the model)")
    parser.add_argument("--smoke", action="store_true", help="two short windows; writes to runs/smoke only")
    args = parser.parse_args()
    root = Path("runs/smoke") if args.smoke else Path()
    loaded = load(args.model, device="cpu")
    text = "\n".join(document.text[:PIECE] for document in open_text(args.text).read())
    windows = 2 if args.smoke else WINDOWS
    found = []
    for seed in range(SEEDS):
        found.append(Recovery(windows=windows, seed=seed).run(loaded.model, loaded.tokenizer, text))
        print(Recovery().show(found[-1]).note, flush=True)
    name = args.name or Path(args.model).name
    words = f"python -m experiments.recovery.run --text {Path(args.text).name}"
    words += "" if args.model == "smollm2" else f" --model {Path(args.model).name} --name {name}"
    write_json(
        root / "results" / "recovery" / f"{name}.json", {"command": words, **summary(found), "model": args.model}
    )


def summary(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Means and standard deviations over the seeds."""
    levels = []
    for of_seeds in zip(*(one["levels"] for one in found), strict=True):
        level: dict[str, Any] = {"log_snr": of_seeds[0]["log_snr"]}
        for key in ("accuracy", "nats", "whole"):
            values = {name: [one[key][name] for one in of_seeds] for name in READERS}
            level[key] = {name: {"mean": fmean(each), "spread": stdev(each)} for name, each in values.items()}
        levels.append(level)
    same = {key: found[0][key] for key in ("tokens", "windows", "prior_tokens", "prior_nats", "model_nats")}
    return same | {"seeds": len(found), "noise_window": found[0]["noise_window"], "levels": levels}


if __name__ == "__main__":
    main()
