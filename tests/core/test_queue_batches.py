"""What a batch holds: sizes, the delay, who rides along, cuts by time, background's slice, shares that are due."""

from __future__ import annotations

import math
from typing import Any

import pytest

from kapsl_scheduler.core.batch import BatchPolicy, State
from kapsl_scheduler.core.lanes import Slot
from kapsl_scheduler.core.queue import QueueOverflowPolicy, QueuePolicy, RequestQueue
from kapsl_scheduler.types import Priority
from tests.core.build import (
    BACKGROUND,
    LIVE,
    LONE,
    OTHER,
    SHAPE,
    THROUGHPUT,
    drained,
    measure,
    members,
    pending,
    push_all,
    queue_of,
    several,
    slot_of,
)

FLAT = {1: 0.001, 32: 0.001}
"""An engine whose time does not grow with its rows: 1 ms."""
STEEP = {1: 0.001, 32: 0.032}
"""An engine whose time grows with its rows: 1 ms a row."""


# ------------------------------------------------------------------------------------------------- size


def test_an_idle_engine_starts_at_once_with_what_is_there() -> None:
    queue = queue_of(item := pending(THROUGHPUT))
    batch = queue.pull(0.5, slot_of()).batch
    assert batch is not None
    assert (batch.members, batch.rows, batch.shape) == ([item], 1, SHAPE)
    assert (batch.leader, batch.started) == (THROUGHPUT, 0.5)
    assert (batch.rows_by_class, batch.backlog) == ((0, 1, 0), (False, False, False))


@pytest.mark.parametrize("priority", [LIVE, THROUGHPUT])
def test_every_class_batches_up_to_the_largest_size(priority: Priority) -> None:
    items = several(70, priority)
    batches = drained(queue_of(*items, max_batch_size=32), slot_of(times=FLAT))
    assert batches == [items[:32], items[32:64], items[64:]]


def test_a_batch_counts_rows_and_a_queue_requests() -> None:
    items = [pending(rows=rows) for rows in (3, 3, 2, 1)]
    queue = queue_of(*items, max_batch_size=8)
    assert (queue.queued, queue.rows) == (4, 9)
    assert queue.queued_by_class() == (4, 0, 0)
    assert drained(queue, slot_of()) == [items[:3], items[3:]]
    assert (queue.queued, queue.rows, queue.queued_bytes) == (0, 0, 0)


def test_nobody_overtakes_a_request_that_does_not_fit() -> None:
    items = [pending(rows=rows) for rows in (3, 2, 1)]
    assert drained(queue_of(*items, max_batch_size=4), slot_of()) == [items[:1], items[1:]]


def test_shapes_that_do_not_concatenate_take_turns_without_blocking_each_other() -> None:
    one, other, more = several(2), several(2, shape=OTHER), several(2)
    queue = queue_of(*one, *other, *more)
    assert drained(queue, slot_of()) == [[*one, *more], other]


def test_a_pull_from_nothing_says_to_look_again_when_told() -> None:
    queue = queue_of()
    pull = queue.pull(0, slot_of())
    assert (pull.batch, list(pull.expired), pull.wake_at) == (None, [], math.inf)
    assert not queue.has_work(slot_of())


# -------------------------------------------------------------------------------------- preferred sizes


@pytest.mark.parametrize(("waiting", "taken"), [(3, 3), (4, 4), (7, 4), (8, 8), (15, 8), (40, 8)])
def test_the_largest_preferred_size_that_the_waiting_rows_fill(waiting: int, taken: int) -> None:
    queue = queue_of(*several(waiting), max_batch_size=16, preferred_batch_sizes=(4, 8))
    assert len(members(queue.pull(0, slot_of()))) == taken


def test_preferred_sizes_count_rows_of_all_who_may_share_the_batch() -> None:
    """Two for this engine and two for any: together they fill a preferred size, and the fifth waits."""
    items = [pending(pin=0), pending(rows=2), pending(pin=0), pending()]
    queue = queue_of(*items, max_batch_size=16, preferred_batch_sizes=(4,))
    assert members(queue.pull(0, slot_of())) == items[:3]


def test_nobody_rides_in_a_batch_of_a_preferred_size_while_its_class_waits() -> None:
    queue = queue_of(*several(5), *several(5, THROUGHPUT), max_batch_size=16, preferred_batch_sizes=(4,))
    batch = queue.pull(0, slot_of(times=FLAT)).batch
    assert batch is not None
    assert batch.rows_by_class == (4, 0, 0)


# ------------------------------------------------------------------------------------------------- delay

DELAYED: dict[str, Any] = {"max_queue_delay": 0.010, "max_batch_size": 4}


def held(queue: RequestQueue, now: float) -> float | None:
    """Until when a queue holds everything back; None if a batch starts."""
    pull = queue.pull(now, slot_of(times=FLAT))
    return pull.wake_at if pull.batch is None else None


@pytest.mark.parametrize("priority", [THROUGHPUT, BACKGROUND])
def test_the_delay_counts_from_arrival_and_ends_on_time(priority: Priority) -> None:
    queue = queue_of(pending(priority, at=1.000), pending(priority, at=1.005), **DELAYED)
    assert held(queue, 1.005) == 1.010
    assert held(queue, 1.009) == 1.010
    assert len(members(queue.pull(1.010, slot_of(times=FLAT)))) == 2


def test_the_delay_never_holds_live_work() -> None:
    assert held(queue_of(pending(LIVE), **DELAYED), 0) is None


def test_a_full_batch_is_not_held() -> None:
    queue = queue_of(*several(3, THROUGHPUT), **DELAYED)
    assert held(queue, 0) == 0.010
    queue.push(pending(THROUGHPUT))
    assert held(queue, 0) is None


def test_a_full_batch_may_be_of_several_tenants() -> None:
    queue = queue_of(*(pending(THROUGHPUT, tenant=name) for name in "abcd"), **DELAYED)
    assert len(members(queue.pull(0, slot_of()))) == 4


def test_a_filled_preferred_size_is_not_held() -> None:
    queue = queue_of(pending(THROUGHPUT), **DELAYED, preferred_batch_sizes=(2, 4))
    assert held(queue, 0) == 0.010
    queue.push(pending(THROUGHPUT, at=0.001))
    assert len(members(queue.pull(0.001, slot_of()))) == 2


def test_the_delay_ends_when_more_urgent_work_arrives() -> None:
    """Even where that work is gone again when the slot comes: who waited has no reason to wait longer."""
    queue = queue_of(pending(BACKGROUND, shape=OTHER), pending(THROUGHPUT, at=0.001), **DELAYED)
    assert held(queue, 0.002) == 0.011  # for the background, throughput is more urgent, but waits itself
    live = pending(LIVE, at=0.003)
    queue.push(live)
    queue.remove(live)
    slot = slot_of(times=FLAT)
    assert members(queue.pull(0.003, slot))[0].priority is THROUGHPUT
    assert members(queue.pull(0.003, slot))[0].priority is BACKGROUND


def test_more_urgent_work_ends_no_delay_of_what_comes_after_it() -> None:
    queue = queue_of(pending(LIVE), pending(THROUGHPUT, at=0.001), **DELAYED)
    batch = queue.pull(0.001, slot_of()).batch  # unmeasured, so nobody rides along
    assert batch is not None
    assert batch.rows_by_class == (1, 0, 0)
    assert held(queue, 0.002) == 0.011


def test_work_of_the_same_class_ends_no_delay() -> None:
    queue = queue_of(pending(THROUGHPUT), pending(THROUGHPUT, at=0.001, timeout=0.005), **DELAYED)
    assert held(queue, 0.002) == 0.010


def test_what_is_held_rides_along_with_live_work() -> None:
    queue = queue_of(live := pending(LIVE), held_back := pending(THROUGHPUT, at=0.001), **DELAYED)
    assert members(queue.pull(0.001, slot_of(times=FLAT))) == [live, held_back]


def test_background_does_not_start_while_a_higher_class_is_held() -> None:
    queue = queue_of(pending(BACKGROUND, at=0.0), pending(THROUGHPUT, at=0.009), **DELAYED)
    assert held(queue, 0.018) == 0.019


def test_the_first_of_several_held_shapes_says_when_to_look_again() -> None:
    queue = queue_of(pending(THROUGHPUT, at=0.002), pending(THROUGHPUT, at=0.001, shape=OTHER), **DELAYED)
    assert held(queue, 0.003) == 0.011


def test_what_can_never_share_a_call_is_not_held() -> None:
    assert held(queue_of(pending(THROUGHPUT, shape=LONE), **DELAYED), 0) is None
    assert held(queue_of(pending(THROUGHPUT, stream="chunks"), **DELAYED), 0) is None


def test_nothing_is_held_while_somebody_waits_for_room() -> None:
    queue = queue_of(first := pending(THROUGHPUT), policy=QueuePolicy(max_size=1), **DELAYED)
    assert held(queue, 0) == 0.010
    queue.push(pending(THROUGHPUT))
    assert members(queue.pull(0, slot_of())) == [first]


def test_a_more_urgent_request_that_waited_for_room_turns_no_delay_back_on() -> None:
    """It arrived before the work whose delay another ended, and is let in only now."""
    queue = queue_of(*several(2, BACKGROUND), policy=QueuePolicy(max_size=2, max_bytes=9), **DELAYED)
    large, ended, urgent = pending(LIVE, at=0.001, nbytes=8), pending(THROUGHPUT, at=0.002), pending(LIVE, at=0.003)
    queue.push(large)
    queue.push(ended, QueueOverflowPolicy.DROP_OLDEST)
    queue.push(urgent, QueueOverflowPolicy.DROP_OLDEST)
    assert large.state is State.WAITING
    queue.remove(urgent)
    assert large.state is State.QUEUED
    queue.remove(large)
    assert members(queue.pull(0.004, slot_of())) == [ended]


# -------------------------------------------------------------------------------------- who rides along


def mixed(live: int, throughput: int, background: int = 0, **batch: Any) -> RequestQueue:
    items = [*several(background, BACKGROUND), *several(throughput, THROUGHPUT), *several(live)]
    return queue_of(*items, **batch)


def rows_by_class(queue: RequestQueue, slot: Slot, now: float = 0.0) -> tuple[int, ...]:
    batch = queue.pull(now, slot).batch
    assert batch is not None
    assert sum(batch.rows_by_class) == batch.rows == sum(item.rows for item in batch.members)
    return batch.rows_by_class


def test_rows_of_lower_classes_fill_a_batch_that_costs_no_more_for_them() -> None:
    assert rows_by_class(mixed(2, 40), slot_of(times=FLAT)) == (2, 30, 0)


def test_they_fill_it_in_class_order() -> None:
    assert rows_by_class(mixed(2, 10, 40), slot_of(times=FLAT)) == (2, 10, 20)
    assert rows_by_class(mixed(0, 10, 40), slot_of(times=FLAT)) == (0, 10, 22)


@pytest.mark.parametrize(("slack", "riders"), [(0.0, 0), (0.25, 1), (0.49, 1), (0.5, 2), (1.0, 4), (100.0, 28)])
def test_they_ride_only_while_the_time_stays_within_the_slack(slack: float, riders: int) -> None:
    """Four leaders take 4 ms; each row more takes 1 ms."""
    assert rows_by_class(mixed(4, 40, fill_slack=slack), slot_of(times=STEEP)) == (4, riders, 0)


def test_they_do_not_ride_on_an_unmeasured_engine() -> None:
    assert rows_by_class(mixed(4, 40, 40), slot_of()) == (4, 0, 0)


def test_they_do_not_make_a_leader_late() -> None:
    """The leaders have 5 ms; the slack would allow 8."""
    queue = queue_of(*several(40, THROUGHPUT), *several(3), pending(timeout=0.005), fill_slack=1.0)
    assert rows_by_class(queue, slot_of(times=STEEP)) == (4, 1, 0)


def test_nor_another_rider() -> None:
    """The throughput row that rides has 3 ms: background rows would make it late, though no leader."""
    queue = queue_of(*several(9, BACKGROUND), pending(THROUGHPUT, timeout=0.003), *several(2), fill_slack=4.0)
    assert rows_by_class(queue, slot_of(times=STEEP)) == (2, 1, 0)


def test_other_shapes_and_other_pins_do_not_ride() -> None:
    others = [pending(THROUGHPUT, shape=OTHER), pending(THROUGHPUT, pin=1), pending(THROUGHPUT, stream="chunks")]
    queue = queue_of(pending(), *others, rider := pending(THROUGHPUT, pin=0))
    assert members(queue.pull(0, slot_of(times=FLAT)))[1:] == [rider]


def test_a_higher_class_never_rides_with_a_lower() -> None:
    """The live request is pinned to another engine; the throughput batch leads here and only background joins."""
    queue = queue_of(pending(LIVE, pin=1), *several(2, THROUGHPUT), *several(2, BACKGROUND))
    assert rows_by_class(queue, slot_of(times=FLAT)) == (0, 2, 2)


def test_leaders_come_first_in_the_batch() -> None:
    rider, leader = pending(THROUGHPUT), pending(LIVE)
    assert members(queue_of(rider, leader).pull(0, slot_of(times=FLAT))) == [leader, rider]


def test_the_backlog_says_who_still_has_work() -> None:
    batch = mixed(2, 40, 1, max_batch_size=4).pull(0, slot_of(times=FLAT)).batch
    assert batch is not None
    assert batch.backlog == (False, True, True)


# ---------------------------------------------------------------------------------------- max_batch_time


def test_throughput_is_cut_at_the_longest_batch() -> None:
    queue = queue_of(*several(40, THROUGHPUT), max_batch_time=0.0105)
    assert len(members(queue.pull(0, slot_of(times=STEEP)))) == 10


def test_so_are_those_who_ride_with_it() -> None:
    queue = mixed(0, 9, 40, max_batch_time=0.0105, fill_slack=4.0)
    assert rows_by_class(queue, slot_of(times=STEEP)) == (0, 9, 1)


def test_live_batches_are_not_cut() -> None:
    queue = queue_of(*several(32), max_batch_time=0.0105)
    assert len(members(queue.pull(0, slot_of(times=STEEP)))) == 32


def test_one_request_alone_may_take_longer() -> None:
    queue = queue_of(pending(THROUGHPUT, rows=20), pending(THROUGHPUT), max_batch_time=0.0105, fill_slack=4.0)
    queue.push(pending(BACKGROUND))
    assert rows_by_class(queue, slot_of(times=STEEP)) == (0, 20, 0)


def test_an_unmeasured_engine_starts_with_one_request() -> None:
    assert rows_by_class(mixed(0, 9, 9, max_batch_time=0.0105), slot_of()) == (0, 1, 0)


def test_a_preferred_size_gives_way_to_the_longest_batch() -> None:
    queue = queue_of(*several(40, THROUGHPUT), max_batch_time=0.0105, preferred_batch_sizes=(8, 16))
    assert len(members(queue.pull(0, slot_of(times=STEEP)))) == 8


# ------------------------------------------------------------------------------------------ background


def test_background_batches_fit_the_slice() -> None:
    queue = queue_of(*several(40, BACKGROUND), background_slice=0.005)
    assert len(members(queue.pull(0, slot_of(times=STEEP)))) == 5
    assert queue.background_bound == 0.005


def test_but_have_never_fewer_rows_than_one_request_whose_time_is_the_bound_then() -> None:
    queue = queue_of(pending(BACKGROUND, rows=12), pending(BACKGROUND), background_slice=0.005)
    assert len(members(queue.pull(0, slot_of(times=STEEP)))) == 1
    assert queue.background_bound == pytest.approx(0.012)


def test_rows_that_add_nothing_to_the_time_of_one_request_come_with_it() -> None:
    queue = queue_of(*several(40, BACKGROUND), background_slice=0.005)
    slot = slot_of(times={1: 0.008, 16: 0.008, 32: 0.020})
    assert len(members(queue.pull(0, slot))) == 16
    assert queue.background_bound == pytest.approx(0.008)


def test_an_unmeasured_shape_starts_with_one_row() -> None:
    queue = queue_of(*several(40, BACKGROUND))
    slot = slot_of(times=FLAT, shape=OTHER)
    assert len(members(queue.pull(0, slot))) == 1
    assert queue.background_bound == BatchPolicy().background_slice
    measure(slot, {1: 0.001})
    assert len(members(queue.pull(0, slot))) == 5


def test_background_starts_only_when_no_higher_class_waits() -> None:
    queue = mixed(1, 1, 1, fill_slack=0.0)
    assert [rows_by_class(queue, slot_of(times=STEEP)) for _ in range(3)] == [(1, 0, 0), (0, 1, 0), (0, 0, 1)]


# ------------------------------------------------------------------------------------------------ shares


def owing(shares: float | dict[Priority, float], served: Priority, owed: Priority, **batch: Any) -> RequestQueue:
    """A queue whose engine has spent a second on one class while another had work, which is still there."""
    queue = queue_of(policy=QueuePolicy(shares=shares), **batch)
    slot = slot_of()
    waiting = pending(owed, shape=OTHER, name="in the way")
    push_all(queue, [pending(served), waiting])
    call = queue.pull(0, slot).batch
    assert call is not None
    assert call.backlog[owed]
    queue.finish(call, 1.0, 0.0)
    queue.remove(waiting)
    return queue


def test_a_class_whose_share_is_due_gets_rows_in_the_next_batch_of_its_shape() -> None:
    """Even where nobody may ride: 5 % of 32 rows is 2."""
    queue = owing(0.05, LIVE, THROUGHPUT, fill_slack=0.0)
    push_all(queue, [*several(40), *several(40, THROUGHPUT)])
    assert rows_by_class(queue, slot_of(times=STEEP)) == (30, 2, 0)


def test_so_does_background_from_throughput() -> None:
    queue = owing(0.10, THROUGHPUT, BACKGROUND, fill_slack=0.0)
    push_all(queue, [*several(40, THROUGHPUT), *several(40, BACKGROUND)])
    assert rows_by_class(queue, slot_of(times=STEEP)) == (0, 28, 4)


def test_a_share_is_at_least_one_request_and_at_most_what_is_there() -> None:
    queue = owing(0.05, LIVE, THROUGHPUT, fill_slack=0.0)
    push_all(queue, [*several(40), pending(THROUGHPUT, rows=5)])
    assert rows_by_class(queue, slot_of(times=STEEP)) == (27, 5, 0)
    queue = owing(0.25, LIVE, THROUGHPUT, fill_slack=0.0)
    push_all(queue, [*several(40), pending(THROUGHPUT)])
    assert rows_by_class(queue, slot_of(times=STEEP)) == (31, 1, 0)


def test_leaders_that_stood_back_for_a_share_stand_back_for_nobody_else() -> None:
    queue = owing({THROUGHPUT: 0.0, BACKGROUND: 0.05}, LIVE, BACKGROUND)
    push_all(queue, [*several(40), *several(40, THROUGHPUT), pending(BACKGROUND, rows=2), pending(BACKGROUND, rows=3)])
    assert rows_by_class(queue, slot_of(times=FLAT)) == (30, 0, 2)


def test_a_share_and_riders_keep_within_the_largest_batch() -> None:
    queue = owing({THROUGHPUT: 0.0, BACKGROUND: 0.05}, LIVE, BACKGROUND)
    push_all(queue, [*several(29), *several(40, THROUGHPUT), *several(40, BACKGROUND)])
    assert rows_by_class(queue, slot_of(times=FLAT)) == (29, 1, 2)


def test_a_share_and_throughput_keep_within_the_longest_batch() -> None:
    queue = owing(0.05, THROUGHPUT, BACKGROUND, max_batch_time=0.0105)
    push_all(queue, [*several(40, THROUGHPUT), *several(40, BACKGROUND)])
    assert rows_by_class(queue, slot_of(times=STEEP)) == (0, 8, 2)


def test_leaders_are_judged_by_a_batch_with_the_share_in_it() -> None:
    """Two leaders in 3 ms, if they went alone; with the two rows of the share it takes 4."""
    queue = owing(0.05, LIVE, THROUGHPUT)
    late = several(2, timeout=0.003)
    push_all(queue, [*late, *several(40, THROUGHPUT)])
    pull = queue.pull(0, slot_of(times=STEEP))
    assert pull.expired == late[:1]  # the other leads two rows of the share: 3 ms
    assert [item.priority for item in members(pull)] == [LIVE, THROUGHPUT, THROUGHPUT]


def test_of_another_shape_it_gets_one_call_of_at_most_a_slice() -> None:
    queue = owing(0.05, LIVE, THROUGHPUT, background_slice=0.005, fill_slack=4.0)
    push_all(queue, [*several(9), *several(40, THROUGHPUT, shape=OTHER), *several(40, BACKGROUND, shape=OTHER)])
    slot = slot_of(times=STEEP)
    measure(slot, STEEP, shape=OTHER)
    assert rows_by_class(queue, slot) == (0, 5, 0)


def test_that_call_is_no_longer_than_a_batch_of_its_class_may_be() -> None:
    queue = owing(0.05, LIVE, THROUGHPUT, background_slice=0.005, max_batch_time=0.003)
    push_all(queue, [*several(9), *several(40, THROUGHPUT, shape=OTHER)])
    assert rows_by_class(queue, slot_of(times=STEEP, shape=OTHER)) == (0, 3, 0)


def test_one_too_large_to_join_gets_a_call_of_its_own() -> None:
    queue = owing(0.05, LIVE, THROUGHPUT, max_batch_size=8)
    push_all(queue, [pending(rows=6), pending(THROUGHPUT, rows=3)])
    assert rows_by_class(queue, slot_of(times=STEEP)) == (0, 3, 0)


def test_what_never_shares_a_call_gets_one_of_its_own() -> None:
    queue = owing(0.05, LIVE, THROUGHPUT)
    push_all(queue, [pending(), pending(THROUGHPUT, stream="chunks"), pending(THROUGHPUT, shape=LONE)])
    assert [rows_by_class(queue, slot_of()) for _ in range(3)] == [(0, 1, 0), (0, 1, 0), (1, 0, 0)]


def test_where_all_that_is_owed_is_too_late_the_higher_class_leads_after_all() -> None:
    queue = owing(0.05, LIVE, THROUGHPUT)
    late = several(2, THROUGHPUT, shape=OTHER, timeout=0.1)
    push_all(queue, [*late, live := pending()])
    pull = queue.pull(0.5, slot_of())
    assert pull.expired == late
    assert members(pull) == [live]


def test_a_share_of_nothing_waits() -> None:
    queue = owing(0.0, LIVE, THROUGHPUT, fill_slack=0.0)
    push_all(queue, [*several(40), *several(40, THROUGHPUT)])
    assert rows_by_class(queue, slot_of(times=STEEP)) == (32, 0, 0)


def test_a_share_that_was_had_is_not_due() -> None:
    queue = owing(0.05, LIVE, THROUGHPUT, fill_slack=0.0)
    push_all(queue, several(40, THROUGHPUT))
    batch = queue.pull(0, slot_of()).batch
    assert batch is not None
    queue.finish(batch, 1.0, 1.0)
    push_all(queue, several(40))
    assert rows_by_class(queue, slot_of(times=STEEP)) == (32, 0, 0)


def test_rows_that_ride_along_count_as_served() -> None:
    queue = mixed(1, 40, max_batch_size=4)
    batch = queue.pull(0, slot_of(times=FLAT)).batch
    assert batch is not None
    assert batch.rows_by_class == (1, 3, 0)
    queue.finish(batch, 1.0, 1.0)
    push_all(queue, several(40))
    assert rows_by_class(queue, slot_of(times=STEEP)) == (4, 0, 0)


def test_share_that_only_pinned_work_is_owed_leaves_another_engine_alone() -> None:
    queue = owing(0.05, LIVE, THROUGHPUT)
    push_all(queue, [live := pending(), pending(THROUGHPUT, pin=1, shape=OTHER)])
    assert members(queue.pull(0, slot_of(0))) == [live]
