"""Coded: codes of what an eviction policy keeps, so that both savings multiply.

Shapes: B batch, G KV heads, S slots.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from pondera.cache.codec import Codec
from pondera.cache.coded_slots import CodedSlots
from pondera.cache.kv_store import KVStore
from pondera.cache.layer import AttentionCall
from pondera.cache.native_sections import NativeSection, attend_natively_to_sections, dense_rows
from pondera.cache.slot_attention import PLAIN, grouped
from pondera.cache.slot_layer import KVStoreLayer
from pondera.core.errors import UserError
from pondera.core.hf import PreTrainedConfig, PreTrainedModel
from pondera.methods.kv_cache.base import KVCacheMethod
from pondera.methods.kv_cache.common.policy import Policy
from pondera.methods.kv_cache.common.second_run import Prompt
from pondera.methods.kv_cache.common.windowed_codec import SinkWindowCache
from pondera.methods.kv_cache.common.wrapper import PolicyWrapper
from pondera.methods.kv_cache.kivi import KIVI
from pondera.methods.kv_cache.kv_zip import KVzip


class Coded(PolicyWrapper):
    """Evicts KV slots of the prompt with one method and stores the others as the codes of another one.

    Eviction and codes save in different ways, so the shares multiply: a quarter of the slots at 5 of 16 bits takes 8 % of the
    bytes. The policy acts at the end of the first prompt. Of the slots that it keeps, sinks and latest tokens stay exact, as
    the code's method says, and the others are coded, head by head. Later tokens stay exact, in addition::

        cache = Coded(KVzip(0.25), KIVI(4)).cache(model)
        model(context, past_key_values=cache)     # any questions may follow

    Source: our own combination; the methods have their own sources.
    Cost: that of the policy at prefill; a decoding step decodes all coded slots, layer by layer.
    When not to use it: for prompts hardly longer than the exact window; if many tokens are generated after a short prompt,
    because they stay exact (use the code's method alone); with think and chunk methods, which it refuses.

    Args:
        policy: an eviction method that acts at the end of the prompt, such as ``KVzip(0.25)`` or ``SnapKV(1024)``.
        code: a method with codes that are alike for all heads and positions, such as ``KIVI(4)``; its window and sinks count
            here, too.

    Example:
        >>> Coded(KVzip(0.25), KIVI(8, window=32)).code
        KIVI(8, window=32)
    """

    paper: ClassVar[str] = "our own combination of an eviction method and codes"
    cost: ClassVar[str] = "the share of the slots times the share of the bits; every step decodes the coded slots"
    examples: ClassVar[dict[str, str]] = {
        "exact": "Coded(SnapKV(64, window=4), KIVI(4))",
        "tight": "Coded(SnapKV(8, window=3, kernel=3), KIVI(2, group=4, window=4))",
        "exact-zip": "Coded(KVzip(64), KIVI(4))",
        "tight-zip": "Coded(KVzip(8, sinks=1), KIVI(2, group=4, window=4))",
    }
    prefill_only: bool = True

    def __init__(self, policy: KVCacheMethod | None = None, code: KVCacheMethod | None = None) -> None:
        policy = KVzip(0.25) if policy is None else policy
        if not isinstance(policy, Policy) or not policy.prefill_only or policy.prunes_hidden_states:
            raise UserError(
                f"policy={policy!r}: give an eviction method that acts at the end of the prompt, such as KVzip(0.25), "
                "SnapKV(1024) or ExpectedAttention(0.25)"
            )
        super().__init__(policy)
        code = KIVI(4) if code is None else code
        if not isinstance(code, SinkWindowCache):
            raise UserError(f"code={code!r}: give a method that stores codes, such as KIVI(4)")
        if not code.fitted:
            raise UserError(
                f"code={code!r}: its tables are fitted to heads and positions, and after eviction heads keep different tokens; "
                "give KIVI(4) or TurboQuant(4)"
            )
        self.code = code

    @property
    def needs_rows_of_config(self) -> bool:
        """See `KVCacheMethod.needs_rows_of_config`: codecs do."""
        return True

    @property
    def second_run(self) -> Coded | None:
        """See `Policy.second_run`: this method, if its policy acts after the prompt."""
        return None if self.policy.second_run is None else self

    def check(self, config: PreTrainedConfig, layers: list[int]) -> None:
        """See `KVCacheMethod.check`."""
        super().check(config, layers)
        self.code.check(config, layers)
        if odd := [codec for codec in self.code.coders(config, 0) if not codec.alike]:
            raise UserError(
                f"{self!r}: {type(odd[0]).__name__} has tables for heads or positions, and heads keep different tokens; use "
                "KIVI(4)"
            )

    def layer(self, config: PreTrainedConfig, index: int, among: int) -> KVStoreLayer:
        """See `KVCacheMethod.layer`."""
        return CodedLayer(self, index, among, self.code.coders(config, index))

    def check_passes(self) -> None:
        """See `KVCacheMethod.check_passes`: refused."""
        raise UserError(
            "Coded: slots of several passes per token are not coded after eviction; use the eviction method or KIVI(4) alone"
        )

    def token_cache(self, model: PreTrainedModel, slots_per_token: int) -> Any:
        """See `KVCacheMethod.token_cache`: refused, also with one slot per token."""
        self.check_passes()

    def evict_layer(self, layer: KVStoreLayer) -> None:
        """See `Policy.evict_layer`: once, at the end of the prompt."""
        assert isinstance(layer, CodedLayer)
        if layer.coded or self.second_run is not None:
            return
        self.policy.evict_layer(layer)
        if layer.at_prompt:
            layer.store_codes()

    def after_prompt(self, prompt: Prompt) -> None:
        """See `SecondRun.after_prompt`."""
        assert self.policy.second_run is not None
        self.policy.second_run.after_prompt(prompt)
        for layer in prompt.layers:
            assert isinstance(layer, CodedLayer)
            layer.store_codes()


class CodedLayer(KVStoreLayer):
    """KV slots of which those of the prompt become codes.

    Args:
        method: the policy, with the method of the codes.
        index, among: see `KVStoreLayer`.
        codecs: those of keys and of values.

    Attributes:
        coded: the codes of each store; empty until slots were coded.
    """

    holds: ClassVar[tuple[str, ...]] = (*KVStoreLayer.holds, "coded")

    def __init__(self, method: Coded, index: int, among: int, codecs: tuple[Codec, Codec]) -> None:
        super().__init__(method, index, among)
        self.coders, self.window, self.sinks = codecs, method.code.window, method.code.sinks

    def clear(self) -> None:
        """See `CacheState.clear`."""
        super().clear()
        self.coded: list[CodedSlots] = []

    def attend(self, call: AttentionCall) -> Tensor:
        """See `KVLayer.attend`; after the prompt, with the decoded slots."""
        if not self.coded:
            return super().attend(call)
        if call.mask_B1TK is not None:
            self.state["padding"] = self.state["padding"] + call.padding_B
        query_BGRTD = grouped(call.query_BHTD, call.key_BGTD.shape[1])
        outputs = []
        for table, coded in zip(self.tables, self.coded, strict=True):  # one store is decoded at a time
            table.append(call.key_BGTD[:, table.part], call.value_BGTD[:, table.part], call.position)
            out_BTHD = self._natively(call, table, coded)
            if out_BTHD is None:
                whole = coded.joined(table, self.coders)
                out_BTHD = self._by_table(call, query_BGRTD[:, table.part], whole, None, 0)
            outputs.append(out_BTHD)
        return torch.cat(outputs, dim=2)

    def _natively(self, call: AttentionCall, table: KVStore, coded: CodedSlots) -> Tensor | None:
        """Attention of one token to the slots of one store without decoding them first; `None` if no kernel supports it."""
        if call.tokens > 1 or call.mask_B1TK is not None or call.key_bias_BK is not None or call.softmax is not PLAIN:
            return None
        pairs = [(dense_rows(table.keys), dense_rows(table.values), table.used, table.position)]
        if coded.keys:
            rows = [
                codec.kernel_rows(parts, None)
                for codec, parts in zip(self.coders, (coded.keys, coded.values), strict=True)
            ]
            pairs.append((rows[0], rows[1], coded.position_BGS.shape[2], coded.position_BGS))
        sections = [
            NativeSection(keys, values, tokens, position_BGS=position_BGS)
            for keys, values, tokens, position_BGS in pairs
            if keys and values
        ]
        if len(sections) < len(pairs):
            return None
        heads, R = len(table.heads), call.query_BHTD.shape[1] // call.key_BGTD.shape[1]
        query = call.query_BHTD[:, table.part.start * R : table.part.stop * R]
        return attend_natively_to_sections(query, sections, heads, call.value_BGTD.shape[3], call.scaling)

    @property
    def stored(self) -> list[KVStore]:
        """See `KVStoreLayer.stored`: with the decoded slots."""
        if not self.coded:
            return self.tables
        return [coded.joined(table, self.coders) for table, coded in zip(self.tables, self.coded, strict=True)]

    def store_codes(self) -> None:
        """Codes all slots but sinks, latest tokens and those that fill no whole unit."""
        unit = max(codec.unit for codec in self.coders)
        codable = [
            table.real & (self.number(table) >= self.sinks) & (table.position < self.seen - self.window)
            for table in self.tables
        ]
        if not any(bool((codable_BGS.sum(-1) >= unit).any()) for codable_BGS in codable):
            return
        self.coded = [CodedSlots.take(*pair, self.coders) for pair in zip(self.tables, codable, strict=True)]
        self.evicted_until = self.seen
