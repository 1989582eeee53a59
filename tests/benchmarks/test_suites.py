"""What the suites compute from what they saw, and that each runs from the command line to its file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from benchmarks.__main__ import main
from benchmarks.devices import Call, Device
from benchmarks.flood import flood_share
from benchmarks.overload import due_to_expire, ideal_goodput
from benchmarks.peers import PeerMissing, check_peers
from benchmarks.report import load_report


def call(start: float, stop: float, *marks: float) -> Call:
    return Call(start, stop, np.array([[mark] for mark in marks]))


def test_the_floods_share_is_of_the_time_that_live_requests_leave() -> None:
    device = Device(0.005)
    calls = [call(0.000, 0.005, 1.0), call(0.005, 0.010, 0.0, 0.0), call(0.015, 0.020, 0.0)]
    assert flood_share(calls, device, 0.020) == pytest.approx(0.010 / 0.015)


def test_a_flood_that_rides_along_for_nothing_has_had_no_time() -> None:
    assert flood_share([call(0.0, 0.005, 1.0, 0.0)], Device(0.005), 0.010) == pytest.approx(0.0)


def test_a_flood_that_rides_along_pays_for_its_own_rows() -> None:
    device = Device(0.001, 0.001)
    calls = [call(0.0, 0.004, 1.0, 0.0, 0.0)]
    assert flood_share(calls, device, 0.004) == pytest.approx(1.0)


def test_due_to_expire_counts_rows_whose_call_ends_too_late() -> None:
    calls = [call(1.0, 1.005, 1.0049, 1.0051, 1.0), call(2.0, 2.005, 2.1)]
    assert due_to_expire(calls, 0.005, 0.0) == 2
    assert due_to_expire(calls, 0.005, 0.001) == 1


def test_the_ideal_server_answers_all_below_its_capacity() -> None:
    assert ideal_goodput(np.arange(100) * 0.010, 0.0) == 100


def test_the_ideal_server_under_overload_is_never_idle_and_never_late() -> None:
    arrivals = np.sort(np.random.default_rng(0).uniform(0, 10.0, 32_000))  # twice 1,600 a second
    assert ideal_goodput(arrivals, 0.0) == pytest.approx(16_000, rel=0.01)


def test_the_ideal_server_counts_from_the_warm_up_on() -> None:
    assert ideal_goodput(np.array([0.0, 0.5, 1.0, 1.5]), 1.0) == 2


def test_the_rows_that_fit_a_time() -> None:
    assert Device(0.0003, 0.0009).rows_within(0.0102, 32) == 11
    assert Device(0.0003, 0.0009).rows_within(0.0001, 32) == 1
    assert Device(0.005).rows_within(0.001, 32) == 32


def test_missing_peers_are_named_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.peers.util.find_spec", lambda name: None if name == "batched" else object())
    check_peers(["ray.serve.batch"])
    with pytest.raises(PeerMissing, match=r"batched\. Install the extra `bench`"):
        check_peers(["batched", "batched.aio", "ray.serve.batch"])
    with pytest.raises(ValueError, match="unknown peers: nobody"):
        check_peers(["nobody"])


def test_unknown_peers_end_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["digits", "--peers", "nobody"]) == 2
    assert "unknown peers: nobody" in capsys.readouterr().err


SHORT = {
    "micro": [],
    "serial": ["--loops", "asyncio", "--callers", "32", "--seconds", "0.2", "--warmup", "0.1"],
    "digits": ["--loops", "asyncio", "--callers", "1,32", "--peers", "none", "--seconds", "0.2", "--warmup", "0.1"],
    "flood": ["--loops", "asyncio", "--floods", "16", "--seconds", "0.3", "--warmup", "0.1"],
    "overload": [
        "--loops",
        "asyncio",
        "--multiples",
        "2,10",
        "--patterns",
        "poisson",
        "--peers",
        "none",
        "--seconds",
        "0.3",
    ],
    "crowd": ["--loops", "asyncio", "--seconds", "0.3"],
    "streams": ["--loops", "asyncio"],
    "queue10k": ["--loops", "asyncio"],
    "store": ["--callers", "1,8", "--jobs", "100", "--seconds", "0.1"],
    "cron-next": [],
    "cron": ["--loops", "asyncio", "--jobs", "100", "--seconds", "1.2"],
    "cron-live": ["--loops", "asyncio", "--seconds", "0.3", "--warmup", "0.1"],
    "soak": ["--seconds", "1", "--warmup", "0.3", "--share", "0.1"],
}


@pytest.mark.slow
@pytest.mark.parametrize("suite", SHORT)
def test_a_suite_runs_and_measures_everything_it_names(suite: str, tmp_path: Path) -> None:
    target = tmp_path / "run.json"

    assert main([suite, "--quick", "--out", str(target), *SHORT[suite]]) == 0

    report = load_report(target)
    assert report.suite == suite
    assert report.measurements
    rates = [m for m in report.measurements if m.metric in ("rate", "time", "goodput", "live p50", "p50", "queued")]
    assert rates
    # On a machine that is busy enough an overload has no goodput at all; everything else is there in any case.
    assert all(measurement.value > 0 or measurement.metric == "goodput" for measurement in rates)
    assert main(["compare", str(target), str(target)]) == 0
    assert main(["show", str(target)]) == 0
