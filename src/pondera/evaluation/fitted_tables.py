"""Tables of KV cache methods that were fitted before, kept on disk so that the same fit is not repeated."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from pondera.cache.identity import identity
from pondera.core.hf import PreTrainedModel
from pondera.core.paths import cache_folder
from pondera.methods.kv_cache.base import KVCacheMethod

FORMAT = 1
"""Increase it whenever a fit finds other tables for the same model and text."""

log = logging.getLogger(__name__)


def fit(
    method: KVCacheMethod, model: PreTrainedModel, calibration: Sequence[Tensor], cache_dir: Path | None = None
) -> KVCacheMethod:
    """Fits a method to a model, or reads the tables of the same fit from the cache folder.

    A fit is the same if model, method with all its settings, and calibration tokens are. The folder can be deleted at any time.
    If the tables cannot be written, a warning is logged.

    Args:
        method: bound to the model, not fitted.
        model: the model.
        calibration: token ids ``[B, T]``.
        cache_dir: default: ``$PONDERA_CACHE`` or ``~/.cache/pondera``.

    Example::

        method = fit(VQKV(2.75), model, samples)
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file, save_file

    file = (
        cache_folder(cache_dir) / "tables" / f"{type(method).__name__}-{_key(method, model, calibration)}.safetensors"
    )
    if file.is_file():
        try:
            method.load_state_dict(load_file(file, device=str(model.device)))
        except (OSError, SafetensorError, RuntimeError) as error:  # damaged, e.g. by a full disk
            log.warning("%s: cannot be read (%s), so %r is fitted again", file, error, method)
        else:
            log.info("%r: tables of an earlier fit, from %s", method, file)
            return method
    method.fit(model, calibration)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_name(f"{file.name}.{os.getpid()}.part")
        save_file({name: tensor.contiguous() for name, tensor in method.state_dict().items()}, part)
        part.replace(file)
    except OSError as error:
        log.warning("%s: the fitted tables cannot be kept (%s)", file, error.strerror or error)
    return method


def _key(method: KVCacheMethod, model: PreTrainedModel, calibration: Sequence[Tensor]) -> str:
    found = hashlib.sha256(
        json.dumps([FORMAT, repr(method), identity(model), str(model.config.to_json_string())]).encode()
    )
    for ids_BT in calibration:
        found.update(str(tuple(ids_BT.shape)).encode())
        found.update(ids_BT.cpu().long().numpy().tobytes())
    return found.hexdigest()[:16]
