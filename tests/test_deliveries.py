"""Delivering, over real sockets: retries, refusals, replays, and subscribers that behave badly."""

import asyncio
import gzip
import json
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from standardwebhooks import Webhook
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from relay.times import parse_rfc3339
from tests.conftest import RunningRelay, World
from tests.serving import serving

SCHEDULE = (5, 300, 1800, 7200, 18_000, 36_000, 50_400, 72_000, 86_400)
ANSWER = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
Behaviour = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]

# For 127.0.0.1, and signed by nobody but itself.
CERTIFICATE = """
-----BEGIN CERTIFICATE-----
MIIBkTCCATagAwIBAgIUCwHXA6rEDsoY4wk/g7cegtGxC5wwCgYIKoZIzj0EAwIw
FDESMBAGA1UEAwwJMTI3LjAuMC4xMCAXDTI2MTEyMTIxMzMyNloYDzIxMjYxMDI4
MjEzMzI2WjAUMRIwEAYDVQQDDAkxMjcuMC4wLjEwWTATBgcqhkjOPQIBBggqhkjO
PQMBBwNCAATd7h1ALlKlaMFvNKYdcKDj0eaiLKRU3voXfGGqh/pfSZTXg0palo9r
qsauPR0gUv9Ua5RFF8t1pgouN4c+eBCuo2QwYjAdBgNVHQ4EFgQUpGG4pdXufIPG
+ka4CFyElSxA0rMwHwYDVR0jBBgwFoAUpGG4pdXufIPG+ka4CFyElSxA0rMwDwYD
VR0TAQH/BAUwAwEB/zAPBgNVHREECDAGhwR/AAABMAoGCCqGSM49BAMCA0kAMEYC
IQDYiDCE6zlomQ8XQTscL/VMGOVbmMX/9Ibmt29WJx0ZawIhAK60rgZeyt0ce1su
1Yu2jVtWBr3ODkGo2E2o55jyx4z1
-----END CERTIFICATE-----
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgNOtvSmjHAJuubJ0s
9FzApGiOvobb1ODNXEtwKvIM5lKhRANCAATd7h1ALlKlaMFvNKYdcKDj0eaiLKRU
3voXfGGqh/pfSZTXg0palo9rqsauPR0gUv9Ua5RFF8t1pgouN4c+eBCu
-----END PRIVATE KEY-----
"""


@asynccontextmanager
async def raw_server(
    behave: Behaviour, *, host: str = "127.0.0.1", tls: ssl.SSLContext | None = None
) -> AsyncIterator[str]:
    """The origin of a server that reads a request's head and then behaves; the rest is its own business."""

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.readuntil(b"\r\n\r\n")
            await behave(reader, writer)
        except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass
        finally:
            writer.transport.abort()

    server = await asyncio.start_server(connected, host, 0, ssl=tls)
    try:
        yield f"http://{host}:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()


def saying(*parts: bytes) -> Behaviour:
    async def behave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for part in parts:
            writer.write(part)
            await writer.drain()

    return behave


async def register(relay: RunningRelay, url: str, **fields: Any) -> dict[str, Any]:
    answer = await relay.api.post("/v1/endpoints", json={"url": url, **fields})
    assert answer.status_code == 201, answer.text
    return dict(answer.json())


async def only_delivery(relay: RunningRelay, true: Callable[[Any], bool], **query: Any) -> dict[str, Any]:
    """The one delivery there is, with its attempts, as soon as it is as wished."""
    query_text = "&".join(f"{name}={value}" for name, value in query.items())
    page = await relay.eventually(f"/v1/deliveries?{query_text}", lambda page: len(page["data"]) == 1)
    [listed] = page["data"]
    return dict(await relay.eventually(f"/v1/deliveries/{listed['id']}", true))


async def attempted_at(relay: RunningRelay, url: str) -> dict[str, Any]:
    """The first attempt of a test event to a URL."""
    endpoint = await register(relay, url)
    sent = await relay.api.post(f"/v1/endpoints/{endpoint['id']}/test")
    assert sent.status_code == 202
    shown = await relay.eventually(f"/v1/deliveries/{sent.json()['id']}", lambda one: one["attempts"])
    return dict(shown["attempts"][0])


# The schedule.


async def test_retries_follow_the_schedule_with_up_to_a_fifth_of_jitter_and_end_failed(world: World):
    relay = await world.relay(delivery={"timeout": "2s"})
    await world.endpoint(relay)
    world.subscriber.answer(500, content=b"oops")
    await world.watch(relay, "vivix", duration=0)
    for number, pause in enumerate(SCHEDULE, start=1):
        shown = await only_delivery(relay, lambda one, number=number: one["attempt_count"] == number)
        assert shown["status"] == "pending"
        ended_at = parse_rfc3339(shown["updated_at"])
        due_at = parse_rfc3339(shown["next_attempt_at"])
        assert ended_at is not None and due_at is not None
        assert 1000 * pause <= due_at - ended_at <= 1200 * pause + 50
        world.clock.forward(seconds=(due_at - world.clock()) / 1000)
    shown = await only_delivery(relay, lambda one: one["attempt_count"] == 10)
    assert (shown["status"], shown["next_attempt_at"]) == ("failed", None)
    assert [one["number"] for one in shown["attempts"]] == list(range(1, 11))
    for attempt in shown["attempts"]:
        assert attempt["trigger"] == "scheduled"
        assert (attempt["response_status"], attempt["response_body"]) == (500, "oops")
        assert attempt["error"]["code"] == "http_status"
    assert len(world.subscriber.received) == 10
    assert len({one.headers["webhook-id"] for one in world.subscriber.received}) == 1
    assert len({one.body for one in world.subscriber.received}) == 1


async def test_each_attempt_is_signed_anew_at_its_own_time(world: World):
    relay = await world.relay()
    endpoint = await world.endpoint(relay)
    world.subscriber.answer(500, 204)
    await world.watch(relay, "luma", duration=0)
    [first] = await world.subscriber.got(1)
    Webhook(endpoint["secret"]).verify(first.body, first.headers)
    await only_delivery(relay, lambda one: one["attempt_count"] == 1)
    world.clock.forward(seconds=60)
    _, second = await world.subscriber.got(2)
    Webhook(endpoint["secret"]).verify(second.body, second.headers)
    assert int(second.headers["webhook-timestamp"]) - int(first.headers["webhook-timestamp"]) >= 60


async def test_it_is_delivered_by_the_first_attempt_that_is_answered_2xx(world: World):
    relay = await world.relay()
    await world.endpoint(relay)
    world.subscriber.answer(404, 418, 299, content=b"")
    await world.watch(relay, "luma", duration=0)
    for count in (1, 2):
        await only_delivery(relay, lambda one, count=count: one["attempt_count"] == count)
        world.clock.forward(seconds=400)
    shown = await only_delivery(relay, lambda one: one["status"] == "delivered")
    assert [one["response_status"] for one in shown["attempts"]] == [404, 418, 299]
    assert [one["error"] is None for one in shown["attempts"]] == [False, False, True]


@pytest.mark.parametrize("status", [429, 500, 503])
async def test_retry_after_delays_the_next_attempt(world: World, status: int):
    relay = await world.relay()
    await world.endpoint(relay)
    world.subscriber.answer(status, headers={"retry-after": "120"})
    await world.watch(relay, "luma", duration=0)
    shown = await only_delivery(relay, lambda one: one["attempt_count"] == 1)
    started_at, due_at = (
        parse_rfc3339(shown["attempts"][0]["started_at"]),
        parse_rfc3339(shown["next_attempt_at"]),
    )
    assert started_at is not None and due_at is not None
    assert 120_000 <= due_at - started_at < 150_000


async def test_a_test_event_is_tried_once(world: World):
    relay = await world.relay()
    world.subscriber.answer(500)
    await attempted_at(relay, world.subscriber.origin + "/")
    shown = await only_delivery(relay, lambda one: one["status"] == "failed")
    assert shown["event_type"] == "endpoint.test"


# Refusals.


async def test_a_redirect_is_a_failure_and_is_never_followed(world: World):
    relay = await world.relay()
    for status in (301, 302, 303, 307, 308):
        await world.endpoint(relay, f"/{status}")
        location = {"location": f"{world.subscriber.origin}/canary"}
        world.subscriber.answer(status, headers=location, path=f"/{status}")
    await world.watch(relay, "luma", duration=0)
    page = await relay.eventually(
        "/v1/deliveries", lambda page: [one["attempt_count"] for one in page["data"]] == [1] * 5
    )
    for one in page["data"]:
        assert one["status"] == "pending"
        [attempt] = (await relay.api.get(f"/v1/deliveries/{one['id']}")).json()["attempts"]
        assert attempt["error"]["code"] == "redirect"
    assert "/canary" not in {one.path for one in world.subscriber.received}


async def test_gone_disables_the_endpoint_and_cancels_its_other_deliveries_only(world: World):
    relay = await world.relay()
    gone = await world.endpoint(relay, "/gone")
    await world.endpoint(relay, "/other")
    world.subscriber.answer(500, 410, path="/gone")
    for _ in range(2):
        await world.watch(relay, "luma", duration=0)
        await world.subscriber.got(1, path="/gone")
    path = f"/v1/deliveries?endpoint_id={gone['id']}"
    page = await relay.eventually(
        path, lambda page: sorted(one["status"] for one in page["data"]) == ["canceled", "failed"]
    )
    assert {one["attempt_count"] for one in page["data"]} == {1}
    shown = (await relay.api.get(f"/v1/endpoints/{gone['id']}")).json()
    assert shown["status"] == "disabled"
    assert "410" in shown["disabled_reason"]
    await world.watch(relay, "luma", duration=0)
    await world.subscriber.got(3, path="/other")
    assert len((await relay.api.get(path)).json()["data"]) == 2
    for one in page["data"]:
        assert (await relay.api.post(f"/v1/deliveries/{one['id']}/replay")).status_code == 409
    await relay.api.post(f"/v1/endpoints/{gone['id']}/enable")
    world.subscriber.answer(204, path="/gone")
    for one in page["data"]:
        assert (await relay.api.post(f"/v1/deliveries/{one['id']}/replay")).status_code == 202
    await world.subscriber.got(4, path="/gone")


async def test_what_waits_for_an_endpoint_that_is_gone_is_not_sent_to_it_any_more(world: World):
    relay = await world.relay(delivery={"timeout": "2s", "endpoint_concurrency": 1})
    endpoint = await world.endpoint(relay)
    world.subscriber.answer(410)
    # They end together, on their second asks; one error more would be an outage.
    world.simulator.trouble("luma", "server_error", count=4)
    watched = [await world.watch(relay, "luma", duration=0) for _ in range(4)]
    path = f"/v1/deliveries?endpoint_id={endpoint['id']}"
    async with asyncio.timeout(15):
        while True:
            events = (await relay.api.get("/v1/events?type=generation.completed")).json()["data"]
            page = (await relay.api.get(path)).json()["data"]
            settled = all(one["status"] in ("failed", "canceled") for one in page)
            if len(events) == len(watched) and settled:
                break
            await asyncio.sleep(0.02)
    assert [one["status"] for one in page].count("failed") == 1
    assert len(world.subscriber.received) == 1


async def test_gone_at_a_callback_url_ends_that_delivery_alone(world: World):
    relay = await world.relay()
    world.subscriber.answer(410)
    job_id = world.simulator.submit("luma", duration=0)
    request = {"account": "luma", "job_id": job_id, "callback_url": world.subscriber.origin + "/"}
    await relay.api.post("/v1/generations", json=request)
    shown = await only_delivery(relay, lambda one: one["status"] == "failed")
    assert (shown["endpoint_id"], shown["attempt_count"]) == (None, 1)


@pytest.mark.parametrize("verb", ["disable", "delete"])
async def test_nothing_is_sent_to_an_endpoint_that_was_disabled_or_deleted(world: World, verb: str):
    relay = await world.relay()
    endpoint = await world.endpoint(relay, "/gone")
    await world.endpoint(relay, "/other")
    world.subscriber.answer(500, path="/gone")
    world.subscriber.answer(500, path="/other")
    await world.watch(relay, "luma", duration=0)
    path = f"/v1/deliveries?endpoint_id={endpoint['id']}"
    await relay.eventually(path, lambda page: [one["attempt_count"] for one in page["data"]] == [1])
    await relay.eventually(
        "/v1/deliveries", lambda page: {one["attempt_count"] for one in page["data"]} == {1}
    )
    if verb == "disable":
        await relay.api.post(f"/v1/endpoints/{endpoint['id']}/disable")
    else:
        await relay.api.delete(f"/v1/endpoints/{endpoint['id']}")
    world.clock.forward(seconds=10)
    await world.subscriber.got(2, path="/other")
    [canceled] = (await relay.api.get(path)).json()["data"]
    assert canceled["status"] == "canceled"
    assert len(await world.subscriber.got(1, path="/gone")) == 1


# Replay.


async def test_a_replay_is_the_same_event_with_the_next_number_and_a_fresh_run(world: World):
    relay = await world.relay(delivery={"timeout": "2s", "schedule": ["1s"]})
    await world.endpoint(relay)
    world.subscriber.answer(500)
    await world.watch(relay, "luma", duration=0)
    await only_delivery(relay, lambda one: one["attempt_count"] == 1)
    world.clock.forward(seconds=2)
    failed = await only_delivery(relay, lambda one: one["status"] == "failed")
    assert failed["attempt_count"] == 2
    assert (await relay.api.post(f"/v1/deliveries/{failed['id']}/replay")).status_code == 202
    await only_delivery(relay, lambda one: one["attempt_count"] == 3 and one["status"] == "pending")
    world.subscriber.answer(204)
    world.clock.forward(seconds=2)
    shown = await only_delivery(relay, lambda one: one["status"] == "delivered")
    assert [(one["number"], one["trigger"]) for one in shown["attempts"]] == [
        (1, "scheduled"),
        (2, "scheduled"),
        (3, "replay"),
        (4, "scheduled"),
    ]
    received = await world.subscriber.got(4)
    assert len({(one.headers["webhook-id"], one.body) for one in received}) == 1


async def test_only_a_finished_delivery_can_be_replayed_and_a_delivered_one_too(world: World):
    relay = await world.relay()
    await world.endpoint(relay)
    world.subscriber.answer(500, 204)
    await world.watch(relay, "luma", duration=0)
    pending = await only_delivery(relay, lambda one: one["attempt_count"] == 1)
    assert (await relay.api.post(f"/v1/deliveries/{pending['id']}/replay")).status_code == 409
    world.clock.forward(seconds=10)
    delivered = await only_delivery(relay, lambda one: one["status"] == "delivered")
    assert (await relay.api.post(f"/v1/deliveries/{delivered['id']}/replay")).status_code == 202
    await world.subscriber.got(3)
    assert (await relay.api.post("/v1/deliveries/dlv_unknown/replay")).status_code == 404


# Subscribers that behave badly.


async def test_a_hanging_subscriber_ends_at_the_deadline_and_delays_nobody_else(world: World):
    released = asyncio.Event()

    async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await released.wait()

    relay = await world.relay(delivery={"timeout": "1s"})
    async with raw_server(hang) as hanging:
        slow = await register(relay, hanging)
        await world.endpoint(relay)
        for _ in range(12):  # more than the hanging one is sent at once
            await world.watch(relay, "luma", duration=0)
        begun = time.monotonic()
        await world.subscriber.got(12)
        listed = (await relay.api.get(f"/v1/deliveries?endpoint_id={slow['id']}")).json()["data"]
        assert "delivered" not in {one["status"] for one in listed}
        assert time.monotonic() - begun < 3
        shown = await relay.eventually(f"/v1/deliveries/{listed[-1]['id']}", lambda one: one["attempts"])
        released.set()
    [attempt] = shown["attempts"]
    assert (attempt["error"]["code"], attempt["response_status"]) == ("timeout", None)
    assert 1000 <= attempt["duration_ms"] < 1500
    assert shown["status"] in ("pending", "sending"), "it is tried again"


async def test_a_body_that_trickles_ends_at_the_deadline_too(world: World):
    async def trickle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 100000\r\n\r\n")
        while True:
            writer.write(b"x")
            await writer.drain()
            await asyncio.sleep(0.05)

    relay = await world.relay(delivery={"timeout": "500ms"})
    async with raw_server(trickle) as origin:
        attempt = await attempted_at(relay, origin)
    assert attempt["error"]["code"] == "timeout"
    assert 500 <= attempt["duration_ms"] < 1000


async def test_an_excerpt_of_the_response_is_kept_and_no_more_than_16_kib(world: World):
    relay = await world.relay()
    for content, kept in [
        (b"x" * 100_000, "x" * 16_384),
        ("ü".encode() * 100, "ü" * 100),
        (b"a\x00b\xff", "a\ufffdb\ufffd"),
        (b"", ""),
    ]:
        world.subscriber.answer(200, content=content)
        attempt = await attempted_at(relay, world.subscriber.origin + "/")
        assert attempt["response_body"] == kept
        assert attempt["error"] is None


@pytest.mark.parametrize("headers", [b"", b"content-encoding: gzip\r\n"], ids=["100 MB", "gzip bomb"])
async def test_of_a_huge_answer_little_is_read(world: World, headers: bytes):
    chunk = gzip.compress(b"\0" * 10_000_000) * 8 if headers else b"x" * 65_536
    sent = 0

    async def flood(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        writer.write(b"HTTP/1.1 200 OK\r\n" + headers + b"content-length: 100000000\r\n\r\n")
        while sent < 100_000_000:
            writer.write(chunk)
            await writer.drain()
            sent += len(chunk)

    relay = await world.relay()
    async with raw_server(flood) as origin:
        attempt = await attempted_at(relay, origin)
    assert (attempt["response_status"], attempt["error"]) == (200, None)
    assert len(attempt["response_body"]) <= 16_384
    assert sent < 20_000_000  # what the buffers of two sockets hold, and far less than all


GARBLED: list[tuple[str, bytes]] = [
    ("bad_response", b"SSH-2.0-OpenSSH_9.9\r\n"),
    ("bad_response", b"HTTP/1.1 abc OK\r\n\r\n"),
    ("bad_response", b"HTTP/1.1 200 OK\r\ncontent-length: minus one\r\n\r\n"),
    ("bad_response", b"HTTP/1.1 200 OK\r\nx: " + b"y" * 200_000 + b"\r\n\r\n"),
    ("bad_response", b"\x00\x01\x02\x03" * 100),
    ("disconnected", b""),
    ("disconnected", b"HTTP/1.1 200 O"),
    ("disconnected", b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nshort"),
    ("disconnected", b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nabc"),
]


async def test_a_garbled_or_cut_answer_is_a_failure_with_its_code(world: World):
    relay = await world.relay()
    for code, answer in GARBLED:
        async with raw_server(saying(answer)) as origin:
            attempt = await attempted_at(relay, origin)
        assert attempt["error"]["code"] == code, answer[:50]
        assert attempt["error"]["message"]


async def test_a_refused_connection_is_retried(world: World):
    async with raw_server(saying(ANSWER)) as origin:
        pass
    relay = await world.relay()
    await register(relay, origin)
    await world.watch(relay, "luma", duration=0)
    shown = await only_delivery(relay, lambda one: one["attempt_count"] == 1)
    assert (shown["status"], shown["attempts"][0]["error"]["code"]) == ("pending", "connect")
    assert shown["attempts"][0]["response_status"] is None


async def test_a_name_that_leads_nowhere_is_a_failure_of_dns(world: World):
    relay = await world.relay()
    attempt = await attempted_at(relay, "https://nowhere.invalid/")
    assert attempt["error"]["code"] == "dns"


async def test_a_certificate_that_nobody_trusts_and_no_tls_at_all_are_failures_of_tls(
    world: World, tmp_path: Path
):
    (tmp_path / "server.pem").write_text(CERTIFICATE)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "server.pem")
    relay = await world.relay()
    requests = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        requests.append(reader)
        await saying(ANSWER)(reader, writer)

    async with raw_server(answer, tls=context) as origin:
        attempt = await attempted_at(relay, origin.replace("http://", "https://"))
    assert attempt["error"]["code"] == "tls"
    plain = await attempted_at(relay, world.subscriber.origin.replace("http://", "https://"))
    assert plain["error"]["code"] == "tls"
    assert requests == []


@asynccontextmanager
async def canary(host: str) -> AsyncIterator[tuple[int, list[str]]]:
    """The port of a server that nothing should connect to, and what did."""
    connected: list[str] = []

    async def note(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connected.append(str(writer.get_extra_info("peername")))
        writer.transport.abort()

    server = await asyncio.start_server(note, host, 0)
    try:
        yield server.sockets[0].getsockname()[1], connected
    finally:
        server.close()


@pytest.mark.parametrize(("host", "url"), [("127.0.0.2", "127.0.0.2"), ("127.0.0.1", "[::ffff:127.0.0.1]")])
async def test_a_blocked_address_is_failed_at_once_and_nothing_connects_to_it(
    world: World, host: str, url: str
):
    # Only the simulated providers may be connected to, at no other spelling of their address.
    relay = await world.relay(network={"allow": ["127.0.0.1/32"], "allow_http": True})
    async with canary(host) as (port, connected):
        await register(relay, f"http://{url}:{port}/")
        await world.watch(relay, "luma", duration=0)
        shown = await only_delivery(relay, lambda one: one["attempt_count"] == 1)
    assert (shown["status"], shown["next_attempt_at"]) == ("failed", None)
    [attempt] = shown["attempts"]
    assert (attempt["error"]["code"], attempt["response_status"]) == ("blocked_address", None)
    assert connected == []


async def test_nothing_private_is_connected_to_unless_it_is_allowed(world: World):
    relay = await world.relay(network={"allow": [], "allow_http": True}, accounts={})
    async with canary("127.0.0.1") as (port, connected):
        for host in ("127.0.0.1", "localhost", "[::1]", "169.254.169.254", "10.0.0.1"):
            attempt = await attempted_at(relay, f"http://{host}:{port}/")
            assert (attempt["error"]["code"], attempt["response_body"]) == ("blocked_address", None), host
    assert connected == []


async def test_no_more_than_eight_attempts_are_under_way_at_one_endpoint(world: World):
    released, full, under_way, most, answered = asyncio.Event(), asyncio.Event(), 0, 0, 0

    async def receive(request: Request) -> Response:
        nonlocal under_way, most, answered
        under_way += 1
        most = max(most, under_way)
        if under_way == 8:
            full.set()
        await released.wait()
        under_way -= 1
        answered += 1
        return Response(status_code=204)

    async with serving(Starlette(routes=[Route("/", receive, methods=["POST"])])) as origin:
        relay = await world.relay(delivery={"timeout": "10s"})
        await register(relay, origin + "/")
        await world.endpoint(relay)
        for _ in range(20):
            await world.watch(relay, "luma", duration=0)
        await world.subscriber.got(20)
        await asyncio.wait_for(full.wait(), 5)
        released.set()
        await relay.eventually(
            "/v1/deliveries?limit=100", lambda page: {one["status"] for one in page["data"]} == {"delivered"}
        )
    assert (most, answered) == (8, 20)


async def test_with_one_attempt_at_a_time_every_endpoint_is_still_served(world: World):
    relay = await world.relay(delivery={"timeout": "2s", "concurrency": 1})
    for path in ("/a", "/b", "/c"):
        await world.endpoint(relay, path)
    for _ in range(4):
        await world.watch(relay, "luma", duration=0)
    await world.subscriber.got(12)
    assert {len(await world.subscriber.got(4, path=path)) for path in ("/a", "/b", "/c")} == {4}


async def test_no_header_of_ours_can_be_overridden_and_the_others_arrive(world: World):
    relay = await world.relay()
    endpoint = await world.endpoint(relay, headers={"authorization": "Bearer of the subscriber", "x-a": "1"})
    await world.watch(relay, "luma", duration=0)
    [received] = await world.subscriber.got(1)
    Webhook(endpoint["secret"]).verify(received.body, received.headers)
    assert received.headers["authorization"] == "Bearer of the subscriber"
    assert received.headers["x-a"] == "1"
    assert received.headers["content-type"] == "application/json"
    assert received.headers["user-agent"].startswith("Relay/")
    assert json.loads(received.body)["type"] == "generation.completed"


async def test_during_a_rotation_both_secrets_sign(world: World):
    relay = await world.relay()
    endpoint = await world.endpoint(relay)
    rotated = await relay.api.post(
        f"/v1/endpoints/{endpoint['id']}/secret/rotate", json={"overlap_seconds": 60}
    )
    await world.watch(relay, "luma", duration=0)
    [both] = await world.subscriber.got(1)
    for secret in (endpoint["secret"], rotated.json()["secret"]):
        Webhook(secret).verify(both.body, both.headers)
    assert len(both.headers["webhook-signature"].split(" ")) == 2
    world.clock.forward(seconds=61)
    await world.watch(relay, "luma", duration=0)
    _, one = await world.subscriber.got(2)
    assert len(one.headers["webhook-signature"].split(" ")) == 1
