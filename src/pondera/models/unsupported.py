"""What `AdaptiveLM` would inherit from transformers and cannot do, refused by name before anything runs."""

from __future__ import annotations

from typing import Any, NoReturn

from pondera.core.errors import UserError


class NoContinuousBatching:
    """Continuous batching keeps all texts in one paged cache, which the methods' caches and `Backbone.step` do not know."""

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused."""
        self._refuse("init_continuous_batching")

    def continuous_batching_context_manager(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused."""
        self._refuse("continuous_batching_context_manager")

    def generate_batch(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused."""
        self._refuse("generate_batch")

    def _refuse(self, name: str) -> NoReturn:
        raise UserError(
            f"{name}: an AdaptiveLM cannot be batched continuously; pad the texts on the left and call generate(input_ids, "
            "attention_mask=...), or serve it without --continuous-batching"
        )
