"""Adapter for EleutherAI's lm-evaluation-harness (in a clone: ``pip install ".[eval]"``).

    pondera lm-eval --model pondera --model_args pretrained=runs/ponderlm2-seed0 --tasks lambada_openai

``examples/lm_eval`` has tasks that read local files. lm-eval after 0.4.13 finds the adapter through its entry point. Earlier
versions need ``pondera lm-eval``, or a program that imports this module.

Shapes: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import inspect
from typing import Any, cast

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from pondera.core.errors import UserError, unknown
from pondera.data.tokenizer import check_ids
from pondera.evaluation.chunked_forward import chunked_forward
from pondera.inference.generate import effort_arguments
from pondera.inference.load import load


@register_model("pondera")
class PonderaLM(HFLM):
    """An lm-eval model for everything that `pondera.inference.load.load` opens.

    A model with a KV cache method is fed through its cache a few tokens at a time, as in ``pondera eval``. In a single call
    without a cache nothing would be evicted, and every score would be that of the full cache.

    Args:
        pretrained: a run folder, a model folder, or a hub name.
        device: the device of the model (default: `None`, the accelerator if there is one).
        batch_size: requests per forward pass, or ``"auto"``.
        max_batch_size: the first batch size that ``"auto"`` tries.
        max_length: maximum tokens of a request (default: `None`, all positions of the model).
        add_bos_token: start every request with BOS (default: `None`, as the tokenizer does).
        prefix_token_id: the token before a request without context (default: `None`, BOS, otherwise EOS).
        truncation: truncate prompts that are too long for generation, instead of refusing them.
        dtype: of the weights: ``auto`` (as saved), ``float32``, ``bfloat16`` or ``float16``.
        tokenizer: a folder or hub name of a tokenizer that replaces the model's own.
        revision: branch, tag or commit of a hub model.
        trust_remote_code: run Python code that comes with the checkpoint.
        effort: ``low``, ``medium``, ``high`` or a number from 0 (one pass) to 1.
        max_passes: the maximum number of passes per token.
        unknown_arguments: always refused; the error suggests the nearest name.

    Raises:
        UserError: the model does not exist, or an argument is unknown or invalid.
    """

    def __init__(
        self,
        pretrained: str,
        device: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int = 64,
        max_length: int | None = None,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        truncation: bool = False,
        dtype: str | None = None,
        tokenizer: str | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        effort: str | float | None = None,
        max_passes: int | None = None,
        **unknown_arguments: Any,
    ) -> None:
        for name in unknown_arguments:
            raise unknown("model argument", name, _arguments())
        if device is not None and device.startswith("cuda") and not torch.cuda.is_available():
            device = None  # the command line of lm-eval passes cuda:0 by default
        loaded = load(
            pretrained,
            device,
            dtype=dtype,
            tokenizer=tokenizer,
            revision=revision,
            trust_remote_code=trust_remote_code,
        )
        self.loaded, self.adaptive = loaded, loaded.model
        self.budget = effort_arguments(loaded.model, effort, max_passes)
        _pad_with_a_known_token(loaded.tokenizer, loaded.model.embedded)
        arguments: dict[str, Any] = {
            "pretrained": loaded.model,
            "tokenizer": loaded.tokenizer,
            "backend": "causal",
            "batch_size": batch_size,
            "max_batch_size": max_batch_size,
            "max_length": max_length or loaded.model.positions,
            "add_bos_token": add_bos_token,
            "prefix_token_id": prefix_token_id,
            "truncation": truncation,
        }
        super().__init__(**arguments)

    def tok_encode(self, *args: Any, **kwargs: Any) -> list[int]:
        """Encodes a text; refuses a token that the model does not embed."""
        ids = cast(Any, super()).tok_encode(*args, **kwargs)
        check_ids(ids, self.loaded.tokenizer, self.adaptive.embedded)
        return ids

    def tok_batch_encode(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Encodes texts as padded ids ``[B, T]`` with a mask; refuses a token that the model does not embed."""
        ids_BT, mask_BT = cast(Any, super()).tok_batch_encode(*args, **kwargs)
        check_ids(ids_BT.numpy(), self.loaded.tokenizer, self.adaptive.embedded)
        return ids_BT, mask_BT

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """Logits ``[B, T, V]`` of right-padded requests ``[B, T]``; no token attends to the padding."""
        if self.adaptive.kv_cache is None and self.adaptive.memory is None:
            with torch.no_grad():
                return cast(Tensor, self.adaptive(inps, **self.budget).logits)
        parts = chunked_forward(self.adaptive, self.adaptive.new_cache(), inps, budget=self.budget)
        return torch.cat([logits_BTV for _, logits_BTV in parts], dim=1)

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **generation_kwargs: Any) -> Tensor:
        arguments = {**generation_kwargs, **self.budget}
        return cast(Any, super())._model_generate(context, max_length, stop, **arguments)


def _arguments() -> list[str]:
    """The names that ``--model_args`` accepts."""
    parameters = inspect.signature(PonderaLM.__init__).parameters.values()
    return [each.name for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD and each.name != "self"]


def _pad_with_a_known_token(tokenizer: Any, embedded: int) -> None:
    """Makes sure that the model embeds the padding token; no token attends to it, so any will do."""
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= embedded:
        if tokenizer.eos_token_id is None or tokenizer.eos_token_id >= embedded:
            raise UserError("tokenizer: it has no padding or EOS token that the model embeds; set its eos_token")
        tokenizer.pad_token = tokenizer.eos_token
