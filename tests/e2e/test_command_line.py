"""The command line as people run it: output, exit codes, and what its errors tell them to do."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from kapsl_scheduler.demo.run import PACKAGE
from tests.e2e.process import DIGITS, run, serving

pytestmark = pytest.mark.slow


async def test_a_packed_model_is_served_asked_listed_and_loaded(tmp_path: Path) -> None:
    package, pixels = tmp_path / "package.aimod", tmp_path / "pixels.npy"
    np.save(pixels, np.zeros(64, np.float64))
    manifest = tmp_path / "manifest.json"
    manifest.write_text('{"version": "6", "hardware_requirements": {"preferred_provider": "cuda"}}')
    options = ("--name", "zeros", "--model-version", "7", "--manifest", manifest)
    assert await run("pack", DIGITS, "-o", package, *options) == (0, f"{package}\n", "")

    async with serving(package) as server:
        url = ("--url", server.url)
        code, printed, _ = await run("infer", "zeros", pixels, "--json", *url)
        assert code == 0
        (answer,) = json.loads(printed)
        assert answer["input"] == str(pixels)
        assert np.array(answer["outputs"]["probabilities"]).shape == (1, 10)
        code, printed, _ = await run("infer", "zeros", pixels, *url)
        assert (code, printed.splitlines()[0]) == (0, "probabilities float32 1x10")

        request = tmp_path / "request.json"
        tensor = {"name": "pixels", "shape": [2, 64], "datatype": "FP32", "data": [0] * 128}
        request.write_text(json.dumps({"inputs": [tensor], "parameters": {"priority": 3}}))
        code, printed, _ = await run("infer", "zeros", request, *url)
        assert (code, printed.splitlines()[0]) == (0, "probabilities float32 2x10")

        code, printed, _ = await run("bench", "zeros", "--connections", "2", "--seconds", "0.2", "--json", *url)
        figures = json.loads(printed)
        assert (code, figures["errors"]) == (0, {})
        assert figures["requests"] > 0
        assert 0 < figures["p50"] <= figures["p99"]

        code, printed, _ = await run("models", "--json", *url)
        (listed,) = json.loads(printed)
        assert (code, listed["name"], listed["version"], listed["state"]) == (0, "zeros", "7", "READY")
        assert listed["inputs"] == [{"name": "pixels", "datatype": "FP32", "shape": [-1, 64]}]
        assert listed["stats"]["answers"]["200"] == figures["requests"] + 3
        code, printed, _ = await run("models", *url)
        assert "input  pixels  FP32 [?, 64]" in printed

        code, _, said = await run("infer", "zeroes", pixels, *url)
        assert code == 1
        assert "did you mean 'zeros'?" in said
        assert "kapsl-scheduler models" in said
        code, printed, _ = await run("bench", "zeros", "--seconds", "0.1", "--rows", "1000", *url)
        assert code == 1
        assert "invalid_input" in printed


async def test_a_taken_port_is_one_line_that_says_what_to_do() -> None:
    async with serving(DIGITS) as server:
        code, _, said = await run("serve", DIGITS, "--port", server.url.rpartition(":")[2])

    assert code == 1
    assert said.startswith("Error: cannot listen on 127.0.0.1:")
    assert "--port" in said


@pytest.mark.parametrize(
    ("arguments", "environment", "code", "said"),
    [
        (("serve", "missing.onnx"), {}, 1, "missing.onnx"),
        (("serve", __file__), {}, 1, "test_command_line.py"),
        (("serve", DIGITS, DIGITS, "--port", "0"), {}, 1, "NAME="),
        (("serve", DIGITS, "--host", "0.0.0.0"), {}, 2, "--allow-remote"),
        (("serve", DIGITS), {"KAPSL_PROT": "1"}, 2, "the nearest valid key is 'KAPSL_PORT'"),
        (("serve", DIGITS, "--max-batch-size", "0"), {}, 2, "--max-batch-size"),
        (("serve",), {}, 2, "PATH"),
        (("infer", "m"), {}, 2, "FILE"),
        (("infer", "m", "-", "-"), {}, 2, "once"),
        (("infer", "m", "x.npy", "--output", "x.json"), {}, 2, ".npz"),
        (("infer", "m", "x.npy", "--pixel-mean", "a"), {}, 2, "--pixel-mean"),
        (("bench", "m", "--input", "missing.json"), {}, 2, "missing.json"),
        (("tune", DIGITS, "--input", __file__), {}, 1, "expected an image, an array (.npy, .npz) or JSON"),
        (("models", "--url", "http://127.0.0.1:1"), {}, 1, "kapsl-scheduler serve"),
        (("models", "--url", "ftp://x"), {}, 1, "no server address"),
        (("models", "--url", "http://127.0.0.1:99999"), {}, 1, "no server address"),
    ],
)
async def test_errors_say_what_to_do(
    arguments: tuple[str, ...], environment: dict[str, str], code: int, said: str
) -> None:
    exit_code, printed, message = await run(*arguments, **environment)

    assert (exit_code, printed) == (code, "")
    assert said in message
    assert "Traceback" not in message


async def test_settings_are_shown_with_where_they_come_from(tmp_path: Path) -> None:
    file = tmp_path / "kapsl.toml"
    file.write_text("[server]\nport = 9000\n[model]\nthreads = 2\n[models.digits]\nthreads = 3\n")
    arguments = ("config", "show", "--config", file, "--port", "9001")
    code, shown, said = await run(*arguments, KAPSL_MAX_BATCH_SIZE="8")
    assert (code, said) == (0, "")
    rows = {row[0]: tuple(row[1:]) for line in shown.splitlines() if (row := line.split(maxsplit=2))}
    assert rows["server.port"] == ("9001", "--port")
    assert rows["server.host"] == ("127.0.0.1", "default")
    assert rows["model.threads"] == ("2", f"{file}: model.threads")
    assert rows["models.digits.threads"] == ("3", f"{file}: models.digits.threads")
    assert rows["models.digits.max_batch_size"] == ("8", "KAPSL_MAX_BATCH_SIZE")
    assert rows["server.tokens"] == ("-", "default")
    code, shown, _ = await run(*arguments, "--json")
    assert json.loads(shown)["model.overflow"] == {"value": "drop_newest", "from": "default"}
    assert len(json.loads(shown)) == len(rows)
    code, _, said = await run("config", "show", "--threads", "0")
    assert (code, "--threads" in said) == (2, True)


async def test_everything_is_checked_without_serving_anything(tmp_path: Path) -> None:
    store = tmp_path / "jobs.db"
    code, printed, said = await run("serve", "--check", f"digits={PACKAGE}", f"plain={DIGITS}", "--store", store)
    assert (code, said) == (0, "")
    assert printed.splitlines() == ["digits 1.0.0: loads, 1 job", "plain 1.0.0: loads, 0 jobs"]
    assert not store.exists()

    manifest = json.loads((DIGITS.parent / "manifest.json").read_text("utf-8"))
    manifest["cron_jobs"] = [
        {"id": "wide", "schedule": "0 0 3 * * *", "input": {"shape": [1, 3], "dtype": "float32", "data": [0] * 12}},
        {"id": "never", "schedule": "0 0 0 30 2 *", "input": {"shape": [1, 64], "dtype": "uint8", "data": [0] * 64}},
    ]
    described, faulty = tmp_path / "manifest.json", tmp_path / "faulty.aimod"
    described.write_text(json.dumps(manifest))
    code, _, said = await run("pack", DIGITS, "-o", faulty, "--manifest", described)
    assert (code, said) == (0, "")
    code, printed, said = await run("serve", "--check", f"digits={faulty}")
    assert (code, printed) == (1, "")
    assert "digits:wide" in said
    assert "digits:never" in said


async def test_every_fault_of_a_manifest_has_a_line_of_its_own(tmp_path: Path) -> None:
    manifest, package = tmp_path / "manifest.json", tmp_path / "package.aimod"
    manifest.write_text('{"version": 5, "cron_jobs": [{"id": ""}], "task": "digits"}')

    code, printed, said = await run("pack", DIGITS, "-o", package, "--manifest", manifest)

    assert (code, printed) == (1, "")
    assert said.splitlines() == [
        f"Error: {package}: 4 faults",
        "  version: expected a string, got 5",
        "  cron_jobs[0].id: expected a string that is not empty, got ''",
        '  cron_jobs[0].schedule: expected a cron expression or {"interval_secs": seconds}, got nothing',
        "  cron_jobs[0].input: expected a tensor, got nothing",
    ]
    manifest.write_text('{"extra_files": []}')
    code, _, said = await run("pack", DIGITS, "-o", package, "--manifest", manifest)
    assert (code, said) == (1, f"Error: {manifest}: extra_files: unknown key; --extra adds files\n")
    assert not package.exists()


@pytest.mark.parametrize(
    ("missing", "command"),
    [("click", "models"), ("httptools", "models"), ("uvicorn", f"serve {DIGITS}"), ("onnxruntime", f"serve {DIGITS}")],
)
async def test_a_missing_extra_is_one_line_that_names_it(missing: str, command: str) -> None:
    program = f"import sys; sys.modules[{missing!r}] = None; sys.argv[1:] = {command!r}.split(); " + (
        "from kapsl_scheduler.cli import main; main()"
    )
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", program), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    printed, said = await process.communicate()

    assert (process.returncode, printed) == (1, b"")
    assert len(said.splitlines()) == 1
    assert b"pip install 'kapsl-scheduler[" in said
    assert missing.encode() in said


async def test_a_configured_model_that_is_not_served_is_a_fault(tmp_path: Path) -> None:
    file = tmp_path / "kapsl.toml"
    file.write_text("[models.digit]\nthreads = 1\n")

    code, _, said = await run("serve", DIGITS, "--port", "0", "--config", file)

    assert code == 2
    assert "there is no key 'digit'; the nearest valid key is 'digits'" in said


async def test_the_demo_ends_by_itself_with_right_answers() -> None:
    code, printed, said = await run("demo", "--seconds", "4")

    assert (code, said) == (0, "")
    assert "What it cost live requests: p50" in printed
    assert "ms while it fired (" in printed
    assert "ms while it was paused (" in printed
    (row,) = [line for line in printed.splitlines() if "digits:heartbeat" in line]
    assert int(row.split("│")[2]) >= 1
    assert "live" in printed
    assert "throughput" in printed
    assert "rows on average" in printed
    assert printed.rstrip().endswith("Every request was answered, and the answers are right.")
