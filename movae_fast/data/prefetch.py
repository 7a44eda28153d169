"""Compute the items of an iterator in threads, before they are asked for."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from itertools import islice
from typing import TypeVar

T = TypeVar("T")
U = TypeVar("U")


def in_threads(work: Callable[[T], U], items: Iterable[T]) -> Iterator[U]:
    """Yield work(item) for each item, in order, computed by one thread per processor; at most 256 are computed
    ahead."""
    remaining = iter(items)
    with ThreadPoolExecutor(processors()) as pool:
        while chunk := list(islice(remaining, 256)):
            yield from pool.map(work, chunk)


def prefetched(items: Generator[T], depth: int = 1) -> Generator[T]:
    """Yield the items of a generator, while a thread computes the next `depth` of them."""

    def next_if_any() -> list[T]:
        return list(islice(items, 1))

    with closing(items), ThreadPoolExecutor(1) as thread:  # The thread ends before the generator is closed.
        pending: deque[Future[list[T]]] = deque(thread.submit(next_if_any) for _ in range(depth))
        while item := pending.popleft().result():
            pending.append(thread.submit(next_if_any))
            yield from item


def processors() -> int:
    """Return the number of threads to decode with: the processors divided by the number of local processes, at
    most 8."""
    return max(1, min(8, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
