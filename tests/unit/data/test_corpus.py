"""Text sources, the split, the tokenizer, the bins and the windows."""

import ast
import gzip
import json
import lzma
import pickle
import random
import shutil
import socket
import string
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pondera.data.corpus as data
from pondera.core.errors import UserError
from pondera.core.run_config import DataConfig
from pondera.data.corpus import Corpus, Windows, prepare
from pondera.data.text import Document, Source, cut, hub, open_text
from pondera.data.tokenizer import bytes_before, encode, load_tokenizer, train_tokenizer

WORDS = "weights pondera token naïve 日本語 thinking 🙂 größe cost one two three".split()


def story(seed: int, words: int = 300) -> str:
    rng = random.Random(seed)
    return "".join(rng.choice(WORDS) + rng.choice(["\n\n", "\n", " ", " ", " "]) for _ in range(words))


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("books")
    for number in range(40):
        path = root / f"shelf{number % 3}" / f"book{number}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(story(number), encoding="utf-8")
    (root / ".hidden").write_text("not to be read")
    (root / "picture.png").write_bytes(b"\x89PNG\0\0\xff")
    (root / "void.txt").write_text("")
    return root


@pytest.fixture(scope="module")
def config(folder) -> DataConfig:
    return DataConfig(text=str(folder), tokenizer="bpe-300", context=16, validation=0.1)


@pytest.fixture(scope="module")
def corpus(config, cache) -> Corpus:
    return prepare(config, cache)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([story(0)], 300)


def documents_of(split, tokenizer) -> dict[str, str]:
    """Every document of a split, decoded back from the bins."""
    ends = np.flatnonzero(split.ids == tokenizer.eos_token_id) + 1
    starts = [0, *ends[:-1]]
    return {
        split.document_at(a): tokenizer.decode(split.ids[a : b - 1].tolist()) for a, b in zip(starts, ends, strict=True)
    }


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


# the cache


def test_prepared_once_then_found(config, corpus, cache, monkeypatch):
    monkeypatch.setattr(data, "_build", lambda *_: pytest.fail("tokenised again"))
    again = prepare(config, cache)
    assert again.path == corpus.path and again.digest == corpus.digest


def test_two_builds_agree_and_their_names_do_not_matter(config, corpus, folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "elsewhere")
    again = prepare(DataConfig(**{**vars(config), "text": str(copy)}), tmp_path / "cache")
    assert again.digest == corpus.digest
    for name in ("train/ids.bin", "train/bytes.bin", "validation/names.json", "tokenizer/tokenizer.json"):
        assert (again.path / name).read_bytes() == (corpus.path / name).read_bytes()


@pytest.mark.parametrize("change", [{"tokenizer": "bpe-280"}, {"validation": 0.3}, {"max_bytes": 40_000}])
def test_what_changes_the_data_changes_the_digest(config, corpus, cache, change):
    assert prepare(DataConfig(**{**vars(config), **change}), cache).digest != corpus.digest


def test_one_changed_letter_is_another_corpus(config, corpus, folder, cache, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "books")
    path = copy / "shelf0" / "book0.txt"
    path.write_text("X" + path.read_text("utf-8")[1:], "utf-8")
    assert prepare(DataConfig(**{**vars(config), "text": str(copy)}), cache).digest != corpus.digest


@pytest.mark.parametrize("damage", ["truncate", "delete", "manifest"])
def test_a_damaged_cache_is_built_again(config, corpus, tmp_path, damage):
    path = prepare(config, tmp_path).path
    if damage == "truncate":
        (path / "train" / "ids.bin").write_bytes(b"\0" * 10)
    elif damage == "delete":
        (path / "tokenizer" / "tokenizer.json").unlink()
    else:
        (path / "manifest.json").write_text('{"files": ')
    again = prepare(config, tmp_path)
    assert again.path == path and again.train.num_bytes == corpus.train.num_bytes
    assert documents_of(again.train, again.tokenizer()).keys() == documents_of(corpus.train, corpus.tokenizer()).keys()


def test_an_interrupted_build_leaves_nothing_that_counts(config, corpus, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(data, "encode", interrupt)
        with pytest.raises(KeyboardInterrupt):
            prepare(config, tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]
    assert prepare(config, tmp_path).digest == corpus.digest


def test_two_at_once_build_once(config, corpus, tmp_path, monkeypatch):
    built, digests, build = [], [], data._build
    monkeypatch.setattr(data, "_build", lambda *arguments: (built.append(1), build(*arguments)))
    threads = [threading.Thread(target=lambda: digests.append(prepare(config, tmp_path).digest)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert digests == [corpus.digest] * 3 and len(built) == 1


def test_the_cache_folder_comes_from_the_environment(config, tmp_path, monkeypatch):
    monkeypatch.setenv("PONDERA_CACHE", str(tmp_path / "here"))
    assert prepare(config).path.parent == tmp_path / "here"


def test_an_unusable_cache_folder_is_named(config, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="PONDERA_CACHE"):
        prepare(config, tmp_path / "file")


# sources


@given(st.text(alphabet="ab \n", max_size=300), st.integers(1, 40))
def test_pieces_join_to_the_text(text, size):
    pieces = list(cut(text, size))
    assert "".join(pieces) == text and all(0 < len(piece) <= size for piece in pieces)


def test_pieces_end_with_paragraphs():
    text = "".join(f"{'word ' * 20}\n\n" for _ in range(100))
    assert all(piece.endswith("\n\n") for piece in cut(text, 1000))


def test_one_plain_file_has_something_to_hold_out(tmp_path, cache):
    (tmp_path / "one.txt").write_text(story(1, 3000), "utf-8")
    corpus = prepare(DataConfig(text=str(tmp_path / "one.txt"), tokenizer="bpe-300", context=16), cache)
    pieces = documents_of(corpus.train, corpus.tokenizer()) | documents_of(corpus.validation, corpus.tokenizer())
    ordered = sorted(pieces, key=lambda name: int(name.partition("#")[2]))
    assert ordered[0] == "one.txt#1" and "".join(pieces[name] for name in ordered) == story(1, 3000)
    alone = open_text(str(tmp_path))  # a folder that holds just this file
    assert [document.name for document in alone.read()] == ordered


@pytest.mark.parametrize("suffix, opener", [("", open), (".xz", lzma.open), (".gz", gzip.open)])
def test_jsonl_is_named_by_title_or_line(tmp_path, suffix, opener):
    path = tmp_path / f"books.jsonl{suffix}"
    rows = [{"title": "Emma", "text": "é\nw"}, {"text": "two"}, {"text": "  "}, {"text": "half \ud800 pair"}]
    with opener(path, "wb") as file:
        file.write("\n\n".join(map(json.dumps, rows)).encode())
    assert list(open_text(str(path)).read()) == [
        ("Emma", "é\nw"),
        ("books.jsonl" + suffix + ":3", "two"),
        ("books.jsonl" + suffix + ":7", "half ? pair"),
    ]


def test_stdlib_is_the_library_and_its_language_reference():
    source = open_text("stdlib")
    documents = dict(source.read())
    names = list(documents)
    files = [name for name in names if not name.startswith("topics/")]
    assert files == sorted(files) and {"ast.py", "json/decoder.py"} <= documents.keys()
    assert documents["ast.py"] == Path(ast.__file__).read_text("utf-8")
    assert documents["topics/assert"].startswith('The "assert" statement')
    parts = {part for name in files for part in name.split("/")[:-1]}
    assert not parts & {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    assert names == [document.name for document in source.read()]
    assert sum(map(len, documents.values())) > 3_000_000


def test_stdlib_keeps_out_what_a_machine_adds(tmp_path, monkeypatch):
    for name in (
        "abc.py",
        "dist-packages/x.py",
        "a/tests/x.py",
        "config-3.11-x86_64/python-config.py",
        "_sysconfigdata_x.py",
        "a/b.so",
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("pass")
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path))
    assert [document.name for document in open_text("stdlib").read()] == ["abc.py"]


def test_datasets_by_name_and_from_disk(tmp_path, monkeypatch, cache):
    import datasets

    rows = datasets.Dataset.from_dict({"body": [*(story(number, 60) for number in range(30)), "", None]})
    rows.save_to_disk(tmp_path / "saved")
    saved = open_text(str(tmp_path / "saved"), column="body")
    assert [document.text for document in saved.read()] == [story(number, 60) for number in range(30)]

    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: rows)
    config = DataConfig(text="someone/stories", column="body", tokenizer="bpe-300", context=8)
    corpus = prepare(config, cache)
    assert corpus.train.num_documents + corpus.validation.num_documents == 30
    assert corpus.train.document_at(0) == "stories:1"
    with pytest.raises(UserError, match="allowed: body"):
        open_text("someone/stories", column="text")


# messages


def write(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    return str(path)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("empty.txt", b"", "empty"),
        ("blank.txt", b" \n ", "empty"),
        ("empty.jsonl", b"", "empty"),
        ("binary.txt", b"ab\0cd", "binary"),
        ("latin.txt", "größe".encode("latin-1"), "not UTF-8"),
        ("broken.txt.xz", b"not xz", "damaged archive"),
        ("broken.txt.gz", gzip.compress(b"text" * 99, mtime=0)[:-20], "damaged archive"),
        ("bad.jsonl", b'{"text": "a"}\n{"text', "bad.jsonl:2: not valid JSON"),
        ("list.jsonl", b"[1, 2]", "expected an object such as"),
        ("column.jsonl", b'{"txt": "a", "id": 3}', "did you mean 'txt'"),
        ("number.jsonl", b'{"text": 3}', "has type int, not text"),
        ("tiny.txt", b"hello there", "one document of 11 bytes"),
    ],
)
def test_unusable_text_is_explained(tmp_path, cache, name, content, message):
    with pytest.raises(UserError, match=message):
        prepare(DataConfig(text=write(tmp_path / name, content), tokenizer="bpe-300", context=4), cache)


def test_a_folder_without_text_says_what_it_left_out(tmp_path, cache):
    for number in range(3):
        (tmp_path / f"{number}.bin").write_bytes(b"\0\xff")
    with pytest.raises(UserError, match="no text .*3 binary"):
        prepare(DataConfig(text=str(tmp_path)), cache)


def test_a_name_that_is_nothing_says_what_it_could_have_been(tmp_path, monkeypatch, cache):
    import datasets

    (tmp_path / "books.txt").write_text("text")
    with pytest.raises(UserError, match=r"no such file or folder: .*did you mean '.*books.txt'"):
        prepare(DataConfig(text=str(tmp_path / "bokos.txt")), cache)

    def missing(name, split):
        raise FileNotFoundError("Dataset 'stdlb' doesn't exist on the Hub")

    def offline(name, split):
        raise ConnectionError("timeout")

    monkeypatch.setattr(datasets, "load_dataset", missing)
    with pytest.raises(UserError, match="not a file or folder, and not a Hugging Face dataset.*did you mean 'stdlib'"):
        prepare(DataConfig(text="stdlb"), cache)
    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(UserError, match="hub cannot be reached"):
        prepare(DataConfig(text="someone/else"), cache)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"context": 0}, "data.context"),
        ({"validation": 0.0}, "data.validation"),
        ({"validation": 1.0}, "data.validation"),
        ({"max_bytes": 0}, "data.max_bytes"),
        ({"max_bytes": 10}, "data.max_bytes: .* give at least"),
        ({"tokenizer": "bpe-256"}, "N from 257"),
        ({"tokenizer": "bpe-65537"}, "N from 257"),
        ({"tokenizer": "bpe2048"}, "bpe-2048"),
        ({"tokenizer": "/no/such/folder"}, "no such folder"),
    ],
)
def test_settings_that_cannot_work_are_refused(config, cache, change, message):
    with pytest.raises(UserError, match=message):
        prepare(DataConfig(**{**vars(config), **change}), cache)


def test_a_context_that_does_not_fit_names_one_that_does(config, corpus, cache):
    fitting = min((corpus.train.num_tokens - 1) // 2, corpus.validation.num_tokens - 1)
    with pytest.raises(UserError, match=rf"{corpus.validation.num_tokens}; use --data.context {fitting} or less"):
        prepare(DataConfig(**{**vars(config), "context": fitting + 1}), cache)
    assert len(prepare(DataConfig(**{**vars(config), "context": fitting}), cache).validation.windows(fitting)) == 1


def test_unusable_tokenizers_are_explained(tmp_path, tokenizer):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="loads as a tokenizer"):
        load_tokenizer(str(tmp_path / "broken"))
    mute = pickle.loads(pickle.dumps(tokenizer))
    mute.eos_token = None
    mute.save_pretrained(tmp_path / "mute")
    with pytest.raises(UserError, match="no EOS token"):
        load_tokenizer(str(tmp_path / "mute"))


def test_an_unreachable_hub_answers_at_once(monkeypatch):
    import huggingface_hub.constants as constants

    def no_address(*_):
        raise socket.gaierror("Name or service not known")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("urllib.request.getproxies", dict)
    monkeypatch.setattr(socket, "getaddrinfo", no_address)
    with hub():
        assert constants.HF_HUB_OFFLINE
    assert not constants.HF_HUB_OFFLINE
    with pytest.raises(UserError, match="someone/nothing.*loads as a tokenizer"):
        load_tokenizer("someone/nothing")
    with pytest.raises(UserError, match="hub cannot be reached"):
        open_text("someone/nothing")


def test_importing_the_data_layer_is_light():
    code = (
        "import sys, pondera.data.corpus; print({'torch', 'transformers', 'tokenizers', 'datasets'} & {*sys.modules})"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"
