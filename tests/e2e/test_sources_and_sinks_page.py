"""What docs/sources-and-sinks.md shows is what there is."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from PIL import Image

from kapsl_scheduler import CronJob, Scheduler
from kapsl_scheduler.adapters import builtin_adapters
from kapsl_scheduler.engines import CallableEngine
from kapsl_scheduler.sinks import JsonLinesSink, ParquetSink, WebhookSink
from kapsl_scheduler.sources import FolderSource
from tests.sinks.answers import answers, firing, receiver

PAGE = (Path(__file__).parents[2] / "docs" / "sources-and-sinks.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
JSON = re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)


def run(code: str) -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(compile(code, "sources-and-sinks.md", "exec"), names)
    return names


def test_every_definition_can_be_read() -> None:
    source, *sinks = [msgspec.json.decode(text) for text in JSON]
    assert type(builtin_adapters("source", source)) is FolderSource
    assert [type(builtin_adapters("sink", sink)) for sink in sinks] == [JsonLinesSink, ParquetSink, WebhookSink]


@pytest.mark.parametrize(
    ("kind", "settings"),
    [("source", {"type": "moon"}), ("sink", {"type": "folder", "path": "x"}), ("sink", {"type": "jsonl"})],
)
def test_what_is_none_of_them_is_refused(kind: str, settings: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"\$|missing"):
        builtin_adapters(kind, settings)


async def test_a_stored_job_scores_its_folder_after_a_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "inbox").mkdir()
    np.save(tmp_path / "inbox" / "one.npy", np.ones((3, 2), np.float32))
    jobs_of = run(PYTHON[2])["jobs_of"]
    job = CronJob("score", "@daily", FolderSource(path="inbox"), sink=JsonLinesSink("out.jsonl"))
    async with Scheduler([CallableEngine(lambda x: x * 2)]) as scheduler:
        async with jobs_of(scheduler) as cron:
            await cron.register(job)
        async with jobs_of(scheduler) as cron:  # nothing is registered again
            (info,) = await cron.list_jobs()
            assert info.waiting_for is None
            await cron.trigger("score")
    assert (tmp_path / "out.jsonl").read_text().count("\n") == 3


def test_the_first_snippet_reads_images_and_writes_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = run(PYTHON[0])
    (tmp_path / "inbox" / "today").mkdir(parents=True)
    Image.fromarray(np.full((28, 28), 255, np.uint8)).save(tmp_path / "inbox" / "today" / "one.png")
    (item,) = names["source"].items(firing(), {})
    assert item.key == "today/one.png"
    np.testing.assert_allclose(item.request, np.full((1, 64), 16.0), rtol=1e-6)
    writer = names["sink"].open(firing(), {})
    writer.write(answers(1))
    writer.flush()
    writer.close()
    assert (tmp_path / "results" / "job-20261125T030000Z.jsonl").read_text().count("\n") == 1


def test_the_receiver_takes_what_is_sent_and_drops_repeats(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    receive = run(PYTHON[1])["receive"]
    monkeypatch.setenv("SCORES_SECRET", "the secret")
    with receiver() as server:
        writer = WebhookSink(server.url, secret_env="SCORES_SECRET").open(firing(), {})
        writer.write(answers(1))
        writer.flush()
        (post,) = server.posts
    headers = {
        "X-Kapsl-Signature": post.headers["x-kapsl-signature"],
        "Idempotency-Key": post.headers["idempotency-key"],
    }
    assert [receive(headers, post.raw), receive(headers, post.raw), receive(headers, b"other")] == [200, 200, 401]
    assert capsys.readouterr().out == f"{post.raw!r}\n"
