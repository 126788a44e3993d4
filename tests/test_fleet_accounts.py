"""Several relays over one PostgreSQL ask as one: an account's limits, health and jobs are everybody's."""

import asyncio
import json
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from itertools import pairwise
from typing import Any

import httpx
from starlette.types import ASGIApp, Receive, Scope, Send

from relay.shard import SHARDS, share
from relay.simulator import Simulator
from relay.store import store_on
from tests.conftest import RunningRelay, World
from tests.fleet import Fleet, named
from tests.keyring import KEYRING
from tests.serving import serving

HALF = SHARDS // 2


def account(world: World, provider: str, origin: str | None = None, **settings: Any) -> dict[str, Any]:
    url = Simulator.base_urls(origin or world.simulator_origin)[provider]
    return {"provider": provider, "api_key": world.simulator.keys[provider], "base_url": url, **settings}


async def watch(relay: RunningRelay, account: str, job_id: str, **fields: Any) -> dict[str, Any]:
    body = {"account": account, "job_id": job_id, **fields}
    answer = await relay.api.post("/v1/generations", json=body)
    assert answer.status_code == 201, answer.text
    return dict(answer.json())


async def refresh(relay: RunningRelay, generation: dict[str, Any]) -> httpx.Response:
    return await relay.api.post(f"/v1/generations/{generation['id']}/refresh")


async def shown(relay: RunningRelay, name: str) -> dict[str, Any]:
    """The account as this relay tells of it, but for where it is called back: that differs between these."""
    listed = (await relay.api.get("/v1/accounts")).json()["data"]
    return next({**one, "webhook_url": None} for one in listed if one["name"] == name)


async def all_tell(fleet: Fleet, name: str, true: Callable[[dict[str, Any]], bool], timeout: float) -> None:
    """Returns once every relay tells of an account as wished."""
    async with asyncio.timeout(timeout):
        while not all([true(await shown(relay, name)) for relay in fleet.relays]):  # noqa: ASYNC110
            await asyncio.sleep(0.02)


def asked(world: World, provider: str, job_id: str | None = None) -> list[float]:
    """When a provider was asked, or was asked about a job."""
    return [
        one.time
        for one in world.simulator.requests
        if one.provider == provider and one.method == "GET" and job_id in (None, one.job_id)
    ]


async def until(true: Callable[[], bool], *, timeout: float = 20) -> None:
    async with asyncio.timeout(timeout):
        while not true():  # noqa: ASYNC110 # nobody tells when
            await asyncio.sleep(0.01)


@asynccontextmanager
async def slow(app: ASGIApp, go_on: asyncio.Event) -> AsyncIterator[str]:
    """The origin of what answers nothing until it may go on."""

    async def held(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await go_on.wait()
            await app(scope, receive, send)

    async with serving(held) as origin:
        yield origin
        go_on.set()


async def test_the_limits_of_an_account_hold_for_all_while_relays_come_and_go(world: World, fleet: Fleet):
    minute, day = named("minute", lambda shard: shard >= HALF), named("day", lambda shard: shard >= HALF)
    calls = named("calls", lambda shard: shard >= HALF)
    accounts = {
        minute: account(world, "luma", poll_interval="100ms", requests_per_minute=120),
        day: account(world, "pixellabs", poll_interval="100ms", requests_per_day=40),
        calls: account(world, "pictory", poll_interval="1h", requests_per_minute=60),
    }
    fleet.changes = {"accounts": accounts}
    [first] = await fleet.joined(1)
    made: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for name, one in accounts.items():
        for _ in range(6):
            job = world.simulator.submit(one["provider"], duration=1e6)
            made[name].append(await watch(first, name, job))
    told = Counter[int]()

    async def bother(relay: RunningRelay, turn: int) -> None:
        """What users and providers do all the time, through any relay."""
        for answer in await asyncio.gather(*(refresh(relay, made[name][turn]) for name in (minute, day))):
            told[answer.status_code] += 1
            assert answer.status_code == 200 or int(answer.headers["retry-after"]) >= 1
        for one in made[calls]:
            path = one["webhook_url"].removeprefix(first.origin)
            assert (await relay.api.post(path, json={"job_id": one["job_id"]})).status_code == 200

    begun = time.time()
    for turn in range(6):
        match turn:
            case 1 | 2:
                await fleet.join()
            case 3:
                await fleet.settled()
                assert first not in [await fleet.holder(name) for name in accounts]
            case 4:
                await fleet.leave(await fleet.holder(minute))
        await asyncio.gather(*(bother(relay, turn) for relay in fleet.relays))
    lasted = time.time() - begun
    assert told[200] > 0
    assert told[429] > 0
    # A tenth of a minute's requests at once, and nine tenths evenly; booked a moment before they arrive.
    for provider, per_minute in (("luma", 120), ("pictory", 60)):
        times, rate = asked(world, provider), 0.9 * per_minute / 60
        worst = max(
            last - place + 1 - rate * (times[last] - at)
            for place, at in enumerate(times)
            for last in range(place, len(times))
        )
        assert worst <= per_minute / 10 + 1.5, provider
        assert len(times) >= 0.5 * rate * lasted, provider
    assert 5 <= len(asked(world, "pixellabs")) <= 21


async def test_what_was_asked_just_before_an_account_changes_hands_counts(world: World, fleet: Fleet):
    name, go_on = named("luma", lambda shard: shard >= HALF), asyncio.Event()
    async with slow(world.simulator.app, go_on) as origin:
        one = account(world, "luma", origin, poll_interval="100ms", requests_per_day=10)
        fleet.changes = {"accounts": {name: one}}
        [first] = await fleet.joined(1)
        go_on.set()
        one = await watch(first, name, world.simulator.submit("luma", duration=0))
        kept = "SELECT COUNT(*) AS n FROM accounts WHERE state LIKE '%\"used_today\": 1,%'"
        await fleet.eventually(kept, 1)
        go_on.clear()
        for _ in range(12):
            await watch(first, name, world.simulator.submit("luma", duration=1e6))
        await fleet.eventually("SELECT COUNT(*) AS n FROM generations WHERE lease IS NOT NULL", 5)
        second = await fleet.join()
        # All but the shard of the account, of which five requests are under way.
        mine = "SELECT COUNT(*) AS n FROM shards WHERE holder = :holder"
        await fleet.eventually(mine, HALF - 1, holder=fleet.name(second))
        await asyncio.sleep(1.5)  # that is how long the provider hangs
        go_on.set()
        await fleet.settled()
        assert await fleet.holder(name) is second
        await all_tell(fleet, name, lambda told: told["budget"]["used_today"] == 6, 5)
    assert len(asked(world, "luma")) == 6


async def test_a_request_for_another_relay_is_booked_when_it_is_made(world: World, fleet: Fleet):
    """None is set aside for it, which would come on top of a minute's requests."""
    fleet.changes = {
        "accounts": {"luma": account(world, "luma", poll_interval="1h", requests_per_minute=6)},
        "delivery": {"timeout": "15s"},  # and so leases that the clock's jumps leave alone
    }
    await fleet.joined(3)
    others = await fleet.others("luma")
    one = await watch(others[0], "luma", world.simulator.submit("luma", duration=1e6))
    for _ in range(2):
        world.clock.forward(seconds=13)
        assert (await refresh(await fleet.holder("luma"), one)).status_code == 200
        refused = await asyncio.gather(*(refresh(relay, one) for relay in others))
        assert [answer.status_code for answer in refused] == [429, 429]
        assert all(5 <= int(answer.headers["retry-after"]) <= 12 for answer in refused)
    world.clock.forward(seconds=13)
    answers = await asyncio.gather(*(refresh(relay, one) for relay in others))
    assert sorted(answer.status_code for answer in answers) == [200, 429]
    assert len(asked(world, "luma")) == 3


async def test_a_refresh_through_any_relay_brings_the_truth(world: World, fleet: Fleet):
    fleet.changes = {
        "accounts": {
            "limited": account(world, "luma", poll_interval="1h", requests_per_minute=1000),
            "unlimited": account(world, "vivix", poll_interval="1h"),
        }
    }
    relays = await fleet.joined(3)
    for name, provider in (("limited", "luma"), ("unlimited", "vivix")):
        for relay in relays:
            one = await watch(relays[0], name, world.simulator.submit(provider, duration=0))
            answer = await refresh(relay, one)
            assert (answer.status_code, answer.json()["status"]) == (200, "completed"), answer.text
            for other in relays:
                seen = (await other.api.get(f"/v1/generations/{one['id']}")).json()
                assert seen["status"] == "completed"
        await all_tell(fleet, name, lambda told: told["budget"]["used_today"] == 3, 3)


async def test_every_job_is_polled_by_one_relay_and_announced_once(world: World, fleet: Fleet):
    fleet.changes = {
        "accounts": {
            name: account(world, provider, poll_interval="400ms")
            for provider in Simulator.base_urls("")
            for name in (provider, f"{provider}-2", f"{provider}-3")
        }
    }
    [first] = await fleet.joined(1)
    await world.endpoint(first)
    jobs = dict[str, tuple[str, str]]()
    for turn in range(3):
        for name in fleet.changes["accounts"]:
            provider = name.partition("-")[0]
            job = world.simulator.submit(provider, duration=2)
            made = await watch(fleet.relays[turn % len(fleet.relays)], name, job)
            jobs[made["id"]] = (provider, job)
        if turn == 2:
            await fleet.leave(first)
        else:
            await fleet.join()
    await world.subscriber.until(lambda found: len(found) >= len(jobs))
    for provider, job in jobs.values():
        times = asked(world, provider, job)
        assert min((later - one for one, later in pairwise(times)), default=1) > 0.2, (provider, times)
    last = fleet.relays[0]
    for status in ("pending", "sending"):
        await last.eventually(f"/v1/deliveries?status={status}&limit=1", lambda page: not page["data"])
    ended = Counter(json.loads(one.body)["data"]["id"] for one in world.subscriber.received)
    assert ended == dict.fromkeys(jobs, 1)


async def test_an_account_that_fails_does_so_for_all_and_is_announced_once(world: World, fleet: Fleet):
    fleet.changes = {
        "accounts": {
            "luma": account(world, "luma", poll_interval="200ms"),
            "vivix": account(world, "vivix", poll_interval="200ms"),
        }
    }
    relays = await fleet.joined(3)
    await world.endpoint(relays[0], event_types=["account.failing", "account.recovered"])
    jobs = {name: world.simulator.submit(name, duration=1e6) for name in ("luma", "vivix")}
    world.simulator.trouble("vivix", "server_error", count=1000)
    keys, world.simulator.keys = dict(world.simulator.keys), {**world.simulator.keys, "luma": "another"}
    made = [await watch(relays[0], name, job) for name, job in jobs.items()]
    for _ in range(5):
        await refresh(await fleet.holder("vivix"), made[1])
    for name, status in (("luma", "unauthorized"), ("vivix", "failing")):
        await until(lambda name=name: len(asked(world, name)) >= 1)
        await all_tell(fleet, name, lambda told, status=status: told["status"] == status, 2)
        told = [await shown(relay, name) for relay in relays]
        assert told[0] == told[1] == told[2]
        assert told[0]["last_error"]
        assert told[0]["budget"]["next_request_at"]
    world.simulator.keys = keys
    world.simulator._troubles.clear()
    # Nobody asks by himself for minutes. Who is not its holder asks, and all know.
    for name, generation in zip(("luma", "vivix"), made, strict=True):
        assert (await refresh((await fleet.others(name))[0], generation)).status_code == 200
        await all_tell(fleet, name, lambda told: told["status"] == "ok", 2)
    await world.subscriber.got(4)
    said = [
        (one["type"], one["data"]["account"])
        for one in (json.loads(one.body) for one in world.subscriber.received)
    ]
    assert sorted(said) == [
        (f"account.{what}", name) for what in ("failing", "recovered") for name in ("luma", "vivix")
    ]


async def test_whoever_waits_at_any_relay_is_told_of_the_end(world: World, fleet: Fleet):
    fleet.changes = {"accounts": {"luma": account(world, "luma", poll_interval="100ms")}}
    relays = await fleet.joined(3)
    one = await watch(relays[0], "luma", world.simulator.submit("luma", duration=1))

    async def waited(relay: RunningRelay) -> float:
        answer = await relay.api.get(f"/v1/generations/{one['id']}/wait?timeout=20")
        assert answer.json()["status"] == "completed"
        return time.monotonic()

    times = await asyncio.gather(*map(waited, relays))
    assert max(times) - min(times) < 1.5


async def test_deadlines_of_an_account_that_is_configured_no_more_are_kept(world: World, fleet: Fleet):
    gone = named("gone", lambda shard: shard >= share(2))
    fleet.changes = {"accounts": {}}
    accounts = {gone: account(world, "luma", poll_interval="1h")}
    old = await fleet.join(accounts=accounts)
    for _ in range(2):
        await fleet.join()
    await fleet.settled()
    assert await fleet.holder(gone) is not old
    await world.endpoint(old)
    # The new ones have begun without it.
    one = await watch(old, gone, world.simulator.submit("luma", duration=1e6), timeout_seconds=30)
    await fleet.leave(old)
    await fleet.settled()
    world.clock.forward(seconds=61)
    await fleet.relays[0].eventually(
        f"/v1/generations/{one['id']}", lambda shown: shown["status"] == "timed_out"
    )
    await world.subscriber.got(1)
    [event] = (await fleet.relays[1].api.get("/v1/events")).json()["data"]
    assert (event["type"], len(asked(world, "luma"))) == ("generation.timed_out", 0)


async def test_a_holder_whose_account_somebody_else_put_his_name_to_has_it_back(world: World, fleet: Fleet):
    fleet.changes = {
        "accounts": {"luma": account(world, "luma", poll_interval="1h", requests_per_minute=600)}
    }
    relays = await fleet.joined(2)
    one = await watch(relays[0], "luma", world.simulator.submit("luma", duration=1e6))
    # As one would that hung while it took the account, and lost it meanwhile.
    await store_on(fleet.database, KEYRING).accounts.take(["luma"], holder="rly_ghost", now=0)
    await fleet.eventually("SELECT COUNT(*) AS n FROM accounts WHERE holder <> 'rly_ghost'", 1)
    [other] = await fleet.others("luma")
    assert (await refresh(other, one)).status_code == 200
    await all_tell(fleet, "luma", lambda told: told["budget"]["used_today"] == 1, 3)
