"""The state of caches: what follows from the names of its attributes, also for odd states; and that it is written once."""

from __future__ import annotations

import ast
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from pondera import UserError
from pondera.cache.ring_buffer import RingBuffer
from pondera.cache.state import BatchState, CacheLayer, CacheState, batch_sizes, state_of
from pondera.core.hf import DynamicCache

SOURCE = Path(__file__).resolve().parents[3] / "src" / "pondera"


@dataclass
class Part(BatchState):
    """A part of a state; `order_B` is computed from the other field, and is part of the state, too."""

    rows_BD: Tensor
    used: int = 0
    order_B: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.order_B = self.rows_BD.argmax(-1)


class Nested(CacheState):
    """A state with every kind of value."""

    holds: ClassVar[tuple[str, ...]] = ("number", "nothing", "rows_BD", "parts", "pairs", "by_name")
    by_row: ClassVar[tuple[str, ...]] = ("names", "layers")

    def __init__(self, batch: int = 3) -> None:
        self.batch_size = batch
        self.clear()
        if batch:
            rows = torch.arange(batch * 4.0).view(batch, 4)
            self.number, self.rows_BD = 7, rows
            self.parts = [Part(rows + 1, 2), None]
            self.pairs = [(rows + 2, None), None, (rows + 3, rows + 4)]
            self.by_name = {"a": rows + 5, "b": {"c": rows + 6}, "settings": {"least": 0.5}}
            self.names = [f"row {row}" for row in range(batch)]
            self.layers = [Leaf(torch.full((1, 2), float(row))) for row in range(batch)]

    def clear(self) -> None:
        self.number, self.nothing = 0, None
        self.rows_BD: Any = None
        self.parts: list[Any] = []
        self.pairs: list[Any] = []
        self.by_name: dict[str, Any] = {}
        self.names: list[str] = []
        self.layers: list[Any] = []

    def get_seq_length(self) -> int:
        return self.number

    def rollback(self, tokens: int) -> None:
        if tokens == 1:
            raise UserError("crop: no")
        self.nothing = None

    def set_length(self, tokens: int) -> None:
        self.number = tokens


class Leaf(BatchState):
    """A state that one batch row owns."""

    holds: ClassVar[tuple[str, ...]] = ("rows_BD",)

    def __init__(self, rows_BD: Tensor) -> None:
        self.rows_BD = rows_BD


def rows_of(state: Nested) -> list[Tensor]:
    """All tensors with batch rows."""
    part, by_name = state.parts[0], state.by_name
    pairs = [rows for pair in state.pairs if pair is not None for rows in pair if rows is not None]
    return [state.rows_BD, part.rows_BD, part.order_B, *pairs, by_name["a"], by_name["b"]["c"]]


@pytest.mark.parametrize("order", [[2, 0], [1], [0, 0, 2, 2, 1], [-1, 0]])
@pytest.mark.parametrize("how", ["reorder_cache", "batch_select_indices", "select"])
def test_every_part_of_a_state_has_the_selected_rows(order: list[int], how: str):
    state, before = Nested(), Nested()
    getattr(state, how)(torch.tensor(order))
    assert len(rows_of(state)) == 8
    assert all(torch.equal(now, old[order]) for now, old in zip(rows_of(state), rows_of(before), strict=True))
    assert state.names == [before.names[row] for row in order]
    assert [float(leaf.rows_BD[0, 0]) for leaf in state.layers] == [float(range(3)[row]) for row in order]
    assert state.number == 7 and state.parts[0].used == 2 and state.parts[1] is None and state.pairs[1] is None
    assert state.by_name["settings"] == {"least": 0.5} and isinstance(state.pairs[0], tuple)
    assert state.batch() == len(order) and set(batch_sizes(state)) == {len(order)}


def test_rows_are_repeated_and_a_repeated_row_shares_nothing():
    state = Nested()
    state.batch_repeat_interleave(2)
    assert state.names == ["row 0", "row 0", "row 1", "row 1", "row 2", "row 2"]
    state.layers[0].rows_BD[:] = -1.0
    state.rows_BD[0] = -1.0
    assert float(state.layers[1].rows_BD[0, 0]) == 0.0 and state.rows_BD[1].tolist() == [0, 1, 2, 3]


def test_rows_are_selected_by_booleans():
    state = Nested()
    state.batch_select_indices(torch.tensor([True, False, True]))
    assert state.names == ["row 0", "row 2"] and torch.equal(state.rows_BD, Nested().rows_BD[[0, 2]])


def test_a_batch_of_1_and_an_empty_state():
    one = Nested(1)
    one.reorder_cache(torch.tensor([0]))  # type: ignore[arg-type]
    assert one.batch() == 1 and torch.equal(one.rows_BD, Nested(1).rows_BD)
    none = Nested(0)
    for change in (lambda: none.batch_repeat_interleave(3), lambda: none.reorder_cache(torch.tensor([1, 0]))):  # type: ignore[arg-type]
        change()
    assert none.batch() == 0 == none.nbytes() and none.names == [] and none.rows_BD is None


def test_gradients_pass_through_selected_rows():
    x = torch.ones(3, 2, requires_grad=True)
    state = Leaf(x * 2)
    state.select(torch.tensor([1, 1]))
    state.rows_BD.sum().backward()
    assert x.grad is not None and x.grad.tolist() == [[0, 0], [4, 4], [0, 0]]


def test_each_storage_counts_once_and_whole():
    storage = torch.zeros(4, 8)

    class Views(BatchState):
        holds: ClassVar[tuple[str, ...]] = ("first", "again", "further")

        def __init__(self) -> None:
            self.first, self.again, self.further = storage[:, :2], [storage], {"x": torch.zeros(4, 1), "n": 3}
            self.unnamed = torch.zeros(100)

    assert Views().nbytes() == 4 * (32 + 4)


@pytest.mark.parametrize("value", [[1, 2, 3], (0.5, 1.0), ["a"], {1}, object()])
def test_a_value_whose_rows_are_not_known_is_refused(value: Any):
    class Unclear(BatchState):
        holds: ClassVar[tuple[str, ...]] = ("rows_BD", "counts")

        def __init__(self) -> None:
            self.rows_BD, self.counts = torch.zeros(3, 1), value

    with pytest.raises(TypeError, match=r"Unclear\.counts: .*by_row"):
        Unclear().select(torch.tensor([0]))


def test_layers_of_transformers_are_selected_too():
    class Around(CacheState):
        holds: ClassVar[tuple[str, ...]] = ("rows_BD", "layers")

        def __init__(self) -> None:
            cache = DynamicCache()
            cache.update(torch.arange(12.0).view(3, 1, 2, 2), torch.arange(12.0).view(3, 1, 2, 2), 0)
            self.rows_BD, self.layers = torch.arange(3.0)[:, None], cache.layers

    around: Any = Around()
    around.batch_repeat_interleave(2)
    assert around.layers[0].keys.shape == (6, 1, 2, 2) and around.layers[0].keys[1, 0, 0].tolist() == [0, 1]
    assert around.nbytes() == 4 * (6 + 24 + 24)


def test_crop_checks_its_argument_before_anything_changes():
    state = Nested()
    for tokens, match in ((1, "negative number, or 0"), (-8, "only 7 tokens have been seen"), (-6, "crop: no")):
        with pytest.raises(UserError, match=match):
            state.crop(tokens)
        assert state.number == 7
    state.crop(0)
    assert state.number == 7
    state.crop(-3)
    assert state.number == 4
    with pytest.raises(NotImplementedError, match="Unfinished"):

        class Unfinished(Nested):
            rollback = CacheState.rollback

        Unfinished().crop(-1)


def test_a_copy_shares_only_what_it_says():
    class Owner(Leaf):
        shared: ClassVar[tuple[str, ...]] = ("method",)

        def __init__(self) -> None:
            super().__init__(torch.zeros(2, 2))
            self.method, self.notes = object(), {"a": torch.zeros(2)}

    owner = Owner()
    copied = owner.clone()
    assert copied.method is owner.method and copied.rows_BD is not owner.rows_BD
    copied.notes["a"][0] = 1.0
    assert owner.notes["a"].tolist() == [0, 0]


def test_the_fields_of_a_dataclass_are_its_state():
    rows = torch.zeros(2, 1, 4, 3)
    assert list(state_of(RingBuffer(rows, rows))) == ["keys", "values", "first", "end", "origin", "borrowed"]


def definitions() -> dict[str, list[str]]:
    """The places of the package that define each operation on a cache, as file and class."""
    found: dict[str, list[str]] = defaultdict(list)
    for path in sorted(SOURCE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                names = [each.name for each in node.body if isinstance(each, ast.FunctionDef)]
                for name in names:
                    found[name].append(f"{path.stem}.{node.name}")
    return found


def test_each_operation_is_written_once():
    found = definitions()
    once = {
        "reorder_cache": ["state.CacheState"],
        "batch_select_indices": ["state.CacheState"],
        "batch_repeat_interleave": ["state.CacheState"],
        # A layer of a KV-cache method also notes that a crop came; its cache counts the tokens of its first layer.
        "crop": ["base.KVCache", "layer.KVLayer", "state.CacheState"],
        # A cache also resets its layers.
        "reset": ["state.CacheState", "state.CacheLayer", "token_cache.TokenCache"],
        # Codes are stored up to the longest row, which may be gone afterwards; observations of draft tokens are no state.
        "select": ["state.BatchState", "windowed_layer.SinkWindowLayer", "slot_layer.KVStoreLayer"],
        # That of a quantizer is the bytes of a number of codes.
        "nbytes": ["state.BatchState", "base.Quantizer"],
        "clone": ["state.BatchState"],
        "batch": ["state.BatchState"],
        "get_max_length": ["state.CacheLayer"],
    }
    assert {name: sorted(found[name]) for name in once} == {name: sorted(places) for name, places in once.items()}


def test_every_cache_layer_of_the_package_stands_on_the_state():
    for path in sorted(SOURCE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and any(ast.unparse(base) == "CacheLayerMixin" for base in node.bases):
                assert node.name == CacheLayer.__name__, f"{path}: {node.name} is a layer without a stated state"
