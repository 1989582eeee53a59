"""The routes of a server as an OpenAPI document, at `/openapi.json`: what each takes, gives and asks of its caller.

Only the routes that are there are in it. What is not here: the routes themselves, and the pages of the dashboard.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, Final, NamedTuple

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Match

from kapsl_scheduler.core.definition import Definition
from kapsl_scheduler.runtime.cron_views import CronJobInfo, CronRun
from kapsl_scheduler.runtime.registry import ModelRegistry
from kapsl_scheduler.server.access import role_for
from kapsl_scheduler.server.answers import JSON

__all__ = ["OPERATIONS", "Document", "Operation"]

_TEXT: Final = {"type": "string"}
_WHOLE: Final = {"type": "integer"}
_NUMBER: Final = {"type": "number"}
_FLAG: Final = {"type": "boolean"}
_ANY_OBJECT: Final = {"type": "object"}
_MOMENT: Final = {"type": "string", "format": "date-time"}
_UNSIGNED: Final = {"type": "integer", "minimum": 0}


def _list(item: Any) -> dict[str, Any]:
    return {"type": "array", "items": item}


def _or_null(schema: Any) -> dict[str, Any]:
    return {"anyOf": [schema, {"type": "null"}]}


def _object(required: Mapping[str, Any], /, **optional: Any) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "object", "properties": {**required, **optional}}
    if required:
        schema["required"] = list(required)
    return schema


def _named(name: str) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{name}"}


class Operation(NamedTuple):
    """One method of one path. `body` and `answer` are schemas; `kind` is the answer's type; `query` has a schema for
    each parameter."""

    method: str
    path: str
    tag: str
    summary: str
    answer: Any = _ANY_OBJECT
    body: Any = None
    status: int = 200
    query: Mapping[str, Any] = {}
    kind: str = "application/json"
    needs_body: bool = True


_EVENTS: Final = "text/event-stream"
_PAGE: Final = {"type": "integer", "minimum": 1, "maximum": 1000}
_TENSOR_DATA: Final = {"type": "array", "description": "flat, or nested as the shape is"}

_SCHEMAS: Final[Mapping[str, Any]] = {
    "Error": _object({"error": _TEXT, "code": _TEXT}, faults=_list(_TEXT), retry_after=_NUMBER),
    "OpenAiError": _object(
        {"error": _object({"message": _TEXT, "type": _TEXT, "code": _or_null(_TEXT)}, param=_or_null(_TEXT))}
    ),
    "TensorMetadata": _object({"name": _TEXT, "datatype": _TEXT, "shape": _list(_WHOLE)}),
    "ModelMetadata": _object(
        {
            "name": _TEXT,
            "versions": _list(_TEXT),
            "platform": _TEXT,
            "inputs": _list(_named("TensorMetadata")),
            "outputs": _list(_named("TensorMetadata")),
        }
    ),
    "InputTensor": _object(
        {"name": _TEXT, "shape": _list(_UNSIGNED), "datatype": _TEXT},
        data=_TENSOR_DATA,
        parameters=_object({}, binary_data_size=_UNSIGNED),
    ),
    "OutputTensor": _object(
        {"name": _TEXT, "shape": _list(_WHOLE), "datatype": _TEXT}, data=_TENSOR_DATA, parameters=_ANY_OBJECT
    ),
    "InferRequest": _object(
        {"inputs": _list(_named("InputTensor"))},
        id=_TEXT,
        parameters=_object(
            {},
            priority={
                **_UNSIGNED,
                "description": "0 the model's class, 1 latency critical, 2 throughput, 3 background",
            },
            timeout={**_UNSIGNED, "description": "microseconds"},
            sequence_id={"anyOf": [_UNSIGNED, _TEXT]},
            binary_data_output=_FLAG,
        ),
        outputs=_list(_object({"name": _TEXT}, parameters=_object({}, binary_data=_FLAG))),
    ),
    "InferResponse": _object(
        {"model_name": _TEXT, "outputs": _list(_named("OutputTensor"))}, model_version=_TEXT, id=_TEXT
    ),
    "RepositoryEntry": _object({"name": _TEXT, "version": _TEXT, "state": _TEXT, "reason": _TEXT}),
    "Statistics": _object({"model_stats": _list(_object({"name": _TEXT, "version": _TEXT}))}),
    "GenerateRequest": _object(
        {"text_input": _TEXT}, id={}, parameters=_ANY_OBJECT, priority=_UNSIGNED, timeout=_UNSIGNED
    ),
    "GenerateResponse": _object({"model_name": _TEXT, "model_version": _TEXT}, text_output={}, id={}),
    "ChatRequest": _object(
        {
            "model": _TEXT,
            "messages": {
                **_list(
                    _object(
                        {"role": {"enum": ["system", "developer", "user", "assistant"]}},
                        content={"anyOf": [_TEXT, _list(_object({"type": _TEXT}, text=_TEXT)), {"type": "null"}]},
                    )
                ),
                "minItems": 1,
            },
        },
        stream=_FLAG,
        stop={"anyOf": [_TEXT, _list(_TEXT), {"type": "null"}]},
        temperature=_or_null(_NUMBER),
        top_p=_or_null(_NUMBER),
        max_tokens=_or_null(_WHOLE),
        max_completion_tokens=_or_null(_WHOLE),
        seed=_or_null(_WHOLE),
    ),
    "EmbeddingsRequest": _object(
        {"model": _TEXT, "input": {"anyOf": [_TEXT, _list(_TEXT)]}},
        encoding_format={"enum": ["float", "base64"]},
        dimensions=_or_null(_WHOLE),
    ),
    "OpenAiModel": _object({"id": _TEXT, "object": _TEXT, "created": _WHOLE, "owned_by": _TEXT}),
    "KapslModel": _object(
        {
            "id": _UNSIGNED,
            "name": _TEXT,
            "version": _TEXT,
            "framework": _TEXT,
            "device": _or_null(_TEXT),
            "optimization_level": _or_null(_TEXT),
            "loaded_at": _or_null(_MOMENT),
            "model_path": _or_null(_TEXT),
            "status": {"enum": ["active", "inactive", "starting", "stopping"]},
            "replica_id": _WHOLE,
            "base_model_id": _WHOLE,
        }
    ),
    "KapslTensor": _object({"shape": _list(_WHOLE), "dtype": _TEXT}, data=_list(_UNSIGNED), data_base64=_TEXT),
    "KapslInferRequest": _object(
        {"input": _named("KapslTensor")},
        additional_inputs=_list(_object({"name": _TEXT, "tensor": _named("KapslTensor")})),
        session_id=_or_null(_TEXT),
        metadata=_or_null(_ANY_OBJECT),
    ),
    "KapslScaling": _object(
        {},
        min_replicas={"type": "integer", "minimum": 1},
        max_replicas={"type": "integer", "minimum": 1},
        target_queue_depth=_or_null(_UNSIGNED),
        scale_down_threshold=_or_null(_UNSIGNED),
        cooldown_seconds=_or_null(_UNSIGNED),
    ),
}


def _of_model(method: str, action: str, summary: str, *, versioned: bool = True, **more: Any) -> list[Operation]:
    """The same route without a version and, where it may have one, with it."""
    paths = ["/v2/models/{model}"] + (["/v2/models/{model}/versions/{version}"] if versioned else [])
    return [Operation(method, path + action, "models", summary, **more) for path in paths]


def _job(method: str, action: str, summary: str, answer: Any = None, **more: Any) -> Operation:
    answer = answer or _named("CronJobInfo")
    return Operation(method, "/v2/cron/jobs/{job}" + action, "jobs", summary, answer, **more)


_HISTORY: Final = {"limit": _PAGE, "before": {"type": "integer", "minimum": 1}, "state": _TEXT, "origin": _TEXT}
_RUNS: Final = _object({"runs": _list(_named("CronRun")), "next": _or_null(_WHOLE)})

OPERATIONS: Final = (
    Operation("GET", "/v2/health/live", "health", "whether the process answers", _object({"live": _FLAG})),
    Operation("GET", "/v2/health/ready", "health", "whether all models can answer", _object({"ready": _FLAG})),
    Operation(
        "GET",
        "/v2",
        "health",
        "the server, and what it offers beyond the protocol's core",
        _object({"name": _TEXT, "version": _TEXT, "extensions": _list(_TEXT)}),
    ),
    *_of_model("GET", "", "what a model takes and gives", answer=_named("ModelMetadata")),
    *_of_model("GET", "/ready", "whether a model can answer", answer=_object({"name": _TEXT, "ready": _FLAG})),
    *_of_model("GET", "/config", "a model as Triton configures it"),
    *_of_model("GET", "/stats", "what became of a model's requests", answer=_named("Statistics")),
    *_of_model("POST", "/infer", "an inference", body=_named("InferRequest"), answer=_named("InferResponse")),
    *_of_model(
        "POST", "/generate", "a text from a text", body=_named("GenerateRequest"), answer=_named("GenerateResponse")
    ),
    *_of_model(
        "POST",
        "/generate_stream",
        "the same piece by piece, as server-sent events",
        body=_named("GenerateRequest"),
        answer=_TEXT,
        kind=_EVENTS,
    ),
    Operation("GET", "/v2/models/stats", "models", "the statistics of all models", _named("Statistics")),
    Operation(
        "POST",
        "/v2/repository/index",
        "repository",
        "the models that are served",
        _list(_named("RepositoryEntry")),
        _object({}, ready=_FLAG),
        needs_body=False,
    ),
    Operation(
        "POST",
        "/v2/repository/models/{model}/load",
        "repository",
        "load a model anew from where it came",
        _named("RepositoryEntry"),
        _object({}, parameters=_ANY_OBJECT),
        needs_body=False,
    ),
    Operation(
        "POST",
        "/v2/repository/models/{model}/unload",
        "repository",
        "take a model out of service",
        _ANY_OBJECT,
        _object({}, parameters=_ANY_OBJECT),
        needs_body=False,
    ),
    *(
        Operation(method, path, "settings", summary, body=body, needs_body=False)
        for path, what in (
            ("/v2/logging", "of the log"),
            ("/v2/trace/setting", "of traces"),
            ("/v2/models/{model}/trace/setting", "of a model's traces"),
        )
        for method, summary, body in (
            ("GET", f"the settings {what}", None),
            ("POST", f"change the settings {what}", _ANY_OBJECT),
        )
    ),
    Operation("GET", "/metrics", "figures", "figures for Prometheus", _TEXT, kind="text/plain"),
    Operation("GET", "/metrics/triton", "figures", "those of models by Triton's names", _TEXT, kind="text/plain"),
    Operation("GET", "/debug", "figures", "the process as it is now", _ANY_OBJECT),
    Operation(
        "GET",
        "/v2/cron/jobs",
        "jobs",
        "jobs by id, a page at a time",
        _object({"jobs": _list(_named("CronJobInfo")), "next": _or_null(_TEXT)}),
        query={"limit": _PAGE, "after": _TEXT},
    ),
    _job("GET", "", "one job, with its definition"),
    _job("PUT", "", "make a job (201), or give it another definition", body=_named("Definition")),
    _job("DELETE", "", "forget a job", _object({"id": _TEXT, "removed": _FLAG}), query={"cancel": _FLAG}),
    _job("POST", "/pause", "fire no more", body=_object({}, reason=_TEXT), needs_body=False),
    _job("POST", "/resume", "fire again", body=_object({}, catch_up=_FLAG), needs_body=False),
    _job(
        "POST",
        "/trigger",
        "fire once, now",
        _named("CronRun"),
        body=_object({}, origin=_or_null(_TEXT)),
        needs_body=False,
    ),
    _job(
        "POST",
        "/backfill",
        "fire for a range of the past",
        _object({"origin": _TEXT, "runs": _WHOLE}),
        body=_object(
            {"start": _MOMENT, "end": _MOMENT},
            concurrency={"type": "integer", "minimum": 1, "maximum": 10_000},
            origin=_or_null(_TEXT),
        ),
    ),
    _job("GET", "/preview", "when it is due next", _object({"id": _TEXT, "next": _list(_MOMENT)}), query={"n": _PAGE}),
    _job("GET", "/runs", "its history, the newest first", _RUNS, query=_HISTORY),
    Operation("GET", "/v2/cron/runs", "jobs", "the history of all jobs", _RUNS, query=_HISTORY),
    Operation("GET", "/v2/cron/runs/{number}", "jobs", "one run", _named("CronRun")),
    Operation("GET", "/v2/cron/events", "jobs", "what happens, as server-sent events", _TEXT, kind=_EVENTS),
    Operation("GET", "/v2/cron/statistics", "jobs", "the figures of this process"),
    Operation("POST", "/v2/cron/compact", "jobs", "hold the history to its bounds now", _object({"compacted": _FLAG})),
    Operation(
        "GET",
        "/v2/cron/explain",
        "jobs",
        "an expression in words, and its next times",
        _object({"expression": _TEXT, "tz": _TEXT, "description": _TEXT, "next": _list(_ANY_OBJECT)}),
        query={"expression": _TEXT, "tz": _TEXT, "n": _PAGE, "after": _MOMENT},
    ),
    Operation(
        "GET",
        "/v1/models",
        "OpenAI",
        "the models, as OpenAI lists them",
        _object({"object": _TEXT, "data": _list(_named("OpenAiModel"))}),
    ),
    Operation("GET", "/v1/models/{model}", "OpenAI", "one model", _named("OpenAiModel")),
    Operation(
        "POST",
        "/v1/chat/completions",
        "OpenAI",
        "a chat; with `stream` as server-sent events",
        body=_named("ChatRequest"),
    ),
    Operation("POST", "/v1/embeddings", "OpenAI", "texts as vectors", body=_named("EmbeddingsRequest")),
    Operation("GET", "/api/health", "Kapsl", "whether the process answers", _object({"status": _TEXT})),
    Operation("GET", "/api/models", "Kapsl", "the models by id", _list(_named("KapslModel"))),
    Operation("GET", "/api/models/{id}", "Kapsl", "one model", _named("KapslModel")),
    Operation(
        "POST",
        "/api/models/start",
        "Kapsl",
        "load a model",
        _named("KapslModel"),
        _object(
            {"model_path": {"type": "string", "minLength": 1}},
            model_id=_or_null(_UNSIGNED),
            topology={"const": "data-parallel"},
            tp_degree={"const": 1},
        ),
    ),
    Operation("POST", "/api/models/{id}/stop", "Kapsl", "take a model out of service", _named("KapslModel")),
    Operation(
        "POST",
        "/api/models/{id}/remove",
        "Kapsl",
        "take a model out of service for good",
        _object({"id": _WHOLE, "removed": _FLAG}),
    ),
    Operation("GET", "/api/models/{id}/scaling", "Kapsl", "how many replicas it has", _named("KapslScaling")),
    Operation(
        "POST",
        "/api/models/{id}/scaling",
        "Kapsl",
        "how many replicas it is to have",
        _named("KapslScaling"),
        _named("KapslScaling"),
    ),
    Operation(
        "POST",
        "/api/models/{id}/infer",
        "Kapsl",
        "an inference",
        _named("KapslTensor"),
        _named("KapslInferRequest"),
    ),
    Operation("GET", "/api/system/stats", "Kapsl", "the process and the machine"),
    Operation("GET", "/api/hardware", "Kapsl", "the devices", _object({"devices": _list(_ANY_OBJECT)})),
    Operation("GET", "/openapi.json", "health", "this document"),
)
"""Every route that a program may call."""


class Document:
    """The document of a server of this `version` with these `routes`, over these `models`, which it has as
    examples."""

    def __init__(self, version: str, routes: Iterable[BaseRoute], models: ModelRegistry[Any]) -> None:
        self._version = version
        self._models = models
        self._routes = routes
        self._written: tuple[Any, bytes] = (None, b"")  # for which models, and what: it takes milliseconds to make

    async def answer(self, request: Request) -> Response:
        """The route."""
        models = [(model.name, model.info.version) for model in self._models.list()]
        if self._written[0] != models:
            self._written = (models, msgspec.json.encode(self.made()))
        return Response(self._written[1], media_type=JSON)

    def made(self) -> dict[str, Any]:
        """The document as plain values."""
        paths: dict[str, Any] = {}
        models = self._models.list()
        names = {"model": [model.name for model in models], "version": [model.info.version for model in models]}
        examples = {name: list(dict.fromkeys(filter(None, found))) for name, found in names.items()}
        for operation in OPERATIONS:
            if self._is_there(operation):
                paths.setdefault(operation.path, {})[operation.method.lower()] = _described(operation, examples)
        return {
            "openapi": "3.1.0",
            "info": {
                "title": "kapsl-scheduler",
                "version": self._version,
                "description": "Request scheduling and batching for model inference, and its scheduled jobs.",
                "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
            },
            "paths": paths,
            "components": {
                "schemas": {**_SCHEMAS, **_types()},
                "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
            },
        }

    def _is_there(self, operation: Operation) -> bool:
        scope = {"type": "http", "method": operation.method, "path": operation.path, "headers": []}
        return any(route.matches(scope)[0] is Match.FULL for route in self._routes)


def _types() -> dict[str, Any]:
    """The schemas of what has a type of its own."""
    types: list[Any] = [Definition, CronJobInfo, CronRun]
    _, schemas = msgspec.json.schema_components(types, ref_template="#/components/schemas/{name}")
    schemas["CronJobInfo"]["properties"]["priority"] = _TEXT  # told by its name
    return schemas


def _of_path(examples: list[str] | None) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string", "minLength": 1}
    return {**schema, "examples": examples} if examples else schema


def _described(operation: Operation, examples: Mapping[str, list[str]]) -> dict[str, Any]:
    role = role_for(operation.method, operation.path)
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": _of_path(examples.get(name))}
        for name in re.findall(r"\{(\w+)\}", operation.path)
    ] + [{"name": name, "in": "query", "schema": schema} for name, schema in operation.query.items()]
    error = "OpenAiError" if operation.tag == "OpenAI" else "Error"
    described: dict[str, Any] = {
        "operationId": f"{operation.method.lower()}{re.sub(r'[^a-zA-Z0-9]+', '_', operation.path)}".rstrip("_"),
        "tags": [operation.tag],
        "summary": operation.summary,
        "parameters": parameters,
        "responses": {
            str(operation.status): {
                "description": operation.summary,
                "content": {operation.kind: {"schema": operation.answer}},
            },
            "default": {"description": "an error", "content": {"application/json": {"schema": _named(error)}}},
        },
    }
    if role is None:
        described["security"] = []
    else:
        described["security"] = [{"token": []}]
        described["description"] = f"Where the server has tokens, this takes one of the role `{role.name.lower()}`."
    if operation.body is not None:
        content = {"application/json": {"schema": operation.body}}
        described["requestBody"] = {"content": content, "required": operation.needs_body}
    return described
