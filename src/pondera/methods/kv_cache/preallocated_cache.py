"""PreallocatedCache: the complete KV cache in preallocated storage."""

from __future__ import annotations

from typing import ClassVar

from pondera.methods.kv_cache.common.policy import Policy


class PreallocatedCache(Policy):
    """The complete KV cache in preallocated storage, so that no step copies it.

    Cost: the cache of transformers concatenates old and new keys and values in every step, which copies all of them;
    this method writes new ones after the old ones. Up to an eighth of the storage is unused, and while a layer grows,
    its old storage and its new storage exist at once. When decoding on a CPU in float32, query heads that share a KV
    head run one after another while its keys and values are in the core's cache; the results are bit-identical to
    those of torch (`pondera.cache.stock_attention`).
    When not to use it: for compiled decoding; or where the length is known in advance and the output need not be
    bit-identical. The `StaticCache` of transformers serves both.

    Args:
        exact: whether results are bit-identical to those of the stock cache; if false, a kernel that rounds differently
            runs, which is somewhat faster for one sequence and more so for several.

    Example:
        >>> PreallocatedCache().exact
        True
    """

    paper: ClassVar[str] = "no paper; the stock cache without its copies"
    cost: ClassVar[str] = "one KV slot per token, and up to an eighth more in reserve"
    examples: ClassVar[dict[str, str]] = {"exact": "PreallocatedCache()"}
    saves: ClassVar[str] = "nothing"

    def __init__(self, exact: bool = True) -> None:
        super().__init__()
        self.exact = exact
