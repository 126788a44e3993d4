"""A relay that comes back from a wait does not ask for accounts that may be another's by now."""

import asyncio
from collections.abc import Sequence

import asyncpg

from tests.conftest import World
from tests.fleet import Fleet
from tests.serving import until

HOLD = """
    CREATE FUNCTION hold() RETURNS trigger LANGUAGE plpgsql AS
        'BEGIN PERFORM pg_advisory_xact_lock_shared(1); RETURN NEW; END';
    CREATE TRIGGER held BEFORE UPDATE ON generations FOR EACH ROW EXECUTE FUNCTION hold()
"""
WAITING = """
    SELECT query FROM pg_stat_activity JOIN pg_locks USING (pid) WHERE locktype = 'advisory' AND NOT granted
"""


async def test_what_took_too_long_to_claim_is_not_asked_about(world: World, fleet: Fleet):
    [relay] = await fleet.joined(1)

    def asks(job_id: str) -> int:
        return sum(one.job_id == job_id for one in world.simulator.requests)

    job_id = (await world.watch(relay, "vivix", duration=1e6))["job_id"]
    await until(lambda: asks(job_id) > 0)
    # In a transaction the view of what others do stands still.
    connection, watcher = await asyncpg.connect(fleet.url), await asyncpg.connect(fleet.url)
    await connection.execute(HOLD)
    has_claimed = False
    while not has_claimed:
        async with connection.transaction():
            await connection.execute("SELECT pg_advisory_xact_lock(1)")
            [waiting] = await found(watcher, WAITING)
            # It may be the answer that is being written down: then the next one that waits is looked at.
            if has_claimed := "AS likely" in waiting["query"]:
                await beaten(watcher)
                before = asks(job_id)
                world.clock.forward(seconds=30)
    # The account is held again, and asked.
    await beaten(connection)
    other = (await world.watch(relay, "vivix", duration=1e6))["job_id"]
    await until(lambda: asks(other) > 0)
    assert asks(job_id) == before
    world.clock.forward(seconds=60)
    await until(lambda: asks(job_id) > before)
    await connection.close()
    await watcher.close()


async def found(connection: "asyncpg.Connection[asyncpg.Record]", sql: str) -> Sequence[asyncpg.Record]:
    """What the query finds, as soon as that is something."""
    async with asyncio.timeout(15):
        while True:
            if rows := await connection.fetch(sql):
                return rows
            await asyncio.sleep(0.01)


async def beaten(connection: "asyncpg.Connection[asyncpg.Record]") -> None:
    """Returns right after a relay has said that it is alive."""
    last = await connection.fetchval("SELECT MAX(seen_at) FROM relays")
    await found(connection, f"SELECT 1 FROM relays WHERE seen_at > {last}")  # noqa: S608 # a number of ours
