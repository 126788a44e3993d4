"""Generations over the API: watched, found, named, waited for, refreshed, left alone."""

import asyncio
import json
import time
from datetime import UTC, datetime
from typing import Any

import httpx
import pytest
from standardwebhooks import Webhook
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from relay import signature
from tests.conftest import RunningRelay, World
from tests.serving import Received, serving

PATH = "/v1/generations"


def named(answer: httpx.Response) -> list[str]:
    return [one["field"] for one in answer.json()["errors"]]


def moment(world: World) -> str:
    """Now, between two things: the clock is a little further on before and after."""
    world.clock.forward(seconds=0.005)
    at = datetime.fromtimestamp(world.clock() / 1000, UTC).isoformat(timespec="milliseconds")
    world.clock.forward(seconds=0.005)
    return at


async def ids(relay: RunningRelay, **query: str) -> list[str]:
    answer = await relay.api.get(PATH, params=query)
    assert answer.status_code == 200, answer.text
    return [one["id"] for one in answer.json()["data"]]


WRONG: list[tuple[dict[str, Any], set[str]]] = [
    ({}, {"account"}),
    ({"job_id": "j"}, {"account"}),
    ({"account": 5, "job_id": "j"}, {"account"}),
    ({"account": None, "job_id": "j"}, {"account"}),
    ({"account": "nobody", "job_id": "j"}, {"account"}),
    ({"account": "luma", "job_id": 5}, {"job_id"}),
    ({"account": "luma", "job_id": ""}, {"job_id"}),
    ({"account": "luma", "job_id": ".."}, {"job_id"}),
    ({"account": "luma", "job_id": "a\nb"}, {"job_id"}),
    ({"account": "luma", "job_id": "j" * 100_000}, {"job_id"}),
    ({"account": "pictory", "job_id": ""}, {"job_id"}),
    ({"account": "pixellabs"}, {"job_id"}),
    ({"account": "vivix"}, {"job_id"}),
    ({"account": "luma", "job_id": None}, {"job_id"}),
    ({"account": "luma", "job_id": "j", "callback_url": "ftp://x.example"}, {"callback_url"}),
    ({"account": "luma", "job_id": "j", "callback_url": "http://hooks.example.com"}, {"callback_url"}),
    ({"account": "luma", "job_id": "j", "callback_url": ""}, {"callback_url"}),
    ({"account": "luma", "job_id": "j", "callback_url": ["https://x.example"]}, {"callback_url"}),
    ({"account": "luma", "job_id": "j", "metadata": "x"}, {"metadata"}),
    ({"account": "luma", "job_id": "j", "metadata": []}, {"metadata"}),
    ({"account": "luma", "job_id": "j", "timeout_seconds": 0}, {"timeout_seconds"}),
    ({"account": "luma", "job_id": "j", "timeout_seconds": -1}, {"timeout_seconds"}),
    ({"account": "luma", "job_id": "j", "timeout_seconds": "60"}, {"timeout_seconds"}),
    ({"account": "luma", "job_id": "j", "timeout_seconds": True}, {"timeout_seconds"}),
    ({"account": "luma", "job_id": "j", "status": "completed"}, {"status"}),
    ({"account": 5, "job_id": 5, "colour": "red"}, {"account", "job_id", "colour"}),
]


async def test_wrong_fields_are_named_and_nothing_is_watched(world: World) -> None:
    relay = await world.relay()
    for body, expected in WRONG:
        answer = await relay.api.post(PATH, json=body)
        assert answer.status_code == 422, f"{str(body)[:100]}: {answer.status_code}"
        assert set(named(answer)) == expected, str(body)[:100]
    assert await ids(relay) == []
    assert world.simulator.requests == []


async def test_a_job_is_watched_once_per_account(world: World) -> None:
    accounts = world.unhurried()
    relay = await world.relay(accounts=accounts | {"luma-eu": accounts["luma"]})
    body = {"account": "luma", "job_id": "a/b?c", "metadata": {"order": 42}}
    answers = await asyncio.gather(*(relay.api.post(PATH, json=body) for _ in range(6)))
    assert sorted(answer.status_code for answer in answers) == [200] * 5 + [201]
    watched = next(answer for answer in answers if answer.status_code == 201).json()
    assert {answer.json()["id"] for answer in answers} == {watched["id"]}
    again = await relay.api.post(PATH, json=body | {"metadata": {"order": 43}})
    assert (again.status_code, again.json()) == (200, watched)
    assert (watched["account"], watched["provider"]) == ("luma", "luma")
    assert (watched["job_id"], watched["metadata"]) == ("a/b?c", {"order": 42})
    assert (watched["status"], watched["outputs"], watched["error"]) == ("queued", [], None)
    elsewhere = await relay.api.post(PATH, json=body | {"account": "luma-eu"})
    assert elsewhere.status_code == 201, "the same id at another account is another job"
    assert elsewhere.json()["id"] != watched["id"]
    assert elsewhere.json()["provider"] == "luma"


async def test_filters_find_what_they_say(world: World) -> None:
    accounts = world.unhurried()
    relay = await world.relay(accounts=accounts | {"luma-eu": accounts["luma"]})
    start = moment(world)
    job = world.simulator.submit("luma", duration=0)
    done = (await relay.api.post(PATH, json={"account": "luma", "job_id": job})).json()["id"]
    assert (await relay.api.post(f"{PATH}/{done}/refresh")).json()["status"] == "completed"
    between = moment(world)
    eu = (await relay.api.post(PATH, json={"account": "luma-eu", "job_id": job})).json()["id"]
    vivix = (await relay.api.post(PATH, json={"account": "vivix", "job_id": "v"})).json()["id"]
    end = moment(world)
    for query, expected in (
        ({"account": "luma"}, [done]),
        ({"provider": "luma"}, [eu, done]),
        ({"job_id": job}, [eu, done]),
        ({"job_id": job, "account": "luma-eu"}, [eu]),
        ({"status": "completed"}, [done]),
        ({"status": "queued"}, [vivix, eu]),
        ({"status": "failed"}, []),
        ({"account": "nobody"}, []),
        ({"since": start}, [vivix, eu, done]),
        ({"since": between}, [vivix, eu]),
        ({"until": between}, [done]),
        ({"until": start}, []),
        ({"since": end}, []),
        ({"since": between, "until": end, "provider": "vivix"}, [vivix]),
        ({"since": between.replace("+00:00", "Z")}, [vivix, eu]),
        ({"since": "2020-01-01T02:00:00+02:00", "until": "2020-01-02T00:00:00Z"}, []),
    ):
        assert await ids(relay, **query) == expected, query
    page = (await relay.api.get(PATH, params={"provider": "luma", "limit": 1})).json()
    assert await ids(relay, provider="luma", limit="1", cursor=page["next_cursor"]) == [done]


async def test_a_provider_that_calls_back_tells_the_job_by_its_callback(world: World) -> None:
    relay = await world.relay(accounts=world.unhurried())
    endpoint = await world.endpoint(relay)
    made = await relay.api.post(PATH, json={"account": "pictory", "metadata": {"order": 42}})
    assert made.status_code == 201
    generation = made.json()
    assert generation["job_id"] is None
    assert generation["webhook_url"].startswith(f"{relay.origin}/hooks/pictory/")
    request = {"webhook": generation["webhook_url"]}
    job_id = world.simulator.submit("pictory", request=request, duration=0.1, callback="twice")
    [received] = await world.subscriber.got(1)
    Webhook(endpoint["secret"]).verify(received.body, received.headers)
    data = json.loads(received.body)["data"]
    assert (data["id"], data["job_id"], data["learned_by"]) == (generation["id"], job_id, "callback")
    assert (data["status"], data["metadata"]) == ("completed", {"order": 42})
    assert len((await relay.api.get("/v1/events")).json()["data"]) == 1
    polled = (await relay.api.post(PATH, json={"account": "luma", "job_id": "j"})).json()
    assert polled["webhook_url"] is None


async def test_a_patch_names_the_job_once_and_describes_as_often_as_wished(world: World) -> None:
    relay = await world.relay()
    job_id = world.simulator.submit("pictory", duration=600)
    taken = await world.watch(relay, "pictory", duration=600)
    made = (await relay.api.post(PATH, json={"account": "pictory"})).json()
    path = f"{PATH}/{made['id']}"
    for body, field in (
        ({"job_id": 5}, "job_id"),
        ({"job_id": "a b"}, "job_id"),
        ({"metadata": []}, "metadata"),
        ({"status": "completed"}, "status"),
    ):
        answer = await relay.api.patch(path, json=body)
        assert (answer.status_code, named(answer)) == (422, [field])
    assert (await relay.api.patch(path)).status_code == 400
    conflict = await relay.api.patch(path, json={"job_id": taken["job_id"], "metadata": {"a": 1}})
    assert conflict.status_code == 409
    unchanged = (await relay.api.get(path)).json()
    assert (unchanged["job_id"], unchanged["metadata"]) == (None, {})
    described = await relay.api.patch(path, json={"metadata": {"a": 1}})
    assert (described.json()["job_id"], described.json()["metadata"]) == (None, {"a": 1})
    for _ in range(2):
        answer = await relay.api.patch(path, json={"job_id": job_id})
        assert (answer.status_code, answer.json()["job_id"]) == (200, job_id)
        assert answer.json()["metadata"] == {"a": 1}
    assert (await relay.api.patch(path, json={"job_id": "another"})).status_code == 409
    again = await relay.api.post(PATH, json={"account": "pictory", "job_id": job_id})
    assert (again.status_code, again.json()["id"]) == (200, made["id"])
    # From now on it is polled: its job is known.
    world.clock.forward(seconds=600)
    ended = await relay.eventually(path, lambda one: one["status"] == "completed")
    assert ended["metadata"] == {"a": 1}


async def test_a_callback_url_receives_the_events_signed_with_the_signing_secret(world: World) -> None:
    relay = await world.relay()
    endpoint = await world.endpoint(relay)
    url = world.subscriber.origin + "/callback"
    job_id = world.simulator.submit("vivix", duration=0)
    made = await relay.api.post(PATH, json={"account": "vivix", "job_id": job_id, "callback_url": url})
    assert made.json()["callback_url"] == url
    await world.watch(relay, "luma", duration=0)
    await world.subscriber.got(3)
    [to_callback] = await world.subscriber.got(1, path="/callback")
    to_endpoint = await world.subscriber.got(2, path="/")
    secret = (await relay.api.get("/v1/signing-secret")).json()["secret"]
    assert secret != endpoint["secret"]
    Webhook(secret).verify(to_callback.body, to_callback.headers)
    [same] = [one for one in to_endpoint if one.body == to_callback.body]
    assert same.headers["webhook-id"] == to_callback.headers["webhook-id"]
    Webhook(endpoint["secret"]).verify(same.body, same.headers)
    query = {"generation_id": made.json()["id"]}
    deliveries = (await relay.api.get("/v1/deliveries", params=query)).json()["data"]
    assert {(one["endpoint_id"], one["url"]) for one in deliveries} == {
        (None, url),
        (endpoint["id"], endpoint["url"]),
    }


async def test_a_rotated_signing_secret_signs_beside_the_old_one_until_the_overlap_is_over(
    world: World,
) -> None:
    relay = await world.relay(delivery={"timeout": "2s", "schedule": ["50ms"]})

    async def end() -> None:
        job_id = world.simulator.submit("luma", duration=0)
        url = world.subscriber.origin + "/callback"
        made = await relay.api.post(PATH, json={"account": "luma", "job_id": job_id, "callback_url": url})
        assert made.status_code == 201

    old = (await relay.api.get("/v1/signing-secret")).json()["secret"]
    answer = await relay.api.post("/v1/signing-secret/rotate", json={"overlap_seconds": 60})
    assert answer.status_code == 200
    new = answer.json()["secret"]
    assert new != old
    assert (await relay.api.get("/v1/signing-secret")).json() == answer.json()
    until = datetime.fromisoformat(answer.json()["previous_secret_expires_at"]).timestamp()
    assert until == pytest.approx(world.clock() / 1000 + 60, abs=30)
    # Sent at once, and then again as it is read from the store.
    world.subscriber.answer(503, 204, path="/callback")
    await end()
    for received in await world.subscriber.got(2, path="/callback"):
        assert signed_by(received, new, old) == [new, old]
    world.clock.forward(seconds=61)
    await end()
    [*_, received] = await world.subscriber.got(3, path="/callback")
    assert signed_by(received, new, old) == [new]
    for wrong in ({"secret": "whsec_short"}, {"overlap_seconds": 30 * 86_400 + 1}, {"overlap_seconds": -1}):
        assert (await relay.api.post("/v1/signing-secret/rotate", json=wrong)).status_code == 422
    chosen = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
    await relay.api.post("/v1/signing-secret/rotate", json={"secret": chosen, "overlap_seconds": 0})
    await end()
    [*_, received] = await world.subscriber.got(4, path="/callback")
    assert signed_by(received, chosen, new) == [chosen]


def signed_by(received: Received, *secrets: str) -> list[str]:
    """Which of the secrets made the signatures, in their order."""
    headers = received.headers
    made = {
        signature.sign(one, headers["webhook-id"], int(headers["webhook-timestamp"]), received.body): one
        for one in secrets
    }
    return [made[one] for one in headers["webhook-signature"].split(" ")]


async def test_what_waits_for_a_callback_url_is_signed_with_the_secret_that_there_is_then(
    world: World,
) -> None:
    begun, go_on, received = asyncio.Event(), asyncio.Event(), list[Received]()

    async def hang(request: Request) -> Response:
        received.append(Received(request.url.path, dict(request.headers), await request.body()))
        begun.set()
        await go_on.wait()
        return Response(status_code=204)

    async with serving(Starlette(routes=[Route("/", hang, methods=["POST"])])) as origin:
        relay = await world.relay(delivery={"timeout": "10s", "endpoint_concurrency": 1})
        old = (await relay.api.get("/v1/signing-secret")).json()["secret"]
        for number in range(3):
            job_id = world.simulator.submit("luma", duration=0)
            body = {"account": "luma", "job_id": job_id, "callback_url": f"{origin}/"}
            made = (await relay.api.post(PATH, json=body)).json()
            await relay.eventually(f"{PATH}/{made['id']}", lambda one: one["status"] == "completed")
            if number == 0:
                await begun.wait()
        answer = await relay.api.post("/v1/signing-secret/rotate", json={"overlap_seconds": 0})
        go_on.set()
        await relay.eventually(
            "/v1/deliveries", lambda page: [one["status"] for one in page["data"]] == ["delivered"] * 3
        )
    new = answer.json()["secret"]
    assert [signed_by(one, new, old) for one in received] == [[old], [new], [new]]


async def test_wait_answers_at_the_end_or_when_the_time_is_over(world: World) -> None:
    relay = await world.relay()
    long = await world.watch(relay, "luma", duration=600)
    for timeout in ("0", "0.3"):
        began = time.monotonic()
        answer = await relay.api.get(f"{PATH}/{long['id']}/wait", params={"timeout": timeout})
        assert answer.status_code == 200
        assert answer.json()["status"] in ("queued", "processing")
        assert float(timeout) <= time.monotonic() - began < 10
    waiting = asyncio.create_task(relay.api.get(f"{PATH}/{long['id']}/wait", params={"timeout": 30}))
    world.clock.forward(seconds=600)
    async with asyncio.timeout(15):
        ended = (await waiting).json()
        assert ended["status"] == "completed"
        assert (await relay.api.get(f"{PATH}/{long['id']}/wait")).json() == ended, "at once"
    for timeout in ("-1", "x", "nan", "inf"):
        answer = await relay.api.get(f"{PATH}/{long['id']}/wait", params={"timeout": timeout})
        assert (answer.status_code, named(answer)) == (422, ["timeout"])


async def test_refresh_asks_now_and_a_trouble_is_no_ending(world: World) -> None:
    relay = await world.relay(accounts=world.unhurried())
    await world.endpoint(relay)
    generation = await world.watch(relay, "luma", duration=600)
    refresh = f"{PATH}/{generation['id']}/refresh"
    for kind in ("rate_limited", "server_error", "html", "truncated", "empty"):
        world.simulator.trouble("luma", kind)
        troubled = await relay.api.post(refresh)
        assert troubled.status_code == 200, kind
        assert troubled.json()["status"] == "queued"
        assert troubled.json()["last_error"], kind
        if kind == "rate_limited":
            limited = await relay.api.post(refresh)
            assert (limited.status_code, limited.headers["retry-after"]) == (429, "5")
            world.clock.forward(seconds=5)
    assert (await relay.api.post(refresh)).json()["last_error"] is None
    world.clock.forward(seconds=600)
    asked = len(world.simulator.requests)
    ended = (await relay.api.post(refresh)).json()
    assert (ended["status"], ended["learned_by"]) == ("completed", "refresh")
    assert len(world.simulator.requests) == asked + 1
    assert (await relay.api.post(refresh)).json()["status"] == "completed"
    await world.subscriber.got(1)
    assert len((await relay.api.get("/v1/events")).json()["data"]) == 1
    nameless = (await relay.api.post(PATH, json={"account": "pictory"})).json()
    assert (await relay.api.post(f"{PATH}/{nameless['id']}/refresh")).status_code == 409


async def test_what_has_not_ended_in_time_has_timed_out_and_may_end_late(world: World) -> None:
    relay = await world.relay(accounts=world.unhurried())
    await world.endpoint(relay)
    job_id = world.simulator.submit("luma", duration=600)
    body = {"account": "luma", "job_id": job_id, "timeout_seconds": 60}
    generation = (await relay.api.post(PATH, json=body)).json()
    path = f"{PATH}/{generation['id']}"
    world.clock.forward(seconds=61)
    over = await relay.eventually(path, lambda one: one["status"] == "timed_out")
    assert (over["error"]["code"], over["late"], over["outputs"]) == ("timed_out", False, [])
    world.clock.forward(seconds=600)
    late = (await relay.api.post(path + "/refresh")).json()
    assert (late["status"], late["late"], late["error"]) == ("completed", True, None)
    received = await world.subscriber.got(2)
    assert {json.loads(one.body)["type"] for one in received} == {
        "generation.timed_out",
        "generation.completed",
    }
    assert len({one.headers["webhook-id"] for one in received}) == 2


async def test_what_is_deleted_is_neither_watched_nor_announced(world: World) -> None:
    relay = await world.relay()
    await world.endpoint(relay)
    deleted = await world.watch(relay, "pictory", duration=600)
    kept = await world.watch(relay, "luma", duration=600)
    path = f"{PATH}/{deleted['id']}"
    answer = await relay.api.delete(path)
    assert (answer.status_code, answer.content) == (204, b"")
    assert await ids(relay) == [kept["id"]]
    for method, gone, body in (
        ("GET", path, None),
        ("DELETE", path, None),
        ("PATCH", path, {"metadata": {}}),
        ("POST", path + "/refresh", None),
        ("GET", path + "/wait", None),
    ):
        assert (await relay.api.request(method, gone, json=body)).status_code == 404
    callback = await relay.api.post(deleted["webhook_url"], json={"job_id": deleted["job_id"]})
    assert callback.status_code in (200, 404)
    world.clock.forward(seconds=600)
    [received] = await world.subscriber.got(1)
    assert json.loads(received.body)["data"]["id"] == kept["id"]
    again = await relay.api.post(PATH, json={"account": "pictory", "job_id": deleted["job_id"]})
    assert again.status_code == 201
    assert again.json()["id"] != deleted["id"]
