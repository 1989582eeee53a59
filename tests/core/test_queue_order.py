"""Who goes first: class, then deadline, then arrival; who is too late; who comes back; who may run where."""

from __future__ import annotations

import itertools
import math

import pytest

from kapsl_scheduler.core.batch import BatchPolicy, Pending, State
from kapsl_scheduler.core.queue import DEFAULT_HORIZON, QueueOverflowPolicy, QueuePolicy, RequestQueue
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
    names,
    pending,
    push_all,
    queue_of,
    several,
    slot_of,
)

# ------------------------------------------------------------------------------------------------- class


@pytest.mark.parametrize("arrivals", list(itertools.permutations(Priority)))
def test_a_higher_class_goes_first_in_whatever_order_they_arrive(arrivals: tuple[Priority, ...]) -> None:
    queue = queue_of(*(pending(priority, at=at) for at, priority in enumerate(arrivals)))
    assert [batch[0].priority for batch in drained(queue, slot_of(), now=3)] == [LIVE, THROUGHPUT, BACKGROUND]


def test_a_deadline_does_not_lift_a_request_above_its_class() -> None:
    live, urgent = pending(LIVE), pending(THROUGHPUT, timeout=0.001)
    assert drained(queue_of(urgent, live), slot_of()) == [[live], [urgent]]


# ---------------------------------------------------------------------------------- deadline, then arrival


def test_earlier_deadlines_go_first() -> None:
    late, soon, soonest = (pending(timeout=seconds) for seconds in (0.9, 0.5, 0.1))
    assert drained(queue_of(late, soon, soonest), slot_of()) == [[soonest, soon, late]]


def test_no_deadline_counts_as_the_default_horizon() -> None:
    before = pending(timeout=DEFAULT_HORIZON - 0.1)
    none = pending()
    after = pending(timeout=DEFAULT_HORIZON + 0.1)
    assert drained(queue_of(after, none, before), slot_of()) == [[before, none, after]]


def test_equal_deadlines_go_in_order_of_arrival() -> None:
    items = several(6, timeout=0.5)
    assert drained(queue_of(*items), slot_of()) == [items]


def test_a_request_that_waited_for_room_keeps_its_place_among_equals() -> None:
    """It arrived before the one that was let in first, and both want to be done at the same moment."""
    queue = queue_of(*(low := several(2, BACKGROUND)), policy=QueuePolicy(max_size=2))
    queue.push(waited := pending())
    queue.push(evicting := pending(), QueueOverflowPolicy.DROP_OLDEST)
    queue.remove(low[1])
    assert [waited.state, evicting.state] == [State.QUEUED, State.QUEUED]
    assert drained(queue, slot_of()) == [[waited, evicting]]


def test_order_holds_across_shapes() -> None:
    """The most urgent leads; who shares its shape joins it, and the rest keep their order."""
    first = pending(timeout=0.1, shape=OTHER)
    second = pending(timeout=0.2)
    third = pending(timeout=0.3, shape=OTHER)
    assert drained(queue_of(second, third, first), slot_of()) == [[first, third], [second]]


def test_many_kinds_of_requests_leave_no_trace() -> None:
    """Every tenant and pin has a lane of its own while it has work; the order is that of one list all the same."""
    queue = queue_of(max_batch_size=1)
    engine = slot_of()
    for round_ in range(3):
        items = [pending(tenant=str(n), timeout=1 + n, at=round_) for n in range(60)]
        push_all(queue, reversed(items))
        assert [batch[0] for batch in drained(queue, engine, now=round_)] == items
    queue.validate()


# ------------------------------------------------------------------------------------------- cancellation


def test_a_cancelled_request_is_gone_at_once_and_never_runs() -> None:
    items = several(5)
    queue = queue_of(*items, policy=QueuePolicy(max_bytes=9))
    assert queue.remove(items[0])
    assert queue.remove(items[2])
    assert (queue.queued, queue.rows, queue.queued_bytes) == (3, 3, 3)
    assert not queue.remove(items[2])
    assert drained(queue, slot_of()) == [[items[1], items[3], items[4]]]


def test_what_runs_or_is_done_cannot_be_taken_out() -> None:
    queue = queue_of(item := pending())
    queue.pull(0, slot_of())
    assert not queue.remove(item)
    item.state = State.DONE
    assert not queue.remove(item)
    assert not queue.remove(pending())


def test_cancelling_nearly_everything_leaves_the_rest_in_order() -> None:
    """Cancelled requests are swept out of the containers when they outnumber the living."""
    items = [pending(timeout=1 + (n * 7919) % 1000, name=n) for n in range(1000)]
    queue = queue_of(*items, policy=QueuePolicy(max_size=2000), max_batch_size=32)
    kept = [item for item in items if item.future % 100 == 0]
    for item in items:
        if item not in kept:
            assert queue.remove(item)
    queue.validate()
    assert drained(queue, slot_of()) == [sorted(kept, key=lambda item: item.deadline)]


def test_clear_takes_everything_out_and_says_who_only_waited() -> None:
    queue = queue_of(policy=QueuePolicy(max_size=2), max_batch_size=1)
    background, live, waiting, waiting_live = (
        pending(BACKGROUND),
        pending(LIVE),
        pending(BACKGROUND),
        pending(LIVE),
    )
    push_all(queue, [background, live, waiting, waiting_live])
    came_back = pending(THROUGHPUT)
    queue.give_back([came_back])
    assert queue.clear() == ([waiting_live, waiting], [live, came_back, background])
    assert (queue.queued, queue.waiting, queue.rows, queue.queued_bytes) == (0, 0, 0, 0)
    assert not queue.has_work(slot_of())
    assert queue.pull(0, slot_of()).batch is None


def test_a_request_that_went_to_another_queue_never_comes_up_in_its_first() -> None:
    """Requests move to another queue when the engines behind theirs are lost, and that one may give them back."""
    first, second = queue_of(), queue_of()
    push_all(first, [pending(), pending(timeout=0.5), pending(THROUGHPUT)])
    first.give_back(members(first.pull(0, slot_of())))
    _, moved = first.clear()
    push_all(second, moved)
    push_all(first, fresh := [pending(), pending(THROUGHPUT)])
    assert drained(first, slot_of()) == [fresh[:1], fresh[1:]]
    second.give_back(members(second.pull(0, slot_of())))
    assert first.pull(0, slot_of()).batch is None
    first.validate()
    second.validate()


# ------------------------------------------------------------------------------------------- due to expire


def test_who_would_be_too_late_is_told_so_and_not_run() -> None:
    """Two rows take 10 ms: a deadline in 9 ms cannot be kept, one in 10 ms can."""
    hopeless, just = pending(timeout=0.009), pending(timeout=0.010)
    queue = queue_of(hopeless, just)
    pull = queue.pull(0, slot_of(times={1: 0.010, 2: 0.010}))
    assert pull.expired == [hopeless]
    assert members(pull) == [just]
    assert hopeless.state is State.DONE
    assert queue.queued == queue.queued_bytes == queue.rows == 0


def test_the_prediction_is_for_the_batch_that_the_request_would_join() -> None:
    """Alone it would be in time; with the seven that go with it, it is not."""
    slot = slot_of(times={1: 0.001, 8: 0.008})
    alone = pending(timeout=0.004)
    assert members(queue_of(alone).pull(0, slot)) == [alone]
    crowd = [pending(timeout=0.004), *several(7, timeout=0.5)]
    pull = queue_of(*crowd).pull(0, slot)
    assert pull.expired == crowd[:1]
    assert members(pull) == crowd[1:]


def test_each_one_dropped_makes_the_batch_smaller_for_the_rest() -> None:
    """With 4 rows (8 ms) the first is too late; with the other 3 (6 ms) the second is not."""
    slot = slot_of(times={1: 0.002, 4: 0.008})
    items = [pending(timeout=seconds) for seconds in (0.005, 0.006, 1.0, 1.0)]
    pull = queue_of(*items).pull(0, slot)
    assert pull.expired == items[:1]
    assert members(pull) == items[1:]


def test_without_measurements_only_what_is_past_its_deadline_is_dropped() -> None:
    past, now = pending(timeout=1.0), pending(timeout=2.0)
    pull = queue_of(past, now).pull(2.0, slot_of())
    assert pull.expired == [past]
    assert members(pull) == [now]


def test_who_does_not_fit_is_not_judged_by_a_batch_that_it_would_not_join() -> None:
    """Another slot may serve the third at once, alone and in time."""
    items = [*several(2), pending(timeout=1.005)]
    queue = queue_of(*items, max_batch_size=2)
    first, second = (queue.pull(1.0, slot_of(times={1: 0.001, 2: 0.010})) for _ in range(2))
    assert members(first) == items[:2]
    assert members(second) == items[2:]
    assert not first.expired


def test_a_late_leader_gives_way_to_the_most_urgent_of_all() -> None:
    late = pending(timeout=0.001)
    other = pending(timeout=0.5, shape=OTHER)
    patient = pending(timeout=0.9)
    pull = queue_of(late, other, patient).pull(0.1, slot_of())
    assert pull.expired == [late]
    assert members(pull) == [other]


def test_all_may_be_too_late() -> None:
    items = [pending(timeout=0.1), pending(THROUGHPUT, timeout=0.1), pending(BACKGROUND, timeout=0.1, shape=OTHER)]
    pull = queue_of(*items).pull(0.2, slot_of())
    assert pull.batch is None
    assert pull.expired == items
    assert pull.wake_at == math.inf


def test_a_place_freed_by_who_is_too_late_is_served_in_the_same_pull() -> None:
    """Nobody else would wake the slot for the request that takes the place."""
    late, waiting = pending(timeout=0.1), pending()
    queue = queue_of(late, waiting, policy=QueuePolicy(max_size=1))
    pull = queue.pull(0.2, slot_of())
    assert pull.expired == [late]
    assert members(pull) == [waiting]


def test_a_request_larger_than_its_batch_should_be_is_judged_by_its_own_rows() -> None:
    """The slice has room for one row; the request has four, and they take 8 ms."""
    slot = slot_of(times={1: 0.002, 4: 0.008})
    large = pending(BACKGROUND, rows=4, timeout=0.006)
    pull = queue_of(large, background_slice=0.003).pull(0, slot)
    assert pull.expired == [large]


def test_a_rider_that_would_be_too_late_is_dropped_and_the_next_rides() -> None:
    slot = slot_of(times={1: 0.010, 8: 0.010})
    live, late, rider = pending(), pending(THROUGHPUT, timeout=0.005), pending(THROUGHPUT, timeout=0.5)
    pull = queue_of(live, late, rider).pull(0, slot)
    assert pull.expired == [late]
    assert members(pull) == [live, rider]


# ------------------------------------------------------------------------------------------------- returned


def test_members_of_a_failed_batch_come_back_one_by_one_ahead_of_their_class() -> None:
    items = several(3)
    queue = queue_of(*items)
    slot = slot_of()
    queue.pull(0, slot)
    queue.give_back(items)
    fresh = pending(timeout=0.001)
    queue.push(fresh)
    assert [item.state for item in items] == [State.RETURNED] * 3
    assert queue.queued == 1  # what came back takes no room
    assert drained(queue, slot) == [[items[0]], [items[1]], [items[2]], [fresh]]


def test_what_comes_back_keeps_to_its_class() -> None:
    returned = [pending(BACKGROUND), pending(THROUGHPUT)]
    live, throughput = pending(LIVE), pending(THROUGHPUT, shape=OTHER)
    queue = queue_of(live, throughput)
    queue.give_back(returned)
    assert drained(queue, slot_of()) == [[live], [returned[1]], [throughput], [returned[0]]]


def test_what_comes_back_may_be_cancelled_or_be_too_late() -> None:
    cancelled, late, fine = pending(), pending(timeout=0.004), pending()
    queue = queue_of()
    queue.give_back([cancelled, late, fine])
    assert queue.remove(cancelled)
    pull = queue.pull(0, slot_of(times={1: 0.005}))
    assert pull.expired == [late]
    assert late.state is State.DONE
    assert members(pull) == [fine]
    assert not queue.has_work(slot_of())


def test_a_batch_of_one_that_came_back_counts_its_rows() -> None:
    queue = queue_of(pending(BACKGROUND))
    queue.give_back([pending(THROUGHPUT, rows=3)])
    batch = queue.pull(7, slot_of()).batch
    assert batch is not None
    assert (batch.rows, batch.rows_by_class, batch.leader, batch.started) == (3, (0, 3, 0), THROUGHPUT, 7)
    assert batch.backlog == (False, False, True)


# -------------------------------------------------------------------------------------------- pins, streams


def test_a_pinned_request_runs_only_on_its_engine() -> None:
    pinned, free = pending(pin=1), pending()
    queue = queue_of(pinned, free)
    assert drained(queue, slot_of(0)) == [[free]]
    assert not queue.has_work(slot_of(0))
    assert queue.has_work(slot_of(1))
    assert drained(queue, slot_of(1)) == [[pinned]]


def test_pinned_and_free_requests_share_a_batch_on_that_engine() -> None:
    items = [pending(pin=1), pending(), pending(pin=1), pending(pin=0)]
    assert members(queue_of(*items).pull(0, slot_of(1))) == items[:3]


def test_work_pinned_elsewhere_does_not_keep_a_slot_from_lower_work() -> None:
    queue = queue_of(pending(pin=1), free := pending(BACKGROUND))
    assert members(queue.pull(0, slot_of(0))) == [free]


def test_what_comes_back_stays_pinned() -> None:
    queue = queue_of()
    queue.give_back([pinned := pending(pin=1), free := pending()])
    assert members(queue.pull(0, slot_of(0))) == [free]
    assert queue.pull(0, slot_of(0)).batch is None
    assert not queue.has_work(slot_of(0))
    assert queue.has_work(slot_of(1))
    assert members(queue.pull(0, slot_of(1))) == [pinned]


def test_work_pinned_to_a_lost_engine_may_run_anywhere_and_keeps_its_place() -> None:
    """In the order of its deadline and of its arrival: it is still the oldest, so it is the first to be evicted."""
    policy = QueuePolicy(max_size=4)
    pinned, free, urgent = pending(pin=1, name="pinned"), pending(), pending(pin=1, timeout=0.1)
    queue = queue_of(pinned, free, urgent, pending(pin=2), policy=policy)
    waiting = pending(pin=1)
    came_back = pending(pin=1)
    queue.push(waiting)
    queue.give_back([came_back])
    queue.unpin(1)
    queue.validate()
    slot = slot_of(0)
    assert drained(queue, slot) == [[came_back], [urgent, pinned, free], [waiting]]
    again = pending(pin=1)
    queue.push(again)  # the engine is back: nothing of what was there before is
    assert drained(queue, slot_of(1)) == [[again]]


def test_unpinned_work_is_still_the_oldest() -> None:
    pinned, free = pending(pin=1), pending()
    queue = queue_of(pinned, free, policy=QueuePolicy(max_size=2, overflow=QueueOverflowPolicy.DROP_OLDEST))
    queue.unpin(1)
    assert queue.push(pending()) == [pinned]


def test_a_stream_runs_alone_on_a_slot_that_takes_streams() -> None:
    stream, call = pending(stream="chunks"), pending()
    queue = queue_of(stream, call)
    assert members(queue.pull(0, slot_of(streams=False))) == [call]
    assert queue.pull(0, slot_of(streams=False)).batch is None
    second = pending(stream="more")
    queue.push(second)
    for_streams = slot_of(calls=False)
    assert drained(queue, for_streams) == [[stream], [second]]
    queue.push(pending())
    assert not queue.has_work(for_streams)


def test_requests_that_never_share_a_call_run_one_by_one_in_order() -> None:
    first, second, third = pending(shape=LONE), pending(), pending(shape=LONE)
    queue = queue_of(first, second, third, pending(BACKGROUND, shape=LONE))
    assert drained(queue, slot_of())[:3] == [[first], [second], [third]]


def test_a_late_stream_gives_way_to_the_next_most_urgent() -> None:
    late, call, stream = pending(stream="a", timeout=0.1), pending(timeout=0.5), pending(stream="b", timeout=0.9)
    pull = queue_of(late, call, stream).pull(0.2, slot_of())
    assert pull.expired == [late]
    assert members(pull) == [call]


# ------------------------------------------------------------------------------------------------- tenants


def fair(*items: Pending, **batch: int) -> RequestQueue:
    queue = RequestQueue(BatchPolicy(**batch), QueuePolicy(tenant_fairness=True))
    push_all(queue, items)
    return queue


def test_tenants_do_not_matter_unless_fairness_is_on() -> None:
    items = [pending(tenant=name) for name in "aaab"]
    assert drained(queue_of(*items), slot_of()) == [items]


def test_tenants_take_turns_within_a_batch_and_across_batches() -> None:
    flood = [pending(tenant="flood", name=f"flood {n}") for n in range(6)]
    guests = [pending(tenant="guest", name=f"guest {n}") for n in range(2)]
    queue = fair(*flood, *guests, max_batch_size=4)
    assert names(members(queue.pull(0, slot_of()))) == ["flood 0", "guest 0", "flood 1", "guest 1"]
    assert names(members(queue.pull(0, slot_of()))) == ["flood 2", "flood 3", "flood 4", "flood 5"]


def test_the_tenant_with_the_least_cost_served_goes_first_whatever_the_deadlines() -> None:
    slot = slot_of()
    queue = fair(pending(tenant="served"), max_batch_size=1)
    batch = queue.pull(0, slot).batch
    assert batch is not None
    queue.push(newcomer := pending(tenant="new"))  # a newcomer is level with the idle
    queue.finish(batch, 0.5, 1.0)
    queue.push(urgent := pending(tenant="served", timeout=0.1, at=1.0))
    assert drained(queue, slot, now=1.0) == [[newcomer], [urgent]]


def test_class_comes_before_tenant() -> None:
    slot = slot_of()
    queue = fair(pending(tenant="served"), max_batch_size=1)
    batch = queue.pull(0, slot).batch
    assert batch is not None
    background = pending(BACKGROUND, tenant="new")
    queue.push(background)
    queue.finish(batch, 0.5, 1.0)
    live = pending(tenant="served")
    queue.push(live)
    assert drained(queue, slot, now=1.0) == [[live], [background]]


def test_a_tenant_that_leaves_by_other_ways_is_no_longer_counted_as_active() -> None:
    """Cancelled work leaves no claim: the tenant comes back level with those that were served meanwhile."""
    slot = slot_of()
    queue = fair(max_batch_size=1)
    gone = pending(tenant="gone")
    queue.push(gone)
    queue.remove(gone)
    busy = [pending(tenant="busy", name=n) for n in range(3)]
    push_all(queue, busy)
    batch = queue.pull(0, slot).batch
    assert batch is not None
    queue.finish(batch, 1.0, 1.0)
    queue.push(back := pending(tenant="gone", timeout=9))
    assert [batch[0] for batch in drained(queue, slot, now=1.0)] == [busy[1], busy[2], back]


def test_measured_time_of_one_shape_says_nothing_of_another() -> None:
    slot = slot_of(times={1: 1.0})
    measure(slot, {1: 0.001}, shape=OTHER)
    slow, quick = pending(timeout=0.5, shape=SHAPE), pending(timeout=0.5, shape=OTHER)
    pull = queue_of(slow, quick).pull(0, slot)
    assert pull.expired == [slow]
    assert members(pull) == [quick]
