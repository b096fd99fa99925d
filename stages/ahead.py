"""Work done ahead, in a thread of its own, while the caller is busy with something that leaves Python alone."""

from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")
_END: Any = object()


def ahead(items: Iterator[T], depth: int = 2) -> Generator[T]:
    """The same items in the same order, made in another thread, up to `depth` of them before they are asked for.

    What `items` raises comes out where its next item would have. Close the iterator (`contextlib.closing`) where it may be left early:
    then nothing more is made, and when `close` returns the thread has ended.
    """
    thread = ThreadPoolExecutor(1, thread_name_prefix="ahead")
    try:
        made = deque(thread.submit(next, items, _END) for _ in range(depth))
        while (item := made.popleft().result()) is not _END:
            made.append(thread.submit(next, items, _END))
            yield item
    finally:
        thread.shutdown(cancel_futures=True)
