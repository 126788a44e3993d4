"""The simulator is compared with the providers' documents, over real HTTP."""

import asyncio
import contextlib
import hashlib
import hmac
import json
import logging
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, Literal

import httpx
import pytest
import pytest_asyncio
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from relay.simulator import Simulator

START = 1_773_671_400.0  # 2026-03-16T14:30:00Z
PROVIDERS = ("pixellabs", "vivix", "pictory", "luma")
SUBMIT = {
    "pixellabs": "/generate",
    "vivix": "/generate",
    "pictory": "/aistudio/images",
    "luma": "/generations",
}
STATUS = {"pixellabs": "/generate/", "vivix": "/generations/", "pictory": "/jobs/", "luma": "/generations/"}

# The examples of the providers' documents.
PIXELLABS_COMPLETED: dict[str, Any] = {
    "generationId": "gen_8f7b2c9a1e3d",
    "status": "completed",
    "progress": 100,
    "imageUrl": "https://cdn.pixellabsai.app/images/gen_8f7b2c9a1e3d.png",
    "arweaveUrl": "https://arweave.net/abc123def456ghi789jkl012mno345pqr678stu901vwx234yz",
    "metadata": {
        "prompt": "cyberpunk samurai warrior with glowing katana",
        "style": "digital_art",
        "aspectRatio": "1:1",
        "quality": "high",
        "seed": 1847293847,
        "model": "synthetix-v2.1",
    },
    "createdAt": "2026-03-16T14:30:00Z",
    "completedAt": "2026-03-16T14:30:12Z",
}
VIVIX_PROCESSING = {
    "generation_id": "5b91a581-ee19-4f86-9fea-bd29471d69d5",
    "status": "processing",
    "model": "grok-imagine-image-quality",
    "credits_estimate": 211,
    "elapsed_ms": 4200,
    "created_at": "2026-05-10T12:34:56Z",
}
VIVIX_COMPLETED = {
    "generation_id": "5b91a581-ee19-4f86-9fea-bd29471d69d5",
    "status": "completed",
    "model": "grok-imagine-image-quality",
    "output_url": "https://pub-364da8d08c644542b169fbc7255349e7.r2.dev/5b91a581-ee19-4f86-9fea-bd29471d69d5.jpg",
    "output_urls": ["https://pub-…/5b91a581-ee19-4f86-9fea-bd29471d69d5.jpg"],
    "credits_used": 211,
    "duration_ms": 12420,
    "created_at": "2026-05-10T12:34:56Z",
    "completed_at": "2026-05-10T12:35:08Z",
}
VIVIX_FAILED = {
    "generation_id": "5b91a581-ee19-4f86-9fea-bd29471d69d5",
    "status": "failed",
    "error": "PROVIDER_ERROR",
    "message": "Underlying model returned an error.",
    "credits_used": 0,
    "created_at": "2026-05-10T12:34:56Z",
    "completed_at": "2026-05-10T12:35:01Z",
}
LUMA_EVERY_FIELD = {
    "id": "182bd5e5-6e1a-4fe4-a799-aa6d9a6ab26e",
    "created_at": "created_at",
    "model": "uni-1",
    "state": "queued",
    "type": "image",
    "failure_code": "content_moderated",
    "failure_reason": "failure_reason",
    "output": [{"type": "type", "url": "https://example.com"}],
}


class Clock:
    """Time that passes when a test says so, for `now` and for `sleep`."""

    def __init__(self) -> None:
        self.time = START
        self.sleepers: list[tuple[float, asyncio.Event]] = []

    def __call__(self) -> float:
        return self.time

    async def sleep(self, seconds: float) -> None:
        awake = asyncio.Event()
        self.sleepers.append((self.time + seconds, awake))
        await awake.wait()

    def advance(self, seconds: float) -> None:
        self.time += seconds
        for due, awake in self.sleepers:
            if due <= self.time:
                awake.set()
        self.sleepers = [(due, awake) for due, awake in self.sleepers if due > self.time]


class Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@contextlib.asynccontextmanager
async def serving(app: Starlette, http: Literal["httptools", "h11"] = "httptools") -> AsyncIterator[str]:
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    sock.listen()  # from here on a client may connect: it is served as soon as the server has started
    server = Server(uvicorn.Config(app, http=http, log_config=None, lifespan="on"))
    task = asyncio.create_task(server.serve(sockets=[sock]))
    try:
        yield f"http://127.0.0.1:{sock.getsockname()[1]}"
    finally:
        server.should_exit = True
        await task
        sock.close()


class Client:
    """Talks to a served simulator as a user of the four providers would."""

    def __init__(self, simulator: Simulator, clock: Clock, origin: str, http: httpx.AsyncClient) -> None:
        self.simulator, self.clock, self.origin, self.http = simulator, clock, origin, http
        self.base = simulator.base_urls(origin)

    def authorization(self, provider: str) -> str:
        return ("" if provider == "pictory" else "Bearer ") + self.simulator.keys[provider]

    async def submit(
        self, provider: str, body: dict[str, Any] | None = None, plan: dict[str, Any] | None = None
    ) -> httpx.Response:
        headers = {"authorization": self.authorization(provider)}
        if plan is not None:
            headers["x-simulator"] = json.dumps(plan)
        body = {"prompt": "a lighthouse"} | (body or {})
        return await self.http.post(self.base[provider] + SUBMIT[provider], json=body, headers=headers)

    async def status(self, provider: str, job_id: str, **headers: str) -> httpx.Response:
        headers = {"authorization": self.authorization(provider)} | headers
        return await self.http.get(self.base[provider] + STATUS[provider] + job_id, headers=headers)

    async def answers(self, provider: str, **plan: Any) -> list[dict[str, Any]]:
        """What a job of 100 s says while it is queued, while it runs and when it has ended."""
        job_id = self.simulator.submit(provider, duration=100, **plan)
        answers = []
        for seconds in (14, 46, 40):
            self.clock.advance(seconds)
            response = await self.status(provider, job_id)
            assert response.status_code == 200
            answers.append(response.json())
        return answers


@pytest_asyncio.fixture
async def client() -> AsyncIterator[Client]:
    clock = Clock()
    simulator = Simulator(seed=7, now=clock, sleep=clock.sleep)
    async with serving(simulator.app) as origin, httpx.AsyncClient(trust_env=False) as http:
        yield Client(simulator, clock, origin, http)


class Receiver:
    """A webhook receiver of our own, on a real socket."""

    def __init__(self) -> None:
        self.received: asyncio.Queue[tuple[dict[str, str], dict[str, Any]]] = asyncio.Queue()
        self.bodies: list[bytes] = []
        self.app = Starlette(routes=[Route("/hook", self._hook, methods=["POST"])])
        self.url = ""

    async def _hook(self, request: Request) -> Response:
        self.bodies.append(await request.body())
        self.received.put_nowait((dict(request.headers), await request.json()))
        return Response(status_code=202)

    async def next(self) -> tuple[dict[str, str], dict[str, Any]]:
        return await asyncio.wait_for(self.received.get(), 10)


@pytest_asyncio.fixture
async def receiver() -> AsyncIterator[Receiver]:
    receiver = Receiver()
    async with serving(receiver.app) as origin:
        receiver.url = f"{origin}/hook"
        yield receiver


def without(example: dict[str, Any], *names: str) -> set[str]:
    assert set(names) <= set(example)
    return set(example) - set(names)


# --- what each provider answers -----------------------------------------------------------------------------


async def test_a_pixellabs_submit_answers_as_documented(client: Client) -> None:
    response = await client.submit("pixellabs", plan={"duration": 15})
    answer = response.json()
    assert response.status_code == 200
    assert answer.pop("generationId").startswith("gen_")
    assert answer == {"status": "queued", "estimatedTime": 15, "createdAt": "2026-03-16T14:30:00Z"}


async def test_a_vivix_submit_answers_as_documented(client: Client) -> None:
    response = await client.submit("vivix")
    assert response.status_code == 200
    assert set(response.json()) == {"generation_id", "status", "credits_estimate"}
    assert response.json()["status"] == "pending"


async def test_a_pictory_submit_answers_as_documented(client: Client) -> None:
    response = await client.submit("pictory", plan={"job_id": "4d82d040"})
    assert response.status_code == 200
    assert response.json() == {"success": True, "data": {"jobId": "4d82d040"}}


async def test_a_luma_submit_answers_201_with_the_generation(client: Client) -> None:
    response = await client.submit("luma", {"model": "uni-1-max", "type": "image_edit"})
    answer = response.json()
    assert response.status_code == 201
    assert set(answer) == without(LUMA_EVERY_FIELD, "failure_code", "failure_reason", "output")
    assert (answer["state"], answer["model"], answer["type"]) == ("queued", "uni-1-max", "image_edit")
    assert (await client.status("luma", answer["id"])).json() == answer


async def test_a_pixellabs_job_runs_to_completion_as_documented(client: Client) -> None:
    queued, processing, completed = await client.answers("pixellabs")
    running = without(PIXELLABS_COMPLETED, "imageUrl", "arweaveUrl", "completedAt")
    assert set(queued) == set(processing) == running
    assert (queued["status"], queued["progress"]) == ("queued", 0)
    assert (processing["status"], processing["progress"]) == ("processing", 60)
    assert set(completed) == set(PIXELLABS_COMPLETED)
    assert set(completed["metadata"]) == set(PIXELLABS_COMPLETED["metadata"])
    assert (completed["status"], completed["progress"]) == ("completed", 100)
    assert (completed["createdAt"], completed["completedAt"]) == (
        "2026-03-16T14:30:00Z",
        "2026-03-16T14:31:40Z",
    )


async def test_a_failed_pixellabs_job_has_no_image_and_only_the_planned_error(client: Client) -> None:
    *_, failed = await client.answers("pixellabs", outcome="failed")
    assert failed["status"] == "failed"
    assert set(failed) == without(PIXELLABS_COMPLETED, "imageUrl", "arweaveUrl", "completedAt")
    *_, failed = await client.answers("pixellabs", outcome="failed", code="nsfw", message="No.")
    assert (failed["error"], failed["message"]) == ("nsfw", "No.")


async def test_a_vivix_job_runs_to_completion_as_documented(client: Client) -> None:
    pending, processing, completed = await client.answers("vivix", request={"number_results": 3})
    assert set(pending) == set(processing) == set(VIVIX_PROCESSING)
    assert (pending["status"], processing["status"]) == ("pending", "processing")
    assert processing["elapsed_ms"] == 60_000
    assert set(completed) == set(VIVIX_COMPLETED)
    assert completed["duration_ms"] == 100_000
    assert len(set(completed["output_urls"])) == 3
    assert completed["output_url"] == completed["output_urls"][0]


async def test_a_failed_vivix_job_costs_nothing(client: Client) -> None:
    *_, failed = await client.answers("vivix", outcome="failed")
    assert set(failed) == set(VIVIX_FAILED)
    documented = ("status", "error", "message", "credits_used")
    assert [failed[name] for name in documented] == [VIVIX_FAILED[name] for name in documented]


async def test_a_pictory_job_runs_to_completion_as_documented(client: Client) -> None:
    first, second, completed = await client.answers("pictory", job_id="j", request={"model": "flux-schnell"})
    assert first == second == {"job_id": "j", "success": True, "data": {"status": "in-progress"}}
    assert set(completed) == {"job_id", "success", "data"}
    assert set(completed["data"]) == {"status", "url", "width", "height", "aiCreditsUsed"}
    assert completed["success"] is True
    assert completed["data"]["aiCreditsUsed"] == 0.6


async def test_a_failed_pictory_job_says_why_and_is_no_success(client: Client) -> None:
    *_, failed = await client.answers("pictory", job_id="j", outcome="failed", code="BAD", message="Bad.")
    data = {"status": "failed", "error_code": "BAD", "error_message": "Bad."}
    assert failed == {"job_id": "j", "success": False, "data": data}


async def test_a_luma_job_runs_to_completion_as_documented(client: Client) -> None:
    queued, processing, completed = await client.answers("luma", outputs=2)
    running = without(LUMA_EVERY_FIELD, "failure_code", "failure_reason", "output")
    assert set(queued) == set(processing) == running
    assert (queued["state"], processing["state"], completed["state"]) == ("queued", "processing", "completed")
    assert set(completed) == without(LUMA_EVERY_FIELD, "failure_code", "failure_reason")
    assert [set(output) for output in completed["output"]] == [{"type", "url"}] * 2
    assert {output["type"] for output in completed["output"]} == {"image"}
    query = httpx.URL(completed["output"][0]["url"]).params
    assert (query["X-Amz-Expires"], query["X-Amz-Date"]) == ("3600", "20260316T143140Z")


async def test_luma_signs_new_output_urls_for_each_answer(client: Client) -> None:
    job_id = client.simulator.submit("luma", duration=0)
    first = (await client.status("luma", job_id)).json()["output"][0]["url"]
    client.clock.advance(7200)
    assert (await client.status("luma", job_id)).json()["output"][0]["url"] != first


async def test_a_failed_luma_job_has_a_documented_failure_code(client: Client) -> None:
    *_, failed = await client.answers("luma", outcome="failed", code="content_moderated")
    assert set(failed) == without(LUMA_EVERY_FIELD, "output")
    assert (failed["state"], failed["failure_code"]) == ("failed", "content_moderated")


async def test_a_job_may_complete_without_any_output(client: Client) -> None:
    answers = {name: (await client.answers(name, outputs=0))[-1] for name in PROVIDERS}
    assert (answers["pixellabs"]["imageUrl"], answers["pixellabs"]["arweaveUrl"]) == (None, None)
    assert (answers["vivix"]["output_url"], answers["vivix"]["output_urls"]) == (None, [])
    assert answers["pictory"]["data"]["url"] is None
    assert answers["luma"]["output"] == []


async def test_a_planned_status_word_is_answered_until_the_job_ends(client: Client) -> None:
    words = []
    for name in PROVIDERS:
        for answer in await client.answers(name, status="upscaling"):
            words.append((answer.get("data") or answer).get("status") or answer["state"])
    assert words == ["upscaling", "upscaling", "completed"] * 4


# --- who may ask for what -----------------------------------------------------------------------------------

UNAUTHORIZED: dict[str, Callable[[dict[str, Any]], bool]] = {
    "pixellabs": lambda body: (
        set(body) == {"error", "message", "details"} and body["error"] == "invalid_token"
    ),
    "vivix": lambda body: set(body) == {"error", "message"} and body["error"] == "KEY_INVALID",
    "pictory": lambda body: body == {"message": "Unauthorized"},
    "luma": lambda body: set(body) == {"detail"},
}
UNKNOWN: dict[str, Callable[[dict[str, Any]], bool]] = {
    "pixellabs": lambda body: body["error"] == "not_found",
    "vivix": lambda body: body["error"] == "NOT_FOUND",
    "pictory": lambda body: body["data"] == {"error_code": "5000", "error_message": "JOB_NOT_FOUND"},
    "luma": lambda body: set(body) == {"detail"},
}


@pytest.mark.parametrize("provider", PROVIDERS)
async def test_a_wrong_key_gets_401_in_the_providers_own_shape(client: Client, provider: str) -> None:
    job_id = client.simulator.submit(provider)
    url = client.base[provider]
    wrong = {"authorization": client.authorization(provider) + "x"}
    for response in (
        await client.http.get(url + STATUS[provider] + job_id),
        await client.status(provider, job_id, **wrong),
        await client.http.post(url + SUBMIT[provider], json={}, headers=wrong),
    ):
        assert response.status_code == 401
        assert UNAUTHORIZED[provider](response.json())


async def test_pictory_refuses_a_bearer_prefix_and_the_others_require_it(client: Client) -> None:
    for provider in PROVIDERS:
        key, job_id = client.simulator.keys[provider], client.simulator.submit(provider)
        statuses = [
            (await client.status(provider, job_id, authorization=value)).status_code
            for value in (key, f"Bearer {key}")
        ]
        assert statuses == ([200, 401] if provider == "pictory" else [401, 200])


@pytest.mark.parametrize("provider", PROVIDERS)
async def test_an_unknown_job_gets_404_in_the_providers_own_shape(client: Client, provider: str) -> None:
    response = await client.status(provider, "nobody")
    assert response.status_code == 404
    assert UNKNOWN[provider](response.json())


async def test_a_job_of_another_account_is_403_at_vivix_and_unknown_elsewhere(client: Client) -> None:
    seen = {}
    for provider in PROVIDERS:
        await client.submit(provider, plan={"job_id": "theirs", "owner": "other"})
        seen[provider] = await client.status(provider, "theirs")
    assert seen["vivix"].json()["error"] == "NOT_YOURS"
    assert [seen[name].status_code for name in PROVIDERS] == [404, 403, 404, 404]


def test_keys_can_be_replaced() -> None:
    simulator = Simulator(keys={"luma": "mine"})
    assert simulator.keys["luma"] == "mine"
    assert simulator.keys["vivix"] == "vvx_live_simulator"


@pytest.mark.parametrize("provider", PROVIDERS)
async def test_a_submit_that_is_no_json_object_gets_400(client: Client, provider: str) -> None:
    headers = {"authorization": client.authorization(provider)}
    for content in (b"", b"[1]", b"{"):
        response = await client.http.post(
            client.base[provider] + SUBMIT[provider], content=content, headers=headers
        )
        assert response.status_code == 400
    assert client.simulator.jobs == {}


async def test_pictory_refuses_a_webhook_that_is_no_url(client: Client) -> None:
    response = await client.submit("pictory", {"webhook": "example.com/hook"})
    assert response.status_code == 400
    assert response.json()["fields"][0]["name"] == "webhook"


async def test_documented_headers_are_sent(client: Client) -> None:
    seen = {}
    for provider in PROVIDERS:
        job_id = client.simulator.submit(provider)
        seen[provider] = (await client.status(provider, job_id, **{"x-request-id": "mine"})).headers
    assert seen["pixellabs"]["x-ratelimit-limit"] == "1000"
    assert seen["pixellabs"]["x-ratelimit-remaining"] == "999"
    assert float(seen["pixellabs"]["x-ratelimit-reset"]) == START + 60
    assert {"x-request-id", "x-ratelimit-remaining", "x-credits-balance"} <= set(seen["vivix"])
    assert (seen["luma"]["x-request-id"], seen["luma"]["x-api-version"]) == ("mine", "2026-04-01")
    refused = await client.status("pixellabs", "nobody", authorization="")
    assert refused.headers["x-ratelimit-remaining"] == "998"
    client.clock.advance(60)
    assert (await client.status("pixellabs", "nobody")).headers["x-ratelimit-remaining"] == "999"


# --- troubles -----------------------------------------------------------------------------------------------


async def troubled(client: Client, provider: str, kind: str, **options: Any) -> httpx.Response:
    """The answer that a trouble spoils, after making sure that the one after it is good again."""
    job_id = client.simulator.submit(provider, duration=0)
    client.simulator.trouble(provider, kind, **options)
    response = await client.status(provider, job_id)
    assert (await client.status(provider, job_id)).json()
    return response


@pytest.mark.parametrize("provider", PROVIDERS)
async def test_trouble_rate_limited(client: Client, provider: str) -> None:
    response = await troubled(client, provider, "rate_limited", retry_after=17)
    assert (response.status_code, response.headers["retry-after"]) == (429, "17")
    assert response.json()
    assert (await troubled(client, provider, "rate_limited")).headers["retry-after"] == "5"


@pytest.mark.parametrize("provider", PROVIDERS)
async def test_trouble_server_error(client: Client, provider: str) -> None:
    assert (await troubled(client, provider, "server_error")).status_code == 500
    response = await troubled(client, provider, "server_error", status=503, retry_after="3")
    assert (response.status_code, response.headers["retry-after"]) == (503, "3")


async def test_trouble_html(client: Client) -> None:
    response = await troubled(client, "luma", "html")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/html")


@pytest.mark.parametrize("provider", PROVIDERS)
async def test_trouble_truncated(client: Client, provider: str) -> None:
    response = await troubled(client, provider, "truncated")
    assert (response.status_code, response.headers["content-type"]) == (200, "application/json")
    assert response.content.startswith(b"{")
    with pytest.raises(ValueError):
        response.json()


@pytest.mark.parametrize("parser", ["httptools", "h11"])
async def test_trouble_dropped_closes_the_connection_without_an_answer_or_a_complaint(
    parser: Literal["httptools", "h11"], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    simulator = Simulator()
    job_id = simulator.submit("vivix")
    simulator.trouble("vivix", "dropped", count=2)
    async with (
        serving(simulator.app, parser) as origin,
        httpx.AsyncClient(trust_env=False) as http,
    ):
        client = Client(simulator, Clock(), origin, http)
        for _ in range(2):
            with pytest.raises(httpx.RemoteProtocolError, match="without sending a response"):
                await client.status("vivix", job_id)
        assert (await client.status("vivix", job_id)).status_code == 200
    assert [recorded.status for recorded in simulator.requests] == [None, None, 200]
    assert [record for record in caplog.records if record.levelno > logging.INFO] == []


async def test_trouble_dropped_is_a_reset_connection_without_a_server() -> None:
    simulator = Simulator()
    simulator.trouble("luma", "dropped")
    transport = httpx.ASGITransport(simulator.app)
    async with httpx.AsyncClient(transport=transport) as http:
        with pytest.raises(ConnectionResetError):
            await http.get("http://simulator/luma/v1/generations/x")


@pytest.mark.parametrize("provider", PROVIDERS)
async def test_trouble_unknown_status(client: Client, provider: str) -> None:
    for options in ({}, {"status": "hibernating"}):
        body = (await troubled(client, provider, "unknown_status", **options)).json()
        assert ((body.get("data") or body).get("status") or body["state"]) == "hibernating"


async def test_trouble_not_found_in_body(client: Client) -> None:
    response = await troubled(client, "pictory", "not_found_in_body")
    assert response.status_code == 200
    assert UNKNOWN["pictory"](response.json())


async def test_trouble_cloudflare(client: Client) -> None:
    response = await troubled(client, "pictory", "cloudflare")
    assert (response.status_code, "1010" in response.text) == (403, True)
    assert response.headers["content-type"].startswith("text/html")


async def test_trouble_wrong_type(client: Client) -> None:
    response = await troubled(client, "luma", "wrong_type")
    assert response.headers["content-type"].startswith("text/plain")
    assert response.json()["state"] == "completed"


async def test_trouble_empty(client: Client) -> None:
    response = await troubled(client, "luma", "empty")
    assert (response.status_code, response.content) == (200, b"")


async def test_a_trouble_of_one_job_leaves_the_others_alone(client: Client) -> None:
    ill, well = client.simulator.submit("luma"), client.simulator.submit("luma")
    client.simulator.trouble("luma", "server_error", job_id=ill)
    assert (await client.status("luma", well)).status_code == 200
    assert (await client.status("luma", ill)).status_code == 500


async def test_troubles_of_a_provider_follow_each_other_and_spare_the_rest(client: Client) -> None:
    job_id, other = client.simulator.submit("luma"), client.simulator.submit("vivix")
    client.simulator.trouble("luma", "server_error", count=2)
    client.simulator.trouble("luma", "rate_limited")
    assert (await client.status("vivix", other)).status_code == 200
    assert [(await client.status("luma", job_id)).status_code for _ in range(4)] == [500, 500, 429, 200]


# --- control ------------------------------------------------------------------------------------------------


async def test_troubles_are_made_and_cleared_over_http(client: Client) -> None:
    job_id, url = client.simulator.submit("luma"), f"{client.origin}/_simulator/troubles"
    made = await client.http.post(url, json={"provider": "luma", "kind": "server_error", "count": 5})
    assert made.status_code == 201
    assert (await client.status("luma", job_id)).status_code == 500
    assert (await client.http.delete(url)).status_code == 204
    assert (await client.status("luma", job_id)).status_code == 200


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"provider": "midjourney", "kind": "html"}, "provider"),
        ({"provider": "luma", "kind": "flood"}, "kind"),
        ({"provider": "luma", "kind": "not_found_in_body"}, "kind"),
        ({"provider": "luma", "kind": "html", "count": 0}, "count"),
        ({"provider": "luma", "kind": "html", "cuont": 1}, "cuont"),
        ({"provider": "luma", "kind": "server_error", "status": 200}, "status"),
        ({"provider": "luma", "kind": "rate_limited", "retry_after": "1\r\nx: y"}, "retry_after"),
        ([], "body"),
    ],
)
async def test_a_bad_trouble_gets_422_naming_the_field(client: Client, body: Any, field: str) -> None:
    response = await client.http.post(f"{client.origin}/_simulator/troubles", json=body)
    assert response.status_code == 422
    assert field in [error["field"] for error in response.json()["errors"]]


async def test_a_trouble_that_is_no_json_gets_422(client: Client) -> None:
    response = await client.http.post(f"{client.origin}/_simulator/troubles", content=b"{")
    assert (response.status_code, response.json()["errors"][0]["field"]) == (422, "body")


@pytest.mark.parametrize(
    ("header", "field"),
    [
        ('{"outcome": "exploded"}', "outcome"),
        ('{"duration": -1}', "duration"),
        ('{"duration": 1e999}', "duration"),
        ('{"job_id": "a/b"}', "job_id"),
        ('{"colour": "red"}', "colour"),
        ("{", "X-Simulator"),
    ],
)
async def test_a_bad_plan_gets_422_naming_the_field(client: Client, header: str, field: str) -> None:
    headers = {"authorization": client.authorization("luma"), "x-simulator": header}
    response = await client.http.post(client.base["luma"] + "/generations", json={}, headers=headers)
    assert (response.status_code, response.json()["errors"][0]["field"]) == (422, field)


def test_bad_plans_and_troubles_in_process_are_value_errors() -> None:
    simulator = Simulator()
    with pytest.raises(ValueError, match="midjourney"):
        simulator.submit("midjourney")
    with pytest.raises(ValueError, match="outcome"):
        simulator.submit("luma", outcome="exploded")
    with pytest.raises(ValueError, match="kind"):
        simulator.trouble("luma", "flood")


async def test_requests_are_recorded_without_their_key(client: Client) -> None:
    job_id = (await client.submit("vivix")).json()["generation_id"]
    client.clock.advance(1)
    await client.status("vivix", job_id)
    await client.status("vivix", "nobody")
    response = await client.http.get(f"{client.origin}/_simulator/requests")
    base = {"provider": "vivix"}
    assert response.json() == [
        base
        | {
            "method": "POST",
            "path": "/vivix/api/v1/generate",
            "job_id": job_id,
            "time": START,
            "status": 200,
        },
        base
        | {"method": "GET", "path": f"/vivix/api/v1/generations/{job_id}", "job_id": job_id}
        | {"time": START + 1, "status": 200},
        base
        | {"method": "GET", "path": "/vivix/api/v1/generations/nobody", "job_id": "nobody"}
        | {"time": START + 1, "status": 404},
    ]
    assert client.simulator.keys["vivix"] not in response.text


async def test_jobs_are_listed(client: Client) -> None:
    job_id = client.simulator.submit("luma", duration=10)
    client.clock.advance(5)
    (job,) = (await client.http.get(f"{client.origin}/_simulator/jobs")).json()
    assert job == {
        "provider": "luma",
        "job_id": job_id,
        "phase": "processing",
        "submitted_at": START,
        "ends_at": START + 10,
        "callbacks": [],
    }


def test_the_same_seed_gives_the_same_jobs() -> None:
    first, second, third = (Simulator(seed=seed) for seed in (1, 1, 2))
    ids = [[each.submit(name) for name in PROVIDERS] for each in (first, second, third)]
    durations = [[job.duration for job in each.jobs.values()] for each in (first, second, third)]
    assert ids[0] == ids[1] != ids[2]
    assert durations[0] == durations[1] != durations[2]


def test_durations_spread_around_the_median() -> None:
    simulator = Simulator(seed=3, median=12, sigma=0.4)
    for _ in range(1001):
        simulator.submit("luma")
    durations = sorted(job.duration for job in simulator.jobs.values())
    assert 11 < durations[500] < 13
    assert durations[0] < 6 < 24 < durations[-1]


# --- Pictory calls back -------------------------------------------------------------------------------------


async def submit_pictory(client: Client, webhook: str, **plan: Any) -> str:
    response = await client.submit("pictory", {"webhook": webhook}, {"duration": 10, **plan})
    return str(response.json()["data"]["jobId"])


async def word(client: Client, job_id: str) -> str:
    return str((await client.status("pictory", job_id)).json()["data"]["status"])


VIVIX_CALLBACK = {
    "generation_id": "019038b7-1234-7a92-b9f2-d4e8a91c6f08",
    "status": "completed",
    "model": "runware:101@1",
    "output_url": "https://im.runware.ai/image/abc.png",
    "output_urls": ["https://im.runware.ai/image/abc.png"],
    "credits_charged": 12,
    "duration_ms": 4321,
    "completed_at": "2026-05-12T18:23:45.123Z",
}


async def callbacks_are_done(client: Client) -> None:
    await asyncio.wait_for(asyncio.gather(*client.simulator._callbacks), 10)


@pytest.mark.parametrize("outcome", ["completed", "failed"])
async def test_a_callback_carries_what_the_status_request_answers(
    client: Client, receiver: Receiver, outcome: str
) -> None:
    job_id = await submit_pictory(client, receiver.url, outcome=outcome)
    client.clock.advance(9.9)
    assert len(client.clock.sleepers) == 1
    client.clock.advance(0.2)
    headers, body = await receiver.next()
    assert headers["user-agent"].startswith("Pictory-Webhook-Simulator/")
    assert headers["content-type"] == "application/json"
    assert body["data"]["status"] == outcome
    assert body == (await client.status("pictory", job_id)).json()
    await callbacks_are_done(client)
    assert receiver.received.empty()
    assert client.simulator.jobs["pictory", job_id].callbacks == [202]


async def test_a_callback_comes_twice_when_planned(client: Client, receiver: Receiver) -> None:
    job_id = await submit_pictory(client, receiver.url, callback="twice")
    client.clock.advance(10.1)
    assert (await receiver.next())[1] == (await receiver.next())[1]
    await callbacks_are_done(client)
    assert client.simulator.jobs["pictory", job_id].callbacks == [202, 202]


async def test_a_callback_never_comes_when_planned(client: Client, receiver: Receiver) -> None:
    job_id = await submit_pictory(client, receiver.url, callback="never")
    assert client.clock.sleepers == []
    client.clock.advance(3600)
    assert await word(client, job_id) == "completed"
    assert client.simulator.jobs["pictory", job_id].callbacks == []
    assert receiver.received.empty()


async def test_a_late_callback_comes_five_seconds_after_the_end(client: Client, receiver: Receiver) -> None:
    job_id = await submit_pictory(client, receiver.url, callback="late")
    client.clock.advance(14.9)
    assert await word(client, job_id) == "completed"
    assert len(client.clock.sleepers) == 1
    client.clock.advance(0.2)
    assert (await receiver.next())[1]["job_id"] == job_id


async def test_an_early_callback_comes_before_the_status_request_knows(
    client: Client, receiver: Receiver
) -> None:
    job_id = await submit_pictory(client, receiver.url, callback="early")
    client.clock.advance(10.1)
    assert (await receiver.next())[1]["data"]["status"] == "completed"
    assert await word(client, job_id) == "in-progress"
    client.clock.advance(1.9)
    assert await word(client, job_id) == "completed"


async def test_a_callback_that_nobody_takes_is_logged_and_forgotten(
    client: Client, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        job_id = await submit_pictory(client, f"http://127.0.0.1:{unused.getsockname()[1]}/secret")
        client.clock.advance(10.1)
        await callbacks_are_done(client)
    assert client.simulator.jobs["pictory", job_id].callbacks == [None]
    assert job_id in caplog.text
    assert "secret" not in caplog.text


async def test_callbacks_that_still_wait_end_with_the_app(receiver: Receiver) -> None:
    clock = Clock()
    simulator = Simulator(now=clock, sleep=clock.sleep)
    async with serving(simulator.app) as origin, httpx.AsyncClient(trust_env=False) as http:
        await submit_pictory(Client(simulator, clock, origin, http), receiver.url)
        (waiting,) = simulator._callbacks
    assert waiting.cancelled()


async def test_a_webhook_means_nothing_to_providers_that_do_not_call_back(
    client: Client, receiver: Receiver
) -> None:
    for provider in ("pixellabs", "vivix", "luma"):
        assert (await client.submit(provider, {"webhook": receiver.url})).is_success
    assert client.clock.sleepers == []


@pytest.mark.parametrize("outcome", ["completed", "failed"])
async def test_a_vivix_callback_is_signed_and_has_the_fields_of_its_document(
    client: Client, receiver: Receiver, outcome: str
) -> None:
    plan = {"duration": 10, "outcome": outcome, "webhook": receiver.url, "webhook_secret": "s3cret"}
    job_id = (await client.submit("vivix", plan=plan)).json()["generation_id"]
    client.clock.advance(10.1)
    headers, body = await receiver.next()
    assert (headers["user-agent"], headers["content-type"]) == ("Vivix-Webhook/1.0", "application/json")
    assert headers["x-vivix-event"] == f"generation.{outcome}"
    signed = hmac.new(b"s3cret", receiver.bodies[-1], hashlib.sha256).hexdigest()
    assert headers["x-vivix-signature"] == f"sha256={signed}"
    assert (body["generation_id"], body["status"]) == (job_id, outcome)
    assert body["completed_at"] == "2026-03-16T14:30:10.000Z"
    if outcome == "completed":
        assert set(body) == set(VIVIX_CALLBACK)
        assert {name: type(value) for name, value in body.items()} == {
            name: type(value) for name, value in VIVIX_CALLBACK.items()
        }
    else:
        assert set(body) == {*VIVIX_CALLBACK, "error_code", "error_message"}
        assert (body["output_url"], body["output_urls"], body["credits_charged"]) == (None, None, 0)
        assert body["error_code"] == "PROVIDER_ERROR"


async def test_a_vivix_callback_that_comes_twice_has_another_delivery_id(
    client: Client, receiver: Receiver
) -> None:
    await client.submit("vivix", plan={"duration": 10, "webhook": receiver.url, "callback": "twice"})
    client.clock.advance(10.1)
    (first, one), (second, other) = await receiver.next(), await receiver.next()
    assert one == other
    assert first["x-vivix-signature"] == second["x-vivix-signature"]
    assert first["x-vivix-delivery-id"] != second["x-vivix-delivery-id"]
