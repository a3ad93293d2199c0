"""The demo: three small models on the user's own Python library, what thinking bought, and a text to look at."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pondera.comparison.compare import compare
from pondera.inference.generate import Generated, generate

RECIPES = ["plain", "doubledepth", "adaptivelatentcot"]
SETTINGS = {"train.steps": 80, "train.eval_every": 40, "train.eval_tokens": 32768, "train.save_every": 40}
SEEDS = 3
PROMPT = "def "


@dataclass
class Demo:
    """What the demo found.

    Args:
        comparison: what `pondera.comparison.compare.compare` returned.
        sample: text that the thinking model wrote.
        report: the page.
        thinker: run folder of the thinking model.
    """

    comparison: dict[str, Any]
    sample: Generated
    report: Path
    thinker: Path


def demo(out: Path, progress: bool = True) -> Demo:
    """Trains a plain, a twice as deep and a thinking model, compares them and lets the thinking one write.

    Two passes per token through 3 layers cost as many inference FLOPs as one pass through 6, so the twice as deep model
    is the fair opponent. Three seeds each are the fewest that can tell a difference of this size from luck.

    Args:
        out: where everything goes; runs that are there already are reused.
        progress: show bars.
    """
    found = compare(RECIPES, seeds=SEEDS, out=out, overrides=SETTINGS, progress=progress)
    thinker = out / found["rows"][-1]["runs"][0]
    sample = generate(
        str(thinker), PROMPT, max_new_tokens=80, temperature=0.7, top_p=0.95, seed=0, on_text=lambda text: None
    )
    return Demo(found, sample, out / "report.html", thinker)
