"""Replays that outlive the relay that went on with them: killed programs, and a fleet that changes."""

import asyncio
import signal
import sqlite3
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx

from relay.ids import LATE
from relay.times import rfc3339
from tests.conftest import World
from tests.fleet import Fleet
from tests.program import THOROUGH, Program, Receiver, drained, everything, seeded, was_in_flight
from tests.serving import serving
from tests.test_replays import SHIPPED, begun, counted, ids_at, over, publish

KILLS, EVENTS = (20, 2_000) if THOROUGH else (2, 200)


async def ended(api: httpx.AsyncClient, replay_id: str) -> dict[str, Any]:
    """The replay once it has ended."""
    async with asyncio.timeout(60):
        while True:
            shown = (await api.get(f"/v1/replays/{replay_id}")).json()
            if shown["ended_at"] is not None:
                return dict(shown)
            await asyncio.sleep(0.1)


async def test_a_replay_goes_on_after_each_kill_and_makes_everything_once(tmp_path: Path):
    dice, receiver = seeded(2026), Receiver(seeded(7))
    program = Program.placed(tmp_path, delivery={"timeout": "2s"})
    async with serving(receiver.app) as subscriber:
        await program.start()
        try:
            ids, kills = [], list[float]()
            async with program.api() as api:
                for first in range(0, EVENTS, 100):
                    items = [{"type": SHIPPED, "data": {"n": first + n}} for n in range(100)]
                    made = (await api.post("/v1/events", json=items)).json()
                    ids += [one["id"] for one in made["data"]]
                body = {"url": f"{subscriber}/late", "event_types": [SHIPPED]}
                endpoint = (await api.post("/v1/endpoints", json=body)).json()
                receiver.secrets["/late"] = endpoint["secret"]
                asked = {"status": "missing", "since": "2020-01-01T00:00:00Z", "rate_limit": EVENTS / 2}
                replay = (await api.post("/v1/replays", json=asked)).json()
            for kill in range(1, KILLS + 1):
                # Somewhere in the middle.
                await receiver.got("/late", kill * EVENTS // (KILLS + 2))
                await asyncio.sleep(dice.uniform(0, 0.2))
                kills.append(time.monotonic())
                assert await program.end(signal.SIGKILL) == -signal.SIGKILL
                await program.start()
            async with program.api() as api:
                shown = await ended(api, replay["id"])
                assert (shown["status"], shown["done"], shown["total"]) == ("completed", EVENTS, EVENTS)
                await drained(api)
                deliveries = await everything(api, "/v1/deliveries")
            assert Counter(one["event_id"] for one in deliveries) == Counter(ids)
            assert {one["status"] for one in deliveries} == {"delivered"}
            received = receiver.received["/late"]
            assert received.keys() == set(ids) and not receiver.forged
            for times in received.values():
                for first, again in pairwise(times):
                    assert was_in_flight(first, again, kills)
            assert await program.end(signal.SIGTERM) == 0
        finally:
            await program.end(signal.SIGKILL)
    with sqlite3.connect(tmp_path / "relay.db") as database:
        assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    database.close()


def long_ago(world: World) -> str:
    """Now, a moment later: what was made before is certainly written."""
    now = world.clock() + 1
    world.clock.forward(seconds=LATE / 1000 + 1)
    return rfc3339(now)


async def test_a_fleet_goes_on_with_a_replay_when_the_relay_that_was_at_it_leaves(world: World, fleet: Fleet):
    [first] = await fleet.joined(1)
    ids = await publish(first, 60)
    endpoint = await world.endpoint(first, "/late", event_types=[SHIPPED])
    of = {"status": "missing", "endpoint_id": endpoint["id"], "until": long_ago(world)}
    relays = [first, *await fleet.joined(1)]
    assert [await counted(one, **of) for one in relays] == [60, 60]
    holder = await fleet.holder(endpoint["id"])
    assert holder is not None
    [other] = await fleet.others(endpoint["id"])
    # Asked of the one that does not go on with it.
    made = await begun(other, **of, rate_limit=20)
    await world.subscriber.got(10, path="/late")
    await fleet.leave(holder)
    shown = await other.eventually(f"/v1/replays/{made['id']}", lambda one: one["ended_at"], timeout=30)
    assert (shown["status"], shown["done"]) == ("completed", 60)
    await over(other, 60, "delivered")
    assert ids_at(world, "/late") == Counter(ids)


async def test_a_replay_of_all_endpoints_is_sent_by_the_relays_that_hold_them(world: World, fleet: Fleet):
    [first] = await fleet.joined(1)
    ids, until = await publish(first, 20), long_ago(world)
    relays = [first, *await fleet.joined(1)]
    for number in range(6):
        await world.endpoint(relays[number % 2], f"/{number}", event_types=[SHIPPED])
    since = "2020-01-01T00:00:00Z"
    asked = {"status": "missing", "since": since, "until": until, "rate_limit": 1000}
    answers = await asyncio.gather(*(one.api.post("/v1/replays", json=asked) for one in relays * 2))
    assert sorted(one.status_code for one in answers) == [202, 409, 409, 409]
    [made] = [one.json() for one in answers if one.status_code == 202]
    assert all(made["id"] in one.json()["detail"] for one in answers if one.status_code == 409)
    path = f"/v1/replays/{made['id']}"
    shown = await relays[1].eventually(path, lambda one: one["ended_at"], timeout=30)
    assert (shown["status"], shown["total"], shown["done"]) == ("completed", 120, 120)
    await over(relays[0], 120, "delivered")
    for number in range(6):
        assert ids_at(world, f"/{number}") == Counter(ids)
