"""The seam `probe/`: what one can see of a model from outside.

A probe reads what the model returns and what its thinking method recorded. It never edits a model's code or weights, so
it works on any checkpoint, and what it found is plain data: it can be printed, stored and read by others.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pondera.core.errors import UserError
from pondera.core.spec_repr import SpecRepr

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerFast

    from pondera.models.adaptive_lm import AdaptiveLM


@dataclass(frozen=True)
class Plot:
    """A chart of what a probe found.

    Args:
        title, x_label, y_label: what stands on it.
        lines: points by name, in the order of the legend.
        log_y: whether heights are read as powers.
    """

    title: str
    x_label: str
    y_label: str
    lines: dict[str, list[tuple[float, float]]]
    log_y: bool = False


@dataclass(frozen=True)
class Shown:
    """What a probe found, for a terminal.

    Args:
        columns: names of the columns.
        rows: cells as text that is safe to print.
        note: what the table comes to, in a sentence or two.
        plots: charts, for those who ask for them.
    """

    columns: list[str]
    rows: list[list[str]]
    note: str
    plots: list[Plot] = field(default_factory=list)


class Probe(SpecRepr, ABC):
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

    def look(self, tensors: dict[str, Tensor]) -> dict[str, Any]:
        """Looks at tensors of a file instead of a model, where a probe can.

        Args:
            tensors: by name, as the file has them.

        Raises:
            UserError: this probe looks at models only, or misses a tensor.
        """
        raise UserError(
            f"{type(self).__name__} looks at a model that reads a text; give a run or a model folder, not a file"
        )

    @abstractmethod
    def show(self, found: dict[str, Any]) -> Shown:
        """What `run` found, as a table."""


@contextmanager
def observed(model: AdaptiveLM, record: bool = True) -> Iterator[None]:
    """The model as one looks at it: in eval mode, without gradients, its method recording.

    Args:
        model: any mode; afterwards it is as it was.
        record: have the method fill the trace, if there is one.
    """
    import torch

    was_training, method = model.training, model.method
    recorded = method is not None and method.record
    model.eval()
    if method is not None:
        method.record = record
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
        if method is not None:
            method.record = recorded
