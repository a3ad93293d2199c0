"""The answers of a model to a task, token by token, with the passes that each took.

Shapes: T tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pondera.core import spec
from pondera.core.errors import UserError
from pondera.inference.generate import effort_arguments
from pondera.inference.load import Loaded

if TYPE_CHECKING:
    from pondera.data.tasks.base import Task


@dataclass(frozen=True)
class Answer:
    """One token of a task.

    Args:
        symbol: the token.
        predicted: what the model predicts there; `None` where nothing is asked.
        correct: the right answer; `None` where nothing is asked.
        passes: the passes that the token took.
    """

    symbol: str
    predicted: str | None
    correct: str | None
    passes: int


def task_of(loaded: Loaded) -> Task | None:
    """The task that a run was trained on, or `None`."""
    text = loaded.run.config.data.task if loaded.run is not None else None
    return spec.build(text, "task") if text else None


def answers(
    loaded: Loaded, prompt: str, effort: str | float | None = None, max_passes: int | None = None
) -> list[Answer]:
    """Answers a window of a task.

    Args:
        loaded: a run on a task.
        prompt: symbols of the task, separated by spaces.
        effort, max_passes: as for `generate`.

    Raises:
        UserError: the run is not on a task or has a KV-cache method, or the prompt is empty, too long or has a symbol that the
            task lacks.
    """
    import torch

    task, model = task_of(loaded), loaded.model
    if task is None:
        raise UserError(f"answers: {loaded.name} was not trained on a task; use generate")
    if model.kv_cache is not None:
        raise UserError("kv_cache: a window is answered in one call, before anything is evicted; use pondera eval")
    symbols = prompt.split()
    unknown = sorted(set(symbols) - set(task.symbols))
    if unknown or not symbols:
        what = f"{', '.join(unknown)} not in the task" if unknown else "no symbol"
        raise UserError(f"prompt: {what}; give symbols separated by spaces: {' '.join(task.symbols)}")
    if model.positions is not None and len(symbols) > model.positions:
        raise UserError(f"prompt: {len(symbols)} symbols, but the model has {model.positions} positions")
    ids_1T = torch.tensor([[task.ids[symbol] for symbol in symbols]], device=model.device)
    with torch.no_grad():
        out = model(ids_1T, **effort_arguments(model, effort, max_passes))
    names = {number: symbol for symbol, number in task.ids.items()}
    predicted = [names[number] for number in out.logits[0].argmax(-1).tolist()]
    return [
        Answer(symbol, guess if right is not None else None, right, passes)
        for symbol, guess, right, passes in zip(
            symbols, predicted, task.solve(symbols), out.passes[0].tolist(), strict=True
        )
    ]
