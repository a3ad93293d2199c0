"""Tests which causal LMs of transformers Pondera supports, with a tiny random model of every architecture.

    python tools/support.py                writes results/support.json and docs/support.md; a few minutes on one core
    python tools/support.py llama gemma2   tests only these, and prints the results

While nothing is evicted, a KV cache method is compared with the stock cache. After an eviction it is compared with the model's
own attention function over the kept slots. A thinking method is compared with itself without a cache. A result is one of:
exact (bit-identical), close (equal within float tolerance), refused (a `UserError` with the reason), WRONG, failed (any other
error), not built (no tiny model can be built).
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import transformers
from tiny_models import VOCABULARY, NotBuilt, families, tiny_config, tiny_model
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from pondera import AdaptiveConfig, AdaptiveLM, UserError
from pondera.cache.layer import AttentionCall
from pondera.cache.self_check import difference
from pondera.cache.slot_layer import KVStoreLayer
from pondera.core import spec
from pondera.methods.kv_cache.base import KVCacheMethod
from pondera.methods.kv_cache.common.windowed_layer import SinkWindowLayer

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 40
"""Maximum seconds per column of an architecture."""
TOKENS, PROMPT = 24, 18
VQKV = "VQKV(2, {}codes=4, vectors=64, fitting='kmeans', branches=1)"
CACHES = {
    "PreallocatedCache": ("PreallocatedCache()", None),
    "H2O": ("H2O(64)", "H2O(8)"),
    "VQKV": (VQKV.format(""), VQKV.format("window=5, sinks=1, every=2, ")),
}
"""By name: a spec that evicts nothing in these sequences, and one that evicts much."""
THINKING = {
    "PonderLM2": "PonderLM2(thoughts=1, eval_rounds='exact')",
    "PonderLM3": "PonderLM3(thoughts=2, threshold=0.1, eval_rounds='exact')",
    "PonderLM": "PonderLM(steps=1, top_k=None)",
    "AdaPonderLM": "AdaPonderLM(steps=2, top_k=None, threshold=0.3)",
    "AdaptiveLatentCoT": "AdaptiveLatentCoT(steps=2, halting='fixed')",
    "ThinkAtHard": "ThinkAtHard(steps=1, threshold=0.5, top_k=8)",
    "UniversalTransformer": "UniversalTransformer(steps=2, epsilon=0.3)",
    "PauseToken": "PauseToken(pauses=1)",
}
COLUMNS = (*CACHES, *THINKING)
CLOSE = 2e-5
"""The maximum difference that counts as close, relative to the largest number."""
ORDER = ("exact", "close", "refused", "not built", "failed", "WRONG")
Found = dict[str, str]


def text(batch: int, tokens: int) -> Tensor:
    """Fixed random token ids."""
    return torch.randint(5, VOCABULARY, (batch, tokens), generator=torch.Generator().manual_seed(0))


def read(model: Any, cache: Any, ids_BT: Tensor, mask_BT: Tensor | None = None) -> Tensor:
    """Logits of all tokens: the prompt in one call, the others one by one."""
    logits, seen = [], 0
    for piece in ids_BT.split([PROMPT] + [1] * (ids_BT.shape[1] - PROMPT), 1):
        seen += piece.shape[1]
        given = {} if mask_BT is None else {"attention_mask": mask_BT[:, :seen]}
        logits.append(model(input_ids=piece, past_key_values=cache, use_cache=True, **given).logits)
    return torch.cat(logits, 1)


def verdict(pairs: list[tuple[Tensor, Tensor]], noise: float = 0.0) -> str:
    """Compares results with expected results, given a rounding error of `noise`."""
    if all(torch.equal(found, expected) for found, expected in pairs):
        return "exact"
    worst = max(difference(found, expected) for found, expected in pairs)
    return "close" if worst <= max(CLOSE, noise) else f"WRONG: apart by {worst:.1e} of the largest logit"


def padded(batch: int) -> tuple[Tensor, Tensor]:
    """A batch with left padding in its first sequence, and its mask."""
    ids_BT = text(batch, TOKENS)
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[0, :5] = 0
    return ids_BT, mask_BT


def try_cache(model: PreTrainedModel, name: str) -> str:
    """Compares a KV cache method with the stock cache, and after evictions with the model's own attention function."""
    large, small = CACHES[name]
    ids_BT, mask_BT = padded(2)
    try:
        stock = [read(model, stock_cache(model), text(1, TOKENS)), read(model, stock_cache(model), ids_BT, mask_BT)]
    except Exception as error:
        return f"not built: it does not run with the stock cache ({type(error).__name__}: {str(error)[:100]})"
    method = built(large, model)
    found = [read(model, method.cache(model), text(1, TOKENS)), read(model, method.cache(model), ids_BT, mask_BT)]
    whole = verdict([(found[0], stock[0]), (found[1][mask_BT.bool()], stock[1][mask_BT.bool()])])
    again = read(model, stock_cache(model), ids_BT, mask_BT)
    if not torch.equal(again[mask_BT.bool()], stock[1][mask_BT.bool()]):
        return "WRONG: the stock cache gives something else afterwards"
    if small is None or whole.startswith("WRONG"):
        return whole
    cache, pairs = built(small, model).cache(model), []
    for layer in cache.kept:
        watch(layer, pairs)
    read(model, cache, text(1, TOKENS))
    if len(pairs) < TOKENS - PROMPT:
        return "WRONG: nothing was evicted or coded"
    evicted = verdict(pairs)
    return max(whole, "close" if evicted == "exact" else evicted, key=lambda each: ORDER.index(each.partition(":")[0]))


def watch(layer: Any, pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Records the output of a layer, and the output of the model's own attention function over the kept slots."""
    name = "_by_table" if isinstance(layer, KVStoreLayer) else "_by_segments"
    own = getattr(layer, name)

    def noted(call: AttentionCall, *others: Any) -> Tensor:
        out = own(call, *others)
        if call.tokens == 1:
            pairs.append((out, call.base(call.module, call.query_BHTD, *rows(layer), None, scaling=call.scaling,
                                           **call.further)[0]))  # fmt: skip
        return out

    setattr(layer, name, noted)


def rows(layer: Any) -> tuple[Tensor, Tensor]:
    """The decoded keys and values in a layer, for a single sequence."""
    if isinstance(layer, SinkWindowLayer):
        keys, values, number_1S = layer.restored()
        return keys[:, :, number_1S[0] >= 0], values[:, :, number_1S[0] >= 0]
    (table,) = layer.tables
    real_S = table.real[0, 0]
    return table.keys[:, :, real_S], table.values[:, :, real_S]


def built(form: str, model: PreTrainedModel) -> KVCacheMethod:
    """A KV cache method, calibrated if necessary."""
    method = spec.build(form, "kv_cache")
    return method if method.fitted else method.fit(model, [text(4, 20)])


def stock_cache(model: PreTrainedModel) -> DynamicCache:
    """The default cache of `generate`."""
    return DynamicCache(config=model.config.get_text_config(decoder=True))


def try_thinking(kind: str, name: str) -> str:
    """Compares a thinking method with a cache and without one, and a padded sequence with the same sequence alone."""
    torch.manual_seed(0)
    config = tiny_config(kind).get_text_config(decoder=True).to_dict()
    model = AdaptiveLM(AdaptiveConfig(backbone={**config, "model_type": kind}, think=THINKING[name])).eval().float()
    ids_BT, mask_BT = padded(2)
    whole = model(ids_BT, attention_mask=mask_BT).logits
    cached = read(model, model.new_cache(), ids_BT, mask_BT)
    alone = model(ids_BT[:1, 5:]).logits
    return verdict([(cached[mask_BT.bool()], whole[mask_BT.bool()]), (alone, whole[:1, 5:])], noise(model))


def noise(model: AdaptiveLM) -> float:
    """The change of the logits when the embeddings change by 1e-6, or by the error of the backbone's own cache.

    Recurrent states amplify rounding, and some models of transformers compute them differently token by token.
    """
    ids_BT, mask_BT = padded(2)
    real_BT, backbone = mask_BT.bool(), model.backbone.lm
    plain = backbone(input_ids=ids_BT, attention_mask=mask_BT).logits[real_BT]
    own = difference(read(backbone, stock_cache(backbone), ids_BT, mask_BT)[real_BT], plain)
    h_BTD = model.backbone.embed(ids_BT)
    drawn_BTD = torch.randn(h_BTD.shape, generator=torch.Generator().manual_seed(0))
    moved_BTD = h_BTD * (1 + max(1e-6, own) * drawn_BTD)
    a, b = (model(inputs_embeds=h, attention_mask=mask_BT).logits[real_BT] for h in (h_BTD, moved_BTD))
    return difference(a, b)


def attempt(run: Any, *given: Any) -> str:
    """The result of a test, with errors as text."""
    try:
        with torch.no_grad():
            return run(*given)
    except UserError as error:
        return f"refused: {' '.join(str(error).split())}"
    except Exception as error:
        return f"failed: {type(error).__name__}: {' '.join(str(error).split())[:160]}"


def try_family(kind: str, write: Any) -> None:
    """Runs all tests on one architecture and sends each verdict."""
    try:
        model = tiny_model(kind)
    except NotBuilt as error:
        write.send(("*", f"not built: {error}"))
        return
    for name in CACHES:
        write.send((name, attempt(try_cache, model, name)))
    for name in THINKING:
        write.send((name, attempt(try_thinking, kind, name)))


def in_a_process(kind: str) -> Found:
    """Runs `try_family` in a process of its own, so that a crash does not stop the other architectures."""
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=try_family, args=(kind, send))
    process.start()
    send.close()
    found: Found = {}
    try:
        while len(found) < len(COLUMNS) and "*" not in found:
            if not receive.poll(LIMIT):
                found["*"] = f"not built: not done within {LIMIT} seconds"
                break
            column, result = receive.recv()
            found[column] = result
    except EOFError:
        found["*"] = "failed: the process ended"
    process.kill()
    process.join()
    rest = found.pop("*", "failed: nothing was said")
    return {column: found.get(column, rest) for column in COLUMNS}


def word(result: str) -> str:
    """The verdict without its reason."""
    return result.partition(":")[0]


def page(found: dict[str, Found]) -> str:
    """The text of docs/support.md."""
    lines = [
        "# Which models are served",
        "",
        f"Every causal LM of transformers {transformers.__version__}, as a tiny random model. This page is written by "
        "`python tools/support.py`; do not edit it.",
        "",
        "*exact*: bit-identical to the stock cache. *close*: the same to float tolerance. *refused*: a `UserError` says "
        "why, when the cache or the model is made. *not built*: no tiny model can be made by shrinking the usual sizes. "
        "KV-cache methods are compared with the stock cache while nothing is evicted, and after that against the model's own "
        "attention function over the rows that are kept. Thinking methods are compared with themselves without a cache, and a "
        "padded row against the row alone; where rounding alone moves logits further (recurrent states do), so much counts as "
        "close.",
        "",
        f"| of {len(found)} architectures | " + " | ".join(ORDER) + " |",
        "|---|" + "---|" * len(ORDER),
    ]
    for column in COLUMNS:
        counts = Counter(word(each[column]) for each in found.values())
        lines.append(f"| {column} | " + " | ".join(str(counts[verdict]) for verdict in ORDER) + " |")
    lines += ["", "| architecture | " + " | ".join(COLUMNS) + " |", "|---|" + "---|" * len(COLUMNS)]
    built = {kind: each for kind, each in found.items() if word(each["PreallocatedCache"]) != "not built"}
    lines += [
        f"| {kind} | " + " | ".join(word(each[column]) for column in COLUMNS) + " |" for kind, each in built.items()
    ]
    lines += ["", "## Why", ""]
    for kind, each in found.items():
        reasons: dict[str, list[str]] = {}
        for column in COLUMNS:
            if ": " in each[column]:
                reasons.setdefault(each[column], []).append(column)
        for reason, columns in reasons.items():
            which = "all" if len(columns) == len(COLUMNS) else ", ".join(columns)
            lines.append(f"- **{kind}** ({which}): {reason}")
    return "\n".join(lines) + "\n"


def main(asked: list[str]) -> int:
    """Tests the given architectures, or all; returns 1 if a test is WRONG or failed."""
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    found = {}
    for kind in asked or families():
        found[kind] = in_a_process(kind)
        print(kind, Counter(map(word, found[kind].values())), flush=True)
        if asked:
            print(json.dumps(found[kind], indent=2))
    if not asked:
        (ROOT / "results" / "support.json").write_text(
            json.dumps({"transformers": transformers.__version__, "found": found}, indent=1) + "\n"
        )
        (ROOT / "docs" / "support.md").write_text(page(found))
    return int(any(word(result) in ("WRONG", "failed") for each in found.values() for result in each.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
