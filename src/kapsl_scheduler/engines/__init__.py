"""Engines: adapters from a model runtime to the `Engine` port. No adapter imports another.

Importing this package imports no framework: each adapter does that when it loads.
"""

from kapsl_scheduler.engines.callable import CallableEngine
from kapsl_scheduler.engines.onnx import OnnxEngine

__all__ = ["CallableEngine", "OnnxEngine"]
