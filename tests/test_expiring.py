"""Outputs whose URLs expire: a retry or a replay brings fresh ones, or says that there are none."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from typing import Any
from urllib.parse import urlencode

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from relay import event, signature
from relay.body import compact
from relay.delivery import Status
from relay.generation import Output, Update
from relay.providers import expiry, output
from relay.renew import AT_ONCE, Renewer
from relay.store import Store
from relay.times import parse_rfc3339, rfc3339
from tests.conftest import RunningRelay, World
from tests.serving import Received, serving
from tests.test_openapi import JSON as JSON_TYPE
from tests.test_openapi import complaints, document_of
from tests.test_store import DONE, TENANT, announced, opened, prepared, watched

NOW = 1_800_000_000_000
HOUR = 3600
SIGNED = "https://a.test/1.png?"


# Helpers.


def asks(world: World) -> int:
    """How often providers were asked about a job."""
    return sum(one.method == "GET" for one in world.simulator.requests)


def said(received: Received) -> dict[str, Any]:
    return dict(json.loads(received.body)["data"])


def check(received: Received, secret: str) -> None:
    """Raises unless the signature is right."""
    headers = received.headers
    at = headers["webhook-timestamp"]
    signature.verify(
        secret, headers["webhook-id"], at, headers["webhook-signature"], received.body, now=int(at)
    )


async def fits_the_document(relay: RunningRelay, received: Received) -> bool:
    document, sent = await document_of(relay), json.loads(received.body)
    content = document["webhooks"][sent["type"]]["post"]["requestBody"]["content"]
    return complaints(document, content[JSON_TYPE]["schema"], sent) == []


async def deliveries(relay: RunningRelay, true: Callable[[Any], bool]) -> list[dict[str, Any]]:
    """All deliveries, once each is as wished."""
    page = await relay.eventually(
        "/v1/deliveries", lambda page: page["data"] and all(true(one) for one in page["data"])
    )
    return list(page["data"])


async def postponed(world: World, relay: RunningRelay) -> list[dict[str, Any]]:
    """All deliveries, once each waits for about a minute or two."""
    found = await deliveries(
        relay,
        lambda one: one["status"] == "pending" and due_in(world, one) > 50,
    )
    assert all(due_in(world, one) <= 120 for one in found)
    return found


def due_in(world: World, delivery: dict[str, Any]) -> float:
    return ((parse_rfc3339(delivery["next_attempt_at"]) or 0) - world.clock()) / 1000


async def refused_once(world: World, relay: RunningRelay) -> dict[str, Any]:
    """An ended generation whose event the first attempt could not deliver, and the next one will."""
    world.subscriber.answer(500, 204)
    generation = await world.watch(relay, "luma", duration=0)
    await deliveries(relay, lambda one: one["attempt_count"] == 1)
    return generation


# Deliveries.


async def test_while_its_urls_live_an_event_is_sent_and_sent_again_as_it_is(world: World):
    relay = await world.relay()
    await world.endpoint(relay)
    await refused_once(world, relay)
    world.clock.forward(seconds=HOUR / 2)
    first, second = await world.subscriber.got(2)
    assert first.body == second.body
    assert "refreshed_at" not in said(first)
    assert "expired" not in said(first)["outputs"][0]
    assert asks(world) == 1


async def test_a_retry_after_the_expiry_brings_fresh_urls_under_the_same_id(world: World):
    relay = await world.relay()
    secret = (await world.endpoint(relay))["secret"]
    await refused_once(world, relay)
    world.clock.forward(seconds=HOUR)
    first, second = await world.subscriber.got(2)
    check(first, secret)
    check(second, secret)
    assert first.headers["webhook-id"] == second.headers["webhook-id"]
    before, after = said(first), said(second)
    [old], [new] = before["outputs"], after["outputs"]
    assert old["url"] != new["url"]
    assert old.keys() == new.keys()
    assert (parse_rfc3339(new["expires_at"]) or 0) - world.clock() > (HOUR - 60) * 1000
    assert 0 <= world.clock() - (parse_rfc3339(after["refreshed_at"]) or 0) < 60_000
    assert {**after, "outputs": None} == {**before, "outputs": None, "refreshed_at": after["refreshed_at"]}
    assert asks(world) == 2
    [delivered] = await deliveries(relay, lambda one: one["status"] == "delivered")
    assert delivered["attempt_count"] == 2
    shown = (await relay.api.get(f"/v1/events/{delivered['event_id']}")).json()
    assert {name: shown[name] for name in ("type", "timestamp", "data")} == json.loads(second.body)
    assert await fits_the_document(relay, first) and await fits_the_document(relay, second)


async def test_a_replay_after_the_expiry_brings_fresh_urls_and_stays_a_replay(world: World):
    relay = await world.relay()
    secret = (await world.endpoint(relay))["secret"]
    await world.watch(relay, "luma", duration=0)
    urls = set()
    for number in (1, 2, 3):
        [delivered] = await deliveries(
            relay, lambda one, number=number: (one["status"], one["attempt_count"]) == ("delivered", number)
        )
        latest = (await world.subscriber.got(number))[-1]
        check(latest, secret)
        urls.add(said(latest)["outputs"][0]["url"])
        assert asks(world) == len(urls) == number
        world.clock.forward(seconds=2 * HOUR)
        assert (await relay.api.post(f"/v1/deliveries/{delivered['id']}/replay")).status_code == 202
    await world.subscriber.got(4)
    shown = (await relay.api.get(f"/v1/deliveries/{delivered['id']}")).json()
    assert [one["trigger"] for one in shown["attempts"][:3]] == ["scheduled", "replay", "replay"]
    assert len({one.headers["webhook-id"] for one in world.subscriber.received}) == 1


@pytest.mark.parametrize("wanted", ["all", "missing"])
async def test_a_replay_in_bulk_after_the_expiry_brings_fresh_urls(world: World, wanted: str):
    relay = await world.relay()
    await world.endpoint(relay)
    for count in (1, 2, 3):
        await world.watch(relay, "luma", duration=0)
        await world.subscriber.got(count)
    await deliveries(relay, lambda one: one["status"] == "delivered")
    world.clock.forward(seconds=2 * HOUR)
    late = await world.endpoint(relay, "/late")
    body = {"status": wanted, "since": "1970-01-01T00:00:00Z", "endpoint_id": late["id"]}
    if wanted == "all":
        del body["endpoint_id"]
    made = (await relay.api.post("/v1/replays", json=body)).json()
    await relay.eventually(f"/v1/replays/{made['id']}", lambda one: one["status"] == "completed")
    again = await world.subscriber.got(3, path="/late")
    if wanted == "all":
        again = [*again, *(await world.subscriber.got(6, path="/"))[3:]]
    before = {one.headers["webhook-id"]: said(one) for one in world.subscriber.received[:3]}
    for one in again:
        old, new = before[one.headers["webhook-id"]], said(one)
        assert old["id"] == new["id"]
        assert old["outputs"][0]["url"] != new["outputs"][0]["url"]
        assert (parse_rfc3339(new["outputs"][0]["expires_at"]) or 0) > world.clock()
    assert len({one.headers["webhook-id"] for one in again}) == 3
    # Each event once, for however many endpoints.
    assert asks(world) == 6


async def test_however_many_destinations_an_event_has_its_provider_is_asked_once(world: World):
    relay = await world.relay()
    paths = [f"/{n}" for n in range(10)]
    for path in paths:
        await world.endpoint(relay, path)
    for path in [*paths, "/callback"]:
        world.subscriber.answer(500, 204, path=path)
    job_id = world.simulator.submit("luma", duration=0)
    callback_url = world.subscriber.origin + "/callback"
    request = {"account": "luma", "job_id": job_id, "callback_url": callback_url}
    assert (await relay.api.post("/v1/generations", json=request)).status_code == 201
    await deliveries(relay, lambda one: one["attempt_count"] == 1)
    assert asks(world) == 1
    # A second ask would be answered, and some deliveries would not be postponed.
    world.simulator.trouble("luma", "server_error")
    world.clock.forward(seconds=HOUR)
    await postponed(world, relay)
    assert (asks(world), len(world.subscriber.received)) == (2, 11)
    world.clock.forward(seconds=120)
    await deliveries(relay, lambda one: one["status"] == "delivered")
    assert asks(world) == 3
    again = world.subscriber.received[11:]
    assert {one.path for one in again} == {*paths, "/callback"}
    assert len({one.body for one in again}) == 1
    assert "refreshed_at" in said(again[0])


# There are no fresh URLs.


def lose(world: World, job_id: str) -> None:
    world.simulator.jobs.pop(("luma", job_id))


def end_otherwise(world: World, job_id: str) -> None:
    world.simulator.submit("luma", duration=0, job_id=job_id, outcome="failed")


def lose_outputs(world: World, job_id: str) -> None:
    world.simulator.submit("luma", duration=0, job_id=job_id, outputs=0)


@pytest.mark.parametrize("spoil", [lose, end_otherwise, lose_outputs])
async def test_what_the_provider_gives_no_more_goes_out_marked_and_is_not_asked_for_again(
    world: World, spoil: Callable[[World, str], None]
):
    relay = await world.relay()
    secret = (await world.endpoint(relay))["secret"]
    world.subscriber.answer(500, 500, 204)
    generation = await world.watch(relay, "luma", duration=0)
    await deliveries(relay, lambda one: one["attempt_count"] == 1)
    spoil(world, generation["job_id"])
    world.clock.forward(seconds=HOUR)
    await deliveries(relay, lambda one: one["attempt_count"] == 2)
    world.clock.forward(seconds=HOUR)
    first, second, third = await world.subscriber.got(3)
    check(second, secret)
    [output] = said(first)["outputs"]
    assert said(second) == {**said(first), "outputs": [{**output, "expired": True}]}
    assert second.body == third.body
    assert await fits_the_document(relay, second)
    assert asks(world) == 2


async def test_a_generation_that_was_deleted_cannot_be_asked_about(world: World):
    relay = await world.relay()
    await world.endpoint(relay)
    generation = await refused_once(world, relay)
    assert (await relay.api.delete(f"/v1/generations/{generation['id']}")).status_code == 204
    world.clock.forward(seconds=HOUR)
    _, second = await world.subscriber.got(2)
    assert said(second)["outputs"][0]["expired"] is True
    assert asks(world) == 1


async def test_an_account_that_is_not_configured_any_more_cannot_be_asked(world: World):
    async with AsyncExitStack() as stack:
        relay = await replace(world, stack=stack).relay()
        await world.endpoint(relay)
        await refused_once(world, relay)
    world.clock.forward(seconds=HOUR)
    await world.relay(accounts={})
    _, second = await world.subscriber.got(2)
    assert said(second)["outputs"][0]["expired"] is True
    assert asks(world) == 1


# The provider cannot be asked now.


@pytest.mark.parametrize("trouble", ["server_error", "rate_limited", "cloudflare", "html", "unknown_status"])
async def test_while_the_provider_is_out_of_order_the_delivery_waits_and_loses_no_attempt(
    world: World, trouble: str
):
    relay = await world.relay()
    await world.endpoint(relay)
    await refused_once(world, relay)
    world.simulator.trouble("luma", trouble)
    world.clock.forward(seconds=HOUR)
    [waiting] = await postponed(world, relay)
    assert (waiting["attempt_count"], asks(world)) == (1, 2)
    world.clock.forward(seconds=due_in(world, waiting))
    _, second = await world.subscriber.got(2)
    assert "refreshed_at" in said(second)
    assert "expired" not in said(second)["outputs"][0]
    [delivered] = await deliveries(relay, lambda one: one["status"] == "delivered")
    assert delivered["attempt_count"] == 2


async def test_requests_for_fresh_urls_are_drawn_from_the_accounts_budget(world: World):
    accounts = world.document()["accounts"]
    accounts["luma"]["requests_per_minute"] = 1
    relay = await world.relay(accounts=accounts)
    await world.endpoint(relay)
    for count in (1, 2):
        await world.watch(relay, "luma", duration=0)
        await world.subscriber.got(count)
        world.clock.forward(seconds=70)
    world.clock.forward(seconds=HOUR)
    for one in await deliveries(relay, lambda one: one["status"] == "delivered"):
        assert (await relay.api.post(f"/v1/deliveries/{one['id']}/replay")).status_code == 202
    page = await relay.eventually(
        "/v1/deliveries",
        lambda page: sorted(one["status"] for one in page["data"]) == ["delivered", "pending"],
    )
    [waiting] = [one for one in page["data"] if one["status"] == "pending"]
    assert due_in(world, waiting) > 50
    assert asks(world) == 3
    # A request a minute, but for a tenth of them: it may be due before there is one.
    world.clock.forward(seconds=max(due_in(world, waiting), 70))
    await deliveries(relay, lambda one: one["status"] == "delivered")
    assert asks(world) == 4
    assert all("refreshed_at" in said(one) for one in world.subscriber.received[-2:])


async def test_after_an_hour_of_waiting_it_goes_out_marked(world: World):
    relay = await world.relay()
    await world.endpoint(relay)
    await refused_once(world, relay)
    world.simulator.trouble("luma", "server_error", count=1000)
    world.clock.forward(seconds=HOUR)
    for expected in (2, 3, 4):
        await postponed(world, relay)
        assert (asks(world), len(world.subscriber.received)) == (expected, 1)
        world.clock.forward(seconds=HOUR / 3)
    first, second = await world.subscriber.got(2)
    assert (world.clock() - (parse_rfc3339(said(first)["outputs"][0]["expires_at"]) or 0)) / 1000 >= HOUR
    assert said(second)["outputs"][0]["expired"] is True
    assert "refreshed_at" not in said(second)


@asynccontextmanager
async def hanging_provider(world: World) -> AsyncIterator[tuple[str, asyncio.Event, asyncio.Event]]:
    """Answers as Luma does, but not while `gate` is closed; `reached` is set when it is asked then."""
    gate, reached = asyncio.Event(), asyncio.Event()
    gate.set()

    async def status(request: Request) -> Response:
        if not gate.is_set():
            reached.set()
            await gate.wait()
        answer = {"id": request.path_params["id"], "state": "completed", "type": "image"}
        url = f"https://a.test/1.png?at={world.clock()}"
        return JSONResponse({**answer, "output": [{"type": "image", "url": url}]})

    async with serving(Starlette(routes=[Route("/generations/{id}", status)])) as origin:
        yield origin, gate, reached
        gate.set()


async def test_a_provider_that_hangs_delays_nothing_else_and_no_stop(world: World):
    async with hanging_provider(world) as (origin, gate, reached):
        accounts = world.document()["accounts"]
        accounts["slow"] = {**accounts["luma"], "base_url": origin}
        changes = {"accounts": accounts, "delivery": {"timeout": "2s", "endpoint_concurrency": 1}}
        async with AsyncExitStack() as stack:
            relay = await replace(world, stack=stack).relay(**changes)
            await world.endpoint(relay)
            world.subscriber.answer(500, 204)
            request = {"account": "slow", "job_id": "job-1"}
            assert (await relay.api.post("/v1/generations", json=request)).status_code == 201
            [delivery] = await deliveries(relay, lambda one: one["attempt_count"] == 1)
            gate.clear()
            world.clock.forward(seconds=HOUR)
            await asyncio.wait_for(reached.wait(), 10)
            await world.watch(relay, "luma", duration=0)
            await world.subscriber.got(2)
            begun = time.monotonic()
        assert time.monotonic() - begun < 5
        async with opened(f"sqlite:///{world.directory}/relay.db") as store:
            given_back = await store.deliveries.get(TENANT, delivery["id"])
            assert given_back is not None and given_back.status is Status.PENDING
        gate.set()
        relay = await world.relay(**changes)
        *_, third = await world.subscriber.got(3)
        assert third.headers["webhook-id"] == delivery["event_id"]
        assert "refreshed_at" in said(third)
        found = await deliveries(relay, lambda one: one["status"] == "delivered")
        assert sorted(one["attempt_count"] for one in found) == [1, 2]


# Who asks.


@asynccontextmanager
async def expired_events(url: str, jobs: Sequence[str]) -> AsyncIterator[tuple[Store, list[str]]]:
    """A store with one event for each job, all of whose outputs expire at NOW."""
    async with prepared(url) as store:
        expiring = replace(DONE, outputs=(Output("https://a.test/1.png", expires_at=NOW),))
        yield store, [(await announced(store, await watched(store, job), expiring))[0].id for job in jobs]


async def test_an_event_that_was_renewed_is_not_asked_about_by_its_other_deliveries(database_url: str):
    asked, gate = [], asyncio.Event()

    async def look(tenant: str, account: str, job_id: str) -> Update:
        asked.append((account, job_id))
        await gate.wait()
        return replace(DONE, outputs=(Output("https://a.test/2.png", expires_at=NOW + HOUR),))

    async with expired_events(database_url, ["a"]) as (store, [id_]):
        renewer = Renewer(store, look=look, now=lambda: NOW)
        together = [asyncio.create_task(renewer.renew(id_, NOW)) for _ in range(10)]
        gate.set()
        assert await asyncio.gather(*together) == [True] * 10
        assert await renewer.renew(id_, NOW + HOUR - 1)
        assert asked == [("luma", "a")]
        assert await renewer.renew(id_, NOW + HOUR)
        assert len(asked) == 2


async def test_an_account_that_hangs_is_asked_about_so_many_events_at_once(database_url: str):
    full, gate, under_way = asyncio.Event(), asyncio.Event(), 0

    async def look(tenant: str, account: str, job_id: str) -> Update:
        nonlocal under_way
        under_way += 1
        if under_way == AT_ONCE:
            full.set()
        await gate.wait()
        return DONE

    async with expired_events(database_url, [f"job-{n}" for n in range(AT_ONCE + 1)]) as (store, ids):
        renewer = Renewer(store, look=look, now=lambda: NOW)
        waiting = [asyncio.create_task(renewer.renew(id_, NOW)) for id_ in ids[:-1]]
        await asyncio.wait_for(full.wait(), 10)
        assert await renewer.renew(ids[-1], NOW) is False
        gate.set()
        assert await asyncio.gather(*waiting) == [True] * AT_ONCE
        assert await renewer.renew(ids[-1], NOW)
        assert under_way == AT_ONCE + 1


async def test_a_delivery_that_stops_waiting_does_not_make_the_others_wait_for_ever(database_url: str):
    reached = asyncio.Event()

    async def look(tenant: str, account: str, job_id: str) -> Update:
        reached.set()
        await asyncio.Event().wait()
        return DONE

    async with expired_events(database_url, ["a"]) as (store, [id_]):
        renewer = Renewer(store, look=look, now=lambda: NOW)
        first = asyncio.create_task(renewer.renew(id_, NOW))
        await asyncio.wait_for(reached.wait(), 10)
        second = asyncio.create_task(renewer.renew(id_, NOW))
        first.cancel()
        assert await asyncio.wait_for(second, 10) is False


# What is written into the event.


def an_announcement(outputs: Sequence[Output], **more: Any) -> event.Event:
    data = {"outputs": [event._output(one) for one in outputs], **more}
    ends = [one.expires_at for one in outputs if one.expires_at is not None]
    body = event.envelope("generation.completed", rfc3339(NOW), data)
    return event.Event("evt_1", "t", "generation.completed", body, NOW, expires_at=min(ends, default=None))


OLD = [Output("https://a.test/1", expires_at=NOW - 1), Output("https://a.test/2", expires_at=NOW + HOUR)]


def outputs_of(one: event.Event) -> list[tuple[str, bool]]:
    return [(out["url"], out.get("expired", False)) for out in json.loads(one.body)["data"]["outputs"]]


def test_only_what_has_expired_is_marked_and_the_next_expiry_is_remembered():
    after = event.renewed(an_announcement(OLD), (), by=NOW, now=NOW)
    assert outputs_of(after) == [("https://a.test/1", True), ("https://a.test/2", False)]
    assert after.expires_at == NOW + HOUR
    over = event.renewed(after, (), by=NOW + HOUR, now=NOW)
    assert outputs_of(over) == [("https://a.test/1", True), ("https://a.test/2", True)]
    assert over.expires_at is None


def test_urls_that_have_expired_again_are_no_fresh_ones():
    fresh = [Output("https://a.test/3", expires_at=NOW)]
    after = event.renewed(an_announcement(OLD), fresh, by=NOW, now=NOW)
    assert outputs_of(after) == [("https://a.test/1", True), ("https://a.test/2", False)]
    assert "refreshed_at" not in json.loads(after.body)["data"]


def test_a_fresh_url_that_does_not_expire_ends_the_matter():
    after = event.renewed(an_announcement(OLD), [Output("https://a.test/3")], by=NOW, now=NOW)
    assert outputs_of(after) == [("https://a.test/3", False)]
    assert after.expires_at is None
    assert json.loads(after.body)["data"]["refreshed_at"] == rfc3339(NOW)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text()
    | st.sampled_from([1e22, 5e-324, -0.0, 0.1, 10**400, "\ud800", "\u2028", "</script>"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=10,
)


@settings(max_examples=300, deadline=None)
@given(metadata=JSON, raw=JSON)
@example(metadata=5.960464477539063e-08, raw="\ud800")
def test_everything_else_stays_as_it_was(metadata: Any, raw: Any):
    before = an_announcement(OLD, metadata=metadata, raw=raw)
    fresh = Output("https://a.test/3", expires_at=NOW + HOUR)
    after = event.renewed(before, [fresh], by=NOW, now=NOW)
    old, new = (compact([event._output(one) for one in outputs]) for outputs in (OLD, [fresh]))
    refreshed = b',"refreshed_at":"' + rfc3339(NOW).encode() + b'"}}'
    # A body with a lone surrogate was written by another writer, which spells small numbers differently.
    again = compact(json.loads(before.body))
    assert json.loads(again) == json.loads(before.body)
    assert after.body == again.replace(old, new, 1)[:-2] + refreshed
    assert after == replace(before, body=after.body, expires_at=NOW + HOUR)


# When a URL expires.


AT = "2026-03-16T14:30:12Z"
SIGNATURES = [
    ("X-Amz-Date=20260316T143012Z&X-Amz-Expires=60&X-Amz-Signature=a", 60),
    ("X-Amz-Expires=604800&X-Amz-Date=20260316T143012Z", 604_800),
    ("x-amz-date=20260316T143012Z&x-amz-expires=60", 60),
    ("X-Goog-Date=20260316T143012Z&X-Goog-Expires=900&X-Goog-Signature=a", 900),
    ("AWSAccessKeyId=a&Expires=1773671413&Signature=b%3D", 1),
    ("Expires=1773671413&Signature=a&Key-Pair-Id=K", 1),
    ("GoogleAccessId=a&Expires=1773671413&Signature=b", 1),
    ("sv=2025-01-05&se=2026-03-16T14%3A30%3A13Z&sr=b&sp=r&sig=a%3D", 1),
    ("se=2026-03-16T14:31Z&sig=a", 48),
]
UNSIGNED = [
    "",
    "at=1773671413",
    "Expires=1773671413",  # nothing beside it says that it is a signature's
    "se=2026-03-16T14:30:13Z",
    "Expires=3600&Signature=a",  # a duration
    "Expires=1773671413000&Signature=a",  # milliseconds
    "Expires=tomorrow&Signature=a",
    "Expires=&Signature=a",
    "Expires=١٢٣٤٥٦٧٨٩٠&Signature=a",
    "X-Amz-Expires=60",
    "X-Amz-Date=20260316T143012Z",
    "X-Amz-Date=20260316T143012Z&X-Amz-Expires=-60",
    "X-Amz-Date=20260316T143012Z&X-Amz-Expires=1e3",
    "X-Amz-Date=99991231T235959Z&X-Amz-Expires=604800",
    "X-Amz-Date=yesterday&X-Amz-Expires=60",
    "se=whenever&sig=a",
    "se=9999-12-31T23:59:59-23:59&sig=a",
    "&".join(f"p{n}=1" for n in range(101)) + "&Expires=1773671413&Signature=a",
]


@pytest.mark.parametrize(("query", "seconds"), SIGNATURES)
def test_a_signed_url_says_when_it_expires(query: str, seconds: int):
    assert expiry(SIGNED + query) == (parse_rfc3339(AT) or 0) + seconds * 1000


@pytest.mark.parametrize("query", UNSIGNED)
def test_other_urls_do_not_say_when_they_expire(query: str):
    assert expiry(SIGNED + query) is None


def test_what_the_provider_says_wins():
    [said_so] = output(SIGNED + SIGNATURES[0][0], expires_at=NOW)
    [signed] = output(SIGNED + SIGNATURES[0][0])
    assert (said_so.expires_at, signed.expires_at) == (NOW, (parse_rfc3339(AT) or 0) + 60_000)


WORDS = st.sampled_from(
    ["20260316T143012Z", AT, "1773671413", "60", "9" * 9, "9" * 5000, "99991231T235959Z", "0001-01-01", ""]
) | st.text(max_size=12)
PARAMETERS = st.sampled_from(
    ["X-Amz-Date", "X-Amz-Expires", "X-Goog-Date", "X-Goog-Expires", "Expires", "Signature", "se", "sig"]
) | st.text(max_size=3)


@settings(max_examples=1000, deadline=None)
@given(
    query=st.lists(st.tuples(PARAMETERS, WORDS)).map(lambda pairs: urlencode(pairs, errors="replace"))
    | st.text(),
    base=st.sampled_from(["https://a.test/?", "https://[?", "data:,?", "//\u2100?", "?"])
    | st.text(max_size=5),
)
@example(base="https://a.test/?", query="X-Amz-Date=99991231T235959Z&X-Amz-Expires=1")
def test_any_url_has_an_expiry_that_can_be_written_or_none(base: str, query: str):
    at = expiry(base + query)
    assert at is None or parse_rfc3339(rfc3339(at)) == at
