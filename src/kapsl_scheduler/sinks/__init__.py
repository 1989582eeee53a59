"""Sinks: adapters from the `Sink` port to where a job's results go. No adapter imports another.

Importing this package imports no framework: each adapter does that when it is opened.
"""

from kapsl_scheduler.sinks.jsonl import JsonLinesSink
from kapsl_scheduler.sinks.parquet import ParquetSink
from kapsl_scheduler.sinks.webhook import WebhookSink, verify

__all__ = ["JsonLinesSink", "ParquetSink", "WebhookSink", "verify"]
