"""The delivery loop: who is sent how much and when, by a relay at work and subscribers on real sockets."""

import asyncio
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from email.utils import formatdate
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from relay import deliver, event, lane, signature
from relay.app import running
from relay.config import read_config
from relay.delivery import Claimed, Status
from relay.endpoint import Endpoint, Secret
from relay.ids import new_id
from relay.store.deliveries import Attempt, Delivery
from relay.store.events import Handoff, Publication
from relay.tenant import DEFAULT
from relay.web.context import Relay
from tests.conftest import Clock, World
from tests.serving import serving

PENDING = Handoff("", 0, takes=lambda destination, size: False)
NONSENSE = "when I feel like it"


@dataclass
class Sink:
    """Subscribers, one at each path. Each answers 204 or what it is told to, holds requests while its gate is
    shut, and counts how many it is serving at once."""

    origin: str = ""
    answers: dict[str, Response] = field(default_factory=dict)
    received: dict[str, list[tuple[str, float]]] = field(default_factory=lambda: defaultdict(list))
    order: list[str] = field(default_factory=list)
    serving: Counter[str] = field(default_factory=Counter)
    peak: Counter[str] = field(default_factory=Counter)
    _gates: dict[str, tuple[int, asyncio.Event]] = field(default_factory=dict)
    _news: asyncio.Condition = field(default_factory=asyncio.Condition)

    def shut(self, path: str, *, after: int = 0) -> asyncio.Event:
        """Requests to a path, except so many that come next, wait until the event is set."""
        self._gates[path] = self.count(path) + after, asyncio.Event()
        return self._gates[path][1]

    def open(self) -> None:
        """All gates, for good."""
        for _, gate in self._gates.values():
            gate.set()

    def count(self, path: str | None = None) -> int:
        return len(self.order) if path is None else len(self.received[path])

    async def until(self, true: Callable[[], bool], *, timeout: float = 20) -> None:
        async with asyncio.timeout(timeout), self._news:
            await self._news.wait_for(true)

    async def got(self, count: int, path: str | None = None, *, timeout: float = 20) -> None:
        await self.until(lambda: self.count(path) >= count, timeout=timeout)

    async def _receive(self, request: Request) -> Response:
        await request.body()
        path = request.url.path
        async with self._news:
            self.received[path].append((request.headers["webhook-id"], time.monotonic()))
            self.order.append(path)
            number = self.count(path)
            for name, now in ((path, path), ("", "")):
                self.serving[name] += 1
                self.peak[name] = max(self.peak[name], self.serving[now])
            self._news.notify_all()
        try:
            free, gate = self._gates.get(path, (0, None))
            if gate is not None and number > free:
                await gate.wait()
            return self.answers.get(path) or Response(status_code=204)
        finally:
            self.serving[path] -= 1
            self.serving[""] -= 1

    @property
    def app(self) -> Starlette:
        return Starlette(routes=[Route("/{path:path}", self._receive, methods=["POST"])])


@dataclass
class Stage:
    """A relay at work, and the subscribers it sends to."""

    relay: Relay
    sink: Sink
    clock: Clock
    ids: dict[str, str] = field(default_factory=dict)  # path → endpoint

    @property
    def deliverer(self) -> deliver.Deliverer:
        return self.relay.deliverer

    async def endpoint(self, path: str, **fields: Any) -> str:
        """An endpoint at a path of the sink, which wants the events of that name."""
        made = Endpoint(
            id=new_id("ep", self.clock()),
            tenant=DEFAULT,
            url=self.sink.origin + path,
            secrets=(Secret(signature.new_secret()),),
            created_at=self.clock(),
            updated_at=self.clock(),
            event_types=("for" + path.replace("/", "."),),
            **fields,
        )
        await self.relay.store.endpoints.create(made, None)
        self.ids[path] = made.id
        return made.id

    def _publication(self, path: str, count: int, size: int = 0) -> Publication:
        type_, data, now = "for" + path.replace("/", "."), {"filler": "x" * size}, self.clock()
        events = [event.published(DEFAULT, type_, data, None, now=now) for _ in range(count)]
        return Publication(DEFAULT, events, None)

    async def publish(self, path: str, count: int = 1, *, size: int = 0) -> None:
        """New events for a path, as the API takes them in."""
        await self.relay.ingest.publish(self._publication(path, count, size))

    async def backlog(self, counts: Mapping[str, int], *, size: int = 0) -> None:
        """Due deliveries in the store, all at once, none of them in memory."""
        publications = [self._publication(path, count, size) for path, count in counts.items()]
        await self.relay.store.events.publish(publications, PENDING, now=self.clock())

    async def deliveries(self, path: str, **filters: Any) -> Sequence[Delivery]:
        """Those of a path, oldest first."""
        query = {"endpoint_id": self.ids[path], **filters}
        found = await self.relay.store.deliveries.page(DEFAULT, query, limit=100_000, cursor=None)
        return found[::-1]

    async def settled(
        self, path: str, true: Callable[[Sequence[Delivery]], bool], *, timeout: float = 20
    ) -> Sequence[Delivery]:
        """The deliveries of a path, as soon as they are as wished."""
        async with asyncio.timeout(timeout):
            while True:
                found = await self.deliveries(path)
                if true(found):
                    return found
                await asyncio.sleep(0.02)

    async def attempts(self, path: str) -> Sequence[Sequence[Attempt]]:
        return [await self.relay.store.deliveries.attempts(one.id) for one in await self.deliveries(path)]


Open = Callable[..., Any]


@pytest.fixture
async def stage(world: World) -> AsyncIterator[Open]:
    """Opens the stage, with `delivery` settings of one's own."""

    @asynccontextmanager
    async def opened(**delivery: Any) -> AsyncIterator[Stage]:
        async with AsyncExitStack() as stack:
            sink = Sink()
            sink.origin = await stack.enter_async_context(serving(sink.app))
            settings = read_config(world.document(delivery={"timeout": "5s", **delivery}), {})
            relay = await stack.enter_async_context(running(settings, now=world.clock))
            stack.callback(sink.open)
            yield Stage(relay, sink, world.clock)

    yield opened


def all_are(status: Status, count: int) -> Callable[[Sequence[Delivery]], bool]:
    return lambda found: [one.status for one in found] == [status] * count


# How many at once. The first answer shows that an endpoint is well: only then it is sent much.


@pytest.mark.parametrize(("configured", "share"), [({}, 8), ({"endpoint_concurrency": 3}, 3)])
async def test_an_endpoint_serves_no_more_than_its_share_at_once(
    stage: Open, configured: dict[str, int], share: int
):
    async with stage(**configured) as s:
        for path in ("/held", "/free"):
            await s.endpoint(path)
        gate = s.sink.shut("/held", after=1)
        await s.publish("/held", 50)
        await s.sink.got(1 + share, "/held")
        await s.publish("/free", 100)
        await s.sink.got(100, "/free")
        assert s.sink.count("/held") == 1 + share
        gate.set()
        await s.settled("/held", all_are(Status.DELIVERED, 50))
        assert s.sink.peak["/held"] == share


async def test_all_endpoints_together_serve_no_more_than_the_concurrency(stage: Open):
    paths = [f"/{number}" for number in range(6)]
    async with stage(concurrency=10) as s:
        for path in paths:
            await s.endpoint(path)
            s.sink.shut(path, after=1)
        await s.backlog(dict.fromkeys(paths, 20))
        await s.sink.got(6 + 10)
        s.sink.open()
        for path in paths:
            await s.settled(path, all_are(Status.DELIVERED, 20))
        assert s.sink.peak[""] == 10


# Fairness.


async def test_a_backlog_of_one_is_not_sent_ahead_of_the_others(stage: Open):
    others = [f"/{number}" for number in range(10)]
    async with stage(concurrency=16) as s:
        for path in ("/big", *others):
            await s.endpoint(path)
        await s.backlog({"/big": 2_000} | dict.fromkeys(others, 20))
        await s.sink.until(lambda: all(s.sink.count(path) == 20 for path in others))
        assert s.sink.count("/big") < 200
        await s.sink.got(2_000, "/big")


async def test_what_is_fresh_in_the_store_passes_what_is_replayed(stage: Open):
    async with stage(endpoint_concurrency=1) as s:
        await s.endpoint("/hook")
        await s.backlog({"/hook": 700})
        await s.settled("/hook", all_are(Status.DELIVERED, 700))
        gate = s.sink.shut("/hook")
        async with s.relay.store.database.write() as tx:
            await tx.execute(
                """
                UPDATE deliveries
                SET status = 'pending', due_at = :now, run_attempts = 0, next_trigger = 'replay'
                """,
                now=s.clock(),
            )
        await s.deliverer.tick()
        await s.sink.got(701, "/hook")
        # The lane is full of them, and more of them are before it in the store.
        await s.backlog({"/hook": 1})
        fresh = (await s.deliveries("/hook"))[-1]
        await s.deliverer.tick()
        gate.set()
        await s.sink.got(711, "/hook")
        assert fresh.event_id in [id_ for id_, _ in s.sink.received["/hook"][701:711]]
        await s.settled("/hook", all_are(Status.DELIVERED, 701))


async def test_turns_go_round(stage: Open):
    paths = [f"/{number}" for number in range(5)]
    async with stage(concurrency=1) as s:
        for path in paths:
            await s.endpoint(path)
        await s.backlog(dict.fromkeys(paths, 10))
        await s.sink.got(50)
        rounds = [s.sink.order[start : start + 5] for start in range(0, 50, 5)]
        assert {tuple(sorted(one)) for one in rounds} == {tuple(paths)}


@pytest.mark.parametrize(
    ("hanging", "answered", "taken"), [(["/h"], 1, 8), (["/h1", "/h2", "/h3"], 0, 6)], ids=["proven", "new"]
)
async def test_endpoints_that_hang_delay_nobody_else(
    stage: Open, hanging: Sequence[str], answered: int, taken: int
):
    others = [f"/{number}" for number in range(5)]
    async with stage(timeout="15s", concurrency=16) as s:
        for path in (*hanging, *others):
            await s.endpoint(path)
        for path in hanging:
            s.sink.shut(path, after=answered)
            await s.publish(path, 50)
        await s.sink.until(lambda: s.sink.serving[""] == taken)
        begun = time.monotonic()
        for path in others:
            await s.publish(path, 50)
        for path in others:
            await s.sink.got(50, path)
        assert time.monotonic() - begun < 5
        assert sum(s.sink.serving[path] for path in hanging) == taken


async def test_endpoints_that_waited_for_a_slot_all_get_their_turn(stage: Open):
    waiting = [f"/w{number}" for number in range(6)]
    async with stage(concurrency=4) as s:
        for path in ("/hanging", "/a", *waiting):
            await s.endpoint(path)
        gate, *_ = [s.sink.shut(path) for path in ("/a", "/hanging", *waiting)]
        for path in ("/hanging", "/a"):
            await s.publish(path)
            await s.sink.got(1, path)
        for path in (*waiting, "/a"):
            await s.publish(path)
        gate.set()
        await s.settled("/a", all_are(Status.DELIVERED, 2))
        assert s.sink.peak[""] <= 2 + 1  # half of the slots is for whoever is known to be well
        await s.deliverer.tick()  # whoever is well and has nothing to send may be forgotten now
        s.sink.open()
        for path in ("/hanging", *waiting):
            await s.settled(path, all_are(Status.DELIVERED, 1))


async def test_a_quarter_of_the_slots_is_kept_for_first_attempts(stage: Open):
    retried = [f"/r{number}" for number in range(4)]
    async with stage(concurrency=8, schedule=["1s", "1s"]) as s:
        for path in (*retried, "/fresh"):
            await s.endpoint(path)
        for path in retried:
            s.sink.answers[path] = Response(status_code=418)
        await s.backlog(dict.fromkeys(retried, 10))
        for path in retried:
            await s.settled(path, lambda found: [one.attempts for one in found] == [1] * 10)
        s.sink.answers.clear()
        for path in (*retried, "/fresh"):
            s.sink.shut(path, after=1)
        s.clock.forward(seconds=2)
        await s.sink.got(40 + 4 + 6)
        await s.publish("/fresh", 10)
        await s.sink.got(1 + 2, "/fresh")
        assert sum(s.sink.serving[path] for path in retried) == 6
        assert s.sink.peak[""] == 8
        s.sink.open()
        for path in (*retried, "/fresh"):
            await s.settled(path, all_are(Status.DELIVERED, 10))


async def test_one_in_five_turns_is_a_retry_while_fresh_work_waits(stage: Open):
    async with stage(endpoint_concurrency=1, schedule=["1s", "1s"]) as s:
        await s.endpoint("/a")
        s.sink.answers["/a"] = Response(status_code=418)
        await s.backlog({"/a": 10})
        await s.settled("/a", lambda found: [one.attempts for one in found] == [1] * 10)
        retries = {one.event_id for one in await s.deliveries("/a")}
        s.sink.answers.clear()
        gate = s.sink.shut("/a")
        await s.publish("/a")
        await s.backlog({"/a": 40})
        s.clock.forward(seconds=2)
        await s.deliverer.tick()
        gate.set()
        await s.sink.got(10 + 51, "/a")
        turns = "".join("r" if one in retries else "f" for one, _ in s.sink.received["/a"])[11:]
        # Fresh work is not held up by them, and they are not starved by it.
        assert turns.count("r", 0, 40) == 8
        assert "rr" not in turns[:40]


# Memory.


@asynccontextmanager
async def watched(deliverer: deliver.Deliverer) -> AsyncIterator[dict[str, int]]:
    """The most that was held meanwhile: in all, of one lane, and bytes; a look in every turn of the loop."""
    most: Counter[str] = Counter()

    async def look() -> None:
        while True:
            lanes = deliverer._lanes.values()
            most["lane"] = max([most["lane"], *(lane.held for lane in lanes)])
            most["held"] = max(most["held"], deliverer._held)
            most["bytes"] = max(most["bytes"], deliverer._held_bytes)
            await asyncio.sleep(0)

    looking = asyncio.create_task(look())
    try:
        yield most
    finally:
        looking.cancel()


async def test_of_a_long_backlog_little_is_in_memory_and_all_of_it_arrives_once(stage: Open):
    async with stage() as s:
        await s.endpoint("/a")
        async with watched(s.deliverer) as most:
            await s.backlog({"/a": 10_000})
            await s.sink.got(10_000, "/a", timeout=60)
            await s.settled("/a", all_are(Status.DELIVERED, 10_000))
        assert 0 < most["lane"] <= lane.HELD_PER_LANE
        assert Counter(one for one, _ in s.sink.received["/a"]).most_common(1)[0][1] == 1
        assert s.sink.count("/a") == 10_000
        assert (s.deliverer._held, s.deliverer._held_bytes) == (0, 0)


@pytest.mark.parametrize("fresh", [True, False])
async def test_the_bodies_in_memory_are_bounded(stage: Open, monkeypatch: pytest.MonkeyPatch, fresh: bool):
    monkeypatch.setattr(deliver, "HELD_BYTES", 1_000_000)
    paths = [f"/{number}" for number in range(4)]
    async with stage() as s:
        for path in paths:
            await s.endpoint(path)
        async with watched(s.deliverer) as most:
            if fresh:
                await asyncio.gather(*(s.publish(path, 25, size=50_000) for path in paths))
            else:
                await s.backlog(dict.fromkeys(paths, 25), size=50_000)
            await s.sink.got(100)
        assert 0 < most["bytes"] <= 1_100_000


async def test_the_deliveries_in_memory_are_bounded(stage: Open, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(deliver, "HELD", 100)
    paths = [f"/{number}" for number in range(20)]
    async with stage() as s:
        for path in paths:
            await s.endpoint(path)
        async with watched(s.deliverer) as most:
            await s.backlog(dict.fromkeys(paths[:10], 50))
            await asyncio.gather(*(s.publish(path, 50) for path in paths[10:]))
            await s.sink.got(1_000)
        # What is claimed while something is handed over may come on top.
        assert 50 < most["held"] <= 200


# The breaker.


async def test_after_five_failures_nothing_is_sent_until_the_pause_is_over_then_one_then_the_rest(
    stage: Open,
):
    async with stage(endpoint_concurrency=1, schedule=["1s"] * 5) as s:
        for path in ("/ill", "/well"):
            await s.endpoint(path)
        s.sink.answers["/ill"] = Response(status_code=500)
        await s.publish("/ill", 20)
        await s.sink.got(5, "/ill")
        await s.settled("/ill", lambda found: all(one.status is Status.PENDING for one in found))
        s.clock.forward(seconds=25)
        await s.backlog({"/well": 50})
        await s.sink.got(50, "/well")
        assert s.sink.count("/ill") == 5

        gate = s.sink.shut("/ill")
        s.clock.forward(seconds=12)
        await s.sink.got(6, "/ill")
        await s.backlog({"/well": 50})
        await s.sink.got(100, "/well")
        assert s.sink.count("/ill") == 6

        s.sink.answers["/ill"] = Response(status_code=204)
        gate.set()
        await s.settled("/ill", all_are(Status.DELIVERED, 20))
        for attempts in await s.attempts("/ill"):
            assert [one.number for one in attempts] == list(range(1, len(attempts) + 1))
        assert sum(map(len, await s.attempts("/ill"))) == s.sink.count("/ill") == 5 + 20


async def test_a_failed_probe_pauses_for_longer(stage: Open):
    async with stage(endpoint_concurrency=1) as s:
        for path in ("/ill", "/well"):
            await s.endpoint(path)
        s.sink.answers["/ill"] = Response(status_code=500)
        await s.publish("/ill", 20)
        await s.sink.got(5, "/ill")
        # Pauses of 30 to 36, 60 to 72, and 120 to 144 seconds: before the end of each nothing is sent.
        for number, (before, then) in enumerate([(25, 12), (55, 20), (115, 35)], start=6):
            await s.settled("/ill", lambda found: Status.SENDING not in {one.status for one in found})
            s.clock.forward(seconds=before)
            await s.backlog({"/well": 20})
            await s.settled("/well", all_are(Status.DELIVERED, 20 * (number - 5)))
            assert s.sink.count("/ill") == number - 1
            s.clock.forward(seconds=then)
            await s.sink.got(number, "/ill")
        assert s.sink.count("/ill") == 8


async def test_it_opens_for_that_endpoint_also_when_every_slot_is_taken(stage: Open):
    async with stage(concurrency=1) as s:
        for path in ("/ill", "/well"):
            await s.endpoint(path)
        s.sink.answers["/ill"] = Response(status_code=500)
        await s.backlog({"/ill": 20, "/well": 30})
        await s.settled("/well", all_are(Status.DELIVERED, 30))
        assert s.sink.count("/ill") == 5


# Throttling.


@pytest.mark.parametrize("status", [429, 503, 500])
@pytest.mark.parametrize("form", ["seconds", "date"])
async def test_retry_after_pauses_the_other_deliveries_of_the_endpoint_too(
    stage: Open, status: int, form: str
):
    async with stage(endpoint_concurrency=1) as s:
        for path in ("/busy", "/well"):
            await s.endpoint(path)
        at = formatdate(s.clock() / 1000 + 120, usegmt=True)
        told = {"retry-after": {"seconds": "120", "date": at}[form]}
        s.sink.answers["/busy"] = Response(status_code=status, headers=told)
        await s.publish("/busy", 10)
        await s.settled("/busy", lambda found: sum(one.attempts for one in found) == 1)
        s.clock.forward(seconds=115)
        await s.backlog({"/well": 50})
        await s.sink.got(50, "/well")
        assert s.sink.count("/busy") == 1
        s.sink.answers["/busy"] = Response(status_code=204)
        s.clock.forward(seconds=10)
        await s.sink.got(10, "/busy")


@pytest.mark.parametrize(("status", "pauses"), [(429, True), (503, True), (500, False), (404, False)])
async def test_a_retry_after_that_is_nonsense_is_as_good_as_none(stage: Open, status: int, pauses: bool):
    async with stage(endpoint_concurrency=1) as s:
        await s.endpoint("/busy")
        s.sink.answers["/busy"] = Response(status_code=status, headers={"retry-after": NONSENSE})
        await s.publish("/busy", 2)
        await s.sink.got(2, "/busy")
        first, second = (at for _, at in s.sink.received["/busy"])
        assert (second - first >= 0.9) is pauses


async def test_a_rate_limit_is_kept_and_slows_nobody_else(stage: Open):
    async with stage() as s:
        await s.endpoint("/limited", rate_limit=20)
        await s.endpoint("/free")
        begun = time.monotonic()
        await s.publish("/limited", 40)
        await s.publish("/free", 200)
        await s.sink.got(200, "/free")
        freed = time.monotonic() - begun
        await s.sink.got(40, "/limited")
        times = [at for _, at in s.sink.received["/limited"]]
        assert 1.9 <= times[-1] - times[0] < 4
        assert freed < 1.5
        # Evenly, not in bursts.
        assert all(later - at > 0.35 for at, later in zip(times, times[10:], strict=False))


async def test_a_rate_limit_holds_for_a_backlog_and_retries_too(stage: Open):
    async with stage(schedule=["100ms"]) as s:
        await s.endpoint("/limited", rate_limit=20)
        s.sink.answers["/limited"] = Response(status_code=418)
        await s.backlog({"/limited": 20})
        await s.sink.got(40, "/limited")
        times = [at for _, at in s.sink.received["/limited"]]
        assert 1.9 <= times[-1] - times[0] < 6


# Leases.


async def test_what_waits_in_memory_for_too_long_is_sent_once_all_the_same(stage: Open):
    async with stage(endpoint_concurrency=1) as s:
        await s.endpoint("/a")
        gate = s.sink.shut("/a")
        await s.publish("/a", 5)
        await s.sink.got(1, "/a")
        s.clock.forward(seconds=60)
        await s.deliverer.tick()  # now they are claimed anew
        gate.set()
        found = await s.settled("/a", all_are(Status.DELIVERED, 5))
        times = Counter(one for one, _ in s.sink.received["/a"])
        # The one in flight may be attempted again: that is what a lease is for.
        assert times.pop(found[0].event_id) <= 2
        assert times == dict.fromkeys((one.event_id for one in found[1:]), 1)
        assert {one.attempts for one in found[1:]} == {1}


async def test_a_rate_limit_is_not_spent_on_leases_that_ran_out(stage: Open):
    async with stage() as s:
        await s.endpoint("/a", rate_limit=20)
        await s.publish("/a", 100)
        await s.sink.got(1, "/a")
        begun = time.monotonic()
        s.clock.forward(seconds=60)
        await s.sink.got(100, "/a")
        assert time.monotonic() - begun < 7.5
        assert len({one for one, _ in s.sink.received["/a"]}) == 100
        assert s.sink.count("/a") <= 101


async def test_a_lease_that_ran_out_is_claimed_again(stage: Open):
    async with stage() as s:
        await s.endpoint("/a")
        lost = Handoff("somebody", s.clock() + 45_000, takes=lambda destination, size: True)
        claimed: Sequence[Claimed]
        _, claimed = await s.relay.store.events.publish([s._publication("/a", 5)], lost, now=s.clock())
        assert [one.lease for one in claimed] == ["somebody"] * 5
        await s.publish("/a", 5)
        await s.sink.got(5, "/a")
        s.clock.forward(seconds=44)
        await s.publish("/a", 5)
        await s.sink.got(10, "/a")
        await s.deliverer.tick()
        assert s.sink.count("/a") == 10
        s.clock.forward(seconds=2)
        await s.settled("/a", all_are(Status.DELIVERED, 15))
        assert s.sink.count("/a") == len({one for one, _ in s.sink.received["/a"]}) == 15


# The end.


async def test_what_is_claimed_while_it_stops_goes_back_unsent(stage: Open):
    async with stage() as s:
        await s.endpoint("/a")
        await s.backlog({"/a": 200})
        claiming = asyncio.create_task(s.deliverer.tick())
        await asyncio.sleep(0)  # it has begun
        await s.deliverer.stop()
        await claiming
        statuses = [one.status for one in await s.deliveries("/a")]
        assert statuses.count(Status.DELIVERED) == s.sink.count("/a") < 200
        assert statuses.count(Status.PENDING) == 200 - s.sink.count("/a")
        assert s.deliverer._held == 0
