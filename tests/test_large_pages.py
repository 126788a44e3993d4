"""What is shown at once is bounded in bytes, and so is the memory that it takes, however much there is."""

import asyncio
import json
import tracemalloc
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any

import pytest

from relay import event
from relay.remote import Remote
from relay.store import Store
from relay.store.deliveries import MOST_ATTEMPTS
from relay.store.generations import write_update
from tests.conftest import ADMIN_KEY, RunningRelay, World
from tests.keyring import SECRET_KEY
from tests.test_store import (
    DONE,
    NOW,
    TENANT,
    announced,
    claimed_deliveries,
    prepared,
    published,
    registered,
    settlement,
    watched,
)

# JSON of many small things: as Python's it takes twenty times its bytes.
EVENTS, DATA = 6, {"filler": [[]] * 85_000}
GENERATIONS, RAW = 4, f"[{','.join(['[]'] * 130_000)}]"
ATTEMPTS = MOST_ATTEMPTS + 50
# Less than usual; and what may be taken to read, write and receive it, and to parse a part of it at once.
PAGE, MOST_MEMORY = 1024 * 1024, 15 * 1024 * 1024


@pytest.fixture(autouse=True)
def page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relay.web.operation.LARGEST_PAGE", PAGE)


async def running(world: World, database_url: str) -> RunningRelay:
    """A relay over what has been prepared."""
    return await world.relay(database=database_url, secret_key=SECRET_KEY, accounts=world.unhurried())


async def publish(store: Store, count: int, data: dict[str, Any]) -> None:
    for number in range(count):
        await published(store, event.published(TENANT, "a.b", data, None, now=NOW + number))


async def watch(store: Store, count: int, raw: str) -> None:
    """Generations that have ended; `raw` is what their provider said, as JSON."""
    answer = (write_update(replace(DONE, raw="raw")) or "").replace('"raw": "raw"', f'"raw": {raw}')
    for number in range(count):
        made = await watched(store, f"job-{number}", at=NOW + number)
        await announced(store, made, now=NOW + number)
    async with store.database.write() as tx:
        await tx.execute("UPDATE generations SET answer = :answer", answer=answer)


async def pages_of(relay: RunningRelay, path: str, **query: Any) -> AsyncIterator[Sequence[dict[str, Any]]]:
    cursor: dict[str, str] = {}
    while True:
        tracemalloc.start()
        answer = await relay.api.get(path, params={"limit": 200, **query, **cursor})
        taken = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        # What is written around each of them is little.
        assert len(answer.content) < PAGE + 100_000
        assert taken < MOST_MEMORY
        page = answer.json()
        yield page["data"]
        if page["next_cursor"] is None:
            return
        cursor = {"cursor": page["next_cursor"]}


async def test_a_page_of_large_events_ends_early_and_the_next_one_goes_on(
    database_url: str, world: World
) -> None:
    async with prepared(database_url) as store:
        await publish(store, EVENTS, DATA)
    relay = await running(world, database_url)
    first, last = [page async for page in pages_of(relay, "/v1/events")]
    found = [*first, *last]
    assert [one["timestamp"] for one in found] == sorted((one["timestamp"] for one in found), reverse=True)
    assert len({one["id"] for one in found}) == len(found) == EVENTS
    assert all(one["data"] == DATA for one in found)
    assert (await relay.api.get(f"/v1/events/{last[-1]['id']}")).json() == last[-1]


async def test_a_page_of_large_generations_ends_early_and_the_next_one_goes_on(
    database_url: str, world: World
) -> None:
    async with prepared(database_url) as store:
        await watch(store, GENERATIONS, RAW)
    relay = await running(world, database_url)
    first, last = [page async for page in pages_of(relay, "/v1/generations", account="luma")]
    assert [one["job_id"] for one in (*first, *last)] == [f"job-{n}" for n in reversed(range(GENERATIONS))]
    assert last[-1]["raw"] == json.loads(RAW)


async def test_what_is_larger_than_a_page_is_one_by_itself(
    database_url: str, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("relay.web.operation.LARGEST_PAGE", 10)
    async with prepared(database_url) as store:
        await publish(store, 3, {"a": [1, {"data": {}}]})
        await watch(store, 3, "{}")
    relay = await running(world, database_url)
    for path, query in (("/v1/events", {"type": "a.b"}), ("/v1/generations", {})):
        pages = [page async for page in pages_of(relay, path, **query)]
        assert [len(page) for page in pages] == [1, 1, 1]


async def test_a_command_lists_as_many_as_it_was_asked_for(database_url: str, world: World) -> None:
    async with prepared(database_url) as store:
        await watch(store, GENERATIONS, json.dumps("x" * 400_000))
    relay = await running(world, database_url)
    remote = Remote(relay.origin, ADMIN_KEY)
    everything = await asyncio.to_thread(remote.list, "/v1/generations", {"limit": 50})
    assert (len(everything["data"]), everything["next_cursor"]) == (GENERATIONS, None)
    but_one = await asyncio.to_thread(remote.list, "/v1/generations", {"limit": GENERATIONS - 1})
    assert but_one["data"] == everything["data"][:-1]
    assert but_one["next_cursor"] == but_one["data"][-1]["id"]


async def test_of_many_attempts_the_last_ones_are_shown_in_their_order(
    database_url: str, world: World
) -> None:
    async with prepared(database_url) as store:
        await registered(store, event_types=["a.b"])
        await publish(store, 1, {})
        [one] = await claimed_deliveries(store)
        await store.deliveries.settle([settlement(one, number=ATTEMPTS)], now=NOW)
        before = [{"id": f"att_{n}", "of": one.id, "number": n} for n in range(1, ATTEMPTS)]
        async with store.database.write() as tx:
            await tx.execute_many(
                """
                INSERT INTO attempts (id, delivery_id, number, started_at, duration_ms, reason)
                VALUES (:id, :of, :number, 1, 1, 'replay')
                """,
                before,
            )
    relay = await running(world, database_url)
    shown = (await relay.api.get(f"/v1/deliveries/{one.id}")).json()
    numbers = [attempt["number"] for attempt in shown["attempts"]]
    assert numbers == list(range(ATTEMPTS - MOST_ATTEMPTS + 1, ATTEMPTS + 1))
    assert shown["attempt_count"] == ATTEMPTS
