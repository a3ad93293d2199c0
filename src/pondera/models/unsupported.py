"""Features of transformers that `AdaptiveLM` inherits but does not support; they raise at once."""

from __future__ import annotations

from typing import Any, NoReturn

from pondera.core.errors import UserError


class NoContinuousBatching:
    """Rejects continuous batching, whose paged cache is not supported by the methods and `Backbone.step`."""

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
            f"{name}: an AdaptiveLM does not support continuous batching; left-pad the sequences and call generate(input_ids, "
            "attention_mask=...), or serve it without --continuous-batching"
        )
