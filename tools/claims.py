"""For every method: the claim of its paper, our verdict, and the measurements behind the verdict.

Claims and verdicts are judgements and are written here. Every number is read from a results file.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tools.measured import (
    CODEBOOKS,
    QUANTIZERS,
    Measure,
    absolute,
    accuracy,
    answers,
    capacity,
    codes,
    decoding,
    difference,
    first_token,
    follows,
    passes,
    ratio,
    recall,
    reconstruction,
    slow_signal,
)

UNTESTED = "claim not tested here"
VERDICTS = ("reproduced", "partly", "not reproduced", UNTESTED, "control")
"""Whether we could reproduce the claim of the paper; a control has no claim."""


@dataclass(frozen=True)
class Claim:
    """The claim about a method, and our verdict.

    Args:
        claim: the claim of the paper in one line; for a control, its purpose.
        verdict: one of `VERDICTS`.
        measured: reads the measurements.
        note: limits of the measurements.
    """

    claim: str
    verdict: str
    measured: Callable[[], list[Measure]] = list
    note: str = ""


LANGUAGE, HEADS, ELASTIC = (f"results/{name}/books-cpu/tokens.json" for name in ("language", "heads", "elastic"))
FIXED, DECIDING = (f"results/tracking/s3-resets-cpu/{name}.json" for name in ("fixed", "deciding"))
SMALL = "The paper's claim concerns large models on natural text; recall was measured with small models on synthetic sequences."
ONE_MODEL = "SmolLM2-135M, questions that come after the cache was compressed."
PROMPT = "The policy inside is SnapKV. " + SMALL


def tracked(name: str, slots: int, random: bool = True) -> list[Measure]:
    """State tracking with a method that decides the passes of each token, and with its random control if there is one."""
    return [
        passes(DECIDING, name, f"state tracking, of {slots}"),
        follows(DECIDING, name, "state tracking, passes with difficulty"),
        accuracy(DECIDING, name, "plain", "state tracking, against plain"),
        *([accuracy(DECIDING, name, f"{name}-random", "state tracking, against random halting")] if random else []),
    ]


def policy(name: str, claim: str, note: str = SMALL, more: Callable[[], list[Measure]] = list) -> Claim:
    """An eviction or selection policy: its recall with a quarter of the KV slots, and that of random eviction."""
    return Claim(claim, UNTESTED, lambda: recall(name) + more(), note)


THINK = {
    "AdaPonderLM": Claim(
        "Halting per token saves passes at PonderLM's quality (3.8 of 4 passes, perplexity 14.32 against 14.40).",
        "partly",
        lambda: tracked("adaponderlm", 4),
        "On state tracking its gates do not find the tokens that need passes.",
    ),
    "AdaptiveLatentCoT": Claim(
        "A router saves 15 to 17 % of the latent steps at a better score (410 M parameters and more).",
        "partly",
        lambda: [
            *tracked("adaptivelatentcot", 4),
            difference(LANGUAGE, "latentcot", "doubledepth", "text, one fixed step, against twice the depth"),
        ],
        "On text the router was not measured, only one step for every token.",
    ),
    "PauseToken": Claim(
        "A control: the slots of latent thoughts, with a constant input.",
        "control",
    ),
    "PonderLM": Claim(
        "Feeding back the likeliest tokens lowers perplexity (16.95 to 14.16 at 70 M parameters and 30 billion tokens).",
        UNTESTED,
    ),
    "PonderLM2": Claim(
        "One latent thought per token beats twice the parameters (410 M to 1.4 B parameters, 26 to 300 billion tokens).",
        "partly",
        lambda: [
            accuracy(FIXED, "ponderlm2", "doubledepth", "state tracking, against twice the depth"),
            ratio(
                FIXED,
                "ponderlm2",
                "doubledepth",
                "train_flops",
                "state tracking, training FLOPs against twice the depth",
            ),
            difference(LANGUAGE, "ponderlm2", "doubledepth", "text, against twice the depth"),
            ratio(LANGUAGE, "ponderlm2", "doubledepth", "train_flops", "text, training FLOPs against twice the depth"),
        ],
        "On a task that needs serial steps, not on text at this size.",
    ),
    "PonderLM3": Claim(
        "A router gives each token only the latent thoughts that it needs.",
        "partly",
        lambda: tracked("ponderlm3", 2, random=False),
        "At its default threshold it prunes nothing on this task.",
    ),
    "ThinkAtHard": Claim(
        "A second pass for the tokens that a decider finds hard improves a trained model.",
        UNTESTED,
    ),
    "UniversalTransformer": Claim(
        "Adaptive computation time learns how many passes each token needs.",
        "partly",
        lambda: tracked("universaltransformer", 4),
    ),
}

EVICTION = {
    "A2SF": policy("A2SF", "Accumulated attention with a forgetting factor keeps quality with a part of the KV cache."),
    "Compactor": Claim(
        "Leverage scores of keys and attention that is not causal tell what to keep, whatever the question is.",
        "partly",
        lambda: answers("Compactor(0.25)"),
        ONE_MODEL,
    ),
    "CurDKV": Claim(
        "Rows of a CUR decomposition of keys and values lose less than the tokens with the most attention.", UNTESTED
    ),
    "DapQ": policy("DapQ", "Queries rotated to decoding positions pick the prompt tokens to keep.", PROMPT),
    "CriticalKV": Claim(
        "Scores times the norm of the projected value lose less than attention alone at the same budget.", UNTESTED
    ),
    "ExpectedAttention": Claim(
        "The attention that future queries are expected to pay tells what to keep, whatever the question is.",
        "partly",
        lambda: answers("ExpectedAttention(0.25)"),
        ONE_MODEL,
    ),
    "FastKV": policy(
        "FastKV",
        "From one layer on, prefill propagates only the most attended tokens: prefill is 1.8 times as fast.",
        PROMPT,
        lambda: [first_token("FastKV(SnapKV(0.25), tsp=0.2)")],
    ),
    "H2O": policy("H2O", "Tokens with the largest accumulated attention keep quality with a fifth of the KV cache."),
    "AdaKV": policy("AdaKV", "A layer's budget, shared among its heads by score, loses less.", PROMPT),
    "Keyformer": policy("Keyformer", "Gumbel noise and temperature in H2O's score keep more of the quality."),
    "KeyDiff": Claim("Keys that differ from the mean key are those that queries attend to.", UNTESTED),
    "KVzip": Claim(
        "The KV slots that a model needs to repeat a context answer any question about it: a third to a quarter suffices.",
        "reproduced",
        lambda: answers("KVzip(0.25)", "KVzip(0.125)"),
        ONE_MODEL,
    ),
    "LagKV": Claim(
        "Tokens that leave the range of the tokens after them are those to keep, without a look at attention.", UNTESTED
    ),
    "LazyEviction": Claim(
        "Tokens regain attention after a while; keeping them by the longest such interval saves 50 to 70 % of the KV cache.",
        UNTESTED,
    ),
    "LazyLLM": policy(
        "LazyLLM",
        "Progressive pruning of prompt tokens brings the first token 2.3 times as soon at the same accuracy.",
        "Pruned after the first of 3 layers. " + SMALL,
        lambda: [first_token("LazyLLM()")],
    ),
    "PyramidKV": Claim("Budgets that fall over the layers lose less than the same budget for all.", UNTESTED),
    "RandomEviction": Claim("A control: keeps random tokens.", "control", lambda: recall("RandomEviction")[:3]),
    "RefreshKV": policy("RefreshKV", "Attention to a part of the cache, refreshed when queries drift, keeps quality."),
    "SentenceKV": Claim(
        "Whole sentences, found by their mean keys, are enough for a decoding step: 128 tokens of a long context.",
        UNTESTED,
    ),
    "SnapKV": policy(
        "SnapKV",
        "The prompt's last queries tell which of its tokens to keep.",
        more=lambda: answers("SnapKV(0.25)"),
    ),
    "StreamingLLM": policy("StreamingLLM", "First and latest tokens suffice for stable decoding of unbounded text."),
    "TOVA": Claim("What the latest query attends to is what later queries need.", UNTESTED),
    "TokenSelect": policy("TokenSelect", "Attention to the tokens that heads vote for keeps quality."),
    "TreeKV": policy("TreeKV", "Eviction that thins old regions like levels of a tree keeps quality."),
}

CACHES = {
    "PreallocatedCache": Claim(
        "A control: transformers' cache without its copies.",
        "control",
        lambda: [
            decoding("PreallocatedCache()", (16384, 65536)),
            decoding("StaticCache", (16384, 65536)),
            capacity("PreallocatedCache()", "float32"),
            capacity("PreallocatedCache()"),
        ],
        "StaticCache is that of transformers: it needs the length in advance and is not bit-identical.",
    ),
    "KIVI": Claim(
        "Keys want rounding per channel and values per token, at 2 bits.",
        "partly",
        lambda: [
            codes(
                "stories",
                ["2 bits, keys by channel, groups of 32"],
                4.5,
                "loss against exact, 2 bits, keys per channel",
            ),
            codes(
                "stories", ["2 bits, keys by token, groups of 32"], 6.0, "loss against exact, 2 bits, keys per token"
            ),
            *answers("KIVI(4)", "KIVI(2)", "KIVI(2, sinks=0)"),
        ],
        "Small models; that large models keep their quality at 2 bits was not tested.",
    ),
    "TurboQuant": Claim(
        "Random rotation makes one table of levels fit any key and value: quality is kept at 3.5 bits.",
        "partly",
        lambda: answers("TurboQuant(4)"),
        ONE_MODEL + " 3.5 bits were not tested.",
    ),
    "Coded": Claim(
        "Our own: codes of what an eviction method keeps save what both save, and lose hardly more than either.",
        "reproduced",
        lambda: answers(
            *(f"Coded(KVzip({share}), KIVI({bits}, window=32))" for share, bits in ((0.5, 4), (0.25, 4), (0.25, 2)))
        ),
        ONE_MODEL + " With 2 bits it does not hold.",
    ),
    "VQKV": Claim(
        "Codebooks cut the KV cache by 82.8 % at 2.75 bits per number, nearly without loss.",
        "partly",
        lambda: [
            decoding("VQKV()", (16384, 65536)),
            capacity("VQKV()", "float32"),
            capacity("VQKV()"),
            codes(
                "stories",
                ["one branch", "two branches", "one branch, k-means", "two branches, k-means"],
                4.0,
                "loss against exact, 4 bits, SimVQ and k-means",
            ),
            codes(
                "stories", ["2 bits, keys by channel, groups of 32"], 4.5, "loss against exact, rounding at 4.5 bits"
            ),
        ],
        "The 82.8 % is arithmetic (2.75 of 16 bits); no results file holds it. Quality was measured on a tiny model only.",
    ),
    "FisherVQ": Claim(
        "Our own: bytes of keys dealt by the loss of repeating a text keep more of a context than VQKV at equal bits.",
        UNTESTED,
    ),
    "ElasticMemory": Claim(
        "Legendre coefficients of past keys and values are a memory for very long texts.",
        "not reproduced",
        lambda: [
            difference(ELASTIC, "elastic-16", "blocks", "books, against no memory"),
            difference(ELASTIC, "plain", "blocks", "books, full attention against no memory"),
            *slow_signal("elastic-16", "mean-pool", "blocks"),
        ],
        "The paper's claims are about texts of 32 thousand tokens and more, which were not tested.",
    ),
    "MeanPool": Claim(
        "A control: means of past keys and values.",
        "control",
        lambda: [
            difference(ELASTIC, "mean-pool", "blocks", "books, against no memory"),
            *slow_signal("mean-pool", "blocks"),
        ],
    ),
    "MemorizingTransformer": Claim(
        "Attention to the nearest of many past keys in one layer improves language modelling.",
        "not reproduced",
        lambda: [
            difference(ELASTIC, "memorizing", "blocks", "books, against no memory"),
            *slow_signal("memorizing", "mean-pool", "blocks"),
        ],
    ),
    "TransformerXL": Claim(
        "A control: the last rows of the previous segment.",
        "control",
        lambda: [difference(ELASTIC, "transformer-xl", "blocks", "books, against no memory")],
    ),
}

MODULES = {
    "ConceptLM": Claim(
        "Predicting the next concept besides the next token makes a better model of the same backbone.",
        UNTESTED,
    ),
    "VQLogits": Claim(
        "Up to 99 % of the output parameters and five sixths of the time for logits are saved at 4 % in perplexity.",
        "partly",
        lambda: [
            difference(HEADS, "vqlogits-1", "plain", "one code per token, against plain"),
            difference(HEADS, "vqlogits-2", "plain", "two codes per token, against plain"),
            ratio(HEADS, "vqlogits-1", "plain", "inference_flops_per_token", "inference FLOPs against plain"),
        ],
        "Saves parameters and FLOPs as claimed; quality is not kept from scratch. Clustering a trained matrix was not tested.",
    ),
}


def over_vq(name: str, what: str, kinds: tuple[str, ...] = ()) -> Measure:
    """A quantizer against VQ at 8 and 12 bits."""
    pairs = [(f"{name}, {bits} bits", f"VQ, {bits} bits") for bits in (8, 12)]
    return reconstruction(QUANTIZERS, pairs, what, kinds)


LOST = "reconstruction error against VQ, 8 and 12 bits"
QUANTIZE = {
    "FSQ": Claim(
        "A fixed lattice needs no codebook, wastes no codes and competes with VQ.",
        "partly",
        lambda: [over_vq("FSQ", LOST)],
    ),
    "Identity": Claim(
        "A control: continuous vectors.",
        "control",
        lambda: [absolute(QUANTIZERS, ["Identity"], "reconstruction error, share of the variance")],
    ),
    "LFQ": Claim(
        "Signs of the coordinates are codes without a codebook.",
        "partly",
        lambda: [over_vq("LFQ", f"{LOST}, {kind}", (kind,)) for kind in ("clusters", "images", "states")],
        "On states, whose vectors start far smaller than its corners, it collapses.",
    ),
    "Product": Claim(
        "Several small tables side by side replace a large one.", "partly", lambda: [over_vq("Product", LOST)]
    ),
    "Residual": Claim(
        "Several small tables, each coding what the last left, replace a large one.",
        "partly",
        lambda: [over_vq("Residual", LOST)],
    ),
    "Scalar": Claim(
        "Rounding every dimension codes wide features of frozen encoders.",
        UNTESTED,
        lambda: [
            absolute(
                QUANTIZERS,
                ["Scalar, 8 bits", "Scalar, 12 bits"],
                "reconstruction error, share of the variance, 8 and 12 bits",
            )
        ],
        "Measured on vectors of 16 numbers, of which it has bits for a few only.",
    ),
    "SimVQ": Claim(
        "One learned map of a fixed table keeps all codes in use and reconstructs better than VQ.",
        "partly",
        lambda: [
            reconstruction(
                CODEBOOKS,
                [("SimVQ", "warm-up, then k-means")],
                "reconstruction error against VQ after a warm-up and k-means",
            ),
            absolute(CODEBOOKS, ["SimVQ"], "share of codes in use", "usage"),
            reconstruction(
                CODEBOOKS,
                [("SimVQ, rotation", "warm-up, then k-means")],
                "the same with the rotation trick, which collapses",
            ),
        ],
        "On clusters a quarter of the codes is all that the data needs.",
    ),
    "VQ": Claim(
        "A learned codebook with straight-through gradients codes what an encoder makes.",
        "partly",
        lambda: [
            absolute(
                CODEBOOKS,
                ["warm-up, then k-means"],
                "reconstruction error after a warm-up and k-means, share of the variance",
            ),
            reconstruction(
                CODEBOOKS,
                [("k-means at step 0", "warm-up, then k-means")],
                "reconstruction error when quantized from the first step, against that",
            ),
        ],
        "From the first step it collapses unless its rows happen to fit the vectors.",
    ),
}

CLAIMS = THINK | EVICTION | CACHES | MODULES | QUANTIZE
