"""What does thinking less cost? Score and mean passes of trained models against the effort that they are asked for.

    python experiments/effort.py runs/adaptive/books-cpu --arms ponderlm ponderlm3 --out results/adaptive/books-cpu/effort.json

Every run of an arm in that folder, all its seeds, on the held-out text that its table was scored on. With ``--chance`` the
same trained weights are scored once more where tokens differ in depth, with as many passes given to tokens at random; this
adds to a file that is there.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

from adaptive import control
from publishing import write_json

from pondera import AdaptiveConfig, AdaptiveLM
from pondera.ground.data import prepare
from pondera.ground.run import Run
from pondera.jobs.compare import spread
from pondera.jobs.load import load
from pondera.jobs.score import score

EFFORTS = [0.0, 0.25, 0.5, 0.75, 1.0]


def curve(path: Path, tokens: int) -> list[dict[str, float]]:
    """Of one run: bits per byte and mean passes at each effort."""
    config, model = Run.open(path).config, load(str(path)).model
    held_out, context = prepare(config.data).validation, config.data.context
    rows = []
    for effort in EFFORTS:
        found = score(model, held_out, context, tokens, batch_size=8, budget={"effort": effort})
        rows.append({"effort": effort, **{key: found[key] for key in ("bits_per_byte", "passes_per_token")}})
        print(f"{path.name}: effort {effort}: {rows[-1]['bits_per_byte']:.4f} bits per byte", flush=True)
    return rows


def by_chance(path: Path, passes: float, tokens: int) -> float:
    """Bits per byte of one run's weights when tokens go on at random, so many on average."""
    run = Run.open(path)
    think = control(str(run.config.think), passes)
    model = AdaptiveLM(AdaptiveConfig(backbone=str(run.model_dir), think=think)).float()
    held_out, context = prepare(run.config.data).validation, run.config.data.context
    found = score(model, held_out, context, tokens, batch_size=8)
    print(f"{path.name}: {think}: {found['bits_per_byte']:.4f} at {found['passes_per_token']:.2f}", flush=True)
    return float(found["bits_per_byte"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of a comparison: it holds runs/")
    parser.add_argument("--arms", nargs="+", required=True)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--chance", action="store_true", help="add what as many passes at random would score")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    known = json.loads(args.out.read_text()) if args.out.is_file() else {"commands": [], "rows": []}
    runs = {
        arm: [
            path
            for path in sorted((args.folder / "runs").iterdir())
            if re.fullmatch(rf"{re.escape(arm)}-\d+steps-seed\d+", path.name)
        ]
        for arm in args.arms
    }
    if args.chance:
        for row in known["rows"]:
            means = row["passes_per_token"]["values"]
            if row["arm"] in runs and 0 < row["effort"] and 1 < row["passes_per_token"]["mean"] < 1.995:
                pairs = zip(runs[row["arm"]], means, strict=True)
                row["by_chance"] = spread([by_chance(path, mean, args.tokens) for path, mean in pairs])
    else:
        known["rows"] = [row for row in known["rows"] if row["arm"] not in runs]
        for arm, paths in runs.items():
            for at in zip(*(curve(path, args.tokens) for path in paths), strict=True):
                measured = {key: spread([one[key] for one in at]) for key in ("passes_per_token", "bits_per_byte")}
                known["rows"].append({"arm": arm, "effort": at[0]["effort"], **measured})
    words = ["python experiments/effort.py", str(args.folder), "--arms", *args.arms, "--tokens", str(args.tokens)]
    known["commands"].append(" ".join([*words, *["--chance"] * args.chance]))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.out, known)


if __name__ == "__main__":
    main()
