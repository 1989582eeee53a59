"""The command line: serve, models, bench, pack, demo. Words in, words and exit codes out.

Exit codes: 0 done, 1 failed, 2 wrong usage. Modules that need an extra are imported by the command that needs them, so
that every other command works without it, and starts fast. What is not here: what the commands do, and those with
modules of their own (`cli_infer`, `cli_jobs`, `cli_top`, `cli_tune`, ...).
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec

from kapsl_scheduler.cli_completion import completion
from kapsl_scheduler.cli_frame import (
    Commands,
    Number,
    ask_server,
    click,
    json_option,
    metadata_of,
    model_argument,
    print_json,
    priority_option,
    read_json,
    url_option,
)
from kapsl_scheduler.cli_infer import infer
from kapsl_scheduler.cli_jobs import explain, jobs
from kapsl_scheduler.cli_progress import passing
from kapsl_scheduler.cli_token import token
from kapsl_scheduler.cli_top import top
from kapsl_scheduler.cli_tune import tune
from kapsl_scheduler.config import (
    CRON_PREFIX,
    TRACING_PREFIX,
    CronSettings,
    ModelSettings,
    ServerSettings,
    TracingSettings,
    load_config,
    options,
)
from kapsl_scheduler.priority import Priority

if TYPE_CHECKING:
    from kapsl_scheduler.app import Listening
    from kapsl_scheduler.client import Client, LoadTally
    from kapsl_scheduler.server.oip import InferCall

__all__ = ["main"]

_HELP: Final[Mapping[str, str]] = {
    "host": "Address to listen on.",
    "port": "Port to listen on; 0 takes one that is free.",
    "allow_remote": "Allow an address that other machines can reach, though everybody who does may use the server.",
    "max_body_bytes": "Largest request body.",
    "max_in_flight": "Most inference requests at a time, for all models together.",
    "max_connections": "Most connections at a time.",
    "client_patience": "Seconds after which a client loses its connection that stalls in the middle of a request.",
    "tokens": "File of those who may ask: `kapsl-scheduler token new` makes its lines.",
    "allowed_hosts": "Names under which the server is reached beside localhost's, with commas.",
    "tls_cert": "Certificate of the server (PEM), with its chain: makes it HTTPS.",
    "tls_key": "Its private key (PEM).",
    "tls_client_ca": "Authority (PEM) whose certificate each client must have.",
    "grpc_enabled": "Offer no gRPC.",
    "grpc_port": "Port of gRPC; 0 takes one that is free. [default: 8001]",
    "socket": "Path of the Kapsl socket. [default: kapsl.sock in the temp directory]",
    "socket_enabled": "Have no Kapsl socket in the file system.",
    "socket_host": "Address of the Kapsl socket on TCP.",
    "socket_port": "Port of the Kapsl socket on TCP, where it is to be there too.",
    "model_directories": "Directories that further models may be loaded from, with commas.",
    "access_log": "Log every request, without what is in it.",
    "drain": "Seconds that requests and jobs in flight have to end after a signal.",
    "ready_grace": "Seconds after a signal in which requests are still taken while the server says it is not ready.",
    "cron_enabled": "Run no jobs, and need no store for them.",
    "cron_store": "SQLite file of the jobs and their history, or memory. [default: in the state directory]",
    "cron_allow_latency_critical": "Let jobs run in the class of live requests.",
    "cron_history_keep": "Runs that are kept of each job.",
    "cron_history_max_age": "Seconds that runs are kept.",
    "cron_max_concurrent_runs": "Most runs of jobs at a time.",
    "tracing_exporter": "Where spans go for OpenTelemetry: none, console or otlp.",
    "tracing_endpoint": "URL for spans by OTLP over HTTP, such as http://collector:4318/v1/traces.",
    "tracing_sample_ratio": "Fraction of requests that are traced, where their caller does not say.",
    "tracing_service_name": "What the server is called in traces.",
    "max_batch_size": "Most rows in one call of a model.",
    "max_queue_delay": "Seconds that requests below live ones may wait for a batch to fill.",
    "preferred_batch_sizes": "Sizes to fill batches to, such as 8,16.",
    "max_batch_time": "Seconds that a batch of throughput work may take.",
    "fill_slack": "How much longer live batches may get by taking others along, as a fraction.",
    "background_slice": "Seconds that a batch of background work may take.",
    "max_queue_size": "Most requests that wait for a model.",
    "max_queue_bytes": "Most bytes of inputs that wait for a model.",
    "overflow": "What a full queue does: drop_newest, drop_oldest or block.",
    "block_timeout": "Seconds that a request waits for room where a full queue blocks.",
    "max_waiting": "Most requests that wait for room.",
    "shares": "Fraction of the engine's time that each class below live requests keeps.",
    "default_priority": "Class of requests without one: latency_critical, throughput or background.",
    "workers": "Calls of one model that run side by side.",
    "threads": "Threads of one call.",
}
_SHORT_FLAGS: Final[Mapping[str, tuple[str, ...]]] = {"cron_store": ("--store",)}


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(package_name="kapsl-scheduler")
def main() -> None:
    """Answers live requests first and batches the rest behind them."""


main.add_command(jobs)
main.add_command(explain)
main.add_command(token)
main.add_command(infer)
main.add_command(completion)
main.add_command(top)
main.add_command(tune)

_input = click.option(
    "--input",
    "source",
    type=click.Path(exists=True, dir_okay=False, allow_dash=True),
    metavar="FILE",
    help="Inputs, as `infer` reads them; - is stdin.",
)


# ------------------------------------------------------------------------------------------------- serve


def _settings_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """One option for each setting. Their values stay text: `config` reads them, as it reads variables."""
    sections: tuple[tuple[str, type[msgspec.Struct]], ...] = (
        ("", ServerSettings),
        (CRON_PREFIX, CronSettings),
        (TRACING_PREFIX, TracingSettings),
        ("", ModelSettings),
    )
    fields = [(prefix + field.name, field) for prefix, kind in sections for field in options(kind)]
    for key, field in reversed(fields):
        if key == "models":  # which are the arguments
            continue
        flags = ["--" + key.replace("_", "-"), *_SHORT_FLAGS.get(key, ())]
        shown = getattr(field.default, "value", field.default)
        text = _HELP[key] + (f" [default: {shown}]" if shown not in (None, (), False, True) else "")
        if field.default is True:
            option = click.option("--no-" + key.removesuffix("_enabled"), key, flag_value="false", help=text)
        elif field.type is bool:
            option = click.option(*flags, key, is_flag=True, default=None, help=text)
        else:
            option = click.option(*flags, key, metavar="VALUE", help=text)
        command = option(command)
    return command


_file_option = click.option(
    "--config", "file", type=click.Path(path_type=Path, dir_okay=False), help="TOML file; KAPSL_CONFIG names one too."
)


@main.command()
@click.argument("models", nargs=-1, type=click.Path(), metavar="[NAME=]PATH...")
@_file_option
@click.option("--check", is_flag=True, help="Load everything, say what is wrong with it, and serve nothing.")
@_settings_options
@json_option
def serve(models: tuple[str, ...], file: Path | None, check: bool, as_json: bool, **flags: Any) -> None:
    """Serve models: .aimod packages, .onnx files or unpacked packages.

    Settings come from flags, then KAPSL_... variables, then the file, then the defaults. Models may be in the file too:
    [server] models = ["NAME=PATH"]. Functions for jobs are in the file only: [cron.callables].
    """
    from kapsl_scheduler import app
    from kapsl_scheduler.server.journal import ACCESS, AUDIT
    from kapsl_scheduler.server.loop import run_coroutine

    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    config = load_config(flags=flags | {"models": models or None}, environment=os.environ, file=file)
    models = config.server.models
    if not models:
        raise click.UsageError("nothing to serve: name a PATH, or some in the file: [server] models = [...]")
    AUDIT.setLevel(logging.INFO if config.tokens else logging.WARNING)  # with nobody to name it says nothing
    ACCESS.setLevel(logging.INFO if config.server.access_log else logging.WARNING)
    if not check:
        run_coroutine(app.serve(config, models, announce=_announce_json if as_json else _announce))
        return
    found = run_coroutine(app.check(config, models))
    if as_json:
        print_json([model._asdict() for model in found])
        return
    for model in found:
        click.echo(f"{model.name} {model.version}: loads, {model.jobs} job{'' if model.jobs == 1 else 's'}")


@main.group("config")
def settings() -> None:
    """Look at the settings."""


@settings.command("show")
@_file_option
@_settings_options
@json_option
def config_show(file: Path | None, as_json: bool, **flags: Any) -> None:
    """Show the settings that `serve` would have, and where each comes from."""
    from kapsl_scheduler.cli_config import show

    show(load_config(flags=flags, environment=os.environ, file=file), as_json=as_json)


def _announce(listening: Listening) -> None:
    click.echo(f"listening on {listening.url} with {', '.join(listening.models)}")
    if listening.sockets:
        click.echo(f"for Kapsl clients on {', '.join(listening.sockets)}")
    if listening.grpc is not None:
        click.echo(f"for gRPC clients on {listening.grpc}")
    click.echo(f"dashboard at {listening.url}/")


def _announce_json(listening: Listening) -> None:
    click.echo(msgspec.json.encode(listening._asdict()))  # one line, for who reads on


# ------------------------------------------------------------------------------------------------ models


@main.command()
@url_option
@json_option
def models(url: str, as_json: bool) -> None:
    """List the models of a server with their inputs, outputs and what they have done."""
    entries = ask_server(url, _describe_models)
    if as_json:
        print_json(entries)
        return
    for entry in entries:
        click.echo(f"{entry['name']}  version {entry['version']}  {entry['state'].lower()}")
        for kind in ("inputs", "outputs"):
            for tensor in entry[kind]:
                shape = ", ".join("?" if size < 0 else str(size) for size in tensor["shape"])
                click.echo(f"  {kind[:-1]:<6} {tensor['name']}  {tensor['datatype']} [{shape}]")
        done = entry["stats"]
        click.echo(f"  {done['inference_count']} rows in {done['execution_count']} calls, {done['queued']} queued")


async def _describe_models(client: Client) -> list[dict[str, Any]]:
    entries = await client.models()
    for entry in entries:
        metadata = await client.metadata(entry["name"])
        stats = await client.stats(entry["name"])
        entry |= {"inputs": metadata["inputs"], "outputs": metadata["outputs"]}
        entry["stats"] = {key: stats[key] for key in ("inference_count", "execution_count", "answers")}
        entry["stats"]["queued"] = stats["scheduler"]["queued"]
    return entries


# ------------------------------------------------------------------------------------------------- bench


@main.command()
@model_argument
@_input
@priority_option
@click.option("--connections", type=click.IntRange(min=1), default=32, show_default=True, help="Callers at a time.")
@click.option("--seconds", type=Number(min=0, min_open=True), default=10.0, show_default=True)
@click.option("--rows", type=click.IntRange(min=1), default=1, show_default=True, help="Rows of a request.")
@url_option
@json_option
def bench(
    model: str,
    source: str | None,
    priority: Priority | None,
    connections: int,
    seconds: float,
    rows: int,
    url: str,
    as_json: bool,
) -> None:
    """Load MODEL over HTTP: each caller sends its next request when it has its answer.

    Without --input the inputs are random numbers of the model's shapes. Exits with 1 if a request failed.
    """
    from kapsl_scheduler.cli_inputs import read_first, stdin_of

    stdin = stdin_of(source)

    def call(metadata: Mapping[str, Any]) -> InferCall:
        return _random(metadata, rows) if source is None else read_first(source, metadata, stdin=stdin)

    tally: LoadTally = ask_server(url, lambda client: _bench(client, model, call, priority, connections, seconds))
    summary = tally.summary(seconds)
    if as_json:
        print_json(summary)
    else:
        click.echo(f"{summary['requests_per_second']:.0f} requests/s, {connections} callers, {seconds:g} s")
        click.echo(f"p50 {_ms(summary['p50'])}  p99 {_ms(summary['p99'])}")
        failed = ", ".join(f"{count} {code}" for code, count in summary["errors"].items())
        click.echo(f"failed: {failed or 'none'}")
    if tally.errors:
        sys.exit(1)


async def _bench(
    client: Client,
    model: str,
    asked: Callable[[Mapping[str, Any]], InferCall],
    priority: Priority | None,
    connections: int,
    seconds: float,
) -> LoadTally:
    from kapsl_scheduler.client import closed_loop

    call = asked(await metadata_of(client, model))
    send = client.prepare(
        model,
        call.request.inputs,
        priority=call.priority if priority is None else priority,
        timeout=call.timeout,
        outputs=call.outputs,
    )
    async with passing(f"asking {model}", seconds):
        return await closed_loop(send, callers=connections, seconds=seconds)


def _random(metadata: Mapping[str, Any], rows: int) -> InferCall:
    from kapsl_scheduler.client import random_inputs
    from kapsl_scheduler.server.oip import InferCall
    from kapsl_scheduler.types import InferenceRequest

    return InferCall(InferenceRequest(random_inputs(metadata, rows)))


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.2f} ms"


# ------------------------------------------------------------------------------------------ pack, demo


@main.command()
@click.argument("model", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(dir_okay=False, path_type=Path), help="The package.")
@click.option("--name", "project_name", help="Name of the model; the file's without it.")
@click.option("--model-version", "version", help="Version of the model. [default: 1.0.0]")
@click.option(
    "--manifest",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="JSON file with further keys of the manifest, such as cron_jobs.",
)
@click.option(
    "--extra",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A file to put beside the model, such as its weights. May be repeated.",
)
@json_option
def pack(
    model: Path, output: Path, manifest: Path | None, extra: tuple[Path, ...], as_json: bool, **fields: str | None
) -> None:
    """Write MODEL (an .onnx file) as an .aimod package."""
    from kapsl_scheduler.packages import build_package

    keys = read_json(manifest.read_bytes(), str(manifest)) if manifest else {}
    if not isinstance(keys, dict):
        raise click.ClickException(f"{manifest}: expected a JSON object with keys of the manifest")
    if "extra_files" in keys:  # no key of a manifest, but the name of an argument
        raise click.ClickException(f"{manifest}: extra_files: unknown key; --extra adds files")
    keys |= {key: value for key, value in fields.items() if value is not None}
    package = build_package(model, output, extra_files=extra, **keys)
    if as_json:
        print_json({"package": str(package), "bytes": package.stat().st_size})
        return
    click.echo(package)


@main.command()
@click.option("--seconds", type=Number(min=4), default=20.0, show_default=True, help="How long to send.")
@click.option("--serve", "only_serve", is_flag=True, help="Serve the digits model until interrupted.")
def demo(seconds: float, only_serve: bool) -> None:
    """Serve the digits model and send it real images, live and in bulk, while a job of its package fires."""
    from kapsl_scheduler.demo.run import PACKAGE, run
    from kapsl_scheduler.server.loop import run_coroutine

    if only_serve:
        click.get_current_context().invoke(serve, models=(str(PACKAGE),), file=None, cron_store="memory")
    elif not run_coroutine(run(seconds)):
        sys.exit(1)
