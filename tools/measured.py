"""Reads single measurements from the files under results/: value, unit, seeds and command."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from pondera.evaluation.significance import gap
from tools.docs.names import with_current_names

ROOT = Path(__file__).parents[1]
ANSWERS = "results/questions/smollm2.json"
RECALL = "results/eviction/recall.json"
CODEBOOKS, QUANTIZERS = "results/collapse.json", "results/quantizers.json"
SPEED = "results/memory.json"
FORMS = {
    "bits per byte": "{:+.3f}",
    "accuracy": "{:+.3f}",
    "correlation": "{:.2f}",
    "nats": "{:+.3f}",
    "×": "{:.2f}",
    "%": "{:.0f}",
    "passes": "{:.2f}",
}
"""Number format by unit; other units use three digits."""


@dataclass(frozen=True)
class Measure:
    """One measured number.

    Args:
        what: the quantity, and what it is relative to.
        value: the mean over seeds; of several settings the lowest and the highest mean.
        unit: of the value.
        file: the results file that it was read from, relative to the root of the repository.
        command: the command that wrote this file.
        setting: the size of the experiment.
        seeds: the number of seeds, or `None` for a benchmark of time or memory.
        spread: the standard deviation over seeds.
        ci95: half the width of the paired 95 % confidence interval.
        significant: whether zero lies outside this interval.
    """

    what: str
    value: float | tuple[float, float]
    unit: str
    file: str
    command: str
    setting: str
    seeds: int | None = None
    spread: float | None = None
    ci95: float | None = None
    significant: bool | None = None

    def to_dict(self) -> dict[str, Any]:
        """The known fields, with four significant digits."""
        fields = {key: value for key, value in asdict(self).items() if value is not None}
        return {key: _rounded(value) for key, value in fields.items()}

    def number(self) -> str:
        """The value with its unit, and its confidence interval if known."""
        form = FORMS.get(self.unit, "{:.3g}").format
        ends = self.value if isinstance(self.value, tuple) else (self.value,)
        text = " to ".join(map(form, ends)) + (f" {self.unit}" if self.unit else "")
        if self.ci95 is not None:
            text += f" (95 % CI ± {self.ci95:.3f}, {'significant' if self.significant else 'not significant'})"
        return text


def _rounded(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_rounded(each) for each in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


@cache
def read(file: str) -> dict[str, Any]:
    """A results file, by its path from the root of the repository, with today's class names."""
    return with_current_names(json.loads((ROOT / file).read_text()))


def arm(file: str, name: str) -> dict[str, Any]:
    """One row of a comparison."""
    return next(row for row in read(file)["rows"] if row["name"] == name)


def difference(file: str, name: str, other: str, what: str) -> Measure:
    """Bits per byte of one model minus those of another, paired by seed."""
    return _paired(file, name, other, what, "bits_per_byte", "bits per byte")


def accuracy(file: str, name: str, other: str, what: str) -> Measure:
    """Accuracy of one model on a task minus that of another, paired by seed."""
    return _paired(file, name, other, what, "accuracy", "accuracy")


def _paired(file: str, name: str, other: str, what: str, key: str, unit: str) -> Measure:
    rows = [arm(file, each) for each in (name, other)]
    mine, theirs = (dict(zip(row["seeds"], row[key]["values"], strict=True)) for row in rows)
    found = gap(mine, theirs)
    about = {"ci95": found.margin, "significant": found.clear, **_comparison(file, rows[0])}
    return Measure(what, found.mean, unit, **about)


def follows(file: str, name: str, what: str) -> Measure:
    """Correlation of the passes of a token with its difficulty."""
    row = arm(file, name)
    found = row["passes_correlation"]
    value, spread = (0.0, None) if found["mean"] is None else (found["mean"], found["spread"])
    return Measure(what, value, "correlation", spread=spread, **_comparison(file, row))


def ratio(file: str, name: str, other: str, key: str, what: str) -> Measure:
    """A cost of one model relative to that of another."""
    row = arm(file, name)
    return Measure(what, row[key]["mean"] / arm(file, other)[key]["mean"], "×", **_comparison(file, row))


def passes(file: str, name: str, what: str) -> Measure:
    """Mean passes per token."""
    row = arm(file, name)
    found = row["passes_per_token"]
    return Measure(what, found["mean"], "passes", spread=found["spread"], **_comparison(file, row))


def _comparison(file: str, row: dict[str, Any]) -> dict[str, Any]:
    size = f"{row['parameters']['mean'] / 1e6:.1f} M parameters, {row['train_tokens']['mean'] / 1e6:.2f} M tokens"
    return _source(file) | {"setting": size, "seeds": len(row["seeds"])}


def _source(file: str) -> dict[str, Any]:
    return {"file": file, "command": read(file)["command"]}


def recall(policy: str, share: float = 0.25) -> list[Measure]:
    """Recall of an eviction policy on three tasks, and that of random eviction."""
    found = read(RECALL)
    setting = f"{found['model']['num_hidden_layers']} layers of width {found['model']['hidden_size']}, {found['prompt']} tokens"
    measures = []
    for name, label in ((policy, ""), ("RandomEviction", " of random eviction")):
        for task in ("needle", "list", "copy"):
            wanted = (name, share, task)
            values = [100 * r["recall"] for r in found["rows"] if (r["policy"], r["share"], r["task"]) == wanted]
            what = f"recall{label}, budget {share:g}, {task}"
            about = {"setting": setting, "seeds": len(values), "spread": stdev(values), **_source(RECALL)}
            measures.append(Measure(what, mean(values), "%", **about))
    return measures


def answers(*methods: str) -> list[Measure]:
    """What settings of a KV cache method keep of the worth of long contexts to a real model, at their bytes."""
    found = read(ANSWERS)
    measures = []
    for method in methods:
        rows = [row for row in found["rows"] if row["method"] == method]
        kept, size = (100 * mean(row[name] for row in rows) for name in ("kept", "of_full"))
        kinds = len({row["questions"] for row in rows})
        about = f"{found['model']}, {sum(row['items'] for row in rows)} questions of {kinds} kinds"
        what = f"kept of what a context is worth, {method}, {size:.1f} % of the bytes"
        measures.append(Measure(what, kept, "%", setting=about, **_source(ANSWERS)))
    return measures


def slow_signal(*arms: str) -> list[Measure]:
    """Error over variance on the slow-signal task."""
    file = "results/elastic/books-cpu/tasks.json"
    found = {row["arm"]: row["error"] for row in read(file)["table"] if row["task"] == "slow-signal"}
    setting = f"2 layers of width 64, {read(file)['rows'][0]['steps']} steps"
    about = {"setting": setting, "seeds": read(file)["seeds"], **_source(file)}
    return [
        Measure(
            f"slow signal, error over variance, {name}", found[name]["mean"], "", spread=found[name]["spread"], **about
        )
        for name in arms
    ]


def reconstruction(file: str, pairs: list[tuple[str, str]], what: str, kinds: tuple[str, ...] = ()) -> Measure:
    """Reconstruction error of settings relative to that of others: the lowest and highest ratio over kinds of data."""
    rows = read(file)["rows"]

    def error(setting: str, data: str) -> float:
        return mean(row["error_coded"] for row in rows if (row["setting"], row["data"]) == (setting, data))

    kinds = kinds or tuple(dict.fromkeys(row["data"] for row in rows))
    ratios = [error(one, data) / error(other, data) for one, other in pairs for data in kinds]
    setting = f"autoencoders, {rows[0]['steps']} steps"
    return Measure(what, (min(ratios), max(ratios)), "×", setting=setting, seeds=_seeds(rows), **_source(file))


def absolute(
    file: str, settings: list[str], what: str, key: str = "error_coded", kinds: tuple[str, ...] = ()
) -> Measure:
    """The lowest and highest mean of one number over settings and kinds of data."""
    rows = [
        row for row in read(file)["rows"] if row["setting"] in settings and row["data"] in (kinds or (row["data"],))
    ]
    groups: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        groups.setdefault((row["setting"], row["data"]), []).append(row[key])
    means = [mean(group) for group in groups.values()]
    about = {"setting": f"autoencoders, {rows[0]['steps']} steps", "seeds": _seeds(rows), **_source(file)}
    return Measure(what, (min(means), max(means)), "", **about)


def _seeds(rows: list[dict[str, Any]]) -> int:
    return len({row["seed"] for row in rows})


def codes(model: str, names: list[str], bits: float, what: str) -> Measure:
    """Loss minus the loss with the exact cache: the lowest and highest mean over codes of one rate."""
    file = f"results/vqkv/{model}.json"
    rows = [row for row in read(file)["rows"] if row["name"] in names and abs(row["bits"] - bits) < 0.01]
    means = [mean(row["more_than_exact"] for row in rows if row["name"] == name) for name in names]
    seeds = _seeds(rows) if rows[0]["seed"] is not None else None
    value = (min(means), max(means)) if len(means) > 1 else means[0]
    setting = f"{read(file)['model']['parameters'] / 1e6:.2f} M parameters"
    return Measure(what, value, "nats", setting=setting, seeds=seeds, **_source(file))


def decoding(cache_name: str, tokens: tuple[int, int]) -> Measure:
    """Decoding speed relative to transformers' DynamicCache at batch 1, at two context lengths."""
    speed = [read(SPEED)["rows"][f"decode {n} x 1"][cache_name]["times_as_fast_as_dynamic"] for n in tokens]
    of = f" of {cache_name}" if cache_name == "StaticCache" else ""
    what = f"decoding speed{of} in float32 against DynamicCache at {tokens[0] // 1024}k and {tokens[1] // 1024}k tokens"
    return Measure(what, (speed[0], speed[1]), "×", **_timed())


def capacity(cache_name: str, numbers: str = "bfloat16") -> Measure:
    """Tokens that fit into the memory of the benchmark, relative to DynamicCache, in bfloat16 or float32."""
    rows = next(rows for name, rows in read(SPEED)["rows"].items() if name.startswith("capacity"))
    times = rows[f"{cache_name} {numbers}"]["tokens"] / rows[f"DynamicCache {numbers}"]["tokens"]
    return Measure(f"tokens in the same memory against DynamicCache, {numbers}", times, "×", **_timed())


def first_token(cache_name: str) -> Measure:
    """Speed-up of the time to the first token, for a prompt of 4,096 tokens."""
    rows = read(SPEED)["rows"]["first 4096"]
    what = "speed of the first token of a 4k prompt against DynamicCache"
    return Measure(what, rows["DynamicCache"]["seconds"] / rows[cache_name]["seconds"], "×", **_timed())


def _timed() -> dict[str, Any]:
    found = read(SPEED)
    return {
        "setting": f"{found['rates']['parameters'] / 1e6:.0f} M parameters, {found['threads']} threads",
        **_source(SPEED),
    }
