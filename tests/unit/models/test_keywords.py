"""What the forward of a model may be called with, and what a config may be made from."""

from __future__ import annotations

import json

import pytest
import torch
from helpers.architectures import BACKBONES, ids
from helpers.fresh_process import copies
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, LlamaForCausalLM

import pondera
from pondera import AdaptiveConfig, AdaptiveLM, UserError
from pondera.core.hf import CACHE, DynamicCache
from pondera.core.hf_config import PreTrainedConfig, written_by_transformers
from pondera.methods.think.ponder_lm2 import PonderLM2

CHOSEN = [{}, {"think": "PonderLM2(thoughts=1, eval_rounds='exact')"}, {"kv_cache": "H2O(budget=64)"}]


@copies
def build(**chosen) -> AdaptiveLM:
    torch.manual_seed(0)
    return AdaptiveLM(AdaptiveConfig(backbone=dict(BACKBONES["llama"]), **chosen)).eval()


@pytest.fixture
def checkpoint(tmp_path):
    torch.manual_seed(0)
    plain = build().backbone.lm
    plain.save_pretrained(tmp_path / "plain")
    return str(tmp_path / "plain")


class TestForward:
    @pytest.fixture(autouse=True)
    def no_grad(self):
        with torch.no_grad():
            yield

    @pytest.mark.parametrize("chosen", CHOSEN, ids=str)
    @pytest.mark.parametrize("name", ["cache", "past_key_values"])
    def test_the_cache_goes_by_both_its_names(self, chosen, name):
        model, x = build(**chosen), ids(2, 9)
        cache = model.new_cache()
        first = model(x[:, :5], **{name: cache})
        assert first.cache is cache and first.past_key_values is cache and first[CACHE] is cache
        rest = model(x[:, 5:], **{name: cache}).logits
        torch.testing.assert_close(rest, model(x).logits[:, 5:], atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("chosen", CHOSEN, ids=str)
    @pytest.mark.parametrize(
        ("wrong", "right"),
        [("attention_msk", "attention_mask"), ("effrt", "effort"), ("cahce", "cache"), ("shift_label", "shift_labels")],
    )
    def test_an_unknown_keyword_is_refused_with_the_nearest(self, chosen, wrong, right):
        with pytest.raises(UserError, match=f"{wrong}.*did you mean.*'{right}'"):
            build(**chosen)(ids(1, 4), **{wrong: None})

    def test_what_transformers_passes_to_every_model_changes_nothing(self):
        model, x = build(), ids(1, 6)
        out = model(
            x, cache_position=torch.arange(6), output_attentions=False, output_hidden_states=None, token_type_ids=0 * x
        )
        assert torch.equal(out.logits, model(x).logits)

    @pytest.mark.parametrize(
        "asked",
        [{"output_hidden_states": True}, {"output_attentions": True}, {"token_type_ids": torch.ones(1, 4).long()}],
    )
    def test_what_is_not_there_is_refused_when_asked_for(self, asked):
        with pytest.raises(UserError, match=next(iter(asked))):
            build()(ids(1, 4), **asked)

    def test_a_tuple_where_one_is_asked_for(self):
        model, x = build(), ids(1, 4)
        loss, logits, *_ = model(x, labels=x, return_dict=False)
        assert loss.ndim == 0 and torch.equal(logits, model(x).logits)

    @pytest.mark.parametrize("chosen", CHOSEN, ids=str)
    def test_out_of_training_the_output_holds_tensors_and_the_cache_alone(self, chosen):
        x = ids(1, 4)
        out = build(**chosen)(x, labels=x, use_cache=True)
        assert set(out.keys()) == {"loss", "logits", "passes", CACHE}
        assert out.terms["next_token"].count == 3 and out.trace == {}

    @pytest.mark.parametrize("chosen", CHOSEN[:2], ids=str)
    def test_each_part_of_a_step_gives_its_share(self, chosen):
        model, x = build(**chosen), ids(4, 9)
        labels = x.clone()
        labels[0, :6] = -100
        whole = model(x, labels=labels).loss
        count = (labels[:, 1:] != -100).sum()
        parts = [model(x[n : n + 1], labels=labels[n : n + 1], num_items_in_batch=count).loss for n in range(4)]
        torch.testing.assert_close(sum(parts), whole, atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize(
        "call", ["generate_batch", "init_continuous_batching", "continuous_batching_context_manager"]
    )
    def test_continuous_batching_is_refused_before_anything_runs(self, call):
        with pytest.raises(UserError, match=f"{call}.*generate"):
            getattr(build(), call)([[1, 2, 3]], generation_config=GenerationConfig(max_new_tokens=2))

    def test_two_caches_are_refused(self):
        model = build()
        with pytest.raises(UserError, match="two names of one argument"):
            model(ids(1, 4), cache=model.new_cache(), past_key_values=model.new_cache())

    def test_terms_that_no_loss_has_are_spoken_of(self, caplog):
        model = build(think="UniversalTransformer(steps=2)").train()
        model(ids(1, 9), labels=ids(1, 9))
        assert "not in a loss" not in caplog.text
        model(ids(1, 9))
        assert "no labels in training: ponder of UniversalTransformer(steps=2) are in out.terms" in caplog.text

    def test_a_foreign_cache_is_refused_by_either_name(self):
        for name in ("cache", "past_key_values"):
            with pytest.raises(UserError, match="model.new_cache"):
                build(think="PonderLM2(thoughts=1)")(ids(1, 4), **{name: DynamicCache()})


class TestConfig:
    @pytest.mark.parametrize(
        ("wrong", "right"), [("memroy", "memory"), ("thnik", "think"), ("back_bone", "backbone"), ("haed", "head")]
    )
    def test_a_misspelt_setting_is_refused_with_the_nearest(self, wrong, right):
        with pytest.raises(UserError, match=f"'{wrong}'; did you mean '{right}'"):
            AdaptiveConfig(backbone=dict(BACKBONES["llama"]), **{wrong: "H2O(8)"})

    def test_a_misspelt_setting_is_refused_when_loading(self, tmp_path):
        build().save_pretrained(tmp_path)
        assert AdaptiveLM.from_pretrained(tmp_path, kv_cache="H2O(budget=64)").kv_cache is not None
        with pytest.raises(UserError, match="'memroy'; did you mean 'memory'"):
            AdaptiveLM.from_pretrained(tmp_path, memroy="H2O(budget=64)")

    @pytest.mark.parametrize("chosen", CHOSEN, ids=str)
    def test_what_is_written_is_read(self, chosen, tmp_path):
        config = build(**chosen).config
        config.save_pretrained(tmp_path)
        tree = json.loads((tmp_path / "config.json").read_text())
        assert "text_config" not in tree and tree["backbone"]["hidden_size"] == 64
        again = AutoConfig.from_pretrained(tmp_path)
        assert again.to_dict() | {"_name_or_path": ""} == config.to_dict()
        assert AdaptiveConfig(**config.to_dict()).to_dict() == config.to_dict()

    def test_what_transformers_writes_into_any_config_is_taken(self):
        fields = {name: value for name, value in PreTrainedConfig().to_dict().items() if name[0] != "_"}
        assert fields and set(fields) <= written_by_transformers()
        del fields["model_type"]
        AdaptiveConfig(backbone=dict(BACKBONES["llama"]), **fields, temperature=0.7, attn_implementation="eager")

    def test_fields_of_another_version_are_left_out(self):
        tree = build().config.to_dict() | {"field_of_tomorrow": 1}
        with pytest.raises(UserError, match="field_of_tomorrow"):
            AdaptiveConfig.from_dict(tree)
        assert not hasattr(AdaptiveConfig.from_dict(tree | {"transformers_version": "99.0.0"}), "field_of_tomorrow")

    @pytest.mark.parametrize("seam, method", [("chunk", "ConceptLM(chunk=4, codes=8)"), ("kv_cache", "SnapKV(64)")])
    def test_methods_saved_by_another_version_are_kept(self, seam: str, method: str):
        tree = AdaptiveConfig(backbone=dict(BACKBONES["llama"]), **{seam: method}).to_dict()
        loaded = AdaptiveConfig.from_dict(tree | {"transformers_version": "99.0.0"})
        assert getattr(loaded, seam) == method

    @pytest.mark.parametrize("of", [AdaptiveConfig, AdaptiveLM])
    def test_a_plain_checkpoint_is_refused_with_what_to_type(self, of, checkpoint):
        with pytest.raises(UserError, match=r"a llama checkpoint.*AdaptiveLM\(AdaptiveConfig\(backbone="):
            of.from_pretrained(checkpoint)
        assert AdaptiveLM(AdaptiveConfig(backbone=checkpoint)).config.backbone.hidden_size == 64

    def test_a_method_that_knows_how_it_was_made_may_be_given_itself(self):
        from pondera.methods.kv_cache.h2o import H2O

        assert AdaptiveConfig(backbone=dict(BACKBONES["llama"]), kv_cache=H2O(budget=64)).kv_cache == "H2O(64)"

    @pytest.mark.parametrize("given", [PonderLM2, 3], ids=str)
    def test_other_objects_are_refused_with_what_to_type(self, given):
        with pytest.raises(UserError, match=r'think="\w+\(\.\.\.\)"'):
            AdaptiveConfig(backbone=dict(BACKBONES["llama"]), think=given)

    def test_a_model_is_no_backbone_of_a_config(self):
        with pytest.raises(UserError, match="backbone: got a LlamaForCausalLM object; save it and give its folder"):
            AdaptiveConfig(backbone=build().backbone.lm)

    @pytest.mark.parametrize(
        "chosen", [*CHOSEN[:2], {"think": "AdaptiveLatentCoT(steps=1, halting='router')"}], ids=str
    )
    def test_a_dtype_that_is_asked_for_is_that_of_all_weights(self, chosen, checkpoint):
        for backbone in (checkpoint, dict(BACKBONES["llama"])):
            model = AdaptiveLM(AdaptiveConfig(backbone=backbone, dtype="bfloat16", **chosen))
            assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
            assert model(ids(1, 4)).logits.dtype == torch.bfloat16

    def test_an_unknown_dtype_is_refused(self):
        with pytest.raises(UserError, match="did you mean 'bfloat16'"):
            AdaptiveConfig(backbone=dict(BACKBONES["llama"]), dtype="bfloat")


def test_transformers_finds_the_architecture_that_a_config_names(tmp_path):
    import transformers

    build().save_pretrained(tmp_path)
    found = getattr(transformers, AutoConfig.from_pretrained(tmp_path).architectures[0])
    assert found is pondera.AdaptiveLM


class TestEmbeddings:
    @pytest.mark.parametrize("backbone", ["llama", "gemma3", "gpt2", "gpt_neox"])
    @pytest.mark.parametrize("tied", [False, True])
    def test_whoever_asks_the_embedding_gets_what_the_layers_get(self, backbone, tied, tmp_path):
        torch.manual_seed(0)
        tree = dict(BACKBONES[backbone], tie_word_embeddings=tied)
        model, x = AdaptiveLM(AdaptiveConfig(backbone=tree, init="scaled")).eval(), ids(2, 7)
        assert model.config.embed_scale != 1
        right = model(x).logits
        assert torch.equal(model(inputs_embeds=model.get_input_embeddings()(x)).logits, right)
        model.backbone.lm.save_pretrained(tmp_path / "alone")
        alone = AutoModelForCausalLM.from_pretrained(tmp_path / "alone").eval()
        assert "pondera" not in type(alone).__module__
        torch.testing.assert_close(alone(x).logits, right, atol=1e-4, rtol=1e-4)
        model.save_pretrained(tmp_path / "whole")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "whole").eval()
        assert torch.equal(again(x).logits, right)
        if tied:
            assert again.get_output_embeddings().weight is again.get_input_embeddings().weight

    @pytest.mark.parametrize("chosen", CHOSEN[:2], ids=str)
    def test_the_row_that_ends_texts_is_learnt_after_loading_as_before(self, chosen, tmp_path):
        fresh = build(**chosen).train()
        for config in (fresh.config, fresh.backbone.config):
            config.pad_token_id = config.eos_token_id = 0
        fresh.save_pretrained(tmp_path)
        x, grads = torch.tensor([[5, 6, 0, 7, 8, 0, 9]]), []
        for model in (fresh, AutoModelForCausalLM.from_pretrained(tmp_path).train()):
            model(x, labels=x).loss.backward()
            grads.append(model.get_input_embeddings().weight.grad)
        assert torch.equal(*grads) and grads[0][0].norm() > 0


def test_a_plain_backbone_knows_nothing_of_a_factor():
    assert type(build().get_input_embeddings()) is type(
        LlamaForCausalLM(build().config.backbone).get_input_embeddings()
    )
