"""Synthetic tasks: the sampled answers against an independent solver, difficulties against their definitions, and windows."""

from __future__ import annotations

import itertools
import pickle

import numpy as np
import pytest
import torch

from pondera import UserError
from pondera.core import spec
from pondera.core.run_config import DataConfig
from pondera.data.corpus import prepare
from pondera.data.task_corpus import BLOCK
from pondera.data.tasks.base import FILL, IGNORED, NO_DIFFICULTY, Task
from pondera.data.tasks.common.groups import after, generators, group

INDEX = spec.index(("task",))
FORMS = [text for info in INDEX.values() for text in info.examples.values()]
CONTEXT = 48


def built(text: str) -> Task:
    return spec.build(text, "task")


def names(task: Task) -> dict[int, str]:
    return {number: symbol for symbol, number in task.ids.items()}


def test_every_task_is_found_and_has_an_example():
    assert len(INDEX) >= 6 and all(info.examples and info.summary for info in INDEX.values())


@pytest.mark.parametrize("text", FORMS)
@pytest.mark.parametrize("context", [CONTEXT, CONTEXT + 1, 131])
def test_the_answers_are_those_of_the_solver(text: str, context: int):
    task = built(text)
    found, named = task.sample(np.random.default_rng(3), 40, context), names(task)
    asked = 0
    for ids_C, targets_C, difficulty_C in zip(found.ids_NC, found.targets_NC, found.difficulty_NC, strict=True):
        solved = task.solve([named[number] for number in ids_C])
        assert targets_C.tolist() == [IGNORED if answer is None else task.ids[answer] for answer in solved]
        assert ((difficulty_C == NO_DIFFICULTY) == (targets_C == IGNORED)).all()
        asked += int((targets_C != IGNORED).sum())
    assert asked >= 40 and ids_C.shape == (context,)


@pytest.mark.parametrize("text", FORMS)
def test_equal_seeds_give_equal_windows_and_others_do_not(text: str):
    one, same, other = (built(text).sample(np.random.default_rng(seed), 8, CONTEXT) for seed in (1, 1, 2))
    assert (one.ids_NC == same.ids_NC).all() and (one.ids_NC != other.ids_NC).any()


@pytest.mark.parametrize("text", FORMS)
def test_no_answer_is_much_more_frequent_than_chance(text: str):
    task = built(text)
    targets = task.sample(np.random.default_rng(0), 400, CONTEXT).targets_NC
    highest = np.bincount(targets[targets != IGNORED]).max() / (targets != IGNORED).sum()
    assert highest < 1 / task.answers + 0.35  # a reset gives the identity


def test_difficulty_of_state_tracking_is_the_number_of_elements_since_the_reset():
    task = built("StateTracking('S3', reset=0.3)")
    found = task.sample(np.random.default_rng(0), 20, 30)
    resets_NC = found.ids_NC == task.ids["R"]
    for row, difficulty_C in zip(resets_NC, found.difficulty_NC, strict=True):
        since = 0
        for is_reset, difficulty in zip(row, difficulty_C, strict=True):
            since = 0 if is_reset else since + 1
            assert difficulty == since
    assert resets_NC.mean() == pytest.approx(0.3, abs=0.05)


@pytest.mark.parametrize("name", ["S3", "S4", "S5", "A4", "A5", "Z60", "parity"])
def test_generators_are_few_and_their_products_are_the_group(name: str):
    found = group(name)
    chosen = [found.elements[index] for index in generators(found)]
    reached = {found.elements[0]}
    for _ in found.elements:
        reached |= {after(state, element) for state in reached for element in chosen}
    assert reached == set(found.elements) and len(chosen) <= 4
    for left_out in chosen[:-1]:  # each was added because those before it were not enough
        before = chosen[: chosen.index(left_out) + 1]
        reached = {found.elements[0]}
        for _ in found.elements:
            reached |= {after(state, element) for state in reached for element in before}
        assert len(reached) < len(found.elements)


def test_only_generators_are_drawn_and_the_states_are_those_of_the_group():
    task = built("StateTracking('A5', reset=0.1, generators=True)")
    found, named = task.sample(np.random.default_rng(0), 200, 30), names(task)
    drawn = {named[number] for number in found.ids_NC.ravel()} - {"R"}
    assert len(drawn) == 3 and len(np.unique(found.targets_NC)) == task.answers == 60
    assert {named[number] for number in found.targets_NC[found.difficulty_NC == 1]} == drawn


def test_difficulty_of_addition_is_how_far_a_carry_can_come_from():
    """A digit of difficulty k changes with the k-th place below it at most, and with that one for some digits there."""
    task, length = built("Addition(digits=4, propagate=0.6)"), 4
    found, named = task.sample(np.random.default_rng(5), 60, 15), names(task)
    for ids_C, difficulty_C in zip(found.ids_NC, found.difficulty_NC, strict=True):
        symbols = [named[number] for number in ids_C]
        for place in range(length + 1):
            steps = difficulty_C[2 * length + 1 + place]
            reach = min(place + steps, length)
            can_change = {digits_below(symbols, place, first, length) for first in range(place, length)}
            assert max(can_change, default=0) <= reach


def digits_below(symbols: list[str], place: int, changed: int, length: int) -> int:
    """1 more than `changed` if other digits there change the digit `place` of the sum, else 0."""

    def digit(a: int, b: int) -> str:
        left, right = symbols[:length], symbols[length + 1 : 2 * length + 1]
        left, right = (
            [*left[:changed], str(a), *left[changed + 1 :]],
            [*right[:changed], str(b), *right[changed + 1 :]],
        )
        return str(int("".join(left)) + int("".join(right))).zfill(length + 1)[place]

    if changed < place:  # digits above cannot matter
        return 0
    own = digit(int(symbols[changed]), int(symbols[length + 1 + changed]))
    return changed + 1 if any(digit(a, b) != own for a, b in ((0, 0), (9, 9))) else 0


@pytest.mark.parametrize("name", ["S3", "S4", "S5", "A4", "A5", "Z7", "parity"])
def test_groups_are_groups(name: str):
    found = group(name)
    n, product = len(found.elements), found.product
    assert n == {"S3": 6, "S4": 24, "S5": 120, "A4": 12, "A5": 60, "Z7": 7, "parity": 2}[name]
    assert (product[0] == np.arange(n)).all() and (product[:, 0] == np.arange(n)).all()
    assert all(sorted(row) == list(range(n)) for row in (*product.tolist(), *product.T.tolist()))
    draw = np.random.default_rng(0).integers(n, size=(50, 3))
    for a, b, c in draw:
        assert product[product[a, b], c] == product[a, product[b, c]]
        assert found.elements[product[a, b]] == after(found.elements[a], found.elements[b])


def test_s3_does_not_commute_and_z_does():
    s3, z60 = group("S3"), group("Z60")
    assert any(s3.product[a, b] != s3.product[b, a] for a, b in itertools.product(range(6), repeat=2))
    assert (z60.product == z60.product.T).all()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("StateTracking(group='S6')", "S3, S4, S5"),
        ("StateTracking(group='Z0')", "Z2 to Z120"),
        ("StateTracking(reset=1.5)", "share from 0 to 1"),
        ("PointerChasing(nodes=1)", "2 to 64"),
        ("Addition(digits=0)", "1 to 32"),
        ("ModularExpression(depth=9)", "1 to 8"),
        ("StateTrackin()", "StateTracking"),
    ],
)
def test_wrong_settings_say_what_is_allowed(text: str, said: str):
    with pytest.raises(UserError, match=said):
        built(text)


def test_a_window_that_is_too_short_is_refused():
    with pytest.raises(UserError, match="give 21 or more"):
        prepare(DataConfig(task="Addition(digits=6)", context=20))


def test_corpus_has_windows_of_both_splits_and_a_tokenizer(tmp_path):
    config = DataConfig(task="StateTracking('S3')", context=16, windows=BLOCK + 3)
    corpus, again = prepare(config, tmp_path), prepare(config, tmp_path)
    assert corpus.digest == again.digest != prepare(DataConfig(**{**vars(config), "windows": 17}), tmp_path).digest
    train, held_out = corpus.train.windows(16), corpus.validation.windows(16)
    assert len(train) == BLOCK + 3 and len(held_out) >= BLOCK
    for index in (0, BLOCK + 2):
        assert torch.equal(train[index]["input_ids"], again.train.windows(16)[index]["input_ids"])
    assert not torch.equal(train[0]["input_ids"], held_out[0]["input_ids"])
    assert not torch.equal(train[0]["input_ids"], train[BLOCK]["input_ids"])
    with pytest.raises(IndexError):
        train[BLOCK + 3]
    tokenizer = corpus.tokenizer()
    assert tokenizer("012 R 210").input_ids == [1, 7, 6] and tokenizer.decode([1, 7, 6]) == "012 R 210"
    assert tokenizer.eos_token == FILL and len(tokenizer) == corpus.vocab_size == 8
    split = pickle.loads(pickle.dumps(corpus.train))  # as a data-loading process does
    assert torch.equal(split.windows(16)[5]["targets"], train[5]["targets"])
