"""VQKV: bytes, codebooks, arithmetic on codes, fitting, and what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers.architectures import BACKBONES, ids
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, LlamaConfig

from pondera import AdaptiveConfig, AdaptiveLM, UserError
from pondera.arch.families import FAMILIES
from pondera.core import spec
from pondera.methods.kv_cache.common.calibration import clustered, collect, learned, residual_tables
from pondera.methods.kv_cache.common.codebooks import Codebooks, RotaryCodebooks
from pondera.methods.kv_cache.common.rotary_pairs import branches, rotation_pairs
from pondera.methods.kv_cache.vqkv import VQKV
from pondera.methods.quantize.sim_vq import SimVQ
from pondera.models.rotary import rotate_by_position

LLAMA_8B = LlamaConfig(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8)
FAST: dict[str, Any] = {"codes": 4, "vectors": 64, "fitting": "kmeans", "window": 5, "sinks": 1, "flush_size": 2}
_MODELS: dict[str, Any] = {}


def model(family: str = "llama"):
    """Built once; nothing here changes its weights."""
    if family not in _MODELS:
        config = copy.deepcopy(BACKBONES[family])
        torch.manual_seed(0)
        _MODELS[family] = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(config.pop("model_type"), **config)
        ).eval()
    return _MODELS[family]


def fitted(bits: float = 2, family: str = "llama", **kwargs: Any) -> VQKV:
    return VQKV(bits, **(FAST | kwargs)).fit(model(family), [ids(4, 20)])


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# Bytes


@pytest.mark.parametrize(
    ("kwargs", "stages"),
    [({}, (44, 44)), ({"codes": 32768, "width": "layer"}, (176, 176)), ({"branches": 1}, (44, 44))],
)
def test_82_8_percent_to_the_byte(kwargs: dict[str, Any], stages: tuple[int, int]):
    """2.75 of 16 bits: 704 bytes per token and layer of Llama-3.1-8B instead of 4,096."""
    memory = VQKV(bits=2.75, **kwargs)
    _, keys, values = memory.layout(LLAMA_8B)
    assert (sum(keys), values) == stages
    assert memory.token_bytes(LLAMA_8B) == 704 and memory.saving(LLAMA_8B) == 0.828125
    coded = (100_000 - 4 - 128) // 16 * 16
    exact = 100_000 - coded
    assert memory.saving(LLAMA_8B, 100_000) == 1 - (exact * 4096 + coded * 704) / (100_000 * 4096)


def test_tables_are_counted_as_they_are_stored():
    memory = fitted(4, branches=2, cut=3)
    stored = sum(table.nbytes for name, table in memory.named_buffers() if name != "is_fitted")
    assert memory.table_bytes(model().config) == stored == 3 * 2 * 4 * (6 * 3 + 10 * 5 + 16 * 8)


@pytest.mark.parametrize(
    ("bits", "kwargs"), [(2.75, {}), (2.75, {"width": "layer"}), (3, {"codes": 300, "vectors": 4800})]
)
def test_live_codes_take_the_bytes_that_the_formula_says(bits: float, kwargs: dict[str, Any]):
    memory = VQKV(bits, **(FAST | kwargs))
    memory.bind(model().config)
    memory.is_fitted.fill_(True)  # what codebooks hold changes no byte
    cache, lm = memory.cache(model()), model()
    with torch.no_grad():
        for piece in ids(2, 41).split([30, *[1] * 11], 1):
            lm(piece, past_key_values=cache)
    coded = [layer.coded for layer in cache.kept]  # pyright: ignore[reportAttributeAccessIssue]
    assert coded == [[34, 34]] * 3
    live = sum(layer.code_bytes() for layer in cache.kept)  # pyright: ignore[reportAttributeAccessIssue]
    assert live == memory.token_bytes(lm.config) * 34 * 2 * 3
    assert memory.rate(lm.config) <= bits
    if bits == 2.75:
        assert memory.rate(lm.config) == 2.75


def test_rates_are_rounded_down_and_say_so():
    """Heads of width 8 and bytes as codes: 5.5 stages are 5."""
    config = LlamaConfig(hidden_size=64, num_attention_heads=8, num_key_value_heads=4)
    assert VQKV(2.75).layout(config)[1:] == ([2, 1], 2) and VQKV(2.75).rate(config) == 2.5
    assert VQKV(2.75, width="layer").rate(config) == 2.75


# Codebooks


def test_each_stage_codes_what_those_before_it_left():
    x = random(500, 6)
    tables = residual_tables(x, 5, clustered(8), seed=0).float()
    coder = Codebooks([tables], [torch.arange(6)], heads=1)
    parts = coder.encode(x[None, None])
    rest, errors = x.clone(), [float(x.square().mean())]
    for stage, table in enumerate(tables):
        code = torch.cdist(rest.double(), table.double()).argmin(-1)
        assert torch.equal(parts["codes"][0, 0, :, stage].long(), code)
        rest = rest - table[code]
        errors.append(float(rest.square().mean()))
    torch.testing.assert_close(x - coder.decode(parts)[0, 0], rest, atol=1e-5, rtol=0)
    assert errors == sorted(errors, reverse=True), "on the vectors that it was fitted to, every stage helps"


def test_rows_of_a_table_are_coded_as_themselves():
    table = random(1, 32, 6)
    coder = Codebooks([table], [torch.arange(6)], heads=1)
    parts = coder.encode(table[None])
    assert parts["codes"].flatten().tolist() == list(range(32)) and torch.equal(coder.decode(parts), table[None])


def test_folding_keeps_every_bit():
    """The map of a frozen table, and the plain table that is kept of it."""
    book = SimVQ(16, init="match").build(6).train()
    x = random(300, 6)
    found = book(x)
    table = book.fold().table()
    assert table is not None
    assert torch.equal(
        torch.nn.functional.embedding(found.codes.flatten(), book.rows()), table[0, 0][found.codes.flatten()]
    )
    tables = residual_tables(x, 2, learned(SimVQ(16, init="match"), steps=3), seed=0)
    assert tables.dtype == torch.float16 and tables.shape == (2, 16, 6)
    assert torch.equal(tables, residual_tables(x, 2, learned(SimVQ(16, init="match"), steps=3), seed=0))


def test_learning_lowers_the_error():
    x = random(2000, 8) @ random(8, 8, seed=1)

    def error(steps: int) -> float:
        coder = Codebooks([residual_tables(x, 2, learned(SimVQ(16, init="match"), steps), 0)], [torch.arange(8)], 1)
        return float((coder.decode(coder.encode(x[None, None])) - x).square().mean())

    assert error(60) < 0.97 * error(1)


@pytest.mark.parametrize("joined", [1, 2])
@pytest.mark.parametrize(
    "dims", [[[0, 4, 1, 5], [2, 3, 6, 7]], [[0, 4], [1, 2, 3, 5, 6, 7]], [[0, 1, 2, 3, 4, 5, 6, 7]]]
)
@pytest.mark.parametrize("codes", [7, 300])
def test_arithmetic_on_codes_is_that_on_decoded_rows(joined: int, dims: list[list[int]], codes: int):
    tables = [random(3, codes, joined * len(each), seed=n).double() for n, each in enumerate(dims)]
    coder = Codebooks(tables, [torch.tensor(each) for each in dims], heads=4, joined=joined)
    x = random(2, 4, 9, 8).double()
    parts = coder.encode(x)
    assert parts["codes"].shape == (2, 4 // joined, 9, 3 * len(dims))
    assert parts["codes"].dtype == (torch.uint8 if codes <= 256 else torch.int16)
    rows = coder.decode(parts)
    query, weight = random(2, 4, 5, 8, seed=5).double(), random(2, 4, 5, 9, seed=6).double().softmax(-1)
    torch.testing.assert_close(coder.dot(query, parts), query @ rows.mT, atol=1e-13, rtol=1e-12)
    torch.testing.assert_close(coder.mix(weight, parts), weight @ rows, atol=1e-13, rtol=1e-12)


def test_both_ways_of_attention_agree_in_a_model():
    """Few queries go by codes, many by decoded rows."""
    lm, x = model(), ids(2, 30)
    logits = []
    for queries in (16, 0):
        cache = fitted(2).cache(lm)
        for layer in cache.kept:
            for coder in layer.coders:  # pyright: ignore[reportAttributeAccessIssue]
                coder.queries = queries
        with torch.no_grad():
            logits.append(
                torch.cat([lm(piece, past_key_values=cache).logits for piece in x.split([20, 1, 3, 6], 1)], 1)
            )
    torch.testing.assert_close(logits[0], logits[1], atol=1e-5, rtol=1e-5)


# Branches and rotation


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "gpt_neox", "codegen", "cohere"])
def test_branches_divide_a_head_and_no_rotation_pair(family: str):
    config = AutoConfig.for_model("gemma3_text" if family == "gemma3" else family)
    pairs = rotation_pairs(config)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    dims = branches(pairs, width, len(pairs) // 2)
    assert sorted(dims[0] + dims[1]) == list(range(width))
    assert all(len({pair[0] in dims[0], pair[1] in dims[0]}) == 1 for pair in pairs)
    x = random(3, width)
    back = torch.empty_like(x)
    for each in dims:
        back[..., each] = x[..., each]
    assert torch.equal(back, x)


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "cohere", "gemma3"])
def test_keys_turned_back_are_what_the_model_had_before_it_turned_them(family: str):
    sizes = {k: v for k, v in BACKBONES["llama"].items() if k != "model_type"}
    config = BACKBONES[family] if family in BACKBONES else {"model_type": family, **sizes}
    config = copy.deepcopy(config)
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(AutoConfig.for_model(config.pop("model_type"), **config)).eval()
    memory = VQKV(2, **(FAST | {"branches": 1, "key_stage": "pre_rope"})).fit(lm, [ids(4, 20)])
    text = lm.config.get_text_config()
    full = [n for n, kind in enumerate(getattr(text, "layer_types", None) or []) if kind == "full_attention"] or [0]
    before: list[torch.Tensor] = []
    attention = (
        lm.get_decoder().layers[full[0]].self_attn if family != "gpt_neox" else lm.get_decoder().layers[0].attention
    )
    module = attention.query_key_value if family == "gpt_neox" else getattr(attention, "k_norm", attention.k_proj)
    module.register_forward_hook(lambda *given: before.append(given[-1]))
    keys, _, position = collect(lm, [ids(1, 12)], full[:1], skip=2, most=99)
    wide = before[0]
    if family == "gpt_neox":
        wide = wide.view(1, 12, 4, 48)[..., 16:32].transpose(1, 2)
    elif wide.ndim == 3:
        wide = wide.view(1, 12, -1, 16).transpose(1, 2)
    frequency, interleaved = memory.get_buffer("frequency_P"), FAMILIES[text.model_type].interleaved
    found = rotate_by_position(keys[0], -position, frequency, interleaved)
    torch.testing.assert_close(found, wide[0, :, 2:].float(), atol=1e-5, rtol=1e-5)
    again = rotate_by_position(found, position, frequency, interleaved)
    torch.testing.assert_close(again, keys[0], atol=1e-5, rtol=1e-5)


def test_keys_before_rotation_are_turned_by_the_position_that_the_model_gave_them():
    """One table of all vectors: nothing is lost, so the ordinary cache's logits come out, also of padded texts."""
    lm, x = model(), ids(2, 16)
    mask = torch.ones(2, 16, dtype=torch.long)
    mask[1, :4] = 0
    position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
    memory = VQKV(16, **(FAST | {"codes": 64, "vectors": 1024, "branches": 1, "key_stage": "pre_rope"}))
    memory.bind(lm.config)
    memory.get_buffer("frequency_P").copy_(lm.model.rotary_emb.inv_freq)
    memory.is_fitted.fill_(True)
    stock = DynamicCache(config=lm.config)
    with torch.no_grad():
        expected = lm(x, attention_mask=mask, position_ids=position_ids, past_key_values=stock).logits[:, -1]
        cache = memory.cache(lm)
        for layer, held in zip(cache.kept, stock.layers, strict=True):
            keys = rotate_by_position(held.keys, -position_ids[:, None], lm.model.rotary_emb.inv_freq)
            tables = [each.transpose(0, 1).flatten(0, 2)[None] for each in (keys, held.values)]
            books = [Codebooks([table], [torch.arange(16)], 2) for table in tables]
            layer.coders = (RotaryCodebooks(books[0], lm.model.rotary_emb.inv_freq), books[1])  # pyright: ignore
        for begin, end in ((0, 10), (10, 15), (15, 16)):
            piece = {"position_ids": position_ids[:, begin:end], "attention_mask": mask[:, :end]}
            found = lm(x[:, begin:end], **piece, past_key_values=cache).logits[:, -1]
    assert all(min(layer.coded) > 0 for layer in cache.kept)  # pyright: ignore[reportAttributeAccessIssue]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


# Fitting


def test_fewer_bits_are_the_first_stages():
    whole, half = fitted(4, branches=2), fitted(2, branches=2)
    cut = whole.at(2, model().config)
    assert cut.bits == 2 and cut.fitted
    for name, table in half.named_buffers():
        assert torch.equal(cut.get_buffer(name), table), name
    with pytest.raises(UserError, match="at most the 2"):
        half.at(3, model().config)


@pytest.mark.parametrize(
    "kwargs", [{"fitting": "simvq", "steps": 2}, {"fitting": "simvq", "steps": 2, "quantizer": SimVQ(4, hidden=6)}]
)
def test_fitting_leaves_the_model_as_it_was(kwargs: dict[str, Any]):
    lm = copy.deepcopy(model()).train()
    before = {name: tensor.clone() for name, tensor in lm.state_dict().items()}
    state = torch.random.get_rng_state()
    memory = VQKV(2, **(FAST | kwargs)).fit(lm, [ids(4, 20)])
    assert torch.equal(torch.random.get_rng_state(), state) and lm.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in lm.state_dict().items())
    assert memory.fitted and all(parameter.grad is None for parameter in lm.parameters())
    assert memory.get_buffer("values_2").abs().max() > 0


@pytest.mark.parametrize(
    "kwargs", [{}, {"quantizer": SimVQ(4, hidden=6), "fitting": "simvq", "steps": 2, "key_stage": "pre_rope"}]
)
def test_saved_codebooks_say_the_same(tmp_path, kwargs: dict[str, Any]):
    lm, x = model(), ids(1, 20)
    memory = fitted(2.0, **kwargs)
    assert memory.save(tmp_path).is_file()
    again = VQKV.load(tmp_path)
    assert repr(again) == repr(memory)
    with torch.no_grad():
        a, b = (m.cache(lm) for m in (memory, again))
        for piece in x.split([15, 5], 1):
            assert torch.equal(lm(piece, past_key_values=a).logits, lm(piece, past_key_values=b).logits)


def test_a_model_with_a_memory_carries_its_codebooks(tmp_path):
    text = "VQKV(2, codes=4, vectors=64, fitting='kmeans', window=5, sinks=1, flush_size=2)"
    lm = AdaptiveLM(AdaptiveConfig(backbone=copy.deepcopy(BACKBONES["llama"]), kv_cache=text)).eval()
    with pytest.raises(UserError, match="not been fitted"):
        lm.generate(ids(1, 4), max_new_tokens=2)
    assert lm.kv_cache is not None
    lm.kv_cache.fit(lm.backbone.lm, [ids(4, 20)])
    lm.save_pretrained(tmp_path)
    again = AdaptiveLM.from_pretrained(tmp_path).eval()
    kwargs = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(lm.generate(ids(1, 12), **kwargs), again.generate(ids(1, 12), **kwargs))
    assert again.kv_cache is not None and again.kv_cache.fitted
    assert torch.equal(again.kv_cache.get_buffer("keys_0_1"), lm.kv_cache.get_buffer("keys_0_1"))


# Refusals


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("VQKV(0)", "bits per cached number"),
        ("VQKV(17)", "at most 16"),
        ("VQKV(codes=1)", "give 2 to 32768"),
        ("VQKV(codes=40000)", "give 2 to 32768"),
        ("VQKV(branches=3)", "give 1 or 2"),
        ("VQKV(key_stage='pre_rop')", "did you mean 'pre_rope'"),
        ("VQKV(width='heads')", "did you mean 'head'"),
        ("VQKV(fitting='k-means')", "did you mean 'kmeans'"),
        ("VQKV(steps=0)", "1 step or more"),
        ("VQKV(vectors=100)", "4096"),
        ("VQKV(quantizer=SimVQ(64))", "with 256 codes"),
        ("VQKV(window=-1)", "give a number of tokens"),
        ("VQKV(flush_size=0)", "1 or more"),
        ("KIVI(3)", "give 1, 2, 4, 8"),
        ("KIVI(group=0)", "how many numbers share"),
        ("KIVI(keys='channels')", "did you mean 'channel'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(text: str, says: str):
    with pytest.raises(UserError, match=says):
        spec.build(text, "kv_cache")


@pytest.mark.parametrize(
    ("family", "kwargs", "says"),
    [
        ("gpt2", {}, "no rotary positions"),
        ("gpt2", {"branches": 1, "key_stage": "pre_rope"}, "no rotary positions"),
        ("llama", {"cut": 8}, "give 1 to 7"),
        ("llama", {"cut": 0}, "give 1 to 7"),
        ("llama", {"bits": 0.5}, "give at least 0.75"),
        ("llama", {"bits": 0.25, "branches": 1}, "give at least 0.5"),
        ("llama", {"codes": 64, "vectors": 1024}, "give 436 more"),
    ],
)
def test_models_and_texts_that_do_not_fit_are_refused(family: str, kwargs: dict[str, Any], says: str):
    with pytest.raises(UserError, match=says):
        VQKV(**({"bits": 2} | FAST | kwargs)).fit(model(family), [ids(4, 20)])


def test_models_without_rotary_positions_have_one_branch():
    lm = model("gpt2")
    cache = fitted(2, "gpt2", branches=1).cache(lm)
    with torch.no_grad():
        assert lm(ids(1, 20), past_key_values=cache).logits.isfinite().all()


def test_frequencies_that_change_with_length_are_refused():
    config = copy.deepcopy(BACKBONES["llama"]) | {
        "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    }
    lm = AutoModelForCausalLM.from_config(AutoConfig.for_model(config.pop("model_type"), **config))
    with pytest.raises(UserError, match="changes frequencies"):
        VQKV(2, **(FAST | {"key_stage": "pre_rope"})).fit(lm, [ids(4, 20)])


def test_codebooks_of_another_model_are_refused(tmp_path):
    memory = fitted(2)
    with pytest.raises(UserError, match="fitted to llama with 3 layers.*this model is qwen3 with 3 layers"):
        memory.cache(model("qwen3"))
    shallow = copy.deepcopy(BACKBONES["llama"]) | {"num_hidden_layers": 2}
    lm = AutoModelForCausalLM.from_config(AutoConfig.for_model(shallow.pop("model_type"), **shallow))
    with pytest.raises(UserError, match="this model is llama with 2 layers"):
        memory.cache(lm)
    with pytest.raises(UserError, match="not been fitted"):
        VQKV().cache(lm)
    with pytest.raises(UserError, match="no codebooks to save"):
        VQKV().save(tmp_path)
    with pytest.raises(UserError, match="no such file"):
        VQKV.load(tmp_path)
    (tmp_path / "kv_cache.safetensors").write_bytes(b"something else")
    with pytest.raises(UserError, match="not a VQKV codebook file"):
        VQKV.load(tmp_path)


def test_heads_that_rounding_does_not_fit_are_refused():
    with pytest.raises(UserError, match="does not divide heads of width 16"):
        spec.build("KIVI(2, group=3)", "kv_cache").cache(model())
