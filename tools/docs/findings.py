"""What we found, in a few sentences with numbers from the results files."""

from __future__ import annotations

from statistics import mean, stdev
from typing import Any

from pondera.evaluation.significance import gap
from tools.docs.tables import generated, read
from tools.measured import RECALL, arm, codes, difference

LANGUAGE = "results/language/books-cpu/tokens.json"
TRACKING, TRACKED = "results/tracking/s3-resets-cpu", ("fixed", "deciding")
BRANCHES = ["one branch", "two branches", "one branch, k-means", "two branches, k-means"]


@generated
def findings(_: str) -> str:
    """One line per question, each with a link to its page."""
    return "\n".join(f"- {line}" for line in (_tracking(), _language(), _eviction(), _codes()))


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


def _language() -> str:
    plain = arm(LANGUAGE, "plain")
    size, tokens = plain["parameters"]["mean"], plain["train_tokens"]["mean"]
    gained = difference(LANGUAGE, "ponderlm2", "plain", "")
    pairs = [("ponderlm2", "doubledepth"), ("latentcot", "doubledepth"), ("doubledepth-stock", "doubledepth")]
    assert gained.significant and isinstance(gained.value, float) and gained.value < 0
    assert not any(difference(LANGUAGE, *pair, "").significant for pair in pairs)
    return (
        f"**On text thinking gained a little, and not measurably more than depth** ({size / 1e6:.2f} M parameters, "
        f"{tokens / size:.0f} tokens per parameter, learning rates tuned, {gained.seeds} seeds). PonderLM-2 is "
        f"{-gained.value:.3f} ± {gained.ci95:.3f} bits "
        "per byte better than a plain model. At about equal inference FLOPs neither it nor latent CoT differs "
        "significantly from a model of twice the depth, with either initialisation. [Text](docs/results/language.md)"
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
