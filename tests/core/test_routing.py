"""Sessions keep their engine, and spread over the engines."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kapsl_scheduler.core.routing import rendezvous

keys = st.text(max_size=20)
engines = st.lists(st.integers(0, 1000), min_size=2, max_size=8, unique=True)


@pytest.mark.slow
@given(keys, engines, st.randoms())
def test_the_choice_depends_on_nothing_but_the_key_and_who_is_there(
    key: str, candidates: list[int], random: Any
) -> None:
    chosen = rendezvous(key, candidates)
    assert chosen in candidates
    random.shuffle(candidates)
    assert rendezvous(key, candidates) == chosen


@pytest.mark.slow
@given(keys, engines)
def test_when_another_engine_leaves_the_session_stays(key: str, candidates: list[int]) -> None:
    chosen = rendezvous(key, candidates)
    for leaving in candidates:
        if leaving != chosen:
            assert rendezvous(key, [engine for engine in candidates if engine != leaving]) == chosen


@pytest.mark.slow
@given(keys, engines, st.integers(1001, 2000))
def test_when_an_engine_joins_the_session_stays_or_goes_there(key: str, candidates: list[int], joining: int) -> None:
    assert rendezvous(key, [*candidates, joining]) in (rendezvous(key, candidates), joining)


def test_sessions_spread_evenly() -> None:
    counts = Counter(rendezvous(f"session {number}", range(4)) for number in range(4000))
    assert sorted(counts) == [0, 1, 2, 3]
    assert all(850 <= count <= 1150 for count in counts.values())


def test_the_choice_is_the_same_in_every_process() -> None:
    """Not the interpreter's own hash, which is salted."""
    assert [rendezvous(key, range(5)) for key in ("a", "b", "c", "")] == [4, 3, 2, 4]


def test_there_must_be_a_candidate() -> None:
    with pytest.raises(ValueError, match="empty"):
        rendezvous("a", [])
