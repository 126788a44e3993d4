"""The main job, over real sockets: watch, announce, deliver, replay."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from standardwebhooks import Webhook
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from relay.times import parse_rfc3339
from tests.conftest import RunningRelay, World
from tests.serving import serving


@pytest.mark.parametrize("provider", ["pixellabs", "vivix", "pictory", "luma"])
@pytest.mark.parametrize("outcome", ["completed", "failed"])
async def test_an_ended_generation_is_announced_once_and_signed(
    world: World, provider: str, outcome: str
) -> None:
    relay = await world.relay()
    endpoint = await world.endpoint(relay)
    generation = await world.watch(relay, provider, outcome=outcome)
    [received] = await world.subscriber.got(1)
    Webhook(endpoint["secret"]).verify(received.body, received.headers)
    event = json.loads(received.body)
    assert event["type"] == f"generation.{outcome}"
    assert event["data"]["id"] == generation["id"]
    assert event["data"]["status"] == outcome
    assert bool(event["data"]["outputs"]) is (outcome == "completed")
    assert (event["data"]["error"] is None) is (outcome == "completed")


# What an event says of each provider's answer.


@asynccontextmanager
async def answering(answer: Any) -> AsyncIterator[str]:
    """The origin of a provider with one answer for every job."""

    async def get(request: Request) -> Response:
        return JSONResponse(answer)

    async with serving(Starlette(routes=[Route("/{path:path}", get)])) as origin:
        yield origin


async def watch_at(
    world: World, provider: str, origin: str, job_id: str, *, api_key: str = "key", **fields: Any
) -> tuple[RunningRelay, dict[str, Any]]:
    """A relay whose account of `provider` is at `origin`, and a generation that it watches there."""
    account = {"provider": provider, "api_key": api_key, "base_url": origin, "poll_interval": "100ms"}
    relay = await world.relay(accounts={f"my-{provider}": account})
    await world.endpoint(relay)
    request = {"account": f"my-{provider}", "job_id": job_id, **fields}
    answer = await relay.api.post("/v1/generations", json=request)
    assert answer.status_code == 201, answer.text
    return relay, answer.json()


JPEG = {"kind": "image", "content_type": "image/jpeg"}
MP4 = {"kind": "video", "content_type": "video/mp4"}
NOTHING_MORE = {
    "content_type": None,
    "width": None,
    "height": None,
    "expires_at": None,
    "permanent_url": None,
}
PIXELLABS = {
    "generationId": "gen_8f7b2c9a1e3d",
    "progress": 100,
    "imageUrl": "https://cdn.pixellabsai.app/images/gen_8f7b2c9a1e3d.png",
    "arweaveUrl": "https://arweave.net/abc123",
    "metadata": {"prompt": "a samurai – 侍", "seed": 1847293847, "model": "synthetix-v2.1"},
    "createdAt": "2026-03-16T14:30:00Z",
    "completedAt": "2026-03-16T14:30:12Z",
}
VIVIX = {
    "generation_id": "5b91a581",
    "model": "grok-imagine-image-quality",
    "created_at": "2026-05-10T12:34:56Z",
    "completed_at": "2026-05-10T12:35:08Z",
}
LUMA = {"id": "182bd5e5", "created_at": "2026-06-01T11:59:30Z", "model": "uni-1"}
# The answer of a provider, and what 5.4 of the design makes of it. What is missing is learned here.
MAPPINGS = {
    "pixellabs completed": (
        "pixellabs",
        {**PIXELLABS, "status": "completed"},
        {
            "status": "completed", "provider_status": "completed", "kind": "image", "progress": 1.0,
            "model": "synthetix-v2.1", "error": None, "usage": {"credits": None},
            "outputs": [
                {
                    **NOTHING_MORE,
                    "url": "https://cdn.pixellabsai.app/images/gen_8f7b2c9a1e3d.png",
                    "kind": "image",
                    "content_type": "image/png",
                    "permanent_url": "https://arweave.net/abc123",
                }
            ],
            "created_at": "2026-03-16T14:30:00.000Z", "completed_at": "2026-03-16T14:30:12.000Z",
            "duration_ms": 12_000,
        },
    ),
    "pixellabs failed": (
        "pixellabs",
        {
            "generationId": "gen_8f7b2c9a1e3d", "status": "failed", "progress": 40,
            "error": "internal_error", "message": "Out of memory.",
            "createdAt": "2026-03-16T14:30:00Z", "completedAt": "2026-03-16T14:30:03.500Z",
        },
        {
            "status": "failed", "provider_status": "failed", "kind": None, "progress": 0.4,
            "model": None, "outputs": [], "usage": {"credits": None},
            "error": {
                "code": "provider_error", "message": "Out of memory.", "retryable": None,
                "provider_code": "internal_error",
            },
            "created_at": "2026-03-16T14:30:00.000Z", "completed_at": "2026-03-16T14:30:03.500Z",
            "duration_ms": 3500,
        },
    ),
    "vivix completed": (
        "vivix",
        {
            **VIVIX, "status": "completed", "output_url": "https://a.r2.dev/1.jpg",
            "output_urls": ["https://a.r2.dev/1.jpg", "https://a.r2.dev/2.mp4"], "credits_used": 211,
            "duration_ms": 12_420,
        },
        {
            "status": "completed", "provider_status": "completed", "kind": "image", "progress": None,
            "model": "grok-imagine-image-quality", "error": None, "usage": {"credits": 211},
            "outputs": [
                {**NOTHING_MORE, "url": "https://a.r2.dev/1.jpg", **JPEG},
                {**NOTHING_MORE, "url": "https://a.r2.dev/2.mp4", **MP4},
            ],
            "created_at": "2026-05-10T12:34:56.000Z", "completed_at": "2026-05-10T12:35:08.000Z",
            "duration_ms": 12_420,
        },
    ),
    "vivix completed with one output": (
        "vivix",
        {**VIVIX, "status": "completed", "output_url": "https://a.r2.dev/1.jpg", "credits_used": 5},
        {
            "status": "completed", "provider_status": "completed", "kind": "image", "progress": None,
            "model": "grok-imagine-image-quality", "error": None, "usage": {"credits": 5},
            "outputs": [
                {**NOTHING_MORE, "url": "https://a.r2.dev/1.jpg", **JPEG},
            ],
            "created_at": "2026-05-10T12:34:56.000Z", "completed_at": "2026-05-10T12:35:08.000Z",
            "duration_ms": 12_000,
        },
    ),
    "vivix failed": (
        "vivix",
        {
            **VIVIX, "status": "failed", "error": "PROVIDER_ERROR",
            "message": "Underlying model returned an error.", "credits_used": 0,
        },
        {
            "status": "failed", "provider_status": "failed", "kind": None, "progress": None,
            "model": "grok-imagine-image-quality", "outputs": [], "usage": {"credits": 0},
            "error": {
                "code": "provider_error", "message": "Underlying model returned an error.",
                "retryable": True, "provider_code": "PROVIDER_ERROR",
            },
            "created_at": "2026-05-10T12:34:56.000Z", "completed_at": "2026-05-10T12:35:08.000Z",
            "duration_ms": 12_000,
        },
    ),
    "pictory completed": (
        "pictory",
        {
            "job_id": "4d82d040", "success": True,
            "data": {
                "status": "completed", "url": "https://a.pictorycontent.com/1", "width": 1024,
                "height": 768, "aiCreditsUsed": 0.6,
            },
        },
        {
            "status": "completed", "provider_status": "completed", "kind": "image", "progress": None,
            "model": None, "error": None, "usage": {"credits": 0.6},
            "outputs": [
                {
                    **NOTHING_MORE, "url": "https://a.pictorycontent.com/1", "kind": "image",
                    "content_type": "image/png", "width": 1024, "height": 768,
                }
            ],
        },
    ),
    "pictory failed": (
        "pictory",
        {
            "job_id": "4d82d040", "success": False,
            "data": {
                "status": "failed", "error_code": "IMAGE_GENERATION_FAILED",
                "error_message": "The image could not be generated.",
            },
        },
        {
            "status": "failed", "provider_status": "failed", "kind": None, "progress": None,
            "model": None, "outputs": [], "usage": {"credits": None},
            "error": {
                "code": "provider_error", "message": "The image could not be generated.",
                "retryable": None, "provider_code": "IMAGE_GENERATION_FAILED",
            },
        },
    ),
    "luma completed": (
        "luma",
        {
            **LUMA, "state": "completed", "type": "video",
            "output": [
                {"type": "video", "url": "https://a.lumalabs.ai/1.mp4?X-Amz-Expires=3600"},
                {"type": "image", "url": "https://a.lumalabs.ai/1.png"},
            ],
        },
        {
            "status": "completed", "provider_status": "completed", "kind": "video", "progress": None,
            "model": "uni-1", "error": None, "usage": {"credits": None},
            "outputs": [
                {
                    **NOTHING_MORE, "url": "https://a.lumalabs.ai/1.mp4?X-Amz-Expires=3600",
                    "kind": "video", "content_type": "video/mp4", "expires_at": "in an hour",
                },
                {
                    **NOTHING_MORE, "url": "https://a.lumalabs.ai/1.png", "kind": "image",
                    "content_type": "image/png", "expires_at": "in an hour",
                },
            ],
            "created_at": "2026-06-01T11:59:30.000Z",
        },
    ),
    "luma failed": (
        "luma",
        {
            **LUMA, "state": "failed", "type": "image", "failure_code": "content_moderated",
            "failure_reason": "The prompt was refused.", "output": [],
        },
        {
            "status": "failed", "provider_status": "failed", "kind": "image", "progress": None,
            "model": "uni-1", "outputs": [], "usage": {"credits": None},
            "error": {
                "code": "content_moderated", "message": "The prompt was refused.", "retryable": False,
                "provider_code": "content_moderated",
            },
            "created_at": "2026-06-01T11:59:30.000Z",
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize(("provider", "answer", "expected"), MAPPINGS.values(), ids=MAPPINGS)
async def test_the_event_says_what_the_mapping_makes_of_the_providers_answer(
    world: World, provider: str, answer: dict[str, Any], expected: dict[str, Any]
) -> None:
    async with answering(answer) as origin:
        before = world.clock()
        _, generation = await watch_at(world, provider, origin, "job-1", metadata={"order": 42})
        [received] = await world.subscriber.got(1)
        after = world.clock()
    event = json.loads(received.body)
    data = event["data"]
    created_at, completed_at = parse_rfc3339(data["created_at"]), parse_rfc3339(data["completed_at"])
    assert created_at is not None and completed_at is not None
    # Where the provider does not say: when first watched, when learned, and the difference.
    expected = {"created_at": generation["watched_at"], **expected}
    if "completed_at" not in expected:
        assert before <= completed_at <= after
        expected |= {"completed_at": data["completed_at"], "duration_ms": completed_at - created_at}
    for output in data["outputs"]:
        if output["expires_at"] is not None:
            assert before <= (parse_rfc3339(output["expires_at"]) or 0) - 3_600_000 <= after
            output["expires_at"] = "in an hour"
    assert data == {
        **expected,
        "id": generation["id"],
        "provider": provider,
        "account": f"my-{provider}",
        "job_id": "job-1",
        "late": False,
        "learned_by": "poll",
        "metadata": {"order": 42},
        "raw": answer,
    }
    assert event["type"] == f"generation.{expected['status']}"
    assert event["timestamp"] == data["completed_at"]
    as_received = json.loads(received.body)
    assert received.body == json.dumps(as_received, separators=(",", ":"), ensure_ascii=False).encode()


# Who is told.


async def test_everybody_whom_it_concerns_gets_the_same_bytes_under_the_same_id(world: World) -> None:
    relay = await world.relay()
    wanted = {
        "/all": {},
        "/types": {"event_types": ["generation.failed", "generation.completed"]},
        "/accounts": {"accounts": ["luma", "vivix"]},
        "/both": {"event_types": ["generation.completed"], "accounts": ["luma"]},
    }
    unwanted = {
        "/other-types": {"event_types": ["generation.failed", "generation.progress"]},
        "/other-accounts": {"accounts": ["pictory"]},
        "/one-of-two": {"event_types": ["generation.completed"], "accounts": ["pictory"]},
    }
    made = {
        path: await world.endpoint(relay, path, **fields) for path, fields in {**wanted, **unwanted}.items()
    }
    job_id = world.simulator.submit("luma", duration=0)
    request = {"account": "luma", "job_id": job_id, "callback_url": world.subscriber.origin + "/callback"}
    generation = (await relay.api.post("/v1/generations", json=request)).json()
    received = {one.path: one for one in await world.subscriber.got(5)}
    assert set(received) == {*wanted, "/callback"}
    assert len({one.headers["webhook-id"] for one in received.values()}) == 1
    assert len({one.body for one in received.values()}) == 1
    signing = (await relay.api.get("/v1/signing-secret")).json()["secret"]
    for path, one in received.items():
        secret = signing if path == "/callback" else made[path]["secret"]
        Webhook(secret).verify(one.body, one.headers)
    listed = await relay.eventually(
        f"/v1/deliveries?generation_id={generation['id']}",
        lambda page: {one["status"] for one in page["data"]} == {"delivered"},
    )
    assert sorted(str(one["endpoint_id"]) for one in listed["data"]) == sorted(
        ["None", *(made[path]["id"] for path in wanted)]
    )
    [event] = (await relay.api.get("/v1/events")).json()["data"]
    assert {event["id"]} == {one.headers["webhook-id"] for one in received.values()}
    assert event["data"] == json.loads(received["/all"].body)["data"]


async def test_a_job_that_is_watched_twice_is_announced_once(world: World) -> None:
    relay = await world.relay()
    await world.endpoint(relay)
    generation = await world.watch(relay, "luma", duration=0.5)
    request = {"account": "luma", "job_id": generation["job_id"]}
    again = await relay.api.post("/v1/generations", json=request)
    assert (again.status_code, again.json()["id"]) == (200, generation["id"])
    await world.subscriber.got(1)
    ended = await relay.api.post("/v1/generations", json=request)
    assert (ended.status_code, ended.json()["status"]) == (200, "completed")
    assert len((await relay.api.get("/v1/events")).json()["data"]) == 1


# What nobody is told.


def as_json(value: Any, *, escape: bool) -> bytes:
    text = json.dumps(value)
    return (text.replace("/", "\\/") if escape else text).encode()


@pytest.mark.parametrize("escape", [False, True], ids=["as it is", "with escaped slashes"])
@pytest.mark.parametrize("provider", ["pictory", "luma"])
@pytest.mark.parametrize("outcome", ["completed", "refused"])
async def test_a_provider_that_echoes_the_key_and_the_callback_url_makes_relay_tell_nobody(
    world: World, provider: str, escape: bool, outcome: str, caplog: pytest.LogCaptureFixture
) -> None:
    key = "sk/live+0123456789abcdef"
    webhook_urls: list[str] = []

    async def echo(request: Request) -> Response:
        seen = {"authorization": request.headers["authorization"], "webhook": webhook_urls}
        done = {"status": "completed", "url": "https://a.test/1.png"}
        body = {
            "success": True, "data": done | {"error_message": request.headers["authorization"]},
            "state": "completed", "output": [{"type": "image", "url": "https://a.test/1.png"}],
            "request": seen, "message": f"refused: {request.headers['authorization']} {webhook_urls}",
        }  # fmt: skip
        refused = outcome == "refused" and world.clock() < refused_until
        return Response(as_json(body, escape=escape), 400 if refused else 200, media_type="application/json")

    refused_until = world.clock() + 10_000
    async with serving(Starlette(routes=[Route("/{path:path}", echo)])) as origin:
        relay, generation = await watch_at(world, provider, origin, "job-1", api_key=key)
        token = token_of(generation)
        webhook_urls.append(f"{relay.origin}/hooks/my-{provider}/{token}")
        told = []
        if outcome == "refused":
            path = f"/v1/generations/{generation['id']}"
            told.append((await relay.eventually(path, lambda one: one["last_error"]))["last_error"])
            world.clock.forward(seconds=11)
        [received] = await world.subscriber.got(1)
        told.append(json.dumps(json.loads(received.body)))
        for path in ("/v1/accounts", "/v1/events", "/v1/deliveries"):
            told.append(json.dumps((await relay.api.get(path)).json()))
    told.append(caplog.text)
    told.append((world.directory / "relay.db-wal").read_bytes().decode("latin-1").replace("\\/", "/"))
    for text in told:
        assert key not in text
        assert token not in text


def token_of(generation: dict[str, Any]) -> str:
    """The secret part of the URL that a provider may call back; made up where it never does."""
    url = generation["webhook_url"] or "x/WyJteS1sdW1hIiwiZ2VuXzEiXQ.c2lnbmF0dXJlLW9mLXJlbGF5"
    return str(url).rsplit("/", 1)[1]
