"""Several relays over one PostgreSQL: any of them is asked, one of them does it."""

import json
from collections import Counter
from collections.abc import AsyncIterator

import pytest

from tests.conftest import RunningRelay, World
from tests.postgres import Cluster


@pytest.fixture
def url(cluster: Cluster):
    url = cluster.database()
    yield url
    cluster.drop(url)


@pytest.fixture
async def fleet(world: World, url: str) -> AsyncIterator[list[RunningRelay]]:
    """Three relays that have shared everything."""
    relays = [await world.relay(database=url) for _ in range(3)]
    yield relays


async def test_what_any_relay_takes_is_delivered_once(world: World, fleet: list[RunningRelay]):
    for number in range(12):
        await world.endpoint(fleet[number % 3], f"/{number}", event_types=["order.paid"])
    made = []
    for number in range(60):
        answer = await fleet[number % 3].api.post("/v1/events", json={"type": "order.paid", "data": {}})
        made.append(answer.json()["id"])
    await world.subscriber.got(60 * 12)
    got = Counter((one.path, one.headers["webhook-id"]) for one in world.subscriber.received)
    assert got == {(f"/{number}", one): 1 for number in range(12) for one in made}


async def test_jobs_are_watched_whoever_was_told_of_them(world: World, fleet: list[RunningRelay]):
    await world.endpoint(fleet[0])
    for relay in fleet:
        for provider in ("pixellabs", "vivix", "pictory", "luma"):
            await world.watch(relay, provider)
    await world.subscriber.got(12)
    ended = [json.loads(one.body)["data"]["id"] for one in world.subscriber.received]
    assert len(set(ended)) == 12
