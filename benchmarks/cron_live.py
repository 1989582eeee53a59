"""Suite `cron-live`: what live requests pay for jobs that would keep the engine busy all the time, and what those get.

One job streams requests without end in the background class; live requests come one at a time from a caller that thinks
between them, as in suite `flood`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from functools import partial
from typing import Any, Final

from benchmarks import flood
from benchmarks.devices import Device, calibrate_sleep
from benchmarks.flood import Case, Trial
from benchmarks.flood import LiveOptions as Options
from benchmarks.loops import in_turns
from benchmarks.report import Label, Report
from kapsl_scheduler import CronJob, CronScheduler, Priority, Scheduler

__all__ = ["Options", "run"]

CASES: Final = tuple(case for case in flood.CASES if case.flood is Priority.BACKGROUND)


def run(options: Options) -> Report:
    """Every case without jobs and with them, round after round."""
    report = Report.begin("cron-live", options.settings())
    overshoot = calibrate_sleep(0.005)
    for case in CASES:
        trial = partial(_trial, options, case, overshoot)
        _report_case(report, case, in_turns(options.loop, ("none", "saturating"), options.rounds, trial))
    report.notes.append("share: of the engine time that live requests leave, what the job's requests had.")
    return report


def _report_case(report: Report, case: Case, trials: dict[str, list[Trial]]) -> None:
    p99: dict[str, float] = {}
    for jobs, rounds in trials.items():
        labels: dict[str, Label] = {"engine": case.name, "jobs": jobs}
        p99[jobs] = flood.report_live(report, labels, rounds).value
        report.add(labels, "share", "", [trial.share for trial in rounds], "higher")
        report.add(labels, "rows", "rows/s", [trial.flood_rate for trial in rounds], "higher")
    bound = 1.05 * p99["none"] + case.may_add * 1e3
    report.at_most(f"{case.name}, live p99 with jobs", p99["saturating"], bound, "ms")
    share = report.find("share", {"engine": case.name, "jobs": "saturating"})
    report.at_least(f"{case.name}, the jobs' share", share.value, 0.9)


async def _trial(options: Options, case: Case, overshoot: float, jobs: str, seed: int) -> Trial:
    device = Device(case.per_call, case.per_row, overshoot=overshoot)
    async with Scheduler([device.engine(1)], batch=case.batch) as scheduler, CronScheduler(scheduler) as cron:
        if jobs == "saturating":
            await cron.register(CronJob("saturating", 3600, _endless))
            await cron.trigger("saturating")
        trial = await flood.measured(scheduler, device, options, seed=seed)
        await cron.close(0.0)
    return trial


async def _endless(firing: Any) -> AsyncIterator[Any]:
    while True:
        yield flood.FLOOD_ROW
