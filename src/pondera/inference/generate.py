"""Generates a continuation of a prompt and reports the passes per token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from pondera.core.errors import UserError
from pondera.data.tokenizer import check_ids
from pondera.inference.load import Loaded, load

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerFast

    from pondera.models.adaptive_lm import AdaptiveLM


@dataclass
class Generated:
    """A generated continuation.

    Args:
        text: the generated text, without special tokens.
        tokens: the text of each token of prompt and continuation (``""`` for all but the last token of a character of
            several tokens).
        passes: passes of each token. The last token, which decoding does not run, is run as well.
        prompt_tokens: number of tokens in the prompt.
        ids: token ids of prompt and continuation.
    """

    text: str
    tokens: list[str]
    passes: list[float]
    prompt_tokens: int
    ids: list[int]


def generate(
    path: str | Path | Loaded,
    prompt: str,
    max_new_tokens: int = 100,
    temperature: float = 0.8,
    top_p: float = 1.0,
    seed: int = 0,
    on_text: Callable[[str], Any] | None = None,
    effort: str | float | None = None,
    max_passes: int | None = None,
    kernels: str = "native",
) -> Generated:
    """Continues `prompt` until the model generates an end token or `max_new_tokens` are reached.

    Args:
        path: argument or result of `load`.
        prompt: the prompt; if empty, the model starts a new document.
        max_new_tokens: maximum number of new tokens.
        temperature: sampling temperature from 0.01 to 100; 0 is greedy decoding.
        top_p: probability mass of nucleus sampling.
        seed: random seed of the sampling; the random state of torch is restored.
        on_text: called with each piece of text when its last character is complete; the pieces join to `text`.
        effort: compute per token: ``"low"``, ``"medium"``, ``"high"`` or a number from 0 (one pass) to 1.
        max_passes: maximum number of passes per token; default: `None`, no limit.
        kernels: as for `load`, of a model that is loaded here; one that is given keeps its own.

    Raises:
        UserError: a setting is out of range, or the prompt and the new tokens exceed the positions of the model.

    Example::

        generate("runs/ponderlm2", "Once upon a time", on_text=lambda text: print(text, end="", flush=True))
    """
    _check(max_new_tokens, temperature, top_p, seed)
    loaded = (
        path if isinstance(path, Loaded) else load(path, kernels=kernels)
    )  # an error in the path appears before torch is imported

    import torch

    from pondera.cache.token_cache import TokenCache
    from pondera.core.hf import CACHE

    model: Any = loaded.model
    budget = effort_arguments(model, effort, max_passes)
    tokenizer = loaded.tokenizer
    ids = _prompt_ids(prompt, tokenizer)
    check_ids(ids, tokenizer, model.embedded)
    _check_room(len(ids), max_new_tokens, model.positions)
    ids_BT = torch.tensor([ids], device=model.device)
    cache = model.new_cache()
    stream = Stream(tokenizer, on_text)
    sampling: dict[str, Any] = {"do_sample": temperature > 0, "num_beams": 1}
    if temperature > 0:
        sampling |= {"temperature": temperature, "top_p": top_p, "top_k": 0}
    with torch.random.fork_rng(), torch.inference_mode():
        torch.manual_seed(seed)
        ids_BT = model.generate(
            ids_BT,
            attention_mask=torch.ones_like(ids_BT),
            **{CACHE: cache},
            max_new_tokens=max_new_tokens,
            streamer=stream,
            **sampling,
            **budget,
        )
        passes = [1.0] * ids_BT.shape[1]
        if isinstance(cache, TokenCache):
            model(ids_BT[:, cache.tokens :], **{CACHE: cache}, **budget)
            passes = cast("Tensor", cache.passes_BT)[0].double().tolist()
    return Generated(stream.text, stream.tokens, passes, len(ids), ids_BT[0].tolist())


class Stream:
    """A streamer for `generate` that decodes one token at a time; the first call has the prompt.

    Args:
        tokenizer: decodes the tokens.
        on_text: called with the text after the prompt, without special tokens.

    Attributes:
        text: all text passed to `on_text`.
        tokens: the text of each token.

    Example::

        stream = Stream(tokenizer)
        stream.put(tokenizer("naïve", return_tensors="pt").input_ids)
        stream.tokens  # ["na", "", "ï", "ve"]
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, on_text: Callable[[str], Any] | None = None) -> None:
        from tokenizers.decoders import DecodeStream

        self.tokenizer = tokenizer
        self.on_text = on_text
        self.decoder = DecodeStream(skip_special_tokens=True)
        self.special = dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
        self.text = ""
        self.tokens: list[str] = []
        self._pending: list[int] = []
        self._in_prompt = True

    def put(self, value: Tensor) -> None:
        """Decodes the next tokens."""
        for token in value.flatten().tolist():
            self._pending.append(token)
            piece = self.decoder.step(self.tokenizer.backend_tokenizer, token)
            self._tell(piece)
            self.tokens.append(self.special.get(token, piece or ""))
        self._in_prompt = False

    def end(self) -> None:
        """Adds the rest of an incomplete character to the last token."""
        rest = cast(str, self.tokenizer.decode(self._pending, skip_special_tokens=True))
        self.tokens[-1:] = [token + rest for token in self.tokens[-1:]]
        self._tell(rest)

    def _tell(self, piece: str | None) -> None:
        if piece is None:
            return
        self._pending.clear()
        if piece and not self._in_prompt:
            self.text += piece
            if self.on_text is not None:
                self.on_text(piece)


def start_token(tokenizer: PreTrainedTokenizerFast) -> int:
    """The token before the first token of a document: BOS, else EOS.

    Raises:
        UserError: the tokenizer has neither.
    """
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is None:
        raise UserError("the tokenizer has neither a BOS nor an EOS token to start a document with; set its eos_token")
    return cast(int, start)


def effort_arguments(model: AdaptiveLM, effort: str | float | None, max_passes: int | None) -> dict[str, Any]:
    """Checks an effort and returns it as keyword arguments of the model, without those that are `None`.

    Raises:
        UserError: an invalid effort, or a model without a method that uses it.
    """
    from pondera.core.effort import Effort

    given = {"effort": effort, "max_passes": max_passes}
    given = {name: value for name, value in given.items() if value is not None}
    Effort.of(**given)
    if given and model.method is None:
        raise UserError(f"{next(iter(given))}: this model always runs one pass per token; leave it out")
    return given


def _check(max_new_tokens: int, temperature: float, top_p: float, seed: int) -> None:
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens={max_new_tokens}: give 1 or more")
    if temperature != 0 and not 0.01 <= temperature <= 100:
        raise UserError(f"temperature={temperature}: give 0 (greedy), or a number from 0.01 to 100")
    if not 0 < top_p <= 1:
        raise UserError(f"top_p={top_p}: give a probability above 0 and up to 1 (all tokens)")
    if not 0 <= seed < 2**63:
        raise UserError(f"seed={seed}: give an integer from 0 to 2**63 - 1")


def _prompt_ids(prompt: str, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise UserError("prompt: not UTF-8 text; convert it first") from None
    return tokenizer.encode(prompt) or [start_token(tokenizer)]


def _check_room(prompt_tokens: int, max_new_tokens: int, limit: int | None) -> None:
    if limit is not None and prompt_tokens + max_new_tokens > limit:
        room = limit - prompt_tokens
        advice = f"use max_new_tokens={room} or less" if room > 0 else f"shorten the prompt below {limit} tokens"
        raise UserError(
            f"the prompt has {prompt_tokens} tokens; with {max_new_tokens} new tokens these are "
            f"{prompt_tokens + max_new_tokens}, more than the {limit} positions of this model; {advice}"
        )
