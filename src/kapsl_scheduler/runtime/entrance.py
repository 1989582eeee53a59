"""The way in: who may enter, and what a request is from then on: its class, its deadline, its place to go to.

What is not here: what a valid tensor is (core.admission), what a full queue does (core.queue), and the public calls
(runtime.scheduler).
"""

from __future__ import annotations

import asyncio
import enum
import math
from collections.abc import Callable
from threading import get_ident
from typing import Any, Final

from numpy import ndarray

from kapsl_scheduler.core.admission import Admission, Admitted, PlainInput, RequestProfile, check_timeout
from kapsl_scheduler.core.batch import Pending
from kapsl_scheduler.core.queue import DEFAULT_HORIZON, QueueOverflowPolicy
from kapsl_scheduler.core.routing import rendezvous
from kapsl_scheduler.errors import EngineError, InvalidInput, Overloaded, Unavailable
from kapsl_scheduler.ports import Clock
from kapsl_scheduler.runtime.dispatch import Dispatch
from kapsl_scheduler.runtime.metrics import Books
from kapsl_scheduler.runtime.reply import Reply
from kapsl_scheduler.types import InferenceRequest, Priority

__all__ = ["Entrance", "Phase", "PriorityPolicy"]

PriorityPolicy = Priority | Callable[[RequestProfile], Priority]
"""The class of requests that name none: one class, or a policy such as `determine_priority`."""


class Phase(enum.Enum):
    """Where a scheduler is in its life."""

    NEW = "starting"
    LOADING = "loading"
    OPEN = "ready"
    CLOSING = "closing"
    CLOSED = "closed"


# Looking a member up in its enum, or its module, costs as much as a function call.
OPEN: Final = Phase.OPEN
INFINITE: Final = math.inf


class Entrance:
    """Lets requests in while it is open, on the loop that it belongs to.

    `elsewhere(force_cpu)` names the dispatch for a request that asks for the CPU or finds no working engine, or raises.
    """

    def __init__(
        self,
        books: Books,
        main: Dispatch,
        clock: Clock,
        default_priority: PriorityPolicy,
        elsewhere: Callable[[bool], Dispatch],
    ) -> None:
        self.phase = Phase.NEW
        self.admission: Admission
        self._plain: PlainInput | None = None  # while it is open
        self._books = books
        self._main = main
        self._clock = clock
        try:
            self._default_priority = default_priority if callable(default_priority) else Priority.of(default_priority)
        except ValueError as error:
            raise ValueError(f"default_priority: {error}, or a policy") from None
        self._usual = self._default_priority if isinstance(self._default_priority, Priority) else None
        self._elsewhere = elsewhere
        self._fair = main.queue.policy.tenant_fairness
        self._loop: asyncio.AbstractEventLoop
        self._is_running: Callable[[], bool]
        self._new_future: Callable[[], asyncio.Future[Any]]
        self.nobody: asyncio.Future[Any]  # what a request has for a future when its caller has gone
        self._thread = 0

    def belong(self) -> None:
        """From now on it belongs to the running loop."""
        self._loop = asyncio.get_running_loop()
        self._is_running, self._new_future = self._loop.is_running, self._loop.create_future
        self.nobody = self._new_future()
        self.nobody.cancel()
        self._thread = get_ident()

    def is_here(self) -> bool:
        """Whether the running loop is the one that entered. Asked in a way that costs a third of `get_running_loop`: a
        thread runs one loop at a time, so ours runs here if it runs and this is its thread."""
        return get_ident() == self._thread and self._is_running()

    def check_loop(self) -> None:
        """Raise `RuntimeError` unless the running loop is the one that entered."""
        if not self.is_here():
            if self.phase is Phase.NEW:
                raise RuntimeError("the scheduler was not entered: use `async with Scheduler(...)`")
            raise RuntimeError("the scheduler belongs to another event loop: elsewhere, use SyncScheduler")

    def check_open(self) -> None:
        """Raise `Unavailable` unless requests may enter."""
        if self.phase is not OPEN:
            raise Unavailable(f"the scheduler is {self.phase.value}")

    def open(self) -> None:
        """From now on requests may enter."""
        self.phase = OPEN
        self._plain = self.admission.plain

    def shut(self, phase: Phase) -> None:
        """From now on none may."""
        self.phase = phase
        self._plain = None

    def come_in(
        self,
        request: Any,
        priority: Priority | None,
        timeout: float | None,
        session_id: str | None,
        force_cpu: bool,
        overflow: QueueOverflowPolicy | None,
        block_timeout: float | None,
        reply: Reply | None = None,
    ) -> Pending:
        """A request enters and goes to its dispatch, with a `reply` or with a future. Raises what `enter` raises."""
        plain, main = self._plain, self._main
        if (
            plain is not None
            and type(request) is ndarray
            and request.dtype == plain.dtype
            and (known := plain.shapes.get(request.shape)) is not None
            and type(chosen := self._usual if priority is None else priority) is Priority
            and (timeout is None or (type(timeout) is float and 0.0 < timeout < INFINITE))
            and session_id is None
            and overflow is None
            and block_timeout is None
            and not force_cpu
            and main.works
            and get_ident() == self._thread
            and self._is_running()
        ):
            # The common case, kept bare: all below comes to the same, at twice the cost.
            rows, bare, nbytes = known
            now = self._clock()
            item = Pending(
                (request,),
                rows,
                plain.shape,
                bare,
                chosen,
                now,
                INFINITE if timeout is None else now + timeout,
                now + (DEFAULT_HORIZON if timeout is None else timeout),
                timeout,
                nbytes,
                self._new_future() if reply is None else reply,
                main,
            )
            main.arrivals.append(item)
            if not main.armed:
                main.turn_soon()
            return item
        item = self.enter(request, priority, timeout, session_id, force_cpu)
        if reply is not None:
            item.future = reply
        if overflow is not None or block_timeout is not None:
            try:
                item.overflow, item.block_timeout = _checked(overflow, block_timeout), block_timeout
            except InvalidInput as error:
                self.count_refusal(error)
                raise
        item.home.offer(item)
        return item

    def enter(
        self, request: Any, priority: Priority | None, timeout: float | None, session_id: str | None, force_cpu: bool
    ) -> Pending:
        """A valid request, with its class, its deadline and the dispatch that it is for. Raises `InvalidInput`,
        `Unavailable`, and `RuntimeError` on another loop."""
        self.check_loop()
        try:
            self.check_open()
            inputs = request.inputs if isinstance(request, InferenceRequest) else request
            return self._pending(self.admission.admit(inputs), request, priority, timeout, session_id, force_cpu)
        except EngineError as error:
            self.count_refusal(error)
            raise

    def enter_parts(
        self, request: Any, priority: Priority | None, timeout: float | None, session_id: str | None, force_cpu: bool
    ) -> list[Pending]:
        """Like `enter`, in as many parts as `max_batch_size` asks for."""
        self.check_loop()
        inputs = request.inputs if isinstance(request, InferenceRequest) else request
        try:
            self.check_open()
            whole = self.admission.normalise(inputs)
            size, parts = self.admission.max_rows, [whole]
            if whole[1] > size:
                cut = self._main.layout.slice_inputs
                parts = [
                    self.admission.admit(cut(whole[2], whole[0], start, min(start + size, whole[1])))
                    for start in range(0, whole[1], size)
                ]
            return [self._pending(part, request, priority, timeout, session_id, force_cpu) for part in parts]
        except EngineError as error:
            self.count_refusal(error)
            raise

    def enter_again(self, item: Pending) -> None:
        """A request that was admitted a while ago goes to where it can run now. Raises `Unavailable`."""
        try:
            self.check_open()
            if not item.home.works:
                item.home = self._elsewhere(False)
                item.unpin()
            elif item.pin is not None and item.home.engines[item.pin].lost:
                item.unpin()
        except EngineError as error:
            self.count_refusal(error)
            raise

    def count_refusal(self, error: EngineError) -> None:
        """A request ends here."""
        self._books.offered += 1
        if isinstance(error, (Overloaded, Unavailable)):
            self._books.refused += 1
        else:
            self._books.invalid += 1

    def _pending(
        self,
        admitted: Admitted,
        request: Any,
        priority: Priority | None,
        timeout: float | None,
        session_id: str | None,
        force_cpu: bool,
    ) -> Pending:
        tenant: str | None = None
        request_id: str | None = None
        if isinstance(request, InferenceRequest):
            session_id = session_id or request.session_id
            metadata = request.metadata
            if metadata is not None:
                request_id = metadata.request_id
                tenant = _as_text("tenant", metadata.tenant) if self._fair else None
                priority = metadata.priority if priority is None else priority
                force_cpu = force_cpu or metadata.force_cpu
                if timeout is None and metadata.timeout_ms is not None:
                    timeout = check_timeout("timeout_ms", metadata.timeout_ms) / 1000
        if timeout is not None:
            timeout = check_timeout("timeout", timeout)
            timeout = None if timeout == math.inf else timeout
        if type(priority) is not Priority:
            priority = self._default_class(admitted, timeout) if priority is None else _as_priority(priority)
        now = self._clock()
        if timeout is None:
            deadline, urgency = math.inf, now + DEFAULT_HORIZON
        else:
            deadline = urgency = now + timeout
        home = self._main if not force_cpu and self._main.works else self._elsewhere(force_cpu)
        inputs, rows, shape, bare, nbytes = admitted
        future = self._new_future()
        item = Pending(
            inputs, rows, shape, bare, priority, now, deadline, urgency, timeout, nbytes, future, home, request_id
        )
        if session_id is not None or tenant is not None:
            item.tenant = tenant
            session_id = _as_text("session_id", session_id)
            item.pin = None if session_id is None else self._pin(session_id, home)
            item.set_apart()
        return item

    def _default_class(self, admitted: Admitted, timeout: float | None) -> Priority:
        policy = self._default_priority
        if isinstance(policy, Priority):
            return policy
        profile = RequestProfile(
            sla_deadline=None if timeout is None else timeout * 1000,
            batch_size=admitted[1],
            input_size_bytes=admitted[4] // admitted[1],
        )
        return _as_priority(policy(profile))

    def _pin(self, session_id: str, home: Dispatch) -> int | None:
        """The engine that a session belongs to, where there is a choice."""
        working = [state.index for state in home.engines if not state.lost]
        return rendezvous(session_id, working) if len(working) > 1 else None


def _checked(overflow: Any, block_timeout: Any) -> QueueOverflowPolicy | None:
    """The overflow policy that a call names, as a member or by its value; and a sensible limit to its wait. Raises
    `InvalidInput`."""
    if block_timeout is not None and not (isinstance(block_timeout, int | float) and block_timeout >= 0):
        raise InvalidInput(f"block_timeout: expected at least 0 seconds, got {block_timeout!r}")
    try:
        return None if overflow is None else QueueOverflowPolicy(overflow)
    except ValueError:
        known = ", ".join(policy.value for policy in QueueOverflowPolicy)
        raise InvalidInput(f"overflow: expected one of {known}, got {overflow!r}") from None


def _as_priority(value: Any) -> Priority:
    try:
        return Priority.of(value)
    except ValueError as error:
        raise InvalidInput(f"priority: {error}") from None


def _as_text(name: str, value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    raise InvalidInput(f"{name}: expected a string, got {value!r}")
