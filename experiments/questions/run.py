"""What does a compressed KV cache still answer? A real model, and questions that no method has seen, at equal bytes.

    python -m experiments.questions.run --squad xquad.en.json      one to two hours of one core; resumable
    python -m experiments.questions.run --squad xquad.en.json --calibrate text.txt      codebooks, too
    python -m experiments.questions.run --squad xquad.en.json --model path/to/model --name mine
    python -m experiments.questions.run --smoke      a check that it runs

The model reads contexts of 1,900 tokens in one call, each method compresses its cache, and each question is asked on a copy of
it: paragraphs of encyclopedia articles with questions from a file in the form of SQuAD, facts at random places of a manual, and
invented words with labels. Each kind has more than 200 questions. Weights and cache are bfloat16, so the full cache has 16 bits
per number. Finished methods are kept in ``runs/questions/``; the table and the scores of all contexts go to
``results/questions/``, and another machine continues from these scores.
"""

from __future__ import annotations

import argparse
import json
import shlex
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from experiments.common.publishing import write_json
from pondera.evaluation.kv_bench import BenchRow, BenchSettings, bench
from pondera.evaluation.windows import calibration
from pondera.inference.load import load

METHODS = (
    *("KVzip(0.25)", "KVzip(0.125)", "KIVI(4)", "KIVI(2)", "KIVI(2, sinks=0)", "TurboQuant(4)"),
    *("Coded(KVzip(0.5), KIVI(4, window=32))", "Coded(KVzip(0.25), KIVI(4, window=32))"),
    "Coded(KVzip(0.25), KIVI(2, window=32))",
    *(f"{name}(0.25)" for name in ("ExpectedAttention", "Compactor", "SnapKV", "RandomEviction")),
)

FITTED = ("FisherVQ(2.5625)", "FisherVQ(1.5)", "VQKV(2.75)")
"""Methods that are fitted to a text first."""
CALIBRATION = 65536
"""Tokens of that text that are read."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="as `pondera bench` takes it (default: %(default)s)")
    parser.add_argument("--name", help="name of the results (default: that of the model)")
    parser.add_argument("--squad", type=Path, help="a file in the form of SQuAD")
    parser.add_argument("--calibrate", type=Path, metavar="TEXT", help="measure codebooks as well, fitted to this text")
    parser.add_argument(
        "--smoke", action="store_true", help="two methods and short contexts; writes to runs/smoke only"
    )
    args = parser.parse_args()
    if not args.smoke and args.squad is None:
        parser.error("give --squad FILE")
    run(args)


def run(args: argparse.Namespace) -> None:
    """Measures all kinds of questions and publishes the table after each."""
    name = args.name or Path(args.model).name
    root = Path("runs/smoke") if args.smoke else Path()
    loaded = load(args.model, dtype="bfloat16")
    samples = [] if args.calibrate is None else calibration(loaded, str(args.calibrate), CALIBRATION, 1024)
    rows: list[BenchRow] = []
    for label, (settings, kind) in kinds(args).items():
        store = root / "runs" / "questions" / name / f"{label}.json"
        scores, public = root / "results" / "questions" / name / f"{label}.json", shown(kind, args.squad)
        if scores.is_file() and not store.is_file():
            rename(scores, store, public, kind)
        found = bench(
            loaded, replace(settings, questions=(kind,)), samples, store, lambda line: print(line, flush=True)
        )
        rename(store, scores, kind, public)
        rows += [replace(row, questions=public) for row in found]
        publish(root / "results" / "questions" / f"{name}.json", args, loaded.name, settings, rows)
    print("done")


def kinds(args: argparse.Namespace) -> dict[str, tuple[BenchSettings, str]]:
    """The settings of each kind of questions, by the name of its file."""
    if args.smoke:
        return {
            "stdlib": (BenchSettings(methods=("StreamingLLM(0.25)",), tokens=200, contexts=2), "Needles(needles=2)")
        }
    methods = METHODS if args.calibrate is None else (*METHODS, *FITTED)
    settings = BenchSettings(methods=methods, tokens=1900, contexts=9)
    return {
        "squad": (replace(settings, contexts=7), f"Squad({str(args.squad)!r}, each=3)"),
        "needles": (settings, "Needles(needles=24)"),
        "few-shot": (settings, "FewShot(asked=24)"),
    }


def rename(source: Path, target: Path, old: str, new: str) -> None:
    """Copies scores under another name of their questions: the path of a file is that of one machine."""
    tree = json.loads(source.read_text())
    tree["settings"]["questions"] = [new]
    tree["scores"] = {new: tree["scores"][old]}
    write_json(target, tree)


def shown(questions: str, file: Path | None) -> str:
    """The spec string with the name of the file instead of its path."""
    return questions if file is None else questions.replace(str(file), file.name)


def publish(path: Path, args: argparse.Namespace, model: str, settings: BenchSettings, rows: list[BenchRow]) -> None:
    """Writes the table, without times: they depend on what else the machine does."""
    words = ["python", "-m", "experiments.questions.run", *(["--smoke"] if args.smoke else [])]
    for option in ("squad", "calibrate"):
        if (file := getattr(args, option)) is not None:
            words += [f"--{option}", file.name]
    kept = [
        {key: value for key, value in asdict(row).items() if key not in ("prefill_seconds", "step_seconds")}
        for row in rows
    ]
    found: dict[str, Any] = {
        "command": shlex.join(words),
        "model": model,
        "dtype": "bfloat16",
        "tokens": settings.tokens,
    }
    write_json(path, found | {"rows": kept})


if __name__ == "__main__":
    main()
