"""`kapsl-scheduler config`: which settings are in force, and where each comes from.

What is not here: what they mean (`config`), and the options that set them (`cli`).
"""

from __future__ import annotations

import enum
from typing import Any

from kapsl_scheduler.cli_frame import click, print_json
from kapsl_scheduler.config import Config

__all__ = ["show"]


def show(config: Config, *, as_json: bool) -> None:
    """Prints every setting with its value and where that comes from."""
    settings = list(config.settings())
    if as_json:
        print_json({name: {"value": _plain(value), "from": where} for name, value, where in settings})
        return
    rows = [(name, _text(value), where) for name, value, where in settings]
    names, values = (max(len(row[column]) for row in rows) for column in (0, 1))
    for name, value, where in rows:
        click.echo(f"{name:<{names}}  {value:<{values}}  {where}")


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, enum.Enum) else value


def _text(value: Any) -> str:
    value = _plain(value)
    if value is None or value in ((), {}):
        return "-"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    if isinstance(value, dict):
        return ", ".join(f"{key} = {text}" for key, text in value.items())
    return str(value)
