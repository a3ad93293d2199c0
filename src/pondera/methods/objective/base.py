"""Base class of objectives: losses of a GFlowNet, which learns to draw objects in proportion to a reward.

An objective compares forward and backward flow. With α, the forward step has the weight α and the backward step 1 − α; α = ½ is
the ordinary objective. What α does at the optimum is exact: with c = α/(1−α), objects are drawn in proportion to
R(x) · E[c^(−edges)] over backward trajectories. If all trajectories have one length, this is R(x) for every α.

Shapes: B trajectories, T transitions, S = T + 1 states, P parents, C children.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from pondera.core.errors import UserError
from pondera.core.spec_repr import SpecRepr
from pondera.methods.objective.common.offset import log_odds
from pondera.methods.objective.common.schedule import check_schedule, remaining_share


@dataclass(frozen=True)
class FlowBatch:
    """The numbers of a batch of trajectories.

    Args:
        mask_BT: which transitions are part of a trajectory; True first, then False.
        log_R_B: log reward of the finished objects, finite.
        log_pf_BT, log_pb_BT: log-probabilities of the forward and the backward step.
        log_F_BS: log flows of the states; the first one is log Z. Entries at and after the end are not read.
        log_partial_BS: log reward of unfinished states, for `FLDB`.
        log_in_BTP, log_out_BTC: log flows of the edges into and out of the state after each transition, for `FM`; −inf where
            there is no edge. A finished object has its log reward as the only way out.
    """

    mask_BT: Tensor
    log_R_B: Tensor
    log_pf_BT: Tensor | None = None
    log_pb_BT: Tensor | None = None
    log_F_BS: Tensor | None = None
    log_partial_BS: Tensor | None = None
    log_in_BTP: Tensor | None = None
    log_out_BTC: Tensor | None = None


def given(value: Tensor | None, name: str) -> Tensor:
    """A field of a batch that the objective needs."""
    if value is None:
        raise UserError(f"this objective needs {name}, which the batch does not have")
    return value


class Objective(SpecRepr, ABC):
    """A loss of trajectories, with the schedule of α.

    Args:
        alpha: weight of the forward step at the start; 0.5 is the ordinary objective.
        anneal: how α goes to ½: ``constant``, ``exp`` (the paper's, which ends near ½) or ``exact`` (ends at ½).
        hold: share of the steps before α moves.
        compensate: move log Z and log F by the known amount while α moves; on graded environments only.
    """

    needs: ClassVar[str] = "flows"
    """What the policy has to give: ``log_z`` (one number), ``flows`` (of states), ``partial`` or ``edges``."""

    def __init__(
        self, alpha: float = 0.5, anneal: str = "constant", hold: float = 0.9, compensate: bool = False
    ) -> None:
        log_odds(alpha)
        check_schedule(anneal, hold)
        if compensate and anneal == "constant":
            raise UserError("compensate: α does not move; give anneal='exact' or 'exp', or leave compensate out")
        self.alpha, self.anneal, self.hold, self.compensate = alpha, anneal, hold, compensate

    def alpha_at(self, step: int, steps: int) -> float:
        """α at a step of a run."""
        return 0.5 + (self.alpha - 0.5) * remaining_share(step, steps, self.anneal, self.hold)

    @abstractmethod
    def loss(self, batch: FlowBatch, alpha: float) -> Tensor:
        """The loss of a batch, a scalar.

        Args:
            batch: with the fields that the objective needs.
            alpha: the weight of the forward step at this step of the run.
        """
