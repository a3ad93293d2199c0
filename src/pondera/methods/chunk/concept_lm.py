"""ConceptLM: predicts, once per chunk of tokens, the next chunk's concept, and decodes its tokens with that prediction.

Shapes: B batch, T tokens, M chunks, D width, G segments (groups of a quantizer), R levels, K codes, C = D/G.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pondera.cache.token_cache import TokenCache
from pondera.core import spec
from pondera.core.effort import FULL, Effort
from pondera.core.errors import UserError, unknown
from pondera.core.loss_terms import LossTerm
from pondera.cost.model import CostModel, DecoderPass, MatMul
from pondera.methods.chunk.base import Chunk, MethodOutput
from pondera.methods.chunk.common.chunks import POOLINGS, Chunks, behind
from pondera.methods.chunk.common.concept_cache import REWIND, ConceptCache
from pondera.methods.quantize.base import ABSENT, MERGES, Quantized, Quantizer
from pondera.models.backbone import LAYOUTS, Backbone, has_documents, needed
from pondera.models.varlen import VarlenPass, VarlenSlots


class ConceptLM(Chunk):
    """Between the backbone's first and last layers stands a concept module, which runs once per chunk of k tokens.

    The first layers encode tokens. Each complete chunk is pooled to one vector; the concept module, causal layers over
    these, predicts the next chunk's. It does so by scores of discrete codes, whose codebooks are learned from the pooled
    vectors: each of S segments of the prediction is a weighted sum of its codebook's rows. The prediction is added to the
    encoded states of the tokens that have to predict the next chunk's tokens, and the last layers decode.

    ``effort=0`` leaves the concepts out, bit for bit: what is left is the backbone.

    Source: Next Concept Prediction, arXiv 2602.08984. Three losses: the next token's; ``concept``, the squared error of a
    predicted concept against the pooled vector of the chunk that came, without gradient to it; and the quantizer's
    (``vq_codebook``, ``vq_commitment``), in training only and on pooled vectors without gradient, so it moves nothing but
    codebooks. No quantized vector enters the states.
    Cost: the backbone's pass, and of the concept module (L_c layers, heads of D S K and a merge of K D multiplications) a
    k-th per token. Its cache has a k-th of the rows; beside it the last 32 tokens are kept whole (2 D numbers each), so
    that drafts can be taken back across the borders of chunks. In a batch only the texts whose chunk is complete run the
    module. Training also maps and searches the codebooks.
    When not to use it: where k tokens are no natural portion and the backbone is so small that L_c layers at a k-th of the
    rate are dear; on architectures whose layers cannot be run in parts (refused by name).
    Resolved: a chunk's concept is used from its last token on, as the paper's index rule (p + 1) // k - 1 says; the
    authors' cached decoding is late by one. Chunks are counted from each document's first token. RoPE places a concept at
    its chunk's first token (m k), as the Pythia code; learned positions are not added again, as in the GPT-2 code. The
    module ends with the architecture's final norm. The weights of the losses are not published; here they are 1. Heads
    start at zero: with ``raw_logits`` a retrofitted checkpoint begins as it was, bit for bit. ``hard`` gives scores no
    gradient, so there the heads learn by cross-entropy to the codes of the chunk that came, and no other loss reaches the
    codebooks than their own. With a cache, or at the end of a text, only whole pairs of chunks within the call are scored.

    Args:
        chunk: k, tokens per chunk.
        codes: K, of each segment's codebook.
        segments: S, into which the width is cut.
        encoder_layers: of the backbone's, before the concepts enter; none: half of them.
        concept_layers: L_c, further layers of the same architecture.
        merge: how scores become vectors: ``"raw_logits"`` (linear in them, as the paper's code), ``"softmax"`` or
            ``"hard"`` (the best code's row).
        pooling: ``"mean"``, ``"first"`` or ``"last"``.
        ncp_weight: of the concept loss.
        vq_weight: of the quantizer's losses.
        quantizer: another one, with tables all of one size; then `codes` and `segments` are its own. None: the paper's
            product of SimVQ codebooks with a two-layer map, matched to the first batch.

    Example:
        >>> ConceptLM(chunk=4, concept_layers=2).cost_schedule(tokens=8, context=64)[0]
        DecoderPass(queries=2.0, keys=18, cached=False, repeats=1.0)
    """

    paper: ClassVar[str] = "ConceptLM, arXiv 2602.08984"
    cost: ClassVar[str] = "1 pass per token, and concept layers, heads and KV rows at 1/k of the rate"
    examples: ClassVar[dict[str, str]] = {
        "exact": "ConceptLM(chunk=3, codes=8, segments=4)",
        "exact-softmax": "ConceptLM(chunk=4, codes=8, segments=2, encoder_layers=2, concept_layers=2, merge='softmax')",
        "exact-hard": "ConceptLM(chunk=2, codes=8, segments=2, merge='hard', pooling='last')",
        "exact-levels": "ConceptLM(chunk=1, quantizer=Residual(VQ(8), levels=2))",
    }

    def __init__(
        self,
        chunk: int = 4,
        codes: int = 64,
        segments: int = 8,
        encoder_layers: int | None = None,
        concept_layers: int = 1,
        merge: str = "raw_logits",
        pooling: str = "mean",
        ncp_weight: float = 1.0,
        vq_weight: float = 1.0,
        quantizer: Quantizer | None = None,
    ) -> None:
        super().__init__()
        for name, value in {"chunk": chunk, "segments": segments, "concept_layers": concept_layers}.items():
            if value < 1:
                raise UserError(f"{name}={value}: give 1 or more")
        for name, value in {"ncp_weight": ncp_weight, "vq_weight": vq_weight}.items():
            if value < 0:
                raise UserError(f"{name}={value}: give 0 (without this loss) or more")
        if merge not in MERGES:
            raise unknown("merge", merge, MERGES)
        if pooling not in POOLINGS:
            raise unknown("pooling", pooling, POOLINGS)
        self.chunk, self.codes, self.segments = chunk, codes, segments
        self.encoder_layers, self.concept_layers = encoder_layers, concept_layers
        self.merge, self.pooling = merge, pooling
        self.ncp_weight, self.vq_weight = ncp_weight, vq_weight
        self._described = quantizer
        self.sizes: tuple[int, int, int] = (segments, 1, codes)
        self.width = 0

    def bind(self, backbone: Backbone) -> None:
        """Creates the concept module, the codebooks and the heads."""
        self._check(backbone)
        self.width = backbone.config.hidden_size
        self.module = backbone.more_layers(self.concept_layers)
        self.quantizer = self._description().build(self.width)
        del self._described
        first = next(backbone.lm.parameters())
        with torch.device("cpu"):  # these are numbers, even where weights are not made yet
            sizes_GR = self.quantizer.sizes
        if len(sizes_GR.unique()) != 1 or (first.device.type != "meta" and self.quantizer.table() is None):
            raise UserError(
                f"quantizer: {type(self.quantizer).__name__} has no tables of one size, by which scores could be weighed; "
                "use VQ, SimVQ, or a Product or Residual of them"
            )
        self.sizes = (len(sizes_GR), len(sizes_GR[0]), int(sizes_GR[0, 0]))
        self.heads = nn.Linear(self.width, sizes_GR.numel() * self.sizes[-1], dtype=first.dtype, device=first.device)
        nn.init.zeros_(self.heads.weight)
        nn.init.zeros_(self.heads.bias)

    def _check(self, backbone: Backbone) -> None:
        config = backbone.config
        if config.model_type not in LAYOUTS:
            raise UserError(
                f"ConceptLM does not fit {config.model_type}: it runs the first and last layers apart, and those of this "
                f"architecture are not mapped; mapped: {', '.join(sorted(LAYOUTS))}"
            )
        layers, width = config.num_hidden_layers, config.hidden_size
        if self.encoder_layers is None:
            self.encoder_layers = layers // 2
        if not 1 <= self.encoder_layers < layers:
            raise UserError(
                f"encoder_layers={self.encoder_layers}: of the backbone's {layers} layers at least one must stand before "
                f"the concepts and one behind them; give 1 to {layers - 1}"
            )
        if self._described is None and width % self.segments:
            fitting = [number for number in range(1, width + 1) if width % number == 0]
            near = [n for n in fitting if n < self.segments][-1:] + [n for n in fitting if n > self.segments][:1]
            raise UserError(
                f"segments={self.segments}: does not divide the width {width}; the nearest that do: "
                f"{', '.join(map(str, near))}"
            )

    def _description(self) -> Quantizer:
        if self._described is not None:
            return self._described
        hidden = 2 * self.width // self.segments
        book = f"SimVQ({self.codes}, hidden={hidden}, init='match', detach_input=True)"
        return spec.build(f"Product({book}, groups={self.segments})", "quantize")

    def begin_step(self, step: int, seed: int) -> None:
        """See `Method.begin_step`."""
        if self.width:
            self.quantizer.begin_step(step, seed)

    def new_cache(self, backbone: Backbone) -> TokenCache:
        """A row per token and per chunk, and codebooks as they now stand."""
        try:
            quantizer = self.quantizer.fold()
            table = quantizer.table()
        except UserError:  # it still warms up, so what it may become is not settled; its tables are made for each chunk
            quantizer, table = self.quantizer, None
        return ConceptCache(backbone, self.module, self.chunk, quantizer, table)

    def forward(
        self,
        backbone: Backbone,
        h_BTD: Tensor,
        position_ids: Tensor,
        cache: TokenCache | None = None,
        mask: Tensor | None = None,
        budget: Effort = FULL,
        labels_BT: Tensor | None = None,
    ) -> MethodOutput:
        """See `Method.forward`. An effort of 0 leaves the concepts out; any other changes nothing."""
        held, seen = cast("ConceptCache | None", cache), 0
        rows = None if held is None else held.slots
        passes_BT = torch.ones(h_BTD.shape[:2], dtype=torch.long, device=h_BTD.device)
        if held is not None:
            held.check_silent(budget.effort == 0)
            seen = held.tokens
            held.record(passes_BT)
        if budget.effort == 0:
            return MethodOutput(backbone.step(h_BTD, rows, mask, position_ids), passes_BT)

        mask = needed(mask)
        encoder_layers, every = cast(int, self.encoder_layers), backbone.config.num_hidden_layers
        h_BTD = backbone.run(h_BTD, range(encoder_layers), rows, mask, position_ids)
        batch, tokens, _ = h_BTD.shape
        chunks = Chunks.of(self.chunk, batch, tokens, mask, seen, h_BTD.device)
        concept_BMD, terms, trace = h_BTD[:, :0], {}, {}
        # Most tokens of decoding complete no chunk, and nobody asks what was predicted.
        if chunks.most or labels_BT is not None or self.record:
            before_BWD = None if held is None else held.encoded_BWD
            pooled_BMD = chunks.pool(behind(before_BWD, h_BTD, self.chunk - 1), self.pooling)
            # Before scores meet the codebooks, which the first batch may make.
            learning = self.training and labels_BT is not None
            quantized = self.quantizer(pooled_BMD.detach(), chunks.valid_BM) if learning else None
            states_BMD = self._states(pooled_BMD, chunks, position_ids, held, mask, seen)
            scores = self.heads(states_BMD).unflatten(-1, self.sizes)
            tables = (self.quantizer, None) if held is None else (held.quantizer, held.table)
            concept_BMD = self._merged(scores, *tables).to(h_BTD.dtype)
            if labels_BT is not None:
                terms = self._terms(pooled_BMD.detach(), scores, concept_BMD, chunks, quantized)
            trace = self._trace(pooled_BMD, scores, chunks) if self.record else {}
        last_BD = None if held is None or held.used_BWD is None or not seen else held.used_BWD[:, -1]
        used_BTD = chunks.spread(concept_BMD, last_BD)
        if held is not None:
            held.keep(h_BTD, used_BTD)
        h_BTD = backbone.run(h_BTD + used_BTD, range(encoder_layers, every), rows, mask, position_ids)
        return MethodOutput(h_BTD, passes_BT, terms, trace=trace)

    def _states(
        self,
        pooled_BMD: Tensor,
        chunks: Chunks,
        position_ids: Tensor,
        cache: ConceptCache | None,
        mask: Tensor | None,
        seen: int,
    ) -> Tensor:
        """What the concept module makes of the chunks, ``[B, M, D]``; places that hold no chunk mean nothing."""
        if not chunks.most:
            return pooled_BMD
        batch, tokens = chunks.position_BT.shape
        position_BM = position_ids.expand(batch, -1).gather(1, chunks.end_BM) - (self.chunk - 1)
        position_BM = position_BM.clamp(min=0)
        if cache is None:
            # Chunks that are not there stand last, where no other sees them, so only documents need a mask.
            apart = chunks.document_BM.clamp(min=1) if has_documents(mask) else None
            return self.module.step(pooled_BMD, None, apart, position_BM)
        slots = VarlenSlots(seen + chunks.end_BM, position_BM, chunks.valid_BM)
        return VarlenPass(self.module, cache.concepts, mask, seen + tokens).run(pooled_BMD, slots)

    def _merged(self, scores: Tensor, quantizer: Quantizer, table: Tensor | None = None) -> Tensor:
        """The vectors that scores ``[B, M, G, R, K]`` stand for, ``[B, M, D]``."""
        concept_BMD = quantizer.soft_decode(scores, self.merge, table)
        return concept_BMD.detach() if self.merge == "hard" else concept_BMD

    def _terms(
        self, pooled_BMD: Tensor, scores: Tensor, concept_BMD: Tensor, chunks: Chunks, quantized: Quantized | None
    ) -> dict[str, LossTerm]:
        """How well each chunk was predicted from those before it; in training also what the codebooks learn by."""
        follows_BM = chunks.follows_BM
        if self.merge == "hard":
            code = self.quantizer.encode(pooled_BMD[:, 1:], follows_BM)
            flat = (scores[:, :-1].float().flatten(0, -2), code.flatten())
            total, count = F.cross_entropy(*flat, ignore_index=ABSENT, reduction="sum"), (code != ABSENT).sum()
        else:
            error_BMD = (concept_BMD[:, :-1].float() - pooled_BMD[:, 1:].float()).square()
            total, count = torch.where(follows_BM[..., None], error_BMD, 0).sum(), follows_BM.sum() * self.width
        terms = {"concept": LossTerm(total, count, self.ncp_weight)}
        for name, term in (quantized.terms if quantized is not None else {}).items():
            terms[f"vq_{name}"] = LossTerm(term.sum, term.count, term.weight * self.vq_weight)
        return terms

    def _trace(self, pooled_BMD: Tensor, scores: Tensor, chunks: Chunks) -> dict[str, Any]:
        """``chunk``: k; ``ends``: the column of each chunk's last token, -1 where there is none; ``concepts`` and
        ``predicted``: the codes of the chunk and those predicted for the next, ``[B, M, G, R]``; ``quantized``: all chunks'
        segments, and tables."""
        valid_BM, table = chunks.valid_BM, self.quantizer.table()
        assert table is not None
        return {
            "chunk": self.chunk,
            "ends": torch.where(valid_BM, chunks.end_BM, -1),
            "concepts": self.quantizer.encode(pooled_BMD, valid_BM),
            "predicted": torch.where(valid_BM[..., None, None], scores.argmax(-1), ABSENT),
            "quantized": (pooled_BMD[valid_BM].unflatten(-1, (self.sizes[0], -1)), table),
        }

    def cost_schedule(
        self, tokens: int, context: int = 0, training: bool = False, shares: Sequence[float] | None = None
    ) -> list[DecoderPass | MatMul]:
        """See `Method.cost_schedule`."""
        groups, levels, codes = self.sizes
        cached = context > 0
        chunks = tokens / self.chunk if cached else tokens // self.chunk
        rows = max(1.0, chunks)  # of one call; one that is made for less than a row each time is made less often
        keys = max(rows, (context + tokens) // self.chunk)
        found: list[DecoderPass | MatMul] = [
            DecoderPass(rows, keys, repeats=chunks / rows, layers=self.concept_layers),
            MatMul(chunks, self.width * groups * levels * codes),
        ]
        if self.merge != "hard":
            found.append(MatMul(chunks, levels * codes * self.width))
        if not cached:  # a cache has folded tables
            found += [MatMul(codes, self._map_weights())] * (1 + training)
        if training:
            found.append(MatMul(chunks, levels * codes * self.width, trained=False))
        return [*found, DecoderPass(tokens, context + tokens, cached=cached)]

    def at_budget(self, budget: Effort) -> ConceptLM | None:
        """See `Method.under`: concepts are no passes, so no share of them tells that they were left out."""
        return self if budget.effort else None

    def _map_weights(self) -> int:
        """Entries of the matrices that make the tables, which every code meets in its own."""
        if not self.width:
            return 0
        return sum(layer.weight.numel() for layer in self.quantizer.modules() if isinstance(layer, nn.Linear))

    def extra_cache_bytes(self, tokens: int, number_bytes: int) -> float:
        """The rows of chunks, and the tokens that are kept whole."""
        rows = CostModel(self.module.config).cache_bytes(tokens // self.chunk, number_bytes)
        return rows + 2 * min(tokens, REWIND + self.chunk - 1) * self.width * number_bytes
