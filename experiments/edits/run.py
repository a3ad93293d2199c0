"""What does a cache cost that follows the edits of its text? PIE on code, against encoding the edited text again.

    python -m experiments.edits.run      about 5 minutes of one core
    python -m experiments.edits.run --model path/to/model --name mine
    python -m experiments.edits.run --smoke      a check that it runs

Files of the standard library are the edited texts. The text before the edit is made from them: without eight lines (insert),
with eight lines of another file (delete), or with a name replaced everywhere (rename). The model reads the old text, the cache
follows the edit, and the loss of the code after the text is compared with that after a fresh reading. Two controls: the old
text (stale), and keys that keep their old positions (unrotated). Weights and cache are float32, which is faster on CPUs.
"""

from __future__ import annotations

import argparse
import copy
import keyword
import random
import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from torch.nn import functional as F

from experiments.common.publishing import write_json
from pondera.core.hf import DynamicCache
from pondera.data.questions.base import AskedContext
from pondera.data.questions.continuation import Continuation
from pondera.evaluation.student_t import half_width
from pondera.inference.load import Loaded, load
from pondera.inference.pie import PIE

LINES = 8
"""Lines that an edit inserts or deletes."""
REFRESHED = (0, 16, 64)
SEED = 0


class Unrotated(PIE):
    """A control: keys after an edit keep their old positions."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self._frequency_P = torch.zeros_like(self._frequency_P)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="as `pondera eval` takes it (default: %(default)s)")
    parser.add_argument("--name", help="name of the results (default: that of the model)")
    parser.add_argument("--smoke", action="store_true", help="two short texts; writes to runs/smoke only")
    args = parser.parse_args()
    tokens, count = (150, 2) if args.smoke else (800, 16)
    loaded = load(args.model, dtype="float32")
    drawn = Continuation(characters=400).draw(lambda text: len(ids(loaded, text)), tokens, 2 * count, SEED)
    texts = [text for text in drawn if frequent_name(text)][:count]
    count = len(texts)
    edits = {kind: [before(texts, at) for at in range(count)] for kind, before in BEFORE.items()}
    rows = [row for kind, old in edits.items() for row in measure(loaded, kind, old, texts)]
    command = shlex.join(["python", "-m", "experiments.edits.run", *(["--smoke"] if args.smoke else [])])
    found = {"command": command, "model": loaded.name, "dtype": "float32", "tokens": tokens, "texts": count}
    root = Path("runs/smoke") if args.smoke else Path()
    write_json(root / "results" / "edits" / f"{args.name or Path(args.model).name}.json", found | {"rows": rows})


def without_lines(texts: list[AskedContext], at: int) -> str:
    """Lacks some lines, which the edit inserts."""
    lines, begin = _place(texts, at)
    return "".join(lines[:begin] + lines[begin + LINES :])


def with_lines(texts: list[AskedContext], at: int) -> str:
    """Has some lines of another text, which the edit deletes."""
    lines, begin = _place(texts, at)
    others, start = _place(texts, (at + 1) % len(texts))
    return "".join(lines[:begin] + others[start : start + LINES] + lines[begin:])


def renamed(texts: list[AskedContext], at: int) -> str:
    """Has another word for the most frequent name."""
    return re.sub(rf"\b{frequent_name(texts[at])}\b", "placeholder", texts[at].context)


def frequent_name(text: AskedContext) -> str:
    """The most frequent name of a text that the code after it uses, too; empty: there is none."""
    after = text.questions[0].text + text.questions[0].answer
    names = Counter(re.findall(r"\b[a-z_]{5,}\b", text.context))
    shared = [name for name in names if re.search(rf"\b{name}\b", after) and not keyword.iskeyword(name)]
    return max(shared, key=names.__getitem__, default="")


BEFORE: dict[str, Callable[[list[AskedContext], int], str]] = {
    "insert": without_lines,
    "delete": with_lines,
    "rename": renamed,
}


def _place(texts: list[AskedContext], at: int) -> tuple[list[str], int]:
    """The lines of a text, and where it is edited: in its second quarter."""
    lines = texts[at].context.splitlines(keepends=True)
    return lines, random.Random(f"{SEED} {at}").randint(len(lines) // 4, len(lines) // 2)


def measure(loaded: Loaded, kind: str, old: list[str], texts: list[AskedContext]) -> Iterator[dict[str, Any]]:
    """A row for each way to get the cache of the new text."""
    model = loaded.model
    ways: dict[str, PIE | None] = {"stale": None, "unrotated": Unrotated(model)}
    ways |= {f"PIE, refresh={refresh}": PIE(model, refresh) for refresh in REFRESHED}
    fresh = [loss(loaded, text, read(loaded, text.context), None)[0] for text in texts]
    caches = [read(loaded, before) for before in old]
    for name, pie in ways.items():
        scored = [loss(loaded, *given, pie) for given in zip(texts, caches, strict=True)]
        worse = [score - best for (score, _), best in zip(scored, fresh, strict=True)]
        mean = fmean(worse)
        half = half_width(0.95, len(worse) - 1) * stdev(worse) / len(worse) ** 0.5
        share = fmean(share for _, share in scored)
        yield {
            "edit": kind,
            "cache": name,
            "nats": fmean(fresh),
            "worse": mean,
            "half_width": half,
            "recomputed": share,
        }
        print(kind, name, f"{mean:+.4f} ± {half:.4f} nats per token, {share:.1%} recomputed", flush=True)


@torch.inference_mode()
def read(loaded: Loaded, text: str) -> tuple[list[int], DynamicCache]:
    """The token ids of a text, and the cache of all of them."""
    model: Any = loaded.model
    found, cache = ids(loaded, text), DynamicCache(config=model.backbone.config)
    model(torch.tensor([found]), past_key_values=cache, logits_to_keep=1)
    return found, cache


@torch.inference_mode()
def loss(
    loaded: Loaded, text: AskedContext, before: tuple[list[int], DynamicCache], pie: PIE | None
) -> tuple[float, float]:
    """Nats per token of the code after a text, and the share of the text that was recomputed for its edit.

    Args:
        loaded: the model.
        text: the edited text, and the code after it.
        before: the token ids and the cache of the text before the edit.
        pie: edits a copy of the cache; `None`: it stays that of the text before the edit.
    """
    model: Any = loaded.model
    old, cache = before[0], copy.deepcopy(before[1])
    if pie is None:
        cache.crop(-1)
        last, share = old[-1:], 0.0
    else:
        new = ids(loaded, text.context)
        last, share = new[-1:], pie.edit(cache, old, new).recomputed / len(new)
    after = ids(loaded, text.questions[0].text + text.questions[0].answer)
    logits_TV = model(torch.tensor([last + after]), past_key_values=cache).logits[0, :-1]
    return float(F.cross_entropy(logits_TV.float(), torch.tensor(after))), share


def ids(loaded: Loaded, text: str) -> list[int]:
    """The token ids of a text."""
    return loaded.tokenizer(text, add_special_tokens=False).input_ids  # type: ignore[return-value]


if __name__ == "__main__":
    main()
