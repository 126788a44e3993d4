"""What is announced is what the provider itself says: whatever goes wrong on the way, however often, and
whoever else speaks, also when Relay is started anew in the middle of it."""

import asyncio
import hmac
import json
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from relay.times import parse_rfc3339
from tests.conftest import RunningRelay, World
from tests.serving import serving
from tests.test_cli import relay as program
from tests.test_cli import write
from tests.test_polling import a_while, asks, no_more_troubles, only, provider_answering, until

ENDINGS = [f"generation.{status}" for status in ("completed", "failed", "canceled", "timed_out")]
FAILING, RECOVERED, UNKNOWN = "account.failing", "account.recovered", "generation.unknown_status"
COMPLETED, TIMED_OUT = "generation.completed", "generation.timed_out"
SECRET = "the-secret-of-the-webhook"
FOR_EVER = 1_000_000


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is due is looked for more often: the tests wait for it."""
    monkeypatch.setattr("relay.app.POLL_TICK", 0.05)


async def account(relay: RunningRelay, name: str) -> dict[str, Any]:
    listed = (await relay.api.get("/v1/accounts")).json()["data"]
    return next(dict(one) for one in listed if one["name"] == name)


async def becomes(relay: RunningRelay, name: str, status: str) -> None:
    await relay.eventually(
        "/v1/accounts", lambda page: {one["name"]: one["status"] for one in page["data"]}[name] == status
    )


async def ended(relay: RunningRelay, *generations: dict[str, Any], status: str = "completed") -> None:
    for one in generations:
        await relay.eventually(f"/v1/generations/{one['id']}", lambda shown: shown["status"] == status)


async def announced(world: World, relay: RunningRelay) -> Counter[str]:
    """What was announced, by type, once all of it is delivered: each event was received exactly once."""
    page = await relay.eventually(
        "/v1/deliveries?limit=100", lambda page: {one["status"] for one in page["data"]} <= {"delivered"}
    )
    wanted = {one["event_id"] for one in page["data"]}
    assert sorted(one.headers["webhook-id"] for one in world.subscriber.received) == sorted(wanted)
    return Counter(json.loads(one.body)["type"] for one in world.subscriber.received)


def received(world: World, type_: str) -> list[dict[str, Any]]:
    events = [json.loads(one.body) for one in world.subscriber.received]
    return [one["data"] for one in events if one["type"] == type_]


def asked(world: World, *generations: dict[str, Any]) -> list[int | None]:
    return [status for one in generations for status in asks(world, one["job_id"])]


async def call_back(url: str, body: bytes, headers: dict[str, str] | None = None) -> int:
    async with httpx.AsyncClient() as client:
        return (await client.post(url, content=body, headers=headers)).status_code


async def vivix_calls_back(relay: RunningRelay, job_id: str, status: str = "completed") -> int:
    body = json.dumps({"generation_id": job_id, "status": status}).encode()
    signature = f"sha256={hmac.digest(SECRET.encode(), body, 'sha256').hex()}"
    return await call_back(f"{relay.origin}/hooks/vivix", body, {"x-vivix-signature": signature})


# Callback and poll.


@pytest.mark.parametrize("outcome", ["completed", "failed"])
async def test_callbacks_polls_and_refreshes_at_once_are_one_announcement(world: World, outcome: str):
    relay = await world.relay(accounts=only("pictory", world, poll_interval="20ms"))
    await world.endpoint(relay)
    generation = (await relay.api.post("/v1/generations", json={"account": "pictory"})).json()
    job_id = world.simulator.submit(
        "pictory",
        duration=0.5,
        outcome=outcome,
        callback="twice",
        request={"webhook": generation["webhook_url"]},
    )
    path = f"/v1/generations/{generation['id']}"
    await relay.api.patch(path, json={"job_id": job_id})
    while not world.subscriber.received:
        answers = await asyncio.gather(*(relay.api.post(f"{path}/refresh") for _ in range(3)))
        assert {one.status_code for one in answers} == {200}
    await until(lambda: world.simulator.jobs["pictory", job_id].callbacks == [200, 200])
    for _ in range(3):
        assert await call_back(generation["webhook_url"], json.dumps({"job_id": job_id}).encode()) == 200
    await a_while(world, relay)
    assert await announced(world, relay) == {f"generation.{outcome}": 1}


async def test_a_callback_moves_the_next_ask_to_now_and_many_of_them_are_few_asks(world: World):
    relay = await world.relay(accounts=only("vivix", world, poll_interval="10m", webhook_secret=SECRET))
    await world.endpoint(relay)
    generation = await world.watch(relay, "vivix", duration=60)
    answers = await asyncio.gather(*(vivix_calls_back(relay, generation["job_id"]) for _ in range(50)))
    assert set(answers) == {200}
    await until(lambda: len(asked(world, generation)) >= 1)
    await a_while(world, relay, "luma")
    assert len(asked(world, generation)) <= 2
    world.clock.forward(seconds=60)
    assert await vivix_calls_back(relay, generation["job_id"]) == 200
    await ended(relay, generation)
    assert await announced(world, relay) == {COMPLETED: 1}
    assert [one["learned_by"] for one in received(world, COMPLETED)] == ["callback"]


async def test_a_callback_that_comes_before_the_job_is_known_is_kept_through_a_restart(world: World):
    async with world.running() as relay:
        await world.endpoint(relay)
        generation = (await relay.api.post("/v1/generations", json={"account": "pictory"})).json()
        # The provider is down when its own callback comes: nothing can be confirmed yet.
        world.simulator.trouble("pictory", "server_error", count=FOR_EVER)
        job_id = world.simulator.submit("pictory", duration=0)
        body = json.dumps({"job_id": job_id, "success": True, "data": {"status": "completed"}}).encode()
        assert await call_back(generation["webhook_url"], body) == 200
        await until(lambda: asks(world, job_id) != [])
        assert (await relay.api.get(f"/v1/generations/{generation['id']}")).json()["job_id"] is None
    await no_more_troubles(world)
    async with world.running() as relay:
        world.clock.forward(seconds=360)
        await ended(relay, generation)
        assert await announced(world, relay) == {COMPLETED: 1}
    [data] = received(world, COMPLETED)
    assert (data["id"], data["job_id"]) == (generation["id"], job_id)


async def test_a_callback_about_a_job_that_nobody_watches_is_200_and_no_request(world: World):
    relay = await world.relay(accounts=only("vivix", world, poll_interval="100ms", webhook_secret=SECRET))
    await world.endpoint(relay)
    job_id = world.simulator.submit("vivix", duration=0)
    assert await vivix_calls_back(relay, job_id) == 200
    generation = (await relay.api.post("/v1/generations", json={"account": "pictory"})).json()
    await relay.api.delete(f"/v1/generations/{generation['id']}")
    assert await call_back(generation["webhook_url"], b'{"job_id": "a job"}') == 200
    await a_while(world, relay, "luma")
    assert {one.provider for one in world.simulator.requests} == {"luma"}
    # What was dropped is missed by nobody: watched afterwards, the job is asked about.
    await relay.api.post("/v1/generations", json={"account": "vivix", "job_id": job_id})
    await world.subscriber.got(1)
    assert await announced(world, relay) == {COMPLETED: 1}


async def test_the_callback_of_a_job_that_has_timed_out_brings_its_late_end(world: World):
    relay = await world.relay(
        accounts=only("vivix", world, poll_interval="10m", timeout="1m", webhook_secret=SECRET)
    )
    await world.endpoint(relay)
    generation = await world.watch(relay, "vivix", duration=100)
    world.clock.forward(seconds=61)
    await ended(relay, generation, status="timed_out")
    assert await vivix_calls_back(relay, generation["job_id"]) == 200, "a lie: it runs"
    await until(lambda: len(asked(world, generation)) >= 2)
    world.clock.forward(seconds=45)
    assert await vivix_calls_back(relay, generation["job_id"]) == 200
    await ended(relay, generation)
    assert await announced(world, relay) == {TIMED_OUT: 1, COMPLETED: 1}
    [data] = received(world, COMPLETED)
    assert (data["late"], data["learned_by"]) == (True, "callback")


# Outages.


@pytest.mark.parametrize(
    ("provider", "kind", "options"),
    [
        ("luma", "server_error", {"status": 503}),
        ("luma", "dropped", {}),
        ("pixellabs", "html", {}),
        ("vivix", "truncated", {}),
        ("vivix", "empty", {}),
        ("pictory", "cloudflare", {}),
    ],
)
async def test_an_outage_longer_than_any_timeout_and_a_restart_within_it_fail_nobody(
    world: World, provider: str, kind: str, options: dict[str, Any]
):
    accounts = only(provider, world, poll_interval="100ms", timeout="1m")
    world.simulator.trouble(provider, kind, count=FOR_EVER, **options)
    async with world.running(accounts=accounts) as relay:
        await world.endpoint(relay, event_types=[*ENDINGS, FAILING, RECOVERED])
        watched = [await world.watch(relay, provider, duration=0) for _ in range(6)]
        await becomes(relay, provider, "failing")
        before = len(asked(world, *watched))
        world.clock.forward(seconds=600)
        await until(lambda: len(asked(world, *watched)) > before)
        await a_while(world, relay, "luma" if provider != "luma" else "vivix")
        before = len(asked(world, *watched))
    async with world.running(accounts=accounts) as relay:
        assert (await account(relay, provider))["status"] == "failing", "from the very start"
        await a_while(world, relay, "luma" if provider != "luma" else "vivix")
        assert len(asked(world, *watched)) == before, "the pause goes on"
        world.clock.forward(seconds=1200)
        await until(lambda: len(asked(world, *watched)) > before)
        assert await announced(world, relay) == {FAILING: 1}
        await no_more_troubles(world)
        world.clock.forward(seconds=360)
        await ended(relay, *watched)
        await becomes(relay, provider, "ok")
        await world.subscriber.got(8)
        await a_while(world, relay, "luma" if provider != "luma" else "vivix")
        assert await announced(world, relay) == {FAILING: 1, RECOVERED: 1, COMPLETED: 6}
    assert {one["id"] for one in received(world, COMPLETED)} == {one["id"] for one in watched}
    assert not any(one["late"] for one in received(world, COMPLETED))
    assert [one["account"] for one in received(world, FAILING) + received(world, RECOVERED)] == [provider] * 2


async def test_an_outage_that_ends_while_relay_is_stopped_fails_nobody(world: World):
    accounts = only("luma", world, poll_interval="100ms", timeout="1m")
    world.simulator.trouble("luma", "server_error", count=FOR_EVER)
    async with world.running(accounts=accounts) as relay:
        await world.endpoint(relay, event_types=[*ENDINGS, FAILING, RECOVERED])
        watched = [await world.watch(relay, "luma", duration=0) for _ in range(4)]
        await becomes(relay, "luma", "failing")
        await world.subscriber.got(1)
    world.clock.forward(seconds=3 * 3600)
    await no_more_troubles(world)
    async with world.running(accounts=accounts) as relay:
        await ended(relay, *watched)
        await world.subscriber.got(6)
        assert await announced(world, relay) == {FAILING: 1, RECOVERED: 1, COMPLETED: 4}
    assert not any(one["late"] for one in received(world, COMPLETED))


async def test_relay_being_stopped_for_longer_than_a_timeout_fails_nobody(world: World):
    accounts = only("luma", world, poll_interval="100ms", timeout="1m")
    async with world.running(accounts=accounts) as relay:
        await world.endpoint(relay)
        watched = [await world.watch(relay, "luma", duration=30) for _ in range(4)]
    world.clock.forward(seconds=3 * 3600)
    async with world.running(accounts=accounts) as relay:
        await ended(relay, *watched)
        assert await announced(world, relay) == {COMPLETED: 4}
    assert not any(one["late"] for one in received(world, COMPLETED))


async def test_each_outage_is_announced_once_and_so_is_its_end(world: World):
    relay = await world.relay()
    await world.endpoint(relay, event_types=[FAILING, RECOVERED])
    for outage in (1, 2):
        world.simulator.trouble("luma", "server_error", count=FOR_EVER)
        watched = [await world.watch(relay, "luma", duration=0) for _ in range(3)]
        await becomes(relay, "luma", "failing")
        for _ in range(2):
            # What is still in flight when the clock moves would be taken for the probe.
            await a_while(world, relay)
            before = len(asked(world, *watched))
            world.clock.forward(seconds=400)
            await until(lambda watched=watched, before=before: len(asked(world, *watched)) > before)
        await no_more_troubles(world)
        await a_while(world, relay)
        world.clock.forward(seconds=400)
        await ended(relay, *watched)
        await world.subscriber.got(2 * outage)
        assert await announced(world, relay) == {FAILING: outage, RECOVERED: outage}


async def test_an_outage_that_turns_into_a_refused_key_is_one_outage(world: World):
    relay = await world.relay()
    await world.endpoint(relay, event_types=[FAILING, RECOVERED])
    key = world.simulator.keys["luma"]
    world.simulator.trouble("luma", "server_error", count=FOR_EVER)
    watched = [await world.watch(relay, "luma", duration=0) for _ in range(2)]
    await becomes(relay, "luma", "failing")
    await no_more_troubles(world)
    world.simulator.keys["luma"] = "the key of another customer"
    await a_while(world, relay)
    world.clock.forward(seconds=400)
    await becomes(relay, "luma", "unauthorized")
    world.simulator.keys["luma"] = key
    await a_while(world, relay)
    world.clock.forward(seconds=400)
    await ended(relay, *watched)
    await becomes(relay, "luma", "ok")
    await until(lambda: received(world, RECOVERED) != [])
    assert await announced(world, relay) == {FAILING: 1, RECOVERED: 1}


async def test_a_page_of_bot_protection_is_not_a_refused_key(world: World):
    relay = await world.relay()
    await world.endpoint(relay, event_types=[*ENDINGS, FAILING])
    world.simulator.trouble("pictory", "cloudflare", count=FOR_EVER)
    watched = [await world.watch(relay, "pictory", duration=0) for _ in range(2)]
    shown = await relay.eventually(f"/v1/generations/{watched[0]['id']}", lambda one: one["last_error"])
    assert (shown["status"], shown["error"]) == ("queued", None)
    assert (await account(relay, "pictory"))["status"] == "ok"
    for _ in range(6):
        world.clock.forward(seconds=5)
        await a_while(world, relay)
    assert (await account(relay, "pictory"))["status"] == "failing"
    await until(lambda: received(world, FAILING) != [])
    assert await announced(world, relay) == {FAILING: 1}
    [data] = received(world, FAILING)
    assert "403" in data["reason"]
    assert "unauthorized" not in data["reason"]


async def test_one_job_that_always_errs_does_not_stop_the_others_for_long(world: World):
    relay = await world.relay()
    await world.endpoint(relay)
    bad = world.simulator.submit("luma", job_id="bad", duration=1e6)
    world.simulator.trouble("luma", "server_error", count=FOR_EVER, job_id=bad)
    await relay.api.post("/v1/generations", json={"account": "luma", "job_id": bad})
    # Alone, it is all that is known of the account.
    for _ in range(8):
        await a_while(world, relay)
        world.clock.forward(seconds=2)
    assert len(asks(world, bad)) >= 3
    for _ in range(3):
        watched = [await world.watch(relay, "luma", duration=0) for _ in range(5)]
        began = world.clock()
        while not all(200 in asks(world, one["job_id"]) for one in watched):
            assert world.clock() < began + 120_000, "the others are stopped"
            await a_while(world, relay)
            world.clock.forward(seconds=5)
        await ended(relay, *watched)
        # It goes on to err while the account has nothing else to do.
        world.clock.forward(seconds=300)
        await a_while(world, relay)
    assert await announced(world, relay) == {COMPLETED: 15}
    assert set(asks(world, bad)) == {500}


# Refused keys.


async def test_a_refused_key_is_announced_once_kept_through_a_restart_and_gone_when_it_works(world: World):
    accounts = only("luma", world, poll_interval="100ms", timeout="1m")
    key = world.simulator.keys["luma"]
    world.simulator.keys["luma"] = "the key of another customer"
    async with world.running(accounts=accounts) as relay:
        await world.endpoint(relay, event_types=[*ENDINGS, FAILING, RECOVERED])
        watched = [await world.watch(relay, "luma", duration=0) for _ in range(3)]
        await becomes(relay, "luma", "unauthorized")
        await until(lambda: received(world, FAILING) != [])
        await a_while(world, relay)
        before = len(asked(world, *watched))
        assert before <= 3, "those that were in flight"
    async with world.running(accounts=accounts) as relay:
        shown = await account(relay, "luma")
        assert (shown["status"], "401" in shown["last_error"]) == ("unauthorized", True)
        await until(lambda: len(asked(world, *watched)) == before + 1)
        world.clock.forward(seconds=240)
        await a_while(world, relay)
        assert len(asked(world, *watched)) == before + 1, (
            "after one try of what may be another key the pause goes on"
        )
        world.clock.forward(seconds=120)
        await until(lambda: len(asked(world, *watched)) == before + 2)
        await a_while(world, relay)
        assert len(asked(world, *watched)) == before + 2
        assert await announced(world, relay) == {FAILING: 1}
    world.simulator.keys["luma"] = key
    async with world.running(accounts=accounts) as relay:
        await a_while(world, relay)
        world.clock.forward(seconds=400)
        await ended(relay, *watched)
        await becomes(relay, "luma", "ok")
        await world.subscriber.got(5)
        assert await announced(world, relay) == {FAILING: 1, RECOVERED: 1, COMPLETED: 3}
    [data] = received(world, FAILING)
    assert (data["account"], "401" in data["reason"]) == ("luma", True)


# Jobs that are not there.


@pytest.mark.parametrize("who", ["a user", "a callback"])
async def test_whoever_asks_how_often_a_missing_job_is_believed_after_a_minute_only(world: World, who: str):
    relay = await world.relay(
        accounts=only("vivix", world, poll_interval="20ms", webhook_secret=SECRET, timeout="1h")
    )
    await world.endpoint(relay)
    job_id = world.simulator.submit("vivix", owner="somebody else", duration=0)
    generation = (await relay.api.post("/v1/generations", json={"account": "vivix", "job_id": job_id})).json()
    path = f"/v1/generations/{generation['id']}"
    await until(lambda: asks(world, job_id) == [403])
    for asked_before in range(1, 6):
        world.clock.forward(seconds=1 + asked_before**2 if who == "a callback" else 1)
        if who == "a callback":
            assert await vivix_calls_back(relay, job_id) == 200
        else:
            assert (await relay.api.post(f"{path}/refresh")).status_code == 200
        await relay.eventually(path, lambda one, n=asked_before: one["polls"] > n)
    assert len(asks(world, job_id)) >= 6
    assert (await relay.api.get(path)).json()["status"] == "queued"
    # It becomes visible after all.
    world.simulator.submit("vivix", job_id=job_id, duration=0)
    world.clock.forward(seconds=60)
    await ended(relay, generation)
    assert await announced(world, relay) == {COMPLETED: 1}


async def test_a_missing_job_fails_though_somebody_asks_again_and_again(world: World):
    relay = await world.relay()
    await world.endpoint(relay)
    body = {"account": "luma", "job_id": "nowhere"}
    generation = (await relay.api.post("/v1/generations", json=body)).json()
    path = f"/v1/generations/{generation['id']}"
    for _ in range(5):
        assert (await relay.api.post(f"{path}/refresh")).status_code == 200
    began = world.clock()
    while (await relay.api.get(path)).json()["status"] == "queued":
        assert world.clock() < began + 120_000
        world.clock.forward(seconds=10)
        await a_while(world, relay)
    assert world.clock() >= began + 60_000
    assert await announced(world, relay) == {"generation.failed": 1}


async def test_sightings_of_a_missing_job_are_counted_through_a_restart(world: World):
    async with world.running() as relay:
        await world.endpoint(relay)
        body = {"account": "luma", "job_id": "nowhere"}
        generation = (await relay.api.post("/v1/generations", json=body)).json()
        await until(lambda: len(asks(world, "nowhere")) == 1)
        world.clock.forward(seconds=6)
        await until(lambda: len(asks(world, "nowhere")) == 2)
    async with world.running() as relay:
        for seen, pause in ((2, 16), (3, 48)):
            await a_while(world, relay)
            assert len(asks(world, "nowhere")) == seen
            assert world.subscriber.received == []
            world.clock.forward(seconds=pause)
            await until(lambda seen=seen: len(asks(world, "nowhere")) == seen + 1)
        await ended(relay, generation, status="failed")
        assert await announced(world, relay) == {"generation.failed": 1}
    assert received(world, "generation.failed")[0]["error"]["code"] == "not_found"


# Words that nobody knows, and deadlines.


async def test_an_unknown_status_is_announced_once_through_a_restart_and_asking_goes_on(world: World):
    providers = ["pixellabs", "vivix", "pictory", "luma"]
    async with world.running() as relay:
        await world.endpoint(relay, event_types=[*ENDINGS, UNKNOWN])
        watched = [await world.watch(relay, one, duration=300, status="hibernating") for one in providers]
        await world.subscriber.got(4)
    async with world.running() as relay:
        world.clock.forward(seconds=120)
        await until(lambda: all(len(asked(world, one)) >= 2 for one in watched))
        await a_while(world, relay)
        assert await announced(world, relay) == {UNKNOWN: 4}
        assert {one["provider_status"] for one in received(world, UNKNOWN)} == {"hibernating"}
        world.clock.forward(seconds=240)
        await ended(relay, *watched)
        assert await announced(world, relay) == {UNKNOWN: 4, COMPLETED: 4}


async def test_what_timed_out_is_watched_slowly_for_a_day_through_a_restart(world: World):
    accounts = only("luma", world, poll_interval="100ms", timeout="1m")
    async with world.running(accounts=accounts) as relay:
        await world.endpoint(relay)
        late = await world.watch(relay, "luma", duration=20 * 3600)
        never = await world.watch(relay, "luma", duration=1e6)
        world.clock.forward(seconds=61)
        await ended(relay, late, never, status="timed_out")
        await world.subscriber.got(2)
    for data in received(world, TIMED_OUT):
        assert "may still finish" in data["error"]["message"]
        assert (data["late"], data["outputs"]) == (False, [])
    async with world.running(accounts=accounts) as relay:
        path = f"/v1/generations/{late['id']}"
        for _ in range(3):
            shown = (await relay.api.get(path)).json()
            last = max(one.time for one in world.simulator.requests if one.job_id == late["job_id"])
            pause = (parse_rfc3339(shown["next_poll_at"]) or 0) / 1000 - last
            assert 9 * 60 <= pause <= 11 * 60, "slowly"
            world.clock.forward(seconds=pause)
            await relay.eventually(path, lambda one, shown=shown: one["polls"] > shown["polls"])
        assert await announced(world, relay) == {TIMED_OUT: 2}, "still running is no news"
        world.clock.forward(seconds=20 * 3600)
        await ended(relay, late)
        assert await announced(world, relay) == {TIMED_OUT: 2, COMPLETED: 1}
        [data] = received(world, COMPLETED)
        assert (data["id"], data["late"], data["status"]) == (late["id"], True, "completed")
        world.clock.forward(seconds=4 * 3600)
        path = f"/v1/generations/{never['id']}"
        await relay.eventually(path, lambda one: one["next_poll_at"] is None)
        asked_until_then = len(asked(world, never))
        world.clock.forward(seconds=24 * 3600)
        await a_while(world, relay)
        assert len(asked(world, never)) == asked_until_then
        assert await announced(world, relay) == {TIMED_OUT: 2, COMPLETED: 1}


# Budgets.


async def test_documented_limits_are_the_defaults_and_are_kept(world: World):
    relay = await world.relay(accounts=only("pixellabs", world, poll_interval="100ms", timeout="100h"))
    limits = {
        name: (
            (budget := (await account(relay, name))["budget"])["requests_per_minute"],
            budget["requests_per_day"],
        )
        for name in ("pixellabs", "vivix", "pictory", "luma")
    }
    assert limits == {"pixellabs": (60, 1000), **dict.fromkeys(("vivix", "pictory", "luma"), (None, None))}
    for _ in range(40):
        await world.watch(relay, "pixellabs", duration=1e6)
    for _ in range(12):
        world.clock.forward(seconds=7)
        await a_while(world, relay)
    times = [one.time for one in world.simulator.requests if one.provider == "pixellabs"]
    assert len(times) >= 60
    assert max(sum(at <= other < at + 60 for other in times) for at in times) <= 60


async def test_a_day_s_requests_that_are_used_up_are_still_used_up_after_a_restart(world: World):
    accounts = only("pixellabs", world, poll_interval="100ms", timeout="100h", requests_per_day=4)
    write(world.directory, world.document(accounts=accounts))

    def made() -> list[float]:
        return [one.time * 1000 for one in world.simulator.requests if one.provider == "pixellabs"]

    async with world.running(accounts=accounts) as relay:
        generation = await world.watch(relay, "pixellabs", duration=1e6)
        path = f"/v1/generations/{generation['id']}/refresh"
        await until(lambda: made() != [])
        # Somebody else uses the same credential, and says so: a check does not wait for its turn.
        while len(made()) < 4:
            await program("check", cwd=world.directory)
        counted = {"pixellabs": (used := len(made()))}
        await relay.eventually(
            "/v1/accounts",
            lambda page: (
                counted.items() <= {o["name"]: o["budget"]["used_today"] for o in page["data"]}.items()
            ),
        )
        assert (await relay.api.post(path)).status_code == 429
    async with world.running(accounts=accounts) as relay:
        budget = (await account(relay, "pixellabs"))["budget"]
        assert budget["used_today"] == used
        next_at = parse_rfc3339(budget["next_request_at"])
        assert next_at is not None
        assert abs(next_at - (made()[0] + 86_400_000)) <= 2_000, "when the day is over"
        refused = await relay.api.post(path)
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        world.clock.forward(seconds=(next_at - world.clock()) / 1000 - 60)
        await a_while(world, relay)
        assert len(made()) == used
        world.clock.forward(seconds=61)
        await until(lambda: len(made()) > used)
        assert (await account(relay, "pixellabs"))["budget"]["used_today"] <= 2


async def test_a_pause_that_429_asked_for_goes_on_after_a_restart(world: World):
    accounts = only("luma", world, poll_interval="100ms", timeout="1h")
    world.simulator.trouble("luma", "rate_limited", retry_after=600)
    async with world.running(accounts=accounts) as relay:
        await world.endpoint(relay, event_types=[*ENDINGS, FAILING])
        generation = await world.watch(relay, "luma", duration=0)
        path = f"/v1/generations/{generation['id']}"
        await relay.eventually(path, lambda one: one["polls"] == 1)
        paused = (await account(relay, "luma"))["budget"]["next_request_at"]
        assert (parse_rfc3339(paused) or 0) >= world.clock() + 590_000
    async with world.running(accounts=accounts) as relay:
        shown = await account(relay, "luma")
        assert shown["status"] == "ok", "throttled is not broken"
        assert (
            abs((parse_rfc3339(shown["budget"]["next_request_at"]) or 0) - (parse_rfc3339(paused) or 0)) < 10
        )
        refreshed = await relay.api.post(f"{path}/refresh")
        assert refreshed.status_code == 429
        assert 580 <= int(refreshed.headers["retry-after"]) <= 600
        assert refreshed.headers["content-type"] == "application/problem+json"
        world.clock.forward(seconds=580)
        await a_while(world, relay)
        assert asked(world, generation) == [429]
        world.clock.forward(seconds=21)
        await ended(relay, generation)
        assert asked(world, generation) == [429, 200]
        assert await announced(world, relay) == {COMPLETED: 1}


async def test_a_limit_that_headers_tell_is_waited_for_also_after_a_restart(world: World):
    paths: list[str] = []
    reset = round(world.clock() / 1000) + 400

    def answer(request: Request) -> JSONResponse:
        paths.append(request.url.path)
        headers = {"x-ratelimit-limit": "60", "x-ratelimit-remaining": "0", "x-ratelimit-reset": str(reset)}
        return JSONResponse({"status": "processing", "progress": 5}, 200, headers)

    async with provider_answering(answer) as origin:
        accounts = only("pixellabs", world, base_url=origin, poll_interval="100ms", timeout="1h")
        async with world.running(accounts=accounts) as relay:
            for job_id in ("1", "2"):
                await relay.api.post("/v1/generations", json={"account": "pixellabs", "job_id": job_id})
            await until(lambda: paths != [])
            await a_while(world, relay)
            assert len(paths) <= 2, "those that were in flight"
            before = len(paths)
        async with world.running(accounts=accounts) as relay:
            next_at = parse_rfc3339((await account(relay, "pixellabs"))["budget"]["next_request_at"])
            assert next_at is not None
            assert 0 <= next_at / 1000 - reset <= 5
            world.clock.forward(seconds=reset - world.clock() / 1000 - 10)
            await a_while(world, relay)
            assert len(paths) == before
            world.clock.forward(seconds=16)
            await until(lambda: len(paths) > before)


async def test_whatever_an_account_was_asked_for_counts_in_its_budget(world: World):
    accounts = only("vivix", world, poll_interval="100ms", webhook_secret=SECRET)
    document = world.document(accounts=accounts)
    write(world.directory, document)
    relay = await world.relay(accounts=accounts)
    await world.endpoint(relay)
    polled = await world.watch(relay, "vivix", duration=1)
    refreshed = await world.watch(relay, "vivix", duration=0)
    assert (await relay.api.post(f"/v1/generations/{refreshed['id']}/refresh")).status_code == 200
    called_back = (await relay.api.post("/v1/generations", json={"account": "pictory"})).json()
    world.simulator.submit("pictory", duration=0, request={"webhook": called_back["webhook_url"]})
    await ended(relay, polled, refreshed, called_back)
    before = Counter(one.provider for one in world.simulator.requests)
    checked = await program("check", cwd=world.directory)
    assert "is in use by a running relay" in checked.out
    made = Counter(one.provider for one in world.simulator.requests)
    assert made - before == dict.fromkeys(("pixellabs", "vivix", "pictory", "luma"), 1)
    world.clock.forward(seconds=2)

    def all_counted(page: Any) -> bool:
        return {one["name"]: one["budget"]["used_today"] for one in page["data"]} == made

    await relay.eventually("/v1/accounts", all_counted)


# Random histories.

FINAL = {"completed", "failed"}
SAYINGS = ["running", "completed", "failed", "hibernating", "missing", "down", "html", "limited"]


@dataclass
class Answer:
    """What the provider answered about a job, and when it was asked; `number` is in the answer too."""

    job_id: str
    saying: str
    number: int
    at: int


@dataclass
class Oracle:
    """A Pictory that says of each job what it is told to say, and remembers what it has said."""

    world: World
    sayings: dict[str, str] = field(default_factory=dict)
    answers: list[Answer] = field(default_factory=list)
    open: asyncio.Event = field(default_factory=asyncio.Event)

    async def answer(self, request: Request) -> Response:
        job_id = request.path_params["job_id"]
        said = Answer(job_id, self.sayings.get(job_id, "missing"), len(self.answers), self.world.clock())
        self.answers.append(said)
        await self.open.wait()  # what it says is decided: it may be old when it is heard
        data: dict[str, Any] = {"status": said.saying, "number": said.number}
        match said.saying:
            case "missing":
                data = {"error_code": "5000", "error_message": "JOB_NOT_FOUND"}
                return JSONResponse({"job_id": job_id, "success": False, "data": data}, 404)
            case "down":
                return Response(status_code=503)
            case "html":
                return Response("<h1>Bad Gateway</h1>", media_type="text/html")
            case "limited":
                return Response(status_code=429, headers={"retry-after": "1"})
            case "running":
                data["status"] = "in-progress"
            case "completed":
                data["url"] = f"https://a.test/{said.number}.png"
            case "failed":
                data |= {"error_code": "IMAGE_GENERATION_FAILED", "error_message": "no"}
        return JSONResponse({"job_id": job_id, "success": said.saying != "failed", "data": data})

    def about(self, job_id: str) -> list[Answer]:
        return [one for one in self.answers if one.job_id == job_id]


@asynccontextmanager
async def oracle_of(world: World) -> AsyncIterator[tuple[Oracle, str]]:
    oracle = Oracle(world)
    oracle.open.set()
    async with serving(Starlette(routes=[Route("/jobs/{job_id}", oracle.answer)])) as origin:
        yield oracle, origin


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("says"), st.sampled_from(SAYINGS)),
        st.tuples(st.just("true callback"), st.sampled_from(["completed", "failed", "in-progress", "?"])),
        st.tuples(st.just("forged callback"), st.sampled_from(["completed", "failed"])),
        st.tuples(st.just("garbage callback"), st.sampled_from(["", "{}", "[]", '{"job_id": "../x"}'])),
        st.tuples(st.just("refresh"), st.integers(1, 3)),
        st.tuples(st.just("pause"), st.sampled_from([0.3, 5, 16, 48, 300, 2000])),
        st.tuples(st.just("hold"), st.none()),
        st.tuples(st.just("let go"), st.none()),
    ),
    max_size=15,
)


@dataclass
class History:
    """One generation of a job, and what happens to it."""

    relay: RunningRelay
    oracle: Oracle
    job_id: str
    generation: dict[str, Any]
    held: bool = False
    running: list[asyncio.Task[httpx.Response]] = field(default_factory=list)

    @property
    def path(self) -> str:
        return f"/v1/generations/{self.generation['id']}"

    async def callback(self, body: str) -> None:
        assert await call_back(self.generation["webhook_url"], body.encode()) == 200

    async def heard(self) -> None:
        """Returns when all that was due has been asked, unless it is held."""

        def nothing_is_due(one: Any) -> bool:
            due_at = parse_rfc3339(one["next_poll_at"] or "")
            return due_at is None or due_at > self.relay.clock()

        if self.oracle.open.is_set():
            await asyncio.gather(*self.running)
            await self.relay.eventually(self.path, nothing_is_due)

    async def step(self, what: str, how: Any) -> None:
        match what:
            case "says":
                self.oracle.sayings[self.job_id] = how
            case "true callback":
                await self.callback(json.dumps({"job_id": self.job_id, "data": {"status": how}}))
            case "forged callback":
                forged = {
                    "job_id": "forged",
                    "success": True,
                    "data": {"status": how, "url": "https://evil.test"},
                }
                await self.callback(json.dumps(forged))
            case "garbage callback":
                await self.callback(how)
            case "refresh":
                post = self.relay.api.post
                self.running += [asyncio.create_task(post(f"{self.path}/refresh")) for _ in range(how)]
            case "pause":
                self.relay.clock.forward(seconds=how)
                await self.heard()
            case "hold":
                self.held = True
                self.oracle.open.clear()
            case "let go":
                self.oracle.open.set()
                await self.heard()

    async def end(self, saying: str) -> dict[str, Any]:
        """The generation once nothing more can happen to it, with a provider that says this."""
        await self.step("let go", None)
        await self.step("says", saying)
        await self.callback(json.dumps({"job_id": self.job_id}))
        wanted = FINAL if saying in FINAL else {"timed_out", *FINAL}
        for pause in (*[2] * (5 if saying == "missing" else 0), *[700] * 20):
            await self.step("pause", pause)
            shown = dict((await self.relay.api.get(self.path)).json())
            if shown["status"] in wanted:
                return shown
        raise AssertionError(f"it never ends: {shown}")


async def events_of(relay: RunningRelay, generation: dict[str, Any]) -> Sequence[dict[str, Any]]:
    page = await relay.api.get("/v1/events", params={"generation_id": generation["id"], "limit": 100})
    return sorted(page.json()["data"], key=lambda one: one["created_at"])


def check(history: History, shown: dict[str, Any], endings: Sequence[dict[str, Any]]) -> None:
    *earlier, last = [one["data"] for one in endings]
    assert [one["status"] for one in earlier] in ([], ["timed_out"])
    assert (last["status"], last["learned_by"]) == (shown["status"], shown["learned_by"])
    assert last["late"] == bool(earlier)
    answers = history.oracle.about(history.job_id)
    finals = [one for one in answers if one.saying in FINAL]
    if earlier and not history.held:
        timed_out_at = parse_rfc3339(endings[0]["created_at"]) or 0
        assert not [one for one in finals if one.at < timed_out_at], "the provider had said how it ended"
    assert last["job_id"] == history.job_id
    if last["error"] and last["error"]["code"] == "not_found":
        known_at = parse_rfc3339(last["completed_at"])
        before = [one for one in answers if one.at <= (known_at or 0)]
        others = [n for n, one in enumerate(before) if one.saying != "missing"]
        sightings = before[max(others, default=-1) + 1 :]
        if not history.held:
            assert len(sightings) >= 4
            assert sightings[-1].at - sightings[0].at >= 60_000
        return
    said = next(one for one in finals if one.number == last["raw"]["data"]["number"])
    assert said.saying == last["status"]
    assert history.held or said is finals[0], "its first word on the end is the last"
    urls = [one["url"] for one in last["outputs"]]
    assert urls == ([f"https://a.test/{said.number}.png"] if said.saying == "completed" else [])


@given(
    steps=STEPS, known=st.booleans(), saying=st.sampled_from(["completed", "failed", "running", "missing"])
)
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_whoever_speaks_when_and_how_often_there_is_one_end_and_the_provider_has_said_it(
    told: "Told", steps: Sequence[tuple[str, Any]], known: bool, saying: str
):
    history = await told.history(known=known)
    for step in steps:
        await history.step(*step)
    shown = await history.end(saying)
    if shown["status"] == "timed_out":
        shown = await history.end("completed")
    # Whoever still speaks after the end says nothing new.
    await history.step("says", "failed" if shown["status"] == "completed" else "completed")
    await history.step("true callback", "failed")
    await history.step("refresh", 2)
    await history.step("pause", 2000)
    endings = [one for one in await events_of(history.relay, shown) if one["type"] in ENDINGS]
    check(history, shown, endings)
    path = f"/{history.job_id}"
    heard = await told.world.subscriber.got(len(endings), path=path)
    assert sorted(one.headers["webhook-id"] for one in heard) == sorted(one["id"] for one in endings)
    await history.relay.api.delete(history.path)


@dataclass
class Told:
    """The relay that all histories share, and their provider."""

    world: World
    relay: RunningRelay
    oracle: Oracle
    count: int = 0

    async def history(self, *, known: bool) -> History:
        self.count += 1
        job_id = f"job-{self.count}"
        self.oracle.sayings[job_id] = "running"
        body = {"account": "pictory", "callback_url": f"{self.world.subscriber.origin}/{job_id}"}
        body |= {"job_id": job_id} if known else {}
        made = await self.relay.api.post("/v1/generations", json=body)
        assert made.status_code == 201, made.text
        return History(self.relay, self.oracle, job_id, made.json())


@pytest.fixture
async def told(world: World) -> AsyncIterator[Told]:
    async with oracle_of(world) as (oracle, origin):
        accounts = only("pictory", world, base_url=origin, poll_interval="100ms", timeout="30m")
        async with world.running(accounts=accounts) as relay:
            yield Told(world, relay, oracle)
