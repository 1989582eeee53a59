"""`kapsl-scheduler infer` against the real server: files in, answers out."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kapsl_scheduler.client import Client
from kapsl_scheduler.demo.run import PACKAGE
from tests.e2e.process import DIGITS, Process, build_working_model, run, serving
from tests.e2e.terminal import in_terminal

pytestmark = pytest.mark.slow


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Process]:
    async with serving(DIGITS, build_working_model(tmp_path / "work.onnx"), "--no-cron") as server:
        yield server


@pytest.fixture
def digits(tmp_path: Path) -> tuple[list[Path], list[int]]:
    """Images of digits, ten times as large as the model's, and what they are."""
    held_out = np.load(PACKAGE.with_name("digits_test.npz"))
    files = []
    for number, pixels in enumerate(held_out["images"][:12]):
        files.append(tmp_path / f"{number}.png")
        image = Image.fromarray((pixels.reshape(8, 8).astype(np.float32) * 15.9).astype(np.uint8))
        image.resize((80, 80), Image.Resampling.NEAREST).save(files[-1])
    return files, held_out["labels"][:12].tolist()


async def test_images_are_recognised(server: Process, digits: tuple[list[Path], list[int]], tmp_path: Path) -> None:
    files, labels = digits
    names, written = tmp_path / "names.txt", tmp_path / "answers.npz"
    names.write_text("zero one two three four five six seven eight nine".replace(" ", "\n"))
    options = ("--pixel-scale", "0.0627", "--url", server.url)

    code, printed, said = await run("infer", "digits", *files, *options, "--labels", names, "--output", written)

    assert (code, said) == (0, "")
    heading, *rows = printed.splitlines()
    assert heading.split() == ["input", "class", "score", "class", "score", "class", "score"]
    words = names.read_text().split()
    right = [row.split()[:2] == [str(file), words[label]] for row, file, label in zip(rows, files, labels, strict=True)]
    assert sum(right) >= len(right) - 1
    with np.load(written) as answers:
        assert answers["probabilities"].shape == (12, 10)
        assert answers["input"].tolist() == [str(file) for file in files]

    code, printed, _ = await run("infer", "digits", *files, *options, "--json")
    told = json.loads(printed)
    assert [entry["input"] for entry in told] == [str(file) for file in files]
    assert [np.argmax(entry["outputs"]["probabilities"]) for entry in told] == [
        np.argmax(row) for row in np.load(written)["probabilities"]
    ]
    names.write_text("too\nfew\n")
    code, _, said = await run("infer", "digits", files[0], *options, "--labels", names)
    assert (code, "expected 10 lines" in said) == (2, True)


async def test_requests_are_sent_side_by_side_within_the_bound(server: Process, tmp_path: Path) -> None:
    lines = tmp_path / "in.jsonl"
    lines.write_text("".join(json.dumps({"x": [[i]], "turns": 20}) + "\n" for i in range(12)))
    url = ("--url", server.url)

    async def most(concurrency: int) -> int:
        code, printed, _ = await run("infer", "work", lines, "--concurrency", str(concurrency), "--json", *url)
        assert code == 0
        assert [entry["outputs"]["y"] for entry in json.loads(printed)] == [[[float(i)]] for i in range(12)]
        async with Client(server.url) as client:
            sizes = (await client.stats("work"))["scheduler"]["batch_sizes"]
        return max(map(int, sizes))

    assert await most(1) == 1
    assert 1 < await most(4) <= 4


async def test_what_fails_is_named_and_the_rest_is_answered(
    server: Process, digits: tuple[list[Path], list[int]], tmp_path: Path
) -> None:
    wide, missing, written = tmp_path / "wide.npy", tmp_path / "missing.png", tmp_path / "answers.npz"
    np.save(wide, np.zeros((1, 65), np.float32))
    asked = ("infer", "digits", digits[0][0], wide, missing, digits[0][1], "--url", server.url)

    code, printed, said = await run(*asked, "--output", written)

    assert code == 1
    assert [line.split()[0] for line in printed.splitlines()] == ["input", str(digits[0][0]), str(digits[0][1])]
    first, second, third = said.splitlines()
    assert first.startswith(f"{wide}: input 'pixels': axis 1 is 65")
    assert "expected 64" in first
    assert second == f"{missing}: No such file or directory"
    assert third == f"{written}: not written, as 2 of 4 requests failed"
    assert not written.exists()
    code, printed, _ = await run(*asked, "--json")
    told = json.loads(printed)
    assert (code, [list(entry) for entry in told]) == (
        1,
        [["input", "outputs"], ["input", "error"], ["input", "error"], ["input", "outputs"]],
    )
    assert told[1]["error"]["code"] == "invalid_input"
    for options, wrong in ((["--timeout", "nan"], "nan"), (["--pixel-std", "1,inf"], "inf")):
        code, printed, said = await run("infer", "digits", wide, *options, "--url", server.url)
        assert (code, printed) == (2, "")
        assert f"'{wrong}' is not a number." in said
    wide.with_suffix(".txt").write_bytes(b"\xff\xfe")
    code, printed, said = await run("infer", "digits", wide, "--labels", wide.with_suffix(".txt"), "--url", server.url)
    assert (code, "--labels: " in said, "Traceback" in said) == (2, True, False)
    code, printed, said = await run("infer", "digits", wide, "--url", server.url)
    assert (code, printed) == (1, "")
    assert said.startswith("Error: input 'pixels': axis 1 is 65")


async def test_an_error_says_what_to_do_next(server: Process, digits: tuple[list[Path], list[int]]) -> None:
    url = ("--url", server.url)
    code, printed, said = await run("infer", "digit", digits[0][0], *url)
    assert (code, printed) == (1, "")
    assert "loaded: 'digits', 'work'; did you mean 'digits'?\n`kapsl-scheduler models` lists" in said
    code, _, said = await run("infer", "digits", digits[0][0], "--timeout", "0.0000001", *url)
    assert (code, "Allow it more with --timeout" in said) == (1, True)
    code, _, said = await run("jobs", "show", "x", *url)  # of a server without jobs
    assert (code, said) == (1, "Error: this server runs no jobs: it was started with --no-cron\n")

    arguments = ["infer", "digits", str(digits[0][0]), *url]
    program = f"import sys; sys.modules['PIL'] = None; sys.argv[1:] = {arguments!r}; " + (
        "from kapsl_scheduler.cli import main; main()"
    )
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", program), stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE
    )
    _, bytes_said = await process.communicate()
    assert process.returncode == 1
    assert bytes_said == b"Error: images need pillow: pip install 'kapsl-scheduler[images]'\n"


async def test_numbers_that_are_no_scores_are_shown_as_they_are(server: Process, tmp_path: Path) -> None:
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    one.write_text('{"x": [[0.25, 3]], "turns": 0}')
    two.write_text('{"x": [[1.5]], "turns": 0}')
    url = ("--url", server.url)

    assert await run("infer", "work", one, *url) == (0, "y float32 1x2\n[[0.25 3.  ]]\n", "")
    code, printed, _ = await run("infer", "work", one, two, *url)
    assert (code, printed) == (0, f"{one}\ny float32 1x2\n[[0.25 3.  ]]\n{two}\ny float32 1x1\n[[1.5]]\n")
    written = tmp_path / "answers.npz"
    code, _, said = await run("infer", "work", one, two, "--output", written, *url)
    assert (code, "do not go into one array" in said) == (1, True)


async def test_long_work_has_a_bar_where_somebody_looks(server: Process, tmp_path: Path) -> None:
    row = tmp_path / "row.npy"
    np.save(row, np.zeros(64, np.float32))
    url = ("--url", server.url)

    code, printed = await in_terminal(("infer", "digits", row, row, "--json", *url))
    assert (code, len(json.loads(printed))) == (0, 2)
    code, printed = await in_terminal(("bench", "digits", "--seconds", "0.3", "--json", *url))
    assert (code, json.loads(printed)["errors"]) == (0, {})
    code, printed = await in_terminal(("tune", DIGITS, "--seconds", "0.3", "--json"))
    assert (code, json.loads(printed)["model"]) == (0, "digits")


async def test_a_run_that_is_waited_for_has_a_bar(tmp_path: Path) -> None:
    async with serving(build_working_model(tmp_path / "work.onnx"), "--store", "memory") as server:
        url = ("--url", server.url)
        given = json.dumps({"x": [[1]], "turns": 400})
        code, _, said = await run("jobs", "add", "long", "--every", "86400", "--input", given, *url)
        assert (code, said) == (0, "")
        code, printed = await in_terminal(("jobs", "run", "long", "--wait", "--json", *url))
    assert (code, json.loads(printed)["state"]) == (0, "succeeded")
