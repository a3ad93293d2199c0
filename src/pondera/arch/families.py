"""What Pondera knows of each model family: one entry per ``model_type``.

To add a family, write an entry in `FAMILIES`. If no function of `pondera.arch.layers` describes its layers, write one there.
A family without an entry still runs in methods that make whole passes, if a check of a few tokens finds them right.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from pondera.arch.layers import Layer, Stack, gated, gated_normed, gated_sandwiched, gpt, qwen3_next
from pondera.core.errors import UserError

Support = Literal["tested", "whole passes", "expected"]
"""How far a family is known: all methods are tested on it; only methods that run whole passes are; it is not tested, and a
check of a few tokens decides when a model is built."""


GATED = (
    *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
)
"""The linear layers of a decoder layer in the Llama family and in those that follow it."""
GPT_NEOX = ("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")


@dataclass(frozen=True)
class Modules:
    """Where a decoder keeps its parts, and how its layers are called.

    Args:
        layers: attribute of the decoder layers.
        norm: of the final norm.
        rotary: of the rotary embedding; `None`: positions are not rotary.
        rotary_by_kind: the rotary embedding is called with the kind of layer.
        positions: of the learned position vectors; `None`: there are none.
        cache_argument: what a layer calls its cache; `None`: what transformers calls it elsewhere.
        linears: the linear layers of a decoder layer, attention first; empty: they are no `nn.Linear`.
        layers_skip_tokens: a call may leave tokens out of whole layers. Layers have to get their cache by name and rotary
            positions with each call.
    """

    layers: str = "layers"
    norm: str = "norm"
    rotary: str | None = "rotary_emb"
    rotary_by_kind: bool = False
    positions: str | None = None
    cache_argument: str | None = None
    linears: tuple[str, ...] = GATED
    layers_skip_tokens: bool = True


@dataclass(frozen=True)
class Family:
    """A model family.

    Args:
        modules: where its decoder keeps its parts; `None`: Pondera runs it by whole passes only.
        layer: describes the layer of a config with a number, for the cost model; `None`: its cost is not known.
        norm_vectors: parameter vectors of a norm: two where it has a bias.
        interleaved: rotary positions rotate dimensions 0 and 1, 2 and 3, ...; else the first half with the second half.
    """

    modules: Modules | None = None
    layer: Callable[[Any, int], Layer] | None = None
    norm_vectors: int = 1
    interleaved: bool = False

    @property
    def support(self) -> Support:
        """How far the family is known."""
        if self.layer is None:
            return "expected"
        return "whole passes" if self.modules is None else "tested"


FAMILIES = {
    "llama": Family(Modules(), gated),
    "mistral": Family(Modules(), gated),
    "qwen3": Family(Modules(), gated_normed),
    "gemma3_text": Family(Modules(rotary_by_kind=True), gated_sandwiched),
    "gpt_neox": Family(
        Modules(norm="final_layer_norm", cache_argument="layer_past", linears=GPT_NEOX), gpt, norm_vectors=2
    ),
    "gpt2": Family(
        Modules(layers="h", norm="ln_f", rotary=None, positions="wpe", linears=(), layers_skip_tokens=False),
        gpt,
        norm_vectors=2,
    ),
    "qwen3_next": Family(layer=qwen3_next),
    "codegen": Family(interleaved=True),
    "cohere": Family(interleaved=True),
    "cohere2": Family(interleaved=True),
    "cohere2_moe": Family(interleaved=True),
    "ernie4_5": Family(interleaved=True),
    "ernie4_5_moe": Family(interleaved=True),
    "glm": Family(interleaved=True),
    "glm4": Family(interleaved=True),
    "gptj": Family(interleaved=True),
    "helium": Family(interleaved=True),
    "llama4_text": Family(interleaved=True),
}
_OTHER = Family()


def family(config: Any) -> Family:
    """The family of a text config; one of which nothing is known, where it has no entry."""
    return FAMILIES.get(config.model_type, _OTHER)


def modules(config: Any) -> Modules | None:
    """Where the decoder of a text config keeps its parts; `None` where that is not known."""
    return family(config).modules


def listed(having: Callable[[Family], object]) -> str:
    """Names of the families with a property, for errors.

    Example:
        >>> listed(lambda each: each.modules and each.modules.positions)
        'gpt2'
    """
    return ", ".join(sorted(name for name, each in FAMILIES.items() if having(each)))


def describe(config: Any) -> Stack:
    """The backbone that a text config describes, for the cost model.

    Raises:
        UserError: a family whose cost is not known.
    """
    entry = family(config)
    if entry.layer is None:
        raise UserError(
            f"no cost model for model_type {config.model_type!r}; use one of {listed(lambda each: each.layer)}, "
            "or add its layer to pondera/arch/families.py"
        )
    learned = entry.modules is not None and entry.modules.positions is not None
    width, vocabulary = config.hidden_size, config.vocab_size
    return Stack(
        layers=tuple(entry.layer(config, index) for index in range(config.num_hidden_layers)),
        embedding=width * (vocabulary + (config.max_position_embeddings if learned else 0)),
        norm=width * entry.norm_vectors,
        head=width * vocabulary,
        tied=bool(config.tie_word_embeddings),
    )
