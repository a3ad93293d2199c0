"""The contract tests of the seam `kv_cache`, for every method in the index and every backbone family.

With a budget that no sequence exceeds, logits are bit-identical to those of the stock cache. Evicting a token equals masking
it. Padding and other batch rows change nothing. Draft tokens that are rolled back have no effect. Beam search works. The
storage becomes smaller.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers.architectures import BACKBONES, ids, left_padded
from helpers.declared import form, forms
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from pondera import UserError
from pondera.cache.slot_layer import KVStoreLayer
from pondera.cache.state import state_of
from pondera.core import spec
from pondera.cost.measure import tensors_in
from pondera.methods.kv_cache.base import KVCache, KVCacheMethod
from pondera.methods.kv_cache.common.policy import BudgetedPolicy
from pondera.methods.kv_cache.common.second_run import SecondRun
from pondera.methods.kv_cache.common.windowed_codec import SinkWindowCache
from pondera.methods.kv_cache.common.windowed_layer import SinkWindowLayer

FORMS = forms("kv_cache")
FAMILIES = ("llama", "mistral", "qwen3", "gemma3", "gpt_neox")
SMALL = sorted(name for name, declared in FORMS.items() if "tight" in declared)
ONE_BY_ONE = [name for name in FORMS if "heads" not in name]  # for any number of layers and heads
_MODELS: dict[str, torch.nn.Module] = {}


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


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
        for table in layer.tables:
            order = table.position.argsort(dim=-1)
            real = table.position.gather(2, order) >= 0
            found += [table.position.gather(2, order)[real]]
            found += [rows.gather(2, order[..., None].expand_as(rows))[real] for rows in (table.keys, table.values)]
            found += [table.note[name].gather(2, order)[real] for name in table.notes]
        found += list(layer.state.values())
    return found


def kept(cache: KVCache, row: int = 0) -> list[list[list[int]]]:
    """The indices of the tokens that each head of each layer keeps exactly; the first token after padding has index 0."""
    found = []
    for layer in cache.kept:
        if isinstance(layer, SinkWindowLayer):
            tokens = range(layer.seen - layer.pads[row])
            first, last = layer.method.sinks, layer.method.sinks + layer.coded[row]
            found.append([[t for t in tokens if not first <= t < last]] * layer.ring.keys.shape[1])
            continue
        assert isinstance(layer, KVStoreLayer)
        pads = int(layer.state["padding"][row])
        heads = [head for table in layer.tables for head in table.position[row]]
        found.append([sorted((head[head >= 0] - pads).tolist()) for head in heads])
    return found


@pytest.mark.parametrize("name", FORMS)
def test_it_declares_how_it_is_tested(name: str):
    assert "exact" in FORMS[name], f'{name}: add the class attribute examples = {{"exact": "{name}(...)"}}'


@pytest.mark.parametrize(("name", "family"), LARGE)
def test_a_budget_that_nothing_exceeds_changes_no_bit(name: str, family: str):
    lm, x = model(family), ids(2, 14)
    lm.set_attn_implementation("sdpa")
    whole, stock = lm(x).logits, feed(lm, None, x, [14])
    cache = large(name, lm).cache(lm)
    assert torch.equal(feed(lm, cache, x, [14]), whole) and torch.equal(whole, stock)
    pieces = [6, 3, 1, 1, 1, 2]
    lm.set_attn_implementation("sdpa")
    expected = feed(lm, DynamicCache(config=lm.config), x, pieces)
    found = feed(lm, large(name, lm).cache(lm), x, pieces)
    agree = torch.equal if large(name).exact else torch.allclose
    assert agree(found, expected)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_other_caches_work_as_before_once_a_model_knows_memories(name: str, family: str):
    if family != "llama" and (name not in ONE_BY_ONE or (name, family) in REFUSED):
        pytest.skip(f"{name} does not fit {family}")
    lm, x = model(family), ids(2, 9)
    lm.set_attn_implementation("sdpa")
    expected = lm.generate(x, max_new_tokens=4, do_sample=False, pad_token_id=0)
    large(name, lm).cache(lm)
    assert torch.equal(lm.generate(x, max_new_tokens=4, do_sample=False, pad_token_id=0), expected)


@pytest.mark.parametrize(
    ("name", "family"), [*((n, "llama") for n in SMALL), ("StreamingLLM", "gemma3"), ("H2O", "gpt_neox")]
)
def test_padded_rows_keep_and_say_what_they_do_alone(name: str, family: str):
    lm, rows = model(family), [ids(1, n, seed=n)[0] for n in (15, 9, 2)]
    x, mask = left_padded(rows)
    cache = small(name, lm).cache(lm)
    together = feed(lm, cache, x, [11, 1, 1, 1, 1], mask)
    for number, row in enumerate(rows):
        alone = small(name, lm).cache(lm)
        pads = x.shape[1] - len(row)
        pieces = [11 - pads] if pads < 11 else []
        pieces += [1] * (len(row) - sum(pieces))
        logits = feed(lm, alone, row[None], pieces)
        torch.testing.assert_close(together[number, pads:], logits[0], atol=1e-5, rtol=1e-5)
        assert kept(cache, number) == kept(alone)


@pytest.mark.parametrize("name", SMALL)
def test_rows_of_a_batch_do_not_meet(name: str):
    lm, x = model(), ids(3, 14)
    cache = small(name, lm).cache(lm)
    together = feed(lm, cache, x, [10, 1, 1, 1, 1])
    for row in range(3):
        alone = small(name, lm).cache(lm)
        logits = feed(lm, alone, x[row : row + 1], [10, 1, 1, 1, 1])
        torch.testing.assert_close(together[row : row + 1], logits, atol=1e-5, rtol=1e-5)
        assert kept(cache, row) == kept(alone)


@pytest.mark.parametrize("name", EVICTING)
def test_evicting_a_token_equals_masking_it(name: str):
    """A full cache with the decoded slots, and a mask over the evicted tokens, gives the same logits."""
    lm, x = model(), ids(1, 13)
    cache = small(name, lm).cache(lm)
    feed(lm, cache, x[:, :12], [10, 1, 1])
    held = kept(cache) if name not in CODED else [[list(range(12))] * 2] * 3
    assert name not in CODED or max(map(len, kept(cache)[0])) < 12
    token = x[:, 12:]
    # The reference implementation: the same keys and values, the tokens of each head, and plain softmax attention.
    expected = _masked(lm, cache, held, token)
    torch.testing.assert_close(lm(token, past_key_values=cache).logits, expected, atol=1e-5, rtol=1e-5)


def _masked(lm, cache: KVCache, held: list[list[list[int]]], token: torch.Tensor) -> torch.Tensor:
    """Logits of a token with a stock cache that has the kept slots at their tokens' places, and a mask over the others."""
    seen = cache.get_seq_length()
    stock = DynamicCache(config=lm.config)
    allowed = []
    for number, (layer, heads) in enumerate(zip(cache.kept, held, strict=True)):
        if isinstance(layer, SinkWindowLayer):
            keys, values, position = layer.restored()
            rows = [(keys[:, h], values[:, h], position) for h in range(keys.shape[1])]
        else:
            assert isinstance(layer, KVStoreLayer)
            rows = [
                (table.keys[:, h], table.values[:, h], table.position[:, h])
                for table in layer.tables
                for h in range(table.keys.shape[1])
            ]
        keys = torch.zeros(1, len(rows), seen, rows[0][0].shape[-1])
        values = torch.zeros_like(keys)
        for head, (key, value, position) in enumerate(rows):
            real = position[0] >= 0
            keys[0, head, position[0][real].long()] = key[0][real]
            values[0, head, position[0][real].long()] = value[0][real]
        stock.update(keys, values, number)
        allowed.append(torch.stack([torch.tensor([t in head or t == seen for t in range(seen + 1)]) for head in heads]))
    handles = []
    for number, module in enumerate(lm.get_decoder().layers):
        groups = module.self_attn.num_key_value_groups
        mask = allowed[number].repeat_interleave(groups, 0)[None, :, None]
        handles.append(
            module.self_attn.register_forward_pre_hook(
                lambda _, args, kwargs, mask=mask: (args, kwargs | {"attention_mask": mask}), with_kwargs=True
            )
        )
    lm.set_attn_implementation("sdpa")
    try:
        return lm(token, past_key_values=stock).logits
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("name", SMALL)
def test_draft_tokens_that_are_rolled_back_have_no_effect(name: str):
    lm, x = model(), ids(2, 20)
    cache = small(name, lm).cache(lm)
    cache.activate_past_recording()
    feed(lm, cache, x[:, :12], [12])
    cache.crop(0)
    feed(lm, cache, x[:, 12:13], [1])
    cache.crop(0)
    before = [tensor.clone() for tensor in state(cache)]
    feed(lm, cache, x[:, 13:17], [4])
    cache.crop(-4)
    assert cache.get_seq_length() == 13
    assert all(torch.equal(a, b) for a, b in zip(state(cache), before, strict=True))
    # Draft tokens that stay equal tokens from single calls.
    feed(lm, cache, x[:, 13:17], [4])
    cache.crop(-2)
    assert cache.get_seq_length() == 15 and all(max(map(max, layer)) == 14 for layer in kept(cache))


@pytest.mark.parametrize("name", EVICTING)
def test_recording_ends_with_two_calls_that_no_crop_follows(name: str):
    lm, x = model(), ids(2, 30)
    recorded, plain = (small(name, lm).cache(lm) for _ in range(2))
    feed(lm, plain, x[:, :12], [12])
    feed(lm, recorded, x[:, :12], [12])
    recorded.activate_past_recording()
    for number in range(12, 15):
        feed(lm, plain, x[:, number : number + 1], [1])
        feed(lm, recorded, x[:, number : number + 1], [1])
        recorded.crop(0)
    assert torch.equal(feed(lm, recorded, x[:, 15:], [1] * 15), feed(lm, plain, x[:, 15:], [1] * 15))
    assert all(torch.equal(*pair) for pair in zip(state(recorded), state(plain), strict=True))
    assert not any(layer.record_past for layer in recorded.kept)


@pytest.mark.parametrize("name", SLOTS)
def test_decoding_after_generate_with_drafts_keeps_the_budget(name: str):
    lm, x = model(), ids(1, 5).repeat(1, 4)
    cache = small(name, lm).cache(lm)
    options = dict(past_key_values=cache, do_sample=False, pad_token_id=0, eos_token_id=None)
    found = lm.generate(x, max_new_tokens=6, prompt_lookup_num_tokens=3, **options)
    alone = small(name, lm).cache(lm)
    feed(lm, alone, found[:, :-1], [20, *[1] * 5])
    lm.generate(found, max_new_tokens=30, **options)
    feed(lm, alone, ids(1, 30), [1] * 30)
    sizes = [sum(len(head) for layer in kept(each) for head in layer) for each in (cache, alone)]
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("order", [[1, 0], [1], [0, 1, 1]], ids=str)
@pytest.mark.parametrize("name", SMALL)
def test_rows_are_selected_while_drafts_are_pending(name: str, order: list[int]):
    lm, x = model(), ids(2, 20, seed=5)
    found = []
    for before in (True, False):
        cache = small(name, lm).cache(lm)
        first = x[order] if before else x
        feed(lm, cache, first[:, :10], [10])
        cache.activate_past_recording()
        feed(lm, cache, first[:, 10:14], [4])
        if not before:
            cache.batch_select_indices(torch.tensor(order))
        cache.crop(-1)
        feed(lm, cache, x[order][:, 13:16], [3])
        cache.crop(0)
        found.append(feed(lm, cache, x[order][:, 16:], [1] * 4))
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", FORMS)
def test_prompt_lookup_with_room_for_all_is_greedy(name: str):
    lm, x = model(), ids(1, 5).repeat(1, 3)
    greedy = lm.generate(x, max_new_tokens=8, do_sample=False, pad_token_id=0)
    cache = large(name, lm).cache(lm)
    found = lm.generate(
        x, max_new_tokens=8, do_sample=False, pad_token_id=0, past_key_values=cache, prompt_lookup_num_tokens=3
    )
    assert torch.equal(found, greedy) and cache.get_seq_length() == found.shape[1] - 1


@pytest.mark.parametrize("name", FORMS)
def test_beams_and_several_sequences(name: str):
    lm, x = model(), ids(2, 8)
    kwargs = {"max_new_tokens": 5, "num_beams": 3, "num_return_sequences": 2, "do_sample": False, "pad_token_id": 0}
    expected = lm.generate(x, **kwargs)
    assert torch.equal(lm.generate(x, **kwargs, past_key_values=large(name, lm).cache(lm)), expected)


@pytest.mark.parametrize("name", EVICTING)
def test_storage_really_falls(name: str):
    lm, x = model(), ids(2, 60)
    full, cache = large("PreallocatedCache").cache(lm), small(name, lm).cache(lm)
    feed(lm, full, x, [60])
    feed(lm, cache, x, [50] + [1] * 10)
    if "share" not in name:
        most = 18 if getattr(small(name), "prefill_only", False) else 8  # including the 10 tokens after the prompt
        sizes = [(sum(map(len, layer)), most * len(layer)) for layer in kept(cache)]
        if isinstance(small(name), SecondRun):  # whose layers may share a budget
            sizes = [(sum(held), sum(limit)) for held, limit in [zip(*sizes, strict=True)]]
        assert all(held <= limit for held, limit in sizes)
        if isinstance(small(name), BudgetedPolicy):  # in other methods heads share a budget
            assert all(len(head) <= most for layer in kept(cache) for head in layer)
    # A slot also contains its position and notes, and storage for 16 more slots is unused.
    assert cache.nbytes() < (0.75 if "share" in name else 0.5) * full.nbytes()
    assert cache.get_seq_length() == 60


@pytest.mark.parametrize("name", COMPUTING_LESS)
def test_work_really_falls(name: str):
    """A method that saves compute runs fewer prompt tokens in its layers, and `nbytes` counts its whole state."""
    lm, x, rows = model(), ids(2, 60), 0

    def count(_, args: tuple, __) -> None:
        nonlocal rows
        rows += args[0].shape[:2].numel()

    layers = lm.get_decoder().layers
    cache = small(name, lm).cache(lm)
    handles = [layer.mlp.register_forward_hook(count) for layer in layers]
    feed(lm, cache, x[:, :50], [50])
    for handle in handles:
        handle.remove()
    assert rows < 0.8 * 2 * 50 * len(layers)
    feed(lm, cache, x[:, 50:], [1] * 10)
    held = {part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in state_storage(cache)}
    assert cache.nbytes() >= sum(held.values()) and cache.get_seq_length() == 60


def state_storage(cache: KVCache) -> list[torch.Tensor]:
    """All tensors in the declared state of the layers."""
    return [part for layer in cache.kept for part in tensors_in(state_of(layer))]


@pytest.mark.parametrize(("name", "family"), REFUSED)
def test_models_that_a_memory_does_not_fit_are_refused_in_words(name: str, family: str):
    with pytest.raises(UserError, match=name):
        small(name).cache(model(family))


@pytest.mark.parametrize("name", SLOTS)
def test_the_order_of_slots_means_nothing(name: str):
    lm, x = model(), ids(2, 14)
    cache, shuffled = (small(name, lm).cache(lm) for _ in range(2))
    for one in (cache, shuffled):
        feed(lm, one, x[:, :12], [10, 1, 1])
    for layer in shuffled.kept:
        assert isinstance(layer, KVStoreLayer)
        for table in layer.tables:
            order = torch.randperm(table.used, generator=torch.Generator().manual_seed(0))
            table.keys[:], table.values[:] = table.keys[:, :, order].clone(), table.values[:, :, order].clone()
            table.position[:] = table.position[:, :, order].clone()
            for note in table.notes:
                table.note[note][:] = table.note[note][:, :, order].clone()
    a, b = feed(lm, cache, x[:, 12:], [1, 1]), feed(lm, shuffled, x[:, 12:], [1, 1])
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert kept(cache) == kept(shuffled)


@pytest.mark.parametrize("name", FORMS)
def test_a_cache_that_was_reset_is_as_new(name: str):
    lm, x = model(), ids(2, 12)
    cache = large(name, lm).cache(lm) if name not in SMALL else small(name, lm).cache(lm)
    first = feed(lm, cache, x, [10, 1, 1])
    cache.reset()
    assert cache.get_seq_length() == 0 and torch.equal(feed(lm, cache, x, [10, 1, 1]), first)


@pytest.mark.parametrize("name", FORMS)
def test_bf16_and_shortest_texts(name: str):
    lm = copy.deepcopy(model()).to(torch.bfloat16)
    cache = (small(name, lm) if name in SMALL else large(name, lm)).cache(lm)
    logits = feed(lm, cache, ids(1, 11), [1] * 11)
    assert logits.isfinite().all() and cache.get_seq_length() == 11


@pytest.mark.parametrize("name", SMALL)
def test_a_cache_left_half_filled_is_refused(name: str):
    lm, x = model(), ids(1, 10)
    cache = small(name, lm).cache(lm)

    def fails(*_):
        raise RuntimeError("out of memory, say")

    handle = lm.get_decoder().layers[1].register_forward_pre_hook(fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        lm(x, past_key_values=cache)
    handle.remove()
    with pytest.raises(UserError, match="half of a call"):
        lm(x, past_key_values=cache)
    cache.reset()
    lm(x, past_key_values=cache)


@pytest.mark.parametrize("name", EVICTING)
def test_misuse_is_refused_in_words(name: str):
    lm, x = model(), ids(1, 30)
    cache = small(name, lm).cache(lm)
    lm(x, past_key_values=cache)
    if name != "VQKV":  # a rollback can remove codes of single tokens; see tests/unit/kv_cache/test_vqkv.py
        with pytest.raises(UserError, match="activate_past_recording"):
            cache.crop(-3 if name != "KIVI" else -6)
    with pytest.raises(UserError, match="negative"):
        cache.crop(3)
    with pytest.raises(UserError, match="offloaded"):
        cache.offload(0)


def test_models_without_a_growing_cache_are_refused():
    config = copy.deepcopy(BACKBONES["mistral"])
    lm = AutoModelForCausalLM.from_config(AutoConfig.for_model(config.pop("model_type"), **config))
    with pytest.raises(UserError, match="nothing to compress"):
        memory("PreallocatedCache()").cache(lm)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("StreamingLLM(3)", "at least 5"),
        ("H2O(1.5)", "at most 1"),
        ("H2O('5 apples')", "units are"),
        ("H2O([0.5, 0.5])", "3 layers are compressed"),
        ("H2O([[4], [4], [4]])", "has length 1"),
        ("H2O(8, recent=1.5)", "share of the budget"),
        ("H2O(8, sinks=-1)", "0 or more"),
    ],
)
def test_budgets_that_do_not_fit_are_refused_in_words(text: str, says: str):
    with pytest.raises(UserError, match=says):
        memory(text).cache(model())


@pytest.mark.parametrize(("name", "family"), [(name, "llama") for name in FORMS] + [("H2O", "gemma3")])
def test_a_saved_cache_goes_on_as_if_it_had_never_left(name: str, family: str, tmp_path: Path):
    lm, x = model(family), ids(2, 30)
    memory = small(name, lm) if name in SMALL else large(name, lm)
    cache, mask = memory.cache(lm), torch.ones(2, 30)
    mask[0, :3] = 0
    feed(lm, cache, x[:, :22], [18, 1, 1, 1, 1], mask[:, :22])
    again = memory.load_cache(lm, cache.save(tmp_path / "read.safetensors"))
    assert again.nbytes() <= cache.nbytes() and again.get_seq_length() == 22

    def rest(of) -> torch.Tensor:
        found = []
        for number in range(22, 30):
            position = (mask[:, : number + 1].sum(-1, keepdim=True) - 1).long()
            step = lm(
                x[:, number : number + 1],
                past_key_values=of,
                position_ids=position,
                attention_mask=mask[:, : number + 1],
            )
            found.append(step.logits)
        return torch.cat(found, 1)

    assert torch.equal(rest(cache), rest(again))


@pytest.mark.parametrize("crops", [False, True])
@pytest.mark.parametrize("name", FORMS)
def test_a_cache_from_inference_mode_is_continued_outside_of_it(name: str, crops: bool):
    lm, x = model(), ids(2, 30)
    memory = small(name, lm) if name in SMALL else large(name, lm)
    found = []
    for mode in (torch.no_grad, torch.inference_mode):
        cache = memory.cache(lm)
        cache.activate_past_recording()
        with mode():
            feed(lm, cache, x[:, :20], [12, 8])
        if crops:
            cache.crop(-2)
        first = feed(lm, cache, x[:, 20:25], [1] * 5)
        with mode():
            feed(lm, cache, x[:, 25:27], [2])
        found.append(torch.cat([first, feed(lm, cache, x[:, 27:], [1] * 3)], 1))
    assert torch.equal(*found)


@pytest.mark.parametrize("name", [name for name in FORMS if name not in CODED])
def test_gradients_of_several_calls_equal_those_of_one(name: str):
    lm, x = model(), ids(2, 14)
    memory = large(name, lm)
    weight = lm.get_input_embeddings().weight

    def gradient(pieces: list[int]) -> torch.Tensor:
        with torch.enable_grad():
            logits = feed(lm, memory.cache(lm), x, pieces)
            return torch.autograd.grad(logits.square().sum(), weight)[0]

    torch.testing.assert_close(gradient([6, 1, 1, 6]), gradient([14]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", FORMS)
def test_a_copy_of_a_prefix_goes_on_and_leaves_the_prefix_as_it_is(name: str):
    lm, x = model(), ids(2, 30)
    memory = small(name, lm) if name in SMALL else large(name, lm)
    cache = memory.cache(lm)
    feed(lm, cache, x[:, :20], [18, 1, 1])
    copies = copy.deepcopy(cache), cache.clone()
    assert all(each.method is memory and each.owner is cache.owner for each in copies)
    found = [feed(lm, each, x[:, 20:], [1] * 10) for each in (*copies, cache)]
    assert torch.equal(found[0], found[2]) and torch.equal(found[1], found[2])
    with pytest.raises(UserError, match=r"cache\.save\(path\)"):
        pickle.dumps(cache)


def test_what_is_no_cache_of_this_memory_and_model_is_refused(tmp_path: Path):
    lm, memory = model(), small("H2O")
    cache = memory.cache(lm)
    feed(lm, cache, ids(1, 12), [12])
    file = cache.save(tmp_path / "read.safetensors")
    with pytest.raises(UserError, match="contains a cache of H2O"):
        small("StreamingLLM").load_cache(lm, file)
    with pytest.raises(UserError, match="no such file"):
        memory.load_cache(lm, tmp_path / "none.safetensors")
    (tmp_path / "text").write_text("not a cache")
    with pytest.raises(UserError, match="not a saved cache"):
        memory.load_cache(lm, tmp_path / "text")
    with pytest.raises(UserError, match="another kind of model"):
        memory.load_cache(model("gemma3"), file)
    cache.activate_past_recording()
    feed(lm, cache, ids(1, 2), [2])
    with pytest.raises(UserError, match="contains draft tokens"):
        cache.save(file)
    cache.crop(0)
    cache.save(file)
