"""ConceptLM: predicts the next concept once per chunk of tokens, and decodes the tokens of that chunk with it.

Shapes: B batch, T tokens, M chunks, D width, G segments (groups of a quantizer), R levels, K codes, C = D/G.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pondera.arch.families import listed, modules
from pondera.cache.depth_cache import DepthCache
from pondera.cache.masks import has_documents, needed
from pondera.cache.token_cache import TokenCache
from pondera.core import spec
from pondera.core.effort import FULL, Effort
from pondera.core.errors import UserError, unknown
from pondera.core.evaluation_mode import as_it_was
from pondera.core.loss_terms import LossTerm
from pondera.cost.model import CostModel
from pondera.cost.schedule import DecoderPass, MatMul
from pondera.methods.chunk.base import Chunk, MethodOutput, TokenBatch
from pondera.methods.chunk.common.chunks import POOLINGS, Chunks, behind
from pondera.methods.chunk.common.concept_cache import REWIND, ConceptCache
from pondera.methods.chunk.common.thinking_chunks import ThinkingChunks, check_think, think_about, thinking_calls
from pondera.methods.quantize.base import ABSENT, MERGES, Quantized, Quantizer
from pondera.methods.think.base import Think
from pondera.models.backbone import Backbone
from pondera.models.method import SlotMaker
from pondera.models.varlen import VarlenPass, VarlenSlots


class ConceptLM(Chunk):
    """Inserts a concept module between the first and the last layers; it runs once per chunk of k tokens.

    The first layers encode tokens. Each complete chunk is pooled to one vector. The concept module, a stack of causal
    layers over these vectors, predicts the vector of the next chunk from scores of discrete codes. The codebooks are
    learned from the pooled vectors; each of S segments of the prediction is a weighted sum of codebook rows. The
    prediction is added to the encoded states of the tokens that predict the tokens of the next chunk, and the last
    layers decode.

    With `think`, a think method runs the concept module, so each chunk gets several passes; its tokens are chunks.

    ``effort=0`` skips the concepts; the output is then bit-identical to the backbone. The think method gets any other
    effort, and `max_passes`.

    Source: Next Concept Prediction, arXiv 2602.08984. There are three losses: the next-token loss; ``concept``, the
    squared error between a predicted concept and the pooled vector of the actual chunk (detached); and the losses of
    the quantizer (``vq_codebook``, ``vq_commitment``), only in training and on detached pooled vectors, so they train
    only the codebooks. No quantized vector enters the states.
    Cost: one pass of the backbone, plus 1/k of the concept module per token (L_c layers, heads of D S K and a merge of
    K D multiplications). The concept module's cache has 1/k as many KV slots. In addition the cache keeps the encoder
    states of the last 32 tokens (2 D numbers each), so that draft tokens can be rolled back across chunk boundaries.
    Only the sequences of a batch whose chunk is complete run the module. Training also maps and searches the codebooks.
    With `think`, the passes, KV slots and parameters of the think method are added, at 1/k of the rate. All sequences of
    a batch then run the module whenever one completes a chunk; to the others this is padding, which occupies slots.
    When not to use it: when k tokens are not a natural unit, or when the backbone is so small that L_c layers at 1/k of
    the rate are expensive; on architectures whose layers cannot run separately (raises an error).
    Resolved: a chunk's concept is used from the chunk's last token on, following the paper's index rule (p + 1) // k -
    1; the authors' cached decoding is one token late. Chunks are counted from each document's first token. RoPE places
    a concept at its chunk's first token (m k), as in the Pythia code; learned positions are not added again, as in the
    GPT-2 code. The module ends with the architecture's final norm. The loss weights are not published; here they are 1.
    Heads are initialized to zero: with ``raw_logits`` a retrofitted checkpoint starts bit-identical to the original.
    ``hard`` gives the scores no gradient. There the heads learn by cross-entropy with the codes of the actual chunk,
    and the codebooks learn only from their own losses. With a cache, or at the end of a sequence, the concept loss
    covers only pairs of chunks that lie completely within the call.
    Thinking about concepts is not in the paper. A token counts one pass, because the layers of the backbone run once per
    token; the passes of each chunk are in the trace (``concept_passes``). Loss terms of the think method are called
    ``think_<name>``. Feedback scales are measured on the pooled vectors of random tokens, like those of a think method of
    tokens on its embeddings; with ``init: scaled`` they are 1. Approximations of a think method remain: one that prefills
    in a few rounds (``eval_rounds``) does so for the chunks of a call before which no chunk was complete.
    The learning rate of the concept module, its heads and codebooks is that of the backbone times ``train.lr_scale``
    (0.1: a tenth).

    Args:
        chunk: k, tokens per chunk.
        codes: K, codes per segment codebook.
        segments: S, the number of parts that the width is split into.
        encoder_layers: number of backbone layers before the concept module; default: ``None``, half of them.
        concept_layers: L_c, extra layers of the same architecture.
        merge: how scores become vectors: ``"raw_logits"`` (linear in the scores, as in the paper's code), ``"softmax"``
            or ``"hard"`` (the row of the best code).
        pooling: ``"mean"``, ``"first"`` or ``"last"``.
        ncp_weight: weight of the concept loss.
        vq_weight: weight of the quantizer losses.
        quantizer: a quantizer whose tables all have the same size; it replaces `codes` and `segments`. Default:
            ``None``, the paper's product of SimVQ codebooks with a two-layer map, matched to the first batch.
        think: a think method that runs the concept module, e.g. ``PonderLM2(thoughts=1)``, but none that uses token
            embeddings or logits of tokens; default: ``None``, one pass per chunk.

    Example:
        >>> ConceptLM(chunk=4, concept_layers=2).cost_schedule(tokens=8, context=64)[0]
        DecoderPass(queries=2.0, keys=18, cached=False, repeats=1.0)
    """

    paper: ClassVar[str] = "ConceptLM, arXiv 2602.08984"
    cost: ClassVar[str] = "1 pass per token, and concept layers, heads and KV slots at 1/k of the rate"
    examples: ClassVar[dict[str, str]] = {
        "exact": "ConceptLM(chunk=3, codes=8, segments=4)",
        "exact-softmax": "ConceptLM(chunk=4, codes=8, segments=2, encoder_layers=2, concept_layers=2, merge='softmax')",
        "exact-hard": "ConceptLM(chunk=2, codes=8, segments=2, merge='hard', pooling='last')",
        "exact-levels": "ConceptLM(chunk=1, quantizer=Residual(VQ(8), levels=2))",
        "exact-think": "ConceptLM(chunk=3, codes=8, segments=4, "
        "think=PonderLM2(thoughts=1, train_rounds=(2, 2), eval_rounds='exact'))",
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
        think: Think | None = None,
    ) -> None:
        super().__init__()
        for name, value in {"chunk": chunk, "segments": segments, "concept_layers": concept_layers}.items():
            if value < 1:
                raise UserError(f"{name}={value}: give 1 or more")
        for name, value in {"ncp_weight": ncp_weight, "vq_weight": vq_weight}.items():
            if value < 0:
                raise UserError(f"{name}={value}: give 0 (without this loss) or more")
        if codes < 2:
            raise UserError(f"codes={codes}: give 2 or more; one code cannot tell chunks apart")
        if quantizer is not None and not isinstance(quantizer, Quantizer):
            kind = f"{type(quantizer).__name__} object"
            raise UserError(
                f"quantizer: got a {kind}; give a quantizer, such as quantizer=Product(SimVQ(64), groups=8)"
            )
        if merge not in MERGES:
            raise unknown("merge", merge, MERGES)
        if pooling not in POOLINGS:
            raise unknown("pooling", pooling, POOLINGS)
        if think is not None:
            check_think(think)
            self.supports_recompute = think.supports_recompute
        self.chunk, self.codes, self.segments = chunk, codes, segments
        self.encoder_layers, self.concept_layers = encoder_layers, concept_layers
        self.merge, self.pooling = merge, pooling
        self.ncp_weight, self.vq_weight = ncp_weight, vq_weight
        self._described = quantizer
        self.think = think
        self._priced = FULL
        self.sizes: tuple[int, int, int] = (segments, 1, codes)
        self.width = 0

    def bind(self, backbone: Backbone) -> None:
        """Creates the concept module, the codebooks and the heads, and binds the think method to the concept module."""
        self._check(backbone)
        self.width = backbone.config.hidden_size
        sample_BMD = None if self.think is None else self._sample(backbone)
        self.module = backbone.more_layers(self.concept_layers, sample_BMD)
        if self.think is not None:
            self.think.bind(self.module)
        self.quantizer = self._description().build(self.width)
        del self._described
        first = next(backbone.lm.parameters())
        with torch.device("cpu"):  # sizes are plain numbers, even if the weights are on the meta device
            sizes_GR = self.quantizer.sizes
        if len(sizes_GR.unique()) != 1 or (first.device.type != "meta" and self.quantizer.table() is None):
            raise UserError(
                f"quantizer: {type(self.quantizer).__name__} has no tables of equal size, which scores could weight; "
                "use VQ, SimVQ, or a Product or Residual of them"
            )
        self.sizes = (len(sizes_GR), len(sizes_GR[0]), int(sizes_GR[0, 0]))
        self.heads = nn.Linear(self.width, sizes_GR.numel() * self.sizes[-1], dtype=first.dtype, device=first.device)
        nn.init.zeros_(self.heads.weight)
        nn.init.zeros_(self.heads.bias)

    def _check(self, backbone: Backbone) -> None:
        config = backbone.config
        if modules(config) is None:
            raise UserError(
                f"ConceptLM does not fit {config.model_type}: it runs the first and last layers separately, and this "
                f"architecture has no layer map; supported: {listed(lambda each: each.modules)}"
            )
        layers, width = config.num_hidden_layers, config.hidden_size
        if self.encoder_layers is None:
            self.encoder_layers = layers // 2
        if not 1 <= self.encoder_layers < layers:
            raise UserError(
                f"encoder_layers={self.encoder_layers}: the backbone has {layers} layers, and at least one must come "
                f"before the concept module and one after it; give 1 to {layers - 1}"
            )
        if self._described is None and width % self.segments:
            fitting = [number for number in range(1, width + 1) if width % number == 0]
            near = [n for n in fitting if n < self.segments][-1:] + [n for n in fitting if n > self.segments][:1]
            raise UserError(
                f"segments={self.segments}: does not divide the width {width}; the nearest divisors: "
                f"{', '.join(map(str, near))}"
            )

    def _sample(self, backbone: Backbone) -> Tensor:
        """Pooled vectors of random tokens, ``[4, M, D]``, on which the think method measures its scales."""
        ids_BT = backbone.random_tokens(max(64, self.chunk))
        if ids_BT.device.type == "meta":
            return torch.empty(*ids_BT.shape, self.width, dtype=backbone.lm.dtype, device="meta")
        with as_it_was(backbone):
            h_BTD = backbone.run(backbone.embed(ids_BT), range(cast(int, self.encoder_layers)))
        chunks = Chunks.of(self.chunk, len(ids_BT), ids_BT.shape[1], device=ids_BT.device)
        return chunks.pool(behind(None, h_BTD, self.chunk - 1), self.pooling) if chunks.most else h_BTD

    def _description(self) -> Quantizer:
        if self._described is not None:
            return self._described
        hidden = 2 * self.width // self.segments
        book = f"SimVQ({self.codes}, hidden={hidden}, init='match', detach_input=True)"
        return spec.build(f"Product({book}, groups={self.segments})", "quantize")

    def begin_step(self, step: int, seed: int, progress: float = 1.0) -> None:
        """See `Method.begin_step`."""
        if self.width:
            self.quantizer.begin_step(step, seed)
        if self.think is not None:
            self.think.begin_step(step, seed, progress)

    def new_cache(self, backbone: Backbone, kv_cache: SlotMaker | None = None) -> TokenCache:
        """A cache with one slot per token and per chunk; it stores a folded copy of the current codebooks."""
        try:
            quantizer = self.quantizer.fold()
            table = quantizer.table()
        except UserError:  # during warm-up the quantizer cannot be folded; compute its tables for each chunk instead
            quantizer, table = self.quantizer, None
        if self.think is None:
            concepts = DepthCache(self.concept_layers, 1)
        else:
            concepts = ThinkingChunks(self.think.new_cache(self.module))
        return ConceptCache(backbone, concepts, self.chunk, quantizer, table, kv_cache)

    def forward(self, backbone: Backbone, batch: TokenBatch) -> MethodOutput:
        """See `Method.forward`. An effort of 0 skips the concepts; any other budget is that of the think method."""
        h_BTD, position_ids, mask, labels_BT = batch.h_BTD, batch.position_ids, batch.mask, batch.labels_BT
        concept_cache, seen = cast("ConceptCache | None", batch.cache), 0
        rows = None if concept_cache is None else concept_cache.slots
        passes_BT = torch.ones(h_BTD.shape[:2], dtype=torch.long, device=h_BTD.device)
        if concept_cache is not None:
            concept_cache.check_silent(batch.budget.effort == 0)
            if self.think is not None and batch.budget.effort:
                cast(ThinkingChunks, concept_cache.concepts).check_budget(self.think, batch.budget)
            seen = concept_cache.tokens
            concept_cache.record(passes_BT)
        if self.training and labels_BT is not None and concept_cache is not None and torch.is_grad_enabled():
            raise UserError(
                "use_cache: a cache of ConceptLM has a folded copy of the codebooks, which get no gradient; train without "
                "a cache"
            )
        if batch.budget.effort == 0:
            return MethodOutput(backbone.step(h_BTD, rows, mask, position_ids), passes_BT)

        mask = needed(mask)
        encoder_layers, every = cast(int, self.encoder_layers), backbone.config.num_hidden_layers
        h_BTD = backbone.run(h_BTD, range(encoder_layers), rows, mask, position_ids)
        sequences, tokens, _ = h_BTD.shape
        chunks = Chunks.of(self.chunk, sequences, tokens, mask, seen, h_BTD.device)
        concept_BMD, terms, trace = h_BTD[:, :0], {}, {}
        # In decoding, most tokens complete no chunk, and nothing else needs a prediction.
        if chunks.most or labels_BT is not None or self.record:
            before_BWD = None if concept_cache is None else concept_cache.encoded_BWD
            pooled_BMD = chunks.pool(behind(before_BWD, h_BTD, self.chunk - 1), self.pooling)
            # Quantize first, because the first batch may initialize the codebooks.
            learning = self.training and labels_BT is not None
            quantized = self.quantizer(pooled_BMD.detach(), chunks.valid_BM) if learning else None
            thought = self._states(pooled_BMD, chunks, position_ids, concept_cache, mask, seen, batch.budget)
            scores = self.heads(thought.h_BTD).unflatten(-1, self.sizes)
            tables = (self.quantizer, None) if concept_cache is None else (concept_cache.quantizer, concept_cache.table)
            concept_BMD = self._merged(scores, *tables).to(h_BTD.dtype)
            if labels_BT is not None:
                terms = self._terms(pooled_BMD.detach(), scores, concept_BMD, chunks, quantized)
            terms |= {f"think_{name}": term for name, term in thought.terms.items()}
            trace = self._trace(pooled_BMD, scores, chunks, thought.passes_BT) if self.record else {}
        last_BD = (
            None
            if concept_cache is None or concept_cache.used_BWD is None or not seen
            else concept_cache.used_BWD[:, -1]
        )
        used_BTD = chunks.spread(concept_BMD, last_BD)
        if concept_cache is not None:
            concept_cache.keep(h_BTD, used_BTD)
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
        budget: Effort,
    ) -> MethodOutput:
        """The concept module's states of the chunks, ``[B, M, D]``; values at invalid chunks are undefined."""
        passes_BM = torch.ones_like(chunks.end_BM)
        if not chunks.most:
            return MethodOutput(pooled_BMD, passes_BM)
        batch, tokens = chunks.position_BT.shape
        position_BM = position_ids.expand(batch, -1).gather(1, chunks.end_BM) - (self.chunk - 1)
        position_BM = position_BM.clamp(min=0)
        concepts = None if cache is None else cache.concepts
        if self.think is not None:
            thinking = cast("ThinkingChunks | None", concepts)
            return think_about(chunks, self.think, self.module, pooled_BMD, position_BM, thinking, seen, budget)
        if concepts is None:
            # Invalid chunks come last, and no valid chunk attends to them, so only documents need a mask.
            apart = chunks.document_BM.clamp(min=1) if has_documents(mask) else None
            return MethodOutput(self.module.step(pooled_BMD, None, apart, position_BM), passes_BM)
        slots = VarlenSlots(seen + chunks.end_BM, position_BM, chunks.valid_BM)
        ragged = VarlenPass(self.module, cast(DepthCache, concepts), mask, seen + tokens)
        return MethodOutput(ragged.run(pooled_BMD, slots), passes_BM)

    def _merged(self, scores: Tensor, quantizer: Quantizer, table: Tensor | None = None) -> Tensor:
        """Decodes scores ``[B, M, G, R, K]`` to vectors ``[B, M, D]``."""
        concept_BMD = quantizer.soft_decode(scores, self.merge, table)
        return concept_BMD.detach() if self.merge == "hard" else concept_BMD

    def _terms(
        self, pooled_BMD: Tensor, scores: Tensor, concept_BMD: Tensor, chunks: Chunks, quantized: Quantized | None
    ) -> dict[str, LossTerm]:
        """The concept loss of each chunk given earlier chunks; in training also the losses of the codebooks."""
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

    def _trace(self, pooled_BMD: Tensor, scores: Tensor, chunks: Chunks, passes_BM: Tensor) -> dict[str, Any]:
        """``chunk``: k; ``ends``: the column of each chunk's last token, or -1 if the chunk is invalid; ``concepts``
        and ``predicted``: the codes of the chunk and the codes predicted for the next one, ``[B, M, G, R]``;
        ``concept_passes``: the passes of each chunk through the concept module, or 0 if it is invalid, ``[B, M]``;
        ``quantized``: the segments of all chunks, and the tables."""
        valid_BM, table = chunks.valid_BM, self.quantizer.table()
        assert table is not None
        return {
            "chunk": self.chunk,
            "ends": torch.where(valid_BM, chunks.end_BM, -1),
            "concept_passes": torch.where(valid_BM, passes_BM, 0),
            "concepts": self.quantizer.encode(pooled_BMD, valid_BM),
            "predicted": torch.where(valid_BM[..., None, None], scores.argmax(-1), ABSENT),
            "quantized": (pooled_BMD[valid_BM].unflatten(-1, (self.sizes[0], -1)), table),
        }

    def cost_schedule(
        self, tokens: int, context: int = 0, training: bool = False, shares: Sequence[float] | None = None
    ) -> list[DecoderPass | MatMul]:
        """See `Method.cost_schedule`. A chunk runs all passes of the think method; `shares` only describes tokens."""
        groups, levels, codes = self.sizes
        cached = context > 0
        chunks = tokens / self.chunk if cached else tokens // self.chunk
        schedule: list[DecoderPass | MatMul] = [
            *self._module_calls(chunks, (context + tokens) // self.chunk, training),
            MatMul(chunks, self.width * groups * levels * codes),
        ]
        if self.merge != "hard":
            schedule.append(MatMul(chunks, levels * codes * self.width))
        if not cached:  # a cache has folded tables
            schedule += [MatMul(codes, self._map_weights())] * (1 + training)
        if training:
            schedule.append(MatMul(chunks, levels * codes * self.width, trained=False))
        return [*schedule, DecoderPass(tokens, context + tokens, cached=cached)]

    def _module_calls(self, chunks: float, keys: int, training: bool) -> list[DecoderPass | MatMul]:
        """The concept module on `chunks` new chunks, `keys` with earlier ones. Below one chunk per call it runs less often."""
        if self.think is None:
            rows = max(1.0, chunks)
            return [DecoderPass(rows, max(rows, keys), repeats=chunks / rows, layers=self.concept_layers)]
        return thinking_calls(self.think, self.concept_layers, chunks, keys, training, self._shares())

    def _shares(self) -> list[float]:
        """The share of chunks that takes each pass of the think method: all chunks take all passes of the budget."""
        assert self.think is not None
        return [1.0] * self._priced.passes(self.think.slots_per_token, self.think.adaptive)

    def at_budget(self, budget: Effort) -> ConceptLM | None:
        """See `Method.at_budget`: concepts are not passes, so `shares` cannot describe a call without them."""
        if not budget.effort or self.think is None:
            return self if budget.effort else None
        priced = copy.copy(self)
        priced._priced = budget
        return priced

    def _map_weights(self) -> int:
        """Number of weights of the linear maps that compute the codebooks."""
        if not self.width:
            return 0
        return sum(layer.weight.numel() for layer in self.quantizer.modules() if isinstance(layer, nn.Linear))

    def extra_cache_bytes(self, tokens: int, number_bytes: int) -> float:
        """The KV slots of chunks, and the encoder states of the last tokens."""
        chunks = tokens // self.chunk
        slots = chunks if self.think is None else round(self.think.slots(chunks, self._shares()))
        rows = CostModel(self.module.config).cache_bytes(slots, number_bytes)
        return rows + 2 * min(tokens, REWIND + self.chunk - 1) * self.width * number_bytes
