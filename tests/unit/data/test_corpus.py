"""The corpus: the split, the bins, the windows and the bytes per token."""

import pickle
import string

import numpy as np
import pytest
from helpers.stories import documents_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pondera.data.corpus as data
from pondera.core.errors import UserError
from pondera.core.run_config import DataConfig
from pondera.data.corpus import Windows, prepare
from pondera.data.text import Document, Source
from pondera.data.tokenizer import bytes_before, encode

# the corpus


def test_every_document_is_in_exactly_one_split_word_for_word(corpus, folder):
    tokenizer = corpus.tokenizer()
    train, validation = (documents_of(split, tokenizer) for split in (corpus.train, corpus.validation))
    assert train and validation and not train.keys() & validation.keys()
    assert train | validation == {
        p.relative_to(folder).as_posix(): p.read_text("utf-8") for p in folder.glob("shelf*/*.txt")
    }
    assert corpus.skipped == {"hidden": 1, "binary, or not UTF-8": 1, "empty": 1}


def test_bytes_are_those_of_the_text(corpus, folder):
    total = sum(path.stat().st_size for path in folder.glob("shelf*/*.txt"))
    assert corpus.train.num_bytes + corpus.validation.num_bytes == total
    for split in (corpus.train, corpus.validation):
        assert split.num_bytes_of(0, split.num_tokens) == split.num_bytes
        eos = int(np.flatnonzero(split.ids == corpus.tokenizer().eos_token_id)[0])
        assert split.num_bytes_of(eos, eos + 1) == 0
        assert split.num_bytes_of(0, eos) == (folder / split.document_at(eos)).stat().st_size
        cuts = [0, 3, 3, 50, 51, split.num_tokens]
        assert sum(split.num_bytes_of(a, b) for a, b in zip(cuts, cuts[1:], strict=False)) == split.num_bytes


@pytest.mark.parametrize("bounds", [(-1, 3), (4, 3), (0, 10**9)])
def test_ranges_outside_the_split_are_refused(corpus, bounds):
    with pytest.raises(IndexError):
        corpus.train.num_bytes_of(*bounds)
    with pytest.raises(IndexError):
        corpus.train.document_at(corpus.train.num_tokens)


def test_the_tokenizer_folder_loads_and_fits_the_bins(corpus):
    tokenizer = corpus.tokenizer()
    assert corpus.vocab_size == len(tokenizer) == 300
    assert tokenizer.eos_token == tokenizer.pad_token == "<|endoftext|>"
    assert corpus.train.ids.dtype == np.uint16 and corpus.train.ids.max() < corpus.vocab_size
    assert isinstance(corpus.train.ids, np.memmap)


def test_text_that_spells_eos_ends_no_document(tokenizer):
    ((ids, ends),) = encode(["a<|endoftext|>b"], tokenizer)
    assert tokenizer.eos_token_id not in ids and ends[-1] == 15


@pytest.mark.parametrize("size, dtype", [(300, np.uint16), (70_000, np.uint32)])
def test_ids_take_the_smallest_type_that_holds_them(size, dtype, tokenizer, folder, cache, tmp_path):
    grown = pickle.loads(pickle.dumps(tokenizer))
    grown.add_tokens([f"<extra{number}>" for number in range(size - len(grown))])
    grown.save_pretrained(tmp_path / "tokenizer")
    corpus = prepare(DataConfig(text=str(folder), tokenizer=str(tmp_path / "tokenizer"), context=8), cache)
    assert corpus.train.ids.dtype == dtype and corpus.vocab_size == size


# the split


def divide(names: list[str], validation: float = 0.05, max_bytes: int | None = None) -> tuple[list[str], list[str]]:
    source = Source("names", "", lambda: iter(Document(name, name) for name in names))
    train, held_out, _ = data._divide(source, DataConfig(validation=validation, max_bytes=max_bytes))
    return [names[row] for row in train], [names[row] for row in held_out]


def test_the_held_out_documents_are_the_same_on_every_machine():
    assert sorted(divide([f"doc{number}" for number in range(60)])[1]) == ["doc38"]


@given(st.sets(st.text(string.ascii_letters, min_size=1), min_size=2), st.floats(0.01, 0.99), st.randoms())
def test_no_document_leaks_and_no_side_is_empty(names, share, rng):
    names = sorted(names)
    train, held_out = divide(names, share)
    assert train and held_out and sorted(train + held_out) == names
    rng.shuffle(names)
    assert divide(names, share) == (train, held_out)


@given(st.integers(1, 400))
def test_max_bytes_takes_whole_documents_and_spares_the_held_out(limit):
    names = [f"d{'x' * (number % 7)}{number:02}" for number in range(50)]
    train, held_out = divide(names)
    if limit < min(map(len, train)):
        with pytest.raises(UserError, match=f"at least {min(map(len, train))}"):
            divide(names, max_bytes=limit)
        return
    some, same = divide(names, max_bytes=limit)
    assert same == held_out and some == [name for name in train if name in some]
    assert sum(map(len, some)) <= limit
    assert all(sum(map(len, some)) + len(name) > limit for name in train if name not in some)


def test_max_bytes_is_not_the_start_of_the_alphabet():
    names = [f"{letter}{number}" for letter in string.ascii_lowercase for number in range(10)]
    assert len({name[0] for name in divide(names, max_bytes=80)[0]}) > 15


# windows


@pytest.mark.parametrize("context", [1, 7, 16])
def test_windows_predict_every_token_once(corpus, context):
    split = corpus.validation
    windows = split.windows(context)
    assert len(windows) == (split.num_tokens - 1) // context
    items = [windows[index] for index in range(len(windows))]
    used = len(windows) * context
    assert np.array_equal(np.concatenate([item["input_ids"] for item in items]), split.ids[:used])
    assert np.array_equal(np.concatenate([item["targets"] for item in items]), split.ids[1 : used + 1])
    assert [int(item["index"]) for item in items] == list(range(len(windows)))
    assert {tensor.dtype.__str__() for item in items for tensor in item.values()} == {"torch.int64"}
    with pytest.raises(IndexError):
        windows[len(windows)]


def test_isolated_windows_count_documents_from_their_start(corpus):
    split, eos = corpus.train, corpus.tokenizer().eos_token_id
    windows = Windows(split, 400, document_mask=True)
    seen = 0
    for window in (windows[index] for index in range(len(windows))):
        ids, documents = window["input_ids"].tolist(), window["document_ids"].tolist()
        expected, number = [], 1
        for token in ids:
            expected.append(number)
            number += token == eos
        assert documents == expected
        seen = max(seen, number)
    assert seen > 1


def test_a_worker_process_gets_the_path_not_the_content(corpus):
    windows = corpus.train.windows(16)
    message = pickle.dumps(windows)
    assert len(message) < 2000
    assert pickle.loads(message)[3]["targets"].tolist() == windows[3]["targets"].tolist()


# bytes per token


@given(st.text())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_bytes_telescope_over_any_unicode(tokenizer, text):
    ((ids, ends),) = encode([text], tokenizer)
    assert tokenizer.decode(ids.tolist()) == text
    assert (np.diff(ends, prepend=0) >= 0).all()
    assert (int(ends[-1]) if len(ends) else 0) == len(text.encode())
    assert bytes_before(text).tolist() == [len(text[:stop].encode()) for stop in range(len(text) + 1)]


@pytest.mark.parametrize("text", ["  spaced   out  日本 words  ", "日本", "\n\n", "e\u0301 ﬁ\t"])
def test_bytes_telescope_when_the_tokenizer_drops_and_rewrites_text(text):
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"[UNK]": 0, "words": 1}, unk_token="[UNK]"))
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    ((ids, ends),) = encode([text], PreTrainedTokenizerFast(tokenizer_object=backend))
    assert len(ids) == len(text.split())
    assert not len(ids) or ends[-1] == len(text.encode())
