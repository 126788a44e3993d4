"""What an endpoint answers is kept without what only it and its owner know."""

import asyncio
import json
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tests.conftest import RunningRelay, World
from tests.serving import serving

TOKEN = 'the-token-of-"this"-endpoint/0123456789'
HEADERS = {"authorization": f"Bearer {TOKEN}", "x-api-key": "another-key-of-this-endpoint", "x-env": "live"}
SECRET = "whsec_" + "QUJD/WVl" * 4
KEPT, READ = 16 * 1024, 64 * 1024


async def first_attempt(relay: RunningRelay, url: str) -> dict[str, Any]:
    """The attempt of a test delivery to an endpoint with these secrets."""
    asked = {"url": url, "headers": HEADERS, "secret": SECRET}
    endpoint = (await relay.api.post("/v1/endpoints", json=asked)).json()
    delivery = (await relay.api.post(f"/v1/endpoints/{endpoint['id']}/test")).json()
    shown = await relay.eventually(
        f"/v1/deliveries/{delivery['id']}", lambda one: one["attempts"] and one["status"] != "sending"
    )
    return dict(shown["attempts"][0])


def is_clean(said: str) -> bool:
    return not any(piece in said for piece in ("the-token", "0123456789", "another-key", "WVlQUJD"))


@pytest.mark.parametrize("status", [200, 500])
async def test_an_endpoint_that_repeats_what_it_was_sent_is_kept_without_it(
    world: World, status: int
) -> None:
    async def echo(request: Request) -> Response:
        assert request.headers["authorization"] == f"Bearer {TOKEN}"
        return JSONResponse({"headers": dict(request.headers), "secret": SECRET, "bare": TOKEN}, status)

    relay = await world.relay()
    async with serving(Starlette(routes=[Route("/", echo, methods=["POST"])])) as origin:
        attempt = await first_attempt(relay, origin)
    assert is_clean(attempt["response_body"])
    said = json.loads(attempt["response_body"])
    assert said["headers"]["user-agent"].startswith("Relay/")
    assert (said["headers"]["x-api-key"], said["headers"]["x-env"]) == ("[redacted]", "live")
    assert said["secret"] == said["bare"] == "[redacted]"


@pytest.mark.parametrize("before", [KEPT - 20, READ - 20, 100_000, 0])
@pytest.mark.parametrize("what", [SECRET, f"Bearer {TOKEN}"], ids=["secret", "header"])
async def test_no_beginning_of_a_secret_is_kept_where_an_answer_is_cut_off(
    world: World, what: str, before: int
) -> None:
    async def echo(request: Request) -> Response:
        return Response((b"." * before + what.encode() * 10_000)[:1_000_000])

    relay = await world.relay()
    async with serving(Starlette(routes=[Route("/", echo, methods=["POST"])])) as origin:
        attempt = await first_attempt(relay, origin)
    kept = attempt["response_body"]
    assert len(kept) <= KEPT
    assert "[redacted]".startswith(kept.replace("[redacted]", "").lstrip("."))
    assert len(kept) > min(before, KEPT) - 20


async def test_an_answer_that_is_no_http_is_told_of_without_what_it_repeats(world: World) -> None:
    async def echo(reader: Any, writer: Any) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        [authorization] = [line for line in head.split("\r\n") if line.lower().startswith("authorization")]
        writer.write(f"HTTP/1.1 200 OK\r\n{authorization}\r\nbad header {authorization}\r\n\r\n".encode())
        writer.close()

    relay = await world.relay()
    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        attempt = await first_attempt(relay, f"http://127.0.0.1:{port}/")
    assert attempt["error"]["code"] == "bad_response"
    assert is_clean(json.dumps(attempt))
