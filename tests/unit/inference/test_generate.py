from __future__ import annotations

import pytest
import torch
from helpers import saved_models

from pondera.core.errors import UserError
from pondera.inference.generate import Stream, generate
from pondera.inference.load import Loaded, load

NAMES = list(saved_models.THINKS)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Loaded]:
    folder = tmp_path_factory.mktemp("models")
    return {name: load(saved_models.save(folder / name, name), device="cpu") for name in NAMES}


def no_end(found: Loaded, monkeypatch: pytest.MonkeyPatch) -> Loaded:
    """An untrained model that does not end its text by chance."""
    monkeypatch.setattr(found.model.generation_config, "eos_token_id", None)
    return found


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_streamed_text_is_the_text(name: str, temperature: float, loaded: dict[str, Loaded]):
    pieces: list[str] = []
    found = generate(loaded[name], "The 🙂 fox", 24, temperature, seed=3, on_text=pieces.append)
    assert "".join(pieces) == found.text
    assert "".join(found.tokens[: found.prompt_tokens]) == "The 🙂 fox"
    assert len(found.tokens) == len(found.passes) > found.prompt_tokens
    assert set(found.passes) == {1.0 if name == "plain" else 2.0}


@pytest.mark.parametrize("name", ["plain", "exact", "cot"])
def test_greedy_with_cache_is_the_uncached_argmax(name: str, loaded: dict[str, Loaded], monkeypatch):
    found = no_end(loaded[name], monkeypatch)
    ids = found.tokenizer.encode("The quick fox")
    count = len(ids)
    for _ in range(20):
        with torch.no_grad():
            ids.append(int(found.model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    written = generate(found, "The quick fox", 20, temperature=0)
    stream = Stream(found.tokenizer)
    stream.put(torch.tensor(ids))
    stream.end()
    assert len(set(ids[count:])) > 3, "the model must not repeat one token, or this shows nothing"
    assert written.tokens == stream.tokens and len(written.tokens) == count + 20


def test_seed_decides_and_leaves_the_global_state(loaded: dict[str, Loaded]):
    before = torch.get_rng_state()
    first, again, other = (generate(loaded["plain"], "The", 16, 1.0, seed=seed).tokens for seed in (1, 1, 2))
    assert first == again != other
    assert torch.equal(torch.get_rng_state(), before)


def test_sampling_settings_matter(loaded: dict[str, Loaded]):
    greedy = generate(loaded["plain"], "The", 16, 0).tokens
    assert generate(loaded["plain"], "The", 16, 1.0, top_p=1e-6, seed=5).tokens == greedy
    assert generate(loaded["plain"], "The", 16, 0.01, seed=5).tokens == greedy
    assert generate(loaded["plain"], "The", 16, 100.0, seed=5).tokens != greedy
    # Close to chance, almost every first token comes up: nothing but top_p may cut the vocabulary.
    assert len({generate(loaded["plain"], "", 1, 100.0, seed=seed).text for seed in range(150)}) > 50


def test_stops_where_the_text_ends(loaded: dict[str, Loaded], monkeypatch):
    found = no_end(loaded["exact"], monkeypatch)
    prompt = found.tokenizer.encode("The")
    out = found.model.generate(torch.tensor([prompt]), max_new_tokens=4, do_sample=False)  # pyright: ignore
    end = int(out[0, -1])
    first = out[0, len(prompt) :].tolist().index(end) + 1
    monkeypatch.setattr(found.model.generation_config, "eos_token_id", end)
    written = generate(found, "The", 30, temperature=0)
    assert len(written.tokens) == len(written.passes) == len(prompt) + first


def test_empty_prompt_starts_a_text(loaded: dict[str, Loaded]):
    found = generate(loaded["cot"], "", 5, 0)
    assert found.prompt_tokens == 1 and found.tokens[0] == loaded["cot"].tokenizer.bos_token
    assert loaded["cot"].tokenizer.bos_token not in found.text


def test_only_whole_characters_are_told(loaded: dict[str, Loaded]):
    tokenizer = loaded["plain"].tokenizer
    text = "a日🙂é b"
    ids = tokenizer.encode(text)
    assert len(ids) > len(text), "these characters must be spelled by several tokens"
    pieces: list[str] = []
    stream = Stream(tokenizer, pieces.append)
    stream.put(torch.tensor([tokenizer.bos_token_id]))
    for token in [*ids, tokenizer.eos_token_id]:
        stream.put(torch.tensor([token]))
    stream.end()
    assert "".join(pieces) == stream.text == text
    assert all(piece and "\ufffd" not in piece for piece in pieces)
    assert "".join(stream.tokens) == f"{tokenizer.bos_token}{text}{tokenizer.eos_token}"
    assert len(stream.tokens) == len(ids) + 2


def test_torn_last_character_is_told_at_the_end(loaded: dict[str, Loaded]):
    tokenizer = loaded["plain"].tokenizer
    pieces: list[str] = []
    stream = Stream(tokenizer, pieces.append)
    stream.put(torch.tensor(tokenizer.encode("a")))
    for token in tokenizer.encode("b🙂")[:-1]:
        stream.put(torch.tensor([token]))
    assert "".join(pieces) == "b"
    stream.end()
    assert stream.text == "".join(pieces) == "b\ufffd"
    assert "".join(stream.tokens) == "ab\ufffd"


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"temperature": -0.1}, "temperature=-0.1"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": 1e-9}, "0.01"),
        ({"temperature": float("inf")}, "100"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": 1.01}, "top_p=1.01"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_settings_out_of_range(settings: dict, complaint: str):
    with pytest.raises(UserError, match=complaint):  # before any model is looked for
        generate("no/such/model/anywhere", "The", **settings)


def test_room_for_the_text(loaded: dict[str, Loaded]):
    prompt = "fox " * 10
    size = len(loaded["plain"].tokenizer.encode(prompt))
    generate(loaded["plain"], prompt, 96 - size, 0)
    with pytest.raises(UserError, match=f"{size} tokens.* 97, more than the 96 positions.*max_new_tokens={96 - size}"):
        generate(loaded["plain"], prompt, 97 - size, 0)
    with pytest.raises(UserError, match="shorten the prompt"):
        generate(loaded["plain"], "fox " * 60, 1, 0)


def test_prompt_that_is_not_text(loaded: dict[str, Loaded]):
    with pytest.raises(UserError, match="prompt"):
        generate(loaded["plain"], "a\ud800", 1)
