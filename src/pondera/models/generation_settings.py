"""Generation settings of a checkpoint, for the model that is built on it."""

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
"""Settings that greedy decoding does not read."""

log = logging.getLogger(__name__)


def storable(config: GenerationConfig) -> GenerationConfig:
    """A copy that `save_pretrained` accepts.

    Older checkpoints have sampling settings without ``do_sample: true``. transformers reads such a file, warns, and
    refuses to write it again. Greedy decoding does not read those settings, so the copy leaves them out.
    """
    config = copy.deepcopy(config)
    if isinstance(config.pad_token_id, int) and config.pad_token_id < 0:  # "there is none", in some older checkpoints
        config.pad_token_id = None
    try:
        config.validate(strict=True)
    except ValueError:
        unread = [name for name in SAMPLING if getattr(config, name, None) is not None]
        log.info("generation_config.json: do_sample is not true; left out: %s", ", ".join(unread))
        for name in unread:
            setattr(config, name, None)
    return config
