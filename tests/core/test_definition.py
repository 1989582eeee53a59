"""Jobs as text: there and back, and what is said of text that is no job."""

from __future__ import annotations

import base64
import datetime as dt
import functools
import io
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from kapsl_scheduler import (
    Coalesce,
    CronExpression,
    CronJob,
    CronOverflowPolicy,
    Exclusion,
    FiringPolicy,
    InferenceRequest,
    Interval,
    InvalidJob,
    Named,
    OnInterrupt,
    Overlap,
    Priority,
    RequestMetadata,
    RunPolicy,
)
from kapsl_scheduler.core.definition import callable_name, decode_job, encode_job, frozen_request


class Numbers(msgspec.Struct, frozen=True, tag="numbers"):
    """A source with settings."""

    upto: int = 3

    def items(self, firing: Any, memory: Any) -> Any:
        raise NotImplementedError


class Lines(msgspec.Struct, frozen=True, tag="lines"):
    """A sink with settings."""

    path: str

    def open(self, firing: Any, memory: Any) -> Any:
        raise NotImplementedError


def adapters(kind: str, settings: Mapping[str, Any]) -> Any:
    return msgspec.convert(settings, {"source": Numbers, "sink": Lines}[kind])


def there_and_back(job: CronJob) -> CronJob:
    """The job after a restart. Its text is the same then, and equal jobs have equal text."""
    checked = job.check(allow_latency_critical=True)
    text = encode_job(checked)
    back = decode_job(text, adapters).check(allow_latency_critical=True)
    assert encode_job(back) == text
    return back


def on_result(id: str, result: Any) -> None:
    """Something to be named."""


# ------------------------------------------------------------------------------------------- there and back

dtypes = st.sampled_from(
    [
        "float16",
        "float32",
        "float64",
        "bool",
        "int8",
        "int16",
        "int32",
        "int64",
        "uint8",
        "uint16",
        "uint64",
        "complex64",
    ]
)
shapes = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=5)
numbers = dtypes.flatmap(lambda dtype: hnp.arrays(dtype, shapes))
strings = shapes.flatmap(
    lambda shape: st.lists(texts, min_size=_size(shape), max_size=_size(shape)).map(_objects(shape))
)


def _size(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape, dtype=int))


def _objects(shape: tuple[int, ...]) -> Any:
    def build(elements: list[str]) -> Any:
        array = np.empty(len(elements), object)
        array[:] = elements
        return array.reshape(shape)

    return build


@given(numbers | strings)
def test_arrays(array: Any) -> None:
    back = there_and_back(CronJob("a", 60, array)).request
    assert back.dtype == array.dtype
    assert back.shape == array.shape
    np.testing.assert_array_equal(back, array)


@pytest.mark.parametrize(
    "array", [np.array(["ab", "c"]), np.array([b"ab", b"c"]), np.array([b"ab"], object), np.array("x")]
)
def test_other_arrays_of_text_come_back_as_text(array: Any) -> None:
    back = there_and_back(CronJob("a", 60, array)).request
    assert back.dtype == object
    assert back.tolist() == np.char.asarray(array).astype(str).tolist()


values = st.one_of(st.integers(-(2**53), 2**53), st.floats(allow_nan=False, allow_infinity=False), texts, st.booleans())
plain = values | st.lists(values, max_size=4) | st.lists(st.lists(values, max_size=2), max_size=2)


@given(plain)
def test_plain_values(value: Any) -> None:
    assert there_and_back(CronJob("a", 60, value)).request == value


@given(st.dictionaries(texts, numbers | plain, max_size=3))
def test_mappings(inputs: dict[str, Any]) -> None:
    back = there_and_back(CronJob("a", 60, inputs)).request
    assert back.keys() == inputs.keys()
    for name, value in inputs.items():
        if isinstance(value, np.ndarray):
            np.testing.assert_array_equal(back[name], value)
        else:
            assert back[name] == value


@pytest.mark.parametrize("inputs", [np.ones((2, 2)), 3.5, {"x": np.ones(1), "y": [1, 2]}])
@pytest.mark.parametrize("session", [None, "s"])
@pytest.mark.parametrize("metadata", [None, RequestMetadata(request_id="r", tenant="t")])
def test_requests(inputs: Any, session: str | None, metadata: RequestMetadata | None) -> None:
    back = there_and_back(CronJob("a", 60, InferenceRequest(inputs, session_id=session, metadata=metadata))).request
    if session is None and metadata is None:
        np.testing.assert_equal(back, inputs)  # the same thing, shorter
        return
    assert (back.session_id, back.metadata) == (session, metadata)
    np.testing.assert_equal(back.inputs, inputs)


schedules = st.one_of(
    st.integers(1_000, 10**15).map(lambda us: Interval(dt.timedelta(microseconds=us))),
    st.builds(Interval, st.floats(0.001, 1e6), st.datetimes(dt.datetime(1971, 1, 1), timezones=st.just(dt.UTC))),  # noqa: DTZ001
    st.builds(
        CronExpression,
        st.sampled_from(["0 * * * * *", "@daily", " 0  0 9 * * MON-FRI 2026 "]),
        st.sampled_from(["UTC", "Europe/Berlin", "UTC+02:00", dt.timezone(dt.timedelta(hours=-3.5))]),
        literal=st.booleans(),
    ),
)


@given(schedules)
def test_schedules(schedule: Any) -> None:
    assert there_and_back(CronJob("a", schedule, 1.0)).schedule == schedule


moments = st.datetimes(timezones=st.sampled_from([dt.UTC, dt.timezone(dt.timedelta(hours=2))]))
spans = st.tuples(moments, moments).filter(lambda span: span[0] < span[1])
exclusions = st.lists(spans.map(lambda span: Exclusion(*span)), max_size=2).map(tuple)


@given(
    st.builds(
        FiringPolicy,
        misfire_grace=st.none() | st.floats(0, 1e6),
        coalesce=st.sampled_from([Coalesce.LATEST, Coalesce.EARLIEST]),
        overlap=st.sampled_from([Overlap.SKIP, Overlap.BUFFER_ONE, Overlap.CANCEL_OTHER]),
        spread=st.floats(0, 1e6),
        start=st.none() | moments,
        max_runs=st.none() | st.integers(1, 10**9),
        exclude=exclusions,
    ),
    st.builds(
        RunPolicy,
        timeout=st.none() | st.floats(0.001, 1e6),
        attempts=st.integers(1, 10),
        backoff=st.floats(0, 100),
        pause_after=st.none() | st.integers(1, 10),
        on_interrupt=st.sampled_from(OnInterrupt),
        max_in_flight=st.integers(1, 100),
    ),
)
def test_policies(firing: FiringPolicy, run: RunPolicy) -> None:
    back = there_and_back(CronJob("a", 60, 1.0, firing=firing, run=run))
    assert (back.firing, back.run) == (firing, run)


def test_everything_else() -> None:
    job = CronJob(
        "päckchen:job 1",
        "@daily",
        Numbers(7),
        priority=Priority.LATENCY_CRITICAL,
        overflow_policy=CronOverflowPolicy.BLOCK,
        on_result=on_result,
        condition=Named("open"),
        sink=Lines("a\udce4.txt".encode("utf-8", "replace").decode()),
        force_cpu=True,
        model="m",
        package="p",
        tz="Europe/Berlin",
        enabled=False,
    )
    back = there_and_back(job)
    assert back.on_result == Named("tests.core.test_definition:on_result")
    for field in ("id", "request", "priority", "overflow_policy", "condition", "sink", "force_cpu", "model", "package"):
        assert getattr(back, field) == getattr(job, field), field
    assert back.schedule == CronExpression("@daily", "Europe/Berlin")
    assert (back.tz, back.enabled) == ("Europe/Berlin", False)


def test_callables_stand_by_name() -> None:
    back = there_and_back(CronJob("a", 60, on_result, sink=on_result))
    assert back.request == back.sink == Named("tests.core.test_definition:on_result")
    assert there_and_back(CronJob("a", 60, Named("x"), sink=Named("y"))).sink == Named("y")


class Caller:
    def __call__(self) -> None: ...

    def method(self) -> None: ...


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (on_result, "tests.core.test_definition:on_result"),
        (Caller().method, "tests.core.test_definition:Caller.method"),
        (Caller(), "tests.core.test_definition:Caller"),
        (Caller, "tests.core.test_definition:Caller"),
        (functools.partial(on_result, "a"), "functools:partial"),
        ([].append, "list:list.append"),
    ],
)
def test_names_of_callables(function: Any, name: str) -> None:
    assert callable_name(function) in (name, name.replace("list:", "builtins:"))


def test_the_text_is_short_where_nothing_is_said() -> None:
    text = encode_job(CronJob("a", 60, 1.5).check())
    assert text == b'{"id":"a","schedule":{"interval_secs":60.0},"value":1.5}'


# ------------------------------------------------------------------------------------------ what has no text


class Mine(dt.tzinfo):
    def utcoffset(self, when: Any) -> dt.timedelta:
        return dt.timedelta(hours=1)

    def dst(self, when: Any) -> dt.timedelta:
        return dt.timedelta(0)

    def fromutc(self, when: dt.datetime) -> dt.datetime:
        return when + dt.timedelta(hours=1)


class Europe(Mine):
    def __str__(self) -> str:
        return "Europe/Berlin"


@pytest.mark.parametrize(
    ("job", "fault"),
    [
        (CronJob("a", 60, object()), "request.value: <object objec"),
        (CronJob("a", 60, {"x": object()}), "request.inputs.x: <object objec"),
        (
            CronJob("a", 60, np.array([None])),
            "request.input: an array of object cannot be stored: expected str or bytes, got None",
        ),
        (
            CronJob("a", 60, np.array([1, 2], object)),
            "request.input: an array of object cannot be stored: expected str or",
        ),
        (
            CronJob("a", 60, {"x": np.array([b"\xff"], object)}),
            "request.inputs.x: an array of object cannot be stored: 'utf-8'",
        ),
        (
            CronJob("a", 60, np.array(["\ud800", "a"], object)),
            "request.input: an array of object cannot be stored: 'utf-8'",
        ),
        (
            CronJob("a", 60, np.ones(2, ml_dtypes.bfloat16)),
            "request.input: an array of bfloat16 cannot be stored: no file has a form for it",
        ),
        (CronJob("a", 60, "\ud800"), "request.value: '\\ud800' cannot be stored: "),
        (CronJob("a", 60, type("Plain", (), {"items": print})()), "source: expected an adapter with settings, got <"),
        (
            CronJob("a", 60, 1.0, sink=type("Plain", (), {"open": print})()),
            "sink: expected an adapter with settings, got",
        ),
        (CronJob("a", CronExpression("@daily", Mine()), 1.0), "tz: expected an IANA name or a fixed offset, got <"),
        (CronJob("a", CronExpression("@daily", Europe()), 1.0), "tz: expected an IANA name or a fixed offset, got <"),
    ],
)
def test_what_has_no_text_is_refused_with_its_place(job: CronJob, fault: str) -> None:
    with pytest.raises(InvalidJob) as caught:
        encode_job(job.check())
    assert caught.value.job == "a"
    (found,) = caught.value.faults
    assert found.startswith(fault)


# -------------------------------------------------------------------------------------------- bad text


def text(**keys: Any) -> bytes:
    return msgspec.json.encode({"id": "a", "schedule": "@daily", "value": 1} | keys)


def file(data: Any) -> dict[str, Any]:
    out = io.BytesIO()
    np.save(out, data, allow_pickle=True)
    return {"npy_base64": base64.b64encode(out.getvalue()).decode()}


NOTHING = {"value": None}


@pytest.mark.parametrize(
    ("bad", "fault"),
    [
        (b"", "Input data was truncated"),
        (b"[]", "Expected `object`, got `array`"),
        (b'{"id": "a"}', "Object missing required field `schedule`"),
        (text(id=7), "Expected `str`, got `int` - at `$.id`"),
        (text(schedul="@daily"), "Object contains unknown field `schedul`"),
        (text(schedule={"interval": 5}), "Object contains unknown field `interval` - at `$.schedule`"),
        (text(schedule={"interval_secs": 0}), "schedule: an interval is at least 0.001 seconds"),
        (text(schedule={"interval_secs": 5, "anchor": "2026-01-01T00:00:00"}), "schedule: the anchor of an interval: "),
        (text(schedule="x", literal=True), "schedule: "),
        (text(firing={"coalesce": "x"}), "Invalid enum value 'x' - at `$.firing.coalesce`"),
        (text(run={"attempt": 3}), "Object contains unknown field `attempt` - at `$.run`"),
        (text(metadata={"request_id": 1}), "- at `$.metadata.request_id`"),
        (text(**NOTHING), "expected exactly one of input, value, inputs, callable, source, got none"),
        (text(callable="f"), "expected exactly one of input, value, inputs, callable, source, got value and callable"),
        (text(**NOTHING, callable="f", session_id="s"), "session_id: means something only with input, value or inputs"),
        (text(**NOTHING, source={"type": "numbers"}, metadata={}), "metadata: means something only with input, value"),
        (text(**NOTHING, source={"type": "x"}), "source: Invalid value 'x' - at `$.type`"),
        (text(**NOTHING, source={"type": "numbers", "upto": "x"}), "source: Expected `int`, got `str` - at `$.upto`"),
        (text(sink={"type": "lines"}), "sink: Object missing required field `path`"),
        (text(sink={"callable": 5}), "sink: expected {callable: name} or the settings of a sink, got {'callable': 5}"),
        (
            text(sink={"callable": "f", "type": "lines"}),
            "sink: expected {callable: name} or the settings of a sink, got",
        ),
        (text(**NOTHING, input={}), "input.shape: expected a list of at most 32 integers above 0, got None"),
        (text(**NOTHING, inputs={"x": {"shape": [1], "dtype": "x"}}), "inputs.x.dtype: expected one of float32"),
        (text(**NOTHING, input={"shape": [2], "dtype": "uint8", "data": [1]}), "input: expected 2 bytes"),
        (text(**NOTHING, input={"values": [1]}), "input: Expected `str`, got `int` - at `$[0]`"),
        (
            text(**NOTHING, input={"values": ["a"], "shape": [2]}),
            "input: cannot reshape array of size 1 into shape (2,)",
        ),
        (text(**NOTHING, input={"values": ["a"], "shape": "x"}), "input: "),
        (text(**NOTHING, input={"npy_base64": "?"}), "input: "),
        (text(**NOTHING, input={"npy_base64": 7}), "input: "),
        (text(**NOTHING, input={"npy_base64": ""}), "input: "),
        (text(**NOTHING, input={"npy_base64": base64.b64encode(b"PK\x03\x04 no archive").decode()}), "input: "),
        (
            text(**NOTHING, input=file(np.array([None]))),
            "input: Object arrays cannot be loaded when allow_pickle=False",
        ),
    ],
)
def test_bad_text_is_refused_with_its_place(bad: bytes, fault: str) -> None:
    with pytest.raises(InvalidJob) as caught:
        decode_job(bad, adapters)
    assert len(caught.value.faults) == 1
    assert fault in caught.value.faults[0]


def test_all_that_is_wrong_with_a_request_is_said() -> None:
    bad = text(**NOTHING, inputs={"x": {}, "y": {"values": 3}}, sink={"callable": 1}, schedule={"interval_secs": -1})
    with pytest.raises(InvalidJob) as caught:
        decode_job(bad, adapters)
    assert caught.value.job == "a"
    assert [fault.split(":")[0].split(".")[0] for fault in caught.value.faults] == [
        "schedule",
        "inputs",
        "inputs",
        "sink",
    ]


def test_text_that_is_deep_is_no_job() -> None:
    with pytest.raises(InvalidJob):
        decode_job(b'{"id":"a","schedule":"@daily","value":' + b"[" * 100_000, adapters)


@given(st.binary(max_size=200), st.integers(0, 128), st.booleans())
def test_a_damaged_array_is_a_fault_or_an_array(noise: bytes, place: int, header: bool) -> None:
    out = io.BytesIO()
    np.save(out, np.arange(6, dtype=np.int16).reshape(2, 3))
    data = out.getvalue()
    data = data[:place] + noise + data[place + len(noise) :] if header else noise
    body = text(**NOTHING, input={"npy_base64": base64.b64encode(data).decode()})
    try:
        request = decode_job(body, adapters).request
    except InvalidJob as error:
        request, fault = None, error.faults[0]
        assert fault.startswith("input: ")
    assert request is None or isinstance(request, np.ndarray)


# -------------------------------------------------------------------------------------------- in memory


def test_a_frozen_request_is_a_copy_that_nobody_changes() -> None:
    array = np.ones(3)
    frozen = frozen_request(array)
    array[0] = 7
    assert frozen.tolist() == [1, 1, 1]
    assert not frozen.flags.writeable
    request = InferenceRequest({"x": array, "y": [1, [2]]}, session_id="s", metadata=RequestMetadata(request_id="r"))
    copy = frozen_request(request)
    request.inputs["y"][1].append(3)
    array[0] = 8
    assert copy.inputs["x"].tolist() == [7, 1, 1]
    assert copy.inputs["y"] == [1, [2]]
    assert (copy.session_id, copy.metadata) == ("s", RequestMetadata(request_id="r"))
    assert frozen_request("text") == "text"
