"""Self-check of a model before the first compressed cache: runs a few tokens and compares with the stock cache.

The check tests two conditions. First, the concatenated keys and values that reach attention must be those of the stock
cache, so that the model's own attention over them gives the stock logits. Second, the model's attention must be the one
that Pondera computes over KV slots: one softmax over the tokens that the mask allows, in any order of the slots.

Shapes: B batch, T tokens, G KV heads, R query heads per KV head, S slots, D width of keys, E width of values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from pondera.cache.layer import AttentionCall, KVLayer
from pondera.cache.slot_attention import attend, grouped
from pondera.core.errors import UserError, described
from pondera.core.evaluation_mode import as_it_was
from pondera.core.hf import CACHE, Cache, DynamicCache, PreTrainedModel

if TYPE_CHECKING:
    from pondera.cache.hand_over import Owner

RUNS: tuple[tuple[int, tuple[int, ...]], ...] = ((0, (3, 2, 1)), (2, (4, 1)))
"""The runs of the check: the left padding of the first of two batch rows (0: one row), and the tokens of each call."""


@dataclass(frozen=True)
class Verdict:
    """The result of a self-check that the model passed.

    Args:
        exact: whether the logits are bit-identical to those with the stock cache; else they agree within a tolerance.
        rows: ``(G, D, E)`` of the keys and values that reach attention in each compressed layer.
    """

    exact: bool
    rows: tuple[tuple[int, int, int], ...]


class Witness(KVLayer):
    """A layer that keeps all tokens, uses the model's own attention, and compares it with attention over KV slots.

    Attributes:
        apart: the largest difference, relative to the largest output.
    """

    holds: ClassVar[tuple[str, ...]] = (*KVLayer.holds, "rows")

    def clear(self) -> None:
        """See `CacheState.clear`."""
        super().clear()
        self.rows: tuple[Tensor, Tensor] | None = None
        self.apart = 0.0

    def attend(self, call: AttentionCall) -> Tensor:
        """See `KVLayer.attend`."""
        new = (call.key_BGTD, call.value_BGTD)
        self.rows = new if self.rows is None else tuple(torch.cat(pair, 2) for pair in zip(self.rows, new, strict=True))  # type: ignore[assignment]
        assert self.rows is not None
        keys, values = self.rows
        out_BTHE = call.stock(keys, values)
        allowed = call.written_mask(slice(0, call.tokens))
        order_S = torch.arange(keys.shape[2] - 1, -1, -1, device=keys.device)  # the order of slots has no meaning
        allowed = None if allowed is None else allowed.expand(-1, keys.shape[1], -1, -1)[..., order_S]
        query = grouped(call.query_BHTD, keys.shape[1])
        found_BTHE = attend(query, keys[:, :, order_S], values[:, :, order_S], allowed, call.scaling, call.softmax)
        real_BT = call.position_BT >= 0
        if found_BTHE.shape != out_BTHE.shape:
            raise UserError("the output of its attention function does not have the shape of queries and values")
        self.apart = max(self.apart, difference(found_BTHE[real_BT], out_BTHE[real_BT]))
        return out_BTHE

    def rollback(self, tokens: int) -> None:
        """Not used by the self-check."""


class WitnessCache(Cache):
    """A stock cache with a `Witness` in place of each compressed layer.

    Args:
        layers: one per decoder layer.
        owner: the owner of the model.

    Attributes:
        kept: the witnesses.
    """

    def __init__(self, layers: list[Any], owner: Owner) -> None:
        super().__init__(layers=layers)
        self.owner = owner
        self.kept = [layer for layer in layers if isinstance(layer, Witness)]


def compare_with_stock(model: PreTrainedModel, owner: Owner, layers: list[int]) -> Verdict:
    """Compares a few tokens with the stock cache and with a `WitnessCache`.

    The check changes neither the random state, nor the training mode, nor gradients.

    Args:
        model: a routed model whose attention modules have finders.
        owner: the owner of the model.
        layers: indices of the compressed layers.

    Raises:
        UserError: the model fails with the stock cache, or its attention is not the one that Pondera computes.
    """
    exact, rows = True, ()
    with as_it_was(model):
        for pads, pieces in RUNS:
            stock = _stock_cache(model)
            try:
                expected = _run(model, stock, pads, pieces)
            except Exception as error:
                raise UserError(f"it does not run with the stock cache ({described(error)})") from error
            witnesses = [Witness() for _ in layers]
            chosen = dict(zip(layers, witnesses, strict=True))
            plain = _stock_cache(model).layers or [None] * (max(layers) + 1)
            cache = WitnessCache([chosen.get(number, layer) for number, layer in enumerate(plain)], owner)
            try:
                actual = _run(model, cache, pads, pieces)
            except UserError:
                raise
            except Exception as error:
                raise UserError(
                    f"its attention fails if the cache returns only the new keys and values ({described(error)})"
                ) from error
            exact &= _judge(expected, actual, witnesses, sum(pieces))
            rows = tuple(_shape(witness) for witness in witnesses)
    return Verdict(exact, rows)


def _judge(expected: Tensor, actual: Tensor, witnesses: list[Witness], tokens: int) -> bool:
    """Whether the logits are bit-identical; raises if a difference exceeds the tolerance."""
    bound = max(1e-5, 8 * torch.finfo(expected.dtype).eps)
    if any(witness.seen != tokens or witness.rows is None for witness in witnesses):
        raise UserError("some of its layers do not put their keys into the cache, or use the keys of another layer")
    if not expected.isfinite().all():
        raise UserError("with the stock cache its logits are not finite")
    if (apart := difference(actual, expected)) > bound:
        raise UserError(
            f"its keys change between the cache and attention, so past tokens are lost or mixed (logits differ by "
            f"{apart:.1e} of the largest)"
        )
    if (apart := max(witness.apart for witness in witnesses)) > bound:
        raise UserError(
            f"its attention is not one softmax over the tokens that its mask allows (outputs differ by {apart:.1e} of the "
            "largest)"
        )
    return torch.equal(actual, expected)


def difference(actual: Tensor, expected: Tensor) -> float:
    """The largest absolute difference, relative to the largest expected absolute value."""
    apart = (actual.float() - expected.float()).abs().max() / expected.float().abs().max().clamp(min=1e-30)
    return float(apart.nan_to_num(torch.inf))


def _run(model: PreTrainedModel, cache: Cache, pads: int, pieces: tuple[int, ...]) -> Tensor:
    """Logits ``[N, V]`` of the tokens that are not padding, from one call per piece."""
    tokens, batch = sum(pieces), 2 if pads else 1
    embeddings: Any = model.get_input_embeddings()
    most = min(int(embeddings.weight.shape[0]), 97)
    ids_BT = (torch.arange(batch * tokens, device=model.device).view(batch, tokens) * 7 + 5) % max(1, most - 3) + min(
        3, most - 1
    )
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[0, :pads] = 0
    logits, seen = [], 0
    for piece in ids_BT.split(pieces, 1):
        seen += piece.shape[1]
        given = {"attention_mask": mask_BT[:, :seen]} if pads else {}
        logits.append(model(input_ids=piece, **{CACHE: cache}, use_cache=True, **given).logits)
    return torch.cat(logits, 1)[mask_BT.bool()]


def _stock_cache(model: PreTrainedModel) -> DynamicCache:
    return DynamicCache(config=model.config.get_text_config(decoder=True))


def _shape(witness: Witness) -> tuple[int, int, int]:
    assert witness.rows is not None
    keys, values = witness.rows
    return keys.shape[1], keys.shape[-1], values.shape[-1]
