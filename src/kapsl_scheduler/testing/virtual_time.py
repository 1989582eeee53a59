"""An asyncio event loop whose time is virtual: sleeping costs nothing and takes exactly as long as it says.

The loop never waits for the wall clock: when nothing is ready, its time jumps to the next timer. When there
is no timer either, nothing can ever happen again and the loop says so instead of hanging. What is not here:
wall time (`testing.wall_clock`), and any simulation of threads; work of other threads is waited for only as long as
`patience` allows.
"""

from __future__ import annotations

import asyncio
import contextvars
import math
import selectors
from collections.abc import Callable, Coroutine, Mapping
from typing import TYPE_CHECKING, Any, TypeVar, TypeVarTuple

if TYPE_CHECKING:
    from _typeshed import FileDescriptorLike

__all__ = ["DeadlockError", "VirtualClock", "VirtualTimeLoop", "run_virtual"]

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

# asyncio runs timers that are due before now + 1 ns. From here on that sum may round to now itself and a
# timer at exactly now would never run.
_EXACT = 1e6

# How many of the waiting tasks a DeadlockError names.
_TASKS_NAMED = 8


class DeadlockError(RuntimeError):
    """Nothing is ready, no timer is armed and nobody is there to wake the loop: it would wait for ever."""


class VirtualClock:
    """Monotonic seconds that move only when told to. Callable, so it serves wherever a `Clock` is taken."""

    __slots__ = ("now",)

    def __init__(self, start: float = 0.0) -> None:
        self.now = start

    def __call__(self) -> float:
        return self.now

    def __repr__(self) -> str:
        return f"VirtualClock({self.now!r})"

    def advance(self, seconds: float) -> None:
        """Move forward by `seconds`. Raises `ValueError` if they are negative."""
        if not seconds >= 0:
            raise ValueError(f"seconds: expected at least 0, got {seconds}")
        self.now += seconds


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """An event loop in virtual time, starting at 0 seconds.

    `loop.time` is its clock; hand it to whatever else needs one (`Scheduler(..., clock=loop.time)`). A
    synchronous function that is to take virtual time calls `loop.clock.advance(seconds)`.

    `patience` is how many real seconds the idle loop waits for other threads, processes or sockets before it
    jumps (or, with no timer left, raises `DeadlockError`). With 0, the default, it asks the operating system
    nothing and runs are deterministic; `call_soon_threadsafe` then works from the loop's own thread, and from
    others while something else keeps the loop busy.
    """

    def __init__(self, *, patience: float = 0.0) -> None:
        self.clock = VirtualClock()
        super().__init__(_VirtualSelector(self._jump, self._nudge, patience))

    def time(self) -> float:
        """Virtual seconds since the loop was made."""
        return self.clock.now

    def call_soon_threadsafe(
        self,
        callback: Callable[[*Ts], object],
        *args: *Ts,
        context: contextvars.Context | None = None,
    ) -> asyncio.Handle:
        """As in asyncio; from the loop's own thread it is `call_soon`, for there is nobody to wake."""
        if asyncio._get_running_loop() is self:
            return self.call_soon(callback, *args, context=context)
        return super().call_soon_threadsafe(callback, *args, context=context)

    def _jump(self, timeout: float | None) -> None:
        """Move to the next timer, which asyncio says is `timeout` seconds away (None: there is none)."""
        if timeout is None:
            raise DeadlockError(_describe_deadlock(self))
        # To the timer's own moment: adding the timeout would miss it by a rounding error.
        due: float = self._scheduled[0].when()  # type: ignore[attr-defined]
        if due > _EXACT:
            due = math.nextafter(due, math.inf)
        self.clock.now = max(self.clock.now, due)

    def _nudge(self) -> None:
        """A timer at exactly now, this late: asyncio does not wait for it, and does not run it either."""
        if self.clock.now > _EXACT and not self._ready and self._scheduled:  # type: ignore[attr-defined]
            due: float = self._scheduled[0].when()  # type: ignore[attr-defined]
            if due == self.clock.now:
                self.clock.now = math.nextafter(due, math.inf)


class _VirtualSelector(selectors.BaseSelector):
    """Never blocks for longer than `patience` real seconds; calls `jump` when it would, else `nudge`."""

    def __init__(self, jump: Callable[[float | None], None], nudge: Callable[[], None], patience: float) -> None:
        self._jump = jump
        self._nudge = nudge
        self._patience = patience
        self._real = selectors.DefaultSelector()

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        busy = timeout is not None and timeout <= 0
        if self._patience:
            events = self._real.select(0 if busy else self._patience)
            if events:
                return events
        if busy:
            self._nudge()
        else:
            self._jump(timeout)
        return []

    def register(self, fileobj: FileDescriptorLike, events: int, data: Any = None) -> selectors.SelectorKey:
        return self._real.register(fileobj, events, data)

    def unregister(self, fileobj: FileDescriptorLike) -> selectors.SelectorKey:
        return self._real.unregister(fileobj)

    def modify(self, fileobj: FileDescriptorLike, events: int, data: Any = None) -> selectors.SelectorKey:
        return self._real.modify(fileobj, events, data)

    def get_map(self) -> Mapping[FileDescriptorLike, selectors.SelectorKey]:
        return self._real.get_map()

    def close(self) -> None:
        self._real.close()


def run_virtual(main: Coroutine[Any, Any, T], *, patience: float = 0.0, debug: bool | None = None) -> T:
    """Run `main` in virtual time on a loop of its own and return its result, like `asyncio.run`.

    When it ends, tasks that are left are cancelled and awaited. Raises what `main` raises, and
    `DeadlockError`, which names the waiting tasks, when nothing can ever happen again.
    """
    with asyncio.Runner(debug=debug, loop_factory=lambda: VirtualTimeLoop(patience=patience)) as runner:
        return runner.run(main)


def _describe_deadlock(loop: VirtualTimeLoop) -> str:
    waiting = sorted(asyncio.all_tasks(loop), key=asyncio.Task.get_name)
    places = [f"{task.get_name()} at {_place(task)}" for task in waiting[:_TASKS_NAMED]]
    if len(waiting) > _TASKS_NAMED:
        places.append(f"and {len(waiting) - _TASKS_NAMED} more")
    return (
        f"at {loop.time():g} virtual seconds nothing is ready, no timer is armed and no other thread was "
        f"waited for; waiting: {', '.join(places) or 'no task'}"
    )


def _place(task: asyncio.Task[Any]) -> str:
    """Where a suspended task waits: its innermost frame that belongs to the coroutine it was made of."""
    frames = task.get_stack()
    if not frames:
        return repr(task.get_coro())
    code = frames[-1].f_code
    return f"{code.co_qualname} ({code.co_filename}:{frames[-1].f_lineno})"
