"""Where a figure was measured: the machine, the interpreter, the packages, the commit, the command line; and who else
used the machine meanwhile."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Final

import msgspec

__all__ = ["ROOT", "Machine", "Neighbours", "describe_machine"]

ROOT: Final = Path(__file__).resolve().parent.parent
_PACKAGES: Final = (
    "kapsl-scheduler",
    "numpy",
    "msgspec",
    "onnxruntime",
    "uvloop",
    "batched",
    "async-batcher",
    "ray",
)


class Machine(msgspec.Struct, frozen=True):
    """`load_average` is that of the last minute when the run began: above a few tenths, others were at work."""

    cpu: str
    cores: int
    system: str
    python: str
    packages: dict[str, str]
    commit: str
    command: str
    load_average: float


def describe_machine() -> Machine:
    """This machine, now. What cannot be found out is empty."""
    return Machine(
        cpu=_cpu_model(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 0,
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=f"{platform.python_implementation()} {platform.python_version()}",
        packages=_versions(),
        commit=_commit(),
        command=" ".join(["python -m benchmarks", *sys.argv[1:]]),
        load_average=round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else 0.0,
    )


class Neighbours:
    """What else the machine did since this was made: a figure may be a neighbour's rather than the machine's."""

    def __init__(self) -> None:
        self._before = _usage()

    def report(self) -> str | None:
        """One sentence; None where the system does not say."""
        before, now = self._before, _usage()
        if before is None or now is None:
            return None
        elapsed, everybody, own, faults = (after - earlier for earlier, after in zip(before, now, strict=True))
        share = max(everybody - own, 0.0) / max(elapsed, 1e-9)
        return (
            f"Others, the hypervisor among them, used {share:.0%} of a core during the run; this process used "
            f"{own / max(elapsed, 1e-9):.0%} and waited for the disk {faults:.0f} times."
        )


def _usage() -> tuple[float, float, float, float] | None:
    """Seconds now, processor seconds of everybody and of this process, and its major page faults; Linux only."""
    try:
        import resource

        fields = Path("/proc/stat").read_text(encoding="ascii").splitlines()[0].split()[1:9]
    except (ImportError, OSError):
        return None
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, fields)
    everybody = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    own = resource.getrusage(resource.RUSAGE_SELF)
    return time.perf_counter(), everybody, own.ru_utime + own.ru_stime, float(own.ru_majflt)


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")


def _versions() -> dict[str, str]:
    versions: dict[str, str] = {}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _commit() -> str:
    """The commit's short hash, with `+` if the tree has changes."""
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        return head + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
