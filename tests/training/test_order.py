"""The order of samples: each once an epoch, mixtures by weight, the same wherever one begins to ask."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.training.order import BLOCK, Order

sets = st.lists(st.tuples(st.integers(1, 40), st.floats(0.01, 100)), min_size=1, max_size=4)


def joined(sizes: list[tuple[int, float]]) -> list[tuple[range, float]]:
    found, start = [], 0
    for size, weight in sizes:
        found.append((range(start, start + size), weight))
        start += size
    return found


@given(sets, st.integers(0, 5), st.lists(st.integers(0, 3 * BLOCK), min_size=1, max_size=20))
def test_a_place_is_the_same_wherever_one_begins(sizes: list[tuple[int, float]], seed: int, places: list[int]) -> None:
    one, straight = Order(joined(sizes), seed, "phase"), Order(joined(sizes), seed, "phase")
    there = [straight.at(place) for place in range(max(places) + 1)]
    assert [one.at(place) for place in places] == [there[place] for place in places]


@given(sets, st.integers(0, 5))
def test_every_set_goes_through_all_its_samples_before_any_comes_again(sizes: list[tuple[int, float]], seed: int) -> None:
    order = Order(joined(sizes), seed, "phase")
    seen: Counter[int] = Counter()
    for place in range(2 * BLOCK):
        epoch, number = order.at(place)
        assert seen[number] == epoch
        seen[number] += 1


@pytest.mark.parametrize("weights", [(1, 1), (3, 1), (0.7, 0.2, 0.1), (1000, 1, 1)])
def test_sets_come_as_often_as_their_weights_say(weights: tuple[float, ...]) -> None:
    order = Order(joined([(50, weight) for weight in weights]), 1, "phase")
    for start in (0, 3 * BLOCK):  # in every block of places, not only in the long run
        counts = Counter(order.at(place)[1] // 50 for place in range(start, start + BLOCK))
        for which, weight in enumerate(weights):
            assert counts[which] == pytest.approx(BLOCK * weight / sum(weights), abs=1)


def test_seeds_phases_and_epochs_have_orders_of_their_own() -> None:
    def first(seed: int, phase: str, start: int = 0) -> list[int]:
        order = Order([(range(30), 1.0)], seed, phase)
        return [order.at(place)[1] for place in range(start, start + 30)]

    orders = [first(0, "a"), first(1, "a"), first(0, "b"), first(0, "a", 30)]
    assert all(sorted(order) == list(range(30)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
