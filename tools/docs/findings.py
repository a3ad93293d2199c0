"""What we found, in a few sentences with numbers from the results files."""

from __future__ import annotations

from statistics import mean, stdev
from typing import Any

from pondera.evaluation.significance import gap
from tools.docs.tables import generated, read
from tools.measured import RECALL, Measure, arm, codes, difference, ratio

FLOPS = "results/thinking/books-cpu/flops.json"
TOKENS = "results/thinking/books-cpu/tokens.json"
TRACKING, TRACKED = "results/tracking/s3-resets-cpu", ("fixed", "deciding")
CONCEPTS = "results/concepts/books-cpu/tokens.json"
BRANCHES = ["one branch", "two branches", "one branch, k-means", "two branches, k-means"]


@generated
def findings(_: str) -> str:
    """One line per question, each with a link to its page."""
    return "\n".join(f"- {line}" for line in (_tracking(), _thinking(), _concepts(), _eviction(), _codes()))


def _tracking() -> str:
    fixed, deciding = ({row["name"]: row for row in read(f"{TRACKING}/{group}.json")["rows"]} for group in TRACKED)
    thought, deep, plain = (fixed[name]["accuracy"]["mean"] for name in ("ponderlm2", "doubledepth", "plain"))
    router, random = (deciding[name] for name in ("adaptivelatentcot", "adaptivelatentcot-random"))
    passes, follows = (router[key]["mean"] for key in ("passes_per_token", "passes_correlation"))
    most = fixed["latentcot-3"]
    for one, other in ((fixed["ponderlm2"], fixed["doubledepth"]), (router, random)):
        found = gap(*(dict(zip(row["seeds"], row["error"]["values"], strict=True)) for row in (one, other)))
        assert found.clear and found.mean < 0
    return (
        f"**Thinking pays where a token needs serial steps.** In state tracking, PonderLM-2 with one thought is right in "
        f"{100 * thought:.1f} % of the tokens, a model of twice the depth and the same inference FLOPs in {100 * deep:.1f} %, "
        f"a plain one in {100 * plain:.1f} %. A router that decides the passes of each token is right in "
        f"{_percent(router)} with {passes:.1f} passes (every token {most['passes_per_token']['mean']:.0f}: {_percent(most)}; "
        f"random tokens: {_percent(random)}), and its passes follow the difficulty (correlation {follows:.2f}). "
        "[When does thinking pay?](docs/results/tracking.md)"
    )


def _percent(row: dict[str, Any]) -> str:
    """The accuracy of a row."""
    return f"{100 * row['accuracy']['mean']:.1f} %"


def _thinking() -> str:
    plain = [difference(FLOPS, name, "plain", "") for name in ("adaptivelatentcot", "ponderlm2")]
    deep = [difference(TOKENS, name, "doubledepth", "") for name in ("adaptivelatentcot", "ponderlm2")]
    assert all(one.significant for one in plain) and not any(one.significant for one in deep)
    size = arm(FLOPS, "plain")["parameters"]["mean"] / 1e6
    return (
        f"**On text it did not pay at {size:.1f} M parameters**, with one learning rate for all models. At equal training "
        f"FLOPs, latent CoT is {_worse(plain[0])} and PonderLM-2 {_worse(plain[1])} bits per byte worse than a plain model. "
        f"At equal inference FLOPs neither differs significantly from a model of twice the depth ({plain[0].seeds} seeds). "
        "[Thinking](docs/results/thinking.md), [choosing which tokens think](docs/results/adaptive.md)"
    )


def _concepts() -> str:
    found = difference(CONCEPTS, "conceptlm", "plain", "")
    cost = ratio(CONCEPTS, "conceptlm", "plain", "train_flops", "")
    assert found.significant
    return (
        f"**Predicting concepts did not pay at this size either**: ConceptLM is {_worse(found)} bits per byte worse than plain "
        f"at {cost.number()} its training FLOPs. [Concepts](docs/results/concepts.md)"
    )


def _eviction() -> str:
    policies = {"SnapKV": 0.25, "H2O": 0.25, "RandomEviction": 0.25, "TokenSelect": 0.25, "PreallocatedCache": 1.0}
    recalls = {policy: _needle(policy, share) for policy, share in policies.items()}
    found = {policy: f"{mean(each):.0f} ± {stdev(each):.0f} %" for policy, each in recalls.items()}
    return (
        "**Eviction loses recall.** With a quarter of the KV slots tiny models find a needle in "
        f"{found['SnapKV']} (SnapKV) and {found['H2O']} (H2O) of the cases, against {found['RandomEviction']} with random "
        f"eviction and {found['PreallocatedCache']} with the full cache. TokenSelect keeps all slots, attends to a quarter of "
        f"them and stays at {found['TokenSelect']}. (Mean ± standard deviation over "
        f"{len(recalls['SnapKV'])} models.) [Eviction](docs/results/eviction.md)"
    )


def _codes() -> str:
    loss, rounding = (
        codes("stories", BRANCHES, 4.0, ""),
        codes("stories", ["2 bits, keys by channel, groups of 32"], 4.5, ""),
    )
    return (
        f"**Codes for the KV cache**: at 4 bits VQKV adds {loss.number()} of loss to a model of {loss.setting}, and scalar "
        f"rounding at 4.5 bits {rounding.number()}. Larger models were not measured. [Codes](docs/results/vqkv.md)"
    )


def _needle(policy: str, share: float) -> list[float]:
    """Recall in percent, of each model."""
    wanted = (policy, share, "needle")
    return [100 * row["recall"] for row in read(RECALL)["rows"] if (row["policy"], row["share"], row["task"]) == wanted]


def _worse(found: Measure) -> str:
    assert isinstance(found.value, float) and found.value > 0
    return f"{found.value:.3f}"
