"""Loads a model and its tokenizer from a run folder, a model folder, a GGUF file, or a hub checkpoint."""

from __future__ import annotations

import difflib
import inspect
import json
import logging
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from pondera.core.errors import UserError, unknown
from pondera.core.quiet_loading import no_progress_bar
from pondera.core.run_folder import Run, is_run
from pondera.data.text import HUB_NAME, first_line, hub
from pondera.inference.default_model import model_folder
from pondera.kernels import CHOICES, WEIGHTS
from pondera.models import checkpoints

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from pondera.core.hf import PreTrainedModel
    from pondera.models.adaptive_lm import AdaptiveLM

DTYPES = ("auto", "float32", "bfloat16", "float16")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")

log = logging.getLogger(__name__)


@dataclass
class Loaded:
    """A loaded model.

    Args:
        model: the model, in eval mode.
        tokenizer: its tokenizer.
        name: name in tables.
        run: its run folder; default: `None`.
        foreign: true if the checkpoint is not a Pondera model and was wrapped as an `AdaptiveLM`.
    """

    model: AdaptiveLM
    tokenizer: PreTrainedTokenizerFast
    name: str
    run: Run | None = None
    foreign: bool = False


def load(
    path: str | Path,
    device: str | None = None,
    *,
    dtype: str | None = None,
    tokenizer: str | Path | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    think: str | None = None,
    kernels: str = "native",
    weights: str | None = None,
    **others: Any,
) -> Loaded:
    """Loads a model and its tokenizer.

    Only safetensors are supported, because pickled weights can execute code. If there is a manifest, as in every model that
    Pondera trained, the hash of each file is checked.

    Args:
        path: a run folder (its final model, else its newest intact checkpoint), a Pondera model folder, or any causal LM
            of transformers, which is wrapped as an `AdaptiveLM` without methods: a folder, a hub name, a GGUF file
            (`pondera.inference.gguf`), or ``"smollm2"`` (`pondera.inference.default_model`).
        device: device of the model; default: `None`, the accelerator if there is one, else the CPU.
        dtype: dtype of the weights, one of `DTYPES`; default: `None`, same as ``"auto"``, the saved dtype.
        tokenizer: a folder or hub name of another tokenizer; default: `None`, the one of the model.
        revision: branch, tag or commit of a hub model and of its tokenizer; default: `None`, ``"main"``.
        trust_remote_code: execute Python code of the checkpoint. Use this only for code that you have read.
        think: a think method to build on the checkpoint. Its new parameters are untrained; from the method of another Pondera
            model it takes the parameters that both have.
        kernels: how the linear layers multiply on the CPU where the model decodes (`pondera.kernels.linear`): ``"native"``, or
            ``"torch"``, which is slower.
        weights: ``"int8"``: linear layers get int8 weights (`pondera.kernels.int8`), and `device` is the CPU by default;
            ``"int8-prompts"``: prompts are multiplied in int8, too; default: `None`, as in `dtype`.
        others: nothing else is allowed; the error names what is.

    A tokenizer can have more tokens than the model has embeddings. A text with such a token raises when it is encoded.

    Raises:
        UserError: the model does not exist, is damaged, or has no tokenizer; or an unknown argument.

    Example::

        loaded = load("runs/ponderlm2")
        loaded.model(**loaded.tokenizer("Once upon", return_tensors="pt").to(loaded.model.device)).passes
    """
    refuse_others(others, load)
    if kernels not in CHOICES:
        raise unknown("kernels", str(kernels), CHOICES)
    if weights is not None and weights not in WEIGHTS:
        raise unknown("weights", str(weights), WEIGHTS)
    folder = model_folder(path)
    source, run = _find(Path(folder).expanduser(), str(path))

    from pondera.models.generation_settings import storable

    if source.is_dir():
        _check_files(source)
    if revision not in (None, "main") and source.is_dir():
        raise UserError(f"revision: {revision!r}: {str(path)!r} is a folder and has no revisions; leave revision out")
    if dtype is not None and dtype not in DTYPES:
        raise unknown("dtype", str(dtype), DTYPES)
    remote: dict[str, Any] = {"revision": revision or "main", "trust_remote_code": trust_remote_code}
    if think is None:
        lm = _weights(source, str(path), {**remote, "dtype": dtype or "auto"})
    elif remote == {"revision": "main", "trust_remote_code": False}:
        lm = _with_think(source, think, dtype)
    else:
        raise UserError(
            "think: cannot be added to a checkpoint that needs revision or trust_remote_code; leave one out"
        )
    vocabulary = _tokenizer(source, str(path), remote) if tokenizer is None else _other_tokenizer(tokenizer, remote)
    own = lm.config.model_type == "pondera"
    lm.generation_config = storable(lm.generation_config)
    _set_special_tokens(lm, vocabulary, own and (think is None or lm.config._retrofit))
    name = run.config.name if run else _name(path, folder, source)
    model = _placed(lm if own else _wrapped(lm), device if weights is None else device or "cpu")

    _put_kernels(model, kernels, weights)
    return Loaded(model, vocabulary, name, run, foreign=not own)


def _name(path: str | Path, folder: str | Path, source: Path) -> str:
    """The name of a model in tables: that of its folder or GGUF file, else what was given."""
    if folder != path:
        return Path(path).stem
    return source.resolve().name if source.is_dir() else str(path)


OTHERS = {
    "device_map": "the whole model goes to one device: give device='cuda:0'",
    "torch_dtype": "its name here is dtype",
    "kv_cache": "pondera.load takes it: pondera.load(MODEL, kv_cache='H2O(0.25)')",
    "head": "a head is trained with its model: pondera train plain --backbone MODEL --head ...",
    "chunk": "a chunk method is trained with its model: pondera train conceptlm --backbone MODEL",
    "memory": "a memory is trained with its model: pondera train elasticmemory",
}
"""Arguments of other loaders, and settings of a model that cannot be added to a checkpoint; and what to do."""


def refuse_others(given: dict[str, Any], function: Callable[..., Any]) -> None:
    """Raises for an argument that a function does not have.

    Raises:
        UserError: the name, and the nearest that the function has.
    """
    allowed = [name for name in inspect.signature(function).parameters if name != "others"]
    for name in given:
        if name in OTHERS and name not in allowed:
            raise UserError(f"unknown argument of load {name!r}: {OTHERS[name]} (allowed: {', '.join(allowed)})")
        raise unknown("argument of load", name, allowed)


def _find(path: Path, given: str) -> tuple[Path, Run | None]:
    """The folder (or hub name) of the weights, and the run folder that contains it."""
    if path.is_file():
        raise UserError(
            f"{given!r} is a file; give a .gguf file, or a folder: a run folder, or a model folder with config.json"
        )
    if not path.is_dir():
        if path.suffix.lower() == ".gguf":
            raise UserError(f"no such file: {given!r}; give the path of a GGUF file, a folder, or a hub name")
        if HUB_NAME.fullmatch(given):
            return path, None
        raise UserError(f"no such folder: {given!r}{_near(path)}; give a run or model folder, or a hub name")
    if is_run(path):
        run = Run(path)
        if (run.model_dir / "config.json").is_file():
            return _whole(run.model_dir), run
        folder, complaints = checkpoints.newest_intact(run)
        if folder is None:
            why = f"has no intact checkpoint: {'; '.join(complaints)}" if complaints else "has no checkpoint yet"
            raise UserError(f"{given!r} {why}; wait for the next one, or train it again with another --out")
        for complaint in complaints:
            log.warning("%s; %s is used instead", complaint, folder.name)
        return folder, run
    if (path / "config.json").is_file():
        return _whole(path), next((Run(above) for above in path.resolve().parents[:2] if is_run(above)), None)
    runs = sorted(entry.name for entry in path.iterdir() if entry.is_dir() and is_run(entry))
    hint = f"; it contains the runs {', '.join(runs)}: give one of them" if runs else "; give a run or model folder"
    raise UserError(f"{given!r} is neither a run nor a model folder (no config.json){hint}")


def _whole(folder: Path) -> Path:
    """Checks a folder against its manifest and returns it."""
    manifest = folder / checkpoints.MANIFEST
    if manifest.is_file() and (damage := checkpoints.find_damage(folder)):
        raise UserError(
            f"{folder} is damaged ({damage}); copy it again, or if you changed it yourself, delete {manifest}"
        )
    return folder


def _near(path: Path) -> str:
    names = [entry.name for entry in path.parent.iterdir() if entry.is_dir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {str(path.with_name(near[0]))!r}?" if near else ""


def _check_files(folder: Path) -> None:
    """Raises for missing, pickled, damaged or incomplete weight files, by file name."""
    from safetensors import SafetensorError, safe_open

    found = sorted(folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            shards = {folder / name for name in json.loads(index.read_bytes())["weight_map"].values()}
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{index} is damaged; copy it again") from None
        if missing := sorted(shards - set(found)):
            raise UserError(f"{missing[0]}: this shard of the weights is missing; copy it into the folder")
    if not found:
        pickled = sorted(file.name for pattern in PICKLES for file in folder.glob(pattern))
        if pickled:
            raise UserError(
                f"{folder} has pickled weights ({pickled[0]}), which can execute code when loaded and are not supported; "
                "convert them if you trust them: load with transformers, then model.save_pretrained(FOLDER)"
            )
        raise UserError(f"{folder} has a config.json but no weights (model.safetensors)")
    for file in found:
        try:
            with safe_open(file, "pt"):  # reads the header and checks the size of the file
                pass
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} is damaged ({first_line(error)}); copy it again or give another folder") from None


def _weights(source: Path, given: str, options: dict[str, Any]) -> Any:
    """Loads the transformers model; missing and unexpected weights raise.

    Args:
        source: a folder or hub name.
        given: the path as given by the user.
        options: further arguments of ``from_pretrained``.
    """
    import pondera.models.adaptive_lm  # noqa: F401 (registers the models with the Auto classes of transformers)
    from pondera.core.hf import AutoModelForCausalLM

    local = source.is_dir()
    try:
        with no_progress_bar() if local else hub():
            loading: Any = AutoModelForCausalLM.from_pretrained(
                str(source), use_safetensors=True, output_loading_info=True, local_files_only=local, **options
            )
            model, info = loading
    except UserError:
        raise
    except Exception as error:  # a wrong config can raise anything
        what = "its model cannot be loaded" if local else "no such folder, and no hub model that loads"
        near = "" if local else _near(source)
        raise UserError(f"{given!r}: {what} ({first_line(error)}){near}") from error
    for kind in ("missing", "unexpected"):
        if keys := sorted(info[f"{kind}_keys"]):
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise UserError(
                f"{given!r}: the weights do not match config.json: {kind} {', '.join(keys[:3])}{more}; "
                "give a folder whose files belong to one checkpoint"
            )
    return model


def _with_think(source: Path, think: str, dtype: str | None) -> AdaptiveLM:
    """An `AdaptiveLM` with this think method, on the weights of a checkpoint."""
    from pondera.models.adaptive_lm import AdaptiveLM
    from pondera.models.config import AdaptiveConfig

    with no_progress_bar() if source.is_dir() else hub():
        model = AdaptiveLM(AdaptiveConfig(backbone=str(source), think=think, dtype=None if dtype == "auto" else dtype))
    log.warning("think: %s is new on this checkpoint, and what it adds is untrained", think)
    return model


def _wrapped(lm: PreTrainedModel) -> AdaptiveLM:
    """Wraps a loaded model as an `AdaptiveLM` without methods."""
    import torch

    from pondera.models.adaptive_lm import AdaptiveLM
    from pondera.models.backbone import Backbone
    from pondera.models.config import AdaptiveConfig

    with torch.device("meta"):
        model = AdaptiveLM(AdaptiveConfig(backbone=lm.config))
    model.backbone = Backbone(lm)
    model.generation_config = lm.generation_config
    return model


def _other_tokenizer(given: str | Path, options: dict[str, Any]) -> PreTrainedTokenizerFast:
    source = Path(given).expanduser()
    if not source.is_dir() and not HUB_NAME.fullmatch(str(given)):
        raise UserError(f"tokenizer: no such folder: {str(given)!r}{_near(source)}; give a folder or a hub name")
    return _tokenizer(source, str(given), {**options, "revision": "main"})


def _tokenizer(source: Path, given: str, options: dict[str, Any]) -> PreTrainedTokenizerFast:
    from transformers import AutoTokenizer

    advice = "save the tokenizer of the model there: tokenizer.save_pretrained(FOLDER)"
    local = source.is_dir()
    if local and not any([*source.glob("tokenizer*"), *source.glob("vocab*")]):
        raise UserError(f"{given!r}: no tokenizer in the folder; {advice}")
    try:
        with nullcontext() if local else hub():
            tokenizer = AutoTokenizer.from_pretrained(str(source), local_files_only=local, **options)
    except Exception as error:  # a damaged file can raise anything
        raise UserError(f"{given!r}: its tokenizer cannot be loaded ({first_line(error)}); {advice}") from None
    if not tokenizer.is_fast:
        raise UserError(f"{given!r}: its tokenizer has no fast version (tokenizer.json); convert it and {advice}")
    return tokenizer


def _set_special_tokens(lm: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, own: bool) -> None:
    """Fills in missing special tokens of the generation config from the tokenizer.

    Ids from ``generation_config.json`` are kept, since a chat model has several end tokens. Default ids of an architecture are
    wrong for a tokenizer that Pondera trained, so for a Pondera model (`own`) they are replaced.
    """
    config, rows = lm.generation_config, cast(Any, lm.get_input_embeddings()).weight.shape[0]
    by_default = own and bool(getattr(config, "_from_model_config", False))
    for role in ("bos_token_id", "eos_token_id", "pad_token_id"):
        token, known = getattr(tokenizer, role), getattr(config, role)
        ids = known if isinstance(known, list) else [known]
        if token is not None and token < rows and (known is None or (by_default and token not in ids)):
            setattr(config, role, token)


def _put_kernels(model: AdaptiveLM, kernels: str, weights: str | None) -> None:
    """Chooses how the linear layers of a model multiply, and how its backbone stores their weights."""
    from pondera.kernels.linear import use_kernels
    from pondera.kernels.products import why_not_used

    if weights is not None:
        from pondera.kernels.int8 import use_int8
        from pondera.kernels.int8_rows import fast

        if kernels == "native" and (reason := why_not_used()):
            log.warning(
                "weights='int8': decoding is slower than without, because it needs the native kernel: %s", reason
            )
        if weights == "int8-prompts" and not fast():
            log.warning(
                "weights='int8-prompts': reads prompts slowly, because this CPU has no AVX-512 VNNI; use 'int8'"
            )
        use_int8(model.backbone.lm, native=kernels == "native", prompts=weights == "int8-prompts")
    use_kernels(model, kernels)


def _placed(model: Any, device: str | None) -> AdaptiveLM:
    import torch

    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    try:
        return model.eval().to(device or found)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device={device!r} cannot be used here ({first_line(error)}); leave it out") from None
