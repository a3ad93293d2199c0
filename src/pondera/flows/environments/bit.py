"""Bit strings that are filled in word by word. Shapes: B states, W words, V values of a word, M modes."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from pondera.core.errors import UserError
from pondera.flows.environments.base import Environment, whole


class Bit(Environment):
    """Fills the words of a bit string in any order; the reward falls with the distance to the nearest of some hidden strings.

    R(x) = exp(−sharpness · distance), where the distance is the number of differing bits. All trajectories have one length, so
    the environment is graded. The partial reward counts the filled words only.

    Source: the bit sequences of Malkin et al., arXiv 2201.13259, in the fill-in form whose stored runs arXiv 2602.01749 shows.
    Resolved: the hidden strings are random, from `seed`. A mode is one of them, or a string within `within` bits of one.

    Args:
        bits: length of the string.
        word: bits per word; the string has bits / word words.
        modes: number of hidden strings.
        sharpness: how fast the reward falls per bit.
        within: bits by which a mode may differ from a hidden string.
        seed: of the hidden strings.

    Example:
        >>> env = Bit(4, word=2, modes=1)
        >>> env.count_states(), env.longest
        (25, 2)
    """

    paper: ClassVar[str] = "bit sequences, arXiv 2201.13259"
    examples: ClassVar[dict[str, str]] = {"small": "Bit(6, word=2, modes=3)"}
    why_graded: ClassVar[str] = "every string takes one step per word"

    def __init__(
        self, bits: int = 16, word: int = 4, modes: int = 16, sharpness: float = 2.0, within: int = 0, seed: int = 0
    ) -> None:
        whole("bits", bits, 1, 10_000)
        whole("word", word, 1, 12)
        if bits % word:
            raise UserError(f"bits={bits}, word={word}: the string must be whole words; give a multiple of {word} bits")
        whole("modes", modes, 1, min(10_000, 2**bits))
        if not 0 < sharpness < 1e6:
            raise UserError(f"sharpness={sharpness}: give a number above 0")
        self.bits, self.word, self.sharpness = bits, word, sharpness
        self.within = whole("within", within, 0, bits)
        self.words, self.values = bits // word, 2**word
        self.radices, self.actions = (self.values + 1,) * self.words, self.words * self.values
        self.graded, self.longest = True, self.words
        self.mode_MW = _distinct(modes, self.words, self.values, seed)
        values_V = torch.arange(self.values)
        differing_VV = sum((values_V[:, None] ^ values_V) >> bit & 1 for bit in range(word))
        assert isinstance(differing_VV, Tensor)
        self._differing = torch.nn.functional.pad(differing_VV, (0, 0, 1, 0))  # an empty word differs nowhere

    def forward_mask(self, state_BC: Tensor) -> Tensor:
        """Every value of every empty word."""
        return (state_BC == 0).repeat_interleave(self.values, 1)

    def backward_mask(self, state_BC: Tensor) -> Tensor:
        """The value of each filled word."""
        return torch.nn.functional.one_hot(state_BC, self.values + 1)[..., 1:].flatten(1).bool()

    def step(self, state_BC: Tensor, action_B: Tensor) -> Tensor:
        """Fills a word."""
        return state_BC.scatter(1, (action_B // self.values)[:, None], (action_B % self.values + 1)[:, None])

    def undo(self, state_BC: Tensor, action_B: Tensor) -> Tensor:
        """Empties a word."""
        return state_BC.scatter(1, (action_B // self.values)[:, None], 0)

    def finished(self, state_BC: Tensor) -> Tensor:
        """Whether all words are filled."""
        return (state_BC > 0).all(1)

    def log_partial(self, state_BC: Tensor) -> Tensor:
        """Minus the distance to the nearest hidden string, times the sharpness."""
        return -self.sharpness * self._distance(state_BC).double()

    def is_mode(self, state_BC: Tensor) -> Tensor:
        """Whether a hidden string is within reach."""
        return self._distance(state_BC) <= self.within

    def remaining(self, state_BC: Tensor) -> Tensor:
        """Empty words."""
        return (state_BC == 0).sum(1)

    def count_states(self) -> int:
        """Every word empty or filled."""
        return (self.values + 1) ** self.words

    def count_modes(self) -> int | None:
        """Number of hidden strings; with `within` above 0 it is counted from the states, if they can be listed."""
        return len(self.mode_MW) if self.within == 0 else None

    def uniform(self, count: int, generator: torch.Generator) -> Tensor:
        """Random strings."""
        return 1 + torch.randint(self.values, (count, self.words), generator=generator)

    def _distance(self, state_BC: Tensor) -> Tensor:
        return self._differing[state_BC[:, None], self.mode_MW].sum(-1).amin(-1)


def _distinct(count: int, words: int, values: int, seed: int) -> Tensor:
    """Different random strings."""
    generator, found = torch.Generator().manual_seed(seed), set[tuple[int, ...]]()
    kept: list[tuple[int, ...]] = []
    while len(kept) < count:
        drawn = tuple(torch.randint(values, (words,), generator=generator).tolist())
        if drawn not in found:
            found.add(drawn)
            kept.append(drawn)
    return torch.tensor(kept)
