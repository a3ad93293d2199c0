"""ConceptLM against its slow definition: the eight checks of its paper's rules, leakage first, then retrofit and errors."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from helpers.architectures import BACKBONES, VOCAB, ids
from helpers.fresh_process import copies
from torch.nn import functional as F

from pondera import AdaptiveConfig, AdaptiveLM, UserError
from pondera.core import spec
from pondera.methods.chunk.common.chunks import Chunks, behind

SPEC = "ConceptLM(chunk={chunk}, codes=8, segments=4, merge='{merge}')"
MERGES = ("raw_logits", "softmax", "hard")


@copies
def build(chunk: str = SPEC.format(chunk=3, merge="raw_logits"), backbone: str = "llama", **more) -> AdaptiveLM:
    """A model whose codebooks have seen a batch, and whose concepts move what comes out."""
    torch.manual_seed(0)
    tree = copy.deepcopy(BACKBONES[backbone]) | more
    model = AdaptiveLM(AdaptiveConfig(backbone=tree, chunk=chunk))
    with torch.no_grad():
        model(ids(2, 16), labels=ids(2, 16))
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.3) if "heads" in name else parameter.mul_(1.5)
    return model.eval()


@pytest.fixture(scope="module")
def model() -> AdaptiveLM:
    return build()


# 2 of the note, and first here: no token sees what comes after it.


@pytest.mark.parametrize("merge", MERGES)
@pytest.mark.parametrize("chunk", [1, 2, 3, 4])
def test_changing_a_token_changes_no_bit_before_it(chunk: int, merge: str):
    model, x = build(SPEC.format(chunk=chunk, merge=merge)), ids(2, 11)
    before = model(x).logits
    for changed in range(11):
        other = x.clone()
        other[:, changed] = (other[:, changed] + 1) % VOCAB
        after = model(other).logits
        assert torch.equal(before[:, :changed], after[:, :changed]), changed
        assert not torch.equal(before[:, changed], after[:, changed])


def test_no_gradient_reaches_a_later_token(model: AdaptiveLM):
    h_BTD = model.backbone.embed(ids(1, 10)).detach().requires_grad_()
    logits_TV = model(inputs_embeds=h_BTD).logits[0]
    for position in range(10):
        (gradient,) = torch.autograd.grad(logits_TV[position].square().sum(), h_BTD, retain_graph=True)
        moved = gradient[0].abs().amax(-1) > 0
        assert moved[: position + 1].all() and not moved[position + 1 :].any()


def test_these_checks_would_notice_a_concept_that_is_used_one_token_early(monkeypatch):
    spread = Chunks.spread

    def early(self: Chunks, concept_BMD, before_BD=None):
        used_BTD = spread(self, concept_BMD, before_BD)
        return torch.cat([used_BTD[:, 1:], used_BTD[:, -1:]], dim=1)

    monkeypatch.setattr(Chunks, "spread", early)
    model, x = build(), ids(1, 11)
    before, leaks = model(x).logits, []
    for changed in range(11):
        other = x.clone()
        other[:, changed] = (other[:, changed] + 1) % VOCAB
        leaks.append(not torch.equal(before[:, :changed], model(other).logits[:, :changed]))
    # Only the last token of a chunk gives itself away, to the one token before it.
    assert leaks == [changed % 3 == 2 for changed in range(11)]


# 1: the index rule


@pytest.mark.parametrize("size", range(1, 6))
def test_the_index_rule_is_prepend_repeat_drop(size: int):
    for tokens in range(1, 4 * size + 1):
        chunks = Chunks.of(size, 1, tokens)
        concept_1MD = torch.randn(1, tokens // size, 2, generator=torch.Generator().manual_seed(tokens))
        slow = torch.cat([torch.zeros(1, 1, 2), concept_1MD], dim=1).repeat_interleave(size, dim=1)[:, 1 : tokens + 1]
        assert torch.equal(chunks.spread(concept_1MD), slow)
        for position in range(tokens):
            number = (position + 1) // size - 1
            expected = torch.zeros(2) if number < 0 else concept_1MD[0, number]
            assert torch.equal(chunks.spread(concept_1MD)[0, position], expected)


@pytest.mark.parametrize("how", ["mean", "first", "last"])
def test_chunks_are_pooled_text_by_text(how: str):
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 2, 2, 3, 3, 3], [0, 0, 0, 0, 0, 0, 0, 1]])
    h_BTD = torch.randn(3, 8, 4)
    chunks = Chunks.of(2, 3, 8, mask)
    slow = {"mean": lambda rows: rows.mean(0), "first": lambda rows: rows[0], "last": lambda rows: rows[1]}[how]
    starts = [[2, 4, 6], [0, 3, 5], []]  # of what is complete within each document
    pooled = chunks.pool(behind(None, h_BTD, 1), how)
    assert chunks.valid_BM.tolist() == [[True] * 3, [True] * 3, [False] * 3]
    assert chunks.document_BM[:2].tolist() == [[1, 1, 1], [1, 2, 3]]
    assert chunks.follows_BM.tolist() == [[True, True], [False, False], [False, False]]
    for row, begins in enumerate(starts):
        for place, start in enumerate(begins):
            torch.testing.assert_close(pooled[row, place], slow(h_BTD[row, start : start + 2]))


# 3: the tail


def test_tokens_of_an_incomplete_chunk_influence_no_concept(model: AdaptiveLM):
    x = ids(1, 11)  # three chunks of three, and two tokens
    other = x.clone()
    other[:, 9:] = (other[:, 9:] + 1) % VOCAB
    one, two = model.new_cache(), model.new_cache()
    model(x, past_key_values=one)
    model(other, past_key_values=two)
    assert torch.equal(one.used_BWD, two.used_BWD)
    pairs = zip(one.concepts.layers, two.concepts.layers, strict=True)
    assert all(torch.equal(a.parts[0][0], b.parts[0][0]) for a, b in pairs)
    assert one.concepts.width(0) == 3
    model.train()
    terms = [model(text, shift_labels=text).terms for text in (x, other)]
    model.eval()
    for name in ("concept", "vq_codebook", "vq_commitment"):
        assert torch.equal(terms[0][name].sum, terms[1][name].sum)
    assert terms[0]["concept"].count == 2 * 64 and terms[0]["vq_codebook"].count == 3 * 64


# 4: cached decoding


@pytest.mark.parametrize("chunk", [2, 3, 4])
def test_cached_decoding_equals_the_full_forward_for_every_prompt(chunk: int):
    model, x = build(SPEC.format(chunk=chunk, merge="raw_logits")), ids(2, 12)
    with torch.no_grad():
        whole = model(x).logits
        for prompt in range(1, 2 * chunk + 1):
            for piece in (1, 2, chunk, 5):
                cache = model.new_cache()
                found = [model(x[:, :prompt], past_key_values=cache).logits]
                found += [model(rows, past_key_values=cache).logits for rows in x[:, prompt:].split(piece, dim=1)]
                torch.testing.assert_close(torch.cat(found, 1), whole, atol=1e-5, rtol=1e-5)
                assert cache.concepts.width(0) == 12 // chunk


def test_only_texts_that_complete_a_chunk_run_the_concept_module(model: AdaptiveLM, monkeypatch):
    x, mask = ids(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[1, 0] = 0  # its chunks end one token later
    ran, step = [], model.chunk.module.step

    def count(h_BSD, *args):
        ran.append(h_BSD.shape[0] * h_BSD.shape[1])
        return step(h_BSD, *args)

    monkeypatch.setattr(model.chunk.module, "step", count)
    cache = model.new_cache()
    for t in range(9):
        model(x[:, t : t + 1], attention_mask=mask[:, : t + 1], past_key_values=cache)
    assert ran == [1, 1, 1, 1, 1]  # the first text at tokens 2, 5 and 8, the second at 3 and 6


def test_further_back_than_what_is_kept_is_refused(model: AdaptiveLM):
    cache = model.new_cache()
    with torch.no_grad():
        model(ids(1, 40), past_key_values=cache)
        cache.crop(-40)  # the last call can be taken back whole
        assert cache.tokens == 0
        for t in range(50):
            model(ids(1, 1, seed=t), past_key_values=cache)
        cache.crop(-32)
        with pytest.raises(UserError, match="crop: cannot roll back 1 tokens.*kept for 0"):
            cache.crop(-1)


# 5: gradients


def gradients(model: AdaptiveLM, term: str) -> dict[str, float]:
    """The largest gradient that a loss term gives each part."""
    model.train().zero_grad()
    x = ids(2, 12)
    model(x, labels=x).terms[term].sum.backward()
    model.eval()
    parts = {
        "encoder": "backbone.lm.model.layers.0",
        "decoder": "backbone.lm.model.layers.2",
        "module": "chunk.module",
    }
    parts |= {"codebooks": "chunk.quantizer", "heads": "chunk.heads"}
    return {
        part: max(
            float(p.grad.abs().max()) if p.grad is not None else 0.0
            for name, p in model.named_parameters()
            if name.startswith(start)
        )
        for part, start in parts.items()
    }


def test_the_quantizer_s_losses_move_codebooks_only():
    model, x = build(), ids(2, 12)
    found = gradients(model, "vq_codebook")
    assert found.pop("codebooks") > 0 and not any(found.values())
    # What would draw vectors to codes has none to draw; it stays as something to watch.
    assert not model.train()(x, labels=x).terms["vq_commitment"].sum.requires_grad


@pytest.mark.parametrize("merge", MERGES)
def test_where_the_other_losses_go(merge: str):
    model = build(SPEC.format(chunk=3, merge=merge))
    reached = {part: value > 0 for part, value in gradients(model, "next_token").items()}
    path = merge != "hard"  # the best code's row has no gradient to give
    assert reached == {"encoder": True, "decoder": True, "module": path, "heads": path, "codebooks": path}
    reached = {part: value > 0 for part, value in gradients(model, "concept").items()}
    assert reached == {"encoder": True, "decoder": False, "module": True, "heads": True, "codebooks": path}


def test_the_concept_loss_is_the_squared_error_against_what_came_without_gradient_to_it():
    model, x = build(), ids(2, 11)
    chunk, found = model.chunk, {}
    pool = Chunks.pool

    def noted(self, *args):
        found["pooled"] = pool(self, *args)
        found["pooled"].retain_grad()
        return found["pooled"]

    def merged(*args):
        found["concepts"] = type(chunk)._merged(chunk, *args)
        return found["concepts"]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Chunks, "pool", noted)
        patch.setattr(chunk, "_merged", merged)
        term = model(x, labels=x).terms["concept"]
    expected = F.mse_loss(found["concepts"][:, :2], found["pooled"][:, 1:3].detach(), reduction="sum")
    torch.testing.assert_close(term.sum, expected)
    assert term.count == 2 * 2 * 64
    term.sum.backward()
    assert found["pooled"].grad[:, :2].abs().max() > 0  # what predicts learns,
    assert not found["pooled"].grad[:, 2].any()  # what is only predicted does not


def test_hard_heads_learn_by_cross_entropy_to_the_codes_that_came():
    model, x = build(SPEC.format(chunk=3, merge="hard")), ids(2, 11)
    model.chunk.record = True
    out = model(x, labels=x)
    codes_BMGR, scores = out.trace["concepts"], {}
    model.chunk.heads.register_forward_hook(lambda *call: scores.update(found=call[-1]))
    model(x)
    scores_BMGRK = scores["found"].unflatten(-1, (4, 1, 8))
    expected = F.cross_entropy(scores_BMGRK[:, :2].flatten(0, -2), codes_BMGR[:, 1:].flatten(), reduction="sum")
    torch.testing.assert_close(out.terms["concept"].sum, expected)
    assert out.terms["concept"].count == 2 * 2 * 4


# 6: from scores to concepts


def test_scores_become_vectors(model: AdaptiveLM):
    chunk = model.chunk
    quantizer, table_GRKC = chunk.quantizer, chunk.quantizer.table()
    code_NGR = torch.randint(8, (5, 4, 1), generator=torch.Generator().manual_seed(0))
    one_hot = F.one_hot(code_NGR, 8).float()
    slow = torch.stack([torch.cat([table_GRKC[g, 0, code[g, 0]] for g in range(4)]) for code in code_NGR])
    torch.testing.assert_close(chunk._merged(one_hot, quantizer), slow)
    a, b = torch.randn(2, 5, 4, 1, 8)
    both = chunk._merged(2 * a - 3 * b, quantizer)
    torch.testing.assert_close(both, 2 * chunk._merged(a, quantizer) - 3 * chunk._merged(b, quantizer))
    hard = build(SPEC.format(chunk=3, merge="hard")).chunk
    torch.testing.assert_close(hard._merged(100 * one_hot, quantizer), slow)
    soft = build(SPEC.format(chunk=3, merge="softmax")).chunk
    torch.testing.assert_close(soft._merged(100 * one_hot, quantizer), slow)


# 7: without concepts


@pytest.mark.parametrize("backbone", ["llama", "gemma3", "gpt_neox", "gpt2", "qwen3"])
def test_zero_concepts_are_the_plain_model_bit_for_bit(backbone: str):
    torch.manual_seed(0)
    model = AdaptiveLM(AdaptiveConfig(backbone=copy.deepcopy(BACKBONES[backbone]), chunk="ConceptLM(segments=4)"))
    model.eval()  # heads as they start: all scores are zero
    plain = AdaptiveLM(AdaptiveConfig(backbone=copy.deepcopy(BACKBONES[backbone]))).eval()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("chunk.")})
    assert torch.equal(model(ids(2, 13)).logits, plain(ids(2, 13)).logits)
    assert torch.equal(model(ids(2, 13), effort=0).logits, plain(ids(2, 13)).logits)


# 8: codes


def test_codes_are_in_range_and_segments_are_cut_and_joined_without_loss(model: AdaptiveLM):
    model.chunk.record = True
    trace = model(ids(2, 11)).trace
    model.chunk.record = False
    for name in ("concepts", "predicted"):
        assert trace[name].shape == (2, 3, 4, 1)
        assert int(trace[name].min()) >= 0 and int(trace[name].max()) < 8
    assert trace["ends"].tolist() == [[2, 5, 8]] * 2
    x_NGC, table_GRKC = trace["quantized"]
    assert x_NGC.shape == (6, 4, 16) and table_GRKC.shape == (4, 1, 8, 16)
    distance_NGK = (x_NGC[:, :, None] - table_GRKC[:, 0]).square().sum(-1)
    assert torch.equal(distance_NGK.argmin(-1), trace["concepts"].flatten(0, 1).squeeze(-1))
    vectors = torch.randn(7, 64)
    assert torch.equal(model.chunk.quantizer._join(vectors.unflatten(-1, (4, 16))), vectors)


# Beside the note


def test_codebooks_learn_in_training_only():
    model, x = build(), ids(2, 12)
    assert set(model(x, labels=x).terms) == {"next_token", "concept"}
    out = model.train()(x, labels=x)
    assert set(out.terms) == {"next_token", "concept", "vq_codebook", "vq_commitment"}
    parts = [term.weight * term.sum / term.count for term in out.terms.values()]
    torch.testing.assert_close(out.loss, torch.stack(parts).sum())


def test_weights_of_losses():
    model, x = build("ConceptLM(chunk=3, codes=8, segments=4, ncp_weight=0.0, vq_weight=0.5)").train(), ids(2, 12)
    weights = {name: term.weight for name, term in model(x, labels=x).terms.items()}
    assert weights == {"next_token": 1.0, "concept": 0.0, "vq_codebook": 0.5, "vq_commitment": 0.125}


def test_rotary_positions_of_concepts_are_those_of_their_first_tokens(model: AdaptiveLM, monkeypatch):
    seen, step = [], model.chunk.module.step

    def note(h_BSD, cache, mask, position_ids, *rest):
        seen.append(position_ids.tolist())
        return step(h_BSD, cache, mask, position_ids, *rest)

    monkeypatch.setattr(model.chunk.module, "step", note)
    model(ids(1, 11))
    cache = model.new_cache()
    model(ids(1, 5), past_key_values=cache)
    model(ids(1, 6), past_key_values=cache)
    assert seen == [[[0, 3, 6]], [[0]], [[3, 6]]]


def test_a_checkpoint_begins_as_it_was_and_brings_what_both_have(tmp_path):
    torch.manual_seed(0)
    plain = AdaptiveLM(AdaptiveConfig(backbone=dict(BACKBONES["llama"]), init="scaled")).eval()
    plain.save_pretrained(tmp_path / "plain")
    chunk = SPEC.format(chunk=3, merge="raw_logits")
    model = AdaptiveLM(AdaptiveConfig(backbone=str(tmp_path / "plain"), chunk=chunk)).eval()
    x = ids(2, 10)
    assert torch.equal(model(x).logits, plain(x).logits)
    trained = build()
    trained.save_pretrained(tmp_path / "trained")
    again = AdaptiveLM(AdaptiveConfig(backbone=str(tmp_path / "trained"), chunk=chunk)).eval()
    assert torch.equal(again(x).logits, trained(x).logits)


def test_it_learns():
    """A text of repeated phrases: concepts become predictable, and every loss falls."""
    torch.manual_seed(0)
    model = AdaptiveLM(
        AdaptiveConfig(backbone=dict(BACKBONES["llama"]), chunk=SPEC.format(chunk=3, merge="raw_logits"))
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    x = ids(4, 6).repeat(1, 4)
    losses = []
    for step in range(25):
        model.begin_step(step, 0)
        out = model(x, labels=x)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        losses.append({name: float(term.mean().detach()) for name, term in out.terms.items()})
    assert losses[-1]["next_token"] < 0.5 * losses[0]["next_token"]
    model.eval()
    assert model(x, labels=x).terms["next_token"].sum < model(x, labels=x, effort=0).terms["next_token"].sum


@pytest.mark.parametrize(
    ("chunk", "message"),
    [
        ("ConceptLM(chunk=0)", "chunk=0: give 1 or more"),
        ("ConceptLM(segments=5)", "segments=5: does not divide the width 64; the nearest divisors: 4, 8"),
        ("ConceptLM(segments=4, encoder_layers=3)", "encoder_layers=3: the backbone has 3 layers.*give 1 to 2"),
        ("ConceptLM(segments=4, encoder_layers=0)", "encoder_layers=0"),
        ("ConceptLM(concept_layers=0)", "concept_layers=0"),
        ("ConceptLM(merge='raw')", "merge.*raw_logits"),
        ("ConceptLM(pooling='median')", "pooling.*mean"),
        ("ConceptLM(vq_weight=-1.0)", "vq_weight=-1.0"),
        ("ConceptLM(quantizer=Identity())", "Identity.*use VQ"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_would(chunk: str, message: str):
    with pytest.raises(UserError, match=message):
        AdaptiveLM(AdaptiveConfig(backbone=dict(BACKBONES["llama"]), chunk=chunk))


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    torch.manual_seed(0)
    yield


@pytest.mark.parametrize(
    ("spec_text", "said"),
    [
        ("ConceptLM(codes=1)", "2 or more"),
        ("ConceptLM(quantizer=H2O(3))", "quantizer"),
        ("ConceptLM(quantizer=3)", "quantizer"),
        ("ConceptLM(quantizer=PonderLM2())", "quantizer"),
    ],
)
def test_what_cannot_be_a_quantizer_is_refused(spec_text: str, said: str):
    with pytest.raises(UserError, match=said):
        spec.build(spec_text, "chunk")


def test_training_through_a_cache_is_refused_because_codebooks_get_no_gradient():
    model = AdaptiveLM(
        AdaptiveConfig(backbone=dict(BACKBONES["llama"]), chunk="ConceptLM(chunk=3, codes=8, segments=4)")
    )
    x = ids(2, 9)
    with pytest.raises(UserError, match="folded copy"):
        model.train()(x, labels=x, use_cache=True)
