"""VQ-Logits: an output head whose tokens share the rows of a small codebook.

Shapes: B batch, T tokens, N states, D width, V vocabulary, G groups, K codes of a codebook, C = D/G width of its rows.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pondera.core.errors import UserError, unknown
from pondera.core.loss_terms import LossTerm
from pondera.methods.head.base import IGNORED, Head

INITS = ("auto", "order", "kmeans")


class VQLogits(Head):
    """Computes the scores of G x K codebook rows; a token's logit is the sum of the scores of its codes plus a bias.

    With one group, the logits of tokens with the same code differ only by their biases, in every context, so the most
    likely tokens should have separate codes. With more groups a token is a combination of codes, and the head can
    distinguish K^G tokens.

    Source: VQ-Logits, arXiv 2505.10202 (the codebook and the map); the bias, more groups and the exact loss are ours.
    Cost: K x D multiplications per state in place of V x D, and reading G x V scores.
    When not to use it: with a vocabulary of a few thousand tokens, where the output matrix is small; with G = 1, if the
    context must distinguish rare tokens that share a code.
    Resolved: the paper's map from tokens to codes may be fixed or learned; this one is fixed. It is computed by k-means
    of the trained output rows, if there are any. Otherwise it follows the order of token ids, because a BPE tokenizer
    gives frequent tokens low ids: with one group the first half of the codes goes to the first tokens, one each, and
    the other codes are assigned round-robin.

    From the output matrix of a finished run, whose rows are clustered, and with the head at its own learning rate::

        pondera train plain --backbone runs/plain --head "VQLogits(512, init='kmeans')"
        pondera train plain --backbone runs/plain --head "VQLogits(512)" --train.lr_scale 0.1

    Args:
        codes: K.
        groups: G, must divide D.
        bias: learn a bias for each token.
        init: ``"kmeans"`` of trained rows, ``"order"`` of token ids, or ``"auto"``: k-means if there are trained rows.

    Example:
        >>> head = VQLogits(codes=8, groups=2)
        >>> head.bind(vocabulary=50, width=16)
        >>> tuple(head(torch.zeros(1, 3, 16)).shape), head.weights
        ((1, 3, 50), 128)
    """

    paper: ClassVar[str] = "VQ-Logits (arXiv 2505.10202)"
    cost: ClassVar[str] = (
        "K/V of the output matrix and of its products, and reading G scores per token of the vocabulary"
    )
    examples: ClassVar[dict[str, str]] = {
        "exact": "VQLogits(codes=7)",
        "exact-groups": "VQLogits(codes=7, groups=2)",
        "exact-unbiased": "VQLogits(codes=7, bias=False)",
    }

    code_VG: Tensor

    def __init__(self, codes: int = 512, groups: int = 1, bias: bool = True, init: str = "auto") -> None:
        super().__init__()
        for name, value in (("codes", codes), ("groups", groups)):
            if value < 1:
                raise UserError(f"{name}={value}: give 1 or more")
        if init not in INITS:
            raise unknown("init", init, INITS)
        self.codes, self.groups, self.init, self._biased = codes, groups, init, bias

    def check_untrained(self) -> None:
        """See `Head.check_untrained`."""
        if self.init == "kmeans":
            raise UserError(
                "VQLogits: init='kmeans' needs a trained backbone, whose output rows it clusters; use --backbone RUN, or "
                "init='order'"
            )

    def bind(self, vocabulary: int, width: int, rows_VD: Tensor | None = None) -> None:
        """See `Head.bind`."""
        if width % self.groups:
            fitting = [count for count in range(1, width + 1) if width % count == 0]
            near = min(fitting, key=lambda count: abs(count - self.groups))
            raise UserError(
                f"VQLogits: groups={self.groups} does not divide the width {width}; the nearest divisor is {near}"
            )
        if rows_VD is None:
            self.check_untrained()
        if rows_VD is not None and not rows_VD.is_meta and self.init != "order":
            table_GKC, code_VG = _clustered(rows_VD, self.codes, self.groups)
        else:
            table_GKC = torch.randn(self.groups, self.codes, width // self.groups) / math.sqrt(width)
            code_VG = _dealt(vocabulary, self.codes, self.groups)
        self.table_GKC = nn.Parameter(table_GKC)
        self.bias_V = nn.Parameter(torch.zeros(vocabulary)) if self._biased else None
        self.register_buffer("code_VG", code_VG)

    @property
    def weights(self) -> int:
        """See `Head.weights`."""
        return self.table_GKC.numel()

    @property
    def weight(self) -> Tensor:
        """The equivalent dense output matrix, ``[V, D]``, for callers that multiply by it directly."""
        return torch.cat([self.table_GKC[group, self.code_VG[:, group]] for group in range(self.groups)], dim=1)

    @property
    def bias(self) -> Tensor | None:
        """The bias of each token, ``[V]``, or ``None``."""
        return self.bias_V

    def scores(self, h_ND: Tensor) -> Tensor:
        """Scores of codes, ``[N, G, K]``."""
        return torch.einsum("ngc,gkc->ngk", h_ND.unflatten(-1, (self.groups, -1)), self.table_GKC.to(h_ND.dtype))

    def forward(self, h_BTD: Tensor) -> Tensor:
        """See `Head.forward`."""
        scores_NGK = self.scores(h_BTD.flatten(0, -2))
        logits_NV = scores_NGK[:, 0].index_select(1, self.code_VG[:, 0])
        for group in range(1, self.groups):
            logits_NV = logits_NV + scores_NGK[:, group].index_select(1, self.code_VG[:, group])
        if self.bias_V is not None:
            logits_NV = logits_NV + self.bias_V.to(logits_NV.dtype)
        return logits_NV.view(*h_BTD.shape[:-1], len(self.code_VG))

    def term(self, h_BTD: Tensor, labels_BT: Tensor) -> LossTerm:
        """See `Head.term`. With one group no tensor but the bias has size V: log Z = logsumexp_k(score_k + log n_k).

        Here log n_k is the logsumexp of the biases of the tokens with code k; without a bias, n_k is their number.
        """
        labels_N = labels_BT.reshape(-1).to(h_BTD.device)
        known_N = labels_N != IGNORED
        h_ND, labels_N = h_BTD.flatten(0, -2)[known_N], labels_N[known_N]
        if self.groups > 1:
            return LossTerm(F.cross_entropy(self(h_ND[None])[0].float(), labels_N, reduction="sum"), known_N.sum())
        scores_NK = self.scores(h_ND)[:, 0].float()
        own_N = scores_NK.gather(1, self.code_VG[labels_N]).squeeze(1) + self._biases()[labels_N]
        return LossTerm((torch.logsumexp(scores_NK + self.shares(), 1) - own_N).sum(), known_N.sum())

    def shares(self) -> Tensor:
        """Logsumexp of the biases of each code's tokens, to add to its score, ``[K]``; one group only."""
        biases_V, code_V = self._biases(), self.code_VG[:, 0]
        most_K = torch.full((self.codes,), -math.inf, device=biases_V.device).scatter_reduce(
            0, code_V, biases_V.detach(), "amax"
        )
        shift_K = most_K.nan_to_num(neginf=0.0)
        sums_K = torch.zeros_like(shift_K).index_add(0, code_V, (biases_V - shift_K[code_V]).exp())
        return shift_K + sums_K.log()

    def _biases(self) -> Tensor:
        return (
            self.bias_V.float()
            if self.bias_V is not None
            else torch.zeros(len(self.code_VG), device=self.code_VG.device)
        )


def _dealt(vocabulary: int, codes: int, groups: int) -> Tensor:
    """Codes from token ids only."""
    ids_V = torch.arange(vocabulary)
    if groups > 1:
        # Use the digits of the id, so that all combinations of codes occur; mix them, so that neighboring ids differ in
        # all digits.
        digits = [(ids_V // codes**place) % codes for place in range(groups)]
        mixed = [sum(digits[: place + 1]) % codes for place in range(groups)]
        return torch.stack([torch.as_tensor(digit) for digit in mixed], 1)
    own = min(vocabulary, codes // 2) if vocabulary > codes else vocabulary
    return torch.where(ids_V < own, ids_V, own + (ids_V - own) % max(1, codes - own))[:, None]


def _clustered(rows_VD: Tensor, codes: int, groups: int) -> tuple[Tensor, Tensor]:
    """Codebooks and codes from trained output rows."""
    from pondera.methods.quantize.common.kmeans import kmeans
    from pondera.methods.quantize.common.nearest import nearest

    draw, tables, codes_of_groups = torch.Generator().manual_seed(0), [], []
    for part_VC in rows_VD.detach().float().cpu().unflatten(1, (groups, -1)).unbind(1):
        table_KC, _ = kmeans(part_VC.contiguous(), codes, draw)
        tables.append(table_KC)
        codes_of_groups.append(nearest(part_VC, table_KC))
    return torch.stack(tables), torch.stack(codes_of_groups, 1)
