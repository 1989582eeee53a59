"""What a change of a job must say, and runs that are named twice."""

from __future__ import annotations

from typing import Any

import pytest

from kapsl_scheduler.core.runs import Change, JobState, Removal, Run, RunState, repeated

STATE = JobState(anchor=0, cursor=0)


def run(nominal: int, origin: str = "schedule", **fields: Any) -> Run:
    return Run(job="a", nominal=nominal, origin=origin, state=RunState.PENDING, first=nominal, due=nominal, **fields)


@pytest.mark.parametrize("fields", [{"state": STATE}, {"definition": b"{}"}])
def test_a_new_job_takes_a_state_and_a_definition(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="'a': a new job takes a state and a definition"):
        Change(job="a", expected=0, **fields)
    Change(job="a", expected=0, state=STATE, definition=b"{}")
    Change(job="a", expected=0, remove=Removal(0), **fields)
    Change(job="a", expected=3, **fields)
    Change(job="a", expected=0, created=(run(1),))


@pytest.mark.parametrize("fields", [{"state": STATE}, {"definition": b"{}"}, {"remove": Removal(0)}])
def test_whoever_changes_a_job_says_which_version_of_it(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="'a': whoever changes a job says which version"):
        Change(job="a", expected=None, **fields)
    Change(job="a", expected=None, created=(run(1),), memory={"x": "y"})


def test_repeated_finds_the_first_run_that_is_named_twice() -> None:
    twice = run(1, owner="second")
    assert repeated(()) is None
    assert repeated((run(1), run(2), run(1, "trigger"))) is None
    assert repeated((run(1), run(2), twice, run(2))) is twice
