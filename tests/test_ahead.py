"""ahead: the same items in the same order, made early but not too early, with errors where they belong, and a thread that ends."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from itertools import count, islice
from pathlib import Path

import pytest

from stages import stop
from stages.ahead import Workers, ahead
from stages.errors import DataError, MmgenError


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


# in processes


def alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def test_workers_give_the_items_in_order_each_from_a_process_of_its_own() -> None:
    found = list(Workers(lambda number: (number, os.getpid()), iter(range(50)), count=3, depth=2))
    assert [number for number, _ in found] == list(range(50))
    assert len({process for _, process in found} - {os.getpid()}) == 3


def test_an_error_of_a_worker_comes_where_its_item_would_have_and_as_it_was() -> None:
    def work(number: int) -> int:
        if number == 3:
            raise DataError("a.tar: cut", hint="fetch it again")
        if number == 4:
            raise UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad")
        return number

    workers = Workers(work, count(), count=2, depth=4)
    assert [next(workers) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(DataError, match=r"a\.tar: cut") as caught:
        next(workers)
    assert caught.value.hint == "fetch it again"


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_workers_leave_signals_to_their_parent(sent: signal.Signals) -> None:
    workers = Workers(lambda number: os.getpid(), count(), count=2, depth=1)
    processes = [next(workers), next(workers)]
    for process in processes:
        os.kill(process, sent)
    assert [next(workers) for _ in range(8)] == processes * 4


@pytest.mark.parametrize("state", ["waiting", "stopped", "busy"])
def test_workers_end_with_what_they_were_made_for_whatever_they_are_doing(state: str) -> None:
    def work(number: int) -> int:
        while state == "busy" and number > 1:
            pass
        return os.getpid()

    workers = Workers(work, count(), count=2, depth=1)
    processes = [next(workers), next(workers)]
    if state == "stopped":
        for process in processes:
            os.kill(process, signal.SIGSTOP)
    began = time.monotonic()
    del workers
    assert time.monotonic() - began < 2
    assert not any(map(alive, processes))


def test_a_stop_gets_through_while_a_worker_is_stopped() -> None:
    workers = Workers(lambda number: (os.getpid(), bytes(10_000_000)), count(), count=1, depth=1)
    os.kill(next(workers)[0], signal.SIGSTOP)
    with stop.listening(), stop.deferred(then_stop=False):
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
        with pytest.raises(stop.Asked):
            list(islice(workers, 10))  # what was made before comes out first


def test_a_worker_that_was_killed_is_an_error_and_no_hang() -> None:
    workers = Workers(lambda number: os.getpid(), count(), count=2, depth=1)
    os.kill(next(workers), signal.SIGKILL)
    with pytest.raises(MmgenError, match="was killed"):
        list(islice(workers, 100_000))  # what was made before comes out first


def test_workers_die_with_a_parent_that_was_killed() -> None:
    reading, writing = os.pipe()
    parent = os.fork()
    if parent == 0:
        workers = Workers(lambda number: os.getpid(), count(), count=2, depth=1)
        os.write(writing, f"{next(workers)} {next(workers)}".encode())
        time.sleep(60)
        os._exit(0)
    processes = [int(word) for word in os.read(reading, 100).split()]
    assert all(map(alive, processes))
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    deadline = time.monotonic() + 5
    while any(map(running, processes)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(map(running, processes))


def running(process: int) -> bool:
    """Alive, and no zombie: an orphan is buried by whoever adopts it."""
    status = Path(f"/proc/{process}/stat")
    return alive(process) and not (status.exists() and status.read_text().rpartition(")")[2].split()[0] == "Z")
