"""Scores of a model on a synthetic task: accuracy, loss and passes by difficulty.

Shapes: B batch, C context, V vocabulary, L levels of difficulty.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from pondera.core.errors import UserError
from pondera.core.evaluation_mode import as_it_was
from pondera.data.sampler import collate
from pondera.evaluation.chunked_forward import chunked_outputs
from pondera.evaluation.pass_counts import pass_counts
from pondera.evaluation.permuted_passes import run_windows

if TYPE_CHECKING:
    from pondera.models.adaptive_lm import AdaptiveLM

COLUMNS = ("tokens", "right", "nats", "passes", "squared passes")
"""The sums of each level of difficulty."""


@dataclass(frozen=True)
class TaskSums:
    """Sums over scored tokens, by difficulty.

    Args:
        by_level: ``[L, 5]``, float64; the columns are those of `COLUMNS`.

    Example:
        >>> one = TaskSums.of(torch.tensor([0, 2]), torch.tensor([True, False]), torch.tensor([0.1, 2.0]), torch.tensor([1, 3]))
        >>> (one + one).by_level[:, 0].tolist()
        [2.0, 0.0, 2.0]
    """

    by_level: Tensor = field(default_factory=lambda: torch.zeros(0, len(COLUMNS), dtype=torch.float64))

    @classmethod
    def of(cls, difficulty_N: Tensor, right_N: Tensor, nats_N: Tensor, passes_N: Tensor) -> TaskSums:
        """The sums of some scored tokens."""
        passes_N = passes_N.double()
        columns = (torch.ones_like(passes_N), right_N.double(), nats_N.double(), passes_N, passes_N.square())
        levels = int(difficulty_N.max()) + 1 if len(difficulty_N) else 0
        sums = torch.zeros(levels, len(COLUMNS), dtype=torch.float64)
        return cls(sums.index_add(0, difficulty_N.cpu(), torch.stack(columns, dim=-1).cpu()))

    def __add__(self, other: TaskSums) -> TaskSums:
        levels = max(len(self.by_level), len(other.by_level))
        return TaskSums(sum(F.pad(each.by_level, (0, 0, 0, levels - len(each.by_level))) for each in (self, other)))  # type: ignore[arg-type]

    def scores(self) -> dict[str, Any]:
        """The scores.

        Returns:
            ``accuracy``, ``error`` (1 - accuracy), ``loss`` in nats per scored token, the number of ``scored_tokens`` and
            their ``passes_of_scored`` per token; ``by_difficulty``, a list for each measure with one entry per level that
            has tokens; and ``passes_correlation``, Pearson's correlation of passes with difficulty over scored tokens, or
            `None` if one of them does not vary.
        """
        tokens, right, nats, passes, _ = self.by_level.sum(0).tolist()
        levels = [level for level, row in enumerate(self.by_level.tolist()) if row[0]]
        rows = self.by_level[levels]
        means = (rows[:, 1:4] / rows[:, :1]).T.tolist()
        return {
            "accuracy": right / tokens,
            "error": 1 - right / tokens,
            "loss": nats / tokens,
            "scored_tokens": int(tokens),
            "passes_of_scored": passes / tokens,
            "passes_correlation": self._correlation(),
            "by_difficulty": {
                "difficulty": levels,
                "tokens": [int(count) for count in rows[:, 0].tolist()],
                **dict(zip(("accuracy", "loss", "passes"), means, strict=True)),
            },
        }

    def _correlation(self) -> float | None:
        tokens_L, _, _, passes_L, squared_L = self.by_level.T
        level_L, count = torch.arange(len(tokens_L), dtype=torch.float64), tokens_L.sum()
        mean, level_mean = passes_L.sum() / count, (tokens_L * level_L).sum() / count
        variance = squared_L.sum() / count - mean.square()
        level_variance = (tokens_L * level_L.square()).sum() / count - level_mean.square()
        if min(float(variance), float(level_variance)) < 1e-9:
            return None
        covariance = (passes_L * level_L).sum() / count - mean * level_mean
        return float(covariance / (variance * level_variance).sqrt())


@dataclass(frozen=True)
class TaskScores:
    """The sums of a task, and how many of all tokens took each pass.

    Args:
        scored: sums over scored tokens.
        took: how many tokens, scored or not, took the first, second, third, ... pass.
    """

    scored: TaskSums
    took: tuple[float, ...]

    def __add__(self, other: TaskScores) -> TaskScores:
        return TaskScores(self.scored + other.scored, tuple(map(sum, zip(self.took, other.took, strict=True))))

    def nothing(self) -> TaskScores:
        """Sums of the same form that are all 0."""
        return self.with_numbers([0.0] * len(self.numbers()))

    def numbers(self) -> list[float]:
        """All sums in one list, to add them up over processes."""
        return [*self.took, *self.scored.by_level.flatten().tolist()]

    def with_numbers(self, numbers: list[float]) -> TaskScores:
        """Sums of the same form from such a list."""
        passes = len(self.took)
        by_level = torch.tensor(numbers[passes:], dtype=torch.float64).view_as(self.scored.by_level)
        return TaskScores(TaskSums(by_level), tuple(numbers[:passes]))


@dataclass(frozen=True)
class ScoredTokens:
    """The scored tokens of some windows, one entry for each, and the passes of all tokens.

    Args:
        place_N: the position in the window, from 0.
        difficulty_N, right_N, nats_N, passes_N: as `TaskSums.of` takes them.
        passes_BC: the passes of all tokens, scored or not.
    """

    place_N: Tensor
    difficulty_N: Tensor
    right_N: Tensor
    nats_N: Tensor
    passes_N: Tensor
    passes_BC: Tensor

    def sums(self, start: int = 0) -> TaskSums:
        """The sums over the tokens at the positions from `start`."""
        kept_N = self.place_N >= start
        every = (self.difficulty_N, self.right_N, self.nats_N, self.passes_N)
        return TaskSums.of(*(part_N[kept_N] for part_N in every))


@torch.no_grad()
def scored_tokens(
    model: AdaptiveLM, windows: list[Mapping[str, Tensor]], budget: dict[str, Any] | None = None, permute: bool = False
) -> ScoredTokens:
    """Runs a model on windows of one length.

    Args:
        model: in any mode, which stays as it is.
        windows: from `TaskWindows`.
        budget: ``effort`` and ``max_passes``, as the model takes them.
        permute: give the passes of each window to its tokens in random order (`pondera.evaluation.permuted_passes`).
    """
    given = {name: tensor.to(model.device) for name, tensor in collate(windows).items()}
    difficulty_BC = torch.stack([window["difficulty"] for window in windows]).to(model.device)
    with as_it_was(model):
        logits_BCV, passes_BC = _outputs(model, given, windows, budget, permute)
    asked_BC = difficulty_BC >= 0
    logits_NV, targets_N = logits_BCV[asked_BC].float(), given["shift_labels"][asked_BC]
    nats_N = F.cross_entropy(logits_NV, targets_N, reduction="none")
    right_N = logits_NV.argmax(-1) == targets_N
    return ScoredTokens(
        asked_BC.nonzero()[:, 1], difficulty_BC[asked_BC], right_N, nats_N, passes_BC[asked_BC], passes_BC
    )


def sum_task_scores(
    model: AdaptiveLM, windows: list[Mapping[str, Tensor]], budget: dict[str, Any] | None = None, permute: bool = False
) -> TaskScores:
    """Scores windows of one length; the arguments are those of `scored_tokens`."""
    found = scored_tokens(model, windows, budget, permute)
    # Every process has the same number of levels: a difficulty is at most the length of a window.
    every = TaskSums(torch.zeros(found.passes_BC.shape[1] + 1, len(COLUMNS), dtype=torch.float64))
    return TaskScores(every + found.sums(), pass_counts(found.passes_BC, math.ceil(model.passes())))


def _outputs(
    model: AdaptiveLM,
    given: dict[str, Tensor],
    windows: list[Mapping[str, Tensor]],
    budget: dict[str, Any] | None,
    permute: bool,
) -> tuple[Tensor, Tensor]:
    """Logits ``[B, C, V]`` and passes ``[B, C]``, chunk by chunk through the compressed KV cache of a model that has one."""
    if model.kv_cache is None:
        out = run_windows(model, {**given, **(budget or {})}, windows, permute)
        return out.logits, out.passes
    if "passes" in given:
        raise UserError("data.known_difficulty: not with a KV-cache method; score the model without kv_cache")
    outs = [out for _, out in chunked_outputs(model, model.new_cache(), given["input_ids"], budget=budget)]
    logits, passes = ([cast(Tensor, getattr(out, name)) for out in outs] for name in ("logits", "passes"))
    return torch.cat(logits, 1), torch.cat(passes, 1)


def task_measures(sums: TaskScores, tokens: int) -> dict[str, Any]:
    """The scores of a task: what `TaskSums.scores` gives, ``perplexity`` per scored token, the number of ``tokens``, scored or
    not, their ``passes_per_token`` and ``pass_shares``."""
    scores = sums.scored.scores()
    return scores | {
        "perplexity": math.exp(scores["loss"]) if scores["loss"] < 700 else math.inf,
        "tokens": tokens,
        "passes_per_token": sum(sums.took) / sums.took[0],
        "pass_shares": [count / sums.took[0] for count in sums.took],
    }
