"""Full: nothing is forgotten."""

from __future__ import annotations

from typing import ClassVar

from pondera.methods.kv_cache.common.policy import Policy


class PreallocatedCache(Policy):
    """Keeps everything, in storage that is allocated ahead, so that no step copies the past.

    Cost: transformers' own cache joins old and new rows in every step, which copies all of them; here a new row is
    written behind the others. An eighth of the storage is spare. While decoding on a CPU in float32, query heads that share
    a KV head take turns while its rows are in the core's cache, and bits stay torch's (`parts.stock_attention`).
    When not to use it: compiled decoding, for which transformers has a static cache.

    Args:
        exact: the same as with the stock cache, to the last bit; false: by a kernel that rounds differently, which is
            somewhat faster with one text and more so with several.

    Example:
        >>> PreallocatedCache().exact
        True
    """

    paper: ClassVar[str] = "none: the stock cache, without its copies"
    cost: ClassVar[str] = "one row per token, an eighth spare"
    examples: ClassVar[dict[str, str]] = {"exact": "PreallocatedCache()"}
    saves: ClassVar[str] = "nothing"

    def __init__(self, exact: bool = True) -> None:
        super().__init__()
        self.exact = exact
