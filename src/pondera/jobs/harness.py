"""Pondera models in EleutherAI's evaluation harness (``pip install "pondera[eval]"``).

Once installed beside a harness that finds models by entry point (those after 0.4.13), the usual command knows them:

    lm_eval --model pondera --model_args pretrained=runs/ponderlm2 --tasks lambada_openai

Harness 0.4.13 and earlier know only the models in their own source tree. There the same command has another first word,

    pondera-lm-eval --model pondera --model_args pretrained=runs/ponderlm2 --tasks lambada_openai

(or ``python -m pondera.jobs.harness``); it takes everything that ``lm_eval`` takes. From Python, importing this module
makes ``lm_eval.simple_evaluate(model="pondera", ...)`` work with either.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from pondera.ground.errors import UserError
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
            "max_length": max_length or getattr(loaded.model.backbone.config, "max_position_embeddings", None),
            "add_bos_token": add_bos_token,
            "prefix_token_id": prefix_token_id,
            "truncation": truncation,
        }
        super().__init__(**arguments)


def main() -> None:
    """The harness's own command line, knowing `pondera`."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except UserError as error:
        sys.exit(f"pondera-lm-eval: {error}")


if __name__ == "__main__":
    main()
