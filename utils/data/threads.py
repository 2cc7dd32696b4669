"""A function of many pictures, computed by threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item, Result = TypeVar("Item"), TypeVar("Result")
WAITING = 4096  # items that threads are given at once: one alone takes a kilobyte until its result is taken


def in_threads(
    function: Callable[[Item], Result], items: Sequence[Item], *, threads: int | None = None, waiting: int = WAITING
) -> Iterator[Result]:
    """Yield function(item) of each item, in their order.

    threads: None: as many as `ThreadPoolExecutor` takes. waiting: so many results may wait to be taken.
    """
    pool = ThreadPoolExecutor(threads)
    try:
        for start in range(0, len(items), waiting):
            yield from pool.map(function, items[start : start + waiting])
    finally:
        pool.shutdown(cancel_futures=True)  # so that an interruption does not wait for the rest
