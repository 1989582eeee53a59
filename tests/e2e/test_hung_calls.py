"""How the process ends while calls hang: in order, with its own exit code, whatever their threads do meanwhile.

When Python ends, it ends daemon threads as soon as they come back to it. Where that is from within C++ code, the
process is aborted; so these tests see to it that a call which comes back would do so in just that time.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

import pytest

from kapsl_scheduler.client import Client
from kapsl_scheduler.errors import Unavailable
from tests.e2e.process import PATIENCE, build_working_model, counted, serving, until, work

pytestmark = pytest.mark.slow

TURNS = 60_000  # of the working model: some seconds, and longer than the server waits for a call on any machine

# Imported by each process at its start: from when the interpreter ends its threads, it takes longer to end than a call.
LONG_END = """
import atexit
import time

class End:
    def __del__(self, sleep=time.sleep):
        sleep(25)

end = End()
atexit.register(print, "a last line")
"""


@pytest.fixture(autouse=True)
def _long_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(LONG_END)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH")))))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_working_model(tmp_path_factory.mktemp("model") / "work.onnx")


async def test_a_server_whose_engine_hangs_ends_in_order_and_names_it(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stores, temporary = tmp_path / "stores", tmp_path / "temporary"
    stores.mkdir()
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    arguments = ("--drain", "0.05", "--store", stores / "jobs.db")
    async with serving(f"work={model}", *arguments) as server, Client(server.url) as client:
        running = asyncio.create_task(client.infer("work", work(1, TURNS)))
        await until(counted(client, "calls_in_flight", 1))

        server.send(signal.SIGTERM)

        with pytest.raises(Unavailable, match="closed"):
            await running
        code, said = await server.end()

    assert (code, server.last_lines.splitlines()[-1]) == (0, "a last line")
    hangs, ends = said.splitlines()
    assert "OnnxEngine-0.0: a call hangs; its slot is left behind: OnnxEngine(" in hangs
    assert "name='work'" in hangs
    assert ends.endswith("the process ends although calls hang, in these threads: kapsl-OnnxEngine-0.0")
    assert [path.name for path in stores.iterdir()] == ["jobs.db"]
    assert list(temporary.glob("kapsl-*")) == []


async def leave(where: str, end: str, model: Path, stdout: int) -> tuple[int | None, str]:
    """The exit code of a command that ends while a function hangs, and what it said."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, str(Path(__file__).with_name("hanging_child.py")), where, end, str(model)),
        stdout=stdout,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(PATIENCE):
            _, stderr = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return process.returncode, stderr.decode()


@pytest.mark.parametrize("where", ["model", "lock", "print"])
async def test_a_command_ends_though_a_function_hangs(where: str, model: Path) -> None:
    unread, stdout = os.pipe()
    try:
        code, said = await leave(where, "exit", model, stdout)
    finally:
        os.close(stdout)
        os.close(unread)

    assert code == 3
    assert said == "the process ends although calls hang, in these threads: kapsl-call-hang\n"


async def test_a_fault_of_a_command_is_shown_though_a_function_hangs(model: Path) -> None:
    code, said = await leave("model", "raise", model, asyncio.subprocess.DEVNULL)

    assert code == 1
    assert said.startswith("Traceback")
    assert "ZeroDivisionError: a fault\n" in said
    assert said.endswith("in these threads: kapsl-call-hang\n")
