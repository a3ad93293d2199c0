"""The KV cache methods in the index in their test forms, tiny models to use them on, and what their caches hold."""

from __future__ import annotations

import copy

import torch
from helpers.architectures import BACKBONES, ids
from helpers.declared import form, forms
from transformers import AutoConfig, AutoModelForCausalLM

from pondera import UserError
from pondera.cache.slot_layer import KVStoreLayer
from pondera.core import spec
from pondera.methods.kv_cache.base import KVCache, KVCacheMethod
from pondera.methods.kv_cache.common.windowed_codec import SinkWindowCache
from pondera.methods.kv_cache.common.windowed_layer import SinkWindowLayer

FORMS = forms("kv_cache")
FAMILIES = ("llama", "mistral", "qwen3", "gemma3", "gpt_neox")
SMALL = sorted(name for name, declared in FORMS.items() if "tight" in declared)
ONE_BY_ONE = [name for name in FORMS if "heads" not in name]  # for any number of layers and heads
_MODELS: dict[str, torch.nn.Module] = {}


def model(family: str = "llama"):
    """A plain transformers model; built once, because no test here changes its weights."""
    if family not in _MODELS:
        config = copy.deepcopy(BACKBONES[family])
        if family == "mistral":
            config["sliding_window"] = None
        torch.manual_seed(0)
        made = AutoModelForCausalLM.from_config(AutoConfig.for_model(config.pop("model_type"), **config)).eval()
        for parameter in made.parameters():
            parameter.mul_(1.5)  # random embeddings of std 0.02 have almost no effect on logits
        _MODELS[family] = made
    return _MODELS[family]


_FITTED: dict[tuple[str, int], KVCacheMethod] = {}


def memory(text: str, lm=None) -> KVCacheMethod:
    """A new method; a method that needs calibration is calibrated once per model and reused."""
    made = spec.build(text, "kv_cache")
    if made.fitted or lm is None:
        return made
    if (text, id(lm)) not in _FITTED:
        _FITTED[text, id(lm)] = made.fit(lm, [ids(4, 20)])
    return _FITTED[text, id(lm)]


def large(name: str, lm=None) -> KVCacheMethod:
    return memory(form(FORMS, name, "exact"), lm)


def small(name: str, lm=None) -> KVCacheMethod:
    return memory(form(FORMS, name, "tight"), lm)


def refuses(name: str, family: str) -> bool:
    """Whether a method does not support a family; only methods that save compute may refuse, and only sliding windows."""
    if family != "gemma3" or "exact" not in FORMS[name] or memory(FORMS[name]["exact"]).saves != "compute":
        return False
    try:
        with torch.no_grad():
            large(name, model(family)).cache(model(family))
    except UserError:
        return True
    return False


REFUSED = [(name, "gemma3") for name in ONE_BY_ONE if refuses(name, "gemma3")]
LARGE = [(name, family) for name in FORMS for family in FAMILIES if name in ONE_BY_ONE or family in ("llama", "qwen3")]
LARGE = [pair for pair in LARGE if pair not in REFUSED]
# Methods that evict no token, but store most of them as codes.
CODED = [name for name in SMALL if isinstance(small(name), SinkWindowCache)]
SLOTS = [name for name in SMALL if name not in CODED]
EVICTING = [name for name in SMALL if small(name).saves == "bytes"]
COMPUTING_LESS = [name for name in SMALL if small(name).saves == "compute"]


def feed(lm, cache, x: torch.Tensor, pieces: list[int], mask: torch.Tensor | None = None) -> torch.Tensor:
    """Logits of all tokens, from one call per piece, with the positions of padded rows as in `generate`."""
    found, seen = [], 0
    for piece in x.split(pieces, dim=1):
        begin, seen = seen, seen + piece.shape[1]
        kwargs = {}
        if mask is not None:
            position_ids = (mask.cumsum(-1) - 1).clamp(min=0)[:, begin:seen]
            kwargs = {"attention_mask": mask[:, :seen], "position_ids": position_ids}
        found.append(lm(piece, **kwargs, past_key_values=cache).logits)
    return torch.cat(found, dim=1)


def state(cache: KVCache) -> list[torch.Tensor]:
    """The state of all layers of a cache, in the order of the tokens."""
    found = []
    for layer in cache.kept:
        if isinstance(layer, SinkWindowLayer):
            parts = [codes.view(coder) for coder, codes in zip(layer.coders, layer.codes, strict=True)]
            found += [part for each in parts for part in each.values()]
            found += [*layer.ring.read(layer.ring.first, layer.ring.end), layer.sink_keys, layer.sink_values]
            found += [torch.tensor([layer.pads, layer.begins, layer.coded])]
            continue
        assert isinstance(layer, KVStoreLayer)
        for table in layer.stored:
            order = table.position.argsort(dim=-1)
            real = table.position.gather(2, order) >= 0
            found += [table.position.gather(2, order)[real]]
            found += [rows.gather(2, order[..., None].expand_as(rows))[real] for rows in (table.keys, table.values)]
            found += [table.note[name].gather(2, order)[real] for name in table.notes]
        found += list(layer.state.values())
    return found


def kept(cache: KVCache, row: int = 0) -> list[list[list[int]]]:
    """The indices of the tokens that each head of each layer keeps; the first token after padding has index 0.

    Of a cache that codes without eviction, those that stay exact.
    """
    found = []
    for layer in cache.kept:
        if isinstance(layer, SinkWindowLayer):
            tokens = range(layer.seen - layer.pads[row])
            first, last = layer.method.sinks, layer.method.sinks + layer.coded[row]
            found.append([[t for t in tokens if not first <= t < last]] * layer.ring.keys.shape[1])
            continue
        assert isinstance(layer, KVStoreLayer)
        pads = int(layer.state["padding"][row])
        heads = [head for table in layer.stored for head in table.position[row]]
        found.append([sorted((head[head >= 0] - pads).tolist()) for head in heads])
    return found
