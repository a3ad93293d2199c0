"""ScaledEmbedding: token embeddings with a factor inside the module, as in Gemma.

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
    """An embedding that multiplies its output by a constant.

    Args:
        table: provides the weight, which is shared; if it has a scale, both scales are multiplied.
        scale: the additional factor.
    """

    def __init__(self, table: nn.Embedding, scale: float) -> None:
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = table.num_embeddings, table.embedding_dim
        self.padding_idx, self.max_norm, self.norm_type = None, None, 2.0
        self.scale_grad_by_freq, self.sparse = False, False
        self.weight = table.weight
        if hasattr(table, "_is_hf_initialized"):  # else `post_init` would initialise the weight again
            self._is_hf_initialized = table._is_hf_initialized
        own = getattr(table, "scalar_embed_scale", None)  # the buffer is not filled yet while weights are loaded
        self.embed_scale = scale * float(getattr(table, "embed_scale", 1.0) if own is None else own)

    def forward(self, input: Tensor) -> Tensor:
        """Scaled embeddings, ``[B, T, D]``."""
        return F.embedding(input, self.weight) * self.embed_scale


def put_scale(lm: PreTrainedModel, scale: float) -> None:
    """Scales the token embeddings of a causal LM; `lm.save_pretrained` folds the scale into the weights.

    The class of a plain model has no scale, so a separately saved `lm` needs it in its weights.
    """
    if scale == 1.0:
        return
    lm.set_input_embeddings(ScaledEmbedding(cast(nn.Embedding, lm.get_input_embeddings()), scale))
    object.__setattr__(lm, "save_pretrained", functools.partial(_save_folded, lm, scale))


@torch.no_grad()
def _save_folded(lm: PreTrainedModel, scale: float, save_directory: Any, **options: Any) -> None:
    """Saves an equivalent plain model, with the scale in the embedding weights and an untied output matrix."""
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
