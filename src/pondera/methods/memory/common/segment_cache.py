"""The cache of a model that reads block by block, in texts that may stand at different places of their blocks.

A block that is full is closed when its text goes on. What follows of it (memory rows, rows carried over) is worked out
then, by the method; the block as it was, with what was held before it, is kept until the next one closes, so that tokens
can be taken back across one border. None of this grows with the text.

Shapes: B texts, A texts that take part in a call, S rows of a call, L block, K columns of a call, W columns that are noted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import LongTensor, Tensor

from pondera.cache.masks import SlotMask
from pondera.cache.token_cache import TokenCache
from pondera.core.errors import UserError
from pondera.methods.memory.common.segment_layer import SegmentEnd, SegmentLayer, SegmentStep
from pondera.models.backbone import Backbone
from pondera.models.rotary import Rotary


class SegmentCache(TokenCache):
    """Tokens to `generate`; to the backbone, at most a block of rows and what is held of the blocks before.

    Args:
        block: L.
        kinds: of each layer, as `Backbone.layer_types`.
        layers: one cache layer per decoder layer.
        rows: how many memory rows a text has that has closed so many blocks.
        tbptt: gradients do not pass every so many-th border; none: they pass all.
        keeps: whether tokens may be taken back across a border.

    Attributes:
        fill: rows of each text's open block.
        closed: blocks that each text has closed.
    """

    def __init__(
        self,
        block: int,
        kinds: list[str],
        layers: list[SegmentLayer],
        rows: Callable[[int], int],
        tbptt: int | None,
        keeps: bool = True,
    ) -> None:
        super().__init__(layers, 1)
        self.block, self.kinds, self.rows, self.tbptt, self.keeps = block, kinds, rows, tbptt, keeps
        self.fill: list[int] = []
        self.closed: list[int] = []
        self._reopens: list[bool] = []
        self._real_BW: Tensor | None = None

    def start(self, batch: int) -> None:
        """Makes room for so many texts, if nothing was read yet."""
        if not self.fill:
            self.fill, self.closed, self._reopens = [0] * batch, [0] * batch, [False] * batch

    def room(self, text: int) -> int:
        """Tokens that the text can read before the next border."""
        return self.block - self.fill[text] % self.block

    @property
    def even(self) -> bool:
        """All texts stand at the same place."""
        return len(set(self.fill)) < 2 and len(set(self.closed)) < 2

    def begin(self, backbone: Backbone, counts: list[int], h_BTD: Tensor) -> SegmentStep:
        """Prepares a call that adds so many rows of each text, none or up to its next border.

        Args:
            backbone: turns keys.
            counts: rows of each text.
            h_BTD: inputs, for their dtype and device.
        """
        active = [text for text, count in enumerate(counts) if count]
        self._close(backbone, [text for text in active if self.fill[text] == self.block], h_BTD)
        fill, count = [self.fill[text] for text in active], [counts[text] for text in active]
        together = len(active) == len(counts) and self.even and len(set(count)) == 1
        for text in active:
            self.fill[text] += counts[text]
        width = max(self.fill)
        texts = None if together else torch.tensor(active, device=h_BTD.device)
        turn = SegmentStep(fill, count, width, len(counts), texts)
        for layer in self._layers:
            layer.trim(fill[0] if together else width)
            layer.turn = turn
        return turn

    def _close(self, backbone: Backbone, texts: list[int], h_BTD: Tensor) -> None:
        if not texts:
            return
        device, blocks = h_BTD.device, [self.closed[text] for text in texts]
        chosen = None if len(texts) == len(self.fill) else torch.tensor(texts, device=device)
        cut = [self.tbptt is not None and (count + 1) % self.tbptt == 0 for count in blocks]
        closings = {}
        for kind in set(self.kinds):

            def turned(first: int, stop: int, kind: str = kind) -> Rotary | None:
                return backbone.rotation(kind, torch.arange(first, stop, device=device)[None], h_BTD)

            own = turned(0, self.block)
            closings[kind] = SegmentEnd(
                chosen, len(self.fill), blocks, cut, self.keeps, own, lambda width, turned=turned: turned(-width, 0)
            )
        for layer, kind in zip(self._layers, self.kinds, strict=True):
            layer.close(closings[kind])
        for text in texts:
            self.closed[text] += 1
            self.fill[text], self._reopens[text] = 0, self.keeps

    def masks(self, turn: SegmentStep, device: torch.device) -> dict[str, SlotMask]:
        """What the rows of a call see, for each kind of layer: memory, carried rows, and their block up to themselves."""
        position_AS = turn.positions(device)
        if turn.texts_A is None:
            closed = self.closed[:1]
        else:
            closed = [self.closed[text] for text in turn.texts_A.tolist()]
        found = {}
        for kind in set(self.kinds):
            layers = [layer for layer, its in zip(self._layers, self.kinds, strict=True) if its == kind]
            memory, mems = (max(width) for width in zip(*(layer.widths() for layer in layers), strict=True))
            order_K = torch.arange(-memory - mems, turn.width, device=device)
            own_A1 = torch.tensor([self.rows(count) for count in closed], device=device)[:, None]
            carried_A1 = torch.tensor([min(mems, count * self.block) for count in closed], device=device)[:, None]
            there_AK = torch.where(order_K < -mems, order_K >= -mems - own_A1, order_K >= -carried_A1)
            seen_ASK = (order_K <= position_AS[..., None]) & there_AK[:, None]
            found[kind] = SlotMask(seen_ASK, position_AS, order_K[None])
        return found

    @property
    def _layers(self) -> list[SegmentLayer]:
        return self.layers  # type: ignore[return-value]

    @property
    def mixed(self) -> bool:
        """Layers of one kind give different numbers of rows."""
        return any(
            len(
                {
                    layer.update_memory is None
                    for layer, its in zip(self._layers, self.kinds, strict=True)
                    if its == kind
                }
            )
            > 1
            for kind in set(self.kinds)
        )

    def note(self, passes_BT: Tensor, real_BT: Tensor | None) -> None:
        """Notes that these tokens were read, and which of them were padding."""
        batch, tokens = passes_BT.shape
        if real_BT is not None or self._real_BW is not None:
            new = torch.ones_like(passes_BT, dtype=torch.bool) if real_BT is None else real_BT
            old = self._real_BW if self._real_BW is not None else new.new_ones(batch, min(self.tokens, 2 * self.block))
            self._real_BW = torch.cat([old, new], dim=1)[:, -2 * self.block :]
        self.tokens += tokens
        self.passes_BT = passes_BT.new_ones(()).expand(batch, self.tokens)  # one number, however long the text

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last tokens (given as a negative number, as transformers does), back to the border before the last.

        Raises:
            UserError: more of them than are kept.
        """
        count = abs(tokens_to_remove)
        if not count:
            return
        counts = [count] * len(self.fill)
        if self._real_BW is not None and count <= self._real_BW.shape[1]:
            counts = self._real_BW[:, -count:].sum(-1).tolist()
        kept = [have + self.block * reopens for have, reopens in zip(self.fill, self._reopens, strict=True)]
        if any(more > most for more, most in zip(counts, kept, strict=True)):
            raise UserError(
                f"crop: {count} tokens are to be forgotten, of which the rows are kept for {min(kept)}: those of the open "
                f"block and of the one before (block={self.block}); start with a new cache"
            )
        back = [text for text, more in enumerate(counts) if more > self.fill[text]]
        if back:
            device = next(iter(self._layers[0].before.values())).device
            chosen = None if len(back) == len(counts) else torch.tensor(back, device=device)
            for layer in self._layers:
                layer.reopen(chosen, len(counts))
            for text in back:
                self.fill[text] += self.block
                self.closed[text] -= 1
                self._reopens[text] = False
        self.fill = [have - more for have, more in zip(self.fill, counts, strict=True)]
        for layer in self._layers:
            layer.trim(max(self.fill))
        if self._real_BW is not None:
            self._real_BW = self._real_BW[:, :-count]
        self.evict(count)

    def reset(self) -> None:
        """Forgets everything."""
        super().reset()
        self.fill, self.closed, self._reopens, self._real_BW = [], [], [], None

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps these rows of the batch."""
        for layer in self._layers:
            layer.select(indices)
        self._rows(indices)

    def reorder_cache(self, beam_idx: LongTensor) -> None:
        """Rearranges the batch for beam search."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each row of the batch."""
        self.batch_select_indices(torch.arange(len(self.fill)).repeat_interleave(repeats))

    def _rows(self, indices: Tensor) -> None:
        super()._rows(indices)
        order = indices.tolist()
        self.fill, self.closed, self._reopens = (
            [each[text] for text in order] for each in (self.fill, self.closed, self._reopens)
        )
        if self._real_BW is not None:
            self._real_BW = self._real_BW[indices.to(self._real_BW.device)]

    def state_dict(self) -> dict[str, Any]:
        """All that was read, as plain values and tensors, to be saved and read on from later."""
        return {
            "tokens": self.tokens,
            "passes": self.passes_BT,
            "texts": {"fill": self.fill, "closed": self.closed, "reopens": self._reopens, "real": self._real_BW},
            "layers": [{"held": dict(layer.held), "before": dict(layer.before)} for layer in self._layers],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `state_dict` gave, of a model with the same method and backbone."""
        self.tokens, self.passes_BT = state["tokens"], state["passes"]
        texts = state["texts"]
        self.fill, self.closed, self._reopens = (list(texts[name]) for name in ("fill", "closed", "reopens"))
        self._real_BW = texts["real"]
        for layer, own in zip(self._layers, state["layers"], strict=True):
            layer.held, layer.before = dict(own["held"]), dict(own["before"])
            if "block_k" in layer.held:
                layer.lazy_initialization(layer.held["block_k"], layer.held["block_v"])
