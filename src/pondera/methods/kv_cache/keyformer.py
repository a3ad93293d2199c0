"""Keyformer: accumulated attention with Gumbel noise and a temperature."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from pondera.cache.kv_store import KVStore
from pondera.cache.slot_attention import AttentionObservation
from pondera.cache.slot_layer import KVStoreLayer
from pondera.core.errors import UserError
from pondera.core.stateless_random import stateless_uniform
from pondera.methods.kv_cache.common.policy import ALL, EvictionPolicy


class Keyformer(EvictionPolicy):
    """H2O with the score softmax((logits + Gumbel noise) / temperature); the temperature rises during decoding.

    Eviction raises the attention weights of the remaining tokens. Noise and temperature counteract this, so that the
    cache does not keep only a few early favorites. Attention itself does not change.

    Source: Adnan et al., Keyformer, arXiv 2403.09054, section 3.3, and the authors' code.
    Cost: a second product of queries and keys in prefill, as `H2O`, and a pseudo-random number for each of its
    elements; one float per KV slot.
    When not to use it: if `H2O` suffices; the method draws noise for every product.
    Resolved: the noise is a function of (seed, layer, query head, token numbers of query and key), so results do not
    depend on padding, batch or chunked prefill. The temperature is that of the prompt plus `tau_step` per generated
    token. Each sequence of a batch has its own scores; the authors' code sums them over the batch. As in the paper,
    shares are shares of the prompt, so the budget does not grow with the output. The method sums weights over the query
    heads of a KV head.

    Args:
        budget: KV slots per layer and KV head: a number (512), a share of the tokens seen (0.25) or bytes of a sequence
            ("64MiB"); a list has one per layer, a list of lists one per head.
        recent: number of latest tokens that are never evicted, or their share of the budget.
        tau: temperature in prefill.
        tau_step: increase of the temperature per generated token.
        noise: scale of the Gumbel noise; 0 disables it.
        seed: seed of the noise.
        sinks: number of first tokens that are never evicted; the paper has none.

    Example:
        >>> Keyformer(budget=0.6).tau
        1.0
    """

    paper: ClassVar[str] = "Keyformer, arXiv 2403.09054"
    cost: ClassVar[str] = "budget KV slots and one float each; a second, noisy product of queries and keys in prefill"
    examples: ClassVar[dict[str, str]] = {"exact": "Keyformer(64)", "tight": "Keyformer(8, tau_step=0.1)"}
    observation_window: int = ALL
    budget_from_prompt: ClassVar[bool] = True

    def __init__(
        self,
        budget: int | float | str | list = 0.6,
        recent: int | float = 0.3,
        tau: float = 1.0,
        tau_step: float = 0.01,
        noise: float = 1.0,
        seed: int = 0,
        sinks: int = 0,
    ) -> None:
        super().__init__(budget, sinks, recent)
        if tau <= 0 or tau_step < 0:
            raise UserError(f"tau={tau}, tau_step={tau_step}: give tau above 0, and tau_step 0 or more")
        self.tau, self.tau_step, self.noise, self.seed = tau, tau_step, noise, seed

    @property
    def note_defaults(self) -> dict[str, float]:
        """See `Policy.note_defaults`: accumulated score."""
        return {"received": 0.0}

    def observe(self, layer: KVStoreLayer, table: KVStore, seen: AttentionObservation) -> None:
        """See `Policy.observe`."""
        generated_T = (seen.number_T - (layer.prompt - 1)).clamp(min=0)
        tau_T1 = (self.tau + self.tau_step * generated_T).to(seen.score_BGRTS.dtype)[:, None]
        score_BGRTS = seen.score_BGRTS
        if self.noise:
            score_BGRTS = score_BGRTS + self.noise * self.gumbel(layer, table, seen).to(score_BGRTS.dtype)
        noisy = dataclasses.replace(seen, score_BGRTS=score_BGRTS / tau_T1)
        table.note["received"].add_(noisy.weight_BGRTS.sum((2, 3)))

    def gumbel(self, layer: KVStoreLayer, table: KVStore, seen: AttentionObservation) -> Tensor:
        """``[B, G, R, T, S]``: the noise for each product."""
        pads_B1 = layer.state["padding"][:, None]
        query_BT, key_BGS = seen.number_T - pads_B1, layer.number(table)
        R = seen.score_BGRTS.shape[2]
        head_G = torch.tensor(table.heads, device=key_BGS.device)
        head_GR = head_G[:, None] * R + torch.arange(R, device=key_BGS.device)
        # A unique number per head, query and key, for sequences shorter than 2^24 tokens.
        at_BGRT = head_GR[:, :, None] * 2**48 + query_BT[:, None, None] * 2**24
        uniform = stateless_uniform(at_BGRT[..., None] + key_BGS[:, :, None, None], layer.index, self.seed)
        return -(-uniform.clamp(min=2.0**-52).log()).log()

    def score(self, layer: KVStoreLayer, table: KVStore) -> Tensor:
        """See `EvictionPolicy.score`."""
        return table.note["received"]
