"""What a server has in memory from its start is not looked through again and again.

Python's collector of cycles follows every object that it keeps account of, and all threads and the loop wait for it:
with what a server imports and loads, tens of milliseconds each time, several times a second under load. Frozen objects
are passed over (https://docs.python.org/3/library/gc.html#gc.freeze).
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

__all__ = ["frozen", "let_go"]


@contextlib.contextmanager
def frozen() -> Iterator[None]:
    """All that is there by now stays, for as long as this is open."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def let_go() -> None:
    """Some of it is gone: a model was replaced, or taken out of service. Looks through everything once."""
    if gc.get_freeze_count():
        gc.unfreeze()
        gc.collect()
        gc.freeze()
