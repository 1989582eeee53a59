"""The sources and sinks that come with the package, by their settings: what a `CronScheduler` needs to make the jobs of
its store work again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import msgspec

from kapsl_scheduler.sinks import JsonLinesSink, ParquetSink, WebhookSink
from kapsl_scheduler.sources import FolderSource

__all__ = ["builtin_adapters"]

_KINDS: Final[Mapping[str, Any]] = {
    "source": FolderSource,
    "sink": JsonLinesSink | ParquetSink | WebhookSink,
}


def builtin_adapters(kind: str, settings: Mapping[str, Any]) -> Any:
    """The `"source"` or the `"sink"` that a stored job describes, for `CronScheduler(..., adapters=builtin_adapters)`.
    Raises `ValueError` for settings of none of them."""
    return msgspec.convert(settings, _KINDS[kind])
