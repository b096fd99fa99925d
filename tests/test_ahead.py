"""ahead: the same items in the same order, made early but not too early, with errors where they belong, and a thread that ends."""

import threading
from collections.abc import Iterator
from contextlib import closing

import pytest

from stages.ahead import ahead


def test_items_come_in_order_from_another_thread() -> None:
    found = list(ahead((number, threading.get_ident()) for number in range(50)))
    assert [number for number, _ in found] == list(range(50))
    assert threading.get_ident() not in {thread for _, thread in found}
    assert list(ahead(iter(()))) == []


def test_no_more_than_depth_items_are_made_before_they_are_asked_for() -> None:
    made, enough = [], threading.Semaphore(0)

    def items() -> Iterator[int]:
        for number in range(100):
            made.append(number)
            enough.release()
            yield number

    with closing(ahead(items(), depth=3)) as numbers:
        assert next(numbers) == 0
        for _ in range(4):  # the one that was taken and three more are made without anybody asking
            assert enough.acquire(timeout=10)
        assert not enough.acquire(timeout=0.05)
    assert made == [0, 1, 2, 3]


def test_an_error_comes_where_its_item_would_have() -> None:
    def items() -> Iterator[int]:
        yield 1
        yield 2
        raise ValueError("the third")

    numbers = ahead(items(), depth=8)
    assert [next(numbers), next(numbers)] == [1, 2]
    with pytest.raises(ValueError, match="the third"):
        next(numbers)


def test_the_thread_ends_when_the_iterator_is_left() -> None:
    with closing(ahead(iter(range(10**6)))) as numbers:
        next(numbers)
        assert any(thread.name.startswith("ahead") for thread in threading.enumerate())
    assert not any(thread.name.startswith("ahead") for thread in threading.enumerate())
