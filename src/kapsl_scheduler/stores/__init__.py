"""Stores: adapters that keep jobs and their runs behind the `JobStore` port. No adapter imports another."""

from kapsl_scheduler.stores.memory import MemoryStore
from kapsl_scheduler.stores.sqlite import SqliteStore

__all__ = ["MemoryStore", "SqliteStore"]
