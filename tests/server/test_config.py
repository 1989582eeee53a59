"""Where settings come from, which source wins, and how faults are reported."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kapsl_scheduler.cli import main
from kapsl_scheduler.config import (
    Config,
    ConfigError,
    CronSettings,
    ModelSettings,
    ServerSettings,
    TracingSettings,
    load_config,
)
from kapsl_scheduler.core.batch import BatchPolicy
from kapsl_scheduler.core.queue import QueueOverflowPolicy, QueuePolicy
from kapsl_scheduler.server.access import Role, made_token
from kapsl_scheduler.types import Priority


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "kapsl.toml"


def faults_of(flags: dict[str, object], environment: dict[str, str], file: Path | None = None) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as raised:
        load_config(flags=flags, environment=environment, file=file)
    return raised.value.faults


def test_defaults_are_loopback_and_refuse_when_full() -> None:
    config = load_config(flags={}, environment={"PATH": "/bin", "HOME": "/home/me"})

    assert config == Config(state_directory=Path("/home/me/.local/state/kapsl-scheduler"))
    assert (config.server.host, config.server.port) == ("127.0.0.1", 8080)
    assert config.server.max_in_flight > config.model.max_queue_size + config.model.max_waiting
    assert config.model.queue_policy() == QueuePolicy(overflow=QueueOverflowPolicy.DROP_NEWEST)
    assert config.model.batch_policy() == BatchPolicy()
    assert config.model.priority() is Priority.LATENCY_CRITICAL


def test_flag_beats_environment_beats_file_beats_default(file: Path) -> None:
    file.write_text("[server]\nport = 1\ndrain = 1\n[model]\nthreads = 1\nworkers = 1\nmax_waiting = 1\n")

    config = load_config(
        flags={"port": "3", "workers": "3", "drain": None},
        environment={"KAPSL_PORT": "2", "KAPSL_WORKERS": "2", "KAPSL_THREADS": "2"},
        file=file,
    )

    assert (config.server.port, config.server.drain) == (3, 1.0)
    model = config.model
    assert (model.workers, model.threads, model.max_waiting, model.max_batch_size) == (3, 2, 1, 32)


def test_one_model_beats_all_models_in_the_file_and_a_flag_beats_both(file: Path) -> None:
    file.write_text("[model]\nthreads = 2\nworkers = 2\n[models.a]\nthreads = 3\nworkers = 3\n[models.'b.c']\n")

    config = load_config(flags={"workers": "4"}, environment={}, file=file)

    assert (config.for_model("a").threads, config.for_model("a").workers) == (3, 4)
    assert (config.for_model("b.c").threads, config.for_model("b.c").workers) == (2, 4)
    assert config.for_model("other") is config.model


def test_text_becomes_every_type_of_setting() -> None:
    config = load_config(
        flags={"max_batch_size": "16", "preferred_batch_sizes": "4, 8", "max_batch_time": "0.5"},
        environment={
            "KAPSL_OVERFLOW": "block",
            "KAPSL_MAX_QUEUE_BYTES": "1000",
            "KAPSL_ALLOW_REMOTE": "True",
            "KAPSL_HOST": "0.0.0.0",
            "KAPSL_DEFAULT_PRIORITY": "throughput",
        },
    )

    assert config.server == ServerSettings(host="0.0.0.0", allow_remote=True)
    assert config.model == ModelSettings(
        max_batch_size=16,
        preferred_batch_sizes=(4, 8),
        max_batch_time=0.5,
        overflow=QueueOverflowPolicy.BLOCK,
        max_queue_bytes=1000,
        default_priority="throughput",
    )
    assert config.model.queue_policy().overflow is QueueOverflowPolicy.BLOCK
    assert config.model.queue_policy().max_bytes == 1000
    assert config.model.priority() is Priority.THROUGHPUT


def test_the_environment_can_name_the_file(file: Path) -> None:
    file.write_text("[server]\nport = 5\n")

    assert load_config(flags={}, environment={"KAPSL_CONFIG": str(file)}).server.port == 5


def test_every_fault_is_reported_with_its_place_and_unknown_keys_with_the_nearest(file: Path) -> None:
    file.write_text("[server]\nprt = 1\ndrain = 'x'\n[model]\nmax_batchsize = 8\n[models]\na = 1\n[extra]\n")

    faults = faults_of({"port": "70000"}, {"KAPSL_THREAD": "2", "KAPSL_WORKERS": "many"}, file)

    assert set(faults) == {
        "environment: there is no key 'KAPSL_THREAD'; the nearest valid key is 'KAPSL_THREADS'",
        f"{file}: server: there is no key 'prt'; the nearest valid key is 'port'",
        f"{file}: model: there is no key 'max_batchsize'; the nearest valid key is 'max_batch_size'",
        f"{file}: models.a: expected a table, got 1",
        f"{file}: there is no key 'extra'; the nearest valid key is 'tracing'",
        f"{file}: server.drain: Expected `float`, got 'x'",
        "--port: Expected `int` <= 65535, got '70000'",
        "KAPSL_WORKERS: Expected `int`, got 'many'",
    }


def test_a_value_that_is_none_of_a_few_is_told_which_they_are() -> None:
    faults = faults_of({"overflow": "drop", "drain": "inf"}, {"KAPSL_DEFAULT_PRIORITY": "high"})

    assert set(faults) == {
        "--overflow: Expected one of block, drop_newest, drop_oldest, got 'drop'",
        "--drain: Expected `float` <= 86400.0, got 'inf'",
        "KAPSL_DEFAULT_PRIORITY: Expected one of latency_critical, throughput, background, got 'high'",
    }


def test_settings_that_contradict_each_other_are_a_fault(file: Path) -> None:
    file.write_text("[models.a]\npreferred_batch_sizes = [4, 64]\n")

    (fault,) = faults_of({}, {}, file)

    assert fault.startswith(f"{file}: models.a.preferred_batch_sizes: ")
    assert "64" in fault


@pytest.mark.parametrize(
    ("content", "said"), [(b"[server", "is not TOML"), (b"\xff", "is not TOML"), (None, "cannot be read")]
)
def test_a_file_that_cannot_be_used_is_a_fault(file: Path, content: bytes | None, said: str) -> None:
    if content is not None:
        file.write_bytes(content)

    (fault,) = faults_of({}, {}, file)

    assert fault.startswith(f"{file}: {said}")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "192.168.1.1", "example.com"])
def test_an_address_that_others_can_reach_needs_a_word(host: str) -> None:
    (fault,) = faults_of({"host": host}, {})

    assert "--allow-remote" in fault
    assert "kapsl-scheduler token new" in fault
    assert load_config(flags={"host": host, "allow_remote": True}, environment={}).server.host == host


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_loopback_needs_none(host: str) -> None:
    assert load_config(flags={"host": host}, environment={}).server.host == host


def test_an_address_that_others_can_reach_does_with_tokens(tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text(made_token("ann", Role.READER)[1] + "\n")
    flags = {"host": "0.0.0.0", "tokens": str(tmp_path / "tokens")}
    environment = {"KAPSL_TOKENS_TEXT": made_token("bob", Role.ADMIN)[1], "KAPSL_TOKEN": "a client's"}
    config = load_config(flags=flags, environment=environment)

    assert [token.name for token in config.tokens] == ["bob", "ann"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"tokens": "nowhere"}, "tokens: nowhere: cannot be read: No such file or directory"),
        ({"tokens": "/dev/null"}, "tokens: /dev/null has none"),
        ({"tls_cert": "x"}, "tls_cert, tls_key: expected both or neither"),
        ({"tls_key": "x"}, "tls_cert, tls_key: expected both or neither"),
        ({"tls_client_ca": "x"}, "tls_client_ca: means something only with tls_cert and tls_key"),
    ],
)
def test_what_keeps_strangers_out_must_be_whole(flags: dict[str, str], said: str) -> None:
    assert faults_of(flags, {}) == (said,)


def test_a_key_means_one_thing_only() -> None:
    assert not set(ServerSettings.__struct_fields__) & set(ModelSettings.__struct_fields__)


# -------------------------------------------------------------------------------------------------- jobs


def test_the_jobs_have_a_section_of_their_own(file: Path) -> None:
    file.write_text("[cron]\nstore = 'jobs.db'\nhistory_keep = 5\nmax_concurrent_runs = 7\n")

    config = load_config(
        flags={"cron_history_keep": "9", "cron_enabled": "false", "cron_store": None},
        environment={"KAPSL_CRON_HISTORY_KEEP": "8", "KAPSL_CRON_ALLOW_LATENCY_CRITICAL": "true"},
        file=file,
    )

    assert config.cron == CronSettings(
        enabled=False, store="jobs.db", allow_latency_critical=True, history_keep=9, max_concurrent_runs=7
    )


def test_faults_of_the_jobs_settings_say_where_they_stand(file: Path) -> None:
    file.write_text("[cron]\nhistory_keep = 0\nstores = 'x'\n")

    faults = faults_of(
        {"cron_max_concurrent_runs": "many"}, {"KAPSL_CRON_HISTORY_MAX_AGE": "0", "KAPSL_STORE": "x"}, file
    )

    where = ("--cron-max-concurrent-runs", "KAPSL_CRON_HISTORY_MAX_AGE", str(file), "environment")
    assert {fault.partition(":")[0] for fault in faults} == set(where)
    assert len(faults) == 5
    assert any("the nearest valid key is 'store'" in fault for fault in faults)


def test_where_the_kapsl_socket_is(file: Path) -> None:
    file.write_text("[server]\nsocket = '/run/k.sock'\n[server.model_ids]\ndigits = 7\n")

    environment = {"KAPSL_SOCKET_PORT": "9096", "KAPSL_SOCKET_ENABLED": "False"}
    server = load_config(flags={"model_directories": "a, b"}, environment=environment, file=file).server

    assert (server.socket, server.socket_enabled, server.socket_port) == ("/run/k.sock", False, 9096)
    assert (server.model_ids, server.model_directories) == ({"digits": 7}, ("a", "b"))
    (fault,) = faults_of({}, {"KAPSL_MODEL_IDS": "{}"})
    assert fault.startswith("environment: there is no key 'KAPSL_MODEL_IDS'")
    file.write_text("[server.model_ids]\ndigits = -1\n")
    (fault,) = faults_of({}, {}, file)
    assert fault.startswith(f"{file}: server.model_ids: Expected `int` >= 0")


def test_a_kapsl_socket_that_others_can_reach_needs_a_word() -> None:
    (fault,) = faults_of({"socket_host": "0.0.0.0"}, {})

    assert fault.startswith("socket_host: '0.0.0.0' can be reached from other machines")
    assert load_config(flags={"socket_host": "0.0.0.0", "allow_remote": True}, environment={}).server.port == 8080


def test_functions_for_jobs_are_in_the_file_only(file: Path) -> None:
    file.write_text("[cron.callables]\nlatest = 'feeds:latest'\n'my feeds:ask' = 'feeds:Feed.ask'\n")

    config = load_config(flags={}, environment={}, file=file)
    faults = faults_of({}, {"KAPSL_CRON_CALLABLES": "{}"}, file)

    assert config.cron.callables == {"latest": "feeds:latest", "my feeds:ask": "feeds:Feed.ask"}
    assert faults[0].startswith("environment: there is no key 'KAPSL_CRON_CALLABLES'")


@pytest.mark.parametrize("table", ["callables = 'feeds:latest'", "callables = {latest = 5}"])
def test_functions_for_jobs_are_a_table_of_texts(file: Path, table: str) -> None:
    file.write_text(f"[cron]\n{table}\n")

    (fault,) = faults_of({}, {}, file)

    assert fault.startswith(f"{file}: cron.callables: Expected `")


@pytest.mark.parametrize(
    ("environment", "folder"),
    [
        ({"XDG_STATE_HOME": "/state", "HOME": "/home/me"}, "/state/kapsl-scheduler"),
        ({"XDG_STATE_HOME": "state", "HOME": "/home/me"}, "/home/me/.local/state/kapsl-scheduler"),
        ({}, str(Path("~/.local/state/kapsl-scheduler").expanduser())),
    ],
)
def test_state_is_where_the_system_keeps_it(environment: dict[str, str], folder: str) -> None:
    assert load_config(flags={}, environment=environment).state_directory == Path(folder)


def test_settings_of_traces_come_from_every_place_and_are_shown(tmp_path: Path) -> None:
    file = tmp_path / "kapsl.toml"
    file.write_text("[tracing]\nexporter = 'otlp'\nservice_name = 'x'\nsample_ratio = 1\n")

    config = load_config(
        flags={"tracing_service_name": "digits"}, environment={"KAPSL_TRACING_SAMPLE_RATIO": "0.5"}, file=file
    )

    assert config.tracing == TracingSettings(exporter="otlp", sample_ratio=0.5, service_name="digits")
    shown = {name: (value, where) for name, value, where in config.settings() if name.startswith("tracing.")}
    assert shown == {
        "tracing.exporter": ("otlp", f"{file}: tracing.exporter"),
        "tracing.endpoint": (None, "default"),
        "tracing.sample_ratio": (0.5, "KAPSL_TRACING_SAMPLE_RATIO"),
        "tracing.service_name": ("digits", "--tracing-service-name"),
    }
    with pytest.raises(ConfigError, match="KAPSL_TRACING_SAMPLE_RATIO: "):
        load_config(flags={}, environment={"KAPSL_TRACING_SAMPLE_RATIO": "2"})


def some_value(field: msgspec.structs.FieldInfo) -> Any:
    """The default as TOML has it, or any value where the default says that there is none."""
    if field.default is not None and field.default is not msgspec.NODEFAULT:
        return msgspec.to_builtins(field.default)
    for value in (7000, 0.5, "text", {}):
        with contextlib.suppress(msgspec.ValidationError):
            return msgspec.to_builtins(msgspec.convert(value, field.type))
    raise AssertionError(field)


def test_every_setting_can_stand_in_the_file(tmp_path: Path) -> None:
    file, tokens = tmp_path / "kapsl.toml", tmp_path / "tokens"
    tokens.write_text(made_token("ann", Role.READER)[1])
    sections = {
        name: part for name, part in msgspec.structs.asdict(Config()).items() if isinstance(part, msgspec.Struct)
    }
    given = {
        f"{name}.{field.name}": some_value(field)
        for name, part in sections.items()
        for field in msgspec.structs.fields(part)
    } | {"server.tokens": str(tokens)}
    # JSON's numbers, texts and lists are TOML's too, and so is its empty object.
    file.write_text("\n".join(f"{name} = {json.dumps(value)}" for name, value in given.items()))

    settings = list(load_config(flags={}, environment={}, file=file).settings())

    assert {name: msgspec.to_builtins(value) for name, value, _ in settings} == given
    assert [where for name, _, where in settings] == [f"{file}: {name}" for name in given]


def test_serve_has_no_option_that_the_file_has_not() -> None:
    options = {parameter.name for parameter in main.commands["serve"].params}
    keys = {name.removeprefix("server.").removeprefix("model.").replace(".", "_") for name, *_ in Config().settings()}

    assert options - {"file", "check", "as_json"} <= keys
    assert keys - options == {"model_ids", "cron_callables"}  # tables, which are in the file only
