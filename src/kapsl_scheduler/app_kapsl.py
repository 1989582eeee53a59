"""Where an application's Kapsl socket is, and what becomes of one that cannot be there.

What is not here: what is answered (`server.kapsl_socket`).
"""

from __future__ import annotations

import contextlib
import logging
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

from kapsl_scheduler.config import ServerSettings
from kapsl_scheduler.server.kapsl_listen import listening_at

__all__ = ["endpoint_of", "kapsl_listeners"]

_log = logging.getLogger(__name__)


@contextlib.contextmanager
def kapsl_listeners(settings: ServerSettings) -> Iterator[list[socket.socket]]:
    """The sockets that are configured, listening; the Unix one's file goes at the end. Raises `OSError` for an address
    that cannot be had. One that nobody has asked for is left out instead, with a warning."""
    with contextlib.ExitStack() as stack:
        listeners: list[socket.socket] = []
        if settings.socket_enabled and settings.socket is not None:
            listeners.append(stack.enter_context(listening_at(Path(settings.socket).expanduser())))
        elif settings.socket_enabled:
            try:
                listeners.append(stack.enter_context(listening_at(Path(tempfile.gettempdir()) / "kapsl.sock")))
            except OSError as error:
                _log.warning("no Kapsl socket: %s; --socket PATH has it elsewhere, --no-socket does without", error)
        if settings.socket_port is not None:
            listeners.append(stack.enter_context(_tcp(settings.socket_host, settings.socket_port)))
        yield listeners


def _tcp(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        hint = "; another --socket-port, or 0 for any that is free, may do" if port else ""
        raise OSError(f"cannot listen on {host}:{port}: {error.strerror}{hint}") from error


def endpoint_of(listener: socket.socket) -> str:
    """The address as clients take it."""
    if listener.family == socket.AF_UNIX:
        return f"unix://{listener.getsockname()}"
    host, port = listener.getsockname()[:2]
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"
