"""Benchmarks: what a request costs, against the engine called directly and against other in-process batchers.

Run as `python -m benchmarks SUITE`; docs/benchmarks.md says how to read the figures. Nothing here is installed with
the package, and the package never imports it.
"""
