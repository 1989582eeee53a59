"""Where a server's spans go: the exporter that is configured, behind OpenTelemetry, which is an extra.

What is not here: which spans there are (`server.tracing`).
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Final

from kapsl_scheduler.config import ConfigError, TracingSettings

if TYPE_CHECKING:
    from kapsl_scheduler.server.tracing import Tracing

__all__ = ["tracing_to"]

# Seconds that spans may take to be sent, also the last ones when the server ends and nobody takes them.
_EXPORT: Final = 3.0


@contextlib.asynccontextmanager
async def tracing_to(settings: TracingSettings, version: str) -> AsyncIterator[Tracing | None]:
    """Where spans go, None if nowhere. What has been made is sent before it ends. Raises `ConfigError` where
    OpenTelemetry is not installed."""
    if settings.exporter == "none":
        yield None
        return
    try:
        from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter, SpanExporter

        from kapsl_scheduler.server.tracing import Tracing

        exporter: SpanExporter
        if settings.exporter == "otlp":
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

            exporter = OTLPSpanExporter(endpoint=settings.endpoint, timeout=_EXPORT)
        else:
            exporter = ConsoleSpanExporter(out=sys.stderr)
    except ModuleNotFoundError as error:
        raise ConfigError(
            [f"tracing.exporter: {error.name} is not installed: pip install 'kapsl-scheduler[otel]'"]
        ) from error
    tracing = Tracing(
        BatchSpanProcessor(exporter),
        version=version,
        sample_ratio=settings.sample_ratio,
        service_name=settings.service_name,
    )
    try:
        yield tracing
    finally:
        await asyncio.to_thread(tracing.close)
