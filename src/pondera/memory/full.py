"""Full: nothing is forgotten."""

from __future__ import annotations

from typing import ClassVar

from pondera.memory.parts.slots import Slots


class Full(Slots):
    """Keeps everything, in storage that is allocated ahead, so that no step copies the past.

    Cost: transformers' own cache joins old and new rows in every step, which copies all of them; here a new row is
    written behind the others. An eighth of the storage is spare.
    When not to use it: compiled decoding, for which transformers has a static cache.

    Args:
        exact: by the stock attention kernel, the same to the last bit; false: by one that reads each KV head once for all
            of its query heads, which is faster and rounds differently.

    Example:
        >>> Full().exact
        True
    """

    paper: ClassVar[str] = "none: the stock cache, without its copies"
    price: ClassVar[str] = "one row per token, an eighth spare"
    reproduced: ClassVar[str] = "control"

    def __init__(self, exact: bool = True) -> None:
        super().__init__()
        self.exact = exact
