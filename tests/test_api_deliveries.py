"""Deliveries over the API: on their way, arrived, given up, replayed; each attempt logged."""

import json
from datetime import UTC, datetime
from typing import Any

from standardwebhooks import Webhook

from tests.conftest import RunningRelay, World

PATH = "/v1/deliveries"
TWICE = {"timeout": "2s", "schedule": ["10ms"]}


async def ids(relay: RunningRelay, **query: str) -> list[str]:
    answer = await relay.api.get(PATH, params=query)
    assert answer.status_code == 200, answer.text
    return [one["id"] for one in answer.json()["data"]]


async def the_delivery(relay: RunningRelay, status: str, **query: str) -> dict[str, Any]:
    """The only delivery that a query finds, with its attempts, once it has the status."""
    asked = "&".join(f"{name}={value}" for name, value in query.items())
    page = await relay.eventually(
        f"{PATH}?{asked}", lambda page: page["data"] and page["data"][0]["status"] == status
    )
    [listed] = page["data"]
    shown = (await relay.api.get(f"{PATH}/{listed['id']}")).json()
    assert {name: shown[name] for name in listed} == listed
    return dict(shown)


async def test_a_delivery_that_arrived_tells_its_one_attempt(world: World) -> None:
    relay = await world.relay()
    world.subscriber.answer(201, content="thank you")
    endpoint = await world.endpoint(relay)
    generation = await world.watch(relay, "luma", duration=0)
    delivery = await the_delivery(relay, "delivered")
    [received] = await world.subscriber.got(1)
    assert delivery["event_id"] == received.headers["webhook-id"]
    assert delivery["event_type"] == "generation.completed"
    assert (delivery["endpoint_id"], delivery["url"]) == (endpoint["id"], endpoint["url"])
    assert delivery["generation_id"] == generation["id"]
    assert delivery["next_attempt_at"] is None
    [attempt] = delivery["attempts"]
    assert (attempt["number"], attempt["trigger"], attempt["error"]) == (1, "scheduled", None)
    assert (attempt["response_status"], attempt["response_body"]) == (201, "thank you")
    assert 0 <= attempt["duration_ms"] < 10_000
    started = datetime.fromisoformat(attempt["started_at"]).timestamp()
    assert abs(started - int(received.headers["webhook-timestamp"])) <= 2
    assert (await relay.api.post(f"{PATH}/{delivery['id']}/replay")).status_code == 202
    first, second = await world.subscriber.got(2)
    assert (first.body, first.headers["webhook-id"]) == (second.body, second.headers["webhook-id"])


async def test_a_failing_delivery_goes_on_until_given_up_and_a_replay_is_a_fresh_run(world: World) -> None:
    relay = await world.relay(delivery=TWICE)
    world.subscriber.answer(500, content="broken \U0001f3ee")
    endpoint = await world.endpoint(relay)
    await world.watch(relay, "luma", outcome="failed", duration=0)
    failed = await the_delivery(relay, "failed")
    assert failed["next_attempt_at"] is None
    assert failed["attempt_count"] == 2
    assert [one["number"] for one in failed["attempts"]] == [1, 2]
    for attempt in failed["attempts"]:
        assert (attempt["response_status"], attempt["response_body"]) == (500, "broken \U0001f3ee")
        assert (attempt["trigger"], set(attempt["error"])) == ("scheduled", {"code", "message"})

    replay = f"{PATH}/{failed['id']}/replay"
    answer = await relay.api.post(replay)
    assert (answer.status_code, answer.json()["id"]) == (202, failed["id"])
    again = await relay.eventually(
        f"{PATH}/{failed['id']}", lambda one: one["status"] == "failed" and len(one["attempts"]) > 2
    )
    assert [(one["number"], one["trigger"]) for one in again["attempts"]] == [
        (1, "scheduled"),
        (2, "scheduled"),
        (3, "replay"),
        (4, "scheduled"),
    ]
    world.subscriber.answer(204)
    await relay.api.post(replay)
    arrived = await relay.eventually(f"{PATH}/{failed['id']}", lambda one: one["status"] == "delivered")
    last = arrived["attempts"][-1]
    assert (last["number"], last["trigger"], last["error"]) == (5, "replay", None)
    received = await world.subscriber.got(5)
    assert {one.headers["webhook-id"] for one in received} == {failed["event_id"]}
    assert len({one.body for one in received}) == 1
    for one in received:
        Webhook(endpoint["secret"]).verify(one.body, one.headers)


async def test_what_is_pending_waits_for_its_time_and_cannot_be_replayed(world: World) -> None:
    relay = await world.relay(delivery={"timeout": "2s", "schedule": ["1h"]})
    world.subscriber.answer(503, 204)
    endpoint = await world.endpoint(relay)
    await world.watch(relay, "luma", duration=0)
    pending = await the_delivery(relay, "pending", endpoint_id=endpoint["id"])
    wait = datetime.fromisoformat(pending["next_attempt_at"]).timestamp() - world.clock() / 1000
    assert 3600 - 60 < wait <= 1.2 * 3600
    assert pending["attempts"][0]["error"]["code"]
    answer = await relay.api.post(f"{PATH}/{pending['id']}/replay")
    assert answer.status_code == 409
    assert answer.headers["content-type"] == "application/problem+json"
    assert (await relay.api.get(f"{PATH}/{pending['id']}")).json() == pending
    world.clock.forward(seconds=1.2 * 3600)
    await relay.eventually(f"{PATH}/{pending['id']}", lambda one: one["status"] == "delivered")
    assert len(world.subscriber.received) == 2


async def test_a_redirect_is_not_followed_and_gone_disables_the_endpoint(world: World) -> None:
    relay = await world.relay()
    elsewhere = {"location": world.subscriber.origin + "/elsewhere"}
    world.subscriber.answer(307, path="/moved", headers=elsewhere)
    world.subscriber.answer(410, path="/gone")
    moved, gone = await world.endpoint(relay, "/moved"), await world.endpoint(relay, "/gone")
    await world.watch(relay, "luma", duration=0)
    redirected = await the_delivery(relay, "pending", endpoint_id=moved["id"])
    assert redirected["attempts"][0]["response_status"] == 307
    assert redirected["attempts"][0]["error"]["code"]
    refused = await the_delivery(relay, "failed", endpoint_id=gone["id"])
    assert [one["response_status"] for one in refused["attempts"]] == [410]
    shown = (await relay.api.get(f"/v1/endpoints/{gone['id']}")).json()
    assert (shown["status"], bool(shown["disabled_reason"])) == ("disabled", True)
    assert (await relay.api.get(f"/v1/endpoints/{moved['id']}")).json()["status"] == "enabled"
    assert (await relay.api.post(f"{PATH}/{refused['id']}/replay")).status_code == 409
    assert {one.path for one in world.subscriber.received} == {"/moved", "/gone"}


async def test_no_answer_is_an_attempt_without_a_status(world: World) -> None:
    relay = await world.relay(delivery=TWICE)
    answer = await relay.api.post("/v1/endpoints", json={"url": "http://127.0.0.1:9/"})
    await world.watch(relay, "luma", duration=0)
    failed = await the_delivery(relay, "failed", endpoint_id=answer.json()["id"])
    for attempt in failed["attempts"]:
        assert (attempt["response_status"], attempt["response_body"]) == (None, None)
        assert attempt["error"]["code"]
        assert attempt["error"]["message"]


async def test_filters_find_what_they_say(world: World) -> None:
    relay = await world.relay()
    world.subscriber.answer(500, path="/failing")
    good, bad = await world.endpoint(relay, "/good"), await world.endpoint(relay, "/failing")
    generation = await world.watch(relay, "luma", duration=0)
    arrived = await the_delivery(relay, "delivered", endpoint_id=good["id"])
    waits = await the_delivery(relay, "pending", endpoint_id=bad["id"])
    world.clock.forward(seconds=0.01)
    between = datetime.fromtimestamp(world.clock() / 1000, UTC).isoformat(timespec="milliseconds")
    world.clock.forward(seconds=0.01)
    test = (await relay.api.post(f"/v1/endpoints/{good['id']}/test")).json()
    await relay.eventually(f"{PATH}/{test['id']}", lambda one: one["status"] == "delivered")
    first = {arrived["id"], waits["id"]}
    for query, expected in (
        ({}, first | {test["id"]}),
        ({"status": "pending"}, {waits["id"]}),
        ({"status": "delivered"}, {arrived["id"], test["id"]}),
        ({"status": "failed"}, set()),
        ({"endpoint_id": good["id"]}, {arrived["id"], test["id"]}),
        ({"endpoint_id": "ep_x"}, set()),
        ({"event_id": arrived["event_id"]}, first),
        ({"generation_id": generation["id"]}, first),
        ({"event_type": "endpoint.test"}, {test["id"]}),
        ({"event_type": "generation.completed", "endpoint_id": bad["id"]}, {waits["id"]}),
        ({"since": between}, {test["id"]}),
        ({"until": between}, first),
        ({"until": between, "status": "delivered", "generation_id": generation["id"]}, {arrived["id"]}),
    ):
        found = await ids(relay, **query)
        assert sorted(found) == sorted(expected), query
    bodies = [json.loads(one.body) for one in world.subscriber.received if one.path == "/good"]
    assert [one["type"] for one in bodies] == ["generation.completed", "endpoint.test"]
