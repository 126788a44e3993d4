"""Accounts that are added, changed and deleted while several relays run over one PostgreSQL."""

import asyncio
import json
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import httpx

from relay.keyring import KeyRing
from relay.simulator import Simulator
from relay.store import store_on
from relay.store.credentials import Credential, Credentials
from tests.conftest import RunningRelay, World
from tests.fleet import Fleet, named

TENANT = "default"


def inner(name: str) -> str:
    return f"{TENANT}.{name}"


async def name_elsewhere(fleet: Fleet, relay: RunningRelay) -> str:
    """A name whose account another relay will hold."""
    rows = await fleet.rows("SELECT number FROM shards WHERE holder <> :relay", relay=fleet.name(relay))
    others = {row["number"] for row in rows}
    return named(inner("luma"), lambda shard: shard in others).removeprefix(inner(""))


def settings(world: World, provider: str = "luma", **fields: Any) -> dict[str, Any]:
    url = Simulator.base_urls(world.simulator_origin)[provider]
    key = world.simulator.keys[provider]
    return {"provider": provider, "api_key": key, "base_url": url, "poll_interval_seconds": 0.1, **fields}


async def add(world: World, relay: RunningRelay, name: str, provider: str = "luma", **fields: Any) -> None:
    body = {"name": name, **settings(world, provider, **fields)}
    answer = await relay.api.post("/v1/accounts", json=body)
    assert answer.status_code == 201, answer.text


def unheard(world: World, fleet: Fleet) -> Credentials:
    """What a relay does that nobody hears."""
    return store_on(fleet.database, KeyRing([world.document()["secret_key"]])).credentials


async def add_unheard(world: World, fleet: Fleet, name: str, **changes: Any) -> None:
    made = settings(world)
    now = world.clock()
    credential = Credential(
        **{
            "name": inner(name), "tenant": TENANT, "provider": "luma", "api_key": made["api_key"],
            "base_url": made["base_url"], "poll_interval": 100, "created_at": now, "updated_at": now,
        } | changes
    )  # fmt: skip
    await unheard(world, fleet).create(credential, None)


async def watch(relay: RunningRelay, name: str, job_id: str, **fields: Any) -> dict[str, Any]:
    body = {"account": name, "job_id": job_id, **fields}
    answer = await relay.api.post("/v1/generations", json=body)
    assert answer.status_code == 201, answer.text
    return dict(answer.json())


async def completed(relay: RunningRelay, generation: dict[str, Any]) -> None:
    await relay.eventually(f"/v1/generations/{generation['id']}", lambda one: one["status"] == "completed")


def asked(world: World, job_id: str) -> list[float]:
    return [one.time for one in world.simulator.requests if one.job_id == job_id and one.method == "GET"]


async def all_have(fleet: Fleet, path: str, true: Callable[[httpx.Response], bool]) -> None:
    """Returns once every relay answers as wished."""
    async with asyncio.timeout(10):
        while not all([true(await relay.api.get(path)) for relay in fleet.relays]):  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def test_an_account_is_used_by_the_relay_that_holds_it_whoever_was_told_of_it(
    world: World, fleet: Fleet
):
    fleet.changes = {"accounts": {}}
    a, b = await fleet.joined(2)
    await world.endpoint(a)
    for relay in (a, b):
        name = await name_elsewhere(fleet, relay)
        await add(world, relay, name, requests_per_day=1000)
        assert await fleet.holder(inner(name)) is not relay
        for via in (a, b):
            job = world.simulator.submit("luma", duration=0.3)
            await completed(relay, await watch(via, name, job))
        # Both tell of the same page.
        await all_have(fleet, f"/v1/accounts/{name}", lambda got: got.json()["budget"]["used_today"] >= 2)
    received = await world.subscriber.got(4)
    assert Counter(json.loads(one.body)["type"] for one in received) == {"generation.completed": 4}


async def test_an_account_added_beside_its_holder_is_limited_as_one(world: World, fleet: Fleet):
    fleet.changes = {"accounts": {}}
    await fleet.joined(3)
    await add(world, fleet.relays[0], "luma", poll_interval_seconds=3600, requests_per_minute=6)
    one = await watch(fleet.relays[0], "luma", world.simulator.submit("luma", duration=1e6))

    async def refresh(relay: RunningRelay) -> int:
        return (await relay.api.post(f"/v1/generations/{one['id']}/refresh")).status_code

    holder, others = await fleet.holder(inner("luma")), await fleet.others(inner("luma"))
    # That it is taken up is written down; before, nobody lends.
    await fleet.eventually("SELECT COUNT(*) AS n FROM accounts WHERE holder IS NOT NULL", 1)
    answers = [await refresh(relay) for relay in (others[0], holder, others[1])]
    assert answers == [200, 429, 429]
    assert len(asked(world, one["job_id"])) == 1


async def test_whoever_did_not_hear_of_an_account_finds_it_when_it_is_named(world: World, fleet: Fleet):
    fleet.changes = {"accounts": {}}
    a, b = await fleet.joined(2)
    await add_unheard(world, fleet, "luma")
    assert (await a.api.get("/v1/accounts/luma")).status_code == 200
    assert (
        await a.api.post("/v1/endpoints", json={"url": "https://a.example", "accounts": ["luma"]})
    ).is_success
    await add_unheard(world, fleet, "second")
    for relay in (a, b):
        await watch(relay, "second", world.simulator.submit("luma", duration=1e6))
    await add_unheard(
        world, fleet, "pictory", provider="pictory", base_url=settings(world, "pictory")["base_url"]
    )
    made = await a.api.post("/v1/generations", json={"account": "pictory"})
    hook = made.json()["webhook_url"].removeprefix(a.origin)
    assert (await b.api.post(hook, json={})).status_code == 200
    await add_unheard(
        world,
        fleet,
        "vivix",
        provider="vivix",
        webhook_secrets=("s",),
        base_url=settings(world, "vivix")["base_url"],
    )
    assert (await b.api.post("/hooks/default.vivix", content=b"{}")).status_code == 401


async def test_whoever_did_not_hear_of_a_change_finds_it_within_a_minute(world: World, fleet: Fleet):
    fleet.changes = {"accounts": {}, "delivery": {"timeout": "60s"}}  # and so leases that outlive the jump
    await fleet.joined(2)
    name = "luma"
    await add_unheard(world, fleet, name)
    job = world.simulator.submit("luma", duration=0)
    holder, [other] = await fleet.holder(inner(name)), await fleet.others(inner(name))
    generation = await watch(other, name, job)
    assert (await holder.api.get("/v1/accounts")).json()["data"] == []
    world.clock.forward(seconds=61)
    await completed(other, generation)
    # And that it is gone again.
    await unheard(world, fleet).delete(inner(name))
    assert [one["name"] for one in (await other.api.get("/v1/accounts")).json()["data"]] == [name]
    world.clock.forward(seconds=61)
    await all_have(fleet, "/v1/accounts", lambda got: got.json()["data"] == [])


async def test_a_credential_changed_at_one_relay_is_what_the_others_ask_with(world: World, fleet: Fleet):
    fleet.changes = {"accounts": {}}
    await fleet.joined(2)
    await add(world, fleet.relays[0], "luma", api_key="no-good-0123456789-0123")
    generation = await watch(fleet.relays[0], "luma", world.simulator.submit("luma", duration=0))
    await all_have(fleet, "/v1/accounts/luma", lambda got: got.json()["status"] == "unauthorized")
    [other] = await fleet.others(inner("luma"))
    changed = await other.api.patch("/v1/accounts/luma", json={"api_key": world.simulator.keys["luma"]})
    assert changed.status_code == 200
    # The holder asks, at once, though it would have waited for minutes.
    await completed(fleet.relays[0], generation)
    await all_have(fleet, "/v1/accounts/luma", lambda got: got.json()["status"] == "ok")
    changed = await other.api.patch("/v1/accounts/luma", json={"requests_per_day": 7})
    await all_have(fleet, "/v1/accounts/luma", lambda got: got.json()["budget"]["requests_per_day"] == 7)


async def test_an_account_deleted_at_one_relay_is_unknown_to_all(world: World, fleet: Fleet):
    fleet.changes = {"accounts": {}}
    a, b = await fleet.joined(2)
    await add(world, a, "luma")
    await all_have(fleet, "/v1/accounts/luma", lambda got: got.status_code == 200)
    assert (await b.api.delete("/v1/accounts/luma")).status_code == 204
    await all_have(fleet, "/v1/accounts/luma", lambda got: got.status_code == 404)
    for relay in (a, b):
        refused = await relay.api.post("/v1/generations", json={"account": "luma", "job_id": "j"})
        assert refused.status_code == 422
    # Again, by the other one: nobody remembers the first.
    await add(world, a, "luma")
    generation = await watch(b, "luma", world.simulator.submit("luma", duration=0))
    await completed(a, generation)


async def test_open_generations_of_an_account_that_is_gone_end_at_their_deadline(world: World, fleet: Fleet):
    fleet.changes = {"accounts": {}}
    await fleet.joined(2)
    await add(world, fleet.relays[0], "luma", poll_interval_seconds=3600)
    job = world.simulator.submit("luma", duration=1e6)
    one = await watch(fleet.relays[0], "luma", job, timeout_seconds=30)
    # As when it was deleted just while somebody else began to watch.
    async with fleet.database.write() as tx:
        await tx.execute("DELETE FROM credentials")
    world.clock.forward(seconds=61)
    for relay in fleet.relays:
        await relay.eventually(f"/v1/generations/{one['id']}", lambda shown: shown["status"] == "timed_out")
    assert (await fleet.relays[0].api.post(f"/v1/generations/{one['id']}/refresh")).status_code == 409
    assert asked(world, job) == []


async def test_added_accounts_go_with_their_shards_while_relays_come_and_go(world: World, fleet: Fleet):
    fleet.changes = {"accounts": {}}
    [first] = await fleet.joined(1)
    await world.endpoint(first)
    jobs: dict[str, str] = {}
    for turn in range(4):
        for number in range(6):
            relay = fleet.relays[(turn + number) % len(fleet.relays)]
            name = f"luma-{turn}-{number}"
            await add(world, relay, name, poll_interval_seconds=0.4)
            via = fleet.relays[number % len(fleet.relays)]
            job = world.simulator.submit("luma", duration=2)
            jobs[(await watch(via, name, job))["id"]] = job
        if turn == 2:
            await fleet.leave(first)
        else:
            await fleet.join()
    await world.subscriber.until(lambda found: len(found) >= len(jobs))
    for job in jobs.values():
        times = asked(world, job)
        assert min((later - one for one, later in pairwise(times)), default=1) > 0.2, times
    last = fleet.relays[0]
    for status in ("pending", "sending"):
        await last.eventually(f"/v1/deliveries?status={status}&limit=1", lambda page: not page["data"])
    ended = Counter(json.loads(one.body)["data"]["id"] for one in world.subscriber.received)
    assert ended == dict.fromkeys(jobs, 1)
    await fleet.settled()
    held = Counter(
        row["holder"] for row in await fleet.rows("SELECT holder FROM accounts WHERE name LIKE 'default.%'")
    )
    assert held.keys() <= set(map(fleet.name, fleet.relays))
