"""A full queue: who is refused, who is evicted, who waits for room, and who gets in when there is some."""

from __future__ import annotations

from typing import Any

import pytest

from kapsl_scheduler.core.batch import Pending, State
from kapsl_scheduler.core.queue import QueueOverflowPolicy, QueuePolicy, RequestQueue
from kapsl_scheduler.errors import Overloaded, ResourceExhausted
from kapsl_scheduler.types import Priority
from tests.core.build import (
    BACKGROUND,
    LIVE,
    LONE,
    OTHER,
    THROUGHPUT,
    drained,
    finish,
    members,
    pending,
    push_all,
    queue_of,
    several,
    slot_of,
)

BLOCK, DROP_NEWEST, DROP_OLDEST = (
    QueueOverflowPolicy.BLOCK,
    QueueOverflowPolicy.DROP_NEWEST,
    QueueOverflowPolicy.DROP_OLDEST,
)


def bounded(*items: Pending, size: int = 3, batch: dict[str, Any] | None = None, **policy: Any) -> RequestQueue:
    return queue_of(*items, policy=QueuePolicy(max_size=size, **policy), **(batch or {}))


def refused(queue: RequestQueue, item: Pending, **how: Any) -> Overloaded:
    before = queue.queued_by_class(), queue.waiting
    with pytest.raises(Overloaded) as caught:
        queue.push(item, **how)
    assert (queue.queued_by_class(), queue.waiting) == before
    queue.validate()
    return caught.value


# ------------------------------------------------------------------------------------------------ bounds


@pytest.mark.parametrize("overflow", QueueOverflowPolicy)
def test_the_bound_acts_exactly_at_its_number(overflow: QueueOverflowPolicy) -> None:
    queue = bounded(size=10_000, overflow=overflow)
    for item in several(10_000):
        assert queue.push(item) == ()
        assert item.state is State.QUEUED
    assert queue.queued == 10_000
    one_more = pending()
    if overflow is DROP_NEWEST:
        refused(queue, one_more)
    else:
        queue.push(one_more)
    assert queue.queued == 10_000


def test_what_runs_takes_no_room() -> None:
    queue = bounded(*several(3), batch={"max_batch_size": 3})
    batch = queue.pull(0, slot_of()).batch
    assert queue.queued == 0
    push_all(queue, several(3))
    assert queue.queued == 3
    finish(queue, batch, 0.001, 0)
    assert queue.queued == 3


def test_bytes_are_bounded_too() -> None:
    queue = bounded(pending(nbytes=6), size=10, max_bytes=10)
    queue.push(fits := pending(nbytes=4))
    queue.push(too_much := pending(nbytes=1))
    assert (fits.state, too_much.state) == (State.QUEUED, State.WAITING)
    assert queue.queued_bytes == 10


@pytest.mark.parametrize("overflow", QueueOverflowPolicy)
@pytest.mark.parametrize("others", [0, 2])
def test_what_is_larger_than_the_bound_is_refused_for_good(overflow: QueueOverflowPolicy, others: int) -> None:
    """Also behind others who wait: it would be the head of the line for ever."""
    queue = bounded(*several(others, nbytes=8), size=10, max_bytes=10, overflow=BLOCK)
    with pytest.raises(ResourceExhausted, match="11 bytes exceed the queue's max_bytes of 10"):
        queue.push(pending(nbytes=11), overflow)
    assert queue.queued + queue.waiting == others


# ------------------------------------------------------------------------------------------ drop newest


def test_drop_newest_refuses_the_arrival_where_nobody_is_below_it() -> None:
    queue = bounded(*several(3, LIVE), overflow=DROP_NEWEST)
    for priority in Priority:
        refused(queue, pending(priority))
    queue = bounded(*several(3, BACKGROUND), overflow=DROP_NEWEST)
    refused(queue, pending(BACKGROUND))


def test_drop_newest_evicts_the_newest_of_the_lowest_class_below() -> None:
    old, new = several(2, BACKGROUND)
    throughput = pending(THROUGHPUT)
    queue = bounded(old, new, throughput, overflow=DROP_NEWEST)
    evicted = [queue.push(item) for item in several(3, LIVE)]
    assert evicted == [[new], [old], [throughput]]
    assert {item.state for item in (old, new, throughput)} == {State.DONE}
    assert queue.queued_by_class() == (3, 0, 0)
    queue.validate()


def test_drop_newest_never_evicts_its_own_class() -> None:
    queue = bounded(*several(2, THROUGHPUT), low := pending(BACKGROUND), overflow=DROP_NEWEST)
    assert queue.push(pending(THROUGHPUT)) == [low]
    refused(queue, pending(THROUGHPUT))


# ------------------------------------------------------------------------------------------ drop oldest


def test_drop_oldest_evicts_the_oldest_of_the_lowest_class_not_above() -> None:
    live = pending(LIVE)
    old, new = several(2, THROUGHPUT)
    queue = bounded(live, old, new, overflow=DROP_OLDEST)
    assert queue.push(pending(THROUGHPUT)) == [old]
    assert queue.push(pending(LIVE)) == [new]
    queue.validate()


def test_drop_oldest_takes_the_lowest_class_first_whatever_its_age() -> None:
    queue = bounded(pending(LIVE), pending(THROUGHPUT), young := pending(BACKGROUND), overflow=DROP_OLDEST)
    assert queue.push(pending(LIVE)) == [young]


def test_drop_oldest_refuses_the_arrival_where_all_are_above_it() -> None:
    queue = bounded(*several(3, LIVE), overflow=DROP_OLDEST)
    refused(queue, pending(THROUGHPUT))


def test_what_left_by_other_ways_is_no_victim() -> None:
    items = several(4, BACKGROUND)
    queue = bounded(*items, size=4, overflow=DROP_OLDEST, batch={"max_batch_size": 1})
    assert members(queue.pull(0, slot_of())) == items[:1]
    queue.remove(items[3])
    push_all(queue, fresh := several(2, BACKGROUND))
    assert queue.push(pending(BACKGROUND)) == [items[1]]
    assert queue.push(pending(LIVE), DROP_NEWEST)[0].arrival == 0.0
    assert fresh[0].state is State.QUEUED


# ------------------------------------------------------------------------------------------------- bytes


def test_as_many_are_evicted_as_the_bytes_need() -> None:
    items = [pending(BACKGROUND, nbytes=3), pending(BACKGROUND, nbytes=3), pending(THROUGHPUT, nbytes=4)]
    queue = bounded(*items, size=9, max_bytes=10)
    assert queue.push(pending(LIVE, nbytes=7), DROP_NEWEST) == [items[1], items[0], items[2]]
    queue.validate()


def test_nobody_is_evicted_in_vain() -> None:
    items = [pending(LIVE, nbytes=5), pending(BACKGROUND, nbytes=5)]
    queue = bounded(*items, size=9, max_bytes=10)
    refused(queue, pending(THROUGHPUT, nbytes=6), overflow=DROP_NEWEST)
    refused(queue, pending(THROUGHPUT, nbytes=6), overflow=DROP_OLDEST)
    assert items[1].state is State.QUEUED


def test_room_that_eviction_leaves_over_goes_to_those_who_wait() -> None:
    queue = bounded(pending(BACKGROUND, nbytes=9), size=9, max_bytes=10)
    waiting = pending(THROUGHPUT, nbytes=5)
    queue.push(waiting)
    queue.push(pending(LIVE, nbytes=2), DROP_OLDEST)
    assert waiting.state is State.QUEUED
    queue.validate()


# ------------------------------------------------------------------------------------------------- block


def test_block_evicts_nobody_and_waits_in_class_then_arrival_order() -> None:
    queue = bounded(*(low := several(3, BACKGROUND)))
    waiting = [pending(priority) for priority in (BACKGROUND, THROUGHPUT, LIVE, THROUGHPUT, LIVE)]
    for item in waiting:
        assert queue.push(item) == ()
        assert item.state is State.WAITING
    assert (queue.queued, queue.waiting, queue.rows) == (3, 5, 3)
    order = [waiting[2], waiting[4], waiting[1], waiting[3], waiting[0]]
    for count, leaving in enumerate([*low, *order[:2]], 1):
        queue.remove(leaving)
        assert [item for item in order if item.state is State.WAITING] == order[count:]
    assert queue.waiting == 0


def test_the_pull_lets_as_many_in_as_it_took_out() -> None:
    queue = bounded(*several(3), batch={"max_batch_size": 2})
    push_all(queue, waiting := several(3))
    queue.pull(0, slot_of())
    assert [item.state for item in waiting] == [State.QUEUED, State.QUEUED, State.WAITING]
    assert (queue.queued, queue.waiting) == (3, 1)


def test_no_newcomer_takes_room_that_somebody_waits_for() -> None:
    """There is room for its byte, but not for the eight of who came before."""
    queue = bounded(pending(nbytes=5), size=9, max_bytes=10)
    waiting, newcomer = pending(THROUGHPUT, nbytes=8), pending(THROUGHPUT, nbytes=1)
    push_all(queue, [waiting, newcomer])
    assert newcomer.state is State.WAITING
    refused(queue, pending(BACKGROUND, nbytes=1), overflow=DROP_OLDEST)
    refused(queue, pending(THROUGHPUT, nbytes=1), may_wait=False)
    queue.push(urgent := pending(LIVE, nbytes=1))  # stands before them in any case
    assert urgent.state is State.QUEUED


def test_those_who_wait_do_not_overtake_each_other() -> None:
    queue = bounded(first := pending(nbytes=3), pending(nbytes=5), size=9, max_bytes=10)
    large, small = pending(nbytes=6), pending(nbytes=1)
    push_all(queue, [large, small])
    queue.remove(first)
    assert (large.state, small.state) == (State.WAITING, State.WAITING)
    queue.remove(large)
    assert small.state is State.QUEUED
    assert queue.waiting == 0


def test_who_gives_up_waiting_is_gone() -> None:
    queue = bounded(*(inside := several(3)))
    push_all(queue, waiting := several(2))
    assert queue.remove(waiting[0])
    assert waiting[0].state is State.DONE
    queue.remove(inside[0])
    assert waiting[1].state is State.QUEUED


def test_the_line_is_bounded() -> None:
    queue = bounded(*several(3), max_waiting=2)
    push_all(queue, several(2, BACKGROUND))
    refused(queue, pending(LIVE))
    queue = bounded(*several(3), max_waiting=0)
    refused(queue, pending(LIVE))


def test_a_call_that_may_not_wait_never_evicts_either() -> None:
    queue = bounded(*several(3, BACKGROUND), overflow=DROP_OLDEST)
    refused(queue, pending(LIVE), overflow=BLOCK, may_wait=False)


def test_a_call_may_override_the_policy() -> None:
    queue = bounded(*several(3, BACKGROUND), overflow=DROP_NEWEST)
    queue.push(waits := pending(BACKGROUND), BLOCK)
    assert waits.state is State.WAITING
    assert queue.push(pending(BACKGROUND), DROP_OLDEST) != ()
    queue = bounded(*several(3, BACKGROUND))
    refused(queue, pending(BACKGROUND), overflow=DROP_NEWEST)


def test_a_lost_engine_frees_those_who_wait_for_it_too() -> None:
    queue = bounded(*several(3, pin=0))
    queue.push(waiting := pending(pin=0))
    queue.unpin(0)
    assert waiting.pin is None


# ----------------------------------------------------------------------- straight through a full queue


def test_a_live_request_that_waits_for_room_is_in_the_very_next_batch() -> None:
    queue = bounded(*several(3, BACKGROUND, shape=OTHER))
    queue.push(live := pending(LIVE))
    assert live.state is State.WAITING
    assert members(queue.pull(0, slot_of())) == [live]
    assert (queue.queued, queue.waiting) == (3, 0)
    queue.validate()


def test_as_many_as_its_batch_holds_and_the_bound_holds_again() -> None:
    queue = bounded(*several(3, BACKGROUND), batch={"max_batch_size": 4})
    push_all(queue, live := [pending(rows=rows, timeout=9 - n) for n, rows in enumerate((2, 1, 2, 1))])
    slot = slot_of(times={1: 0.001, 2: 0.002, 3: 0.003, 4: 0.004})
    assert members(queue.pull(0, slot)) == [live[1], live[0]]
    queue.validate()
    assert (queue.queued, queue.waiting) == (3, 2)


def test_only_with_others_of_its_kind_and_for_this_slot() -> None:
    for stranger in (pending(shape=OTHER), pending(pin=1), pending(stream="chunks"), pending(THROUGHPUT)):
        queue = bounded(*several(3, BACKGROUND))
        push_all(queue, [live := pending(), stranger])
        assert members(queue.pull(0, slot_of())) == [live]
        assert stranger.state is State.WAITING


@pytest.mark.parametrize("alone", [{"stream": "chunks"}, {"shape": LONE}])
def test_one_at_a_time_where_calls_are_not_shared(alone: dict[str, Any]) -> None:
    queue = bounded(*several(3, BACKGROUND))
    push_all(queue, live := several(2, **alone))
    assert members(queue.pull(0, slot_of())) == live[:1]
    assert live[1].state is State.WAITING
    queue.validate()


def test_one_at_a_time_with_preferred_sizes() -> None:
    queue = bounded(*several(3, BACKGROUND), batch={"preferred_batch_sizes": (2,)})
    push_all(queue, live := several(2))
    assert members(queue.pull(0, slot_of())) == live[:1]


def test_throughput_goes_before_background_the_same_way_delayed_or_not() -> None:
    """The delay holds nobody while requests wait for room; else the bound would be broken meanwhile."""
    queue = bounded(*several(3, BACKGROUND), batch={"max_queue_delay": 1.0})
    queue.push(item := pending(THROUGHPUT))
    assert members(queue.pull(0, slot_of())) == [item]
    queue.validate()


def test_not_past_its_own_class_or_a_higher_one() -> None:
    for priority in (LIVE, THROUGHPUT):
        queue = bounded(inside := pending(priority, shape=OTHER), *several(2, BACKGROUND))
        queue.push(waiting := pending(THROUGHPUT))
        assert members(queue.pull(0, slot_of())) == [inside]
        assert waiting.state is State.QUEUED


def test_not_past_what_came_back_from_a_failed_batch() -> None:
    queue = bounded(*several(3, BACKGROUND))
    queue.give_back([returned := pending(LIVE)])
    queue.push(waiting := pending(LIVE))
    assert members(queue.pull(0, slot_of())) == [returned]
    assert waiting.state is State.WAITING
    assert members(queue.pull(0, slot_of())) == [waiting]


def test_not_past_a_share_that_is_due() -> None:
    """What is owed gets its call, of one request; so no more may come in than that makes room for."""
    queue = bounded(pending(LIVE), pending(BACKGROUND, shape=OTHER))
    finish(queue, queue.pull(0, slot_of()).batch, 1.0, 0)
    push_all(queue, [*several(2, BACKGROUND, shape=OTHER), *(waiting := several(3, LIVE))])
    assert [item.priority for item in members(queue.pull(0, slot_of()))] == [BACKGROUND]
    assert [item.state for item in waiting] == [State.QUEUED, State.WAITING, State.WAITING]
    queue.validate()


def test_not_where_this_slot_may_not_run_it() -> None:
    queue = bounded(*several(3, BACKGROUND))
    queue.push(waiting := pending(pin=1))
    assert members(queue.pull(0, slot_of(0)))[0].priority is BACKGROUND
    assert waiting.state is State.QUEUED


def test_those_who_go_straight_through_may_be_too_late_as_well() -> None:
    queue = bounded(*(low := several(3, BACKGROUND)))
    late, fine, later = pending(timeout=0.1), pending(), pending(timeout=0.2)
    push_all(queue, [late, fine, later])
    pull = queue.pull(0.5, slot_of())
    assert pull.expired == [late, later]
    assert members(pull) == [fine]
    assert [item.state for item in low] == [State.QUEUED] * 3
    queue.validate()


def test_waiting_work_is_rows_of_nobody() -> None:
    queue = bounded(*several(3))
    push_all(queue, several(3))
    assert queue.rows == 3
    assert queue.queued_by_class() == (3, 0, 0)
    assert sum(map(len, drained(queue, slot_of()))) == 6


# ------------------------------------------------------------------------------------------ retry_after


def test_refused_and_evicted_hear_how_long_the_queue_takes_to_drain() -> None:
    queue = bounded(pending(rows=4), size=3, overflow=DROP_NEWEST)
    assert queue.drain_time() == 0
    finish(queue, queue.pull(0, slot_of()).batch, 0.008, 0)  # 2 ms a row
    push_all(queue, [pending(rows=5), pending(rows=6), pending(rows=7)])
    error = refused(queue, pending())
    assert error.retry_after == pytest.approx(0.036)
    assert "3 queued (max_size 3), 0 waiting for room" in str(error)
    assert queue.evicted().retry_after == pytest.approx(0.036)


def test_more_slots_drain_a_queue_faster() -> None:
    queue = queue_of(pending(rows=4), slots=2)
    finish(queue, queue.pull(0, slot_of()).batch, 0.008, 0)
    queue.push(pending(rows=6))
    assert queue.drain_time() == pytest.approx(0.006)


def test_the_time_per_row_follows_the_calls_smoothly() -> None:
    queue = queue_of(pending())
    finish(queue, queue.pull(0, slot_of()).batch, 0.010, 0)
    queue.push(pending())
    finish(queue, queue.pull(0, slot_of()).batch, 0.020, 0)
    queue.push(pending())
    assert queue.drain_time() == pytest.approx(0.012)


# -------------------------------------------------------------------------------------------- policies


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_size": 0}, "max_size: expected at least 1, got 0"),
        ({"max_bytes": 0}, "max_bytes: expected at least 1 or None, got 0"),
        ({"max_waiting": -1}, "max_waiting: expected at least 0, got -1"),
        ({"block_timeout": -0.1}, "block_timeout: expected at least 0 seconds or None, got -0.1"),
        ({"block_timeout": float("nan")}, "block_timeout: expected at least 0 seconds or None, got nan"),
        ({"overflow": "drop"}, "'drop' is not a valid QueueOverflowPolicy"),
        ({"shares": -0.1}, "shares: expected fractions"),
        ({"shares": 0.5}, "shares: expected fractions"),
        ({"shares": 1.0}, "shares: expected fractions"),
        ({"shares": {THROUGHPUT: 0.96}}, "shares: expected fractions"),
    ],
)
def test_a_policy_says_what_is_wrong_with_it(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QueuePolicy(**fields)


def test_shares_are_given_for_both_classes_or_one_by_one() -> None:
    assert QueuePolicy().share_by_class() == {THROUGHPUT: 0.05, BACKGROUND: 0.05}
    assert QueuePolicy(shares=0.2).share_by_class() == {THROUGHPUT: 0.2, BACKGROUND: 0.2}
    assert QueuePolicy(shares={BACKGROUND: 0.0}).share_by_class() == {THROUGHPUT: 0.05, BACKGROUND: 0.0}
    assert QueuePolicy(shares={THROUGHPUT: 0.9}).share_by_class() == {THROUGHPUT: 0.9, BACKGROUND: 0.05}


def test_what_a_full_queue_does_may_be_given_by_its_name() -> None:
    assert QueuePolicy(overflow="drop_oldest").overflow is DROP_OLDEST  # type: ignore[arg-type]
    assert QueuePolicy().overflow is BLOCK


# ------------------------------------------------------------------------------------------------- figures


def test_work_of_the_lowest_class_alone_is_told_apart() -> None:
    queue = bounded(size=2)
    assert not queue.is_background_only()
    push_all(queue, low := several(2, BACKGROUND))
    assert queue.is_background_only()
    queue.push(waiting := pending(LIVE))
    assert not queue.is_background_only()
    queue.remove(waiting)
    queue.remove(low[0])
    queue.give_back([returned := pending(LIVE)])
    assert not queue.is_background_only()
    queue.remove(returned)
    assert queue.is_background_only()
    queue.push(pending(THROUGHPUT))
    assert not queue.is_background_only()


def test_the_self_check_finds_what_does_not_add_up() -> None:
    for figure, wrong in (("queued", 7), ("queued_bytes", 7)):
        queue = bounded(*several(2), max_bytes=100)
        setattr(queue._backlog, figure, wrong)
        with pytest.raises(AssertionError):
            queue.validate()
