"""Keyformer: attention received, scored with noise and a temperature."""

from __future__ import annotations

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
    """H2O whose score is softmax((logits + Gumbel noise) / temperature), with a temperature that grows in decoding.

    Forgetting tokens lifts the weights of those that stay; noise and temperature are to keep a few early favourites from
    being all that is kept. Attention itself is not touched.

    Source: Adnan et al., Keyformer, arXiv 2403.09054, section 3.3, and the authors' code.
    Cost: a second product of queries and keys in the prompt as `H2O`, and a number by chance for each of its elements; one
    float per slot.
    When not to use it: where `H2O` does; the noise is drawn for every product.
    Resolved: the noise follows from (seed, layer, query head, token numbers of query and key), so padding, batch and pieces of
    a prompt change nothing. The temperature is that of the prompt plus `tau_step` for each token that was generated. Scores
    are kept per text of a batch; the authors' code adds them up over the batch. Shares are of the prompt, as in the paper,
    so the budget does not grow with the output. Weights are summed over the query heads of a KV head.

    Args:
        budget: slots per layer and KV head; see `EvictionPolicy`.
        recent: the latest tokens, as a share of the budget or a number.
        tau: temperature in the prompt.
        tau_step: what each generated token adds to it.
        noise: scale of the Gumbel noise; 0: none.
        seed: of the noise.
        sinks: first tokens that are never forgotten; the paper has none.

    Example:
        >>> Keyformer(budget=0.6).tau
        1.0
    """

    paper: ClassVar[str] = "Keyformer, arXiv 2403.09054"
    cost: ClassVar[str] = "budget rows and one float each; a second, noisy product of queries and keys in the prompt"
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
            raise UserError(f"tau={tau}, tau_step={tau_step}: a temperature is above 0 and does not fall")
        self.tau, self.tau_step, self.noise, self.seed = tau, tau_step, noise, seed

    @property
    def note_defaults(self) -> dict[str, float]:
        """See `Slots.note_defaults`: score received so far."""
        return {"received": 0.0}

    def observe(self, layer: KVStoreLayer, table: KVStore, seen: AttentionObservation) -> None:
        """See `Slots.observe`."""
        generated_T = (seen.number_T - (layer.prompt - 1)).clamp(min=0)
        tau_T1 = (self.tau + self.tau_step * generated_T).to(seen.score_BGRTS.dtype)[:, None]
        score_BGRTS = seen.score_BGRTS
        if self.noise:
            score_BGRTS = score_BGRTS + self.noise * self.gumbel(layer, table, seen).to(score_BGRTS.dtype)
        table.note("received").add_(seen.weights(score_BGRTS / tau_T1).sum((2, 3)))

    def gumbel(self, layer: KVStoreLayer, table: KVStore, seen: AttentionObservation) -> Tensor:
        """``[B, G, R, T, S]``: the noise for each product."""
        pads_B1 = layer.state["padding"][:, None]
        query_BT, key_BGS = seen.number_T - pads_B1, layer.number(table)
        R, G = seen.score_BGRTS.shape[2], key_BGS.shape[1]
        first = next(part.start or 0 for part, one in layer.parts() if one is table)
        head_GR = (first + torch.arange(G, device=key_BGS.device))[:, None] * R + torch.arange(R, device=key_BGS.device)
        # One number for head, query and key: no two products of a text of less than 2^24 tokens share one.
        at_BGRT = head_GR[:, :, None] * 2**48 + query_BT[:, None, None] * 2**24
        uniform = stateless_uniform(at_BGRT[..., None] + key_BGS[:, :, None, None], layer.index, self.seed)
        return -(-uniform.clamp(min=2.0**-52).log()).log()

    def score(self, layer: KVStoreLayer, table: KVStore) -> Tensor:
        """See `EvictionPolicy.score`."""
        return table.note("received")
