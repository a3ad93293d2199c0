"""Objects that keep what they were constructed with: their repr is the spec that builds them."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from pondera.core.spec_repr import SpecRepr


class Base(SpecRepr, nn.Module):
    def __init__(self, width: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))


class Derived(Base):
    """Its constructor says less than that of its base, and stores nothing under its own names."""

    def __init__(self, size: int, mode: str = "fast", inner: Base | None = None) -> None:
        super().__init__(width=2 * size)


class Unchanged(Derived):
    """Has no constructor of its own."""


@pytest.mark.parametrize(
    ("made", "text"),
    [
        (Base(), "Base()"),
        (Base(1), "Base()"),
        (Base(width=3), "Base(3)"),
        (Derived(4), "Derived(4)"),
        (Derived(size=4, mode="slow"), "Derived(4, mode='slow')"),
        (Derived(4, inner=Derived(2)), "Derived(4, inner=Derived(2))"),
        (Unchanged(4, "slow"), "Unchanged(4, mode='slow')"),
    ],
)
def test_the_repr_is_what_the_outermost_constructor_was_given(made: Base, text: str):
    assert repr(made) == text == repr(copy.deepcopy(made)) == repr(pickle.loads(pickle.dumps(made)))


def test_the_class_and_its_constructor_are_untouched():
    assert Derived.__init__ is vars(Derived)["__init__"] and not hasattr(Derived.__init__, "__wrapped__")
    assert "__init__" not in vars(Unchanged)


def test_what_a_module_was_given_is_no_part_of_its_state():
    assert set(Derived(4, inner=Derived(2)).state_dict()) == {"weight"}
    given = torch.ones(2, requires_grad=True) * 2
    copied = copy.deepcopy(Derived(4, given))
    assert torch.equal(copied._given["mode"], given) and not copied._given["mode"].requires_grad


@pytest.mark.parametrize("arguments", [{}, {"size": 1, "sise": 2}])
def test_wrong_arguments_are_refused_by_the_constructor_itself(arguments: dict[str, int]):
    with pytest.raises(TypeError, match=r"Derived.__init__\(\)"):
        Derived(**arguments)
