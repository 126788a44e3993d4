"""Giving an endpoint up: at once when it is gone, after five days when nothing works; and taking it back."""

import json
from collections import Counter
from typing import Any

import pytest
from standardwebhooks import Webhook

from relay.delivery import Answer, Claimed, Code, Settlement, settle
from relay.endpoint import Endpoint, Secret
from relay.event import published
from relay.signature import new_secret
from relay.store import open_database, store_on
from relay.store.events import Handoff, Publication
from relay.store.migrate import migrate
from relay.tenant import DEFAULT
from relay.times import parse_rfc3339
from tests.conftest import RunningRelay, World
from tests.keyring import KEYRING

DAY = 86_400
# A retry now and then for longer than the five days.
LONG = {"timeout": "2s", "schedule": ["10h"] * 20}


async def publish(relay: RunningRelay, type_: str, count: int = 1) -> list[str]:
    """The ids of new events."""
    answer = await relay.api.post("/v1/events", json=[{"type": type_, "data": {}}] * count)
    assert answer.status_code == 201, answer.text
    return [one["id"] for one in answer.json()["data"]]


async def shown(relay: RunningRelay, endpoint: dict[str, Any]) -> dict[str, Any]:
    return dict((await relay.api.get(f"/v1/endpoints/{endpoint['id']}")).json())


async def deliveries(relay: RunningRelay, endpoint: dict[str, Any], true: Any) -> list[dict[str, Any]]:
    """Those of an endpoint, oldest first, as soon as they are as wished."""
    path = f"/v1/deliveries?limit=200&endpoint_id={endpoint['id']}"
    page = await relay.eventually(path, lambda page: true(page["data"]))
    return list(page["data"][::-1])


def attempted(found: list[dict[str, Any]]) -> int:
    return sum(one["attempt_count"] for one in found)


def finished(found: list[dict[str, Any]]) -> bool:
    return bool(found) and all(one["status"] in ("delivered", "failed", "canceled") for one in found)


async def fail_for(world: World, relay: RunningRelay, endpoint: dict[str, Any], days: float) -> None:
    """Moves the clock on, in steps of most of a day with an attempt in each, or until it is disabled."""
    until = world.clock() + days * DAY * 1000
    while world.clock() < until and (await shown(relay, endpoint))["status"] == "enabled":
        made = attempted(await deliveries(relay, endpoint, lambda found: True))
        world.clock.forward(seconds=0.9 * DAY)
        await deliveries(relay, endpoint, lambda found, made=made: attempted(found) > made)


# 410.


async def test_gone_disables_at_once_and_cancels_what_is_pending(world: World):
    relay = await world.relay(delivery={"timeout": "2s", "endpoint_concurrency": 1})
    gone = await world.endpoint(relay, "/gone", event_types=["order.paid"])
    other = await world.endpoint(relay, "/other", event_types=["order.paid"])
    world.subscriber.answer(204, 410, path="/gone")
    await publish(relay, "order.paid", 50)
    found = await deliveries(relay, gone, finished)
    assert [one["status"] for one in found[:2]] == ["delivered", "failed"]
    assert Counter(one["status"] for one in found) == {"delivered": 1, "failed": 1, "canceled": 48}
    assert {one["attempt_count"] for one in found[2:]} == {0}
    told = await shown(relay, gone)
    assert told["status"] == "disabled"
    assert "410" in told["disabled_reason"]
    # The other one has all of them, and the one that is gone was not asked again.
    await world.subscriber.got(50, path="/other")
    assert (await shown(relay, other))["status"] == "enabled"
    await publish(relay, "order.paid")
    await world.subscriber.got(51, path="/other")
    assert len(await world.subscriber.got(2, path="/gone")) == 2
    assert len(await deliveries(relay, gone, finished)) == 50


@pytest.mark.parametrize("verb", ["disable", "delete"])
async def test_what_waits_in_memory_is_not_sent_once_its_owner_ends_it(world: World, verb: str):
    relay = await world.relay(delivery={"timeout": "2s", "endpoint_concurrency": 1})
    # One a second, so that the others wait.
    ended = await world.endpoint(relay, "/ended", event_types=["order.paid"], rate_limit=1)
    await world.endpoint(relay, "/other", event_types=["order.paid"], rate_limit=2)
    await publish(relay, "order.paid", 5)
    await world.subscriber.got(1, path="/ended")
    path = f"/v1/endpoints/{ended['id']}"
    answer = await (relay.api.post(path + "/disable") if verb == "disable" else relay.api.delete(path))
    assert answer.is_success
    await world.subscriber.got(5, path="/other")
    assert len(await world.subscriber.got(1, path="/ended")) == 1
    found = await deliveries(relay, ended, finished)
    assert Counter(one["status"] for one in found) == {"delivered": 1, "canceled": 4}


async def test_it_is_announced_signed_to_those_who_asked_and_to_nobody_else(world: World):
    relay = await world.relay()
    gone = await world.endpoint(relay, "/gone", event_types=["order.paid", "endpoint.disabled"])
    watcher = await world.endpoint(relay, "/watcher", event_types=["endpoint.disabled"])
    for path, types in (("/endings", []), ("/orders", ["order.paid"])):
        await world.endpoint(relay, path, event_types=types)
    world.subscriber.answer(410, path="/gone")
    await publish(relay, "order.paid")
    [received] = await world.subscriber.got(1, path="/watcher")
    Webhook(watcher["secret"]).verify(received.body, received.headers)
    told, body = await shown(relay, gone), json.loads(received.body)
    assert body.keys() == {"type", "timestamp", "data"}
    assert body["type"] == "endpoint.disabled"
    at = body["data"].pop("disabled_at")
    assert body["timestamp"] == at
    assert abs(parse_rfc3339(at) - world.clock()) < 15_000
    assert body["data"] == {
        "endpoint_id": gone["id"],
        "url": gone["url"],
        "reason": told["disabled_reason"],
    }
    listed = (await relay.api.get("/v1/events?type=endpoint.disabled")).json()["data"]
    assert [one["id"] for one in listed] == [received.headers["webhook-id"]]
    page = (await relay.api.get(f"/v1/deliveries?event_id={listed[0]['id']}")).json()["data"]
    assert [one["endpoint_id"] for one in page] == [watcher["id"]]


async def test_several_answers_of_410_are_announced_once(world: World):
    relay = await world.relay()
    gone = await world.endpoint(relay, "/gone", event_types=["order.paid"])
    await world.endpoint(relay, "/watcher", event_types=["endpoint.disabled"])
    world.subscriber.answer(410, path="/gone")
    await publish(relay, "order.paid", 20)
    await deliveries(relay, gone, finished)
    await world.subscriber.got(1, path="/watcher")
    listed = (await relay.api.get("/v1/events?type=endpoint.disabled")).json()["data"]
    assert len(listed) == 1


# Five days.


async def test_five_days_of_failures_of_two_events_disable_it_with_a_reason(world: World):
    relay = await world.relay(delivery=LONG)
    ill = await world.endpoint(relay, "/ill", event_types=["order.paid"])
    await world.endpoint(relay, "/watcher", event_types=["endpoint.disabled"])
    world.subscriber.answer(500, path="/ill")
    await publish(relay, "order.paid", 2)
    await deliveries(relay, ill, lambda found: attempted(found) == 2)
    await fail_for(world, relay, ill, 3.5)
    assert (await shown(relay, ill))["status"] == "enabled"
    await fail_for(world, relay, ill, 2)
    told = await shown(relay, ill)
    assert told["status"] == "disabled"
    assert "5 days" in told["disabled_reason"]
    found = await deliveries(relay, ill, finished)
    assert {one["status"] for one in found} == {"canceled"}
    [received] = await world.subscriber.got(1, path="/watcher")
    assert json.loads(received.body)["data"]["reason"] == told["disabled_reason"]


async def test_one_event_alone_does_not_disable_it(world: World):
    relay = await world.relay(delivery=LONG)
    ill = await world.endpoint(relay, "/ill", event_types=["order.paid"])
    world.subscriber.answer(500, path="/ill")
    await publish(relay, "order.paid")
    await deliveries(relay, ill, lambda found: attempted(found) == 1)
    await fail_for(world, relay, ill, 8)
    assert (await shown(relay, ill))["status"] == "enabled"
    assert len(await world.subscriber.got(9, path="/ill")) >= 9


async def test_a_single_success_in_between_starts_the_five_days_over(world: World):
    relay = await world.relay(delivery=LONG)
    ill = await world.endpoint(relay, "/ill", event_types=["order.paid"])
    world.subscriber.answer(500, path="/ill")
    await publish(relay, "order.paid", 2)
    await deliveries(relay, ill, lambda found: attempted(found) == 2)
    await fail_for(world, relay, ill, 3.5)
    world.subscriber.answer(204, path="/ill")
    world.clock.forward(seconds=DAY / 2 + 3_600)
    await deliveries(relay, ill, finished)
    world.subscriber.answer(500, path="/ill")
    await publish(relay, "order.paid", 2)
    await deliveries(relay, ill, lambda found: [one["attempt_count"] for one in found[:2]] == [1, 1])
    await fail_for(world, relay, ill, 3.5)
    assert (await shown(relay, ill))["status"] == "enabled"
    await fail_for(world, relay, ill, 2)
    assert (await shown(relay, ill))["status"] == "disabled"


async def test_a_success_among_failures_that_are_written_together_starts_the_five_days_over(
    database_url: str,
):
    database = await open_database(database_url)
    try:
        await migrate(database, now=0)
        store = store_on(database, KEYRING)
        await store.tenants.found(DEFAULT, new_secret(), now=0)
        secrets = (Secret(new_secret()),)
        ill = Endpoint(
            "ep_1", DEFAULT, "https://a.test/", secrets, created_at=0, updated_at=0, event_types=("a.b",)
        )
        await store.endpoints.create(ill, None)
        events = [published(DEFAULT, "a.b", {}, None, now=0) for _ in range(3)]
        handoff = Handoff("lease", 45_000, takes=lambda destination, size: True)
        _, claimed = await store.events.publish([Publication(DEFAULT, events, None)], handoff, now=0)
        first, good, bad = claimed
        await store.deliveries.settle([settlement(first, 500)], now=0)
        later = 6 * DAY * 1000
        await store.deliveries.settle([settlement(good, 204), settlement(bad, 500)], now=later)
        then = await store.endpoints.get(DEFAULT, "ep_1")
        assert then is not None
        assert then.disabled_at is None
        assert (then.failing_since, then.failing_event) == (later, bad.event_id)
    finally:
        await database.close()


def settlement(claimed: Claimed, status: int) -> Settlement:
    answer = Answer(0, 5, status, code=None if status == 204 else Code.HTTP_STATUS)
    return settle(claimed, answer, schedule=(), now=0, spread=0, endpoint_is_well=answer.accepted)


# Taking it back.


@pytest.mark.parametrize("why", ["410", "days"])
async def test_enable_brings_it_back_and_what_was_canceled_can_be_replayed(world: World, why: str):
    relay = await world.relay(delivery=LONG)
    ill = await world.endpoint(relay, "/ill", event_types=["order.paid"])
    world.subscriber.answer(410 if why == "410" else 500, path="/ill")
    await publish(relay, "order.paid", 2)
    if why == "days":
        await deliveries(relay, ill, lambda found: attempted(found) == 2)
        await fail_for(world, relay, ill, 7)
    found = await deliveries(relay, ill, finished)
    before = len(await world.subscriber.got(1, path="/ill"))
    for one in found:
        assert (await relay.api.post(f"/v1/deliveries/{one['id']}/replay")).status_code == 409
    told = (await relay.api.post(f"/v1/endpoints/{ill['id']}/enable")).json()
    assert (told["status"], told["disabled_reason"]) == ("enabled", None)
    world.subscriber.answer(204, path="/ill")
    for one in found:
        assert (await relay.api.post(f"/v1/deliveries/{one['id']}/replay")).status_code == 202
    world.clock.forward(seconds=1_200)  # longer than any pause of its breaker
    await deliveries(relay, ill, lambda found: {one["status"] for one in found} == {"delivered"})
    await publish(relay, "order.paid")
    await world.subscriber.got(before + 3, path="/ill")


async def test_five_more_days_of_failures_disable_it_again(world: World):
    relay = await world.relay(delivery=LONG)
    ill = await world.endpoint(relay, "/ill", event_types=["order.paid"])
    world.subscriber.answer(500, path="/ill")
    for _ in range(2):
        await publish(relay, "order.paid", 2)
        await fail_for(world, relay, ill, 3.5)
        assert (await shown(relay, ill))["status"] == "enabled"
        await fail_for(world, relay, ill, 4)
        assert (await shown(relay, ill))["status"] == "disabled"
        await relay.api.post(f"/v1/endpoints/{ill['id']}/enable")
