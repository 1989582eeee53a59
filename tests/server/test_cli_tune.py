"""`kapsl-scheduler tune`: what it measures, with which inputs, and what it writes."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from click.testing import CliRunner, Result

from kapsl_scheduler import cli_tune
from kapsl_scheduler.cli import main
from kapsl_scheduler.errors import InvalidInput
from kapsl_scheduler.ports import Engine
from kapsl_scheduler.types import ModelInfo, TensorSpec
from tests.e2e.process import DIGITS
from tests.engines.onnx_models import dense, lengths, saved

ROWS = ModelInfo("m", inputs=(TensorSpec("x", "float32", (None, 4), 0),), batchable=True)


class Timed:
    """An engine in a time of its own: a call takes a millisecond, and a tenth of one for each row."""

    def __init__(self) -> None:
        self.now = 0.0
        self.sizes: list[int] = []

    def clock(self) -> float:
        return self.now

    def infer(self, inputs: Mapping[str, Any]) -> None:
        rows = len(inputs["x"])
        self.sizes.append(rows)
        self.now += 0.001 + 0.0001 * rows

    def curve(self, most: int, **options: Any) -> dict[int, tuple[float, float, int]]:
        engine = cast(Engine, self)
        found = cli_tune.measure(engine, lambda rows: {"x": np.zeros(rows)}, most, clock=self.clock, **options)
        return {point.rows: (round(point.median, 9), round(point.p99, 9), point.calls) for point in found}


def test_sizes_double_up_to_the_most_and_are_measured_in_turn() -> None:
    timed, told = Timed(), list[float]()

    curve = timed.curve(6, seconds=0.1, tell=told.append)

    assert list(curve) == [1, 2, 4, 6]
    assert [median for median, _, _ in curve.values()] == [0.0011, 0.0012, 0.0014, 0.0016]
    assert len({calls for _, _, calls in curve.values()}) == 1
    rounds = timed.sizes[4 * 3 :]
    assert rounds[:8] == [1, 2, 4, 6, 6, 4, 2, 1]
    assert 0.1 <= timed.now < 0.1 + 0.006
    assert told == sorted(told)
    assert told[-1] == 0.1


def test_sizes_end_where_a_call_is_beyond_the_goal_or_the_time_there_is() -> None:
    assert list(Timed().curve(64, seconds=1.0, enough=0.00125)) == [1, 2, 4]
    assert list(Timed().curve(64, seconds=0.03)) == [1, 2, 4, 8]
    assert list(Timed().curve(1, seconds=0.1)) == [1]


def test_a_slow_model_has_its_rounds_all_the_same() -> None:
    (calls,) = {calls for _, _, calls in Timed().curve(2, seconds=0.001).values()}
    assert calls == 5


def test_random_inputs_have_the_rows_on_the_axis_of_each_input() -> None:
    specs = (
        TensorSpec("state", "float32", (2, None, 3), 1),
        TensorSpec("rate", "int64", (), None),
        TensorSpec("text", "string", ("batch",), 0),
    )
    made = cli_tune._inputs(ModelInfo("m", inputs=specs), 5, None)

    assert {name: array.shape for name, array in made.items()} == {"state": (2, 5, 3), "rate": (), "text": (5,)}
    assert 0 < np.ptp(made["state"]) < 1
    with pytest.raises(InvalidInput, match=r"'x': how large axis 1 is .* --input"):
        cli_tune._inputs(ModelInfo("m", inputs=(TensorSpec("x", "float32", (None, "width"), 0),)), 2, None)


def test_the_rows_of_an_example_come_round_again() -> None:
    example = {"x": np.arange(8, dtype=np.float32).reshape(2, 4)}

    (made,) = cli_tune._inputs(ROWS, 5, example).values()

    assert made[:, 0].tolist() == [0, 4, 0, 4, 0]


# ------------------------------------------------------------------------------------------------ the file


def test_settings_are_added_to_a_file_and_never_written_over(tmp_path: Path) -> None:
    file = tmp_path / "kapsl.toml"
    for model, rows in (("digits", 8), ('v1.2 "x"', 4)):
        cli_tune._add(file, model, cli_tune._toml(model, {"max_batch_size": rows, "max_queue_delay": 0.0}))
    written = tomllib.loads(file.read_text())
    assert {name: table["max_batch_size"] for name, table in written["models"].items()} == {"digits": 8, 'v1.2 "x"': 4}

    before = file.read_text()
    with pytest.raises(Exception, match=r"has \[models.digits\] already"):
        cli_tune._add(file, "digits", cli_tune._toml("digits", {"max_batch_size": 1}))
    assert file.read_text() == before
    for text in ("models = {}\n", "[models\n"):  # what cannot be added to, and what is no TOML
        file.write_text(text)
        with pytest.raises(Exception, match="is not TOML"):
            cli_tune._add(file, "digits", cli_tune._toml("digits", {"max_batch_size": 1}))
        assert file.read_text() == text


# ------------------------------------------------------------------------------------------------ the command


def tune(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["tune", f"digits={DIGITS}", "--seconds", "0.1", *map(str, arguments)])


@pytest.mark.slow
def test_a_real_model_is_measured_and_its_settings_can_be_served(tmp_path: Path) -> None:
    file = tmp_path / "kapsl.toml"
    result = tune("--latency-goal-ms", "1000", "--write", file, "--max-batch-size", "16", "--threads", "2")

    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["rows", "median", "p99", "calls", "rows/s"]
    assert [line.split()[0] for line in lines[1:6]] == ["1", "2", "4", "8", "16"]
    assert sum("<" in line for line in lines[1:6]) == 1
    assert "within 1 s" in result.stdout
    assert result.stderr == f"added to {file}\n"
    shown = CliRunner().invoke(main, ["config", "show", "--config", str(file), "--json"])
    settings = json.loads(shown.stdout)
    table = tomllib.loads(file.read_text())["models"]["digits"]
    assert settings["models.digits.max_batch_size"]["value"] == table["max_batch_size"]
    assert settings["models.digits.threads"]["value"] == 2


@pytest.mark.slow
def test_a_goal_that_nothing_keeps_is_a_failure_and_writes_nothing(tmp_path: Path) -> None:
    file = tmp_path / "kapsl.toml"
    result = tune("--latency-goal-ms", "0.001", "--write", file, "--json")

    assert result.exit_code == 1
    told = json.loads(result.stdout)
    assert told["recommendation"]["keeps_goal"] is False
    assert told["latency_goal"] == 1e-6
    assert [point["rows"] for point in told["curve"]] == [1]
    assert not file.exists()
    assert "nothing added" in result.stderr
    assert "No size keeps" in tune("--latency-goal-ms", "0.001").stdout


@pytest.mark.slow
def test_rows_of_a_file_are_measured_with(tmp_path: Path) -> None:
    rows = tmp_path / "rows.npy"
    np.save(rows, np.zeros((3, 64), np.float32))
    assert tune("--input", rows, "--max-batch-size", "4").exit_code == 0
    np.save(rows, np.zeros((3, 5), np.float32))
    failed = tune("--input", rows)
    assert (failed.exit_code, failed.stdout) == (1, "")


@pytest.mark.slow
def test_models_that_need_rows_of_their_own_and_those_that_are_never_batched(tmp_path: Path) -> None:
    fixed = saved(tmp_path / "fixed.onnx", dense(rows=1))
    found = CliRunner().invoke(main, ["tune", str(fixed), "--seconds", "0.1"])
    assert (found.exit_code, "It is never batched: " in found.stdout) == (0, True)
    assert tomllib.loads(found.stdout[found.stdout.index("[models") :])["models"]["fixed"]["max_batch_size"] == 1

    opened, rows = saved(tmp_path / "open.onnx", lengths()), tmp_path / "rows.npy"
    failed = CliRunner().invoke(main, ["tune", str(opened), "--seconds", "0.1"])
    assert (failed.exit_code, "name one with --input" in failed.stderr) == (1, True)
    np.save(rows, np.ones((1, 7), np.float32))
    found = CliRunner().invoke(main, ["tune", str(opened), "--seconds", "0.1", "--input", str(rows), "--json"])
    told = json.loads(found.stdout)
    assert (told["not_batched"], [point["rows"] for point in told["curve"]][:3]) == (None, [1, 2, 4])
