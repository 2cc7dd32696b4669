"""A function of many pictures, computed by threads."""

from __future__ import annotations

import threading
import time

import pytest

from utils.data.threads import in_threads


def test_results_come_in_order_and_so_many_wait() -> None:
    begun: list[int] = []

    def square(number: int) -> int:
        begun.append(number)
        time.sleep(0.001 * (number % 3))
        return number * number

    results = in_threads(square, range(50), threads=4, waiting=8)
    assert next(results) == 0
    time.sleep(0.05)
    assert len(begun) == 8
    assert list(results) == [number * number for number in range(1, 50)]
    assert sorted(begun) == list(range(50))
    assert list(in_threads(square, [])) == []


def test_an_error_ends_it_without_the_rest() -> None:
    begun: list[int] = []

    def refuse(number: int) -> None:
        begun.append(number)
        raise ValueError(f"no {number}")

    threads = threading.active_count()
    with pytest.raises(ValueError, match="no 0"):
        list(in_threads(refuse, range(1000), threads=1, waiting=8))
    assert len(begun) <= 8 and threading.active_count() == threads
