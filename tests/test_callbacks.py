"""Learning the end from Pictory's callback, which is only ever a hint."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from relay.times import parse_rfc3339
from tests.conftest import RunningRelay, World
from tests.serving import serving

DONE = {"success": True, "data": {"status": "completed", "url": "https://a.test/true.png"}}
RUNNING = {"success": True, "data": {"status": "in-progress"}}
UNKNOWN = {"success": False, "data": {"error_code": "5000", "error_message": "JOB_NOT_FOUND"}}


async def until(condition: Callable[[], bool], *, timeout: float = 15) -> None:
    async with asyncio.timeout(timeout):
        while True:
            if condition():
                return
            await asyncio.sleep(0.01)


def asks(world: World, job_id: str) -> int:
    return sum(one.job_id == job_id and one.method == "GET" for one in world.simulator.requests)


async def relay_of(world: World, **pictory: Any) -> RunningRelay:
    """A relay whose Pictory account keeps the provider's own slow pace, so that only callbacks are quick."""
    accounts = dict(world.document()["accounts"])
    account = {name: value for name, value in accounts["pictory"].items() if name != "poll_interval"}
    return await world.relay(accounts={**accounts, "pictory": {**account, **pictory}})


async def awaiting(relay: RunningRelay) -> dict[str, Any]:
    """A generation whose job is not known yet."""
    answer = await relay.api.post("/v1/generations", json={"account": "pictory"})
    assert answer.status_code == 201, answer.text
    return dict(answer.json())


async def call_back(url: str, body: Any) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    async with httpx.AsyncClient() as client:
        return await client.post(url, content=content)


@dataclass
class Pictory:
    """A Pictory whose answers are given by job id; those in `held` wait until they are let go."""

    answers: dict[str, Any] = field(default_factory=dict)
    paths: list[str] = field(default_factory=list)
    held: dict[str, asyncio.Event] = field(default_factory=dict)

    async def answer(self, request: Request) -> Response:
        self.paths.append(request.url.path)
        job_id = request.url.path.removeprefix("/jobs/")
        answer = self.answers.get(job_id, UNKNOWN)
        if job_id in self.held:
            await self.held[job_id].wait()
        return JSONResponse({"job_id": job_id, **answer}, 404 if answer is UNKNOWN else 200)

    def asked(self, job_id: str) -> int:
        return self.paths.count(f"/jobs/{job_id}")


@asynccontextmanager
async def pictory_with(**answers: Any) -> AsyncIterator[tuple[Pictory, str]]:
    pictory = Pictory(answers)
    async with serving(Starlette(routes=[Route("/{path:path}", pictory.answer)])) as origin:
        yield pictory, origin


@pytest.mark.parametrize("outcome", ["completed", "failed"])
async def test_the_job_is_learned_from_the_callback_and_confirmed_by_asking(world: World, outcome: str):
    relay = await relay_of(world)
    await world.endpoint(relay)
    generation = await awaiting(relay)
    assert generation["job_id"] is None
    assert generation["webhook_url"].startswith(f"{relay.origin}/hooks/pictory/")
    job_id = world.simulator.submit(
        "pictory", duration=0.1, outcome=outcome, request={"webhook": generation["webhook_url"]}
    )
    [received] = await world.subscriber.got(1)
    event = json.loads(received.body)
    assert (event["type"], event["data"]["job_id"]) == (f"generation.{outcome}", job_id)
    assert (event["data"]["id"], event["data"]["learned_by"]) == (generation["id"], "callback")
    assert asks(world, job_id) == 1
    await until(lambda: world.simulator.jobs["pictory", job_id].callbacks == [200])


async def test_a_job_id_that_was_patched_in_is_announced_by_its_callback(world: World):
    relay = await relay_of(world)
    await world.endpoint(relay)
    generation = await awaiting(relay)
    job_id = world.simulator.submit("pictory", duration=0.5, request={"webhook": generation["webhook_url"]})
    patched = await relay.api.patch(f"/v1/generations/{generation['id']}", json={"job_id": job_id})
    assert (patched.status_code, patched.json()["job_id"]) == (200, job_id)
    [received] = await world.subscriber.got(1)
    assert json.loads(received.body)["data"]["learned_by"] == "callback"
    other = await relay.api.patch(f"/v1/generations/{generation['id']}", json={"job_id": "another"})
    assert other.status_code == 409


@pytest.mark.parametrize(
    ("settings", "pauses"),
    [({"poll_interval": "500ms"}, (1, 2, 5, 10, 2.5)), ({}, (10, 10, 10, 10, 60))],
    ids=["asked as often as one likes", "documented to be asked every 10 s at most"],
)
async def test_after_a_callback_the_provider_is_asked_again_after_1_2_5_and_10_seconds_where_that_is_allowed(
    world: World, settings: dict[str, Any], pauses: tuple[float, ...]
):
    relay = await relay_of(world, **settings)
    await world.endpoint(relay)
    generation = await awaiting(relay)
    job_id = world.simulator.submit("pictory", duration=1e6)
    await relay.api.patch(f"/v1/generations/{generation['id']}", json={"job_id": job_id})
    assert (await call_back(generation["webhook_url"], {"job_id": job_id, **DONE})).status_code == 200
    path = f"/v1/generations/{generation['id']}"
    for asked, pause in enumerate(pauses, start=1):
        shown = await relay.eventually(path, lambda one, asked=asked: one["polls"] == asked)
        asked_at = [one.time for one in world.simulator.requests if one.job_id == job_id][-1] * 1000
        due_at = parse_rfc3339(shown["next_poll_at"])
        assert due_at is not None
        shortest = max(0.95 * pause, 0.5 if settings else 10)
        assert 1000 * shortest <= due_at - asked_at <= 1000 * (pause * 1.05 + 1)
        assert shown["status"] == "processing" or asked == 1
        if asked == len(pauses):
            world.simulator.submit("pictory", job_id=job_id, duration=0)
        world.clock.forward(seconds=(due_at - world.clock()) / 1000)
    [received] = await world.subscriber.got(1)
    assert json.loads(received.body)["type"] == "generation.completed"


async def test_a_callback_that_comes_before_the_providers_own_answer_is_confirmed_later(world: World):
    relay = await relay_of(world)
    await world.endpoint(relay)
    generation = await awaiting(relay)
    job_id = world.simulator.submit(
        "pictory", duration=0.1, callback="early", request={"webhook": generation["webhook_url"]}
    )
    await until(lambda: asks(world, job_id) == 1)
    assert world.subscriber.received == []
    [received] = await world.subscriber.got(1)
    assert json.loads(received.body)["data"]["learned_by"] == "callback"
    assert asks(world, job_id) >= 2


@pytest.mark.parametrize("named", [True, False], ids=["job known", "job unknown"])
async def test_a_callback_that_comes_twice_is_one_event(world: World, named: bool):
    relay = await relay_of(world)
    await world.endpoint(relay)
    generation = await awaiting(relay)
    job_id = world.simulator.submit(
        "pictory", duration=0.1, callback="twice", request={"webhook": generation["webhook_url"]}
    )
    if named:
        await relay.api.patch(f"/v1/generations/{generation['id']}", json={"job_id": job_id})
    await until(lambda: world.simulator.jobs["pictory", job_id].callbacks == [200, 200])
    await world.subscriber.got(1)
    await call_back(generation["webhook_url"], {"job_id": job_id, **DONE})
    other = await awaiting(relay)
    world.simulator.submit("pictory", duration=0, request={"webhook": other["webhook_url"]})
    await world.subscriber.got(2)
    events = (await relay.api.get("/v1/events")).json()["data"]
    assert sorted(one["generation_id"] for one in events) == sorted([generation["id"], other["id"]])


async def test_a_callback_that_never_comes_is_made_up_for_by_the_backstop(world: World):
    relay = await relay_of(world)
    await world.endpoint(relay)
    generation = await awaiting(relay)
    job_id = world.simulator.submit("pictory", duration=0, callback="never")
    patched = await relay.api.patch(f"/v1/generations/{generation['id']}", json={"job_id": job_id})
    assert patched.json()["next_poll_at"] is not None
    world.clock.forward(seconds=61)
    [received] = await world.subscriber.got(1)
    assert json.loads(received.body)["data"]["learned_by"] == "poll"


async def test_a_generation_whose_job_never_becomes_known_times_out_unasked(world: World):
    relay = await relay_of(world, timeout="1s")
    await world.endpoint(relay)
    generation = await awaiting(relay)
    [received] = await world.subscriber.got(1)
    event = json.loads(received.body)
    assert (event["type"], event["data"]["id"]) == ("generation.timed_out", generation["id"])
    assert event["data"]["job_id"] is None
    assert world.simulator.requests == []


@pytest.mark.parametrize(
    "claim",
    [
        {"data": {"status": "completed", "url": "https://evil.test/1.png"}, "success": True},
        {"data": {"status": "failed", "error_code": "X", "error_message": "evil"}, "success": False},
        {"status": "completed", "url": "https://evil.test/1.png", "webhook": "https://evil.test/"},
    ],
)
async def test_what_a_callback_says_of_a_running_job_is_not_announced(world: World, claim: Any):
    relay = await relay_of(world)
    await world.endpoint(relay)
    job_id = world.simulator.submit("pictory", duration=60)
    made = await relay.api.post("/v1/generations", json={"account": "pictory", "job_id": job_id})
    generation = made.json()
    assert (await call_back(generation["webhook_url"], {"job_id": job_id, **claim})).status_code == 200
    shown = await relay.eventually(f"/v1/generations/{generation['id']}", lambda one: one["polls"] >= 1)
    assert shown["status"] == "processing" or shown["status"] == "queued"
    assert (shown["outputs"], shown["error"]) == ([], None)
    world.clock.forward(seconds=61)
    [received] = await world.subscriber.got(1)
    assert json.loads(received.body)["type"] == "generation.completed"
    assert b"evil" not in received.body


async def sightings(world: World, relay: RunningRelay, path: str, count: int) -> None:
    """Lets Pictory be asked so often for a job that it says it does not know; that takes a minute."""
    for seen in range(count):
        # Time goes on once the answer has been written down, not while it is on its way.
        await relay.eventually(path, lambda one, seen=seen: one["polls"] > seen)
        world.clock.forward(seconds=5 * 3**seen)


async def test_a_claimed_job_that_the_provider_does_not_know_is_forgotten_after_a_minute(world: World):
    async with pictory_with(true=DONE) as (pictory, origin):
        relay = await relay_of(world, base_url=origin, poll_interval="100ms")
        await world.endpoint(relay)
        generation = await awaiting(relay)
        path = f"/v1/generations/{generation['id']}"
        await call_back(generation["webhook_url"], {"job_id": "forged", **DONE})
        await sightings(world, relay, path, 4)
        # What is not claimed any more cannot be asked about.
        await relay.eventually(path, lambda one: one["polls"] == 4)
        assert (await relay.api.post(f"{path}/refresh")).status_code == 409
        assert pictory.asked("forged") == 4
        await call_back(generation["webhook_url"], {"job_id": "true", **DONE})
        [received] = await world.subscriber.got(1)
    event = json.loads(received.body)
    assert (event["type"], event["data"]["job_id"]) == ("generation.completed", "true")
    assert event["data"]["outputs"][0]["url"] == "https://a.test/true.png"


async def test_a_job_that_another_generation_watches_cannot_be_claimed(world: World):
    async with pictory_with(taken=RUNNING) as (pictory, origin):
        relay = await relay_of(world, base_url=origin)
        await relay.api.post("/v1/generations", json={"account": "pictory", "job_id": "taken"})
        generation = await awaiting(relay)
        await call_back(generation["webhook_url"], {"job_id": "taken", **DONE})
        await until(lambda: pictory.asked("taken") == 1)
        path = f"/v1/generations/{generation['id']}"
        shown = await relay.eventually(path, lambda one: one["polls"] == 1)
    assert (shown["job_id"], shown["status"]) == (None, "queued")


async def test_a_callback_that_arrives_during_an_ask_is_not_lost(world: World):
    async with pictory_with(job=RUNNING) as (pictory, origin):
        relay = await relay_of(world, base_url=origin)
        await world.endpoint(relay)
        made = await relay.api.post("/v1/generations", json={"account": "pictory", "job_id": "job"})
        pictory.held["job"] = asyncio.Event()
        refreshing = asyncio.create_task(relay.api.post(f"/v1/generations/{made.json()['id']}/refresh"))
        await until(lambda: pictory.asked("job") == 1)
        pictory.answers["job"] = DONE
        assert (await call_back(made.json()["webhook_url"], {"job_id": "job"})).status_code == 200
        pictory.held.pop("job").set()
        assert (await refreshing).status_code == 200
        [received] = await world.subscriber.got(1)
    assert json.loads(received.body)["data"]["learned_by"] == "callback"


async def test_the_true_callback_that_arrives_while_a_forged_claim_is_given_up_is_not_lost(world: World):
    async with pictory_with(true=DONE) as (pictory, origin):
        relay = await relay_of(world, base_url=origin, poll_interval="20ms")
        await world.endpoint(relay)
        generation = await awaiting(relay)
        await call_back(generation["webhook_url"], {"job_id": "forged"})
        await sightings(world, relay, f"/v1/generations/{generation['id']}", 2)
        await until(lambda: pictory.asked("forged") == 3)
        # The next sighting is the last one, and is still under way when the true callback comes.
        pictory.held["forged"] = asyncio.Event()
        await relay.eventually(f"/v1/generations/{generation['id']}", lambda one: one["polls"] == 3)
        world.clock.forward(seconds=45)
        await until(lambda: pictory.asked("forged") == 4)
        await call_back(generation["webhook_url"], {"job_id": "true"})
        pictory.held.pop("forged").set()
        [received] = await world.subscriber.got(1)
    assert json.loads(received.body)["data"]["job_id"] == "true"


async def test_a_claimed_job_id_never_leads_anywhere_but_to_the_status_of_a_job(world: World):
    claims = [".", "..", "../account", "a/b", "a?b=c", "a#b", "%2e%2e", "ü", "\ud800", "x" * 5000]
    async with pictory_with() as (pictory, origin):
        relay = await relay_of(world, base_url=f"{origin}/base", poll_interval="100ms")
        for job_id in [*claims, "plain"]:
            answer = await call_back((await awaiting(relay))["webhook_url"], {"job_id": job_id, **DONE})
            assert answer.status_code == 200 or 400 <= answer.status_code < 500
        # The others have been asked about before: what is due is asked in the same looks.
        [plain] = (await relay.api.get("/v1/generations?limit=1")).json()["data"]
        await sightings(world, relay, f"/v1/generations/{plain['id']}", 4)
        await until(lambda: pictory.paths.count("/base/jobs/plain") == 4)
    assert all(path.startswith("/base/jobs/") and len(path) < 1000 for path in pictory.paths), pictory.paths


async def test_garbage_at_a_valid_url_is_answered_and_at_most_makes_relay_ask(world: World):
    relay = await relay_of(world)
    for body in (
        b"", b"not json", b"[]", b"null", b"\xff\xfe", b'{"job_id": 5}', b'{"job_id": null}', b"[" * 100_000,
    ):  # fmt: skip
        job_id = world.simulator.submit("pictory", duration=60)
        named = await relay.api.post("/v1/generations", json={"account": "pictory", "job_id": job_id})
        nameless = await awaiting(relay)
        for generation in (named.json(), nameless):
            answer = await call_back(generation["webhook_url"], body)
            assert answer.status_code == 200 or 400 <= answer.status_code < 500
        shown = (await relay.api.get(f"/v1/generations/{nameless['id']}")).json()
        assert (shown["job_id"], shown["status"]) == (None, "queued")
        assert asks(world, job_id) <= 1
    assert (await relay.api.get("/v1/events")).json()["data"] == []


async def test_a_token_that_is_not_ours_is_404_and_nothing_else(world: World):
    relay = await relay_of(world)
    generation = await awaiting(relay)
    url, other = generation["webhook_url"], (await awaiting(relay))["webhook_url"]
    for spoiled in (
        url[:-10] + ("A" if url[-10] != "A" else "B") + url[-9:],
        url.replace("/hooks/pictory/", "/hooks/luma/"),
        url.replace("/hooks/pictory/", "/hooks/unknown/"),
        url.rsplit("/", 1)[0] + "/token",
        url.rsplit(".", 1)[0] + "." + other.rsplit(".", 1)[1],
    ):
        assert (await call_back(spoiled, {"job_id": "job", **DONE})).status_code == 404, spoiled
    assert (await relay.api.get(f"/v1/generations/{generation['id']}")).json() == generation
    assert world.simulator.requests == []


async def test_a_callback_for_a_generation_that_is_gone_is_answered_and_asks_nothing(world: World):
    relay = await relay_of(world)
    generation = await awaiting(relay)
    await relay.api.delete(f"/v1/generations/{generation['id']}")
    assert (await call_back(generation["webhook_url"], {"job_id": "job", **DONE})).status_code == 200
    assert world.simulator.requests == []


async def test_a_callback_that_is_too_large_is_refused(world: World):
    relay = await relay_of(world)
    generation = await awaiting(relay)
    answer = await call_back(generation["webhook_url"], {"job_id": "job", "padding": "x" * 2_000_000})
    assert answer.status_code == 413
