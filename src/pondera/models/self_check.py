"""Self-check of a method on an untested architecture, with a few tokens when the model is built.

Shapes: B batch, T tokens, N packed rows, D width, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from pondera.arch.dimensions import LayersDiffer
from pondera.arch.families import family, listed
from pondera.cache.masks import SlotMask
from pondera.cache.packing import PackedRows
from pondera.core.errors import UserError, described
from pondera.core.evaluation_mode import as_it_was
from pondera.core.hf import CACHE
from pondera.models.backbone import Backbone

if TYPE_CHECKING:
    from pondera.models.adaptive_lm import AdaptiveLM

TOKENS, PADS, PIECES = 6, 2, (4, 1, 1)
"""Tokens per sequence, left padding of the first of two sequences, and lengths of the pieces for the cache."""


def check_method(model: AdaptiveLM) -> None:
    """Raises if the method fails on this backbone, or if padding, packing or a cache change its logits.

    Families on which all methods are tested are not checked.

    Raises:
        UserError: names the architecture and the reason.
    """
    if model.method is None or _is_tested(model):
        return
    rounds = {part: cast(Any, part).eval_rounds for part in model.method.modules() if hasattr(part, "eval_rounds")}
    try:
        with as_it_was(model):
            for part in rounds:  # prefill may be approximate, which a cache does not have to reproduce
                cast(Any, part).eval_rounds = "exact"
            wrong = _wrong(model)
    except UserError as error:
        wrong = str(error)
    except Exception as error:  # an architecture can raise anything
        wrong = f"a call of a few tokens fails ({described(error)})"
    finally:
        for part, number in rounds.items():
            cast(Any, part).eval_rounds = number
    if wrong:
        raise _misfit(model, wrong)


def bind_method(model: AdaptiveLM) -> None:
    """Binds the method to its backbone.

    Raises:
        UserError: the config of an unmapped architecture lacks a field that the method needs.
    """
    method: Any = model.method
    try:
        method.bind(model.backbone)
    except LayersDiffer as error:
        raise _misfit(model, error.why) from error
    except UserError:
        raise
    except Exception as error:  # a config can raise anything
        if _is_tested(model):
            raise
        raise _misfit(model, described(error)) from error


def _is_tested(model: AdaptiveLM) -> bool:
    return family(model.backbone.config).support == "tested"


def _misfit(model: AdaptiveLM, wrong: str) -> UserError:
    return UserError(
        f"{model.chosen} does not fit {model.backbone.config.model_type}: {wrong}. Methods that run whole passes in causal "
        "order, such as PonderLM2(thoughts=1) and PauseToken(), fit more architectures; all methods fit "
        f"{listed(lambda each: each.support == 'tested')}"
    )


def _wrong(model: AdaptiveLM) -> str | None:
    """Describes the first failed check; `None` if all pass."""
    vocabulary = model.backbone.config.vocab_size
    ids_BT = (torch.arange(2 * TOKENS, device=model.device).view(2, TOKENS) * 7 + 5) % vocabulary
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[0, :PADS] = 0
    whole = model(ids_BT, attention_mask=mask_BT).logits
    bound = max(1e-4, 8 * torch.finfo(whole.dtype).eps) * float(whole.float().abs().max())

    def apart(found: Tensor, expected: Tensor) -> bool:
        return not bool(((found.float() - expected.float()).abs() <= bound).all())

    if apart(model(ids_BT[:1, PADS:]).logits, whole[:1, PADS:]):
        return "a left-padded sequence gets other logits than the sequence alone"
    cached = _in_pieces(model, ids_BT, mask_BT)
    if apart(cached[mask_BT.bool()], whole[mask_BT.bool()]):
        return "logits with a cache differ from those without"
    think = model.think
    if think is None or not think.packed:
        return None
    if think.adaptive and apart(*_packed_and_alone(model.backbone, ids_BT)):
        return "packed sequences get other hidden states than each sequence alone"
    think.packed = False
    try:
        for found, expected in ((whole, model(ids_BT, attention_mask=mask_BT).logits),
                                (cached, _in_pieces(model, ids_BT, mask_BT))):  # fmt: skip
            if apart(found[mask_BT.bool()], expected[mask_BT.bool()]):
                return "active tokens get other logits when halted tokens are not run"
    finally:
        think.packed = True
    return None


def _packed_and_alone(backbone: Backbone, ids_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states of two sequences of different lengths, ``[1, N, D]``: in one packed call, and separately."""
    rows_BTD = [backbone.embed(ids_BT[:1, :3]), backbone.embed(ids_BT[1:, :1])]
    order_T = torch.arange(3, device=ids_BT.device)
    wanted_BT = order_T < torch.tensor([[3], [1]], device=ids_BT.device)
    mask = SlotMask((order_T[:, None] >= order_T)[None].expand(2, 3, 3), order_T[None], order_T[None])
    position_1N = order_T.expand(2, 3)[wanted_BT][None]
    packed = backbone.step(torch.cat(rows_BTD, 1), None, mask, position_1N, PackedRows.where(wanted_BT))
    return packed, torch.cat([backbone.step(h_1TD) for h_1TD in rows_BTD], 1)


def _in_pieces(model: AdaptiveLM, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
    cache, seen, found = model.new_cache(), 0, []
    for piece in ids_BT.split(PIECES, 1):
        seen += piece.shape[1]
        found.append(model(piece, attention_mask=mask_BT[:, :seen], **{CACHE: cache}).logits)
    return torch.cat(found, 1)
