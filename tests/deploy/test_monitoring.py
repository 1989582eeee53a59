"""The alert rules and the Grafana dashboard: their queries are sound, and ask for what `/metrics` has."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests.server.api import serving_jobs
from tests.server.test_cron_http import ended, post, put

DEPLOY = Path(__file__).parents[2] / "deploy"
ALERTS, CASES = DEPLOY / "prometheus" / "alerts.yml", DEPLOY / "prometheus" / "alerts_test.yml"
DASHBOARD = DEPLOY / "grafana" / "kapsl-scheduler.json"
PROMTOOL = shutil.which("promtool")
needs_promtool = pytest.mark.skipif(
    PROMTOOL is None, reason="promtool is not installed (Debian's package prometheus has it)"
)

_SERIES = re.compile(r"\b((?:kapsl|process|python)_\w+|up\b)\s*(?:\{([^}]*)\})?")
_MATCHER = re.compile(r"(\w+)\s*(?:=~|!~|!=|=)")
_GROUPED = re.compile(r"\bby \(([^)]*)\)")
_OF_THE_TARGET = {"instance", "job"}  # which Prometheus adds


def rules() -> list[dict[str, Any]]:
    (group,) = yaml.safe_load(ALERTS.read_text())["groups"]
    found: list[dict[str, Any]] = group["rules"]
    return found


def panels() -> list[dict[str, Any]]:
    return [panel for panel in json.loads(DASHBOARD.read_text())["panels"] if panel["type"] != "row"]


def queries() -> Iterator[str]:
    yield from (rule["expr"] for rule in rules())
    yield from (target["expr"] for panel in panels() for target in panel["targets"])


async def exposed() -> dict[str, set[str]]:
    """Each series that `/metrics` has, with its labels."""
    async with serving_jobs() as server:
        await put(server)
        await ended(server, (await post(server, "/trigger")).json()["number"])
        await server.infer()
        page = (await server.client.get("/metrics")).text
    found: dict[str, set[str]] = {"up": set(), "kapsl_http_connections": set()}  # the latter needs a real server
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


async def test_every_query_asks_for_series_and_labels_that_there_are() -> None:
    there = await exposed()
    for query in queries():
        series = _SERIES.findall(query)
        assert series, query
        labels: set[str] = set(_OF_THE_TARGET)
        for name, matchers in series:
            assert name in there, query
            labels |= there[name]
            assert set(_MATCHER.findall(re.sub(r'"[^"]*"', "", matchers))) <= there[name] | _OF_THE_TARGET, query
        for grouped in _GROUPED.findall(query):
            assert {label.strip() for label in grouped.split(",")} <= labels, query


async def test_what_the_alerts_and_legends_name_is_in_their_queries() -> None:
    there = await exposed()
    named = [(rule["expr"], json.dumps(rule["annotations"])) for rule in rules()]
    named = [(expression, " ".join(re.findall(r"\$labels\.(\w+)", text))) for expression, text in named]
    for panel in panels():
        for target in panel["targets"]:
            named.append((target["expr"], " ".join(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))))
    for expression, labels in named:
        of_series = set().union(*(there[name] for name, _ in _SERIES.findall(expression)))
        assert set(labels.split()) <= of_series | _OF_THE_TARGET, expression


def test_every_alert_has_a_case_in_which_it_fires_and_one_in_which_it_does_not() -> None:
    cases: dict[str, set[bool]] = {}
    for test in yaml.safe_load(CASES.read_text())["tests"]:
        for case in test["alert_rule_test"]:
            cases.setdefault(case["alertname"], set()).add(bool(case["exp_alerts"]))
    assert cases == {rule["alert"]: {True, False} for rule in rules()}
    for rule in rules():
        assert rule["labels"]["severity"] in {"critical", "warning", "info"}
        assert set(rule["annotations"]) == {"summary", "description"}


@needs_promtool
@pytest.mark.parametrize("arguments", [("check", "rules", ALERTS.name), ("test", "rules", CASES.name)])
def test_promtool_accepts_the_rules_and_their_cases(arguments: tuple[str, ...]) -> None:
    promtool(*arguments, folder=ALERTS.parent)


@needs_promtool
def test_promtool_can_read_every_query_of_the_dashboard(tmp_path: Path) -> None:
    asked = [target["expr"] for panel in panels() for target in panel["targets"]]
    recorded = [
        {"record": f"panel:{number}", "expr": expression.replace("$__rate_interval", "1m")}
        for number, expression in enumerate(asked)
    ]
    file = tmp_path / "queries.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": recorded}]}))
    assert f"{len(asked)} rules found" in promtool("check", "rules", file.name, folder=tmp_path)


def promtool(*arguments: str, folder: Path) -> str:
    assert PROMTOOL is not None
    ran = subprocess.run([PROMTOOL, *arguments], cwd=folder, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def test_the_panels_of_the_dashboard_do_not_cover_each_other() -> None:
    taken: set[tuple[int, int]] = set()
    everything = json.loads(DASHBOARD.read_text())["panels"]
    assert len({panel["id"] for panel in everything}) == len(everything)
    for panel in everything:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert place["x"] + place["w"] <= 24
        taken |= cells
