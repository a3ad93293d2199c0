"""The seam `probe/`: what one can see of a model from outside.

A probe reads what the model returns and what its thinking method recorded. It never edits a model's code or weights, so
it works on any checkpoint, and what it found is plain data: it can be printed, stored and read by others.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from pondera.model.lm import AdaptiveLM


@dataclass(frozen=True)
class Shown:
    """What a probe found, for a terminal.

    Args:
        columns: names of the columns.
        rows: cells as text that is safe to print.
        note: what the table comes to, in a sentence or two.
    """

    columns: list[str]
    rows: list[list[str]]
    note: str


class Probe(ABC):
    """Looks at a model that reads a text.

    A probe is constructed from its spec string, such as ``ThinkTrace(top=3)``. It is one file of this folder, named like
    its class; the contract tests run every one of them. Those that look at the tokens of a text one by one take
    `max_tokens`, those that list candidates take `top`: the command line has an option for each of the two.
    """

    @abstractmethod
    def run(self, model: AdaptiveLM, tokenizer: PreTrainedTokenizerFast, text: str) -> dict[str, Any]:
        """Looks; the model is left as it was.

        Args:
            model: any mode.
            tokenizer: its tokenizer.
            text: what it reads.

        Returns:
            What was found, in JSON's own types: written out and read back, it is the same.

        Raises:
            UserError: there is nothing to see in this model or this text; the message says in which there is.
        """

    @abstractmethod
    def show(self, found: dict[str, Any]) -> Shown:
        """What `run` found, as a table."""


@contextmanager
def observed(model: AdaptiveLM, record: bool = True) -> Iterator[None]:
    """The model as one looks at it: in eval mode, without gradients, its thinking method recording.

    Args:
        model: any mode; afterwards it is as it was.
        record: have the thinking method fill the trace, if there is one.
    """
    import torch

    was_training, think = model.training, model.think
    recorded = think is not None and think.record
    model.eval()
    if think is not None:
        think.record = record
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
        if think is not None:
            think.record = recorded
