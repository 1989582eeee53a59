"""A zone's offsets as tables, and the occurrences of a pattern in UTC under either firing rule.

*Every pass*: each UTC second whose local time matches; what falls in a gap is left out, what falls in a fold comes
twice. *Once*: each matching local time once; one that falls in a gap comes at the first valid moment after it
(several of one gap are then one occurrence), one that falls in a fold comes in its first pass.
Which rule an expression follows is core.cron's. Seconds are since 1970, of UTC or of the local timeline.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from datetime import UTC, datetime, timedelta, timezone, tzinfo
from functools import lru_cache
from typing import Final

from kapsl_scheduler.core.cron_parser import FIRST_YEAR, LAST_YEAR
from kapsl_scheduler.core.cron_pattern import DAY, Pattern

__all__ = ["EPOCH", "Zone", "elapsed", "zone_of"]

EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_BEGIN: Final = datetime(FIRST_YEAR - 1, 12, 1)  # noqa: DTZ001 - the clock is given each zone in turn
_END: Final = datetime(LAST_YEAR + 1, 2, 1)  # noqa: DTZ001
_STEP: Final = timedelta(days=3)
"""How far apart the zone is asked for its offset. No two changes since 1970 were closer than 6.9 days (Brazil in
2000, Gaza in 2040), so no pair of them that cancels out can hide between two looks."""
_LONG_AGO: Final = -(1 << 50)


def elapsed(moment: datetime) -> timedelta:
    """The time since 1970 UTC. Raises `ValueError` for what is no datetime with a zone."""
    try:
        return moment - EPOCH
    except TypeError:
        came = f"{moment!r}, which has no zone" if isinstance(moment, datetime) else type(moment).__name__
        raise ValueError(f"expected a datetime with a zone (tzinfo), got {came}") from None


@lru_cache(maxsize=640)  # more than there are zones
def zone_of(tz: tzinfo) -> Zone:
    """The table of a zone; equal zones share one."""
    return Zone(tz)


class Zone:
    """The periods of one offset each. Period i begins at UTC second `starts[i]` (the first: long ago) and has
    `offsets[i]` seconds east of UTC."""

    __slots__ = ("_clocks", "highs", "lows", "offsets", "starts")

    def __init__(self, tz: tzinfo) -> None:
        self.starts, self.offsets = _offsets(tz)
        self.lows = [start + offset for start, offset in zip(self.starts, self.offsets, strict=True)]
        self.highs = [start + offset for start, offset in zip(self.starts[1:], self.offsets, strict=False)]
        """The local time at which each period begins, and at which each but the last ends. Both ascend, since no
        period is as short as the change at its end."""
        epochs = {offset: timezone(timedelta(seconds=offset)) for offset in self.offsets}
        self._clocks = {offset: EPOCH.replace(tzinfo=tz) for offset, tz in epochs.items()}

    def at(self, second: int) -> datetime:
        """The moment on the zone's clock, with that moment's offset as a fixed one."""
        offset = self.offsets[bisect_right(self.starts, second) - 1]
        return self._clocks[offset] + timedelta(seconds=second + offset)

    # ---------------------------------------------------------------------------------------------- every pass

    def next_pass(self, pattern: Pattern, second: int) -> int | None:
        """The first UTC second from `second` on whose local time matches."""
        lows, highs, offsets = self.lows, self.highs, self.offsets
        period = bisect_right(self.starts, second) - 1
        local = second + offsets[period]
        while True:
            found = pattern.next(local)
            if found is not None and (period == len(highs) or found < highs[period]):
                return found - offsets[period]
            if period == len(highs):
                return None
            if lows[period + 1] < local:  # a fold: what was passed comes again
                period += 1
                local = lows[period]
                continue
            if found is None:
                return None
            period = max(period + 1, bisect_right(highs, found))
            if found >= lows[period]:
                return found - offsets[period]
            local = lows[period]  # it fell in the gap before

    def previous_pass(self, pattern: Pattern, second: int) -> int | None:
        """The last UTC second up to `second` whose local time matches."""
        lows, highs, offsets = self.lows, self.highs, self.offsets
        period = bisect_right(self.starts, second) - 1
        local = second + offsets[period]
        while True:
            found = pattern.previous(local)
            if found is None and (not period or highs[period - 1] <= local + 1):
                return None
            if found is not None and found >= lows[period]:
                return found - offsets[period]
            if highs[period - 1] > local + 1:  # a fold: what comes later was there before
                period -= 1
                local = highs[period] - 1
                continue
            assert found is not None
            period = bisect_right(lows, found, 0, period) - 1
            if found < highs[period]:
                return found - offsets[period]
            local = highs[period] - 1  # it fell in the gap behind

    def count_passes(self, pattern: Pattern, first: int, last: int) -> int:
        """How many UTC seconds from `first` to `last` (inclusive) have a local time that matches."""
        if first > last:
            return 0
        from_period = bisect_right(self.starts, first) - 1
        to_period = bisect_right(self.starts, last) - 1
        count = _signed(pattern, first + self.offsets[from_period], last + 1 + self.offsets[to_period])
        for period in range(from_period, to_period):
            count += _signed(pattern, self.lows[period + 1], self.highs[period])
        return count

    # ---------------------------------------------------------------------------------------------------- once
    # Period i owns the local times from the end of period i - 1 to its own end: a fold's second pass is left out,
    # a gap's times are owned by the period after it and come at its start.

    def next_once(self, pattern: Pattern, second: int) -> int | None:
        """The first occurrence from UTC second `second` on, each matching local time being one."""
        period = bisect_right(self.starts, second) - 1
        local = second + self.offsets[period]
        if period and (second == self.starts[period] or local < self.highs[period - 1]):
            local = self.highs[period - 1]
        found = pattern.next(local)
        if found is None:
            return None
        period = bisect_right(self.highs, found)
        return max(found - self.offsets[period], self.starts[period])

    def previous_once(self, pattern: Pattern, second: int) -> int | None:
        """The last occurrence up to UTC second `second`, each matching local time being one."""
        period = bisect_right(self.starts, second) - 1
        local = second + self.offsets[period]
        if period:
            local = max(local, self.highs[period - 1] - 1)
        found = pattern.previous(local)
        if found is None:
            return None
        period = bisect_right(self.highs, found)
        return max(found - self.offsets[period], self.starts[period])

    def count_once(self, pattern: Pattern, first: int, last: int) -> int:
        """How many occurrences there are from UTC second `first` to `last` (inclusive)."""
        if first > last:
            return 0
        starts, offsets, highs = self.starts, self.offsets, self.highs
        period = bisect_right(starts, first) - 1
        begin = first + offsets[period]
        if period and (first == starts[period] or begin < highs[period - 1]):
            begin = highs[period - 1]
        period = bisect_right(starts, last) - 1
        end = last + 1 + offsets[period]
        if period:
            end = max(end, highs[period - 1])
        count = pattern.count(begin, end)
        for period in range(bisect_left(starts, first), bisect_right(starts, last)):
            together = pattern.count(highs[period - 1], self.lows[period] + 1)  # at the gap's end
            count -= max(0, together - 1)
        return count


def _signed(pattern: Pattern, start: int, stop: int) -> int:
    """The occurrences from `start` to `stop`; negative where `stop` comes first."""
    return pattern.count(start, stop) if start <= stop else -pattern.count(stop, start)


def _offsets(tz: tzinfo) -> tuple[list[int], list[int]]:
    """When the zone's offset changes, and to what. Raises what the zone raises, and `ValueError` for an offset that
    is no whole number of seconds."""
    # The fields of these datetimes are UTC though they carry the zone: so `fromutc` wants them.
    moment, end, epoch = (one.replace(tzinfo=tz) for one in (_BEGIN, _END, EPOCH))
    fromutc = tz.fromutc

    def offset_at(second: int) -> timedelta | None:
        return fromutc(epoch + timedelta(0, second)).utcoffset()

    current = fromutc(moment).utcoffset()
    starts, offsets = [_LONG_AGO], [_whole(current)]
    while not isinstance(tz, timezone) and moment < end:
        moment += _STEP
        now = fromutc(moment).utcoffset()
        while now != current:  # more than once, should two changes be that close
            high = round((moment - epoch).total_seconds())
            low = max(starts[-1], high - _STEP.days * DAY)
            while high - low > 1:
                middle = (low + high) // 2
                if offset_at(middle) == current:
                    low = middle
                else:
                    high = middle
            current = offset_at(high)
            starts.append(high)
            offsets.append(_whole(current))
    return starts, offsets


def _whole(offset: timedelta | None) -> int:
    """The offset in seconds."""
    if offset is None:
        raise ValueError("it says no offset")
    if offset.microseconds:
        raise ValueError("its offset has a fraction of a second")
    return offset.days * DAY + offset.seconds
