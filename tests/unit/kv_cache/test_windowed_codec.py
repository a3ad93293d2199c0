"""Three regions: whatever is fed in whichever way, the same is exact, the same is coded, and attention is plain softmax."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from pondera import UserError
from pondera.cache.codec import Codec
from pondera.cache.ring_buffer import RingBuffer
from pondera.core.hf import sdpa_attention
from pondera.methods.kv_cache.common.codebooks import Codebooks
from pondera.methods.kv_cache.common.windowed_codec import SinkWindowCache
from pondera.methods.kv_cache.common.windowed_layer import SinkWindowLayer
from pondera.methods.kv_cache.kivi import KIVI

B, G, R, D = 2, 2, 3, 8
MODULE = cast(Any, SimpleNamespace(num_key_value_groups=R, is_causal=True))


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


class Given(SinkWindowCache):
    """Regions whose coders a test brings."""

    def __init__(self, coders: tuple[Codec, Codec], window: int, sinks: int, flush_size: int) -> None:
        super().__init__(window, sinks, flush_size)
        self.given = coders

    def coders(self, config: Any, index: int) -> tuple[Codec, Codec]:
        return self.given

    def rate(self, config: Any) -> float:
        raise NotImplementedError


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def books(stages: int = 3, codes: int = 5, joined: int = 1, seed: int = 0) -> Codebooks:
    dims = [torch.tensor([0, 4, 1]), torch.tensor([2, 3, 5, 6, 7])]
    tables = [random(stages, codes, joined * len(each), seed=seed + n) for n, each in enumerate(dims)]
    return Codebooks(tables, dims, G, joined)


def layer(
    window: int = 4, sinks: int = 2, flush_size: int = 3, coders: tuple[Codec, Codec] | None = None
) -> SinkWindowLayer:
    made = Given(coders or (books(), books(seed=7)), window, sinks, flush_size)
    return made.layer(cast(Any, None), 0, 1)


def rows(tokens: int, batch: int = B) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        random(batch, G * R, tokens, D, seed=1),
        random(batch, G, tokens, D, seed=2),
        random(batch, G, tokens, D, seed=3),
    )


def feed(to: SinkWindowLayer, given: tuple[torch.Tensor, ...], pieces: list[int], mask=None) -> torch.Tensor:
    """``[B, T, H, D]``: attention of all tokens, given piece by piece."""
    found, seen = [], to.seen
    for query, key, value in zip(*(each.split(pieces, 2) for each in given), strict=True):
        to.expected = True
        key, value = to.update(key, value)
        seen += key.shape[2]
        causal, T = None, key.shape[2]
        if mask is not None or 1 < T < seen:  # as transformers: none is needed for a first piece and for one token
            causal = torch.ones(1, 1, seen, seen).tril().bool()[:, :, -T:]
            causal = causal if mask is None else causal & mask[:, None, None, :seen].bool()
        found.append(to(sdpa_attention, MODULE, query, key, value, causal)[0])
    return torch.cat(found, 1)


def held(of: SinkWindowLayer) -> list[torch.Tensor]:
    codes = [part for coder, each in zip(of.coders, of.codes, strict=True) for part in each.view(coder).values()]
    return [*codes, *of.ring.read(of._exact_from(), of.ring.end), of.sink_keys, of.sink_values]


@pytest.mark.parametrize("pieces", [[23], [1] * 23, [9, 1, 1, 5, 1, 6], [3, 20]])
def test_codes_do_not_depend_on_how_a_text_was_fed_in(pieces: list[int]):
    given, one = rows(23), layer()
    other = layer()
    feed(one, given, [23]), feed(other, given, pieces)
    assert one.coded == other.coded == [15, 15]  # of 21 that are no sinks 4 to 6 are exact
    assert all(torch.equal(a, b) for a, b in zip(held(one), held(other), strict=True))


@pytest.mark.parametrize("tokens", [1, 4])
def test_attention_is_softmax_over_what_is_kept(tokens: int):
    """The slow form: all that is kept, decoded, with the new tokens behind it, and plain softmax."""
    given, of = rows(20 + tokens), layer()
    feed(of, tuple(each[:, :, :20] for each in given), [17, 1, 1, 1])
    keys, values, number_BS = of.restored()
    order = number_BS.argsort(-1)[:, None, :, None].expand(-1, G, -1, D)
    new = tuple(each[:, :, 20:] for each in given)
    keys, values = (torch.cat([old.gather(2, order), fresh], 2) for old, fresh in ((keys, new[1]), (values, new[2])))
    assert number_BS.sort(-1).values.tolist() == [list(range(20))] * B
    score = new[0] @ keys.repeat_interleave(R, 1).mT * D**-0.5
    score = score.masked_fill(torch.ones(20 + tokens, 20 + tokens).tril()[20:] == 0, -torch.inf)
    expected = (score.softmax(-1) @ values.repeat_interleave(R, 1)).transpose(1, 2)
    # One token at a time would code in between; a call sees its own tokens exactly.
    torch.testing.assert_close(feed(of, new, [tokens]), expected, atol=1e-5, rtol=1e-5)


def test_padded_rows_are_coded_as_alone():
    """Left padding of any length, also more than a call is long; rows of a batch reach their codes at different times."""
    given, pads = rows(19, batch=3), [0, 5, 14]
    mask = torch.stack([torch.arange(19) >= p for p in pads])
    together = layer()
    out = feed(together, given, [8, *[1] * 11], mask)
    for row, p in enumerate(pads):
        alone = layer()
        mine = tuple(each[row : row + 1, :, p:] for each in given)
        expected = feed(alone, mine, [n for n in [max(0, 8 - p)] if n] + [1] * (19 - max(8, p)))
        coded = alone.coded[0]
        assert together.coded[row] == coded and together.pads[row] == p
        for coder, codes, other in zip(together.coders, together.codes, alone.codes, strict=True):
            if coded:
                assert torch.equal(codes.view(coder)["codes"][row, :, :coded], other.view(coder)["codes"][0])
        torch.testing.assert_close(out[row, p:], expected[0], atol=1e-5, rtol=1e-5)
    in_pieces = layer()
    feed(in_pieces, given, [3, 8, 1, 7], mask)
    assert in_pieces.coded == together.coded
    assert all(torch.equal(a, b) for a, b in zip(held(in_pieces), held(together), strict=True))


@pytest.mark.parametrize("sinks", [0, 2])
@pytest.mark.parametrize("window", [0, 4])
def test_while_it_fits_it_is_exact_and_no_token_is_counted_twice(window: int, sinks: int):
    given = rows(window + sinks + 2)
    small, big = layer(window, sinks), layer(64, 0)
    pieces = [1] * (window + sinks + 2)  # flush_size=3: two more fit
    assert torch.equal(feed(small, given, pieces), feed(big, given, pieces)) and small.coded == [0, 0]


def test_an_exact_table_is_an_ordinary_cache():
    """Codes that are the numbers of vectors that were seen."""
    query, key, value = rows(20, batch=1)
    tables = [each[0].flatten(0, 1)[None] for each in (key, value)]
    exact = tuple(Codebooks([table], [torch.arange(D)], G) for table in tables)
    of, full = layer(coders=cast(Any, exact)), layer(window=64)
    pieces = [7, 1, 1, 1, 5, 1, 4]
    out = feed(of, (query, key, value), pieces)
    torch.testing.assert_close(out, feed(full, (query, key, value), pieces), atol=1e-5, rtol=1e-5)
    assert of.coded[0] > 0


def test_bytes_are_those_of_the_regions():
    of, given = layer(), rows(200)
    feed(of, given, [190, *[1] * 10])
    coded = of.coded[0]
    assert of.code_bytes() == B * G * coded * (6 + 6)  # a byte for each of two branches' three stages
    exact = 4 * 2 * B * G * D * (of.method.sinks + of.ring.room)
    assert of.ring.room == 2 + 4 + 3 and of.codes[0].room <= 1.125 * 190 + 16
    assert of.nbytes() == exact + 2 * B * G * 6 * of.codes[0].room


def test_rows_are_chosen_in_all_regions_together():
    given = rows(20, batch=3)
    of = layer()
    feed(of, given, [18, 1, 1])
    before = of.restored()
    of.reorder_cache(cast(Any, torch.tensor([2, 0, 0])))
    assert all(torch.equal(a[[2, 0, 0]], b) for a, b in zip(before, of.restored(), strict=True))
    of.batch_repeat_interleave(2)
    assert of.batch() == 6 and torch.equal(of.restored()[0], before[0][[2, 2, 0, 0, 0, 0]])
    of.batch_select_indices(torch.tensor([5]))
    assert of.batch() == 1 and torch.equal(of.restored()[1], before[1][[0]])
    mine = tuple(each[:1, :, :3] for each in given)
    assert feed(of, mine, [1, 2]).isfinite().all()


def test_what_was_coded_stays_coded_when_tokens_are_taken_back():
    given = rows(24)
    of = layer()
    feed(of, given, [24])
    keys = of.restored()[0]
    assert of.coded == [18, 18] and of.get_seq_length() == 24
    of.crop(-2)
    assert of.coded == [18, 18] and len(of.ring) == 2, "the window is shorter"
    of.crop(-6)  # into the middle
    assert of.coded == [14, 14] and len(of.ring) == 0 and of.get_seq_length() == 16
    found, _, number_BS = of.restored()
    assert number_BS[0].sort().values.tolist() == list(range(16))
    assert torch.equal(found[:, :, 2:16], keys[:, :, 2:16]), "codes were cut off, and nothing else happened to them"
    feed(of, tuple(each[:, :, 16:] for each in given), [1] * 8)
    assert of.coded == [17, 17] and of.get_seq_length() == 24 and len(of.ring) == 5
    of.crop(-23)  # into the first tokens
    assert of.coded == [0, 0] and of.restored()[2].max() == 0


def test_recorded_tokens_leave_no_trace():
    given, of, straight = rows(30), layer(), layer()
    of.activate_past_recording()
    feed(of, given, [20, *[1] * 10])
    assert of.coded == [0, 0], "nothing is coded that may be taken back"
    of.crop(-10)
    feed(straight, tuple(each[:, :, :20] for each in given), [20])
    assert all(torch.equal(a, b) for a, b in zip(held(of), held(straight), strict=True))


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_groups_of_rounded_keys_begin_with_the_text(bits: int):
    """Rows whose padding differs have groups at different places of the batch."""
    given, pads = rows(21), [0, 3]
    coders = KIVI(bits, group=4).coders(cast(Any, SimpleNamespace(head_dim=D)), 0)
    mask = torch.stack([torch.arange(21) >= p for p in pads])
    together, alone = layer(flush_size=4, coders=coders), layer(flush_size=4, coders=coders)
    feed(together, given, [10, *[1] * 11], mask)
    feed(alone, tuple(each[1:, :, 3:] for each in given), [7, *[1] * 11])
    for name, part in alone.codes[0].view(coders[0]).items():
        assert torch.equal(together.codes[0].view(coders[0])[name][1:, :, : part.shape[2]], part), name
    with pytest.raises(UserError, match="coded together"):
        together.crop(-9)


def test_a_ring_goes_round():
    ring, rows_ = RingBuffer(torch.empty(1, 1, 0, 1), torch.empty(1, 1, 0, 1)), torch.arange(50.0).view(1, 1, 50, 1)
    for n in range(50):
        if n == 12:
            ring.resize(8)
        ring.append(rows_[:, :, n : n + 1], -rows_[:, :, n : n + 1])
        ring.drop(n - 6)
        keys, values = ring.read(ring.first, ring.end)
        assert keys.flatten().tolist() == list(range(max(0, n - 6), n + 1)) and torch.equal(values, -keys)
    assert ring.room == 8 and len(list(ring.pieces(43, 50))) <= 2


@pytest.mark.parametrize("kwargs", [{"window": -1}, {"sinks": 1.5}, {"flush_size": 0}, {"window": True}])
def test_regions_that_make_no_sense_are_refused(kwargs: dict[str, Any]):
    with pytest.raises(UserError, match="give a number of tokens"):
        layer(**kwargs)


@pytest.mark.parametrize(("given", "sinks"), [({}, 4), ({"sinks": 0}, 0)])
def test_rounding_leaves_the_first_tokens_exact_unless_the_form_of_the_paper_is_asked_for(
    given: dict[str, Any], sinks: int
):
    config = cast(Any, SimpleNamespace(head_dim=D))
    keys = rows(60)
    of = KIVI(2, group=4, window=8, **given).layer(config, 0, 1)
    feed(of, keys, [50, *[1] * 10])
    found, _, number_BS = of.restored()
    exact = [t for t in range(60) if torch.equal(found[:, :, number_BS[0] == t], keys[1][:, :, t : t + 1])]
    assert exact == [*range(sinks), *range(sinks + of.coded[0], 60)] and of.coded[0] > 40
