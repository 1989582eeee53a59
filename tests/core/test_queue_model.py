"""The queue does what the rules say: `RequestQueue` against the same rules in plain lists, over random histories.

Times are whole ticks of 1/1024 s and calls take whole ticks a row, so that sums are exact and ties are real ties.
"""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kapsl_scheduler.core.batch import Batch, BatchPolicy, Pending, State
from kapsl_scheduler.core.lanes import Slot
from kapsl_scheduler.core.latency import LatencyTable
from kapsl_scheduler.core.queue import QueueOverflowPolicy, QueuePolicy, RequestQueue
from kapsl_scheduler.errors import Overloaded, ResourceExhausted
from kapsl_scheduler.types import Priority
from tests.core.build import BACKGROUND, LONE, OTHER, SHAPE, THROUGHPUT
from tests.core.naive_queue import Call, NaiveQueue, Request

TICK = 1 / 1024
SHAPES = (SHAPE, OTHER, LONE)
MAX_ROWS = 8

few_ticks = st.integers(1, 12).map(lambda ticks: ticks * TICK)
in_ticks = st.integers(1, 40).map(lambda ticks: ticks * TICK)
no_limit = st.just(math.inf)
classes = st.sampled_from(Priority)
shapes = st.sampled_from([SHAPE, SHAPE, SHAPE, OTHER, LONE])
slots = st.sampled_from([0, 1])
delays = st.just(0.0) | few_ticks
sizes = st.lists(st.integers(2, MAX_ROWS), max_size=2).map(tuple)
shares = st.sampled_from([0.05, 0.25, 0.45]) | st.fixed_dictionaries(
    {THROUGHPUT: st.sampled_from([0.0, 0.3]), BACKGROUND: st.sampled_from([0.0, 0.3])}
)
bounds = st.integers(1, 6)

PATIENT = pytest.mark.timeout(600)
"""Seconds: a machine takes a few, but where it has found something, it looks minutes for the shortest way there."""


def batch_policies(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[BatchPolicy]:
    slack = st.sampled_from([0.0, 0.25, 1.0])
    return st.builds(
        BatchPolicy, max_batch_size=st.just(MAX_ROWS), fill_slack=slack, background_slice=few_ticks, **fields
    )


def arrivals_of(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[list[dict[str, Any]]]:
    every = {"priority": classes, "rows": st.integers(1, 4), "shape": shapes, "patience": no_limit, **fields}
    return st.lists(st.fixed_dictionaries(every), min_size=1, max_size=6)


class QueueMachine(RuleBasedStateMachine):
    """Each step is taken by the queue and by its model; whatever they say must agree. The variants say which policies
    there are and what arrives."""

    batches: st.SearchStrategy[BatchPolicy]
    policies: st.SearchStrategy[QueuePolicy]
    arrivals: st.SearchStrategy[list[dict[str, Any]]]

    @initialize(data=st.data())
    def start(self, data: st.DataObject) -> None:
        batch, policy = data.draw(self.batches), data.draw(self.policies)
        self.queue = RequestQueue(batch, policy, slots=2)
        self.model = NaiveQueue(batch, policy, slots=2)
        self.now = 0.0
        self.items: list[Pending] = []  # by number
        self.requests: list[Request] = []
        self.calls: list[tuple[int, Batch, Call]] = []
        # A slot of each engine; the second leaves streams to the first.
        self.slots = [Slot(0, LatencyTable()), Slot(1, LatencyTable(), streams=False)]
        self.model_slots = [Slot(0, LatencyTable()), Slot(1, LatencyTable(), streams=False)]

    # ------------------------------------------------------------------------------------------ steps

    @rule(data=st.data())
    def arrive(self, data: st.DataObject) -> None:
        for fields in data.draw(self.arrivals):
            self.push(**fields)

    @rule(data=st.data())
    def arrive_together(self, data: st.DataObject) -> None:
        """Those who arrive in one pass of the loop go in together, as far as there is room at once: it is the same as
        if they came one by one."""
        alike = data.draw(st.booleans())
        together = data.draw(self.arrivals)
        requests = [self.request(**(together[0] if alike else fields)) for fields in together]
        items = self.items[-len(requests) :]
        count = self.queue.push_many(items)
        for request in requests[:count]:
            assert self.model.push(request, self.queue.policy.overflow, True) == ("queued", [])
        if count < len(items) and self.queue.policy.max_bytes is None:
            assert self.model.waiting or len(self.model.queued) == self.queue.policy.max_size
        for request, item in zip(requests[count:], items[count:], strict=True):
            self.push_one(request, item)

    def request(self, patience: float, overflow: object = None, may_wait: object = None, **fields: Any) -> Request:
        request = Request(number=len(self.items), arrival=self.now, deadline=self.now + patience, **fields)
        self.requests.append(request)
        self.items.append(as_pending(request))
        return request

    def push(
        self,
        patience: float,
        overflow: QueueOverflowPolicy | None = None,
        may_wait: bool = True,
        **fields: Any,
    ) -> None:
        request = self.request(patience, **fields)
        self.push_one(request, self.items[-1], overflow, may_wait)

    def push_one(
        self, request: Request, item: Pending, overflow: QueueOverflowPolicy | None = None, may_wait: bool = True
    ) -> None:
        policy = overflow or self.queue.policy.overflow
        became, victims = self.model.push(request, policy, may_wait)
        try:
            evicted = self.queue.push(item, overflow, may_wait=may_wait)
        except (ResourceExhausted, Overloaded) as error:
            said: tuple[Any, ...] = (type(error), error.retry_after)
        else:
            said = (item.state, numbers(evicted))
        assert (
            said
            == {
                "too large": (ResourceExhausted, None),
                "refused": (Overloaded, self.model.retry_after()),
                "waiting": (State.WAITING, []),
                "queued": (State.QUEUED, numbers(victims)),
            }[became]
        )

    @rule(number=slots)
    def pull(self, number: int) -> None:
        pull = self.queue.pull(self.now, self.slots[number])
        call, late, wake_at = self.model.pull(self.now, self.model_slots[number])
        batch = pull.batch
        assert numbers([] if batch is None else batch.members) == numbers([] if call is None else call.members)
        assert numbers(pull.expired) == numbers(late)
        assert pull.wake_at == wake_at
        if batch is not None and call is not None:
            assert batch.rows == call.rows
            assert batch.rows_by_class == call.rows_by_class()
            assert batch.leader is call.leader
            assert batch.backlog == call.backlog
            assert batch.started == self.now
            assert batch.shape is batch.members[0].shape
            assert batch.rows <= MAX_ROWS
            assert all(item.state is State.RUNNING for item in batch.members)
            self.calls.append((number, batch, call))

    @precondition(lambda self: self.calls)
    @rule(data=st.data(), ticks=st.integers(1, 8), fails=st.booleans())
    def finish(self, data: st.DataObject, ticks: int, fails: bool) -> None:
        """A call ends. If it failed, those of its members that are not streams come back."""
        number, batch, call = self.calls.pop(data.draw(st.integers(0, len(self.calls) - 1)))
        elapsed = ticks * batch.rows * TICK
        self.queue.finish(batch, elapsed, self.now)
        self.model.finish(call, elapsed)
        back = [item for item in batch.members if fails and item.stream is None]
        self.queue.give_back(back)
        self.model.give_back([self.requests[item.future] for item in back])
        for item in batch.members:
            item.state = item.state if item in back else State.DONE
        if not fails:
            self.measured(number, batch.shape, batch.rows, elapsed)

    @rule(number=slots, shape=shapes, rows=st.integers(1, MAX_ROWS), ticks=st.integers(1, 24))
    def measure(self, number: int, shape: Any, rows: int, ticks: int) -> None:
        for _ in range(3):  # so many before anybody is condemned on it
            self.measured(number, shape, rows, ticks * TICK)

    def measured(self, number: int, shape: Any, rows: int, elapsed: float) -> None:
        for slot in (self.slots[number], self.model_slots[number]):
            slot.latency[shape].observe(rows, elapsed, self.now)

    @rule(number=slots, ticks=st.integers(0, 6))
    def deliver(self, number: int, ticks: int) -> None:
        """So long after the end of a call its callers had their answers."""
        for slot in (self.slots[number], self.model_slots[number]):
            slot.delivery.observe(ticks * TICK)

    @precondition(lambda self: self.items)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        number = data.draw(st.integers(0, len(self.items) - 1))
        assert self.queue.remove(self.items[number]) == self.model.remove(self.requests[number])

    @rule(ticks=st.sampled_from([1, 2, 3, 5, 8, 13, 2048]))
    def advance(self, ticks: int) -> None:
        self.now += ticks * TICK

    @rule(engine=slots)
    def lose_engine(self, engine: int) -> None:
        self.queue.unpin(engine)
        self.model.unpin(engine)
        assert all(item.pin != engine for item in self.items if item.state in (State.QUEUED, State.WAITING))

    @rule(likely=st.integers(0, 9))
    def clear(self, likely: int) -> None:
        if likely:
            return
        waiting, admitted = self.queue.clear()
        expected = self.model.clear()
        assert (numbers(waiting), numbers(admitted)) == (numbers(expected[0]), numbers(expected[1]))

    # -------------------------------------------------------------------------------------- agreement

    @invariant()
    def agree(self) -> None:
        if not hasattr(self, "queue"):
            return
        queue, model = self.queue, self.model
        queue.validate()
        assert self.standing(State.QUEUED) == sorted(numbers(model.queued))
        assert self.standing(State.WAITING) == sorted(numbers(model.waiting))
        assert self.standing(State.RETURNED) == sorted(numbers(model.returned))
        by_class = tuple(sum(r.priority is priority for r in model.queued) for priority in Priority)
        assert queue.queued_by_class() == by_class
        assert (queue.queued, queue.waiting) == (len(model.queued), len(model.waiting))
        assert queue.rows == sum(request.rows for request in model.queued)
        if queue.policy.max_bytes is not None:
            assert queue.queued_bytes == sum(request.nbytes for request in model.queued)
        assert queue.drain_time() == model.retry_after()
        others = model.waiting + model.returned + [r for r in model.queued if r.priority is not BACKGROUND]
        assert queue.has_any() == bool(model.queued or model.returned)
        assert queue.is_background_only() == bool(model.queued and not others)
        for slot in self.slots:
            assert queue.has_work(slot) == any(r.may_run_on(slot) for r in model.queued + model.returned)

    def standing(self, state: State) -> list[int]:
        return [number for number, item in enumerate(self.items) if item.state is state]

    def teardown(self) -> None:
        """What is left runs in the same order too; then nothing is left but what no slot may run."""
        if not hasattr(self, "queue"):
            return
        self.now += 64 * TICK  # every delay is over
        while any(self.queue.has_work(slot) for slot in self.slots):
            for number in (0, 1):
                self.pull(number)
                self.agree()
        self.clear(likely=0)
        assert not any(item.state in (State.QUEUED, State.WAITING, State.RETURNED) for item in self.items)


def as_pending(request: Request) -> Pending:
    fields = {**asdict(request), "shape": request.shape}
    number, stream = fields.pop("number"), fields.pop("stream")
    timeout = None if request.deadline == math.inf else request.deadline - request.arrival
    item = Pending(
        inputs={},
        bare=False,
        urgency=request.urgency,
        timeout=timeout,
        future=number,
        stream=object() if stream else None,
        **fields,
    )
    item.set_apart()
    return item


def numbers(them: Any) -> list[int]:
    return [one.future if isinstance(one, Pending) else one.number for one in them]


class OrderAndBatches(QueueMachine):
    """Which requests run, in what order and in what company; there is always room."""

    batches = batch_policies(max_queue_delay=delays, preferred_batch_sizes=sizes, max_batch_time=st.none() | few_ticks)
    policies = st.just(QueuePolicy(shares=0.0))
    arrivals = arrivals_of(
        patience=no_limit | in_ticks,
        pin=st.sampled_from([None, None, None, 0, 1]),
        stream=st.sampled_from([False] * 5 + [True]),
    )


class FullQueues(QueueMachine):
    """Who is refused, evicted, waits for room, and who gets in when."""

    batches = batch_policies()
    policies = st.builds(
        QueuePolicy,
        max_size=bounds,
        max_bytes=st.none() | st.integers(4, 12),
        overflow=st.sampled_from(QueueOverflowPolicy),
        max_waiting=st.integers(0, 6),
        shares=st.just(0.0),
    )
    arrivals = arrivals_of(
        shape=st.sampled_from([SHAPE, OTHER]),
        nbytes=st.integers(1, 5),
        patience=no_limit | in_ticks,
        overflow=st.none() | st.sampled_from(QueueOverflowPolicy),
        may_wait=st.sampled_from([True, True, True, False]),
    )


class Shares(QueueMachine):
    """What the classes below the first get of the engine's time."""

    batches = batch_policies(max_batch_time=st.none() | few_ticks, preferred_batch_sizes=sizes)
    policies = st.builds(QueuePolicy, shares=shares)
    arrivals = arrivals_of(patience=st.sampled_from([math.inf, math.inf, 6 * TICK, 12 * TICK]))


class Tenants(QueueMachine):
    """Within a class, tenants are served evenly."""

    batches = batch_policies(max_queue_delay=delays)
    policies = st.builds(QueuePolicy, shares=st.sampled_from([0.0, 0.25]), tenant_fairness=st.just(True))
    arrivals = arrivals_of(
        tenant=st.sampled_from([None, "a", "b", "c"]),
        pin=st.sampled_from([None, None, None, 0]),
        patience=no_limit | in_ticks,
    )


class Everything(QueueMachine):
    """All the rules at once."""

    batches = batch_policies(max_queue_delay=delays, preferred_batch_sizes=sizes, max_batch_time=st.none() | few_ticks)
    policies = st.builds(
        QueuePolicy,
        max_size=bounds,
        max_bytes=st.none() | st.integers(4, 12),
        overflow=st.sampled_from(QueueOverflowPolicy),
        max_waiting=st.integers(0, 6),
        shares=shares,
        tenant_fairness=st.booleans(),
    )
    arrivals = arrivals_of(
        nbytes=st.integers(1, 5),
        patience=no_limit | in_ticks,
        overflow=st.none() | st.sampled_from(QueueOverflowPolicy),
        may_wait=st.booleans(),
        pin=st.sampled_from([None, None, None, 0, 1]),
        stream=st.sampled_from([False] * 5 + [True]),
        tenant=st.sampled_from([None, "a", "b"]),
    )


@pytest.mark.slow
@PATIENT
class TestOrderAndBatches(OrderAndBatches.TestCase):
    settings = settings(stateful_step_count=50)


@pytest.mark.slow
@PATIENT
class TestFullQueues(FullQueues.TestCase):
    settings = settings(stateful_step_count=50)


@pytest.mark.slow
@PATIENT
class TestShares(Shares.TestCase):
    settings = settings(stateful_step_count=50)


@pytest.mark.slow
@PATIENT
class TestTenants(Tenants.TestCase):
    settings = settings(stateful_step_count=50)


@pytest.mark.slow
@PATIENT
class TestEverything(Everything.TestCase):
    settings = settings(stateful_step_count=50)
