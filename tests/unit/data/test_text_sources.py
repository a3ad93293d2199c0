"""Sources of text, and the messages about text, settings and tokenizers that cannot be used."""

import ast
import gzip
import json
import lzma
import pickle
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.stories import documents_of, story
from hypothesis import given
from hypothesis import strategies as st

from pondera.core.errors import UserError
from pondera.core.run_config import DataConfig
from pondera.data.corpus import prepare
from pondera.data.text import cut, hub, open_text
from pondera.data.tokenizer import load_tokenizer

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
