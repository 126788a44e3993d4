"""Replays in bulk over the API: what failed, what is missing, all; at their pace, fairly, and cancelable."""

import asyncio
import json
from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from relay.ids import LATE
from relay.times import rfc3339
from tests.conftest import RunningRelay, World
from tests.serving import serving, until

ONCE = {"timeout": "2s", "schedule": ["1h"]}
FAST = 1000
NEVER = {"timeout": "2s", "schedule": []}
SHIPPED = "order.shipped"


async def publish(relay: RunningRelay, count: int, type_: str = SHIPPED) -> Sequence[str]:
    """The ids of so many new events."""
    ids = []
    for first in range(0, count, 100):
        items = [{"type": type_, "data": {"n": n}} for n in range(first, min(first + 100, count))]
        answer = await relay.api.post("/v1/events", json=items)
        assert answer.status_code == 201, answer.text
        ids += [one["id"] for one in answer.json()["data"]]
    return ids


async def replayed(relay: RunningRelay, **fields: Any) -> dict[str, Any]:
    """A new replay of everything since the beginning, once it has ended."""
    made = await begun(relay, **fields)
    if fields.get("status") in ("missing", "all") and relay.settings.database.startswith("postgresql"):
        # What another relay may still be writing is waited for.
        relay.clock.forward(seconds=LATE / 1000)
    return dict(await relay.eventually(f"/v1/replays/{made['id']}", lambda one: one["ended_at"] is not None))


async def begun(relay: RunningRelay, **fields: Any) -> dict[str, Any]:
    answer = await relay.api.post("/v1/replays", json={"since": "1970-01-01T00:00:00Z", **fields})
    assert answer.status_code == 202, answer.text
    return dict(answer.json())


async def counted(relay: RunningRelay, **fields: Any) -> int:
    body = {"since": "1970-01-01T00:00:00Z", **fields, "dry_run": True}
    answer = await relay.api.post("/v1/replays", json=body)
    assert answer.status_code == 202, answer.text
    shown = answer.json()
    assert (shown["id"], shown["status"], shown["done"]) == (None, None, 0)
    return int(shown["total"])


async def deliveries(relay: RunningRelay, **query: Any) -> Sequence[dict[str, Any]]:
    found, cursor = [], {}
    while True:
        page = (await relay.api.get("/v1/deliveries", params={"limit": 200, **query, **cursor})).json()
        found += page["data"]
        if page["next_cursor"] is None:
            return found
        cursor = {"cursor": page["next_cursor"]}


async def over(relay: RunningRelay, count: int, *statuses: str, **query: Any) -> None:
    """Returns once so many deliveries have these statuses."""
    async with asyncio.timeout(15):
        while True:
            if sum(one["status"] in statuses for one in await deliveries(relay, **query)) == count:
                return
            await asyncio.sleep(0.05)


async def failed(world: World, relay: RunningRelay, count: int, path: str = "/") -> dict[str, Any]:
    """An endpoint with so many failed deliveries, which answers well from now on."""
    endpoint = await world.endpoint(relay, path, event_types=[SHIPPED])
    world.subscriber.answer(400, path=path)
    await publish(relay, count)
    await over(relay, count, "failed", endpoint_id=endpoint["id"])
    world.subscriber.answer(204, path=path)
    return endpoint


def ids_at(world: World, path: str = "/") -> Counter[str]:
    return Counter(one.headers["webhook-id"] for one in world.subscriber.received if one.path == path)


# What is replayed.


async def test_what_failed_is_delivered_again_as_the_same_events(database_url: str, world: World):
    relay = await world.relay(database=database_url, delivery=NEVER)
    endpoint = await failed(world, relay, 150)
    await publish(relay, 20)
    await over(relay, 20, "delivered")
    before = ids_at(world)
    assert await counted(relay, endpoint_id=endpoint["id"]) == 150
    done = await replayed(relay, endpoint_id=endpoint["id"], rate_limit=FAST)
    assert (done["status"], done["total"], done["done"], done["deliveries"]) == (
        "completed",
        150,
        150,
        "failed",
    )
    await over(relay, 170, "delivered")
    again = ids_at(world) - before
    assert len(again) == 150 and set(again.values()) == {1} and again.keys() <= before.keys()
    shown = (await relay.api.get(f"/v1/deliveries/{(await deliveries(relay))[-1]['id']}")).json()
    assert [(one["number"], one["trigger"]) for one in shown["attempts"]] == [(1, "scheduled"), (2, "replay")]
    assert await counted(relay, endpoint_id=endpoint["id"]) == 0


async def test_what_was_canceled_because_its_endpoint_was_disabled_failed_too(world: World):
    relay = await world.relay(delivery=ONCE)
    endpoint = await world.endpoint(relay, event_types=[SHIPPED])
    world.subscriber.answer(503)
    await publish(relay, 5)
    await over(relay, 5, "pending")
    await relay.eventually("/v1/deliveries", lambda page: all(one["attempt_count"] for one in page["data"]))
    path = f"/v1/endpoints/{endpoint['id']}"
    assert (await relay.api.post(path + "/disable")).status_code == 200
    await over(relay, 5, "canceled")
    body = {"since": "1970-01-01T00:00:00Z", "endpoint_id": endpoint["id"]}
    refused = await relay.api.post("/v1/replays", json=body)
    assert refused.status_code == 409 and "is disabled: enable it first" in refused.json()["detail"]
    # Nor is it one of all that are enabled.
    assert await counted(relay) == 0
    assert (await relay.api.post(path + "/enable")).status_code == 200
    world.subscriber.answer(204)
    assert (await replayed(relay, rate_limit=FAST))["done"] == 5
    await over(relay, 5, "delivered")


async def test_what_is_missing_is_delivered_under_the_id_that_it_has(database_url: str, world: World):
    relay = await world.relay(database=database_url)
    ids = await publish(relay, 120)
    await publish(relay, 10, "order.paid")
    late = await world.endpoint(relay, "/late", event_types=[SHIPPED])
    assert await counted(relay, status="failed") == 0
    assert await counted(relay, status="missing") == 120
    done = await replayed(relay, status="missing", endpoint_id=late["id"], rate_limit=FAST)
    assert (done["total"], done["done"]) == (120, 120)
    await world.subscriber.got(120, path="/late")
    assert ids_at(world, "/late") == Counter(ids)
    assert await counted(relay, status="missing") == 0
    # As its filter is now.
    change = {"event_types": [SHIPPED, "order.paid"]}
    assert (await relay.api.patch(f"/v1/endpoints/{late['id']}", json=change)).status_code == 200
    assert await counted(relay, status="missing") == 10


async def test_of_what_is_missing_an_endpoint_gets_what_its_filter_lets_through(
    database_url: str, world: World
):
    relay = await world.relay(database=database_url, delivery=NEVER)
    ids = await publish(relay, 130)
    few = ids[:7]
    endpoint = await world.endpoint(relay, event_types=[SHIPPED], filter="data.n < `7`")
    wanted = {"endpoint_id": endpoint["id"], "status": "missing"}
    assert await counted(relay, **wanted) == len(few)
    done = await replayed(relay, **wanted, rate_limit=FAST)
    assert (done["status"], done["total"], done["done"]) == ("completed", len(few), len(few))
    await over(relay, len(few), "delivered")
    assert ids_at(world) == Counter(few)
    assert await counted(relay, **wanted) == 0


async def test_all_is_every_finished_delivery_and_what_is_missing(database_url: str, world: World):
    relay = await world.relay(database=database_url, delivery=NEVER)
    early = await failed(world, relay, 30, "/early")
    await publish(relay, 30)
    await over(relay, 30, "delivered")
    await world.endpoint(relay, "/late", event_types=[SHIPPED])
    assert await counted(relay, status="all", endpoint_id=early["id"]) == 60
    assert await counted(relay, status="all") == 120
    done = await replayed(relay, status="all", rate_limit=FAST)
    assert (done["total"], done["done"]) == (120, 120)
    await over(relay, 120, "delivered")
    assert Counter(ids_at(world, "/early").values()) == {2: 60}
    assert Counter(ids_at(world, "/late").values()) == {1: 60}


async def test_filters_select_by_generation_account_type_and_time(world: World):
    relay = await world.relay()
    ended = [await world.watch(relay, name, duration=0) for name in ("luma", "luma", "vivix")]
    for one in ended:
        await relay.eventually(f"/v1/generations/{one['id']}", lambda one: one["completed_at"] is not None)
    await relay.eventually("/v1/events", lambda page: len(page["data"]) == 3)
    world.clock.forward(seconds=10)
    between = rfc3339(world.clock())
    world.clock.forward(seconds=10)
    await publish(relay, 4)
    world.clock.forward(seconds=0.01)
    await world.endpoint(relay, event_types=[SHIPPED, "generation.completed"])

    async def missing(**fields: Any) -> int:
        return await counted(relay, status="missing", **fields)

    assert await missing() == 7
    assert await missing(since=between) == 4
    assert await missing(until=between) == 3
    assert await missing(account="luma") == 2
    assert await missing(event_type=SHIPPED) == 4
    assert await missing(generation_id=ended[0]["id"], since=None) == 1
    assert await missing(account="luma", generation_id=ended[2]["id"]) == 0
    done = await replayed(relay, status="missing", generation_id=ended[2]["id"], since=None)
    assert done["done"] == 1
    [received] = await world.subscriber.got(1)
    assert json.loads(received.body)["data"]["id"] == ended[2]["id"]


async def test_what_failed_at_the_callback_url_of_a_generation_is_replayed_with_it(world: World):
    relay = await world.relay(delivery=NEVER)
    world.subscriber.answer(400, 204, path="/own")
    job = world.simulator.submit("luma", duration=0)
    body = {"account": "luma", "job_id": job, "callback_url": world.subscriber.origin + "/own"}
    made = (await relay.api.post("/v1/generations", json=body)).json()
    await over(relay, 1, "failed")
    assert (await replayed(relay, since=None, generation_id=made["id"]))["done"] == 1
    await over(relay, 1, "delivered")


async def test_what_was_of_its_moment_only_is_replayed_when_it_is_named(world: World):
    relay = await world.relay(delivery=NEVER)
    endpoint = await world.endpoint(relay, event_types=["endpoint.test"])
    other = await world.endpoint(relay, "/other", event_types=["endpoint.test"])
    world.subscriber.answer(400)
    assert (await relay.api.post(f"/v1/endpoints/{endpoint['id']}/test")).status_code == 202
    await over(relay, 1, "failed")
    assert await counted(relay, status="all") == 0
    assert await counted(relay, status="failed", event_type="endpoint.test") == 1
    # A test is of one endpoint, whoever wants tests.
    body = {"status": "missing", "event_type": "endpoint.test", "endpoint_id": other["id"]}
    assert await counted(relay, **body) == 0


# How.


async def test_a_replay_keeps_to_its_rate_and_says_how_far_it_has_come(world: World):
    relay = await world.relay(delivery=NEVER)
    endpoint = await failed(world, relay, 30)
    made = await begun(relay, endpoint_id=endpoint["id"])
    assert (made["status"], made["total"], made["done"]) == ("pending", 30, 0)
    path, started = f"/v1/replays/{made['id']}", world.clock()
    seen = []
    async with asyncio.timeout(20):
        while True:
            shown = (await relay.api.get(path)).json()
            seen.append((shown["status"], shown["done"]))
            assert shown["done"] <= 10 * (world.clock() - started) / 1000 + 2
            if shown["ended_at"] is not None:
                break
            await asyncio.sleep(0.05)
    assert world.clock() - started > 2500
    assert seen[-1] == ("completed", 30)
    assert len({done for _, done in seen}) > 3 and ("running", seen[len(seen) // 2][1]) in seen


async def test_what_is_fresh_passes_what_is_replayed_to_a_slow_endpoint(world: World):
    relay = await world.relay(delivery={"timeout": "2s", "endpoint_concurrency": 1})
    ids = await publish(relay, 300)
    order = list[str]()

    async def slowly(request: Request) -> Response:
        order.append(request.headers["webhook-id"])
        await asyncio.sleep(0.2)
        return Response(status_code=204)

    app = Starlette(routes=[Route("/", slowly, methods=["POST"])])
    async with serving(app) as origin:
        body = {"url": origin + "/", "event_types": [SHIPPED]}
        endpoint = (await relay.api.post("/v1/endpoints", json=body)).json()
        made = await begun(relay, status="missing", endpoint_id=endpoint["id"], rate_limit=FAST)
        await relay.eventually(f"/v1/replays/{made['id']}", lambda one: one["done"] - len(order) >= 50)
        before = len(order)
        [fresh] = await publish(relay, 1)
        await until(lambda: fresh in order)
        assert order.index(fresh) - before < 10
        assert (await relay.api.delete(f"/v1/endpoints/{endpoint['id']}")).status_code == 204
    assert set(order) <= {fresh, *ids}


async def test_a_canceled_replay_makes_nothing_more_pending(world: World):
    relay = await world.relay(delivery=NEVER)
    endpoint = await failed(world, relay, 50)
    made = await begun(relay, endpoint_id=endpoint["id"], rate_limit=2)
    path = f"/v1/replays/{made['id']}"
    await relay.eventually(path, lambda one: one["done"] >= 1)
    assert (await relay.api.delete(path)).status_code == 204
    shown = (await relay.api.get(path)).json()
    assert shown["status"] == "canceled" and shown["ended_at"] is not None
    assert (await relay.api.delete(path)).status_code == 204
    # Another one goes through what is left; it begins after the first one could have gone on.
    rest = await replayed(relay, endpoint_id=endpoint["id"], rate_limit=FAST)
    assert (await relay.api.get(path)).json() == shown
    assert rest["total"] == rest["done"] == 50 - shown["done"]
    await over(relay, 50, "delivered")
    assert Counter(ids_at(world).values()) == {2: 50}
    ended = await relay.api.delete(f"/v1/replays/{rest['id']}")
    assert ended.status_code == 409 and "it is completed" in ended.json()["detail"]


async def test_a_replay_fails_when_its_endpoint_is_disabled_meanwhile(world: World):
    relay = await world.relay(delivery=NEVER)
    endpoint = await failed(world, relay, 50)
    made = await begun(relay, endpoint_id=endpoint["id"], rate_limit=2)
    assert (await relay.api.post(f"/v1/endpoints/{endpoint['id']}/disable")).status_code == 200
    path = f"/v1/replays/{made['id']}"
    shown = await relay.eventually(path, lambda one: one["ended_at"] is not None)
    assert shown["status"] == "failed" and "is disabled" in shown["error"]


async def test_an_endpoint_has_one_replay_at_a_time_and_the_second_is_told_which(world: World):
    relay = await world.relay(delivery=NEVER)
    one, other = await failed(world, relay, 20, "/one"), await world.endpoint(relay, "/other")
    body = {"since": "1970-01-01T00:00:00Z", "endpoint_id": one["id"], "rate_limit": 0.1}
    asked = await asyncio.gather(*(relay.api.post("/v1/replays", json=body) for _ in range(5)))
    assert sorted(answer.status_code for answer in asked) == [202, 409, 409, 409, 409]
    [made] = [answer.json()["id"] for answer in asked if answer.status_code == 202]
    assert all(made in answer.json()["detail"] for answer in asked if answer.status_code == 409)
    of_all = await relay.api.post("/v1/replays", json={"since": body["since"]})
    assert of_all.status_code == 409 and made in of_all.json()["detail"]
    assert (await replayed(relay, endpoint_id=other["id"]))["status"] == "completed"
    assert (await relay.api.delete(f"/v1/replays/{made}")).status_code == 204
    of_all = await begun(relay, rate_limit=0.1)
    refused = await relay.api.post("/v1/replays", json=body)
    assert refused.status_code == 409 and of_all["id"] in refused.json()["detail"]


async def test_an_idempotency_key_begins_one_replay(world: World):
    relay = await world.relay(delivery=NEVER)
    endpoint = await failed(world, relay, 5)
    body = {"since": "1970-01-01T00:00:00Z", "endpoint_id": endpoint["id"], "rate_limit": FAST}
    key = {"idempotency-key": "monday"}
    answers = [await relay.api.post("/v1/replays", json=body, headers=key) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [202] * 3
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert len((await relay.api.get("/v1/replays")).json()["data"]) == 1
    changed = await relay.api.post("/v1/replays", json=body | {"status": "all"}, headers=key)
    assert changed.status_code == 422


async def test_an_idempotency_key_tells_of_its_replay_whatever_has_become_of_the_endpoint(world: World):
    relay = await world.relay(delivery=NEVER)
    endpoint = await failed(world, relay, 1)
    body = {"since": "1970-01-01T00:00:00Z", "endpoint_id": endpoint["id"]}
    key = {"idempotency-key": "monday"}
    made = (await relay.api.post("/v1/replays", json=body, headers=key)).json()
    await relay.eventually(f"/v1/replays/{made['id']}", lambda one: one["ended_at"] is not None)
    assert (await relay.api.post(f"/v1/endpoints/{endpoint['id']}/disable")).status_code == 200
    again = await relay.api.post("/v1/replays", json=body, headers=key)
    assert (again.status_code, again.json()["id"]) == (202, made["id"])
    assert (await relay.api.post("/v1/replays", json=body)).status_code == 409
    other = await relay.api.post("/v1/replays", json=body | {"status": "all"}, headers=key)
    assert other.status_code == 422


async def test_what_cannot_be_asked_for(world: World):
    relay = await world.relay()
    since = "2026-01-01T00:00:00Z"
    refused: Sequence[tuple[dict[str, Any], Collection[str]]] = [
        ({}, {"body"}),
        ({"status": "missing"}, {"body"}),
        ({"since": "yesterday"}, {"since"}),
        ({"since": since, "until": since}, {"until"}),
        ({"since": since, "status": "delivered"}, {"status"}),
        ({"since": since, "rate_limit": 0}, {"rate_limit"}),
        ({"since": since, "rate_limit": 1e-16}, {"rate_limit"}),
        ({"since": since, "rate_limit": 5e-324}, {"rate_limit"}),
        ({"since": since, "rate_limit": 1001}, {"rate_limit"}),
        ({"since": since, "endpoint_id": "ep_unknown"}, {"endpoint_id"}),
        ({"generation_id": "gen_unknown"}, {"generation_id"}),
        ({"since": since, "wanted": "all"}, {"wanted"}),
    ]
    for body, fields in refused:
        answer = await relay.api.post("/v1/replays", json=body)
        assert answer.status_code == 422, body
        assert {one["field"] for one in answer.json()["errors"]} == fields
    assert (await relay.api.get("/v1/replays")).json()["data"] == []
