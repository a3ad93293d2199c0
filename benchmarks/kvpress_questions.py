"""What compressed caches still answer: methods of Pondera and of kvpress, on the same contexts and questions, in one table.

    python -m venv peers
    peers/bin/pip install torch==2.13.0 kvpress==0.5.5
    python benchmarks/kvpress_questions.py --python peers/bin/python --squad xquad.en.json

kvpress 0.5.5 needs transformers below 5.3, so it runs in an environment of its own; this file runs in both. Both sides get the
same token ids. A context is read and compressed in one call before any of its questions is known, and each question is asked on
a copy of the cache, at the positions that it would have after the whole context. Weights are float32 on both sides.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

PAIRS = {
    "KVzipPress({r})": "KVzip({s})",
    "KVzipPress({r}, layerwise=True)": "KVzip({s}, level='layer')",
    "ExpectedAttentionPress({r})": "ExpectedAttention({s})",
    "AdaKVPress(ExpectedAttentionPress({r}))": "AdaKV(ExpectedAttention({s}))",
    "CompactorPress({r})": "Compactor({s})",
    "CURPress({r})": "CurDKV({s})",
    "LagKVPress({r})": "LagKV({s})",
    "KeyDiffPress({r})": "KeyDiff({s})",
    "SnapKVPress({r})": "SnapKV({s})",
    "StreamingLLMPress({r})": "StreamingLLM({s})",
}
"""kvpress's expression with the share to evict, and Pondera's spec with the share to keep."""
SHARES, SMALLER = (0.25,), {"KVzipPress({r})": (0.25, 0.125)}
"""The shares that are kept; more for the best."""
OURS = ("KIVI(4)", "Coded(KVzip(0.5), KIVI(4, window=32))", "Coded(KVzip(0.25), KIVI(4, window=32))")
"""Methods that kvpress has no counterpart of."""
TOKENS = 1900


def pairs() -> dict[str, str]:
    """Pondera's spec for each expression of kvpress."""
    return {
        theirs.format(r=f"compression_ratio={1 - share:g}"): ours.format(s=f"{share:g}")
        for theirs, ours in PAIRS.items()
        for share in SMALLER.get(theirs, SHARES)
    }


def write_questions(folder: Path, loaded: Any, asked: dict[str, list[Any]]) -> None:
    """Saves the token ids of all contexts, questions and answers."""
    from pondera.evaluation.question_score import encode

    tree = {
        kind: [
            {
                "context": encode(loaded, one.context, True),
                "questions": [
                    [encode(loaded, question.text, False), encode(loaded, question.answer, False)]
                    for question in one.questions
                ],
            }
            for one in contexts
        ]
        for kind, contexts in asked.items()
    }
    (folder / "questions.json").write_text(json.dumps(tree))


@torch.no_grad()
def theirs(folder: Path, model_folder: str) -> dict[str, Any]:
    """The scores of all presses: by expression and kind of questions, for each context the nats and right answers."""
    import kvpress
    from transformers import AutoModelForCausalLM, DynamicCache

    model: Any = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    tree, found = json.loads((folder / "questions.json").read_text()), {}
    for expression in pairs():
        print(expression, file=sys.stderr, flush=True)
        for kind, contexts in tree.items():
            scores = []
            for context in contexts:
                press = eval(expression, vars(kvpress).copy())  # one of PAIRS above, nothing else
                cache = DynamicCache()
                with press(model):
                    model.model(input_ids=torch.tensor([context["context"]]), past_key_values=cache)
                scores.append([answered(model, cache, len(context["context"]), *pair) for pair in context["questions"]])
                for layer in model.model.layers:  # a press marks evicted keys here
                    layer.self_attn.masked_key_indices = None
            found.setdefault(expression, {})[kind] = scores
    return found


def answered(model: Any, cache: Any, start: int, asked: list[int], answer: list[int]) -> tuple[float, bool]:
    """The log-probability of an answer and whether each token is the likeliest, on a copy of a cache of kvpress."""
    ids = asked + answer[:-1]
    positions = torch.arange(start, start + len(ids))
    out = model(torch.tensor([ids]), past_key_values=copy.deepcopy(cache), position_ids=positions[None])
    logits_TV, answer_T = out.logits[0, -len(answer) :].float(), torch.tensor(answer)
    chosen_T = logits_TV.log_softmax(-1).gather(-1, answer_T[:, None])[:, 0]
    return float(chosen_T.sum()), bool((logits_TV.argmax(-1) == answer_T).all())


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Runs both sides and puts their rows into one table."""
    from pondera.evaluation.kv_bench import FULL, NONE, BenchSettings, bench, contexts, kept_share
    from pondera.evaluation.question_score import ContextScore
    from pondera.inference.default_model import model_folder
    from pondera.inference.load import load

    loaded = load(args.model, dtype="float32")
    kinds = {f"Squad({str(args.squad)!r}, each=2)": args.contexts, "Needles(needles=24)": args.contexts}
    specs = tuple(dict.fromkeys([*pairs().values(), *OURS]))
    rows: list[dict[str, Any]] = []
    store = Path("runs") / "kvpress-questions" / f"{args.out.stem}.json"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        settings = {kind: BenchSettings((kind,), specs, tokens=TOKENS, contexts=count) for kind, count in kinds.items()}
        asked = {kind: contexts(loaded, settings[kind], kind) for kind in kinds}
        write_questions(folder, loaded, asked)
        command = [args.python, str(Path(__file__).resolve()), "--theirs", name]
        command += ["--model", str(model_folder(args.model))]
        answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        peer = json.loads(answer.splitlines()[-1])
        for kind in kinds:
            own = bench(loaded, settings[kind], (), store, lambda line: print(line, file=sys.stderr, flush=True))
            shown = kind.replace(str(args.squad), args.squad.name)
            rows += [{"by": "pondera", **_without_times(row), "questions": shown} for row in own]
            stored = json.loads(store.read_text())["scores"][kind]
            ends = {end: [ContextScore(**one) for one in stored[end]] for end in (NONE, FULL)}
            for press, by_kind in peer["scores"].items():
                scores = [ContextScore(*zip(*one, strict=True)) for one in by_kind[kind]]
                kept, interval = kept_share(scores, ends[NONE], ends[FULL])
                right = [right for score in scores for right in score.right]
                rows.append(
                    {
                        "by": "kvpress",
                        "questions": shown,
                        "method": press,
                        "items": len(right),
                        "kept": kept,
                        "kept_interval": interval,
                        "right": sum(right) / len(right),
                    }
                )
    settings_of = {"model": loaded.name, "dtype": "float32", "tokens": TOKENS, "pairs": pairs(), "only_ours": OURS}
    return {"peer": peer["peer"], **settings_of, "rows": rows}


def _without_times(row: Any) -> dict[str, Any]:
    """A row of `bench`; its times depend on what else the machine does."""
    return {key: value for key, value in asdict(row).items() if key not in ("prefill_seconds", "step_seconds")}


def main() -> None:
    """Compares both sides, or runs as the kvpress side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=sys.executable, help="python of an environment with kvpress")
    parser.add_argument("--model", default="smollm2", help="as `pondera bench` takes it (default: %(default)s)")
    parser.add_argument("--squad", type=Path, help="a file in the form of SQuAD")
    parser.add_argument("--contexts", type=int, default=4, help="of each kind of questions (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("results/kvpress-questions.json"))
    parser.add_argument("--theirs", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.theirs:
        from importlib.metadata import version

        peer = " ".join(f"{name} {version(name)}" for name in ("kvpress", "transformers"))
        print(json.dumps({"peer": peer, "scores": theirs(args.theirs, args.model)}))
        return
    if args.squad is None:
        parser.error("give --squad FILE")
    words = "python benchmarks/kvpress_questions.py --python peers/bin/python"
    found = {"command": f"{words} --squad {args.squad.name}", **compare(args)}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(found, indent=1) + "\n")
    for row in found["rows"]:
        kept = "no worth" if row["kept"] is None else f"{100 * row['kept']:.0f} % kept"
        print(f"{row['questions']} {row['by']} {row['method']}: {kept}, {100 * row['right']:.0f} % right")


if __name__ == "__main__":
    main()
