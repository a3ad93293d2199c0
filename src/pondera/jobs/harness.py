"""Pondera models in EleutherAI's evaluation harness (``pip install "pondera[eval]"``).

    lm_eval --model pondera --model_args pretrained=runs/ponderlm2-seed0 --tasks lambada_openai

``examples/lm_eval`` has tasks that read files of your own. How the harness comes to know us: `pondera.model.auto`.
"""

from __future__ import annotations

from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from pondera.jobs.load import load


@register_model("pondera")
class PonderaLM(HFLM):
    """Any model that `pondera.jobs.load.load` opens, scored by its own forward pass and its own `generate`.

    Args:
        pretrained: a run folder, a model folder, or a hub name.
        device: where the model goes; none: the accelerator if there is one.
        batch_size: requests per forward pass, or ``"auto"``.
        max_batch_size: where ``"auto"`` begins.
        max_length: tokens of a request that the model sees; none: all its positions.
        add_bos_token: begin every request with BOS; none: as the tokenizer does.
        prefix_token_id: what stands before a request without context; none: BOS, else EOS.
        truncation: cut prompts that are too long to generate from, instead of refusing them.
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
    ) -> None:
        if device is not None and device.startswith("cuda") and not torch.cuda.is_available():
            device = None  # the harness's command line asks for cuda:0 unless it is told otherwise
        loaded = load(pretrained, device)
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
