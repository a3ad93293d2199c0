"""MemorizingTransformer's reading of memory held to a search that sorts."""

from __future__ import annotations

import pytest
import torch

from pondera.methods.memory.memorizing_transformer import Nearest


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("top_k", [1, 3, 9, 20])
def test_each_query_reads_its_nearest_rows_and_no_others(top_k: int):
    query, key, value = draw(2, 4, 5, 8), draw(2, 2, 9, 8, seed=1), draw(2, 2, 9, 8, seed=2)
    there = torch.ones(2, 1, 5, 9, dtype=torch.bool)
    there[1, ..., :4] = False  # the second text has closed fewer blocks
    found = Nearest({}, 9, top_k, None)(query, key, value, there, 0.3)
    for text in range(2):
        own = range(4 if text else 0, 9)
        for head in range(4):
            for row in range(5):
                score = {at: float(0.3 * query[text, head, row] @ key[text, head // 2, at]) for at in own}
                best = sorted(own, key=lambda at: -score[at])[:top_k]
                weight = torch.tensor([score[at] for at in best]).softmax(0).double()
                wanted = weight @ value[text, head // 2, best]
                torch.testing.assert_close(found[text, row, head], wanted, atol=1e-6, rtol=1e-6)


def test_of_equal_rows_no_more_are_read_than_there_is_room_for():
    """Else rounding, which differs between calls of different shapes, would say how often a row counts that is there twice."""
    key, value = draw(1, 1, 3, 8), draw(1, 1, 3, 8, seed=1)
    key, value = (torch.cat([x, x[:, :, :1]], dim=-2) for x in (key, value))  # the first row once more
    query = key[:, :, 1:2] + key[:, :, :1] / 2  # nearest to the second row, then to the first and its copy
    there = torch.ones(1, 1, 1, 4, dtype=torch.bool)
    copied = Nearest({}, 4, 2, None)(query, key, value, there, 0.3)
    torch.testing.assert_close(
        copied, Nearest({}, 3, 2, None)(query, key[:, :, :3], value[:, :, :3], there[..., :3], 0.3)
    )
