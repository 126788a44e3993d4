"""Learning the end by asking, over real sockets."""

import asyncio
import json
import logging
import sqlite3
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from itertools import pairwise
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from relay.app import running
from relay.budget import Budget
from relay.config import read_config
from relay.errors import Limited, NotFound, ProviderError
from relay.generation import Generation, Status, Update
from relay.health import Health
from relay.providers import load
from relay.schedule import Pace
from relay.standing import Standing
from relay.store import open_database, store_on
from relay.store.generations import Watch
from relay.tenant import DEFAULT
from relay.times import parse_rfc3339
from tests.conftest import RunningRelay, World
from tests.keyring import KEYRING
from tests.serving import serving

PROVIDERS = ["pixellabs", "vivix", "pictory", "luma"]
MINUTE, HOUR = 60_000, 3_600_000


async def until(condition: Callable[[], bool], *, timeout: float = 15) -> None:
    async with asyncio.timeout(timeout):
        while True:
            if condition():
                return
            await asyncio.sleep(0.01)


def asks(world: World, job_id: str) -> list[int | None]:
    """What the provider answered when it was asked for a job."""
    return [one.status for one in world.simulator.requests if one.job_id == job_id]


async def a_while(world: World, relay: RunningRelay, provider: str = "vivix") -> None:
    """Long enough for the relay to ask at least twice for anything that is due."""
    probe = await world.watch(relay, provider, duration=1e6)
    await until(lambda: len(asks(world, probe["job_id"])) >= 3)
    await relay.api.delete(f"/v1/generations/{probe['id']}")


def only(provider: str, world: World, **settings: Any) -> dict[str, Any]:
    """The accounts of the tests, the one of `provider` with other settings."""
    accounts = dict(world.document()["accounts"])
    account = {name: value for name, value in accounts[provider].items() if name != "poll_interval"}
    return {**accounts, provider: {**account, **settings}}


@asynccontextmanager
async def provider_answering(answer: Callable[[Request], Any]) -> AsyncIterator[str]:
    """The origin of a provider that answers every GET with what `answer` gives."""

    async def get(request: Request) -> Response:
        given = answer(request)
        return given if isinstance(given, Response) else JSONResponse(given)

    async with serving(Starlette(routes=[Route("/{path:path}", get)])) as origin:
        yield origin


async def told(world: World, count: int = len(PROVIDERS)) -> dict[str, dict[str, Any]]:
    """The one event of each of `count` providers, by provider."""
    events = [json.loads(one.body) for one in await world.subscriber.got(count)]
    by_provider = {event["data"]["provider"]: event for event in events}
    assert len(by_provider) == len(events) == count
    return by_provider


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("rate_limited", {"retry_after": 0}),
        ("server_error", {}),
        ("server_error", {"status": 503}),
        ("html", {}),
        ("truncated", {}),
        ("dropped", {}),
        ("cloudflare", {}),
        ("empty", {}),
        ("wrong_type", {}),
    ],
)
async def test_an_ask_that_errs_never_fails_a_generation(world: World, kind: str, options: dict[str, Any]):
    relay = await world.relay()
    await world.endpoint(relay)
    for provider in PROVIDERS:
        world.simulator.trouble(provider, kind, count=2, **options)
    watched = [await world.watch(relay, provider, duration=0) for provider in PROVIDERS]
    for seen in (1, 2) if kind == "rate_limited" else ():
        # Told to come back at once, an account waits for some seconds all the same.
        await until(lambda seen=seen: all(len(asks(world, one["job_id"])) >= seen for one in watched))
        world.clock.forward(seconds=10)
    events = await told(world)
    assert {event["type"] for event in events.values()} == {"generation.completed"}
    if kind != "wrong_type":  # JSON that is only declared to be something else may be read
        assert all(len(asks(world, one["job_id"])) >= 3 for one in watched)
    listed = (await relay.api.get("/v1/generations")).json()["data"]
    assert {one["last_error"] for one in listed} == {None}


async def test_a_refused_key_fails_nothing_is_shown_at_its_account_and_is_tried_now_and_then(world: World):
    refused = ["pixellabs", "pictory", "luma"]
    keys = dict(world.simulator.keys)
    relay = await world.relay()
    await world.endpoint(relay)
    world.simulator.keys |= dict.fromkeys(refused, "the key of another customer")
    first = [await world.watch(relay, provider, duration=0) for provider in refused]

    def statuses(accounts: Any) -> dict[str, str]:
        return {one["name"]: one["status"] for one in accounts["data"]}

    unauthorized = {"vivix": "ok", **dict.fromkeys(refused, "unauthorized")}
    await relay.eventually("/v1/accounts", lambda accounts: statuses(accounts) == unauthorized)
    second = [await world.watch(relay, provider, duration=0) for provider in refused]

    def answers() -> list[list[int | None]]:
        pairs = zip(first, second, strict=True)
        return [asks(world, one["job_id"]) + asks(world, other["job_id"]) for one, other in pairs]

    world.clock.forward(seconds=290)
    await a_while(world, relay)
    assert answers() == [[401]] * 3
    world.clock.forward(seconds=70)
    await until(lambda: answers() == [[401, 401]] * 3)
    await a_while(world, relay)
    assert answers() == [[401, 401]] * 3, "one of an account's generations is enough to try its key"
    for shown in (await relay.api.get("/v1/generations")).json()["data"]:
        assert (shown["status"], shown["error"]) == ("queued", None)
    assert world.subscriber.received == []
    world.simulator.keys |= keys
    world.clock.forward(seconds=360)
    received = await world.subscriber.got(6)
    assert {json.loads(one.body)["type"] for one in received} == {"generation.completed"}
    await relay.eventually("/v1/accounts", lambda accounts: set(statuses(accounts).values()) == {"ok"})


async def no_more_troubles(world: World) -> None:
    async with httpx.AsyncClient(base_url=world.simulator_origin) as client:
        await client.delete("/_simulator/troubles")


def is_failing(account: str) -> Callable[[Any], bool]:
    return lambda accounts: {one["name"]: one["status"] for one in accounts["data"]}[account] == "failing"


async def test_an_outage_of_a_provider_announces_nothing_and_ends_with_every_generation_completed(
    world: World,
):
    relay = await world.relay()
    await world.endpoint(relay)
    world.simulator.trouble("luma", "server_error", count=1_000_000)
    watched = [await world.watch(relay, "luma", duration=0) for _ in range(5)]

    def answers() -> list[int | None]:
        return [status for one in watched for status in asks(world, one["job_id"])]

    accounts = await relay.eventually("/v1/accounts", is_failing("luma"))
    assert [one["name"] for one in accounts["data"] if one["status"] != "ok"] == ["luma"]
    await a_while(world, relay)
    asked = len(answers())
    # From 15 s on one request now and then looks whether the provider is back.
    for probe, pause in enumerate((18, 36, 72), start=1):
        world.clock.forward(seconds=pause)
        await until(lambda probe=probe: len(answers()) > asked + probe - 1)
        await a_while(world, relay)
        assert len(answers()) == asked + probe
    assert set(answers()) == {500}
    assert world.subscriber.received == []
    listed = (await relay.api.get("/v1/generations", params={"account": "luma"})).json()["data"]
    assert {one["status"] for one in listed} == {"queued"}
    await no_more_troubles(world)
    world.clock.forward(seconds=144)
    received = await world.subscriber.got(5)
    assert {json.loads(one.body)["type"] for one in received} == {"generation.completed"}
    await relay.eventually("/v1/accounts", lambda shown: not is_failing("luma")(shown))


async def test_a_job_that_a_provider_refuses_to_answer_about_is_no_outage(world: World):
    def answer(request: Request) -> Any:
        if request.url.path.endswith("/no-uuid"):
            return JSONResponse({"detail": "Not a uuid"}, 422)
        return {"state": "completed", "output": [{"type": "image", "url": "https://a.test/1.png"}]}

    async with provider_answering(answer) as origin:
        accounts = only("luma", world, base_url=origin, poll_interval="100ms", timeout="10m")
        relay = await world.relay(accounts=accounts)
        await world.endpoint(relay)
        await relay.api.post("/v1/generations", json={"account": "luma", "job_id": "no-uuid"})
        for polls in range(6):
            [shown] = (
                await relay.eventually(
                    "/v1/generations", lambda page, polls=polls: page["data"][0]["polls"] > polls
                )
            )["data"]
            assert (shown["status"], "Not a uuid" in shown["last_error"]) == ("queued", True)
            world.clock.forward(seconds=60)
        await relay.api.post("/v1/generations", json={"account": "luma", "job_id": "another"})
        [received] = await world.subscriber.got(1)
        assert json.loads(received.body)["data"]["job_id"] == "another"
        world.clock.forward(seconds=600)
        _, received = await world.subscriber.got(2)
        assert json.loads(received.body)["type"] == "generation.timed_out"


async def test_an_outage_puts_deadlines_off_by_as_long_as_it_lasts(world: World):
    relay = await world.relay(accounts=only("luma", world, poll_interval="100ms", timeout="10m"))
    await world.endpoint(relay)
    world.simulator.trouble("luma", "server_error", count=1_000_000)
    done = [await world.watch(relay, "luma", duration=0) for _ in range(4)]
    slow = await world.watch(relay, "luma", duration=1e6)
    await relay.eventually("/v1/accounts", is_failing("luma"))
    for _ in range(3):
        before = len(world.simulator.requests)
        world.clock.forward(seconds=1200)
        await until(lambda before=before: len(world.simulator.requests) > before)
        await a_while(world, relay)
    assert world.subscriber.received == []
    await no_more_troubles(world)
    world.clock.forward(seconds=360)
    received = await world.subscriber.got(4)
    announced = {(json.loads(one.body)["data"]["id"], json.loads(one.body)["type"]) for one in received}
    assert announced == {(one["id"], "generation.completed") for one in done}
    path = f"/v1/generations/{slow['id']}"
    shown = await relay.eventually(path, lambda one: one["last_error"] is None)
    before, after = parse_rfc3339(slow["deadline_at"]), parse_rfc3339(shown["deadline_at"])
    assert before is not None and after is not None
    assert 3960 <= (after - before) / 1000 <= 3960 + 60
    world.clock.forward(seconds=(after - world.clock()) / 1000)
    *_, last = await world.subscriber.got(5)
    assert json.loads(last.body)["type"] == "generation.timed_out"


@pytest.mark.parametrize("date", [False, True], ids=["seconds", "HTTP date"])
async def test_retry_after_is_honoured_by_the_whole_account(world: World, date: bool):
    relay = await world.relay(accounts=only("luma", world, poll_interval="100ms", timeout="2h"))
    http_date = "Thu, 01 Jan 2099 00:00:00 GMT"  # further away than an hour, which is the most that is waited
    retry_after, pause = (http_date, 3_600_000) if date else (40, 40_000)
    world.simulator.trouble("luma", "rate_limited", retry_after=retry_after)
    generation = await world.watch(relay, "luma", duration=0)
    shown = await relay.eventually(f"/v1/generations/{generation['id']}", lambda one: one["polls"] == 1)
    other = await world.watch(relay, "luma", duration=0)
    due_at = parse_rfc3339(shown["next_poll_at"])
    assert due_at is not None
    [asked] = [one for one in world.simulator.requests if one.job_id == generation["job_id"]]
    assert due_at >= round(asked.time * 1000) + pause
    [account] = [one for one in (await relay.api.get("/v1/accounts")).json()["data"] if one["name"] == "luma"]
    next_at = parse_rfc3339(account["budget"]["next_request_at"])
    assert next_at is not None and next_at >= round(asked.time * 1000) + pause
    world.clock.forward(seconds=(due_at - world.clock()) / 1000 - 5)
    await a_while(world, relay)
    assert (asks(world, generation["job_id"]), asks(world, other["job_id"])) == ([429], [])
    world.clock.forward(seconds=5)
    for one in (generation, other):
        await relay.eventually(f"/v1/generations/{one['id']}", lambda shown: shown["status"] == "completed")
    assert (asks(world, generation["job_id"]), asks(world, other["job_id"])) == ([429, 200], [200])


@pytest.mark.parametrize(
    ("provider", "documented", "usual"),
    [("pixellabs", 1, 13), ("vivix", 1, 15), ("luma", 1, 20), ("pictory", 10, 45)],
)
async def test_the_first_ask_comes_when_ends_may_be_expected_and_never_before_the_documented_pause(
    world: World, provider: str, documented: float, usual: float
):
    relay = await world.relay(accounts=only(provider, world))
    generation = await world.watch(relay, provider, duration=0)
    begin, due_at = parse_rfc3339(generation["created_at"]), parse_rfc3339(generation["next_poll_at"])
    assert begin is not None and due_at is not None
    assert documented * 1000 < due_at - begin < usual * 1000
    world.clock.forward(seconds=max(0, (due_at - world.clock()) / 1000 - 3))
    await a_while(world, relay, "luma" if provider == "vivix" else "vivix")
    assert asks(world, generation["job_id"]) == []
    world.clock.forward(seconds=3)
    await until(lambda: asks(world, generation["job_id"]) == [200])


async def test_with_an_interval_of_ones_own_the_first_ask_comes_after_it(world: World):
    relay = await world.relay(accounts=only("pixellabs", world, poll_interval="7s"))
    generation = await world.watch(relay, "pixellabs", duration=0)
    begin, due_at = parse_rfc3339(generation["created_at"]), parse_rfc3339(generation["next_poll_at"])
    assert begin is not None and due_at == begin + 7_000


def test_with_an_interval_of_ones_own_nothing_is_expected_before_twenty_ends_were_seen():
    one = Generation(
        id="gen_1", tenant="t", account="a", provider="p", job_id="j", status=Status.COMPLETED,
        created_at=1_000, deadline_at=MINUTE, due_at=None, known_at=11_000,
        update=Update(status=Status.COMPLETED),
    )  # fmt: skip
    own, documented = Pace(interval=1_000, timeout=MINUTE), load("pixellabs").pace
    assert Standing(documented, Budget()).plan() is not None
    standing = Standing(own, Budget())
    for _ in range(20):
        assert standing.plan() is None
        standing.learn(one)
    plan = standing.plan()
    assert plan is not None and 1_000 < plan.median < 11_000


async def test_two_asks_are_never_closer_than_the_interval(world: World):
    relay = await world.relay(accounts=only("luma", world, poll_interval="600ms"))
    generation = await world.watch(relay, "luma", duration=1e6)
    await until(lambda: len(asks(world, generation["job_id"])) >= 4)
    times = [one.time for one in world.simulator.requests if one.job_id == generation["job_id"]]
    assert min(later - earlier for earlier, later in pairwise(times)) >= 0.6


async def test_an_unknown_status_is_warned_of_once_and_ends_at_the_deadline(
    world: World, caplog: pytest.LogCaptureFixture
):
    relay = await world.relay()
    await world.endpoint(relay)
    # The progress of PixelLabs goes on: that is news, but it is not again a word that nobody knows.
    plan = {"duration": 30, "status": "hibernating"}
    watched = {provider: await world.watch(relay, provider, **plan) for provider in PROVIDERS}
    with caplog.at_level(logging.WARNING, logger="relay"):
        await until(lambda: all(len(asks(world, one["job_id"])) >= 5 for one in watched.values()))
    warnings = [one for one in caplog.records if one.getMessage() == "generation.unknown_status"]
    assert Counter(vars(one)["account"] for one in warnings) == dict.fromkeys(PROVIDERS, 1)
    for shown in (await relay.api.get("/v1/generations")).json()["data"]:
        assert (shown["status"], shown["provider_status"]) == ("queued", "hibernating")
    for provider, one in watched.items():
        world.simulator.submit(provider, job_id=one["job_id"], duration=1e6, status="hibernating")
    world.clock.forward(seconds=3600)
    for event in (await told(world)).values():
        assert event["type"] == "generation.timed_out"
        data = event["data"]
        assert (data["status"], data["learned_by"], data["late"]) == ("timed_out", "deadline", False)
        assert (data["error"]["code"], data["error"]["retryable"], data["outputs"]) == ("timed_out", None, [])
        assert "may still finish" in data["error"]["message"]


@pytest.mark.parametrize("outcome", ["completed", "failed"])
async def test_a_late_answer_is_announced_as_late(world: World, outcome: str):
    relay = await world.relay()
    await world.endpoint(relay)
    job_id = world.simulator.submit("luma", duration=1000, outcome=outcome)
    request = {"account": "luma", "job_id": job_id, "timeout_seconds": 1}
    generation = (await relay.api.post("/v1/generations", json=request)).json()
    [first] = await world.subscriber.got(1)
    assert json.loads(first.body)["type"] == "generation.timed_out"
    world.clock.forward(seconds=1001)
    _, second = await world.subscriber.got(2)
    event = json.loads(second.body)
    assert event["type"] == f"generation.{outcome}"
    assert (event["data"]["id"], event["data"]["late"]) == (generation["id"], True)
    assert event["data"]["learned_by"] == "poll"
    assert first.headers["webhook-id"] != second.headers["webhook-id"]


async def test_an_answer_at_the_deadline_is_the_end_and_not_a_timeout(world: World):
    relay = await world.relay(accounts=only("luma", world, timeout="1h"))
    await world.endpoint(relay)
    await world.watch(relay, "luma", duration=1)
    world.clock.forward(seconds=2 * 3600)
    [received] = await world.subscriber.got(1)
    event = json.loads(received.body)
    assert (event["type"], event["data"]["late"]) == ("generation.completed", False)


async def test_what_ended_while_no_relay_ran_is_asked_about_before_it_is_said_to_have_timed_out(
    world: World,
):
    async with world.running() as relay:
        await world.endpoint(relay)
        for _ in range(80):
            await world.watch(relay, "vivix", duration=300)
    world.clock.forward(seconds=2 * 3600)
    await world.relay()
    received = await world.subscriber.got(80)
    events = [json.loads(one.body) for one in received]
    assert Counter(event["type"] for event in events) == {"generation.completed": 80}
    assert not any(event["data"]["late"] for event in events)


async def test_a_provider_that_is_down_at_the_deadline_leaves_a_generation_that_may_still_finish(
    world: World,
):
    relay = await world.relay()
    await world.endpoint(relay)
    world.simulator.trouble("luma", "server_error", count=1_000_000)
    job_id = world.simulator.submit("luma", duration=0)
    request = {"account": "luma", "job_id": job_id, "timeout_seconds": 1}
    await relay.api.post("/v1/generations", json=request)
    [received] = await world.subscriber.got(1)
    event = json.loads(received.body)
    assert event["type"] == "generation.timed_out"
    assert "500" in event["data"]["error"]["message"]


async def test_not_found_is_believed_after_several_sightings_over_a_minute_only(world: World):
    relay = await world.relay()
    await world.endpoint(relay)
    for provider in PROVIDERS:
        job_id = f"no-such-job-at-{provider}"
        if provider == "vivix":
            job_id = world.simulator.submit(provider, job_id=job_id, owner="somebody else")
        await relay.api.post("/v1/generations", json={"account": provider, "job_id": job_id})
    jobs = [f"no-such-job-at-{provider}" for provider in PROVIDERS]
    for seen, pause in enumerate((5, 15, 45), start=1):
        await until(lambda seen=seen: all(len(asks(world, job)) == seen for job in jobs))
        await a_while(world, relay)
        assert all(len(asks(world, job)) == seen for job in jobs)
        assert world.subscriber.received == []
        world.clock.forward(seconds=pause * 1.05)
    for provider, event in (await told(world)).items():
        assert (event["type"], event["data"]["error"]["code"]) == ("generation.failed", "not_found")
        assert len(asks(world, f"no-such-job-at-{provider}")) == 4


@pytest.mark.parametrize("trouble", ["not_found_in_body", None])
async def test_a_job_that_is_not_visible_at_first_is_waited_for(world: World, trouble: str | None):
    relay = await world.relay()
    await world.endpoint(relay)
    if trouble:
        world.simulator.trouble("pictory", trouble, count=2)
        world.simulator.submit("pictory", job_id="fresh", duration=0)
    answer = await relay.api.post("/v1/generations", json={"account": "pictory", "job_id": "fresh"})
    path = f"/v1/generations/{answer.json()['id']}"
    await relay.eventually(path, lambda found: found["polls"] == 1)
    world.clock.forward(seconds=5.25)
    await relay.eventually(path, lambda found: found["polls"] == 2)
    assert world.subscriber.received == []
    if not trouble:
        world.simulator.submit("pictory", job_id="fresh", duration=0)
    world.clock.forward(seconds=15.75)
    [received] = await world.subscriber.got(1)
    assert json.loads(received.body)["type"] == "generation.completed"


async def test_completed_without_an_output_is_failed(world: World):
    relay = await world.relay()
    await world.endpoint(relay)
    for provider in PROVIDERS:
        await world.watch(relay, provider, duration=0, outputs=0)
    for event in (await told(world)).values():
        assert event["type"] == "generation.failed"
        assert (event["data"]["error"]["code"], event["data"]["outputs"]) == ("no_output", [])
        assert event["data"]["provider_status"] == "completed"


async def test_an_end_is_no_longer_asked_about(world: World):
    relay = await world.relay()
    await world.endpoint(relay)
    generation = await world.watch(relay, "luma", duration=0)
    await world.subscriber.got(1)
    before = asks(world, generation["job_id"])
    world.clock.forward(seconds=86_400)
    await a_while(world, relay)
    assert asks(world, generation["job_id"]) == before
    assert len(world.subscriber.received) == 1


async def test_refresh_asks_now(world: World):
    relay = await world.relay(accounts=only("luma", world))
    generation = await world.watch(relay, "luma", duration=0)
    refreshed = await relay.api.post(f"/v1/generations/{generation['id']}/refresh")
    assert refreshed.json()["status"] == "completed"
    assert refreshed.json()["learned_by"] == "refresh"
    assert asks(world, generation["job_id"]) == [200]


async def test_refreshes_that_come_together_share_the_budget(world: World):
    accounts = only("luma", world, poll_interval="1h", requests_per_minute=10)
    async with running(read_config(world.document(accounts=accounts), {}), now=world.clock) as relay:
        jobs = [world.simulator.submit("luma", duration=1e6) for _ in range(5)]
        now = world.clock()
        waiting = [
            Generation(
                id=f"gen_{job}", tenant=DEFAULT, account="luma", provider="luma", job_id=job,
                status=Status.QUEUED, created_at=now, deadline_at=now + HOUR, due_at=now + HOUR,
            )
            for job in jobs
        ]  # fmt: skip
        await relay.store.generations.create([Watch(one) for one in waiting])
        refreshed = await asyncio.gather(
            *(relay.poller.refresh(one) for one in waiting), return_exceptions=True
        )
    assert sum(isinstance(one, Generation) for one in refreshed) == len(world.simulator.requests) == 1
    assert sum(isinstance(one, Limited) for one in refreshed) == 4


async def test_looks_that_come_together_while_a_provider_is_probed_are_one_probe(world: World):
    world.simulator.trouble("luma", "server_error", count=1_000_000)
    async with running(read_config(world.document(), {}), now=world.clock) as relay:
        job = world.simulator.submit("luma", duration=0)

        async def look(times: int) -> list[object]:
            looks = (relay.poller.look(DEFAULT, "luma", job) for _ in range(times))
            return list(await asyncio.gather(*looks, return_exceptions=True))

        with pytest.raises(NotFound):
            await relay.poller.look("somebody else", "luma", job)
        assert asks(world, job) == []
        await look(5)
        before = len(asks(world, job))
        world.clock.forward(seconds=20)
        looked = await look(5)
        assert len(asks(world, job)) == before + 1
        assert Counter(type(one) for one in looked) == {ProviderError: 1, Limited: 4}
        await no_more_troubles(world)
        world.clock.forward(seconds=40)
        await look(1)
        assert not any(isinstance(one, Exception) for one in await look(5))


async def test_a_redirect_is_not_followed_and_the_key_goes_nowhere_else(world: World):
    elsewhere: list[Request] = []

    def there(request: Request) -> Any:
        elsewhere.append(request)
        return {"state": "completed", "output": [{"type": "image", "url": "https://evil.test/1.png"}]}

    async with provider_answering(there) as canary:
        hops = []

        def redirect(request: Request) -> Response:
            hops.append(request)
            return Response(status_code=307, headers={"location": f"{canary}/generations/1"})

        async with provider_answering(redirect) as origin:
            relay = await world.relay(accounts=only("luma", world, base_url=origin, poll_interval="100ms"))
            await relay.api.post("/v1/generations", json={"account": "luma", "job_id": "1"})
            await until(lambda: len(hops) >= 2)
    assert elsewhere == []
    [shown] = (await relay.api.get("/v1/generations")).json()["data"]
    assert shown["status"] == "queued"


async def test_an_answer_that_is_too_large_is_an_error_and_no_end(world: World):
    asked = []

    def huge(request: Request) -> Any:
        asked.append(request)
        return {"state": "completed", "padding": "x" * 2_000_000, "output": [{"url": "https://a.test/1.png"}]}

    async with provider_answering(huge) as origin:
        relay = await world.relay(accounts=only("luma", world, base_url=origin, poll_interval="100ms"))
        made = await relay.api.post("/v1/generations", json={"account": "luma", "job_id": "1"})
        shown = await relay.eventually(f"/v1/generations/{made.json()['id']}", lambda one: one["last_error"])
    assert shown["status"] == "queued"
    assert "larger" in shown["last_error"]


# Budgets.


@given(st.integers(1, 2000), st.lists(st.integers(0, 20_000), min_size=1, max_size=300))
def test_a_budget_never_gives_more_in_a_minute_than_it_has(per_minute: int, pauses: list[int]):
    budget, now, given_at = Budget(per_minute), 0, []
    for pause in pauses:
        now += pause
        while budget.available(now):
            assert budget.wait(now) == 0
            budget.take(now)
            given_at.append(now)
    for at in given_at:
        assert sum(at <= other < at + MINUTE for other in given_at) <= per_minute


@pytest.mark.parametrize("per_minute", [1, 2, 10, 60, 1000])
def test_waiting_as_long_as_a_budget_says_is_enough_and_uses_most_of_it(per_minute: int):
    budget, now, used = Budget(per_minute), 0, 0
    while now < 10 * MINUTE:
        now += budget.wait(now)
        assert budget.available(now), "whoever has waited may ask"
        budget.take(now)
        used += 1
    assert 0.8 * 10 * per_minute <= used <= 10 * per_minute


@given(
    st.lists(
        st.tuples(
            st.integers(0, 20_000),
            st.sampled_from([200, 404, 429, 503]),
            st.dictionaries(
                st.sampled_from(["retry-after", "x-ratelimit-remaining", "x-ratelimit-reset"]),
                st.sampled_from(["0", "1", "30", "-1", "1e308", "inf", "nan", "soon", "9" * 12, ""]),
            ),
        ),
        max_size=30,
    )
)
def test_whatever_answers_say_an_account_is_asked_again_within_an_hour(answers):
    budget, now = Budget(60, 1_000), 0
    for pause, status, headers in answers:
        now += pause
        budget.take(now)
        budget.hear(status, headers, now)
        assert status != 429 or budget.wait(now) >= 1_000
        assert budget.wait(now) <= 60 * MINUTE


def test_an_answer_429_that_was_under_way_when_the_account_paused_changes_nothing():
    budget = Budget()
    for status in (429, 200, 429):
        budget.hear(status, {}, 0)
    assert budget.wait(0) == 5_000


def test_an_outage_began_with_the_first_refusal_whatever_else_fails_before_it_ends():
    health = Health()
    for now, code in ((1_000, "unauthorized"), (400_000, "unreachable"), (800_000, "unauthorized")):
        health = health.after(ProviderError(code, "…"), now=now, spread=0.0)
    assert health.outage(0, 900_000) == 899_000
    assert health.after(None, now=900_000, spread=0.0).outage(0, 10_000_000) == 899_000


def test_an_outage_began_with_the_first_of_the_failures_in_a_row():
    health, error = Health(), ProviderError("unavailable", "…")
    for now, problem in ((1, error), (2, None), (3, error), (4, error), (5, error), (6, error), (7, error)):
        health = health.after(problem, now=now, spread=0.0)
    assert (health.status.value, health.failing_since) == ("failing", 3)


def test_no_budget_is_no_limit():
    budget = Budget(None)
    for _ in range(1000):
        assert (budget.wait(0), budget.available(0) > 0) == (0, True)
        budget.take(0)


async def test_what_others_drew_from_an_account_is_counted_and_survives_a_restart(world: World):
    async def used(relay: RunningRelay, count: int) -> None:
        await relay.eventually(
            "/v1/accounts",
            lambda shown: (
                [one["budget"]["used_today"] for one in shown["data"] if one["name"] == "luma"] == [count]
            ),
        )

    async with world.running() as relay:
        await used(relay, 0)
        database = sqlite3.connect(world.directory / "relay.db", timeout=30)
        with database:
            database.execute("UPDATE accounts SET lent = lent - 7 WHERE name = 'luma'")
        database.close()
        world.clock.forward(seconds=1)
        await used(relay, 7)
    async with world.running() as relay:
        await used(relay, 7)


async def test_a_request_of_a_day_is_written_down_before_it_is_made(database_url: str, world: World):
    accounts = only("vivix", world, requests_per_day=1000)
    async with world.running(database=database_url, accounts=accounts) as relay:
        database = await open_database(database_url, alone=False)
        requests = world.simulator.requests
        for _ in range(3):
            made = len(requests)
            watched = await world.watch(relay, "vivix", duration=1e6)
            await until(lambda made=made: len(requests) > made)
            made = len(requests)
            kept = await store_on(database, KEYRING).accounts.kept()
            assert kept["vivix"].state["budget"]["used_today"] >= made
            await relay.api.post(f"/v1/generations/{watched['id']}/refresh")
        await database.close()


async def test_requests_per_minute_is_kept_and_nobody_starves(world: World):
    relay = await world.relay(accounts=only("luma", world, poll_interval="100ms", requests_per_minute=60))
    watched = [await world.watch(relay, "luma", duration=1e6) for _ in range(30)]
    for _ in range(9):
        world.clock.forward(seconds=10)
        await a_while(world, relay)
    times = [one.time for one in world.simulator.requests if one.provider == "luma"]
    assert max(sum(at <= other < at + 60 for other in times) for at in times) <= 60
    never = [one["id"] for one in watched if not asks(world, one["job_id"])]
    assert never == []
