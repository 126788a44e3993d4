"""Removing what is old beside those who work: in steps, without end in memory, on the disk or in time."""

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from relay.delivery import Answer, Claimed, Status
from relay.ids import new_id
from relay.prune import prune
from relay.store import Store
from relay.store.events import Publication
from relay.store.sqlite import SPARE_PAGES, WAL_BYTES
from tests.conftest import World
from tests.test_store import (
    DAY,
    NOW,
    TENANT,
    YEAR,
    an_event,
    prepared,
    registered,
    rows,
    settlement,
    store,
    taking,
)

__all__ = ["store"]
OLD = NOW - 31 * DAY
AGES = {"events": 30 * DAY, "attempts": 30 * DAY, "audit": YEAR, "now": NOW}


async def published(store: Store, count: int, *, size: int = 9, at: int = OLD) -> list[Claimed]:
    """Events of about so many bytes with a delivery each, which is in our hands."""
    body = b'{"data":"' + b"x" * size + b'"}'
    # Ids begin with the time of their events.
    prefix = new_id("evt", at)[:14]
    events = [an_event(id=f"{prefix}{n:016}", body=body, created_at=at) for n in range(count)]
    claimed = []
    for first in range(0, count, 500):
        some = Publication(TENANT, events[first : first + 500], None)
        claimed += (await store.events.publish([some], taking(count, now=at), now=at))[1]
    return claimed


async def delivered(store: Store, claimed: list[Claimed], *, at: int = OLD, said: str = "thanks") -> None:
    for first in range(0, len(claimed), 500):
        await store.deliveries.settle(
            [
                settlement(one, Status.DELIVERED, answer=Answer(at, 1, 200, said))
                for one in claimed[first : first + 500]
            ],
            now=at,
        )


async def count(store: Store, table: str) -> int:
    return int((await rows(store, f"SELECT COUNT(*) AS n FROM {table}"))[0]["n"])  # noqa: S608


async def test_what_may_not_go_yet_does_not_keep_the_rest_from_going(store: Store):
    await registered(store, event_types=["a.b"])
    claimed = await published(store, 1200)
    await delivered(store, claimed[1100:])
    assert await prune(store, **AGES) == 100
    assert await count(store, "events") == await count(store, "deliveries") == 1100


async def test_a_step_looks_at_so_many_rows_and_no_more_however_few_of_them_may_go(store: Store):
    await registered(store, event_types=["a.b"])
    claimed = await published(store, 30)
    await delivered(store, claimed[20:])
    removed, after = [], ""
    while after is not None:
        step = await store.retention.remove_events(before=NOW, limit=8, after=after)
        removed.append(step.removed)
        after = step.after
    # Each has a delivery, which counts too.
    assert removed == [0, 0, 0, 0, 0, 4, 4, 2]


async def test_a_step_costs_the_same_however_much_waits_behind_it(on_file: Store):
    await registered(on_file, event_types=["a.b"])
    await published(on_file, 60)
    await published(on_file, 3000, at=OLD + DAY)
    # What the writing connection does, in hundreds of steps of SQLite's machine.
    work: list[int] = []
    writer = on_file.database._writer  # type: ignore[attr-defined] # nobody else knows what a query costs
    await writer.set_progress_handler(lambda: work.append(1), 100)
    retention, costs = on_file.retention, []
    for before in (OLD + 1, NOW):
        work.clear()
        assert (await retention.remove_events(before=before, limit=50)).removed == 0
        costs.append(len(work))
    assert costs[1] <= 2 * costs[0] + 5


async def test_it_stops_between_two_steps_when_it_is_another_relays_turn(store: Store):
    await registered(store, event_types=["a.b"])
    await delivered(store, await published(store, 1200))
    turns = iter([True, True])
    await prune(store, **AGES, goes_on=lambda: next(turns, False))
    assert 0 < await count(store, "events") < 1200
    assert await count(store, "attempts") == await count(store, "deliveries") == await count(store, "events")


async def test_it_tells_what_it_removed(store: Store):
    await registered(store, event_types=["a.b"])
    await delivered(store, await published(store, 10))
    told: list[tuple[str, int]] = []
    await prune(store, **AGES, observed=lambda kind, rows, seconds: told.append((kind, rows)))
    assert [one for one in told if one[1]] == [("events", 10)]


async def test_attempts_may_go_before_their_events(store: Store):
    await registered(store, event_types=["a.b"])
    await delivered(store, await published(store, 10))
    told: list[tuple[str, int]] = []
    ages = {**AGES, "events": 400 * DAY}
    await prune(store, **ages, observed=lambda kind, rows, seconds: told.append((kind, rows)))
    assert [one for one in told if one[1]] == [("attempts", 10)]
    assert await count(store, "events") == await count(store, "deliveries") == 10


async def test_what_endpoints_answered_may_go_before_their_attempts(store: Store):
    await registered(store, event_types=["a.b"])
    await delivered(store, await published(store, 3, at=NOW - 8 * DAY), at=NOW - 8 * DAY)
    await delivered(store, await published(store, 3, at=NOW - 6 * DAY), at=NOW - 6 * DAY)
    looked_through: dict[str, str] = {}
    for _ in range(2):
        await prune(store, **AGES, bodies=7 * DAY, looked_through=looked_through)
        found = await rows(store, "SELECT response_body FROM attempts ORDER BY started_at")
        assert [row["response_body"] for row in found] == [None] * 3 + ["thanks"] * 3


async def test_a_running_relay_removes_what_is_old_and_says_so(world: World, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("relay.app.PRUNE_TICK", 0.1)
    relay = await world.relay(retention={"events": "1h", "attempts": "1h"})
    await world.endpoint(relay, event_types=["a.b"])
    await relay.api.post("/v1/events", json={"type": "a.b", "data": {}})
    await relay.eventually("/v1/deliveries?status=delivered", lambda page: page["data"])
    relay.clock.forward(seconds=3700)
    await relay.eventually("/v1/events", lambda page: not page["data"])
    text = (await relay.api.get("/metrics")).text
    assert 'relay_pruned_rows_total{kind="events"} 1.0' in text


# What a file alone has.


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "relay.db"


@pytest.fixture
async def on_file(path: Path) -> AsyncIterator[Store]:
    async with prepared(f"sqlite:///{path}") as store:
        yield store


def size(path: Path) -> int:
    return path.stat().st_size


def wal(path: Path) -> int:
    return size(path.with_name("relay.db-wal"))


async def test_the_file_gets_smaller_when_much_was_removed(on_file: Store, path: Path):
    await registered(on_file, event_types=["a.b"])
    await delivered(on_file, await published(on_file, 600, size=60_000))
    before = (await on_file.database.sizes())["main"]
    await prune(on_file, **AGES)
    after = await on_file.database.sizes()
    assert before > 36_000_000
    # What comes next finds room.
    assert after["free"] == pytest.approx(SPARE_PAGES * 4096, rel=0.05)
    assert after["main"] < 20_000_000
    await on_file.database.close()
    assert size(path) < 20_000_000
    database = sqlite3.connect(path)
    assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    database.close()


async def test_a_file_that_can_give_nothing_back_is_left_as_it_is(path: Path):
    # Such a one is made by a dump that is read in again.
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("PRAGMA auto_vacuum = NONE")
    other.execute("VACUUM")
    other.close()
    async with prepared(f"sqlite:///{path}") as store:
        await registered(store, event_types=["a.b"])
        await delivered(store, await published(store, 600, size=60_000))
        async with asyncio.timeout(20):
            await prune(store, **AGES)
        assert await count(store, "events") == 0
        assert (await store.database.sizes())["free"] > 30_000_000


async def test_what_is_written_beside_the_file_is_cut_when_a_slow_reader_has_gone(on_file: Store, path: Path):
    await registered(on_file, event_types=["a.b"])
    slow = sqlite3.connect(path, isolation_level=None)
    slow.execute("BEGIN")
    slow.execute("SELECT COUNT(*) FROM events").fetchone()
    try:
        await published(on_file, 700, size=60_000)
        assert wal(path) > 2 * WAL_BYTES
        # It waits for nobody outside: whoever writes would wait as well.
        async with asyncio.timeout(2):
            await on_file.database.tidy()
        assert wal(path) > 2 * WAL_BYTES
    finally:
        slow.execute("COMMIT")
        slow.close()
    await on_file.database.tidy()
    assert wal(path) <= WAL_BYTES
    assert await count(on_file, "events") == 700


async def test_readers_that_take_turns_do_not_keep_it_growing(on_file: Store, path: Path):
    await registered(on_file, event_types=["a.b"])
    stopping = False

    async def read(browse: bool) -> None:
        while not stopping:
            async with on_file.database.read(browse=browse) as tx:
                await tx.fetch("SELECT COUNT(*) FROM events WHERE LENGTH(body) > 1")

    async def tidy() -> None:
        while not stopping:
            await on_file.database.tidy()
            await asyncio.sleep(0.05)

    work = [asyncio.create_task(one) for one in (read(True), read(False), tidy())]
    most = 0
    for _ in range(12):
        await published(on_file, 100, size=50_000)
        most = max(most, wal(path))
        async with on_file.database.write() as tx:
            await tx.execute("DELETE FROM deliveries")
            await tx.execute("DELETE FROM events")
    stopping = True
    await asyncio.gather(*work)
    assert most < 64 * 1024 * 1024
