"""Traces: what a collector gets, over real HTTP, and what subscribers are told of it."""

import re
import subprocess
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from relay.errors import ConfigError
from relay.tracing import Tracing
from tests.conftest import World
from tests.serving import listener, origin_of, serving

TOKEN = "token-of-the-collector"


@dataclass
class Span:
    name: str
    trace: str
    id: str
    parent: str
    seconds: float
    failed: bool
    attributes: dict[str, Any]


@dataclass
class Collector:
    """Takes OTLP from whoever has its token."""

    spans: list[Span] = field(default_factory=list)
    services: set[str] = field(default_factory=set)
    origin: str = ""

    async def take(self, request: Request) -> Response:
        if request.headers.get("authorization") != f"Bearer {TOKEN}":
            return Response(status_code=401)
        sent = ExportTraceServiceRequest.FromString(await request.body())
        for group in sent.resource_spans:
            about = {one.key: one.value.string_value for one in group.resource.attributes}
            self.services.add(about["service.name"])
            for one in (span for scope in group.scope_spans for span in scope.spans):
                given = {
                    each.key: getattr(each.value, str(each.value.WhichOneof("value")))
                    for each in one.attributes
                }
                seconds = (one.end_time_unix_nano - one.start_time_unix_nano) / 1e9
                ids = (one.trace_id.hex(), one.span_id.hex(), one.parent_span_id.hex())
                self.spans.append(Span(one.name, *ids, seconds, one.status.code == 2, given))
        return Response(status_code=200, media_type="application/x-protobuf")

    @property
    def settings(self) -> dict[str, Any]:
        headers = {"Authorization": f"Bearer {TOKEN}"}
        return {"endpoint": f"{self.origin}/v1/traces", "headers": headers, "service": "relay-of-the-tests"}


@pytest.fixture
async def collector(world: World) -> Collector:
    collector = Collector()
    app = Starlette(routes=[Route("/v1/traces", collector.take, methods=["POST"])])
    collector.origin = await world.stack.enter_async_context(serving(app))
    return collector


async def test_one_trace_goes_from_the_polls_to_the_delivery_whatever_happens_between(
    world: World, collector: Collector
):
    world.subscriber.answer(500, 204)
    changes = {"tracing": collector.settings, "delivery": {"timeout": "2s", "schedule": ["1h"]}}
    async with world.running(**changes) as relay:
        await world.endpoint(relay)
        made = await world.watch(relay, "luma")
        await world.subscriber.got(1)
    # Another relay goes on.
    world.clock.forward(seconds=5000)
    async with world.running(**changes):
        await world.subscriber.got(2)
    assert collector.services == {"relay-of-the-tests"}
    [whole] = [one for one in collector.spans if one.name == "generation"]
    assert (whole.parent, whole.attributes["relay.generation"]) == ("", made["id"])
    assert whole.seconds > 0.2
    assert {one.trace for one in collector.spans} == {whole.trace}
    assert {one.parent for one in collector.spans if one is not whole} == {whole.id}
    asks = [one for one in collector.spans if one.name == "ask"]
    assert whole.attributes["relay.asks"] == len(asks)
    assert {one.attributes["relay.account"] for one in asks} == {"luma"}
    attempts = [one for one in collector.spans if one.name == "attempt"]
    assert [one.attributes["http.response.status_code"] for one in attempts] == [500, 204]
    assert [one.failed for one in attempts] == [True, False]
    assert len({one.id for one in collector.spans}) == len(collector.spans)


async def test_a_callback_is_the_beginning_of_its_trace(world: World, collector: Collector):
    async with world.running(tracing=collector.settings) as relay:
        await world.endpoint(relay)
        made = (await relay.api.post("/v1/generations", json={"account": "pictory"})).json()
        world.simulator.submit("pictory", duration=0.2, request={"webhook": made["webhook_url"]})
        await world.subscriber.got(1)
    assert len({one.trace for one in collector.spans}) == 1
    assert {"callback", "ask", "generation", "attempt"} == {one.name for one in collector.spans}


async def test_an_event_of_ones_own_has_a_trace_of_its_own(world: World, collector: Collector):
    async with world.running(tracing=collector.settings) as relay:
        await world.endpoint(relay, event_types=["a.b"])
        for _ in range(2):
            await relay.api.post("/v1/events", json={"type": "a.b", "data": {}})
        await world.subscriber.got(2)
    assert sorted(one.name for one in collector.spans) == ["attempt", "attempt", "event", "event"]
    for event in (one for one in collector.spans if one.name == "event"):
        [attempt] = [one for one in collector.spans if one.parent == event.id]
        assert attempt.trace == event.trace
        assert attempt.attributes["relay.event"] == event.attributes["relay.event"]


async def test_what_is_published_again_begins_no_second_trace(world: World, collector: Collector):
    async with world.running(tracing=collector.settings) as relay:
        named, fresh = [{"type": "a.b", "data": {}, "id": name} for name in ("one", "two")]
        key = {"Idempotency-Key": "k"}
        for body, headers in ((named, {}), (named, {}), ([named, fresh], key), ([named, fresh], key)):
            answer = await relay.api.post("/v1/events", json=body, headers=headers)
            assert answer.status_code == 201, answer.text
    assert [one.name for one in collector.spans] == ["event", "event"]
    assert len({one.trace for one in collector.spans}) == 2


@pytest.mark.parametrize("propagate", [False, True])
async def test_subscribers_are_told_of_their_span_only_when_that_is_wanted(
    world: World, collector: Collector, propagate: bool
):
    async with world.running(tracing=collector.settings | {"propagate": propagate}) as relay:
        await world.endpoint(relay, event_types=["a.b"])
        await relay.api.post("/v1/events", json={"type": "a.b", "data": {}})
        [received] = await world.subscriber.got(1)
    [attempt] = [one for one in collector.spans if one.name == "attempt"]
    told = received.headers.get("traceparent")
    assert told == (f"00-{attempt.trace}-{attempt.id}-01" if propagate else None)


@pytest.mark.parametrize("share", [0.0, 0.5])
async def test_only_a_share_of_all_traces_is_sent_each_of_them_whole(
    world: World, collector: Collector, share: float
):
    settings = collector.settings | {"share": share, "propagate": True}
    async with world.running(tracing=settings) as relay:
        await world.endpoint(relay, event_types=["a.b"])
        for _ in range(3):
            await relay.api.post("/v1/events", json=[{"type": "a.b", "data": {}}] * 20)
        received = await world.subscriber.got(60)
    told = [
        re.fullmatch(r"00-([0-9a-f]{32})-[0-9a-f]{16}-(0[01])", one.headers["traceparent"])
        for one in received
    ]
    sent = {match[1] for match in told if match and match[2] == "01"}
    assert None not in told
    assert {one.trace for one in collector.spans} == sent
    assert len(collector.spans) == 2 * len(sent)
    assert 10 <= len(sent) <= 50 if share else not sent


async def test_a_collector_that_is_away_delays_nobody_and_nothing(world: World):
    begun = time.monotonic()
    async with world.running(tracing={"endpoint": "http://127.0.0.1:1/v1/traces"}) as relay:
        await world.endpoint(relay, event_types=["a.b"])
        await relay.api.post("/v1/events", json={"type": "a.b", "data": {}})
        await world.subscriber.got(1)
        assert (await relay.api.get("/readyz")).status_code == 200
    assert time.monotonic() - begun < 30


async def test_a_collector_that_hangs_does_not_hold_up_the_end():
    with listener() as bound:
        bound.listen()
        endpoint = f"{origin_of(bound)}/v1/traces"
        tracing = Tracing.open(
            endpoint, headers={}, service="relay", relay="rly_1", share=1, propagates=False
        )
        # Several times what is sent at once.
        for number in range(2000):
            tracing.note("event", f"evt_{number}", begun=0, ended=1, first=True, attributes={})
        begun = time.monotonic()
        await tracing.close()
        assert time.monotonic() - begun < 10


def test_without_the_extra_the_complaint_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    for name in [one for one in sys.modules if one.startswith("opentelemetry.exporter")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http", None)
    with pytest.raises(ConfigError, match=r"tracing.endpoint: .*relay-notifier\[otel\]"):
        Tracing.open(
            "http://127.0.0.1:1", headers={}, service="relay", relay="rly_1", share=1, propagates=False
        )


def test_who_does_not_trace_does_not_even_import_it():
    program = "import relay.run, sys; sys.exit(any(one.startswith('opentelemetry') for one in sys.modules))"
    ran = subprocess.run([sys.executable, "-c", program], timeout=60)  # noqa: S603 # our own
    assert ran.returncode == 0
