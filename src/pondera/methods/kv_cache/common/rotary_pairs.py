"""Pairs of key dimensions that rotary embedding rotates together, and their order by frequency.

Shapes: P rotation pairs of a head, D head width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pondera.arch.dimensions import head_dim
from pondera.arch.families import family
from pondera.core.errors import UserError
from pondera.core.hf import PreTrainedConfig


def rotation_pairs(config: PreTrainedConfig) -> list[tuple[int, int]]:
    """The dimensions of each rotation pair, highest frequency first; dimensions without rotation are in no pair.

    Args:
        config: text config of the model.

    Raises:
        UserError: the model has no rotary embedding, or an unsupported layout of it.

    Example:
        >>> from transformers import LlamaConfig
        >>> rotation_pairs(LlamaConfig(hidden_size=32, num_attention_heads=4))
        [(0, 4), (1, 5), (2, 6), (3, 7)]
    """
    width, turning = head_dim(config), _turning(config)
    latent = getattr(config, "kv_lora_rank", None)
    if not turning or latent:
        why = "uses multi-head latent attention" if latent else "has no rotary positions"
        raise UserError(
            f'{config.model_type} {why}, so its keys have no rotation pairs; use branches=1 and key_stage="post_rope"'
        )
    pairs = int(width * turning) // 2
    if family(config).interleaved:
        return [(2 * pair, 2 * pair + 1) for pair in range(pairs)]
    return [(pair, pair + pairs) for pair in range(pairs)]


def _turning(config: PreTrainedConfig) -> float:
    """The share of a head's dimensions with rotary embedding; 0 for models without."""
    rope: Any = getattr(config, "rope_parameters", None)
    if isinstance(rope, Mapping) and "full_attention" in rope:
        rope = rope["full_attention"]
    if getattr(config, "rotary_dim", None):  # GPT-J and similar models
        return config.rotary_dim / head_dim(config)
    if not isinstance(rope, Mapping) or not rope:
        return 0.0
    share = rope.get("partial_rotary_factor")
    return float(share if share is not None else getattr(config, "partial_rotary_factor", None) or 1.0)


def branches(pairs: list[tuple[int, int]], width: int, cut: int) -> list[list[int]]:
    """Splits the dimensions of a head by frequency: the first pairs, then all other dimensions.

    Args:
        pairs: see `rotation_pairs`.
        width: D.
        cut: number of pairs in the first branch.

    Raises:
        UserError: one of the branches is empty.

    Example:
        >>> branches([(0, 4), (1, 5), (2, 6), (3, 7)], 8, cut=2)
        [[0, 4, 1, 5], [2, 3, 6, 7]]
    """
    fast = [dim for pair in pairs[: max(0, cut)] for dim in pair]
    slow = [dim for dim in range(width) if dim not in fast]
    if not fast or not slow:
        most = len(pairs) - (2 * len(pairs) == width)
        raise UserError(
            f"cut={cut}: a head has {len(pairs)} rotation pairs in {width} dimensions, and each branch needs one; "
            + (f"give 1 to {most}, or use branches=1" if most else "use branches=1")
        )
    return [fast, slow]
