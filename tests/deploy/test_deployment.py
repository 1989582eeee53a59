"""What is in `deploy/` fits the server: its settings, its routes, its times; and is what those who read it accept."""

from __future__ import annotations

import fnmatch
import json
import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from kapsl_scheduler.config import Config, load_config
from kapsl_scheduler.server.access import Role, made_token
from tests.server.api import serving

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
UNIT = DEPLOY / "systemd" / "kapsl-scheduler.service"
GOODBYE = 2 + 1  # seconds that the server may take beyond the drain
ANALYZE = shutil.which("systemd-analyze")


# ------------------------------------------------------------------------------------------------ the image


def instructions() -> list[tuple[str, str]]:
    text = (DEPLOY / "Dockerfile").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(line.split(None, 1)[0], re.sub(r"\s+", " ", line.split(None, 1)[1])) for line in lines]


def last(instruction: str) -> str:
    return [rest for name, rest in instructions() if name == instruction][-1]


def environment() -> dict[str, str]:
    return dict(pair.split("=", 1) for pair in shlex.split(last("ENV")))


def test_what_the_image_copies_is_there_and_is_not_ignored() -> None:
    copied = [shlex.split(rest)[:-1] for name, rest in instructions() if name == "COPY" and "--from" not in rest]
    paths = [path for paths in copied for path in paths]
    kept = [line[1:] for line in (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines() if line.startswith("!")]
    assert {"pyproject.toml", "src", "constraints.txt"} <= set(paths)
    for path in paths:
        assert (ROOT / path).exists(), path
        assert any(fnmatch.fnmatch(path, pattern) for pattern in kept), path


def test_the_image_installs_extras_that_there_are_on_a_python_that_is_supported() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (extras,) = re.findall(r"'\.\[([\w,]+)\]'", " ".join(rest for name, rest in instructions() if name == "RUN"))
    assert set(extras.split(",")) <= set(project["optional-dependencies"])
    stages = [rest.split()[0] for name, rest in instructions() if name == "FROM"]
    assert len(stages) == 2
    assert len(set(stages)) == 1  # the second stage runs what the first has built
    assert any(f":: {stages[0].partition(':')[2].split('-')[0]}" in entry for entry in project["classifiers"])
    assert [name for name, _ in instructions()].index("USER") > 0
    assert last("USER").split(":")[0] not in ("root", "0")
    (command,) = [rest for name, rest in instructions() if name == "ENTRYPOINT"]
    assert json.loads(command)[0] in project["scripts"]


def test_the_settings_of_the_image_are_settings() -> None:
    config = load_config(flags={}, environment=environment())
    assert (config.server.host, str(config.server.port)) == ("0.0.0.0", last("EXPOSE"))
    assert config.state_directory is not None
    assert f"--home-dir {config.state_directory}" in " ".join(rest for name, rest in instructions() if name == "RUN")


async def test_the_image_asks_a_route_for_its_health_that_there_is() -> None:
    asked = re.findall(r"http://127\.0\.0\.1:(\d+)(/[\w/]+)", last("HEALTHCHECK"))
    ((port, path),) = asked
    assert port == last("EXPOSE")
    async with serving() as server:
        assert (await server.client.get(path)).status_code == 200


# ------------------------------------------------------------------------------------------------ systemd


def settings_of_unit() -> dict[str, str]:
    pairs = [line.split("=", 1) for line in UNIT.read_text().splitlines() if "=" in line and not line.startswith("#")]
    return dict(pairs)


def test_systemd_waits_for_the_drain_and_keeps_the_state_where_the_server_looks() -> None:
    unit = settings_of_unit()
    key, _, value = unit["Environment"].partition("=")
    config = load_config(flags={}, environment={key: value})
    assert int(unit["TimeoutStopSec"]) > config.server.ready_grace + config.server.drain + GOODBYE
    assert config.state_directory == Path("/var/lib") / unit["StateDirectory"]
    assert " serve --config " in unit["ExecStart"]


@pytest.mark.slow
@pytest.mark.skipif(ANALYZE is None, reason="systemd-analyze is not installed")
def test_systemd_reads_the_unit_and_finds_it_well_protected(tmp_path: Path) -> None:
    assert ANALYZE is not None
    installed = tmp_path / UNIT.name
    installed.write_text(UNIT.read_text().replace("/opt/kapsl/bin/kapsl-scheduler", shutil.which("true") or ""))

    read = subprocess.run([ANALYZE, "verify", installed], capture_output=True, text=True, check=False)
    assert (read.returncode, [line for line in read.stderr.splitlines() if UNIT.name in line]) == (0, [])
    judged = subprocess.run(
        [ANALYZE, "security", "--offline=true", "--threshold=20", "--no-pager", installed],
        capture_output=True,
        text=True,
        check=False,
    )
    assert judged.returncode == 0, judged.stdout[-200:] + judged.stderr


# --------------------------------------------------------------------------------------------- Kubernetes


def manifests() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((DEPLOY / "kubernetes" / "kapsl-scheduler.yaml").read_text()))


def of_kind(kind: str) -> dict[str, Any]:
    (manifest,) = [manifest for manifest in manifests() if manifest["kind"] == kind]
    return manifest


def pod() -> dict[str, Any]:
    spec: dict[str, Any] = of_kind("Deployment")["spec"]["template"]["spec"]
    return spec


def container() -> dict[str, Any]:
    (only,) = pod()["containers"]
    found: dict[str, Any] = only
    return found


def config_of_pod(tmp_path: Path) -> Config:
    file = tmp_path / "kapsl.toml"
    file.write_text(of_kind("ConfigMap")["data"]["kapsl.toml"])
    return load_config(flags={}, environment=environment(), file=file)


def test_kubernetes_takes_the_manifests() -> None:
    validate = pytest.importorskip(
        "kubernetes_validate", reason="kubernetes-validate is not installed: it has 100 MB of schemas"
    )
    for manifest in manifests():
        validate.validate(manifest, "1.33", strict=True)


def test_a_pod_has_time_for_its_hook_its_grace_and_its_drain(tmp_path: Path) -> None:
    config = config_of_pod(tmp_path)
    (command, seconds) = container()["lifecycle"]["preStop"]["exec"]["command"]
    assert command == "sleep"
    needed = int(seconds) + config.server.ready_grace + config.server.drain + GOODBYE
    assert pod()["terminationGracePeriodSeconds"] > needed
    probe = container()["readinessProbe"]
    assert config.server.ready_grace > probe["periodSeconds"] * probe["failureThreshold"]
    assert not config.cron.enabled  # two servers would fire every job twice


def test_a_pod_takes_tokens_from_a_secret_that_may_be_there() -> None:
    (variable,) = container()["env"]
    _, line = made_token("ann", Role.READER)
    config = load_config(flags={}, environment={variable["name"]: line})
    assert [token.name for token in config.tokens] == ["ann"]
    assert variable["valueFrom"]["secretKeyRef"]["optional"] is True


async def test_the_probes_ask_routes_that_there_are() -> None:
    async with serving() as server:
        for name in ("startupProbe", "readinessProbe", "livenessProbe"):
            asked = container()[name]["httpGet"]
            assert (await server.client.get(asked["path"])).status_code == 200
            assert asked["port"] in {port["name"] for port in container()["ports"]}
        server.api.inference.service.draining = True
        answers = {
            name: await status(server.client, container()[name]["httpGet"]["path"])
            for name in ("readinessProbe", "livenessProbe")
        }
    assert answers == {"readinessProbe": 503, "livenessProbe": 200}


async def status(client: httpx.AsyncClient, path: str) -> int:
    return (await client.get(path)).status_code


def test_what_the_manifests_refer_to_is_there(tmp_path: Path) -> None:
    labels = of_kind("Deployment")["spec"]["template"]["metadata"]["labels"]
    for selector in (
        of_kind("Deployment")["spec"]["selector"]["matchLabels"],
        of_kind("PodDisruptionBudget")["spec"]["selector"]["matchLabels"],
        of_kind("Service")["spec"]["selector"],
    ):
        assert selector.items() <= labels.items()
    mounts = {mount["name"]: mount["mountPath"] for mount in container()["volumeMounts"]}
    assert set(mounts) == {volume["name"] for volume in pod()["volumes"]}
    flag, file, model = container()["args"]
    assert (flag, Path(file).parent, Path(model).parent) == (
        "--config",
        Path(mounts["config"]),
        Path(mounts["models"]),
    )
    assert Path(file).name in of_kind("ConfigMap")["data"]
    (port,) = container()["ports"]
    assert port["containerPort"] == config_of_pod(tmp_path).server.port
    assert of_kind("Service")["spec"]["ports"][0]["targetPort"] == port["name"]
    assert of_kind("PodDisruptionBudget")["spec"]["minAvailable"] < of_kind("Deployment")["spec"]["replicas"]
    assert str(pod()["securityContext"]["runAsUser"]) == last("USER").split(":")[0]
