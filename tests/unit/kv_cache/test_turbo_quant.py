"""TurboQuant: a random rotation, the best levels for random directions, unbiased products, and honest bytes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers.architectures import ids
from helpers.policy_reference import model
from torch import Tensor
from transformers import LlamaConfig

from pondera import UserError
from pondera.methods.kv_cache.common.bit_packing import pack_bits, unpack_bits
from pondera.methods.kv_cache.common.rotated_quantizer import RotatedQuantizer, best_levels, random_rotation
from pondera.methods.kv_cache.turbo_quant import TurboQuant


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def packed(numbers: list[int], bits: int) -> list[int]:
    """Reference implementation: one long number, cut into bytes."""
    whole = sum(number << bits * place for place, number in enumerate(numbers))
    return list(whole.to_bytes(len(numbers) * bits // 8, "little"))


@pytest.mark.parametrize("bits", range(1, 9))
def test_packing_loses_nothing_and_no_bit(bits: int):
    numbers = torch.randint(2**bits, (2, 3, 16), generator=torch.Generator().manual_seed(bits), dtype=torch.uint8)
    code = pack_bits(numbers, bits)
    assert code.shape == (2, 3, 2 * bits) and torch.equal(unpack_bits(code, bits), numbers)
    assert code[1, 2].tolist() == packed(numbers[1, 2].tolist(), bits)


def test_the_rotation_is_orthogonal_and_that_of_its_seed():
    rotation = random_rotation(64, seed=3)
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(64), atol=1e-5, rtol=0)
    assert torch.equal(rotation, random_rotation(64, seed=3)) and not torch.equal(rotation, random_rotation(64, seed=4))
    many = torch.stack([random_rotation(2, seed) for seed in range(400)])
    assert many.mean(0).abs().max() < 0.12, "uniformly random: no direction is preferred"


@pytest.mark.parametrize(("bits", "error"), [(1, 0.3634), (2, 0.1175), (3, 0.03454), (4, 0.009497)])
def test_the_error_is_that_of_the_paper(bits: int, error: float):
    """Of unit vectors: of random ones, and of one with a single large channel, which rotations spread."""
    channel = 0.01 * random(1, 1, 1, 512)
    channel[..., 7] = 1.0
    for x, rotations in ((random(1, 1, 400, 512), 1), (channel, 20)):
        x, found = x / x.norm(dim=-1, keepdim=True), []
        for seed in range(rotations):
            codec = RotatedQuantizer(bits, random_rotation(512, seed))
            found.append((codec.decode(codec.encode(x)) - x).square().sum(-1).mean())
        assert torch.stack(found).mean() == pytest.approx(error, rel=0.03)


@pytest.mark.parametrize(("bits", "width"), [(1, 64), (2, 16), (3, 128), (4, 64)])
def test_levels_are_means_of_what_is_nearest_to_them(bits: int, width: int):
    """On samples of the distribution; and no other level is nearer to optimal on the grid of shifts."""
    level_K = best_levels(bits, width).double()
    t = random(4000, width, seed=bits).double()
    t = (t / t.norm(dim=-1, keepdim=True)).flatten()
    nearest = (t[:, None] - level_K).abs().argmin(-1)
    means = torch.stack([t[nearest == k].mean() for k in range(2**bits)])
    torch.testing.assert_close(means, level_K, atol=0.02 / width**0.5, rtol=0)
    torch.testing.assert_close(level_K, -level_K.flip(0), atol=1e-4, rtol=0)


def test_norms_are_kept_and_zero_stays_zero():
    codec = RotatedQuantizer(3, random_rotation(32, seed=0))
    x = random(2, 2, 5, 32)
    parts = codec.encode(x)
    torch.testing.assert_close(codec.decode(codec.encode(x * 8)), codec.decode(parts) * 8)
    torch.testing.assert_close(parts["norm"].float(), x.norm(dim=-1), atol=0, rtol=1e-3)
    assert not codec.decode(codec.encode(torch.zeros(1, 1, 2, 32))).any()
    assert codec.decode(codec.encode(torch.full((1, 1, 1, 32), 1e6))).isfinite().all()


@pytest.mark.parametrize("sketched", [False, True])
@pytest.mark.parametrize("bits", [0, 1, 3])
def test_products_and_sums_are_those_of_decoded_rows(bits: int, sketched: bool):
    codec = RotatedQuantizer(bits, random_rotation(16, seed=0), random(16, 16) if sketched else None)
    parts = codec.encode(random(2, 3, 10, 16))
    rows, query, weight = codec.decode(parts), random(2, 3, 4, 16, seed=5), random(2, 3, 4, 10, seed=6)
    torch.testing.assert_close(codec.dot(query, parts), query @ rows.mT, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(codec.mix(weight, parts), weight @ rows, atol=1e-4, rtol=1e-4)


def test_products_with_signs_are_unbiased_and_without_them_are_not():
    """Over many random matrices, for one key and its own direction as the query, where rounding shrinks most."""
    key = random(1, 1, 1, 32) * 2
    query = key[:, :, 0] / key.norm()
    biased, unbiased, codec = [], [], RotatedQuantizer(1, torch.eye(32))
    for seed in range(600):
        codec.rotation_DD = random_rotation(32, seed)
        for codec.sketch_DD, found in ((None, biased), (random(32, 32, seed=10_000 + seed), unbiased)):
            found.append(float(codec.dot(query[:, :, None], codec.encode(key))) / float(key.norm()))
    mean, spread = torch.tensor(unbiased).mean(), torch.tensor(unbiased).std() / math.sqrt(600)
    assert abs(mean - 1) < 4 * spread < 0.05
    assert torch.tensor(biased).mean() == pytest.approx(2 / math.pi, abs=0.03)


LLAMA_8B = LlamaConfig(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8)


@pytest.mark.parametrize(
    ("given", "bytes_"),
    [({"bits": 2}, 8 * (34 + 34)), ({"bits": 3}, 8 * (50 + 50)), ({"bits": 3, "inner_product": True}, 8 * (52 + 50))],
)
def test_norms_are_in_the_bytes(given: dict[str, Any], bytes_: int):
    """Heads of width 128: 16 bytes per bit, and 2 for each norm."""
    assert TurboQuant(**given).token_bytes(LLAMA_8B) == bytes_


@pytest.mark.parametrize(("bits", "inner_product"), [(1, False), (3, False), (4, False), (1, True), (3, True)])
def test_live_codes_take_the_bytes_that_the_formula_says(bits: int, inner_product: bool):
    method, lm = TurboQuant(bits, inner_product, window=5, sinks=1, flush_size=2), model()
    cache: Any = method.cache(lm)
    with torch.no_grad():
        for piece in ids(2, 41).split([30, *[1] * 11], 1):
            lm(piece, past_key_values=cache)
    for layer in cache.kept:
        assert layer.code_bytes() == 2 * layer.coded[0] * method.token_bytes(lm.config) and layer.coded == [34, 34]


def test_layers_share_their_matrices():
    cache: Any = TurboQuant().cache(model())
    assert len({id(codec) for layer in cache.kept for codec in layer.coders}) == 1


@pytest.mark.parametrize("bits", [0, 5, True, 2.5])
def test_what_makes_no_sense_is_refused(bits: Any):
    with pytest.raises(UserError, match="give 1, 2, 3, 4"):
        TurboQuant(bits)


def test_heads_that_fill_no_bytes_are_refused():
    config = LlamaConfig(hidden_size=48, num_attention_heads=4, head_dim=12)
    with pytest.raises(UserError, match=r"width 12 .* use KIVI\(8\)"):
        TurboQuant(3).check(config, [0])
