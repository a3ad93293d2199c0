"""The doctor: checks before training whether a run works on this machine, and estimates its memory and time."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
import os
import platform
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pondera.core import spec
from pondera.core.errors import UserError
from pondera.core.run_config import DataConfig, RunConfig, TrainConfig
from pondera.core.versions import passed, was_tested
from pondera.cost.schedule import DecoderPass
from pondera.data.text import HUB_NAME
from pondera.data.tokenizer import bpe_size, load_tokenizer

if TYPE_CHECKING:
    from pondera.models.adaptive_lm import AdaptiveLM

KNOWN_GOOD = {"torch": ">=2.8", "transformers": ">=5.20,<5.25"}  # as in pyproject.toml
EFFICIENCY = 0.6  # approximate speed of training as a share of a large matrix product's speed
LIBRARIES = 0.7e9  # bytes used by torch and transformers alone
STATE_BYTES = 16  # per parameter: weight, gradient and AdamW's two moments, in float32
NUMBER_BYTES = 4  # of a frozen weight


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Args:
        level: ``"ok"``, ``"warning"`` (the run works, but read the text) or ``"problem"`` (the run cannot work).
        topic: the subject of the check.
        text: the result and, unless ok, the remedy.
    """

    level: str
    topic: str
    text: str


def examine(config: RunConfig) -> Iterator[Finding]:
    """Checks installation, machine, data, model, memory and time, in this order.

    It trains and downloads nothing and does not read the weights of a checkpoint. It writes only native kernels, which it
    builds as at first use. It takes a few seconds, to import torch and to time a matrix product.

    Args:
        config: the config of the run.

    Yields:
        One finding per check. If the model cannot be built, the checks that need a model are skipped.
    """
    versions = list(_versions())
    yield from versions
    if any(finding.level == "problem" for finding in versions):
        return
    yield from _machine()
    from pondera.training.build import resolve

    config = resolve(config)
    basics = [*_data(config.data), *_training(config.train)]
    yield from basics
    try:
        model = skeleton(config)
    except UserError as error:
        yield Finding("problem", "model", str(error))
        return
    yield from _fit(config, model)
    if not any(finding.level == "problem" for finding in basics):
        yield from _memory(config, model)
        yield from _time(config, model)


def skeleton(config: RunConfig) -> AdaptiveLM:
    """The model of a run without memory for its weights (on torch's ``meta`` device).

    Args:
        config: with the tokenizer resolved by `build.resolve`.

    Raises:
        UserError: a part of the model does not exist, or the parts do not fit together.
    """
    import torch

    from pondera.models.adaptive_lm import AdaptiveLM
    from pondera.models.config import AdaptiveConfig
    from pondera.training.build import adaptive_config
    from pondera.training.lora import put_lora

    adaptive = adaptive_config(config, _vocabulary(config))
    chosen = {seam: getattr(adaptive, seam) for seam in spec.SEAMS}
    with torch.device("meta"):
        # Builds the backbone from its config, so that the weights of a checkpoint are not read.
        model = AdaptiveLM(AdaptiveConfig(backbone=adaptive.backbone, init=adaptive.init, **chosen))
    if config.train.lora:
        put_lora(model, config.train)
    return model


def training_calls(model: AdaptiveLM, context: int) -> list[DecoderPass]:
    """The decoder passes of one training window."""
    if model.method is None:
        return [DecoderPass(context, context)]
    return [call for call in model.method.cost_schedule(context, training=True) if isinstance(call, DecoderPass)]


def training_bytes(config: RunConfig, model: AdaptiveLM) -> dict[str, float]:
    """Approximate bytes per process: ``state`` (weights and optimizer), ``activations`` and ``logits``."""
    from pondera.training.lora import trained_parameters

    shape, train, context = model.backbone.config, config.train, config.data.context
    share = max(1, train.batch_size // _processes())
    windows = min(train.micro_batch_size or share, share)
    width, layers = shape.hidden_size, shape.num_hidden_layers
    inner = getattr(shape, "intermediate_size", None) or getattr(shape, "n_inner", None) or 4 * width
    row = 4.0 * (11 * width + 4 * inner)  # bytes that a Llama layer saves per position for the backward pass, measured
    if train.dtype == "bfloat16":
        row *= 0.6  # matrix products use half the bytes, norms and sums do not
    calls = training_calls(model, context)
    rows = windows * sum(call.queries * call.repeats * (call.layers or layers) for call in calls) / layers
    layerwise = rows * layers * (4.0 * width if train.gradient_checkpointing else row)
    total, trained = sum(parameter.numel() for parameter in model.parameters()), trained_parameters(model)
    return {
        "state": float(STATE_BYTES * trained + NUMBER_BYTES * (total - trained)),
        "activations": layerwise + (rows * row if train.gradient_checkpointing else 0),
        "logits": 3 * 4.0 * windows * context * shape.vocab_size,  # logits, log-probabilities, gradient
    }


def matmul_speed(device: str, dtype: str, seconds: float = 1.0) -> float:
    """FLOP/s of a large matrix product, timed for about `seconds`."""
    import torch

    size = 4096 if device == "cuda" else 1024
    x = torch.randn(size, size, device=device, dtype=getattr(torch, dtype))
    products, spent = -1, 0.0  # the first one is a warm-up
    while spent < seconds or products < 1:
        start = time.perf_counter()
        torch.mm(x, x)
        if device == "cuda":
            torch.cuda.synchronize()
        products += 1
        spent += time.perf_counter() - start if products else 0.0
    return 2.0 * size**3 * products / spent


# Findings


def _versions() -> Iterator[Finding]:
    from packaging.specifiers import SpecifierSet

    yield Finding("ok", "python", platform.python_version())
    for package, good in KNOWN_GOOD.items():
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            yield Finding("problem", package, f'not installed; pip install "{package}{good}"')
            continue
        if SpecifierSet(good).contains(version, prereleases=True):
            if package == "transformers" and not was_tested(version):
                text = f"{version} is not tested; the tests passed on {', '.join(passed())}"
                yield Finding("warning", package, f'{text}: pip install "{package}=={passed()[-1]}"')
                continue
            proof = f"; tested: {', '.join(passed())}" if package == "transformers" else ""
            yield Finding("ok", package, f"{version} (known to work: {good}{proof})")
        else:
            text = f'{version} is not among the versions known to work; pip install "{package}{good}"'
            yield Finding("warning", package, text)


def _machine() -> Iterator[Finding]:
    import torch

    threads, cores = torch.get_num_threads(), os.cpu_count() or 1
    if _device() == "cuda":
        yield Finding("ok", "device", f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}")
    else:
        yield Finding("ok", "device", f"no GPU; {cores} cores of {platform.processor() or platform.machine()}")
    if threads > cores:
        text = f"{threads} threads on {cores} cores compete for cores; OMP_NUM_THREADS={cores} is faster"
        yield Finding("warning", "threads", text)
    else:
        yield Finding("ok", "threads", f"{threads} of {cores}; OMP_NUM_THREADS sets them")
    yield Finding("ok", "memory", f"{_bytes(_free_memory())} free")
    yield from _native()


def _native() -> Iterator[Finding]:
    from pondera.kernels.build import OFF, kernels, why_not

    reasons = sorted({why_not(name) for name in kernels()} - {""})
    if reasons:
        text = f"native kernels are not in use, so the slower torch code runs: {'; '.join(reasons)}"
        yield Finding("ok" if reasons == [OFF] else "warning", "native", text)
    else:
        yield Finding("ok", "native", f"kernels in use: {', '.join(kernels())}")
    yield _products()


def _products() -> Finding:
    """How `pondera generate` and models of `pondera.load` multiply a few rows."""
    from pondera.kernels.build import OFF
    from pondera.kernels.products import FEW, instruction_set, why_not_used

    reason = why_not_used()
    if not reason:
        text = f"decoding on the CPU in float32 and bfloat16 uses {instruction_set()} for up to {FEW} rows; torch does the rest"
        return Finding("ok", "products", text)
    level = "ok" if reason == OFF else "warning"
    return Finding(level, "products", f"decoding uses the slower products of torch: {reason}")


def _data(data: DataConfig) -> Iterator[Finding]:
    here = data.text == "stdlib" or Path(data.text).expanduser().exists()
    if here:
        yield Finding("ok", "text", data.text)
    elif not HUB_NAME.fullmatch(data.text):
        yield Finding("problem", "text", f"data.text: no such file or folder: {data.text!r}")
    elif importlib.util.find_spec("datasets") is None:
        text = f"{data.text!r} is not a local file or folder; to load it as a HF dataset: pip install datasets"
        yield Finding("problem", "text", text)
    else:
        text = f"{data.text!r} is not a local file or folder; it will be loaded as a HF dataset"
        yield Finding("warning", "text", text)
    if data.context < 1:
        yield Finding("problem", "context", f"data.context: a window needs at least 1 token, got {data.context}")


def _training(train: TrainConfig) -> Iterator[Finding]:
    from pondera.training.train import check_settings

    try:
        check_settings(train)
    except UserError as error:
        yield Finding("problem", "train", str(error))
        return
    share, micro = train.batch_size // _processes(), train.micro_batch_size
    shared = f", {share} per process on {_processes()} processes" if _processes() > 1 else ""
    if micro and share > micro and share % micro:
        text = f"{share} windows give micro-batches of {micro} and one of {share % micro}; equal sizes are faster"
        yield Finding("warning", "batch", text)
    else:
        parts = f" in micro-batches of {micro}" if micro and micro < share else ""
        yield Finding("ok", "batch", f"{train.batch_size} windows per step{shared}{parts}")
    if train.dtype == "bfloat16" and _device() == "cpu":
        text = "many CPUs are much slower in bfloat16; compare the time below with --train.dtype float32"
        yield Finding("warning", "dtype", text)
    else:
        yield Finding("ok", "dtype", train.dtype)


def _fit(config: RunConfig, model: AdaptiveLM) -> Iterator[Finding]:
    """Describes the model and reports settings that it does not support."""
    from pondera.training.build import check_freeze_backbone, check_lr_scale
    from pondera.training.lora import own_parameters, trained_parameters
    from pondera.training.train import check_gradient_checkpointing

    shape, method = model.backbone.config, model.method
    count, trained = own_parameters(model), trained_parameters(model)
    chosen = f", {model.chosen} with {model.passes():g} passes per token" if method is not None else ""
    text = f"{shape.model_type}, {_count(count)} parameters, {shape.vocab_size} tokens in the vocabulary{chosen}"
    yield Finding("ok", "model", text)
    if config.train.lora:
        yield Finding(
            "ok", "lora", f"rank {config.train.lora}; {_count(trained)} parameters train, the backbone is frozen"
        )
    for check in (check_gradient_checkpointing, check_freeze_backbone, check_lr_scale):
        try:
            check(model, config.train)
        except UserError as error:
            yield Finding("problem", "train", str(error))
    window = getattr(model.config.backbone, "sliding_window", None)
    if window and "sliding_attention" in model.backbone.layer_types:
        wider = f" ({shape.sliding_window} KV slots, {method.slots_per_token} per token)" if method is not None else ""
        yield Finding("ok", "window", f"layers with a sliding window see {window} tokens{wider}")


def _memory(config: RunConfig, model: AdaptiveLM) -> Iterator[Finding]:
    from pondera.training.lora import trained_parameters

    needed, free = training_bytes(config, model), _free_memory()
    total = sum(needed.values()) + LIBRARIES
    parts = ", ".join(f"{name} {_bytes(value)}" for name, value in needed.items())
    text = f"about {_bytes(total)} needed ({parts}), {_bytes(free)} free"
    if needed["state"] > free and _processes() == 1:
        text += "; weights and optimizer do not fit: use a smaller backbone, a larger machine, or torchrun with FSDP"
        yield Finding("problem", "memory", text)
    elif total > free:
        yield Finding("warning", "memory", f"{text}; a smaller --train.micro_batch_size needs less")
    else:
        yield Finding("ok", "memory", text)
    one = needed["state"] - NUMBER_BYTES * trained_parameters(model)  # without gradients
    checkpoints = one * (config.train.keep + 1)  # one more while it is written
    room = shutil.disk_usage(Path.cwd()).free
    text = f"{config.train.keep} checkpoints need about {_bytes(checkpoints)}, {_bytes(room)} free"
    yield Finding("ok" if checkpoints < room else "problem", "disk", text)


def _time(config: RunConfig, model: AdaptiveLM) -> Iterator[Finding]:
    from pondera.evaluation.cost_report import cost_report

    train, context = config.train, config.data.context
    tokens = train.steps * train.batch_size * context
    try:
        report = cost_report(model, context, train.gradient_checkpointing, lora=train.lora)
        flops = tokens * report["training_flops_per_token"]
    except UserError as error:
        yield Finding("warning", "time", f"cannot be estimated: {error}")
        return
    speed = matmul_speed(_device(), train.dtype)
    seconds = flops / (speed * EFFICIENCY * _processes())
    yield Finding("ok", "training", f"{_count(tokens)} tokens, {flops:.2g} FLOPs")
    basis = f"{speed / 1e9:,.0f} GFLOP/s measured now, at {EFFICIENCY:.0%} efficiency"
    yield Finding(
        "ok", "time", f"about {_duration(seconds)}: estimated from {basis}, without tokenising and validation"
    )


# The machine, and number formats


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _processes() -> int:
    """The number of processes that share the batch, as set by torchrun or accelerate."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _free_memory() -> float:
    import psutil
    import torch

    return torch.cuda.mem_get_info()[0] if _device() == "cuda" else psutil.virtual_memory().available


def _vocabulary(config: RunConfig) -> int:
    """Vocabulary size of the tokenizer; the maximum size if it is not trained yet."""
    tokenizer = config.data.tokenizer
    return bpe_size(tokenizer) or max(load_tokenizer(tokenizer).get_vocab().values()) + 1


def _bytes(value: float) -> str:
    return f"{value / 1e9:.1f} GB" if value >= 1e9 else f"{math.ceil(value / 1e6)} MB"


def _count(value: float) -> str:
    for unit, size in (("billion", 1e9), ("million", 1e6)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:,.0f}"


def _duration(seconds: float) -> str:
    for unit, size in (("years", 3.15e7), ("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.2g} {unit}" if seconds < 100 * size else f"{seconds / size:,.0f} {unit}"
    return f"{max(1, round(seconds))} seconds"
