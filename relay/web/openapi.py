"""The OpenAPI 3.1 document, made from the operations and their models."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, TypeAdapter
from pydantic.json_schema import models_json_schema

from relay import __version__
from relay.body import DEPTH, DIGITS
from relay.event import (
    DISABLED,
    ENDINGS,
    FAILING,
    PROCESSING,
    PROGRESS,
    RECOVERED,
    TEST,
    TRIED_ONCE,
    UNKNOWN_STATUS,
)
from relay.key import MEANINGS
from relay.web import resources as r
from relay.web.operation import LARGEST_BODY, Operation

_REF = "#/components/schemas/{model}"
_PROBLEM = {
    "type": "object",
    "description": "RFC 9457",
    "required": ["type", "title", "status", "detail"],
    "properties": {
        "type": {"type": "string"},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string"},
        "errors": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["field", "message"],
                "properties": {"field": {"type": "string"}, "message": {"type": "string"}},
            },
        },
    },
}
_REFUSALS = {
    400: "Malformed: not JSON, or the body did not arrive",
    401: "No key, or one that is unknown, expired or revoked",
    403: "The key lacks the scope",
    413: f"The body is larger than {LARGEST_BODY} bytes",
    415: "The body has a Content-Encoding",
    422: "Well-formed but invalid: `errors` names each field",
    429: "The key is used more often than its rate_limit allows: see Retry-After",
    503: "Storage cannot accept: nothing was changed, try again after Retry-After",
}
_KEYS = (
    "An API key, made by `relay keys create` or `POST /v1/keys`. It belongs to a tenant and sees nothing of"
    " another one. None of its scopes includes another one, but `admin` all of them: "
    + "; ".join(f"`{scope}`: {meaning}" for scope, meaning in MEANINGS.items())
    + ". What each operation needs is its `x-scope`."
)
_EXAMPLE = {
    "id": "gen_01KKVHBCB0Q2VBV3N8S0WZ6T1D",
    "provider": "pixellabs",
    "account": "pixellabs",
    "job_id": "gen_8f7b2c9a1e3d",
    "status": "completed",
    "provider_status": "completed",
    "kind": "image",
    "model": "synthetix-v2.1",
    "progress": 1.0,
    "outputs": [
        {
            "url": "https://cdn.pixellabsai.app/images/gen_8f7b2c9a1e3d.png",
            "kind": "image",
            "content_type": "image/png",
            "width": None,
            "height": None,
            "expires_at": None,
            "permanent_url": "https://arweave.net/abc123",
        }
    ],
    "error": None,
    "usage": {"credits": None},
    "created_at": "2026-03-16T14:30:00.000Z",
    "completed_at": "2026-03-16T14:30:12.000Z",
    "duration_ms": 12000,
    "late": False,
    "learned_by": "poll",
    "metadata": {"order": 42},
    "raw": {"generationId": "gen_8f7b2c9a1e3d", "status": "completed"},
}
_SPOILED: Mapping[str, Mapping[str, Any]] = {
    "completed": {},
    "failed": {
        "error": {
            "code": "content_moderated",
            "message": "the prompt was refused",
            "retryable": False,
            "provider_code": "content_moderated",
        }
    },
    "canceled": {},
    "timed_out": {
        "learned_by": "deadline",
        "error": {
            "code": "timed_out",
            "message": "no ending within 900 s; the job may still finish at the provider",
            "retryable": None,
            "provider_code": None,
        },
    },
}
_RUNNING: Mapping[str, Mapping[str, Any]] = {
    PROCESSING: {"provider_status": "processing", "progress": 0.0},
    PROGRESS: {"provider_status": "processing", "progress": 0.42},
    UNKNOWN_STATUS: {"provider_status": "hibernating", "progress": None},
}
_OPERATIONAL: Mapping[str, Mapping[str, str]] = {
    TEST: {"endpoint_id": "ep_01KKVHBCB0Q2VBV3N8S0WZ6T1D", "message": "This is a test."},
    DISABLED: {
        "endpoint_id": "ep_01KKVHBCB0Q2VBV3N8S0WZ6T1D",
        "url": "https://hooks.example.com/relay",
        "reason": "it answered 410 Gone",
        "disabled_at": "2026-03-16T14:30:12.000Z",
    },
    FAILING: {
        "account": "luma",
        "provider": "luma",
        "reason": "unauthorized: the provider refused the key",
        "since": "2026-03-16T14:30:12.000Z",
    },
    RECOVERED: {
        "account": "luma",
        "provider": "luma",
        "status": "ok",
        "since": "2026-03-16T14:30:12.000Z",
    },
}


def document(operations: Sequence[Operation]) -> dict[str, Any]:
    """The whole document, as JSON values."""
    models = _models(operations)
    names, definitions = models_json_schema(
        [(model, mode) for model, mode in models], ref_template=_REF, by_alias=True
    )
    schemas = {**definitions.get("$defs", {}), "Problem": _PROBLEM}
    paths: dict[str, dict[str, Any]] = {}
    for operation in operations:
        paths.setdefault(operation.path, {})[operation.method.lower()] = _operation(operation, names)
    paths |= _open_paths(names)
    described = {
        "openapi": "3.1.0",
        "info": {
            "title": "Relay",
            "version": __version__,
            "description": "A self-hosted webhook relay and notifier for AI generation jobs. Bodies are JSON"
            f" in UTF-8 without a Content-Encoding, at most {LARGEST_BODY} bytes and {DEPTH} levels deep; an"
            f" integer has at most {DIGITS} digits; of members with the same name the last one counts.",
            "license": {"name": "MIT", "identifier": "MIT"},
        },
        "security": [{"key": []}],
        "paths": paths,
        "webhooks": _webhooks(names),
        "components": {
            "schemas": schemas,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer", "description": _KEYS}},
        },
    }
    return _well_named(described)


def _well_named(described: dict[str, Any]) -> dict[str, Any]:
    """Models of the same name are told apart by their modules, `relay__delivery__Status`: generators of
    clients go by title, and want `DeliveryStatus`."""
    text = json.dumps(described)
    for long in [name for name in described["components"]["schemas"] if "__" in name]:
        module, name = long.split("__")[-2:]
        text = text.replace(long, module.capitalize() + name)
    named: dict[str, Any] = json.loads(text)
    for name, schema in named["components"]["schemas"].items():
        schema["title"] = name
    return named


def _open_paths(names: Mapping[Any, Any]) -> dict[str, Any]:
    """What needs no key: health, and what providers call."""
    health = {"application/json": {"schema": names[(r.HealthResource, "serialization")]}}
    account, token = (
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in ("account", "token")
    )
    return {
        "/healthz": {
            "get": {
                "operationId": "live",
                "summary": "The process answers",
                "tags": ["health"],
                "security": [],
                "responses": {"200": {"description": "Alive", "content": health}},
            }
        },
        "/readyz": {
            "get": {
                "operationId": "ready",
                "summary": "The database takes writes, has room and its migrations, the clock is right, and"
                " every loop beats",
                "tags": ["health"],
                "security": [],
                "responses": {
                    "200": {"description": "Ready", "content": health},
                    "503": {"description": "Not ready: `checks` says why", "content": health},
                },
            }
        },
        "/hooks/{account}": {
            "post": {
                "operationId": "receive_signed",
                "summary": "Providers that sign (vivix) call here about any job of an account that has a"
                " webhook_secret; it makes Relay ask them, and nothing in it is believed",
                "tags": ["hooks"],
                "security": [],
                "parameters": [
                    account,
                    {
                        "name": "X-Vivix-Signature",
                        "in": "header",
                        "required": False,
                        "description": "sha256= and the hexadecimal HMAC-SHA256 of the body; vivix only.",
                        "schema": {"type": "string"},
                    },
                ],
                "requestBody": {"content": {"application/json": {"schema": {}}}},
                "responses": {
                    "200": {"description": "Heard, or about a job that nobody watches"},
                    **_hook_refusals({401: "No or bad signature", 404: "No such account takes callbacks"}),
                },
            }
        },
        "/hooks/{account}/{token}": {
            "post": {
                "operationId": "receive",
                "summary": "Providers call here about one job; it makes Relay ask them, and nothing in it is"
                " believed",
                "tags": ["hooks"],
                "security": [],
                "parameters": [account, token],
                "requestBody": {"content": {"application/json": {"schema": {}}}},
                "responses": {
                    "200": {"description": "Heard"},
                    **_hook_refusals({404: "Not a URL of ours"}),
                },
            }
        },
    }


def _hook_refusals(own: Mapping[int, str]) -> dict[str, Any]:
    problem = {"application/problem+json": {"schema": {"$ref": _REF.format(model="Problem")}}}
    always = {status: _REFUSALS[status] for status in (413, 415, 503)}
    always[429] = "They come too often: see Retry-After"
    meanings = {400: "The body did not arrive", **always, **own}
    return {
        str(status): {"description": meaning, "content": problem}
        for status, meaning in sorted(meanings.items())
    }


def _models(operations: Sequence[Operation]) -> list[tuple[type[BaseModel], Any]]:
    found: dict[tuple[type[BaseModel], Any], None] = {
        (r.AnnouncedGeneration, "serialization"): None,
        (r.HealthResource, "serialization"): None,
    }
    for operation in operations:
        if operation.body is not None:
            found[(operation.body, "validation")] = None
        for model in (operation.returns, operation.page):
            if model is not None:
                found[(model, "serialization")] = None
    return list(found)


def _operation(operation: Operation, names: Mapping[Any, Any]) -> dict[str, Any]:
    answers: dict[str, Any] = {}
    for status, meaning in operation.answers.items():
        answers[str(status)] = {"description": meaning}
        if status < 300 and operation.returns is not None:
            schema = names[(operation.returns, "serialization")]
            if operation.page is not None:
                schema = {"oneOf": [schema, names[(operation.page, "serialization")]]}
            answers[str(status)]["content"] = {"application/json": {"schema": schema}}
    if operation.streams:
        answers["200"]["content"] = {"text/event-stream": {"schema": {"type": "string"}}}
    reads_input = operation.body is not None or operation.query is not None or operation.creates
    for status, meaning in _REFUSALS.items():
        if status != 422 or reads_input:
            answers.setdefault(str(status), {"description": meaning})
    if operation.creates:
        answers.setdefault("409", {"description": "What this Idempotency-Key created is gone"})
    for code, answer in answers.items():
        if code >= "400":
            schema = {"$ref": _REF.format(model="Problem")}
            answer["content"] = {"application/problem+json": {"schema": schema}}
    described: dict[str, Any] = {
        "operationId": operation.handler.__name__,
        "summary": operation.summary,
        "description": f"Needs the scope `{operation.scope}`.",
        "x-scope": operation.scope,
        "tags": [operation.path.split("/")[2]],
        "parameters": _parameters(operation),
        "responses": answers,
    }
    if operation.body is not None:
        item = names[(operation.body, "validation")]
        items = {"type": "array", "minItems": 1, "maxItems": operation.at_most, "items": item}
        content: dict[str, Any] = {"schema": {"oneOf": [item, items]} if operation.at_most else item}
        if operation.example:
            content["example"] = operation.example
        described["requestBody"] = {
            "required": operation.needs_body,
            "content": {"application/json": content},
        }
    return described


def _parameters(operation: Operation) -> list[dict[str, Any]]:
    parameters: list[dict[str, Any]] = []
    for name in re.findall(r"{(\w+)}", operation.path):
        parameters.append({"name": name, "in": "path", "required": True, "schema": {"type": "string"}})
    if operation.query is not None:
        schema = TypeAdapter(operation.query).json_schema()
        for name, one in schema["properties"].items():
            described = _not_null(_inline(one, schema))
            parameters.append({"name": name, "in": "query", "required": False, "schema": described})
    if operation.streams:
        parameters.append(
            {
                "name": "Last-Event-ID",
                "in": "header",
                "required": False,
                "description": "The last id that was received: nothing that was stored since is left out, but"
                " what was made up to half a minute before may come again.",
                "schema": {"type": "string"},
            }
        )
    if operation.creates:
        parameters.append(
            {
                "name": "Idempotency-Key",
                "in": "header",
                "required": False,
                "description": "The same request under the same key creates one thing, for 24 hours.",
                "schema": {"type": "string", "minLength": 1, "maxLength": 255},
            }
        )
    return parameters


def _inline(schema: Any, root: Mapping[str, Any]) -> Any:
    """A parameter's schema without references into its own model."""
    if isinstance(schema, list):
        return [_inline(one, root) for one in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return _inline(root["$defs"][schema["$ref"].rsplit("/", 1)[-1]], root)
    return {name: _inline(one, root) for name, one in schema.items()}


def _not_null(schema: dict[str, Any]) -> dict[str, Any]:
    """A parameter's schema when it is given: nothing behind a `?` is null."""
    values = [one for one in schema.get("anyOf", ()) if one != {"type": "null"}]
    if len(values) != 1:
        return schema
    kept = {name: one for name, one in schema.items() if name not in ("anyOf", "default")}
    return {**kept, **values[0]}


def _webhooks(names: Mapping[Any, Any]) -> dict[str, Any]:
    webhooks = {}
    for status, type_ in ENDINGS.items():
        ended = {
            **_EXAMPLE,
            "status": status.value,
            "provider_status": status.value,
            **_SPOILED[status.value],
        }
        if status.value != "completed":
            ended["outputs"] = []
        example = {"type": type_, "timestamp": _EXAMPLE["completed_at"], "data": ended}
        webhooks[type_] = _webhook(type_, names[(r.AnnouncedGeneration, "serialization")], example)
    for type_, said in _RUNNING.items():
        running = {
            **_EXAMPLE,
            "status": "processing",
            "outputs": [],
            **dict.fromkeys(("completed_at", "duration_ms", "learned_by")),
            **said,
            "raw": {"generationId": _EXAMPLE["job_id"], "status": said["provider_status"]},
        }
        example = {"type": type_, "timestamp": "2026-03-16T14:30:06.000Z", "data": running}
        webhooks[type_] = _webhook(type_, names[(r.AnnouncedGeneration, "serialization")], example)
    for type_, data in _OPERATIONAL.items():
        example = {"type": type_, "timestamp": _EXAMPLE["completed_at"], "data": data}
        properties = {name: {"type": "string"} for name in data}
        schema = {"type": "object", "required": sorted(properties), "properties": properties}
        webhooks[type_] = _webhook(type_, schema, example)
    return webhooks


def _webhook(type_: str, data: Any, example: Any) -> dict[str, Any]:
    headers = {
        "webhook-id": "The event's id: the same on every attempt, replay and endpoint",
        "webhook-timestamp": "Unix seconds of the attempt",
        "webhook-signature": "v1,<base64 HMAC-SHA256 of id.timestamp.body>, several separated by a space",
    }
    otherwise = "anything else is final" if type_ in TRIED_ONCE else "anything else is retried"
    schema = {
        "type": "object",
        "required": ["type", "timestamp", "data"],
        "properties": {
            "type": {"const": type_},
            "timestamp": {"type": "string", "format": "date-time"},
            "data": data,
        },
    }
    return {
        "post": {
            "operationId": "on_" + type_.replace(".", "_"),
            "summary": f"Sent to endpoints that want {type_}",
            "security": [],
            "parameters": [
                {
                    "name": name,
                    "in": "header",
                    "required": True,
                    "description": meaning,
                    "schema": {"type": "string"},
                }
                for name, meaning in headers.items()
            ],
            "requestBody": {
                "required": True,
                "content": {"application/json": {"schema": schema, "example": example}},
            },
            "responses": {"2XX": {"description": f"Received; {otherwise}, 410 ends it"}},
        }
    }
