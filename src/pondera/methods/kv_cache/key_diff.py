"""KeyDiff: keeps the keys that differ most from the mean key.

Shapes: B batch, G KV heads, S slots, D head width.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor
from torch.nn import functional as F

from pondera.cache.kv_store import KVStore
from pondera.cache.slot_layer import KVStoreLayer
from pondera.methods.kv_cache.common.policy import EvictionPolicy


class KeyDiff(EvictionPolicy):
    """Keeps the tokens whose keys are least similar to the mean direction of all keys of their head.

    The score of a slot is minus the cosine between its key and the mean of all normalized keys. Similar keys get similar
    attention from every query, so one of them can stand for the others; distinct keys tend to get much attention.

    Source: Park et al., KeyDiff, arXiv 2504.15364.
    Cost: one mean and one cosine per slot whenever slots are evicted, in decoding at every step; no attention weights are
    read.
    When not to use it: if a policy that observes attention is affordable, and the prompt ends with the question.
    Resolved: the mean is that of the slots in the cache, new tokens included; slots of evicted tokens no longer count, as
    in the paper. Keys are compared after rotary embedding. The paper prefills in blocks of 128 tokens and evicts after
    each; so does chunked prefill here, and a prompt in one call is scored once, with all its keys.

    Args:
        budget: KV slots per layer and KV head: a number (512), a share of the tokens seen (0.25) or bytes of a sequence
            ("64MiB"); a list has one per layer, a list of lists one per head.
        recent: number of latest tokens that are never evicted, or their share of the budget; the paper has none.
        sinks: number of first tokens that are never evicted; the paper has none.

    Example:
        >>> KeyDiff(512).observation_window
        0
    """

    paper: ClassVar[str] = "KeyDiff, arXiv 2504.15364"
    cost: ClassVar[str] = "budget KV slots; a mean key and a cosine per slot whenever slots are evicted"
    examples: ClassVar[dict[str, str]] = {"exact": "KeyDiff(64)", "tight": "KeyDiff(8, recent=1)"}
    signed: ClassVar[bool] = True

    def __init__(self, budget: int | float | str | list = 0.5, recent: int | float = 0, sinks: int = 0) -> None:
        super().__init__(budget, sinks, recent)

    def score(self, layer: KVStoreLayer, table: KVStore) -> Tensor:
        """See `EvictionPolicy.score`."""
        keys_BGSD = table.keys.float()
        direction_BGSD = F.normalize(keys_BGSD, dim=-1).masked_fill(~table.real[..., None], 0)
        return -F.cosine_similarity(keys_BGSD, direction_BGSD.sum(2, keepdim=True), dim=-1)  # a sum points as its mean
