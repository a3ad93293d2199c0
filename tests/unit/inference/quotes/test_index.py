"""The index: byte-exact quotes, changes without making it again, and refusals."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers import encoders

from pondera.core.errors import UserError
from pondera.inference.quotes.index import LIST, VECTORS, Quote, SpanIndex, is_index
from pondera.inference.quotes.words import K1, B, Words, words

TEXTS = {
    "sea.txt": "The sea is wide and cold. Ships cross it in nine days.\n\nThe harbour was built in 1893 by Ada Köhler.",
    "bread.md": "# Bread\n\nBread is baked from flour and water. It rises for hours.\n\n- salt: ten grams\n- yeast: one gram\n",
    "deep/海.txt": "海は広い。船が来る。 \U0001f600 An emoji takes four bytes. Ships cross it in nine days.",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, text in TEXTS.items():
        (tmp_path / "docs" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "docs" / name).write_bytes(text.encode())
    return tmp_path / "docs"


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(encoders.save(tmp_path_factory.mktemp("encoder")))


def made(*paths: Path, encoder: str = "words") -> SpanIndex:
    index = SpanIndex(encoder)
    index.add(paths)
    return index


def right(quote: Quote) -> bool:
    places = [(quote.file, quote.start, quote.end), *quote.also]
    return all(Path(file).read_bytes()[start:end] == quote.text.encode() for file, start, end in places)


def test_the_sentence_with_the_words_is_found(folder: Path):
    quote = made(folder).quotes("When was the harbour built?")[0]
    assert (
        quote.text == "The harbour was built in 1893 by Ada Köhler." and quote.file.endswith("sea.txt") and right(quote)
    )
    assert made(folder).quotes("船")[0].text == "船が来る。"


@pytest.mark.parametrize("kind", ["words", "encoder"])
def test_ten_thousand_prompts_never_give_anything_else_than_bytes_of_a_file(folder: Path, encoder: str, kind: str):
    index = made(folder, encoder=encoder if kind == "encoder" else kind)
    draw = random.Random(0)
    letters = "abc XYZ öß海船 0?.,\n\t\"'\\{}[]<|im_end|>\U0001f600"
    for _ in range(10_000 if kind == "words" else 200):
        prompt = "".join(draw.choices(letters, k=draw.randint(1, 40))) + "a"
        for quote in index.quotes(prompt, draw.randint(1, 3)):
            assert right(quote) and np.isfinite(quote.score)


def test_equal_texts_are_one_quote_with_all_places(folder: Path):
    found = made(folder).quotes("Ships cross it in nine days", 20)
    assert found[0].text == "Ships cross it in nine days." and len(found[0].also) == 1 and right(found[0])
    assert len({quote.text for quote in found}) == len(found)
    scores = [quote.score for quote in found]
    assert scores == sorted(scores, reverse=True)


def test_headings_are_no_answers(folder: Path):
    assert all("#" not in quote.text for quote in made(folder).quotes("Bread", 20))


def test_the_order_of_the_files_changes_nothing(folder: Path, encoder: str):
    files = [folder / name for name in TEXTS]
    found = [made(*order, encoder=encoder).quotes("How long does bread rise?", 9) for order in (files, files[::-1])]
    assert found[0] == found[1]


@pytest.mark.parametrize("kind", ["words", "encoder"])
def test_adding_and_dropping_equals_making_it_again(folder: Path, encoder: str, kind: str, tmp_path: Path):
    name = encoder if kind == "encoder" else kind
    index = made(folder / "sea.txt", encoder=name)
    index.add([folder / "bread.md", folder / "deep"])
    (folder / "sea.txt").write_text("The sea is narrow now. Nobody crosses it.")
    assert index.add([folder / "sea.txt", folder / "bread.md"])[0] == [str(folder / "sea.txt")]
    assert index.drop([folder / "deep"]) == [str(folder / "deep" / "海.txt")]
    index.save(tmp_path / "my.index")
    again = made(folder / "bread.md", folder / "sea.txt", encoder=name)
    for question in ("Is the sea narrow?", "How many grams of salt?"):
        for one, other in zip(
            SpanIndex.load(tmp_path / "my.index").quotes(question, 9), again.quotes(question, 9), strict=True
        ):
            assert (one.text, one.file, one.start, one.end) == (other.text, other.file, other.start, other.end)
            assert one.score == pytest.approx(other.score, abs=1e-2)


def test_an_index_is_the_same_after_loading(folder: Path, encoder: str, tmp_path: Path):
    index = made(folder, encoder=encoder)
    index.save(tmp_path / "a" / "my.index")
    index.save(tmp_path / "a" / "my.index")  # in place of the first one
    assert is_index(tmp_path / "a" / "my.index") and [path.name for path in (tmp_path / "a").iterdir()] == ["my.index"]
    assert SpanIndex.load(tmp_path / "a" / "my.index").quotes("salt", 9) == index.quotes("salt", 9)


def test_bm25_is_the_formula():
    texts = ["a b b c", "b c d e f", "x y", "a a a b"]
    found = Words(texts).scores("a b unknown B")
    for number, text in enumerate(texts):
        total = 0.0
        for word in ("a", "b"):
            count, having = words(text).count(word), sum(word in words(other) for other in texts)
            rarity = np.log(1 + (len(texts) - having + 0.5) / (having + 0.5))
            length = len(words(text)) / np.mean([len(words(other)) for other in texts])
            total += rarity * count * (K1 + 1) / (count + K1 * (1 - B + B * length))
        assert found[number] == pytest.approx(total)


def test_a_changed_file_is_refused_until_it_is_added_or_dropped(folder: Path, tmp_path: Path):
    made(folder).save(tmp_path / "my.index")
    (folder / "sea.txt").write_text("Another text.")
    with pytest.raises(UserError, match=r"sea\.txt: it has changed since .*my\.index was made.*--add .*or --drop"):
        SpanIndex.load(tmp_path / "my.index")
    index = SpanIndex.load(tmp_path / "my.index", changed=True)
    index.add([folder / "bread.md"])
    with pytest.raises(UserError, match="it has changed"):
        index.save(tmp_path / "my.index")
    index.add([folder / "sea.txt"])
    index.save(tmp_path / "my.index")
    assert SpanIndex.load(tmp_path / "my.index").quotes("another")[0].text == "Another text."
    (folder / "sea.txt").unlink()
    with pytest.raises(UserError, match=r"sea\.txt: cannot be read now \(No such file.*--drop"):
        SpanIndex.load(tmp_path / "my.index")
    index = SpanIndex.load(tmp_path / "my.index", changed=True)
    index.drop([folder / "sea.txt"])
    index.save(tmp_path / "my.index")
    assert len(SpanIndex.load(tmp_path / "my.index").files) == 2


def test_files_without_text_are_skipped_by_name(folder: Path):
    (folder / "empty.txt").touch()
    (folder / "binary.bin").write_bytes(b"\x00\x01")
    (folder / "latin.txt").write_bytes("Köhler".encode("latin-1"))
    (folder / "heads.md").write_text("# One\n\n## Two\n")
    (folder / ".hidden").write_text("Secret.")
    index = SpanIndex("words")
    new, skipped = index.add([folder])
    assert len(new) == len(TEXTS)
    assert {Path(path).name: reason for path, reason in skipped.items()} == {
        "empty.txt": "empty",
        "binary.bin": "not UTF-8 text",
        "latin.txt": "not UTF-8 text",
        "heads.md": "headings only",
    }
    assert all("Secret" not in quote.text for quote in index.quotes("secret", 50))


def test_what_cannot_be_answered_is_refused(folder: Path, tmp_path: Path, encoder: str):
    index = made(folder)
    with pytest.raises(UserError, match="no such file or folder: 'nowhere'"):
        index.add(["nowhere"])
    with pytest.raises(UserError, match=r"--drop: the index has no file 'sea'; it has .*and|bread"):
        index.drop(["sea"])
    with pytest.raises(UserError, match="at least one letter or digit"):
        index.quotes(" ?! ")
    with pytest.raises(UserError, match="--quotes 0: give 1 or more"):
        index.quotes("a", 0)
    index.drop([folder])
    with pytest.raises(UserError, match="the index is empty; add files"):
        index.quotes("a")
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match=r"no text to index in .*no files in it"):
        SpanIndex("words").add([tmp_path / "none"])
    with pytest.raises(UserError, match="is not an index; make one with: pondera index"):
        SpanIndex.load(tmp_path / "none")
    with pytest.raises(UserError, match=r"--encoder .*nothing: cannot be loaded"):
        made(folder, encoder=str(tmp_path / "nothing"))
    (tmp_path / "pooled").mkdir()
    shutil.copytree(encoder, tmp_path / "pooled", dirs_exist_ok=True)
    (tmp_path / "pooled" / "1_Pooling").mkdir()
    (tmp_path / "pooled" / "1_Pooling" / "config.json").write_text('{"pooling_mode_max_tokens": true}')
    with pytest.raises(UserError, match="pooling pooling_mode_max_tokens is not supported"):
        made(folder, encoder=str(tmp_path / "pooled"))


@pytest.mark.parametrize("damage", ["json", "format", "vectors", "fewer", "types"])
def test_a_damaged_index_is_refused(folder: Path, encoder: str, tmp_path: Path, damage: str):
    made(folder, encoder=encoder).save(tmp_path / "my.index")
    listed, vectors = tmp_path / "my.index" / LIST, tmp_path / "my.index" / VECTORS
    tree = json.loads(listed.read_text())
    if damage == "json":
        listed.write_text("{")
    elif damage == "format":
        listed.write_text(json.dumps(tree | {"format": 99}))
    elif damage == "vectors":
        vectors.write_bytes(vectors.read_bytes()[:40])
    elif damage == "fewer":
        listed.write_text(json.dumps(tree | {"files": tree["files"][::-1]}))
    else:
        listed.write_text(json.dumps(tree | {"files": 3}))
    with pytest.raises(UserError, match="make the index again"):
        SpanIndex.load(tmp_path / "my.index")


def test_another_encoder_of_that_name_is_refused(folder: Path, tmp_path: Path):
    name = encoders.save(tmp_path / "encoder")
    made(folder, encoder=str(name)).save(tmp_path / "my.index")
    shutil.rmtree(name)
    encoders.save(tmp_path / "encoder", 24)
    with pytest.raises(UserError, match="the encoder gives 24 numbers and the index has 16"):
        SpanIndex.load(tmp_path / "my.index").quotes("salt")


def test_an_encoder_takes_the_mean_or_the_first_token_and_ignores_padding(encoder: str, tmp_path: Path):
    from transformers import AutoModel, AutoTokenizer

    from pondera.inference.quotes.encoder import Encoder

    texts = ["The fox.", "The quick brown fox jumps over the lazy dog. " * 3, "x" * 500]
    model, tokens = AutoModel.from_pretrained(encoder), AutoTokenizer.from_pretrained(encoder)
    first = tmp_path / "first"
    shutil.copytree(encoder, first)
    (first / "1_Pooling").mkdir()
    (first / "1_Pooling" / "config.json").write_text(
        '{"pooling_mode_cls_token": true, "pooling_mode_mean_tokens": false}'
    )
    means, firsts = Encoder(encoder).encode(texts), Encoder(str(first)).encode(texts)
    for number, text in enumerate(texts):
        states = model(**tokens(text, truncation=True, max_length=64, return_tensors="pt")).last_hidden_state[0]
        for found, state in ((means, states.mean(0)), (firsts, states[0])):
            assert np.allclose(found[number], (state / state.norm()).detach().numpy(), atol=2e-3)
    assert Encoder(encoder).encode([]).shape == (0, 16)
