"""A model and its tokenizer in one call, with a KV cache method or a think method on it if wanted."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pondera.core import spec
from pondera.core.errors import UserError
from pondera.inference import load as loading

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast

    from pondera.methods.kv_cache.base import KVCacheMethod
    from pondera.methods.think.base import Think
    from pondera.models.adaptive_lm import AdaptiveLM


def load(
    name: str | Path,
    kv_cache: str | KVCacheMethod | None = None,
    think: str | Think | None = None,
    device: str | None = None,
    dtype: str | torch.dtype | None = None,
    *,
    calibrate: str | None = None,
    calibrate_tokens: int = 65536,
    tokenizer: str | Path | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    kernels: str = "native",
    weights: str | None = None,
    **others: Any,
) -> tuple[AdaptiveLM, PreTrainedTokenizerFast]:
    """Loads a model and its tokenizer; plain ``model.generate`` then uses the methods named here.

    Args:
        name: a run folder, a model folder, a GGUF file, ``"smollm2"``, or a hub name of any causal LM of transformers.
        kv_cache: how much of the KV cache to keep, as text or as an object, e.g. ``"SnapKV(1024)"`` or ``SnapKV(1024)``.
        think: how much to compute for each token, as text or as an object, e.g. ``"PonderLM2(thoughts=1)"``. On a checkpoint
            that was not trained with it, what it adds is untrained.
        device: where the model goes; default: the accelerator if there is one, else the CPU.
        dtype: of the weights, e.g. ``"bfloat16"`` or ``torch.bfloat16``; default: as they are saved.
        calibrate: a text file, folder or dataset, for a KV cache method that is fitted to the model first, such as VQKV;
            default: the training text of a run.
        calibrate_tokens: how many of its tokens are read.
        kernels: ``"native"``: on a CPU, without gradients, products of at most 8 rows (where the model decodes) read each
            weight once; they equal those of torch up to rounding. ``"torch"``: all products are those of torch.
        weights: ``"int8"``: the linear layers get int8 weights, with which a model on a CPU decodes faster; scores change a
            little (`pondera eval MODEL --weights int8` says how much). Such a model is not trained or saved.
        tokenizer, revision, trust_remote_code: see `pondera.inference.load.load`.
        others: nothing else is allowed; the error names what is.

    Returns:
        The model, in eval mode, and its tokenizer. Without `kv_cache` and `think` the model computes what the checkpoint
        computes in transformers, bit for bit with ``kernels="torch"``.

    Raises:
        UserError: no such model, method or argument (with the nearest name), a method that does not fit the model, or one
            that needs `calibrate`.

    Example::

        model, tokenizer = load("path/to/model", kv_cache="H2O(0.25)")
        prompt = tokenizer("The sea", return_tensors="pt").to(model.device)
        print(tokenizer.decode(model.generate(**prompt, max_new_tokens=20)[0]))
    """
    loading.refuse_others(others, load)
    found = open_model(
        name,
        kv_cache,
        None if think is None else _think(think),
        calibrate,
        calibrate_tokens,
        device=device,
        dtype=None if dtype is None else str(dtype).removeprefix("torch."),
        tokenizer=tokenizer,
        revision=revision,
        trust_remote_code=trust_remote_code,
        kernels=kernels,
        weights=weights,
    )
    return found.model, found.tokenizer


def open_model(
    name: str | Path,
    kv_cache: str | KVCacheMethod | None = None,
    think: str | None = None,
    calibrate: str | None = None,
    calibrate_tokens: int = 65536,
    **options: Any,
) -> loading.Loaded:
    """Like `load`, with the run and the name of the model.

    Args:
        name, kv_cache, think, calibrate, calibrate_tokens: as for `load`.
        options: further arguments of `pondera.inference.load.load`.
    """
    method = _kv_cache(kv_cache)
    if method is None and calibrate is not None:
        raise UserError("calibrate: text to fit a KV cache method to, and none is named; add kv_cache='VQKV(2.75)'")
    if method is not None and not method.fitted and calibrate is None and not Path(name).expanduser().is_dir():
        raise _needs_text(method)  # a hub name, whose weights would be downloaded first
    found = loading.load(name, think=think, **options)
    if method is not None:
        _attach(found, method, calibrate, calibrate_tokens)
    return found


def _think(given: str | Think) -> str:
    """The spec string of a think method."""
    from pondera.methods.think.base import Think

    if not isinstance(given, (str, Think)):
        raise UserError(f"think: expected text such as 'PonderLM2(thoughts=1)' or a think method, got {given!r}")
    text = given if isinstance(given, str) else repr(given)
    spec.find(spec.parse(text).name, "think")
    return text


def _kv_cache(given: str | KVCacheMethod | None) -> KVCacheMethod | None:
    """The method that was given, built if it is text."""
    if given is None:
        return None

    from pondera.methods.kv_cache.base import KVCacheMethod

    if isinstance(given, KVCacheMethod):
        return given
    if not isinstance(given, str):
        raise UserError(f"kv_cache: expected text such as 'H2O(0.25)' or a method such as H2O(0.25), got {given!r}")
    return spec.build(given, "kv_cache")


def _attach(loaded: loading.Loaded, method: KVCacheMethod, calibrate: str | None, tokens: int) -> None:
    """Gives a model its KV cache method, fitted first if it has to be."""
    from pondera.methods.kv_cache.base import compressible
    from pondera.models.config import AdaptiveConfig

    model, text = loaded.model, repr(method)
    config = model.backbone.config
    others = {seam: getattr(model.config, seam) for seam in spec.SEAMS if seam != "kv_cache"}
    AdaptiveConfig(backbone=config, kv_cache=text, **others)  # refuses what cannot be combined
    if not method.fitted:
        if calibrate is None and loaded.run is None:
            raise _needs_text(method)
        from pondera.evaluation.perplexity import context_of
        from pondera.evaluation.windows import calibration

        samples = calibration(loaded, calibrate, tokens, context_of(None, loaded))
        method.bind(config)
        method.to(model.device)
        method.fit(model, samples)
    method.to(model.device)
    method.check(config, compressible(config))
    model.config.kv_cache, model.kv_cache = text, method


def _needs_text(method: KVCacheMethod) -> UserError:
    return UserError(
        f"kv_cache: {method!r} is fitted to a model before it is used, and this model is not from a run; add "
        "calibrate='book.txt' (a text file, a folder or a dataset; on the command line: --calibrate book.txt)"
    )
