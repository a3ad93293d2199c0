"""CriticalKV: scores multiplied by how much the value of a slot can change the output of its layer.

Shapes: B batch, G KV heads, R query heads per KV head, S slots, D head width, W width of hidden states.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pondera.cache.kv_store import KVStore
from pondera.cache.layer import AttentionCall
from pondera.cache.slot_attention import AttentionObservation
from pondera.cache.slot_layer import KVStoreLayer
from pondera.core.errors import UserError
from pondera.core.hf import Conv1D, PreTrainedConfig, PreTrainedModel
from pondera.methods.kv_cache.base import KVCache, KVCacheMethod
from pondera.methods.kv_cache.common.policy import EvictionPolicy, highest
from pondera.methods.kv_cache.snap_kv import SnapKV

OUTPUTS = ("o_proj", "dense", "c_proj", "out_proj")
"""The names of the output projection in attention modules of transformers."""


class CriticalKV(EvictionPolicy):
    """Two-stage selection around a policy of the prompt: half of the budget by its scores, the rest by the scores times the
    norm of the projected value.

    A slot with a small value changes the output of its layer little, however much attention it gets. The second stage
    multiplies each score, plus `epsilon`, by the L1 norm of the value after the output projection of attention, averaged
    over the query heads of its KV head. This lowers a bound on the change of the output. The first stage keeps the slots with
    the most attention, on which the bound relies.

    Source: Feng et al., Identify Critical KV Cache in LLM Inference from an Output Perturbation Perspective, arXiv
    2502.03805.
    Cost: as the policy's, and at the end of prefill the operations of one more output projection of every token.
    When not to use it: where values have similar norms. Around `ExpectedAttention`, which has the norms of values already,
    both factors apply.
    Resolved: protected tokens (sinks, the window) count in the first stage. `epsilon` is added to scores as the policy
    defines them, so it is relative to their sum over queries. Within `AdaKV` every head keeps its first stage, which is a
    share of the uniform budget.

    Args:
        policy: an eviction policy that acts at the end of the prompt; default: ``SnapKV()``.
        first: share of the budget of the first stage, from 0 to 1; 1 is the policy alone.
        epsilon: added to the scores of the second stage.

    Example:
        >>> CriticalKV(SnapKV(512, window=16)).observation_window
        16
    """

    paper: ClassVar[str] = "CriticalKV, arXiv 2502.03805"
    cost: ClassVar[str] = "the policy's; one output projection of the values of the prompt"
    examples: ClassVar[dict[str, str]] = {
        "exact": "CriticalKV(SnapKV(64, window=4))",
        "tight": "CriticalKV(SnapKV(8, window=3, kernel=3))",
    }
    prefill_only: bool = True
    policy: EvictionPolicy

    def __init__(self, policy: KVCacheMethod | None = None, first: float = 0.5, epsilon: float = 1e-4) -> None:
        policy = SnapKV() if policy is None else policy
        if not isinstance(policy, EvictionPolicy) or not policy.prefill_only:
            raise UserError(
                f"CriticalKV({type(policy).__name__}(...)): give an eviction policy that acts at the end of the prompt, "
                "e.g. CriticalKV(SnapKV(512))"
            )
        if policy.signed:
            raise UserError(
                f"CriticalKV multiplies scores by norms, and those of {type(policy).__name__} may be negative; give a policy "
                "whose scores are not, e.g. CriticalKV(SnapKV(512))"
            )
        if not 0 <= first <= 1:
            raise UserError(f"first={first}: give the share of the budget of the first stage, from 0 to 1")
        if not 0 <= epsilon < float("inf"):
            raise UserError(f"epsilon={epsilon}: give a number of 0 or more")
        super().__init__(policy.budget.amount, policy.sinks, policy.recent)
        self.policy, self.first, self.epsilon = policy, first, epsilon
        self.observation_window, self.observes_scores = policy.observation_window, policy.observes_scores
        self.outputs: dict[int, nn.Module] = {}

    @property
    def note_defaults(self) -> dict[str, float]:
        """See `Policy.note_defaults`."""
        return self.policy.note_defaults

    def check(self, config: PreTrainedConfig, layers: list[int]) -> None:
        """See `KVCacheMethod.check`."""
        self.policy.check(config, layers)

    def check_passes(self) -> None:
        """See `KVCacheMethod.check_passes`."""
        self.policy.check_passes()

    def prepare(self, model: PreTrainedModel, cache: KVCache) -> None:
        """See `KVCacheMethod.prepare`: finds the output projection of each compressed layer."""
        self.policy.prepare(model, cache)
        numbers = [number for number, layer in enumerate(cache.layers) if isinstance(layer, KVStoreLayer)]
        found: dict[int, nn.Module] = {}
        for module in model.get_decoder().modules():
            number: Any = getattr(module, "layer_idx", None)
            name = next((each for each in OUTPUTS if isinstance(getattr(module, each, None), nn.Linear | Conv1D)), None)
            if number in numbers and name is not None and hasattr(module, "is_causal"):
                found[numbers.index(number)] = getattr(module, name)
        if len(found) < len(numbers):
            raise UserError(
                f"{model.config.model_type}: CriticalKV needs the output projection of attention, and finds none called "
                f"{', '.join(OUTPUTS)}; use {self.policy!r}"
            )
        if self.outputs and any(self.outputs[number] is not found[number] for number in found):
            raise UserError("this CriticalKV already serves another model; create one per model")
        self.outputs = found

    def observed_queries(self, layer: KVStoreLayer, call: AttentionCall) -> int:
        """See `Policy.observed_queries`."""
        return self.policy.observed_queries(layer, call)

    def observe(self, layer: KVStoreLayer, table: KVStore, seen: AttentionObservation) -> None:
        """See `Policy.observe`."""
        self.policy.observe(layer, table, seen)

    def score(self, layer: KVStoreLayer, table: KVStore) -> Tensor:
        """See `EvictionPolicy.score`: that of the second stage."""
        return (self.policy.score(layer, table) + self.epsilon) * self.projected(layer, table)

    def protected_score(self, layer: KVStoreLayer, table: KVStore, limit_BG: Tensor) -> Tensor:
        """See `EvictionPolicy.protected_score`: the slots of the first stage are protected, too."""
        score_BGS = self.policy.protected_score(layer, table, limit_BG)
        count_BG = limit_BG.mul(self.first).long().minimum(table.real.sum(-1))
        slot_BGk, kept_BGk = highest(score_BGS, table.position, count_BG)
        chosen_BGS = torch.zeros_like(table.real).scatter(2, slot_BGk, kept_BGk) | (score_BGS == torch.inf)
        second_BGS = (score_BGS + self.epsilon) * self.projected(layer, table)
        return second_BGS.masked_fill(chosen_BGS, torch.inf).masked_fill(~table.real, -torch.inf)

    def projected(self, layer: KVStoreLayer, table: KVStore) -> Tensor:
        """``[B, G, S]``: the L1 norm of each value after the output projection, averaged over query heads."""
        output: Any = self.outputs[layer.index]
        weight_WI = output.weight.T if isinstance(output, Conv1D) else output.weight
        heads = sum(len(each.heads) for each in layer.tables)
        D = table.values.shape[-1]
        weight_WGRD = weight_WI.detach().float().unflatten(1, (heads, -1, D))[:, table.part]
        norm_BGS = torch.zeros(table.values.shape[:3], device=table.values.device)
        R = weight_WGRD.shape[2]
        for group in range(weight_WGRD.shape[1]):
            for head in range(R):
                norm_BGS[:, group] += (table.values[:, group].float() @ weight_WGRD[:, group, head].T).abs().sum(-1) / R
        return norm_BGS
