"""Token embeddings with a factor inside the module, as Gemma has it.

Shapes: B batch, T tokens, D width, V vocabulary.
"""

from __future__ import annotations

import copy
import functools
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pondera.core.hf import PreTrainedModel


class ScaledEmbedding(nn.Embedding):
    """A table whose rows are multiplied as they are looked up; whoever asks the module gets what the layers get.

    Args:
        table: whose weight this one shares; a factor of its own is kept, too.
        scale: the further factor.
    """

    def __init__(self, table: nn.Embedding, scale: float) -> None:
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = table.num_embeddings, table.embedding_dim
        self.padding_idx, self.max_norm, self.norm_type = None, None, 2.0
        self.scale_grad_by_freq, self.sparse = False, False
        self.weight = table.weight
        if hasattr(table, "_is_hf_initialized"):  # else `post_init` would draw the rows anew
            self._is_hf_initialized = table._is_hf_initialized
        own = getattr(table, "scalar_embed_scale", None)  # of a buffer that is not filled yet while weights are loaded
        self.embed_scale = scale * float(getattr(table, "embed_scale", 1.0) if own is None else own)

    def forward(self, input: Tensor) -> Tensor:
        """Scaled embeddings, ``[B, T, D]``."""
        return F.embedding(input, self.weight) * self.embed_scale


def put_scale(lm: PreTrainedModel, scale: float) -> None:
    """Makes the token embeddings of a causal LM `scale` times as large, and has the LM fold that in when saved by itself.

    Saved by itself, `lm` is a plain model of its architecture, whose class has no place for the factor.
    """
    if scale == 1.0:
        return
    lm.set_input_embeddings(ScaledEmbedding(cast(nn.Embedding, lm.get_input_embeddings()), scale))
    object.__setattr__(lm, "save_pretrained", functools.partial(_save_folded, lm, scale))


@torch.no_grad()
def _save_folded(lm: PreTrainedModel, scale: float, save_directory: Any, **options: Any) -> None:
    """Saves a plain model that computes the same: larger rows of the table, and an output matrix that is not tied."""
    config = copy.deepcopy(lm.config)
    config.tie_word_embeddings = False
    table = cast(nn.Embedding, lm.get_input_embeddings()).weight
    weights = {name: tensor.clone() for name, tensor in lm.state_dict().items()}
    for name, parameter in lm.named_parameters(remove_duplicate=False):
        if parameter is table:
            of_head = lm.get_output_embeddings() is not None and name.startswith(
                _name_of(lm, lm.get_output_embeddings())
            )
            weights[name] = parameter.clone() if of_head else parameter * scale
    plain = type(lm).from_pretrained(None, config=config, state_dict=weights, dtype=lm.dtype)
    plain.generation_config = lm.generation_config
    plain.save_pretrained(save_directory, **options)


def _name_of(lm: nn.Module, part: Any) -> str:
    return next(name for name, module in lm.named_modules() if module is part)
