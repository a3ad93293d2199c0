"""TaskCorpus: the windows of a synthetic task, with the interface of a `Corpus` of text.

Windows are drawn in blocks when they are first needed. A window depends on the task, the split and its number only, so it
is the same in every process and after a resume.

Shapes: C tokens per window.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pondera.core import spec
from pondera.core.errors import UserError
from pondera.core.mixed_seed import mixed_seed
from pondera.core.paths import cache_folder
from pondera.core.run_config import DataConfig
from pondera.data.tasks.base import FILL, Task, TaskSamples

if TYPE_CHECKING:
    from torch import LongTensor
    from transformers import PreTrainedTokenizerFast

FORMAT = 1  # increase it whenever the windows of the same task change
BLOCK = 512
"""Windows that are drawn together."""
SPLITS = {"train": 0, "validation": 1}


def prepare_task(config: DataConfig, cache_dir: Path | None = None) -> TaskCorpus:
    """The windows of ``config.task``.

    Args:
        config: the ``data`` part of a run.
        cache_dir: the folder for the tokenizer; default: ``$PONDERA_CACHE`` or ``~/.cache/pondera``.

    Raises:
        UserError: an unknown task or argument, or windows that are too short for it.

    Example:
        >>> corpus = prepare_task(DataConfig(task="StateTracking('S3')", context=16, windows=100))
        >>> window = corpus.train.windows(context=16)[0]
        >>> sorted(window), corpus.train.num_tokens
        (['difficulty', 'index', 'input_ids', 'targets'], 1600)
    """
    assert config.task is not None
    task: Task = spec.build(config.task, "task")
    if config.document_mask:
        raise UserError("data.document_mask: a window of a task is one document; leave document_mask out")
    if config.windows < 1:
        raise UserError(f"data.windows: at least 1, got {config.windows}")
    task.sample(np.random.default_rng(0), 1, config.context)  # refuses windows that are too short
    folder = cache_folder(cache_dir) / f"task-{_digest(task)[:16]}"
    if not (folder / "tokenizer_config.json").is_file():
        part = folder.with_name(f".{folder.name}.{os.getpid()}.part")
        _tokenizer(task).save_pretrained(part)
        try:
            os.replace(part, folder)
        except OSError:  # another process was first
            shutil.rmtree(part, ignore_errors=True)
    return TaskCorpus(task, config.context, config.windows, folder, config.known_difficulty)


class TaskCorpus:
    """The windows of a task; the attributes are those of `Corpus`.

    Attributes:
        task: the task.
        tokenizer_path: a folder that ``AutoTokenizer.from_pretrained`` loads; one token per symbol.
        vocab_size: the number of symbols, `FILL` included.
        train, validation: windows that no other split has but by chance.
        digest: equal digests mean equal windows of each length.
    """

    def __init__(self, task: Task, context: int, windows: int, folder: Path, known_difficulty: bool = False) -> None:
        self.task, self.path, self.tokenizer_path = task, folder, folder
        self.vocab_size = len(task.ids)
        self.digest = hashlib.sha256(json.dumps([_digest(task), windows]).encode()).hexdigest()
        self.skipped: dict[str, int] = {}
        held_out = max(BLOCK, windows // 20)
        self.train, self.validation = (
            TaskSplit(task, context, count, number, known_difficulty)
            for count, number in zip((windows, held_out), SPLITS.values(), strict=True)
        )

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer of the symbols."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.tokenizer_path)


class TaskSplit:
    """One split of a `TaskCorpus`; the attributes are those of `Split`.

    Args:
        task: the task.
        context: C.
        count: the number of windows.
        number: the number of the split, which its random numbers depend on.
        known_difficulty: windows have ``passes``, 1 + the difficulty of each token.
    """

    def __init__(self, task: Task, context: int, count: int, number: int, known_difficulty: bool = False) -> None:
        self.task, self.context, self.count, self._number = task, context, count, number
        self.known_difficulty = known_difficulty
        self.num_tokens, self.num_documents = count * context, count
        self._blocks: dict[int, TaskSamples] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return TaskSplit, (self.task, self.context, self.count, self._number, self.known_difficulty)

    def windows(self, context: int, document_mask: bool = False) -> TaskWindows:
        """The windows; another `context` than that of the split gives other windows, such as longer ones."""
        if context == self.context:
            return TaskWindows(self)
        return TaskWindows(TaskSplit(self.task, context, self.count, self._number, self.known_difficulty))

    @cached_property
    def ids(self) -> np.ndarray:
        """The token ids of the first windows, one window after another."""
        return self.block(0).ids_NC.reshape(-1)

    @property
    def num_bytes(self) -> int:
        """The number of tokens: symbols have no bytes of their own."""
        return self.num_tokens

    def num_bytes_of(self, start: int, stop: int) -> int:
        """The number of tokens of a range; see `num_bytes`."""
        return stop - start

    def document_at(self, token_index: int) -> str:
        """The name of the window of a token."""
        return f"window {token_index // self.context} of {self.task!r}"

    def block(self, number: int) -> TaskSamples:
        """A block of `BLOCK` windows."""
        if number not in self._blocks:
            seed = mixed_seed(FORMAT, self._number, self.context, number, int(_digest(self.task)[:15], 16))
            self._blocks[number] = self.task.sample(np.random.default_rng(seed), BLOCK, self.context)
        return self._blocks[number]


class TaskWindows:
    """A map-style dataset of the windows of a split."""

    def __init__(self, split: TaskSplit) -> None:
        self.split = split

    def __len__(self) -> int:
        return self.split.count

    def __getitem__(self, index: int) -> dict[str, LongTensor]:
        """``input_ids``, ``targets`` (-100: not scored), ``difficulty`` (-1: not scored), ``[C]``, and ``index``.

        If the difficulty is known to the model, also ``passes``, ``[C]``; a token that is not scored has one.
        """
        import torch

        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        block, place = self.split.block(index // BLOCK), index % BLOCK
        named = {"input_ids": block.ids_NC, "targets": block.targets_NC, "difficulty": block.difficulty_NC}
        window: dict[str, Any] = {name: torch.from_numpy(part_NC[place]) for name, part_NC in named.items()}
        window["index"] = torch.tensor(index)
        if self.split.known_difficulty:
            window["passes"] = 1 + window["difficulty"].clamp(min=0)
        return window


def _digest(task: Task) -> str:
    """A hash of the task and its settings."""
    canonical = spec.format(spec.parse(repr(task)))
    return hashlib.sha256(json.dumps([FORMAT, canonical, task.symbols]).encode()).hexdigest()


def _tokenizer(task: Task) -> PreTrainedTokenizerFast:
    """A tokenizer of symbols that are separated by spaces."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(WordLevel(task.ids, unk_token=FILL))
    inner.pre_tokenizer = WhitespaceSplit()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token=FILL, unk_token=FILL, clean_up_tokenization_spaces=False
    )
