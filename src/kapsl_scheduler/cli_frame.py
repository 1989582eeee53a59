"""What all commands share: options, running a coroutine, reading JSON, errors as messages that say what to do, and the
end of the process.

What is not here: the commands (`cli`, `cli_jobs`).
"""

from __future__ import annotations

import atexit
import contextlib
import difflib
import logging
import math
import os
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final, NoReturn, TypeVar

import msgspec

from kapsl_scheduler.cli_names import DEFAULT_URL, complete_job, complete_model
from kapsl_scheduler.config import TOKEN_VARIABLE, URL_VARIABLE, ConfigError
from kapsl_scheduler.errors import (
    CronError,
    DeadlineExceeded,
    EngineError,
    InvalidExpression,
    InvalidJob,
    InvalidPackage,
    ModelNotLoaded,
    Overloaded,
    Unauthorized,
    Unavailable,
)
from kapsl_scheduler.priority import Priority

try:
    import click
except ModuleNotFoundError:
    sys.exit("The command line needs click: pip install 'kapsl-scheduler[server,onnx]'")

if TYPE_CHECKING:
    from kapsl_scheduler.client import Client

__all__ = [
    "Commands",
    "Number",
    "ask_server",
    "click",
    "job_argument",
    "json_option",
    "metadata_of",
    "model_argument",
    "print_json",
    "priority_option",
    "probably",
    "read_json",
    "url_option",
]

_log = logging.getLogger(__name__)

_Command = TypeVar("_Command", bound=Callable[..., Any])

_EXTRAS: Final = frozenset({"click", "httptools", "onnxruntime", "prometheus_client", "rich", "starlette", "uvicorn"})
_ADVICE: Final[Mapping[type[Exception], str]] = {
    Unavailable: "Start a server with `kapsl-scheduler serve MODEL`, or name one with --url or KAPSL_URL.",
    ModelNotLoaded: "`kapsl-scheduler models` lists what is there.",
    DeadlineExceeded: "Allow it more with --timeout, or less work before it: `kapsl-scheduler top` shows the queues.",
    Overloaded: "Ask again, with fewer requests at a time: `kapsl-scheduler top` shows the queues.",
    Unauthorized: "Set KAPSL_TOKEN to a token of this server; `kapsl-scheduler token new` makes one.",
}
# Seconds that threads have to end which nobody waits for: a sink that is being closed, say.
_LAST_STEPS: Final = 0.5
# Seconds that the process may take for its last words, should a thread that does not end hold what they need.
_LAST_WORDS: Final = 5.0


class Number(click.FloatRange):
    """A number within a range; not NaN, which is in every range, and not infinity, which nobody means."""

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> float:
        number: float = super().convert(value, parameter, context)
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a number.", parameter, context)
        return number


class Commands(click.Group):
    """Turns what a command raises into one message that says what to do next. To call it is to be the process, and ends
    that; `main` leaves the process alone."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        try:
            return super().__call__(*arguments, **options)
        except BaseException as error:
            left = _still_at_work()
            if left:
                _end_process(error, left)
            raise

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except ConfigError as error:
            raise click.UsageError(str(error)) from error
        except (EngineError, CronError) as error:
            advice = next((text for kind, text in _ADVICE.items() if isinstance(error, kind)), "")
            raise click.ClickException("\n".join(filter(None, [_message(error), advice]))) from error
        except ModuleNotFoundError as error:
            if error.name not in _EXTRAS:
                raise
            message = f"{error.name} is not installed: pip install 'kapsl-scheduler[server,onnx]'"
            raise click.ClickException(message) from error
        except OSError as error:
            raise click.ClickException(str(error)) from error


def _message(error: EngineError | CronError) -> str:
    if isinstance(error, InvalidPackage) and len(error.faults) > 1:
        return _listed(error.source, error.faults)
    if isinstance(error, InvalidJob) and len(error.faults) > 1:
        return _listed(f"job {error.job!r}" if error.job else "the job", error.faults)
    if isinstance(error, InvalidExpression) and error.text:
        shown = "".join(character if character.isprintable() else " " for character in error.text)
        mark = " " * error.position + "^" * max(1, len(error.token))
        return f"{error}\n  {shown}\n  {mark}"
    return str(error)


def _listed(what: str, faults: tuple[str, ...]) -> str:
    return "\n  ".join((f"{what}: {len(faults)} faults", *faults))


def _still_at_work() -> list[str]:
    """The names of our threads that do not end by themselves, though all is closed: each is in somebody's call."""
    threads = [thread for thread in threading.enumerate() if thread.daemon and thread.name.startswith("kapsl-")]
    until = time.monotonic() + _LAST_STEPS
    for thread in threads:
        thread.join(max(0.0, until - time.monotonic()))
    return [thread.name for thread in threads if thread.is_alive()]


def _end_process(error: BaseException, left: Iterable[str]) -> NoReturn:
    """Says and flushes all that the interpreter would at its end, which is left out: a thread that comes back to an
    interpreter that is gone is ended where it stands, and where that is within C++ code, that aborts the process."""
    status = error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1
    watch = threading.Timer(_LAST_WORDS, os._exit, (status,))
    watch.daemon = True
    watch.start()
    if not isinstance(error, SystemExit):
        sys.excepthook(type(error), error, error.__traceback__)
    _log.warning("the process ends although calls hang, in these threads: %s", ", ".join(left))
    atexit._run_exitfuncs()
    for stream in filter(None, (sys.stdout, sys.stderr)):
        with contextlib.suppress(OSError, ValueError):  # nobody reads it any more, or it is closed
            stream.flush()
    os._exit(status)


def url_option(command: _Command) -> _Command:
    # Eager: that names of models and jobs are completed from the server that it names.
    return click.option(
        "--url",
        default=DEFAULT_URL,
        envvar=URL_VARIABLE,
        show_default=True,
        show_envvar=True,
        is_eager=True,
        help="Address of the server.",
    )(command)


def model_argument(command: _Command) -> _Command:
    return click.argument("model", shell_complete=complete_model)(command)


def job_argument(command: _Command) -> _Command:
    return click.argument("id", shell_complete=complete_job)(command)


def priority_option(command: _Command) -> _Command:
    return click.option(
        "--priority",
        type=click.Choice([priority.name.lower() for priority in Priority]),
        callback=lambda context, parameter, name: None if name is None else Priority[name.upper()],
        help="Class of the request; the model's default without it.",
    )(command)


def json_option(command: _Command) -> _Command:
    return click.option("--json", "as_json", is_flag=True, help="Print JSON.")(command)


def print_json(value: Any) -> None:
    click.echo(msgspec.json.format(msgspec.json.encode(value)))


def ask_server(url: str, ask: Callable[[Client], Awaitable[Any]]) -> Any:
    """What a call of the server returns."""

    from kapsl_scheduler.client import Client
    from kapsl_scheduler.server.loop import run_coroutine

    async def call() -> Any:
        async with Client(url, token=os.environ.get(TOKEN_VARIABLE)) as client:
            return await ask(client)

    return run_coroutine(call())


def probably(asked: str, known: Iterable[str]) -> str:
    """What to put behind an error for a name that is not there; empty where none of the `known` comes near it."""
    nearest = difflib.get_close_matches(asked, list(known), n=1)
    return f"; did you mean {nearest[0]!r}?" if nearest else ""


async def metadata_of(client: Client, model: str) -> dict[str, Any]:
    """A model's metadata. Where there is no such model, the error names the one that was probably meant."""
    try:
        return await client.metadata(model)
    except ModelNotLoaded as error:
        hint = probably(model, [entry["name"] for entry in await client.models()])
        raise ModelNotLoaded(f"{error}{hint}") from None


def read_json(data: bytes, where: str) -> Any:
    try:
        return msgspec.json.decode(data)
    except msgspec.DecodeError as error:
        raise click.ClickException(f"{where}: is not JSON: {error}") from error
