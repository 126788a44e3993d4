"""The OpenAPI document: valid, complete, and what a running relay really answers."""

import hmac
import json
from collections.abc import Iterator, Mapping
from typing import Any

import httpx
from jsonschema import Draft202012Validator
from openapi_spec_validator import validate
from starlette.routing import Route

from relay.app import build
from relay.config import read_config
from tests.conftest import RunningRelay, World
from tests.test_audit import run

JSON, PROBLEM, STREAM = "application/json", "application/problem+json", "text/event-stream"
ENDINGS = {"generation.completed", "generation.failed", "generation.canceled", "generation.timed_out"}


def closed(schema: Any) -> Any:
    """A schema that refuses the fields it does not name."""
    if isinstance(schema, list):
        return [closed(one) for one in schema]
    if not isinstance(schema, Mapping):
        return schema
    made = {name: closed(one) for name, one in schema.items()}
    if isinstance(schema.get("properties"), Mapping):
        made.setdefault("additionalProperties", False)
    return made


def complaints(document: Mapping[str, Any], schema: Mapping[str, Any], value: Any) -> list[str]:
    """What the document's schema says against a value."""
    root = closed({**schema, "components": {"schemas": document["components"]["schemas"]}})
    checker = Draft202012Validator(root, format_checker=Draft202012Validator.FORMAT_CHECKER)
    return [f"{error.json_path}: {error.message}" for error in checker.iter_errors(value)]


def operations(document: Mapping[str, Any]) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield method.upper(), path, operation


async def document_of(relay: RunningRelay) -> dict[str, Any]:
    answer = await relay.api.get("/openapi.json", headers={"authorization": ""})
    assert answer.headers["content-type"] == JSON
    return dict(answer.json())


async def test_the_document_is_valid_and_names_every_route(world: World) -> None:
    relay = await world.relay()
    document = await document_of(relay)
    assert document["openapi"].startswith("3.1.")
    validate(document)
    ids = [operation["operationId"] for _, _, operation in operations(document)]
    assert len(ids) == len(set(ids))
    app = build(read_config(world.document(public_url="http://127.0.0.1:1"), {}))
    served = {
        (method, route.path)
        for route in app.routes
        if isinstance(route, Route)
        for method in (route.methods or ()) - {"HEAD"}
    }
    described = {(method, path) for method, path, _ in operations(document)}
    # The document, the page that is made of it, and what is for Prometheus (docs/watching.md) are all that it
    # need not describe.
    assert served - described <= {("GET", "/openapi.json"), ("GET", "/docs"), ("GET", "/metrics")}
    assert described <= served


async def test_the_page_shows_every_operation(world: World) -> None:
    relay = await world.relay()
    async with httpx.AsyncClient(base_url=relay.origin) as stranger:
        page = await stranger.get("/docs")
    assert page.status_code == 200
    assert page.headers["content-type"].startswith("text/html")
    assert not [path for _, path, _ in operations(await document_of(relay)) if path not in page.text]


async def test_requests_and_webhooks_have_examples_that_fit_their_schemas(world: World) -> None:
    relay = await world.relay()
    document = await document_of(relay)
    contents = {
        f"{method} {path}": operation["requestBody"]["content"][JSON]
        for method, path, operation in operations(document)
        if "requestBody" in operation and operation.get("security") != []
    }
    running = {"generation.processing", "generation.progress", "generation.unknown_status"}
    operational = {"account.failing", "account.recovered", "endpoint.disabled", "endpoint.test"}
    assert set(document["webhooks"]) == {*ENDINGS, *running, *operational}
    for type_, webhook in document["webhooks"].items():
        contents[type_] = webhook["post"]["requestBody"]["content"][JSON]
        assert contents[type_]["example"]["type"] == type_
        sent = {one["name"] for one in webhook["post"]["parameters"] if one["in"] == "header"}
        assert sent >= {"webhook-id", "webhook-timestamp", "webhook-signature"}
    for name, content in contents.items():
        assert complaints(document, content["schema"], content["example"]) == [], name


async def test_webhooks_that_are_sent_fit_the_document(world: World) -> None:
    relay = await world.relay()
    document = await document_of(relay)
    endpoint = await world.endpoint(relay)
    for provider in ("pixellabs", "vivix", "pictory", "luma"):
        for outcome in ("completed", "failed"):
            await world.watch(relay, provider, outcome=outcome, duration=0)
    await relay.api.post(f"/v1/endpoints/{endpoint['id']}/test")
    body = {"account": "luma", "timeout_seconds": 0.2}
    job_id = world.simulator.submit("luma", duration=600)
    assert (await relay.api.post("/v1/generations", json=body | {"job_id": job_id})).status_code == 201
    received = [json.loads(one.body) for one in await world.subscriber.got(10)]
    types = {one["type"] for one in received}
    assert types == (ENDINGS - {"generation.canceled"}) | {"endpoint.test"}
    for event in received:
        schema = document["webhooks"][event["type"]]["post"]["requestBody"]["content"][JSON]["schema"]
        assert complaints(document, schema, event) == [], event["type"]


class Walk:
    """Calls operations and holds each answer against the document; `left` are those that never succeeded."""

    def __init__(self, relay: RunningRelay, document: Mapping[str, Any]) -> None:
        self._relay, self._document = relay, document
        self.left = {(method, path) for method, path, _ in operations(document)}

    async def __call__(self, method: str, path: str, id_: str = "", **options: Any) -> Any:
        url = options.pop("url", path.replace("{id}", id_))
        answer = await self._relay.api.request(method, url, **options)
        where = f"{method} {path} → {answer.status_code}"
        responses = self._document["paths"][path][method.lower()]["responses"]
        assert str(answer.status_code) in responses, where
        content = responses[str(answer.status_code)].get("content", {})
        if answer.is_success:
            self.left.discard((method, path))
        if not answer.content:
            assert content == {}, where
            return None
        media_type = answer.headers["content-type"]
        if media_type.startswith(STREAM):
            assert content == {STREAM: {"schema": {"type": "string"}}}, where
            return None
        assert media_type == (JSON if answer.is_success else PROBLEM), where
        assert complaints(self._document, content[media_type]["schema"], answer.json()) == [], where
        return answer.json()


async def test_every_operation_answers_as_the_document_says(world: World) -> None:
    accounts = world.document()["accounts"]
    relay = await world.relay(accounts=accounts | {"vivix": {**accounts["vivix"], "webhook_secret": "s"}})
    document = await document_of(relay)
    walk = Walk(relay, document)
    key = {"idempotency-key": "k"}
    body = {"url": world.subscriber.origin + "/", "metadata": {"a": 1}, "headers": {"x-a": "b"}}
    endpoint = (await walk("POST", "/v1/endpoints", json=body, headers=key))["id"]
    job = world.simulator.submit("vivix", duration=0, outcome="failed")
    generation = (await walk("POST", "/v1/generations", json={"account": "vivix", "job_id": job}))["id"]
    await walk("POST", "/v1/generations", json={"account": "vivix", "job_id": job})
    made = await walk("POST", "/v1/generations", json={"account": "pictory"})
    nameless, hook = made["id"], made["webhook_url"]
    await walk("POST", "/hooks/{account}/{token}", url=hook, json={})
    await walk("POST", "/hooks/{account}/{token}", url=hook + "x", json={})
    signed = {"x-vivix-signature": f"sha256={hmac.digest(b's', b'{}', 'sha256').hex()}"}
    await walk("POST", "/hooks/{account}", url="/hooks/vivix", content=b"{}", headers=signed)
    await walk("POST", "/hooks/{account}", url="/hooks/vivix", content=b"{ }", headers=signed)
    await walk("POST", "/hooks/{account}", url="/hooks/luma", content=b"{}", headers=signed)
    await walk("GET", "/v1/generations/{id}/wait", generation)
    delivery = (await walk("POST", "/v1/endpoints/{id}/test", endpoint))["id"]
    await relay.eventually(f"/v1/deliveries/{delivery}", lambda one: one["status"] == "delivered")
    event = (await walk("GET", "/v1/deliveries/{id}", delivery))["event_id"]
    await walk("POST", "/v1/deliveries/{id}/replay", delivery)
    replay = {"endpoint_id": endpoint, "since": "2026-01-01T00:00:00Z", "event_type": "endpoint.test"}
    await walk("POST", "/v1/replays", json=replay | {"status": "all", "dry_run": True})
    replay |= {"status": "missing"}
    made = await walk("POST", "/v1/replays", json=replay, headers={"idempotency-key": "of a replay"})
    await walk("POST", "/v1/replays", json={"status": "missing"})
    await relay.eventually(f"/v1/replays/{made['id']}", lambda one: one["status"] == "completed")
    await walk("GET", "/v1/replays/{id}", made["id"])
    await walk("DELETE", "/v1/replays/{id}", made["id"])  # it has ended
    slowly = replay | {"status": "all", "rate_limit": 0.01}
    await walk("POST", "/v1/endpoints/{id}/test", endpoint)
    await relay.eventually(
        "/v1/deliveries?status=delivered&event_type=endpoint.test", lambda page: page["data"][1:]
    )
    made = await walk("POST", "/v1/replays", json=slowly)
    await walk("POST", "/v1/replays", json=slowly)
    await walk("DELETE", "/v1/replays/{id}", made["id"])
    await walk("DELETE", "/v1/replays/{id}", "rpl_unknown")
    await walk("GET", "/v1/events/{id}", event)
    await walk("POST", "/v1/events", json={"type": "order.shipped", "data": {"order": 42}})
    await walk("POST", "/v1/events", json={"type": "order.shipped", "data": 42})
    await walk("GET", "/v1/events/stream", params={"timeout": 0})
    await walk("GET", "/v1/events/stream", params={"endpoint_id": "ep_x"})
    await walk("GET", "/v1/events/stream", params={"last_event_id": "x"})
    declared, url = "/v1/event-types/{type}", "/v1/event-types/order.shipped"
    for schema in ({"required": ["order"]}, {"required": ["order"]}, {"type": "thing"}):
        await walk("PUT", declared, url=url, json={"schema": schema})
    await walk("POST", "/v1/events", json={"type": "order.shipped", "data": {}})
    await walk("GET", declared, url=url)
    assert (await walk("GET", "/v1/event-types"))["data"]
    for _ in range(2):
        await walk("DELETE", declared, url=url)
    await walk("GET", declared, url=url)
    asked = {"json": {"scopes": ["read"], "rate_limit": 0.001}, "headers": {"idempotency-key": "of a key"}}
    made, again = await walk("POST", "/v1/keys", **asked), await walk("POST", "/v1/keys", **asked)
    assert again == made | {"key": None}
    reader = {"headers": {"authorization": f"Bearer {made['key']}"}}
    for path in ("/v1/signing-secret", "/v1/signing-secret"):  # forbidden, then too often
        await walk("GET", path, **reader)
    for path in ("endpoints", "generations", "events", "deliveries", "replays", "accounts", "keys", "audit"):
        assert (await walk("GET", f"/v1/{path}"))["data"], path
        await walk("GET", f"/v1/{path}", params={"limit": "x"})
    await walk("POST", "/v1/generations/{id}/refresh", generation)
    await walk("POST", "/v1/generations/{id}/refresh", nameless)
    await walk("GET", "/v1/generations/{id}", generation)
    await walk("GET", "/v1/generations/{id}/wait", nameless, params={"timeout": "x"})
    await walk("PATCH", "/v1/generations/{id}", nameless, json={"metadata": {"a": 1}})
    await walk("PATCH", "/v1/generations/{id}", generation, json={"job_id": "another"})
    await walk("PATCH", "/v1/generations/{id}", nameless, content=b"{")
    await walk("DELETE", "/v1/generations/{id}", nameless)
    await walk("DELETE", "/v1/generations/{id}", nameless)
    assert (await walk("GET", "/v1/signing-secret"))["secret"]
    await walk("POST", "/v1/signing-secret/rotate", json={"overlap_seconds": 60})
    await walk("GET", "/v1/endpoints/{id}", endpoint)
    await walk("PATCH", "/v1/endpoints/{id}", endpoint, json={"description": "x", "event_types": ["a.b"]})
    await walk("GET", "/v1/endpoints/{id}/secret", endpoint)
    await walk("POST", "/v1/endpoints/{id}/secret/rotate", endpoint, json={"overlap_seconds": 60})
    await walk("GET", "/v1/endpoints/{id}/secret", endpoint)
    await walk("POST", "/v1/endpoints/{id}/disable", endpoint)
    await walk("POST", "/v1/endpoints/{id}/test", endpoint)
    await walk("POST", "/v1/endpoints/{id}/enable", endpoint)
    await walk("DELETE", "/v1/endpoints/{id}", endpoint)
    await walk("POST", "/v1/endpoints", json={"url": "ftp://x.example"})
    await walk("POST", "/v1/endpoints", content=b" " * (1024 * 1024 + 1))
    studio = {"name": "studio", "provider": "luma", "api_key": "of-the-studio"}
    await walk("POST", "/v1/accounts", json=studio)
    await walk("POST", "/v1/accounts", json=studio)
    await walk("GET", "/v1/accounts/{name}", url="/v1/accounts/studio")
    await walk("PATCH", "/v1/accounts/{name}", url="/v1/accounts/studio", json={"requests_per_minute": 5})
    await walk("PATCH", "/v1/accounts/{name}", url="/v1/accounts/luma", json={"requests_per_minute": 5})
    await walk("DELETE", "/v1/accounts/{name}", url="/v1/accounts/studio")
    await walk("GET", "/v1/accounts/{name}", url="/v1/accounts/studio")
    await walk("POST", "/v1/keys", json={"scopes": ["read"], "expires_at": "2020-01-01T00:00:00Z"})
    await walk("GET", "/v1/keys/{id}", made["id"])
    await walk("DELETE", "/v1/keys/{id}", made["id"])
    await walk("GET", "/v1/keys", **reader)
    added = {
        "name": "mine",
        "provider": "vivix",
        "api_key": "vivix-0123456789-0123",
        "webhook_secret": "a-secret",
    }
    for body_ in (added, added, added | {"name": "other", "provider": "a:B"}):
        await walk("POST", "/v1/accounts", json=body_)
    for name in ("mine", "luma", "nobody"):
        url = f"/v1/accounts/{name}"
        await walk("GET", "/v1/accounts/{name}", url=url)
        for change in ({"webhook_secret": ["a-secret", "another-secret"]}, {"api_key": "short"}):
            await walk("PATCH", "/v1/accounts/{name}", url=url, json=change)
        await walk("DELETE", "/v1/accounts/{name}", url=url)
    await walk("GET", "/healthz")
    await walk("GET", "/readyz")
    assert walk.left == set()
    # What the key created is gone.
    await walk("POST", "/v1/endpoints", json=body, headers=key)
    # Secrets that were changed in the database.
    endpoint = (await walk("POST", "/v1/endpoints", json=body))["id"]
    for change in ("UPDATE endpoints SET secrets = 'x'", "UPDATE tenants SET signing_secrets = 'x'"):
        await run(relay.settings.database, change)
    for path in ("/v1/endpoints/{id}/secret", "/v1/signing-secret"):
        assert (await walk("GET", path, endpoint))["status"] == 409
