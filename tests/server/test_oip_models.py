"""Models as the Open Inference Protocol shows them."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from kapsl_scheduler.runtime.registry import ServedModel
from kapsl_scheduler.server.oip_models import model_config
from tests.server.api import serving


@pytest.mark.parametrize(
    ("version", "policy"),
    [
        ("3", {"specific": {"versions": [3]}}),
        ("1.2.0", {}),
        ("²", {}),
        ("9" * 25, {}),
    ],
)
async def test_a_version_that_is_no_number_of_the_protocol_has_no_policy(version: str, policy: Any) -> None:
    async with serving() as server:
        model = server.registry.get("m")
        info = msgspec.structs.replace(model.info, version=version)
        assert model_config(ServedModel(model.name, info, model.scheduler))["version_policy"] == policy
