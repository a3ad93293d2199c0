"""Whether caches of Pondera are right for a model: a few tokens, held against the stock cache before any cache is given out.

Two things must hold. The keys that reach attention, put together over the calls, must be those that the stock cache would
have given, so that the model's own attention over them gives the stock logits; and that attention must be what Pondera
computes over slots: one softmax over the tokens that the mask shows, in whatever order they are kept.

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
from pondera.core.hf import Cache, DynamicCache, PreTrainedModel

if TYPE_CHECKING:
    from pondera.cache.hand_over import Owner

RUNS: tuple[tuple[int, tuple[int, ...]], ...] = ((0, (3, 2, 1)), (2, (4, 1)))
"""What is run: padding on the left of the first of two rows, and the tokens of each call. Without padding there is one row."""


@dataclass(frozen=True)
class Verdict:
    """What the check found.

    Args:
        exact: the model's own attention over what reached it gave the stock logits bit for bit; else closely.
        rows: ``(G, D, E)`` of each compressed layer, as its keys and values reach attention.
    """

    exact: bool
    rows: tuple[tuple[int, int, int], ...]


class Witness(KVLayer):
    """Keeps all tokens, attends by the model's own function, and notes how far attention over slots is from that.

    Attributes:
        apart: the largest difference, as a share of the largest output.
    """

    holds: ClassVar[tuple[str, ...]] = ()

    def __init__(self) -> None:
        super().__init__()
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
        order_S = torch.arange(keys.shape[2] - 1, -1, -1, device=keys.device)  # the order of slots means nothing
        allowed = None if allowed is None else allowed.expand(-1, keys.shape[1], -1, -1)[..., order_S]
        query = grouped(call.query_BHTD, keys.shape[1])
        found_BTHE = attend(query, keys[:, :, order_S], values[:, :, order_S], allowed, call.scaling, call.softmax)
        real_BT = call.position_BT >= 0
        if found_BTHE.shape != out_BTHE.shape:
            raise UserError("its attention function gives another shape than queries and values have")
        self.apart = max(self.apart, difference(found_BTHE[real_BT], out_BTHE[real_BT]))
        return out_BTHE

    def nbytes(self) -> int:
        """See `KVLayer.nbytes`."""
        return 0 if self.rows is None else sum(rows.nbytes for rows in self.rows)

    def rollback(self, tokens: int) -> None:
        """Not needed here."""

    def select(self, rows: Tensor) -> None:
        """Not needed here."""

    def clear(self) -> None:
        """Not needed here."""

    def batch(self) -> int:
        """See `KVLayer.batch`."""
        return 0 if self.rows is None else len(self.rows[0])


class WitnessCache(Cache):
    """A stock cache whose compressed layers are witnesses.

    Args:
        layers: one per decoder layer.
        owner: of the model.
    """

    def __init__(self, layers: list[Any], owner: Owner) -> None:
        super().__init__(layers=layers)
        self.owner = owner


def compare_with_stock(model: PreTrainedModel, owner: Owner, layers: list[int]) -> Verdict:
    """Runs a few tokens with the stock cache and with witnesses.

    Random state, training mode and gradients are as they were before.

    Args:
        model: whose attention looks for its layers in the cache already.
        owner: of that model.
        layers: numbers of those that are compressed.

    Raises:
        UserError: the stock cache itself fails, or attention is not what Pondera computes.
    """
    exact, rows = True, ()
    with as_it_was(model):
        for pads, pieces in RUNS:
            stock = _stock_cache(model)
            try:
                expected = _run(model, stock, pads, pieces)
            except Exception as error:
                raise UserError(f"it does not run with the stock cache either ({described(error)})") from error
            witnesses = [Witness() for _ in layers]
            chosen = dict(zip(layers, witnesses, strict=True))
            plain = _stock_cache(model).layers or [None] * (max(layers) + 1)
            cache = WitnessCache([chosen.get(number, layer) for number, layer in enumerate(plain)], owner)
            try:
                found = _run(model, cache, pads, pieces)
            except UserError:
                raise
            except Exception as error:
                raise UserError(
                    f"its attention needs more than new keys and values back ({described(error)})"
                ) from error
            exact &= _judge(expected, found, witnesses, sum(pieces))
            rows = tuple(_shape(witness) for witness in witnesses)
    return Verdict(exact, rows)


def _judge(expected: Tensor, found: Tensor, witnesses: list[Witness], tokens: int) -> bool:
    """Whether the logits are the same bit for bit; raises where something is not even close."""
    bound = max(1e-5, 8 * torch.finfo(expected.dtype).eps)
    if any(witness.seen != tokens or witness.rows is None for witness in witnesses):
        raise UserError("some of its layers do not put their keys into the cache, or take them from another layer")
    if not expected.isfinite().all():
        raise UserError("with the stock cache its logits are not finite")
    if (apart := difference(found, expected)) > bound:
        raise UserError(
            f"its keys change between the cache and attention, so that past tokens are lost or mixed (logits apart by "
            f"{apart:.1e} of the largest)"
        )
    if (apart := max(witness.apart for witness in witnesses)) > bound:
        raise UserError(
            f"its attention is not one softmax over the tokens that its mask shows (outputs apart by {apart:.1e} of the "
            "largest)"
        )
    return torch.equal(found, expected)


def difference(found: Tensor, expected: Tensor) -> float:
    """The largest difference, as a share of the largest expected number."""
    apart = (found.float() - expected.float()).abs().max() / expected.float().abs().max().clamp(min=1e-30)
    return float(apart.nan_to_num(torch.inf))


def _run(model: PreTrainedModel, cache: Cache, pads: int, pieces: tuple[int, ...]) -> Tensor:
    """Logits of the tokens that are no padding, ``[N, V]``, read piece by piece."""
    tokens, batch = sum(pieces), 2 if pads else 1
    embeddings: Any = model.get_input_embeddings()
    most = min(int(embeddings.weight.shape[0]), 97)
    ids_BT = (torch.arange(batch * tokens, device=model.device).view(batch, tokens) * 7 + 5) % max(1, most - 3) + min(
        3, most - 1
    )
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[0, :pads] = 0
    found, seen = [], 0
    for piece in ids_BT.split(pieces, 1):
        seen += piece.shape[1]
        given = {"attention_mask": mask_BT[:, :seen]} if pads else {}
        found.append(model(input_ids=piece, past_key_values=cache, use_cache=True, **given).logits)
    return torch.cat(found, 1)[mask_BT.bool()]


def _stock_cache(model: PreTrainedModel) -> DynamicCache:
    return DynamicCache(config=model.config.get_text_config(decoder=True))


def _shape(witness: Witness) -> tuple[int, int, int]:
    assert witness.rows is not None
    keys, values = witness.rows
    return keys.shape[1], keys.shape[-1], values.shape[-1]
