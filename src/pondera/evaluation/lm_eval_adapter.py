"""Pondera models in EleutherAI's evaluation harness (``pip install "pondera[eval]"``).

    pondera lm-eval --model pondera --model_args pretrained=runs/ponderlm2-seed0 --tasks lambada_openai

``examples/lm_eval`` has tasks that read files of your own. lm-eval after 0.4.13 finds the adapter by its entry point; earlier
ones know it in ``pondera lm-eval``, and in a program that has imported this module.

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
    """Any model that `pondera.inference.load.load` opens, scored by its own forward pass and its own `generate`.

    A model with a cache method is read through its cache, a few tokens at a time, as ``pondera eval`` reads it: in one call
    without a cache nothing would be evicted, and every score would be that of the full cache.

    Args:
        pretrained: a run folder, a model folder, or a hub name.
        device: where the model goes; `None`: the accelerator if there is one.
        batch_size: requests per forward pass, or ``"auto"``.
        max_batch_size: where ``"auto"`` begins.
        max_length: tokens of a request that the model sees; `None`: all its positions.
        add_bos_token: begin every request with BOS; `None`: as the tokenizer does.
        prefix_token_id: what stands before a request without context; `None`: BOS, else EOS.
        truncation: cut prompts that are too long to generate from, instead of refusing them.
        dtype: of the weights: ``auto`` (as they are saved), ``float32``, ``bfloat16`` or ``float16``.
        tokenizer: a folder or hub name with another tokenizer than the model's own.
        revision: branch, tag or commit of a hub model.
        trust_remote_code: run Python code that a checkpoint brings along.
        effort: how much thinking is wanted: ``low``, ``medium``, ``high`` or a number from 0 (one pass) to 1.
        max_passes: no token gets more passes.
        unknown_arguments: none are allowed; they are refused with the nearest name.

    Raises:
        UserError: no such model, an argument that does not exist, or one that does not fit.
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
            device = None  # the harness's command line asks for cuda:0 unless it is told otherwise
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
        """Token ids of a text; refuses a token that the model does not embed."""
        ids = cast(Any, super()).tok_encode(*args, **kwargs)
        check_ids(ids, self.loaded.tokenizer, self.adaptive.embedded)
        return ids

    def tok_batch_encode(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Token ids ``[B, T]`` of texts, padded, and their mask; refuses a token that the model does not embed."""
        ids_BT, mask_BT = cast(Any, super()).tok_batch_encode(*args, **kwargs)
        check_ids(ids_BT.numpy(), self.loaded.tokenizer, self.adaptive.embedded)
        return ids_BT, mask_BT

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """Logits ``[B, T, V]`` of requests ``[B, T]`` that are padded on the right, where no token sees the padding."""
        if self.adaptive.kv_cache is None and self.adaptive.memory is None:
            with torch.no_grad():
                return cast(Tensor, self.adaptive(inps, **self.budget).logits)
        parts = chunked_forward(self.adaptive, self.adaptive.new_cache(), inps, budget=self.budget)
        return torch.cat([logits_BTV for _, logits_BTV in parts], dim=1)

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **generation_kwargs: Any) -> Tensor:
        given = {**generation_kwargs, **self.budget}
        return cast(Any, super())._model_generate(context, max_length, stop, **given)


def _arguments() -> list[str]:
    """What ``--model_args`` may hold."""
    parameters = inspect.signature(PonderaLM.__init__).parameters.values()
    return [each.name for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD and each.name != "self"]


def _pad_with_a_known_token(tokenizer: Any, embedded: int) -> None:
    """Batches are padded with a token that the model embeds; which one does not matter, as no token sees it."""
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= embedded:
        if tokenizer.eos_token_id is None or tokenizer.eos_token_id >= embedded:
            raise UserError(
                "tokenizer: it has neither a padding nor an EOS token that the model embeds; set its eos_token"
            )
        tokenizer.pad_token = tokenizer.eos_token
