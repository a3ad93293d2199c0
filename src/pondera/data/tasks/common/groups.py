"""Finite groups as tables of products."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass

import numpy as np

from pondera.core.errors import UserError

LARGEST = 120
"""The largest number of elements of a group; each is one token."""

Element = tuple[int, ...]


@dataclass(frozen=True)
class Group:
    """A finite group.

    Args:
        name: S3, A5, Z60, ...
        elements: its elements as permutations of 0, 1, ...; the first one is the identity.
        names: the symbol of each element.
        product: ``[n, n]``; ``product[i, j]`` is the element that applies i first and j second.
    """

    name: str
    elements: tuple[Element, ...]
    names: tuple[str, ...]
    product: np.ndarray


def group(name: str) -> Group:
    """The group of a name: ``Sn`` all permutations of n objects, ``An`` the even ones, ``Zn`` the sums modulo n, or
    ``parity``, which is Z2.

    Raises:
        UserError: an unknown name, or a group of more than `LARGEST` elements.

    Example:
        >>> s3 = group("S3")
        >>> len(s3.elements), s3.names[0], bool((s3.product == s3.product.T).all())
        (6, '012', False)
    """
    matched = re.fullmatch(r"([SAZ])([1-9]\d*)", "Z2" if name == "parity" else name)
    if matched is None:
        raise UserError(f"group={name!r}: unknown; give S3, S4, S5, A4, A5, Z2 to Z{LARGEST}, or parity")
    kind, n = matched[1], int(matched[2])
    if (kind == "Z" and not 2 <= n <= LARGEST) or (kind != "Z" and not 3 <= n <= 5):
        raise UserError(f"group={name!r}: give S3, S4, S5, A4, A5, Z2 to Z{LARGEST}, or parity")
    if kind == "Z":
        elements = tuple(tuple((place + turn) % n for place in range(n)) for turn in range(n))
        names = tuple(map(str, range(n)))
    else:
        every = itertools.permutations(range(n))
        elements = tuple(element for element in every if kind == "S" or _even(element))
        names = tuple("".join(map(str, element)) for element in elements)
    number = {element: index for index, element in enumerate(elements)}
    product = np.array([[number[after(first, second)] for second in elements] for first in elements])
    return Group(name, elements, names, product)


def generators(found: Group) -> tuple[int, ...]:
    """The indices of a few elements whose products are the whole group: each one adds products to those before it.

    Example:
        >>> s4 = group("S4")
        >>> [s4.names[index] for index in generators(s4)]
        ['0132', '0213', '1023']
    """
    chosen: list[int] = []
    reached = {0}
    for index in range(len(found.elements)):
        if index not in reached:
            chosen.append(index)
            reached = _products(found.product, chosen)
    return tuple(chosen)


def _products(product: np.ndarray, chosen: list[int]) -> set[int]:
    """All products of the chosen elements."""
    reached, latest = {0}, {0}
    while latest:
        latest = {int(product[one, other]) for one in latest for other in chosen} - reached
        reached |= latest
    return reached


def after(first: Element, second: Element) -> Element:
    """The permutation that applies `first`, then `second`."""
    return tuple(second[place] for place in first)


def _even(element: Element) -> bool:
    return sum(a > b for a, b in itertools.combinations(element, 2)) % 2 == 0
