"""Base class of probes, which analyze a model without changing it.

A probe reads the outputs of a model and the trace of its method. It never changes the model's code or weights, so it
works on any checkpoint. Its result is plain data, which can be printed, stored and processed further.
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
    """A chart of a probe's result.

    Args:
        title, x_label, y_label: the labels of the chart.
        lines: points by name, in the order of the legend.
        log_y: use a logarithmic y-axis.
    """

    title: str
    x_label: str
    y_label: str
    lines: dict[str, list[tuple[float, float]]]
    log_y: bool = False


@dataclass(frozen=True)
class Shown:
    """A probe's result, for a terminal.

    Args:
        columns: column names.
        rows: cells, as text that is safe to print.
        note: a summary in one or two sentences.
        plots: charts, which callers may show.
    """

    columns: list[str]
    rows: list[list[str]]
    note: str
    plots: list[Plot] = field(default_factory=list)


class Probe(SpecRepr, ABC):
    """Analyzes a model on a text.

    A probe is built from its spec string, such as ``ThinkTrace(top=3)``. Each probe is one file of this folder, named
    after its class; the contract tests run every probe. A probe that analyzes single tokens has the argument
    `max_tokens`; a probe that lists candidates has `top`. The command line has an option for each of the two.
    """

    @abstractmethod
    def run(self, model: AdaptiveLM, tokenizer: PreTrainedTokenizerFast, text: str) -> dict[str, Any]:
        """Runs the probe; the model does not change.

        Args:
            model: in any mode.
            tokenizer: the model's tokenizer.
            text: the text to analyze.

        Returns:
            The result, in JSON types: writing it as JSON and reading it back gives an equal object.

        Raises:
            UserError: the probe does not apply to this model or text; the message says what it needs.
        """

    def look(self, tensors: dict[str, Tensor]) -> dict[str, Any]:
        """Analyzes the tensors of a file instead of a model, if the probe supports this.

        Args:
            tensors: the tensors of the file by name.

        Raises:
            UserError: this probe supports only models, or a tensor is missing.
        """
        raise UserError(
            f"{type(self).__name__} analyzes a model that reads a text; give a run or a model folder, not a file"
        )

    @abstractmethod
    def show(self, found: dict[str, Any]) -> Shown:
        """Formats a result of `run` as a table."""


@contextmanager
def observed(model: AdaptiveLM, record: bool = True) -> Iterator[None]:
    """Context manager: the model in eval mode, without gradients, with its method recording.

    Args:
        model: in any mode; the mode is restored afterwards.
        record: let the method fill its trace, if the model has a method.
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
