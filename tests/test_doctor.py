"""`relay doctor`: what is stuck at a running relay is named with what to do, and nothing else is."""

import asyncio
import json

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from relay import doctor as doctors
from relay.remote import Remote
from relay.times import parse_rfc3339, rfc3339
from tests.conftest import ADMIN_KEY, RunningRelay, World
from tests.serving import serving
from tests.test_cli import Ended
from tests.test_cli import relay as run


async def doctor(world: World, relay: RunningRelay, *options: str, key: str = ADMIN_KEY) -> Ended:
    remote = {"RELAY_URL": relay.origin, "RELAY_API_KEY": key}
    return await run("doctor", *options, cwd=world.directory, **remote)


async def ended(world: World, relay: RunningRelay, provider: str, count: int) -> None:
    for _ in range(count):
        await world.watch(relay, provider, duration=0)
    path = f"/v1/generations?status=completed&account={provider}"
    await relay.eventually(path, lambda page: len(page["data"]) == count)


async def test_nothing_is_said_of_a_relay_at_which_all_is_well(world: World):
    relay = await world.relay()
    await world.endpoint(relay)
    await ended(world, relay, "luma", 1)
    await world.watch(relay, "luma", duration=600)
    await world.subscriber.got(1)
    found = await doctor(world, relay)
    assert (found.code, found.out.strip(), found.err) == (0, "Nothing to do.", "")


async def test_what_is_stuck_is_named_with_what_to_do(world: World):
    accounts = {name: {**one, "timeout": "10h"} for name, one in world.document()["accounts"].items()}
    accounts["luma"]["api_key"] = "not-the-key-of-luma"
    world.clock.forward(seconds=-7200)  # all of this was two hours ago
    relay = await world.relay(accounts=accounts, min_free="9000PB")
    await ended(world, relay, "vivix", 10)
    late = await world.watch(relay, "vivix", duration=100_000)
    refused = await world.watch(relay, "luma", duration=100_000)
    uncalled = (await relay.api.post("/v1/generations", json={"account": "pictory"})).json()
    world.subscriber.answer(500, path="/down")
    world.subscriber.answer(410, path="/gone")
    down = await world.endpoint(relay, "/down", event_types=["order.paid"])
    gone = await world.endpoint(relay, "/gone", event_types=["order.paid"])
    rotated = await world.endpoint(relay, "/rotated", event_types=["order.lost"])
    answer = await relay.api.post(
        f"/v1/endpoints/{rotated['id']}/secret/rotate", json={"overlap_seconds": 86_400}
    )
    until = answer.json()["previous_secret_expires_at"]
    key = await world.key(relay, "read", name="orders", expires_at=rfc3339(world.clock() + 86_400_000))
    await world.key(relay, "read", expires_at=rfc3339(world.clock() + 30 * 86_400_000))
    assert (await relay.api.post("/v1/events", json={"type": "order.paid", "data": {}})).status_code == 201
    await world.subscriber.got(1, path="/down")
    await relay.eventually(f"/v1/endpoints/{gone['id']}", lambda one: one["status"] == "disabled")
    path = f"/v1/endpoints/{down['id']}"
    since = (await relay.eventually(path, lambda one: one["failing_since"]))["failing_since"]
    world.clock.ahead = 0
    await relay.eventually("/v1/accounts/luma", lambda one: one["status"] == "unauthorized")

    reported = await doctor(world, relay, "--json")
    assert reported.code == 1
    found = {one["subject"]: one for one in json.loads(reported.out)["data"]}
    deliveries = (await relay.api.get("/v1/deliveries")).json()["data"]
    by_endpoint = {one["endpoint_id"]: one["id"] for one in deliveries}
    assert "below min_free" in found["disk"]["problem"]
    assert found[f"endpoint {down['id']}"]["since"] == since
    assert "fails: the endpoint answered 500" in found[f"endpoint {down['id']}"]["problem"]
    assert "it answered 410 Gone" in found[f"endpoint {gone['id']}"]["problem"]
    assert f"relay endpoints enable {gone['id']}" in found[f"endpoint {gone['id']}"]["advice"]
    assert until in found[f"endpoint {rotated['id']}"]["problem"]
    assert "1 delivery waiting for" in found[f"delivery {by_endpoint[down['id']]}"]["problem"]
    assert "failed for good" in found[f"delivery {by_endpoint[gone['id']]}"]["problem"]
    assert (
        f"relay replay --endpoint {gone['id']} --since"
        in found[f"delivery {by_endpoint[gone['id']]}"]["advice"]
    )
    assert "luma refuses its key" in found["account luma"]["problem"]
    assert "where nearly all take" in found[f"generation {late['id']}"]["problem"]
    assert "unauthorized" in found[f"generation {refused['id']}"]["problem"]
    assert "has not called back" in found[f"generation {uncalled['id']}"]["advice"]
    assert "orders of tenant default expires" in found[f"key {key['id']}"]["problem"]
    # The relay's clock was off, and may still be known to have been.
    found.pop("clock", None)
    assert len(found) == 11
    assert "not-the-key-of-luma" not in reported.out

    reader = await world.key(relay, "read", name="doctor")
    shown = await doctor(world, relay, key=reader["key"])
    assert shown.code == 1
    assert "keys are not looked at" in shown.err
    assert all(subject in shown.out for subject in found if not subject.startswith("key "))
    assert key["id"] not in shown.out


async def test_a_replay_that_does_not_get_on_is_named(world: World):
    world.clock.forward(seconds=-7200)
    relay = await world.relay()
    made = await world.endpoint(relay, "/busy", event_types=["order.paid"])
    event = {"type": "order.paid", "data": {}}
    assert (await relay.api.post("/v1/events", json=event)).status_code == 201
    await relay.eventually("/v1/deliveries?status=delivered", lambda page: page["data"])
    world.subscriber.answer(503, path="/busy", headers={"retry-after": "86400"})
    assert (await relay.api.post("/v1/events", json=event)).status_code == 201
    await world.subscriber.got(2, path="/busy")
    await relay.eventually("/v1/deliveries", lambda page: page["data"][0]["attempt_count"] == 1)
    assert (await relay.api.post("/v1/events", json=[event] * 20)).status_code == 201
    body = {"since": "2000-01-01T00:00:00Z", "status": "all", "endpoint_id": made["id"]}
    replay = (await relay.api.post("/v1/replays", json=body)).json()
    world.clock.ahead = 0
    reported = await doctor(world, relay, "--json")
    found = {one["subject"]: one for one in json.loads(reported.out)["data"]}
    stuck = found[f"replay {replay['id']}"]
    assert stuck["problem"].startswith("0 of 1 ")
    assert f"relay replays cancel {replay['id']}" in stuck["advice"]


async def test_a_relay_that_cannot_be_asked_is_a_failure_too(world: World):
    relay = await world.relay()
    wrong = await doctor(world, relay, key="wrong")
    assert (wrong.code, wrong.out) == (1, "")
    assert "key" in wrong.err
    silent = await doctor(world, relay, "--url", "http://127.0.0.1:1")
    assert (silent.code, silent.out) == (1, "")
    assert "cannot be reached" in silent.err


async def test_what_failed_in_the_last_day_is_named_though_it_was_made_days_before(world: World):
    world.clock.forward(seconds=-4 * 86_400)
    relay = await world.relay(delivery={"timeout": "2s", "schedule": ["95h"]})
    world.subscriber.answer(404)
    endpoint = await world.endpoint(relay, event_types=["order.paid"])
    await relay.api.post("/v1/events", json={"type": "order.paid", "data": {}})
    [made] = (await relay.eventually("/v1/deliveries", lambda page: page["data"]))["data"]
    await relay.eventually(f"/v1/deliveries/{made['id']}", lambda one: one["next_attempt_at"] is not None)
    world.clock.ahead = 20 * 3_600_000  # the schedule may be a fifth longer
    await relay.eventually(f"/v1/deliveries/{made['id']}", lambda one: one["status"] == "failed")
    found = {one["subject"]: one for one in json.loads((await doctor(world, relay, "--json")).out)["data"]}
    one = found[f"delivery {made['id']}"]
    assert "1 delivery to" in one["problem"]
    assert "failed for good in the last day" in one["problem"]
    again = f"relay replay --endpoint {endpoint['id']} --since {made['created_at']}"
    assert again in one["advice"]


async def test_of_more_failures_than_are_read_it_says_so_and_advises_to_go_back_far_enough(
    world: World, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(doctors, "_MOST", 2)
    relay = await world.relay(delivery={"timeout": "2s", "schedule": []})
    world.subscriber.answer(404)
    await world.endpoint(relay, event_types=["order.paid"])
    await relay.api.post("/v1/events", json=[{"type": "order.paid", "data": {}}] * 3)
    await relay.eventually("/v1/deliveries?status=failed", lambda page: len(page["data"]) == 3)
    remote, now = Remote(relay.origin, ADMIN_KEY), world.clock()
    [one] = await asyncio.to_thread(lambda: list(doctors._deliveries(remote, now)))
    assert "2 or more deliveries" in one.problem
    since = parse_rfc3339(one.advice.partition("--since ")[2].rstrip("`"))
    assert since is not None
    assert since < now - 5 * 86_400_000


@pytest.mark.parametrize("body", ["Service Unavailable", "[]", "{}", '{"checks": "none"}'])
async def test_a_proxy_that_answers_for_a_relay_is_no_relay(world: World, body: str):
    async def answer(request: Request) -> Response:
        return Response(body, 503)

    async with serving(Starlette(routes=[Route("/{path:path}", answer)])) as origin:
        ended = await run("doctor", cwd=world.directory, RELAY_URL=origin, RELAY_API_KEY="key")
    assert (ended.code, ended.out) == (1, "")
    assert "answered 503; is this a relay?" in ended.err
    assert "Traceback" not in ended.err
