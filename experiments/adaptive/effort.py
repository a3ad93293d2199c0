r"""What does less effort cost? Score and mean passes of trained models against the requested effort.

    python -m experiments.adaptive.effort runs/adaptive/books-cpu --arms ponderlm ponderlm3 \
        --out results/adaptive/books-cpu/effort.json      add --tokens 512 for a quick check

Scores every run (all seeds) of the given variants in that folder, on the held-out text of the comparison.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from experiments.common.publishing import write_json
from pondera.comparison.rows import spread
from pondera.core.run_folder import Run
from pondera.data.corpus import prepare
from pondera.evaluation.score import score
from pondera.inference.load import load

EFFORTS = [0.0, 0.25, 0.5, 0.75, 1.0]


def curve(path: Path, tokens: int) -> list[dict[str, float]]:
    """Bits per byte and mean passes of one run at each effort."""
    config, model = Run.open(path).config, load(str(path)).model
    held_out, context = prepare(config.data).validation, config.data.context
    rows = []
    for effort in EFFORTS:
        scores = score(model, held_out, context, tokens, batch_size=8, budget={"effort": effort})
        rows.append({"effort": effort, **{key: scores[key] for key in ("bits_per_byte", "passes_per_token")}})
        print(f"{path.name}: effort {effort}: {rows[-1]['bits_per_byte']:.4f} bits per byte", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of a comparison, which contains runs/")
    parser.add_argument("--arms", nargs="+", required=True)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    rows, runs = [], sorted((args.folder / "runs").iterdir())
    for arm in args.arms:
        named = re.compile(rf"{re.escape(arm)}-\d+steps-seed\d+")
        seeds = [curve(path, args.tokens) for path in runs if named.fullmatch(path.name)]
        for at in zip(*seeds, strict=True):
            measured = {key: spread([one[key] for one in at]) for key in ("passes_per_token", "bits_per_byte")}
            rows.append({"arm": arm, "effort": at[0]["effort"], **measured})
    command = f"python -m experiments.adaptive.effort {args.folder} --arms {' '.join(args.arms)} --tokens {args.tokens}"
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.out, {"command": command, "rows": rows})


if __name__ == "__main__":
    main()
