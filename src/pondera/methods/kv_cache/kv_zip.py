"""KVzip: keeps the KV slots that the model needs to repeat its context.

Shapes: B batch, G KV heads, R query heads per KV head, S slots, m tokens of a part of the context, N queries of its repetition,
D head width, C columns of tokens.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from pondera.arch.dimensions import kv_heads
from pondera.cache.layer import AttentionCall
from pondera.cache.slot_attention import BLOCK, grouped, scores
from pondera.core.errors import UserError, unknown
from pondera.core.hf import PreTrainedConfig
from pondera.methods.kv_cache.ada_kv import shares
from pondera.methods.kv_cache.common.budget import SlotBudget
from pondera.methods.kv_cache.common.policy import budgeted, evict_lowest
from pondera.methods.kv_cache.common.second_run import Prompt, ReadingLayer, SecondRun

OVERLAP = 8
"""Number of tokens before a part that its repetition starts with, so that the model knows which part to repeat."""
LEVELS = ("model", "layer", "head")


class KVzip(SecondRun):
    """Question-agnostic compression of a context: a KV slot is as important as the most attention it gets when the model
    repeats the context.

    After the first call, the model reads the instruction `prompt` and the context a second time, part by part, with the
    full cache. The score of a slot is the maximum of its attention weights over all queries of the repetition and all
    query heads of its KV head. The highest scores of all heads and layers together keep their slots. Later tokens stay in
    addition to the budget, so a context that was compressed once serves any number of questions::

        cache = KVzip(0.3).cache(model)
        model(context, past_key_values=cache)     # any questions may follow, each ended by cache.crop(-its tokens)

    Source: Kim et al., KVzip, arXiv 2505.23416, section 3 and the authors' code.
    Cost: a second run over the context: its FLOPs are 2 to 3 times those of prefill alone, without logits. Decoding
    computes no scores; attention runs head by head, unless `level` is ``"head"``.
    When not to use it: for a single question that is known in advance (`SnapKV`), or if prefill is the bottleneck. For
    contexts that leave no positions for a part after them. With think and chunk methods, which it refuses.
    Resolved: the context is the whole first call, including the question if there is one. For chunked prefill, call
    ``cache.activate_past_recording()`` before the chunks and ``cache.crop(0)`` after the last: all chunks are then the
    context, and the next call starts with the compression. As in the authors' code, the softmax of a score is over the
    first tokens, the part and its repetition only; the repetition of a later part starts with the last 8 tokens before
    it. A method has no tokenizer, so the instruction is given as token ids; without, the part follows the context
    directly. Among equal scores the newer token wins. Layers without full attention are copied for the second run.

    Args:
        budget: KV slots per layer and KV head on average: a number (512), a share of the context (0.3) or bytes of a
            sequence ("64MiB"); a list has one per layer, a list of lists one per head.
        level: the heads that share a budget: those of the whole ``"model"`` or of a ``"layer"``; with ``"head"`` every head
            keeps the same number.
        chunk: tokens of a part.
        prompt: token ids of an instruction before each repetition, such as those of "Repeat the previous context:".
        sinks: number of first tokens that are never evicted.

    Example:
        >>> KVzip(0.3, prompt=[198, 27401, 260, 2167, 2468, 42]).level
        'model'
    """

    paper: ClassVar[str] = "KVzip, arXiv 2505.23416"
    cost: ClassVar[str] = "budget KV slots of the context, shared among all heads; a second run over the context"
    examples: ClassVar[dict[str, str]] = {
        "exact": "KVzip(64)",
        "tight": "KVzip(8, chunk=5, sinks=1)",
        "exact-uniform": "KVzip(64, level='head')",
        "tight-uniform": "KVzip(8, level='head', prompt=[3, 5], sinks=2)",
        "exact-layer": "KVzip(64, level='layer')",
        "tight-layer": "KVzip(8, level='layer', chunk=8)",
    }

    def __init__(
        self,
        budget: int | float | str | list = 0.3,
        level: str = "model",
        chunk: int = 2048,
        prompt: list[int] | None = None,
        sinks: int = 4,
    ) -> None:
        super().__init__()
        if level not in LEVELS:
            raise unknown("level", level, LEVELS)
        if isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1:
            raise UserError(f"chunk={chunk!r}: give a number of tokens, 1 or more")
        if isinstance(sinks, bool) or not isinstance(sinks, int) or sinks < 0:
            raise UserError(f"sinks={sinks!r}: give a number of tokens, 0 or more")
        ids = [] if prompt is None else prompt
        if not isinstance(ids, list) or not all(type(token) is int and token >= 0 for token in ids):
            raise UserError(
                f"prompt={prompt!r}: give token ids, e.g. tokenizer('Repeat the previous context:').input_ids"
            )
        self.budget = SlotBudget(budget, max(1, sinks))
        self.level, self.chunk, self.prompt, self.sinks = level, chunk, ids, sinks

    @property
    def by_head(self) -> bool:
        """See `Policy.by_head`."""
        return self.level != "head" or self.budget.by_head

    def check(self, config: PreTrainedConfig, layers: list[int]) -> None:
        """See `KVCacheMethod.check`."""
        self.budget.check(len(layers), kv_heads(config) if self.budget.by_head else 0)

    def after_prompt(self, prompt: Prompt) -> None:
        """See `SecondRun.after_prompt`."""
        layers, tables = prompt.layers, [table for layer in prompt.layers for table in layer.tables]
        count_BG = torch.cat([table.real.sum(-1) for table in tables], dim=1)
        sizes = [sum(len(table.heads) for table in layer.tables) for layer in layers]
        of_layers = zip(layers, sizes, strict=True)
        budgets = [budgeted(self.budget, layer, layer.tables[0], list(range(size))) for layer, size in of_layers]
        budget_BG = torch.cat(budgets, dim=1).minimum(count_BG)
        if not bool((budget_BG < count_BG).any()):
            return
        position_BGS = torch.cat([table.position for table in tables], dim=1)
        sinks_end_B = (~prompt.real_BT).sum(-1) + self.sinks
        score_BGS = self.scores(prompt).masked_fill(position_BGS < sinks_end_B[:, None, None], torch.inf)
        score_BGS = score_BGS.masked_fill(position_BGS < 0, -torch.inf)
        if self.level != "head":
            sizes = sizes if self.level == "layer" else [sum(sizes)]
            parts = (x.split(sizes, dim=1) for x in (score_BGS, position_BGS, count_BG, budget_BG))
            budget_BG = torch.cat([shares(*part, safeguard=0) for part in zip(*parts, strict=True)], dim=1)
        heads = [len(table.heads) for table in tables]
        parts = (x.split(heads, dim=1) for x in (score_BGS, count_BG - budget_BG))
        for table, part_BGS, over_BG in zip(tables, *parts, strict=True):
            evict_lowest(table, part_BGS, over_BG)
        for layer in layers:
            layer.evicted_until = layer.seen

    def scores(self, prompt: Prompt) -> Tensor:
        """``[B, G, S]``: the score of each slot, for the heads of all layers in turn."""
        keys = [layer.joined()[0] for layer in prompt.layers]
        score = [torch.zeros(keys_BGSD.shape[:3], device=keys_BGSD.device) for keys_BGSD in keys]
        instruction_BID = prompt.embed(self.prompt)
        for begin in range(0, int(prompt.real_BT.sum(-1).amax()), self.chunk):
            part = Part(prompt.real_BT, begin, begin + self.chunk, min(self.sinks, begin), score)
            instruction_BI = part.real_BN.any(-1, keepdim=True).expand(-1, len(self.prompt))
            column_BND = part.column_BN[..., None].expand(-1, -1, prompt.input_BTD.shape[-1])
            input_BND = torch.cat([instruction_BID, prompt.input_BTD.gather(1, column_BND)], dim=1)
            prompt.run(input_BND, torch.cat([instruction_BI, part.real_BN], dim=1), part)
        return torch.cat(score, dim=1)


class Part:
    """A part of the context, whose slots are scored by its repetition. Rows end with their last token.

    Args:
        real_BT: of the context; false for padding.
        begin, end: the tokens of the part, by their number in each sequence.
        sinks: number of first tokens that attention to the part also includes.
        score: ``[B, G, S]`` for each compressed layer, to which calls add the scores of the part.

    Attributes:
        column_BN: the tokens of the repetition, as indices of columns; it begins before the part, see `OVERLAP`.
        real_BN: false for padding.
    """

    def __init__(self, real_BT: Tensor, begin: int, end: int, sinks: int, score: list[Tensor]) -> None:
        first, padding_B1 = max(0, begin - OVERLAP), (~real_BT).sum(-1, keepdim=True)
        count_B1 = real_BT.sum(-1, keepdim=True)
        end_B1 = torch.where(count_B1 > begin, count_B1.clamp(max=end), first)
        width = int(end_B1.amax()) - first
        number_BN = end_B1 - width + torch.arange(width, device=real_BT.device)
        self.real_BN = number_BN >= first
        last = real_BT.shape[1] - 1  # padding has any column
        self.column_BN = (padding_B1 + number_BN).clamp(0, last)
        self.sinks, self.score = sinks, score
        sink_BC = (padding_B1 + torch.arange(sinks, device=real_BT.device)).clamp(max=last)
        self._key_column_BC = torch.cat([sink_BC, self.column_BN[:, begin - first :]], dim=1)
        self._key_there_BC = torch.cat([sink_BC >= 0, (number_BN >= begin)[:, begin - first :]], dim=1)

    def __call__(self, reader: ReadingLayer, call: AttentionCall) -> None:
        """Adds the scores of one layer.

        Args:
            reader: reads the layer.
            call: the attention call of the repetition.
        """
        stored_BGSD, score_BGS = reader.source.joined()[0], self.score[reader.source.index]
        B, G, _, D = stored_BGSD.shape
        at_BGCD = self._key_column_BC[:, None, :, None].expand(B, G, -1, D)
        keys_BGKD = torch.cat([stored_BGSD.gather(2, at_BGCD), call.key_BGTD], dim=2)
        most_BGC = received(call, keys_BGKD, self._key_there_BC)[..., self.sinks :]
        at_BGC = self._key_column_BC[:, None, self.sinks :].expand_as(most_BGC)
        score_BGS.scatter_reduce_(2, at_BGC, most_BGC, "amax")


def received(call: AttentionCall, keys_BGKD: Tensor, there_BC: Tensor) -> Tensor:
    """``[B, G, C]``: the highest attention weight of the first C keys, over all queries and query heads of each KV head.

    Args:
        call: an attention call; its own keys are the last ones, to which its queries attend causally.
        keys_BGKD: the keys.
        there_BC: false for keys among the first C that no query attends to.
    """
    query_BGRND = grouped(call.query_BHTD, keys_BGKD.shape[1])
    B, G, R, N, _ = query_BGRND.shape
    C, real_BN = there_BC.shape[1], call.position_BT >= 0
    number_N = torch.arange(N, device=real_BN.device)
    most_BGC = torch.zeros(B, G, C, device=real_BN.device)
    for part_n in number_N.split(max(1, BLOCK // (B * G * R * keys_BGKD.shape[2]))):
        own_BnN = (number_N <= part_n[:, None]) & real_BN[:, None]
        allowed_B1nK = torch.cat([there_BC[:, None].expand(-1, len(part_n), -1), own_BnN], dim=2)[:, None]
        score_BGRnK = scores(query_BGRND[:, :, :, part_n], keys_BGKD, allowed_B1nK, call.scaling, call.softmax)
        weight_BGRnC = call.softmax.weights(score_BGRnK)[..., :C]
        weight_BGRnC = torch.where(real_BN[:, None, None, part_n, None], weight_BGRnC, 0)  # of padding they are NaN
        most_BGC = most_BGC.maximum(weight_BGRnC.float().amax((2, 3)))
    return most_BGC
