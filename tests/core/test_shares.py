"""Engine time by class over a sliding window, and cost by tenant."""

from __future__ import annotations

from kapsl_scheduler.core.shares import ShareWindow, TenantLedger
from tests.core.build import BACKGROUND, LIVE, THROUGHPUT

NOBODY = (False, False, False)
ALL = (True, True, True)


def window(throughput: float = 0.1, background: float = 0.1) -> ShareWindow:
    return ShareWindow({THROUGHPUT: throughput, BACKGROUND: background})


# ------------------------------------------------------------------------------------------------ shares


def test_nothing_is_due_before_anything_ran() -> None:
    assert not any(window().due(priority) for priority in (LIVE, THROUGHPUT, BACKGROUND))


def test_a_backlogged_class_that_got_less_than_its_share_is_due() -> None:
    shares = window()
    shares.record(0.0, [0.95, 0.05, 0.0], ALL)
    assert shares.due(THROUGHPUT)
    assert shares.due(BACKGROUND)
    assert not shares.due(LIVE)


def test_a_class_that_got_just_its_share_is_not() -> None:
    shares = window(0.25, 0.25)
    shares.record(0.0, [0.5, 0.25, 0.25], ALL)
    assert not shares.due(THROUGHPUT)
    assert not shares.due(BACKGROUND)
    shares.record(0.0, [0.5, 0.0, 0.0], ALL)
    assert shares.due(THROUGHPUT)


def test_time_while_a_class_had_no_work_is_not_owed_to_it() -> None:
    shares = window()
    shares.record(0.0, [1.0, 0.0, 0.0], NOBODY)
    shares.record(0.0, [1.0, 0.0, 0.0], (True, False, True))
    assert not shares.due(THROUGHPUT)
    assert shares.due(BACKGROUND)


def test_rows_that_ran_count_even_where_none_were_left_over() -> None:
    shares = window()
    shares.record(0.0, [0.5, 0.5, 0.0], NOBODY)
    shares.record(0.0, [3.0, 0.0, 0.0], (False, True, False))
    assert not shares.due(THROUGHPUT)  # 0.5 of 4.0 s
    shares.record(0.0, [2.0, 0.0, 0.0], (False, True, False))
    assert shares.due(THROUGHPUT)  # 0.5 of 6.0 s


def test_a_share_of_nothing_is_never_due() -> None:
    shares = ShareWindow({THROUGHPUT: 0.0})
    shares.record(0.0, [1.0, 0.0, 0.0], ALL)
    assert not shares.due(THROUGHPUT)
    assert not shares.due(BACKGROUND)  # none was given


def calls(shares: ShareWindow, count: int, start: float, every: float, cost: list[float]) -> float:
    """Calls one after another; returns when the last one ended."""
    for number in range(count):
        shares.record(start + number * every, cost, ALL)
    return start + (count - 1) * every


def test_what_was_served_long_ago_counts_no_more() -> None:
    """Two seconds of its own first; then sixty-five of others' calls push it out of the window."""
    shares = window()
    calls(shares, 100, 0.0, 0.02, [0.0, 0.02, 0.0])
    assert not shares.due(THROUGHPUT)
    end = calls(shares, 50, 2.0, 0.02, [0.02, 0.0, 0.0])
    assert not shares.due(THROUGHPUT)
    calls(shares, 50, end + 0.02, 0.02, [0.02, 0.0, 0.0])
    assert shares.due(THROUGHPUT)


def test_calls_of_a_second_each_are_remembered_long_enough_for_a_share_to_show() -> None:
    """One call in twenty is a share of 0.05: the window must hold more than the last second."""
    shares = window(0.05)
    shares.record(0.0, [0.0, 1.0, 0.0], ALL)
    calls(shares, 19, 1.0, 1.0, [1.0, 0.0, 0.0])
    assert not shares.due(THROUGHPUT)
    shares.record(20.0, [1.0, 0.0, 0.0], ALL)
    assert shares.due(THROUGHPUT)


def test_short_calls_share_a_record_so_that_the_window_is_a_second_long() -> None:
    """A thousand calls of a millisecond: far more than there are records, and yet all within the last second."""
    shares = window()
    shares.record(0.0, [0.0, 0.5, 0.0], ALL)
    calls(shares, 900, 0.001, 0.001, [0.001, 0.0, 0.0])
    assert not shares.due(THROUGHPUT)
    calls(shares, 300, 0.901, 0.001, [0.001, 0.0, 0.0])
    assert shares.due(THROUGHPUT)


# ------------------------------------------------------------------------------------------------ tenants


def served(ledger: TenantLedger, **costs: float) -> None:
    for tenant in costs:
        ledger.arrive(tenant)
    for tenant, cost in costs.items():
        ledger.charge(tenant, cost)


def test_tenants_pay_for_what_they_were_served() -> None:
    ledger = TenantLedger()
    ledger.arrive("a")
    ledger.arrive(None)
    ledger.charge("a", 0.5)
    ledger.charge("a", 0.25)
    ledger.charge("unknown", 1.0)
    assert ledger.cost == {"a": 0.75, None: 0.0}


def test_a_newcomer_starts_level_with_the_least_served_of_the_active() -> None:
    ledger = TenantLedger()
    served(ledger, a=3.0, b=2.0, idle=1.0)
    ledger.leave("idle")
    ledger.arrive("new")
    assert ledger.cost["new"] == 2.0


def test_who_comes_back_is_not_owed_its_absence_nor_forgiven_its_cost() -> None:
    ledger = TenantLedger()
    served(ledger, steady=5.0, frugal=1.0, greedy=9.0)
    ledger.leave("frugal")
    ledger.leave("greedy")
    ledger.arrive("frugal")
    ledger.arrive("greedy")
    assert ledger.cost == {"steady": 5.0, "frugal": 5.0, "greedy": 9.0}


def test_a_tenant_is_active_until_its_last_request_leaves() -> None:
    ledger = TenantLedger()
    ledger.arrive("a")
    ledger.arrive("a")
    ledger.leave("a")
    ledger.charge("a", 4.0)
    ledger.arrive("b")
    assert ledger.cost["b"] == 4.0
    ledger.leave("a")
    ledger.leave("b")
    ledger.arrive("c")
    assert ledger.cost["c"] == 0.0


def test_idle_tenants_are_forgotten_the_longest_idle_first() -> None:
    ledger = TenantLedger()
    ledger.arrive("active")
    for number in range(5000):
        ledger.arrive(number)  # type: ignore[arg-type]
        ledger.leave(number)  # type: ignore[arg-type]
    ledger.arrive("new")
    assert len(ledger.cost) <= 4096 + 2
    assert "active" in ledger.cost
    assert 4999 in ledger.cost
    assert 0 not in ledger.cost
