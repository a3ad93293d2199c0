"""A folder of stories, and the corpus that is prepared from it."""

from pathlib import Path

import pytest
from helpers.stories import story

from pondera.core.run_config import DataConfig
from pondera.data.corpus import Corpus, prepare
from pondera.data.tokenizer import train_tokenizer


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
