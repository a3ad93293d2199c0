"""What does a KV cache method cost a model that thinks? Quality against cache bytes, compared with a model without thoughts.

    python -m experiments.thinking_cache.run                about half an hour on two cores; call it again to resume
    python -m experiments.thinking_cache.run --smoke        a check that it runs

A plain model and PonderLM-2 (one latent thought per token, so two KV slots per token) are trained on the same tokens, with
three seeds each. Each cache is then measured on held-out text of the run: the prompt is prefilled in one call, and the rest is
fed in chunks through the cache. Results go to ``results/thinking-cache/stdlib-cpu.json``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from pondera.core.run_config import load as load_config
from pondera.core.run_folder import Run, write_atomic
from pondera.evaluation.kv_sweep import as_json, sweep
from pondera.evaluation.windows import calibration, held_out
from pondera.inference.load import load
from pondera.training.train import train

RECIPES = ("plain", "ponderlm2")
METHODS = ("SnapKV(0.5)", "SnapKV(0.25)", "StreamingLLM(0.5)", "StreamingLLM(0.25)", "VQKV(4.0)", "VQKV(2.75)")
RESULTS = Path("results/thinking-cache/stdlib-cpu.json")


def trained(recipe: str, seed: int, steps: int, out: Path) -> Path:
    """The finished run of a recipe and a seed; trains or resumes it if necessary."""
    folder = out / f"{recipe}-{steps}steps-seed{seed}"
    run = Run(folder)
    if not (run.model_dir / "config.json").is_file():
        config = load_config(recipe, {"train.steps": steps, "train.seed": seed, "train.eval_every": steps})
        train(config, folder, resume=folder.is_dir(), progress=False)
    return folder


def measure(folder: Path, windows: int, tokens: int) -> list[dict]:
    """One row per KV cache method on a trained model, the full cache first."""
    loaded = load(folder)
    texts = held_out(loaded, {}, windows)
    samples = calibration(loaded, None, tokens, texts.ids_NT.shape[1] - 1)
    rows, _ = sweep(loaded, METHODS, texts, samples, lambda line: print(folder.name, line, flush=True))
    return as_json(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a few steps; writes to runs/smoke only")
    parser.add_argument("--steps", type=int, default=200, help="training steps (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="seeds (default: %(default)s)")
    args = parser.parse_args()
    out = Path("runs/smoke/thinking-cache" if args.smoke else "runs/thinking-cache")
    results = out / "results.json" if args.smoke else RESULTS
    steps, seeds, windows, tokens = (4, 1, 1, 8192) if args.smoke else (args.steps, args.seeds, 8, 65536)
    results.parent.mkdir(parents=True, exist_ok=True)
    found = json.loads(results.read_text()) if results.is_file() else {}
    found |= {"command": "python -m experiments.thinking_cache.run", "steps": steps, "seeds": seeds, "windows": windows}
    runs = found.setdefault("runs", {})
    for seed in range(seeds):
        for recipe in RECIPES:
            folder = trained(recipe, seed, steps, out)
            if folder.name not in runs:
                runs[folder.name] = {"recipe": recipe, "seed": seed, "rows": measure(folder, windows, tokens)}
                write_atomic(results, json.dumps(found, indent=1) + "\n")
    print(f"done: {results}")


if __name__ == "__main__":
    main()
