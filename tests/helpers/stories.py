"""Text for tests of the data layer, and the documents of a prepared corpus."""

import random

import numpy as np

WORDS = "weights pondera token naïve 日本語 thinking 🙂 größe cost one two three".split()


def story(seed: int, words: int = 300) -> str:
    rng = random.Random(seed)
    return "".join(rng.choice(WORDS) + rng.choice(["\n\n", "\n", " ", " ", " "]) for _ in range(words))


def documents_of(split, tokenizer) -> dict[str, str]:
    """Every document of a split, decoded back from the bins."""
    ends = np.flatnonzero(split.ids == tokenizer.eos_token_id) + 1
    starts = [0, *ends[:-1]]
    return {
        split.document_at(a): tokenizer.decode(split.ids[a : b - 1].tolist()) for a, b in zip(starts, ends, strict=True)
    }
