"""The only reader of configuration: flag > environment > file > default, with every fault reported at once.

What is not here: what the settings are used for (`app`) and the options' help texts (`cli`).

A file is TOML: `[server]`, `[cron]`, `[tracing]`, `[model]` for every model, `[models.NAME]` for one. The environment
has the same keys as `KAPSL_<KEY>`, those of `[cron]` and `[tracing]` as `KAPSL_CRON_<KEY>` and `KAPSL_TRACING_<KEY>`; a
flag or a variable that sets a key of `[model]` sets it for every model. Tables within these (`[cron.callables]`) are in
the file only.
"""

from __future__ import annotations

import difflib
import ipaddress
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Final, Literal, NamedTuple, TypeVar, get_args, get_origin

import msgspec

from kapsl_scheduler.core.policies import BatchPolicy, QueueOverflowPolicy, QueuePolicy
from kapsl_scheduler.priority import Priority
from kapsl_scheduler.server.access import Token, tokens_of

__all__ = [
    "CRON_PREFIX",
    "TRACING_PREFIX",
    "Config",
    "ConfigError",
    "CronSettings",
    "ModelSettings",
    "ServerSettings",
    "TracingSettings",
    "load_config",
    "options",
]

_PREFIX: Final = "KAPSL_"
_FILE_VARIABLE: Final = "KAPSL_CONFIG"
_TOKENS_VARIABLE: Final = "KAPSL_TOKENS_TEXT"
TOKEN_VARIABLE: Final = "KAPSL_TOKEN"
"""What the commands that ask a server say who they are with: none of the server's own settings."""
URL_VARIABLE: Final = "KAPSL_URL"
"""And which server they ask."""
_OTHER_VARIABLES: Final = frozenset({_FILE_VARIABLE, _TOKENS_VARIABLE, TOKEN_VARIABLE, URL_VARIABLE})
CRON_PREFIX: Final = "cron_"
"""What stands before the keys of `[cron]` where there are no sections: in flags and variables."""
TRACING_PREFIX: Final = "tracing_"
"""Likewise of `[tracing]`."""

_Count = Annotated[int, msgspec.Meta(ge=1)]
_Path = Annotated[str, msgspec.Meta(min_length=1)]
_Seconds = Annotated[float, msgspec.Meta(ge=0)]


class ConfigError(ValueError):
    """The configuration is faulty. `faults` has every fault found, each with where it stands."""

    def __init__(self, faults: Iterable[str]) -> None:
        self.faults = tuple(faults)
        super().__init__("\n".join(self.faults))


class ServerSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The process as a whole. `drain` (seconds) is how long work in flight may take after a signal to end, and
    `ready_grace` (seconds) how long before that the server goes on accepting while it says that it is not ready;
    port 0 lets the system choose; `max_in_flight` bounds the inference requests of all models together.

    `tokens` is a file of those who may ask (`server.access`); without any, everybody who reaches the server may.
    `allowed_hosts` are names under which it is reached beside loopback's, and whose pages may ask. `tls_cert` and
    `tls_key` (PEM files) make it HTTPS, `tls_client_ca` has clients show a certificate of that authority. A client that
    neither sends nor takes a byte for `client_patience` seconds in the middle of a request loses its connection.

    `socket` is the path of the Kapsl socket, None: `kapsl.sock` in the temp directory, unless another server has that;
    a `socket_port` has it on TCP as well. `model_ids` are the numbers of models, which it asks for.
    `models` are what is served from the start, each a `PATH` or `NAME=PATH`; `model_directories` are where further ones
    may be loaded from.

    gRPC is offered where grpcio is installed, on the same address, unless `grpc_enabled` is false: at `grpc_port`, of
    which None is 8001, or one that is free where `port` is 0."""

    models: tuple[_Path, ...] = ()
    host: str = "127.0.0.1"
    port: Annotated[int, msgspec.Meta(ge=0, le=65535)] = 8080
    allow_remote: bool = False
    max_body_bytes: _Count = 64 << 20
    # Well above a model's queue and those that wait for room in it: a full queue refuses with better advice.
    max_in_flight: _Count = 4096
    max_connections: _Count = 8192
    client_patience: Annotated[float, msgspec.Meta(gt=0)] = 20.0
    drain: Annotated[float, msgspec.Meta(ge=0, le=86_400)] = 10.0
    ready_grace: Annotated[float, msgspec.Meta(ge=0, le=3_600)] = 0.0
    grpc_enabled: bool = True
    grpc_port: Annotated[int, msgspec.Meta(ge=0, le=65535)] | None = None
    socket: _Path | None = None
    socket_enabled: bool = True
    socket_host: str = "127.0.0.1"
    socket_port: Annotated[int, msgspec.Meta(ge=0, le=65535)] | None = None
    model_directories: tuple[_Path, ...] = ()
    model_ids: dict[str, Annotated[int, msgspec.Meta(ge=0, le=2**32 - 1)]] = {}
    tokens: _Path | None = None
    allowed_hosts: tuple[str, ...] = ()
    tls_cert: _Path | None = None
    tls_key: _Path | None = None
    tls_client_ca: _Path | None = None
    access_log: bool = False


class CronSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The jobs. `store` is where they and their history are kept: the path of an SQLite file, `memory`, or None for a
    file in the state directory. Of each job the last `history_keep` runs are kept, for up to `history_max_age`
    seconds. `allow_latency_critical` lets jobs run in the class of live requests. `callables` are the functions that
    jobs may name, as `module:function`."""

    enabled: bool = True
    store: Annotated[str, msgspec.Meta(min_length=1)] | None = None
    allow_latency_critical: bool = False
    history_keep: _Count = 1000
    history_max_age: Annotated[float, msgspec.Meta(gt=0)] = 30 * 86_400.0
    max_concurrent_runs: _Count = 256
    callables: dict[str, str] = {}


class TracingSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Traces for OpenTelemetry. `exporter` is where spans go: nowhere, to the log's console, or by OTLP over HTTP to
    `endpoint` (None: where OTEL_EXPORTER_OTLP_ENDPOINT says, else this machine). `sample_ratio` is the fraction of
    requests that are traced, of those whose caller does not decide it."""

    exporter: Literal["none", "console", "otlp"] = "none"
    endpoint: Annotated[str, msgspec.Meta(min_length=1)] | None = None
    sample_ratio: Annotated[float, msgspec.Meta(ge=0, le=1)] = 1.0
    service_name: Annotated[str, msgspec.Meta(min_length=1)] = "kapsl-scheduler"


class ModelSettings(msgspec.Struct, frozen=True, kw_only=True):
    """One model: the fields of `BatchPolicy` and `QueuePolicy`, the class of requests that name none, and how
    many calls run side by side (`workers`) on how many threads each (`threads`). Times are in seconds."""

    max_batch_size: _Count = 32
    max_queue_delay: _Seconds = 0.0
    preferred_batch_sizes: tuple[_Count, ...] = ()
    max_batch_time: _Seconds | None = None
    fill_slack: _Seconds = 0.25
    background_slice: _Seconds = 0.005
    max_queue_size: _Count = 1024
    max_queue_bytes: _Count | None = None
    overflow: QueueOverflowPolicy = QueueOverflowPolicy.DROP_NEWEST
    block_timeout: _Seconds | None = None
    max_waiting: Annotated[int, msgspec.Meta(ge=0)] = 1024
    shares: Annotated[float, msgspec.Meta(ge=0, lt=1)] = 0.05
    default_priority: Literal["latency_critical", "throughput", "background"] = "latency_critical"
    workers: _Count = 1
    threads: _Count = 1

    def batch_policy(self) -> BatchPolicy:
        """Raises `ValueError` where the fields contradict each other."""
        return BatchPolicy(
            max_batch_size=self.max_batch_size,
            max_queue_delay=self.max_queue_delay,
            preferred_batch_sizes=self.preferred_batch_sizes,
            max_batch_time=self.max_batch_time,
            fill_slack=self.fill_slack,
            background_slice=self.background_slice,
        )

    def queue_policy(self) -> QueuePolicy:
        """Raises `ValueError` where the fields contradict each other."""
        return QueuePolicy(
            max_size=self.max_queue_size,
            max_bytes=self.max_queue_bytes,
            overflow=self.overflow,
            block_timeout=self.block_timeout,
            max_waiting=self.max_waiting,
            shares=self.shares,
        )

    def priority(self) -> Priority:
        """The class of requests that name none."""
        return Priority[self.default_priority.upper()]


class Setting(NamedTuple):
    """One setting as it is in force."""

    name: str
    value: Any
    where: str


class Config(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that was configured. `models` has the models that the file names; `model` is for the others.
    `state_directory` is where a server keeps what is to outlive it; None: nothing does. `origins` says where a setting
    was given that was, by its name (`server.port`, `models.digits.threads`)."""

    server: ServerSettings = ServerSettings()
    tokens: tuple[Token, ...] = ()
    cron: CronSettings = CronSettings()
    tracing: TracingSettings = TracingSettings()
    state_directory: Path | None = None
    model: ModelSettings = ModelSettings()
    models: Mapping[str, ModelSettings] = {}
    origins: Mapping[str, str] = {}

    def settings(self) -> Iterator[Setting]:
        """Every setting: its name, its value, and where that comes from."""
        sections: dict[str, msgspec.Struct] = {
            "server": self.server,
            "cron": self.cron,
            "tracing": self.tracing,
            "model": self.model,
        }
        sections |= {f"models.{name}": settings for name, settings in self.models.items()}
        for section, settings in sections.items():
            for key, value in msgspec.structs.asdict(settings).items():
                name = f"{section}.{key}"
                yield Setting(name, value, self.origins.get(name, "default"))

    def for_model(self, name: str) -> ModelSettings:
        return self.models.get(name, self.model)


class _Given(NamedTuple):
    """One value with where it was given; text is parsed, anything else must have its type already."""

    value: Any
    where: str


_Layer = dict[str, _Given]
Settings = TypeVar("Settings", ServerSettings, CronSettings, TracingSettings, ModelSettings)


def load_config(*, flags: Mapping[str, Any], environment: Mapping[str, str], file: Path | None = None) -> Config:
    """The configuration from all sources.

    `flags` maps keys to values, None for flags that were not given. `file` is the TOML file (else the one that
    `KAPSL_CONFIG` names, else none). Raises `ConfigError` with every fault.
    """
    faults: list[str] = []
    given = {key: _Given(value, "--" + key.replace("_", "-")) for key, value in flags.items() if value is not None}
    overriding = _from_environment(environment, faults) | given
    named = environment.get(_FILE_VARIABLE)
    tables = _read_toml(file or (Path(named) if named else None), faults)
    of_all = _only(overriding, ModelSettings)
    layers: dict[str, _Layer] = {
        "server": tables.server | _only(overriding, ServerSettings),
        "cron": tables.cron | _only(overriding, CronSettings, CRON_PREFIX),
        "tracing": tables.tracing | _only(overriding, TracingSettings, TRACING_PREFIX),
        "model": tables.model | of_all,
        **{f"models.{name}": tables.model | table | of_all for name, table in tables.models.items()},
    }
    server = _settings(ServerSettings, layers["server"], faults)
    cron = _settings(CronSettings, layers["cron"], faults)
    tracing = _settings(TracingSettings, layers["tracing"], faults)
    model = _settings(ModelSettings, layers["model"], faults)
    models = {name: _settings(ModelSettings, layers[f"models.{name}"], faults) for name in tables.models}
    tokens: list[Token] = []
    if server is not None:
        tokens = _tokens(server, environment, faults)
        for key, host in (("host", server.host), ("socket_host", server.socket_host)):
            if tokens or server.allow_remote or is_loopback(host):
                continue
            faults.append(
                f"{key}: {host!r} can be reached from other machines: make a token for each who may ask "
                "(kapsl-scheduler token new) and name their file with --tokens, or add --allow-remote if everybody who "
                "reaches it may use it"
            )
        if (server.tls_cert is None) != (server.tls_key is None):
            faults.append("tls_cert, tls_key: expected both or neither")
        if server.tls_client_ca is not None and server.tls_cert is None:
            faults.append("tls_client_ca: means something only with tls_cert and tls_key")
    if faults:
        raise ConfigError(dict.fromkeys(faults))
    return Config(
        server=server or ServerSettings(),
        tokens=tuple(tokens),
        cron=cron or CronSettings(),
        tracing=tracing or TracingSettings(),
        state_directory=_state_directory(environment),
        model=model or ModelSettings(),
        models={name: settings for name, settings in models.items() if settings is not None},
        origins={f"{name}.{key}": given.where for name, layer in layers.items() for key, given in layer.items()},
    )


def _tokens(server: ServerSettings, environment: Mapping[str, str], faults: list[str]) -> list[Token]:
    """Those of the file, and those of the environment."""
    texts: list[tuple[str, str]] = []
    if _TOKENS_VARIABLE in environment:
        texts.append((environment[_TOKENS_VARIABLE], _TOKENS_VARIABLE))
    if server.tokens is not None:
        try:
            texts.append((Path(server.tokens).expanduser().read_text("utf-8"), server.tokens))
        except (OSError, UnicodeDecodeError) as error:
            faults.append(f"tokens: {server.tokens}: cannot be read: {getattr(error, 'strerror', error)}")
    found: list[Token] = []
    for text, where in texts:
        try:
            entries = tokens_of(text, where)
        except ValueError as error:
            faults.extend(str(error).splitlines())
        else:
            if not entries:
                faults.append(f"tokens: {where} has none")
            found += entries
    return found


def _state_directory(environment: Mapping[str, str]) -> Path:
    """Where programs keep state by the XDG rules: a relative path in the variable counts as none."""
    named = Path(environment.get("XDG_STATE_HOME", ""))
    if not named.is_absolute():
        home = environment.get("HOME")
        named = (Path(home) if home else Path("~").expanduser()) / ".local" / "state"
    return named / "kapsl-scheduler"


def unknown_key(where: str, key: str, valid: Iterable[str]) -> str:
    """The fault of a key that does not exist, naming the one that was probably meant."""
    nearest = difflib.get_close_matches(key, list(valid), n=1, cutoff=0.0)
    hint = f"; the nearest valid key is {nearest[0]!r}" if nearest else ""
    return f"{where}: there is no key {key!r}{hint}"


def options(settings: type[msgspec.Struct]) -> list[msgspec.structs.FieldInfo]:
    """The settings that flags and variables may give: all but tables."""
    return [field for field in msgspec.structs.fields(settings) if get_origin(field.type) is not dict]


# ----------------------------------------------------------------------------------------------- sources


class _Tables(NamedTuple):
    server: _Layer
    cron: _Layer
    tracing: _Layer
    model: _Layer
    models: dict[str, _Layer]


def _keys(settings: type[msgspec.Struct]) -> tuple[str, ...]:
    return settings.__struct_fields__


def _only(layer: _Layer, settings: type[msgspec.Struct], prefix: str = "") -> _Layer:
    return {key: layer[prefix + key] for key in _keys(settings) if prefix + key in layer}


def _from_environment(environment: Mapping[str, str], faults: list[str]) -> _Layer:
    of_server = [field.name for field in options(ServerSettings)]
    of_cron = [CRON_PREFIX + field.name for field in options(CronSettings)]
    of_tracing = [TRACING_PREFIX + key for key in _keys(TracingSettings)]
    keys = (*of_server, *of_cron, *of_tracing, *_keys(ModelSettings))
    valid = {_PREFIX + key.upper(): key for key in keys}
    layer = {}
    for variable, value in environment.items():
        if not variable.startswith(_PREFIX) or variable in _OTHER_VARIABLES:
            continue
        if variable in valid:
            layer[valid[variable]] = _Given(value, variable)
        else:
            faults.append(unknown_key("environment", variable, valid))
    return layer


def _read_toml(file: Path | None, faults: list[str]) -> _Tables:
    tables = _Tables({}, {}, {}, {}, {})
    if file is None:
        return tables
    try:
        content = tomllib.loads(file.read_text("utf-8"))
    except OSError as error:
        faults.append(f"{file}: cannot be read: {error.strerror}")
        return tables
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        faults.append(f"{file}: is not TOML: {error}")
        return tables
    for section, table in content.items():
        where = f"{file}: {section}"
        if section not in _Tables._fields:
            faults.append(unknown_key(str(file), section, _Tables._fields))
        elif section == "models":
            for name, inner in _table(where, table, faults).items():
                tables.models[name] = _from_table(f"{where}.{name}", inner, ModelSettings, faults)
        elif section == "server":
            tables.server.update(_from_table(where, table, ServerSettings, faults))
        elif section == "cron":
            tables.cron.update(_from_table(where, table, CronSettings, faults))
        elif section == "tracing":
            tables.tracing.update(_from_table(where, table, TracingSettings, faults))
        else:
            tables.model.update(_from_table(where, table, ModelSettings, faults))
    return tables


def _from_table(where: str, table: Any, settings: type[msgspec.Struct], faults: list[str]) -> _Layer:
    layer = {}
    for key, value in _table(where, table, faults).items():
        if key in _keys(settings):
            layer[key] = _Given(value, f"{where}.{key}")
        else:
            faults.append(unknown_key(where, key, _keys(settings)))
    return layer


def _table(where: str, table: Any, faults: list[str]) -> dict[str, Any]:
    if isinstance(table, dict):
        return table
    faults.append(f"{where}: expected a table, got {table!r}")
    return {}


# ------------------------------------------------------------------------------------------------ values


def _settings(kind: type[Settings], layer: _Layer, faults: list[str]) -> Settings | None:
    """The settings of the layer over the defaults; None, with the faults added, if a value is wrong."""
    values = {}
    before = len(faults)
    for field in msgspec.structs.fields(kind):
        given = layer.get(field.name)
        if given is None:
            continue
        try:
            values[field.name] = _convert(given.value, field.type)
        except msgspec.ValidationError as error:
            expected = _choices(field.type) or str(error).partition(", got")[0]
            faults.append(f"{given.where}: {expected}, got {given.value!r}")
    if len(faults) > before:
        return None
    settings = kind(**values)
    if isinstance(settings, ModelSettings):
        try:
            settings.batch_policy()
            settings.queue_policy()
        except ValueError as error:
            places = ", ".join(sorted(given.where for given in layer.values()))
            faults.append(f"{places}: {error}")
            return None
    return settings


def _convert(value: Any, kind: Any) -> Any:
    if not isinstance(value, str):
        return msgspec.convert(value, kind)
    if kind is bool or kind is str:
        return msgspec.convert(value.strip().lower() if kind is bool else value, kind, strict=False)
    listed = [part.strip() for part in value.split(",") if part.strip()]
    takes_list = getattr(kind, "__origin__", None) is tuple
    return msgspec.convert(listed if takes_list else value.strip(), kind, strict=False)


def _choices(kind: Any) -> str:
    """The values that a setting may have, where they are few; msgspec names only the one that came."""
    if get_origin(kind) is Literal:
        values = get_args(kind)
    elif isinstance(kind, type) and issubclass(kind, Enum):
        values = tuple(member.value for member in kind)
    else:
        return ""
    return f"Expected one of {', '.join(values)}"


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches it."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
