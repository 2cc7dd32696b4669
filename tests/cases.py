"""The cases of a parametrized test of which only some run by default."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import pytest


def slow_but_for(quick: Collection[object], cases: Iterable[object]) -> list[object]:
    """Mark as slow all `cases` but the `quick` ones, which hold the same promise. Raises ValueError for others."""
    cases = list(cases)
    if unknown := [case for case in quick if case not in cases]:
        raise ValueError(f"{unknown} are no cases of this test")
    return [case if case in quick else pytest.param(case, marks=pytest.mark.slow) for case in cases]
