"""What a request has in place of a future, for a caller that is called back.

A future calls back in the next pass of the loop, by a handle and a context for each; a reply at once, while the answers
of its batch are given out. That is half of what a short request costs a server. What is not here: who is answered, and
with what (runtime.settlement).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from kapsl_scheduler.types import InferenceResponse

__all__ = ["Reply", "Told"]

logger = logging.getLogger(__name__)

Told = Callable[[InferenceResponse | None, BaseException | None], None]
"""Who is told of an answer, or of the error that there is instead."""


class Reply:
    """Tells `then`, once, on the loop and in the midst of the scheduler's work: it must neither block nor ask for
    statistics nor withdraw anything, but may submit another request. What it raises is logged. Who cancels it is not
    told."""

    __slots__ = ("_cancelled", "_done", "_then")

    def __init__(self, then: Told) -> None:
        self._then: Told | None = then
        self._done = False
        self._cancelled = False

    def done(self) -> bool:
        """Whether it was told, or cancelled."""
        return self._done

    def cancelled(self) -> bool:
        """Whether it was cancelled before it was told."""
        return self._cancelled

    def cancel(self) -> None:
        """Tell nobody."""
        if not self._done:
            self._done = self._cancelled = True
            self._then = None

    def set_result(self, response: InferenceResponse) -> None:
        """Raises `asyncio.InvalidStateError` where it is done."""
        self._tell(response, None)

    def set_exception(self, error: BaseException) -> None:
        """The same for an error."""
        self._tell(None, error)

    def _tell(self, response: InferenceResponse | None, error: BaseException | None) -> None:
        then, self._then = self._then, None  # whoever still holds the request need not hold its caller
        if then is None:
            raise asyncio.InvalidStateError
        self._done = True
        try:
            then(response, error)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException:  # the others of its batch are to be told too, whatever this one awaited was cancelled
            logger.exception("whoever submitted a request failed on its answer")
