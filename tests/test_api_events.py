"""Events over the API: what was announced, and nothing else."""

import json
from datetime import UTC, datetime
from typing import Any

from tests.conftest import RunningRelay, World

PATH = "/v1/events"


async def ids(relay: RunningRelay, **query: str) -> list[str]:
    answer = await relay.api.get(PATH, params=query)
    assert answer.status_code == 200, answer.text
    return [one["id"] for one in answer.json()["data"]]


async def announced(relay: RunningRelay, generation: dict[str, Any]) -> dict[str, Any]:
    """The one event of a generation, once it is there."""
    page = await relay.eventually(f"{PATH}?generation_id={generation['id']}", lambda page: page["data"])
    [event] = page["data"]
    return dict(event)


async def test_an_event_reads_as_it_was_sent(world: World) -> None:
    relay = await world.relay()
    await world.endpoint(relay)
    generation = await world.watch(relay, "luma", duration=0, outputs=2)
    [received] = await world.subscriber.got(1)
    event = (await relay.api.get(f"{PATH}/{received.headers['webhook-id']}")).json()
    sent = json.loads(received.body)
    assert {name: event[name] for name in ("type", "timestamp", "data")} == sent
    assert event["generation_id"] == generation["id"]
    assert (await relay.api.get(PATH)).json()["data"] == [event]
    shown = (await relay.api.get(f"/v1/generations/{generation['id']}")).json()
    assert {name: shown[name] for name in sent["data"]} == sent["data"], "and as the generation is shown"
    assert len(sent["data"]["outputs"]) == 2
    assert world.simulator.keys["luma"] not in received.body.decode()


async def test_an_event_needs_no_endpoint_and_outlives_what_it_tells_of(world: World) -> None:
    relay = await world.relay()
    generation = await world.watch(relay, "vivix", outcome="failed", duration=0)
    event = await announced(relay, generation)
    assert event["type"] == "generation.failed"
    assert (await relay.api.get("/v1/deliveries")).json()["data"] == []
    assert (await relay.api.delete(f"/v1/generations/{generation['id']}")).status_code == 204
    assert (await relay.api.get(f"{PATH}/{event['id']}")).json() == event


async def test_filters_find_what_they_say(world: World) -> None:
    relay = await world.relay()
    endpoint = await world.endpoint(relay)
    first = await world.watch(relay, "luma", duration=0)
    completed = (await announced(relay, first))["id"]
    world.clock.forward(seconds=0.01)
    between = datetime.fromtimestamp(world.clock() / 1000, UTC).isoformat(timespec="milliseconds")
    world.clock.forward(seconds=0.01)
    second = await world.watch(relay, "vivix", outcome="failed", duration=0)
    failed = (await announced(relay, second))["id"]
    world.clock.forward(seconds=0.01)
    test = (await relay.api.post(f"/v1/endpoints/{endpoint['id']}/test")).json()["event_id"]
    for query, expected in (
        ({}, [test, failed, completed]),
        ({"type": "generation.failed"}, [failed]),
        ({"type": "endpoint.test"}, [test]),
        ({"type": "no.such"}, []),
        ({"account": "luma"}, [completed]),
        ({"generation_id": second["id"]}, [failed]),
        ({"since": between}, [test, failed]),
        ({"until": between}, [completed]),
        ({"since": between, "until": "2999-01-01T00:00:00Z", "account": "vivix"}, [failed]),
    ):
        assert await ids(relay, **query) == expected, query


async def test_publishing_twice_under_one_idempotency_key_announces_once(world: World) -> None:
    relay = await world.relay()
    body, key = {"type": "order.shipped", "data": {"order": 42}}, {"idempotency-key": "k"}
    first, again = [await relay.api.post(PATH, json=body, headers=key) for _ in range(2)]
    assert (first.status_code, again.status_code) == (201, 201)
    assert again.json() == first.json() | {"created": False}
    other = await relay.api.post(PATH, json=body | {"data": {"order": 43}}, headers=key)
    assert other.status_code == 422
    assert await ids(relay) == [first.json()["id"]]
