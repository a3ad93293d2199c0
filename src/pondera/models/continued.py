"""What a new model takes from the model whose training it continues.

Shapes: D width.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from pondera.models.adaptive_lm import AdaptiveLM

log = logging.getLogger(__name__)


def take_over(model: AdaptiveLM, old: AdaptiveLM) -> None:
    """Takes the generation config of an old model, and the parameters of its method with equal names and shapes."""
    model.generation_config = old.generation_config
    mine, theirs = ({} if lm.method is None else lm.method.state_dict() for lm in (model, old))
    shared = {name: theirs[name] for name in theirs if name in mine and mine[name].shape == theirs[name].shape}
    if model.method is not None:
        model.method.load_state_dict(shared, strict=False)
    groups = [sorted(names) for names in (shared, mine.keys() - shared, theirs.keys() - shared)]
    log.info(
        "%s: loaded: the backbone (%d tensors), method parameters: %s; new: %s; not used: %s",
        model.config._checkpoint,
        len(old.backbone.lm.state_dict()),
        *(", ".join(names) or "none" for names in groups),
    )


def embed_scale(model: AdaptiveLM, old: AdaptiveLM | None) -> float:
    """The factor of the embeddings: that of the old model, or the one that the method of the new model needs."""
    if old is not None:
        return cast(float, old.config.embed_scale)
    if model.config.init != "scaled":
        return 1.0
    width = model.backbone.config.hidden_size
    own = float(getattr(model.backbone.lm.get_input_embeddings(), "embed_scale", 1.0))
    return (model.method.embed_scale(width) if model.method is not None else (2.5 * width) ** 0.5) / own
