"""The folder that keeps prepared corpora: found again, built again if damaged, built once by two processes."""

import shutil
import threading

import pytest
from helpers.stories import documents_of

import pondera.data.corpus as data
from pondera.core.errors import UserError
from pondera.core.run_config import DataConfig
from pondera.data.corpus import prepare


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
