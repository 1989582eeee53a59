"""Command line of the benchmarks: run suites, compare two runs, draw a run. What is measured lives in the suites."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib import util
from pathlib import Path
from typing import Any, Final

import msgspec

from benchmarks import (
    cron,
    cron_live,
    cron_next,
    crowd,
    digits,
    door,
    flood,
    grpc_calls,
    micro,
    overload,
    queue10k,
    serial,
    soak,
    store,
    streams,
)
from benchmarks.devices import DIGITS
from benchmarks.loops import LOOPS
from benchmarks.machine import ROOT, Neighbours
from benchmarks.peers import PEERS, PeerMissing, check_peers, installed_peers
from benchmarks.plot import draw
from benchmarks.report import Report, compare, load_report, print_report, save_report

RESULTS: Final = ROOT / "benchmarks" / "results" / "local"

SUITES: Final[dict[str, tuple[Callable[[Any], Report], Any]]] = {
    "micro": (micro.run, micro.Options()),
    "digits": (digits.run, digits.Options(model=DIGITS)),
    "serial": (serial.run, serial.Options()),
    "flood": (flood.run, flood.Options()),
    "queue10k": (queue10k.run, queue10k.Options()),
    "overload": (overload.run, overload.Options()),
    "store": (store.run, store.Options()),
    "cron-next": (cron_next.run, cron_next.Options()),
    "cron": (cron.run, cron.Options()),
    "cron-live": (cron_live.run, cron_live.Options()),
    "door": (door.run, door.Options()),
    "grpc": (grpc_calls.run, grpc_calls.Options()),
    "crowd": (crowd.run, crowd.Options()),
    "streams": (streams.run, streams.Options()),
    "soak": (soak.run, soak.Options()),
}
"""How each suite is run, and its options where the command line gives none."""

QUICK: Final[dict[str, Any]] = {
    "rounds": 1,
    "repeats": 5,
    "cycles": 3,
    "seconds": 0.5,
    "warmup": 0.2,
    "slow": 1.0,
    "year_days": 1.0,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit status: 1 if `--check` found a target missed, 2 for what cannot be run."""
    parsed = _parser().parse_args(arguments)
    try:
        status: int = parsed.command(parsed)
    except (PeerMissing, ImportError, OSError, ValueError) as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2
    return status


# ---------------------------------------------------------------------------------------------------- commands


def _run_suites(parsed: argparse.Namespace) -> int:
    given = {name: value for name, value in vars(parsed).items() if value is not None}
    check_peers(given.setdefault("peers", installed_peers()))
    missed = []
    # A soak takes as long as all others together, and is of a server.
    for name in [each for each in SUITES if each != "soak"] if parsed.suite == "all" else [parsed.suite]:
        run, defaults = SUITES[name]
        neighbours = Neighbours()
        report = run(_options(defaults, given, quick=parsed.quick))
        if said := neighbours.report():
            report.notes.append(said)
        path = save_report(report, parsed.out)
        print_report(report)
        print(f"\n   written to {path}")
        if util.find_spec("matplotlib") is not None:
            print(f"   drawn in {draw(report, path.with_suffix('.svg'))}")
        missed += report.missed()
    if not parsed.check:
        return 0
    print("\nall targets met" if not missed else f"\n{len(missed)} targets missed:")
    for target in missed:
        print(f"   {target}")
    return 1 if missed else 0


def _options(defaults: Any, given: dict[str, Any], *, quick: bool) -> Any:
    """The suite's options: its own, those of `--quick`, and over both what the command line says."""
    fields = defaults.__struct_fields__
    wanted = {**(QUICK if quick else {}), **given}
    if "loops" in given and "loop" in fields:
        wanted["loop"] = given["loops"][0]
    return msgspec.structs.replace(defaults, **{name: wanted[name] for name in fields if name in wanted})


def _compare(parsed: argparse.Namespace) -> int:
    before, after = load_report(parsed.before), load_report(parsed.after)
    if before.suite != after.suite:
        raise ValueError(f"different suites: {before.suite} and {after.suite}")
    for name, report in (("before", before), ("after", after)):
        print(f"   {name}: {report.started}, commit {report.machine.commit or 'unknown'}, {report.machine.cpu}")
    print(compare(before, after))
    return 0


def _plot(parsed: argparse.Namespace) -> int:
    for path in parsed.files:
        report = load_report(path)
        target = parsed.out or path.parent
        drawn = draw(report, target if target.suffix else target / path.with_suffix(f".{parsed.format}").name)
        print(f"   {drawn}")
    return 0


def _show(parsed: argparse.Namespace) -> int:
    for path in parsed.files:
        print_report(load_report(path))
    return 0


# ----------------------------------------------------------------------------------------------- command line


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name in [*SUITES, "all"]:
        summary = (
            "every suite" if name == "all" else (sys.modules[SUITES[name][0].__module__].__doc__ or "").split("\n")[0]
        )
        _add_suite(commands.add_parser(name, help=summary), name)
    comparison = commands.add_parser("compare", help="two runs of a suite: after over before, worst change first")
    comparison.add_argument("before", type=Path)
    comparison.add_argument("after", type=Path)
    comparison.set_defaults(command=_compare)
    plot = commands.add_parser("plot", help="draw runs")
    plot.add_argument("files", type=Path, nargs="+", metavar="FILE")
    plot.add_argument("--out", type=Path, help="a directory or a file; default: beside the run")
    plot.add_argument("--format", choices=("svg", "png", "pdf"), default="svg")
    plot.set_defaults(command=_plot)
    show = commands.add_parser("show", help="print the tables of runs again")
    show.add_argument("files", type=Path, nargs="+", metavar="FILE")
    show.set_defaults(command=_show)
    return parser


def _add_suite(suite: argparse.ArgumentParser, name: str) -> None:
    """The options that a suite's `Options` has, and those of every run."""
    fields = {field for key in (SUITES if name == "all" else [name]) for field in SUITES[key][1].__struct_fields__}
    suite.add_argument("--out", type=Path, default=RESULTS, help="a directory or a file.json; default: %(default)s")
    suite.add_argument("--check", action="store_true", help="exit 1 and name each target that was missed")
    suite.add_argument("--quick", action="store_true", help="one short round: to see that it runs, not for figures")
    suite.add_argument("--rounds", type=int, help="interleaved rounds; their median is reported")
    if "seconds" in fields:
        suite.add_argument("--seconds", type=float, help="of one trial")
    if "warmup" in fields:
        suite.add_argument("--warmup", type=float, help="seconds before each trial")
    if "year_days" in fields:
        suite.add_argument("--year-days", type=float, help="how much of a year is simulated")
    if {"loop", "loops"} & fields:
        suite.add_argument("--loops", type=_names, help=f"of {','.join(LOOPS)}; a suite on one loop takes the first")
    if "callers" in fields:
        suite.add_argument("--callers", type=_numbers, help="closed-loop callers, as 1,32,256")
    if "peers" in fields:
        suite.add_argument(
            "--peers", type=_peers, help=f"all, recommended, none, or of {','.join(PEERS)}; default: all installed"
        )
        suite.add_argument("--model", type=Path, help="the digits model, an ONNX file")
    if "floods" in fields:
        suite.add_argument("--floods", type=_numbers, help="callers that flood, as 64,256,1024")
        suite.add_argument("--live", choices=("closed", "poisson"), help="how live requests come")
    if "jobs" in fields:
        suite.add_argument("--jobs", type=int, help="that are due at once")
    if "share" in fields:
        suite.add_argument("--share", type=float, help="of its capacity that a server gets to do; 0.8 without it")
    if "multiples" in fields:
        suite.add_argument("--multiples", type=_fractions, help="offered load over capacity, as 0.5,1,2")
        suite.add_argument("--patterns", type=_names, help=f"of {','.join(overload.PATTERNS)}")
    suite.set_defaults(command=_run_suites, suite=name)


def _names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _numbers(text: str) -> list[int]:
    return [int(part) for part in _names(text)]


def _fractions(text: str) -> list[float]:
    return [float(part) for part in _names(text)]


def _peers(text: str) -> list[str]:
    named = {"all": list(PEERS), "none": [], "recommended": [name for name in PEERS if PEERS[name].recommended]}
    return named.get(text, _names(text))


if __name__ == "__main__":
    sys.exit(main())
