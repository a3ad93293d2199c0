"""Makes the generation config of an older checkpoint valid, so that it can be saved."""

from __future__ import annotations

import copy
import logging

from pondera.core.hf import GenerationConfig

SAMPLING = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "top_h",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
)
"""Settings that greedy decoding ignores."""

log = logging.getLogger(__name__)


def storable(config: GenerationConfig) -> GenerationConfig:
    """A copy that `save_pretrained` accepts.

    Older checkpoints have sampling settings without ``do_sample: true``. transformers loads such a file with a warning, but
    does not save it. Greedy decoding ignores those settings, so the copy does not have them.
    """
    config = copy.deepcopy(config)
    if isinstance(config.pad_token_id, int) and config.pad_token_id < 0:  # means `None` in some older checkpoints
        config.pad_token_id = None
    try:
        config.validate(strict=True)
    except ValueError:
        unread = [name for name in SAMPLING if getattr(config, name, None) is not None]
        log.info("generation_config.json: do_sample is not true; ignored: %s", ", ".join(unread))
        for name in unread:
            setattr(config, name, None)
    return config
