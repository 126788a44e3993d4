"""A relay that comes back from a wait does not ask for accounts that may be another's by now."""

import asyncio

import asyncpg

from tests.conftest import World
from tests.fleet import Fleet
from tests.serving import until


async def test_what_took_too_long_to_claim_is_not_asked_about(world: World, fleet: Fleet):
    [relay] = await fleet.joined(1)

    def asks(job_id: str) -> int:
        return sum(one.job_id == job_id for one in world.simulator.requests)

    job_id = (await world.watch(relay, "vivix", duration=1e6))["job_id"]
    await until(lambda: asks(job_id) > 0)
    connection = await asyncpg.connect(fleet.url)
    async with connection.transaction():
        await connection.execute("LOCK TABLE generations IN EXCLUSIVE MODE")
        waits = "SELECT 1 FROM pg_locks WHERE relation = 'generations'::regclass AND NOT granted"
        await found(connection, waits)
        await beaten(connection)
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


async def found(connection: "asyncpg.Connection[asyncpg.Record]", sql: str) -> None:
    """Returns once the query finds something."""
    async with asyncio.timeout(15):
        while True:
            if await connection.fetch(sql):
                return
            await asyncio.sleep(0.01)


async def beaten(connection: "asyncpg.Connection[asyncpg.Record]") -> None:
    """Returns right after a relay has said that it is alive."""
    last = await connection.fetchval("SELECT MAX(seen_at) FROM relays")
    await found(connection, f"SELECT 1 FROM relays WHERE seen_at > {last}")  # noqa: S608 # a number of ours
