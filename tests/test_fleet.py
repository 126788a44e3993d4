"""Several relays over one PostgreSQL deliver as one, whichever is asked, while they come and go."""

import asyncio
import time
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from standardwebhooks import Webhook, WebhookVerificationError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from relay.delivery import destination
from relay.shard import shard_of, share
from relay.store import Store
from relay.store.postgres import PostgreSQL
from tests.conftest import RunningRelay, World
from tests.fleet import Fleet
from tests.serving import Received, serving


@dataclass
class Busy:
    """A subscriber that keeps each request for `pause` seconds, those at /hanging until it may go on."""

    pause: float = 0.05
    origin: str = ""
    received: dict[str, list[Received]] = field(default_factory=lambda: defaultdict(list))
    times: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    at_once: Counter[str] = field(default_factory=Counter)
    most_at_once: Counter[str] = field(default_factory=Counter)
    go_on: asyncio.Event = field(default_factory=asyncio.Event)
    _news: asyncio.Condition = field(default_factory=asyncio.Condition)

    async def until(self, enough: Callable[[], bool], *, timeout: float = 20) -> None:
        async with asyncio.timeout(timeout), self._news:
            await self._news.wait_for(enough)

    async def got(self, path: str, count: int, *, timeout: float = 20) -> None:
        await self.until(lambda: len(self.times[path]) >= count, timeout=timeout)

    def ids(self, path: str) -> Counter[str]:
        return Counter(one.headers["webhook-id"] for one in self.received[path])

    async def _receive(self, request: Request) -> Response:
        path, body = request.url.path, await request.body()
        self.at_once[path] += 1
        self.most_at_once[path] = max(self.most_at_once[path], self.at_once[path])
        async with self._news:
            self.received[path].append(Received(path, dict(request.headers), body))
            self.times[path].append(time.time())
            self._news.notify_all()
        await (self.go_on.wait() if path == "/hanging" else asyncio.sleep(self.pause))
        self.at_once[path] -= 1
        return Response(status_code=204)

    @property
    def app(self) -> Starlette:
        return Starlette(routes=[Route("/{path:path}", self._receive, methods=["POST"])])


@pytest.fixture
async def busy() -> AsyncIterator[Busy]:
    subscriber = Busy()
    async with serving(subscriber.app) as subscriber.origin:
        yield subscriber
        subscriber.go_on.set()


@pytest.fixture(params=["heard", "deaf"])
def bell(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Relays that hear each other, and relays that do not: PgBouncer passes no LISTEN on."""
    if request.param == "deaf":
        make_deaf(monkeypatch)
    return str(request.param)


def make_deaf(monkeypatch: pytest.MonkeyPatch) -> None:
    @asynccontextmanager
    async def listening(database: PostgreSQL, heard: Callable[[str], None]) -> AsyncIterator[None]:
        yield

    monkeypatch.setattr(PostgreSQL, "listening", listening)


async def publish(relay: RunningRelay, count: int = 1, type_: str = "order.paid") -> list[str]:
    """The ids of new events."""
    answer = await relay.api.post("/v1/events", json=[{"type": type_, "data": {}}] * count)
    assert answer.status_code == 201, answer.text
    return [one["id"] for one in answer.json()["data"]]


async def endpoint(relay: RunningRelay, url: str, **fields: Any) -> dict[str, Any]:
    answer = await relay.api.post("/v1/endpoints", json={"url": url, "event_types": ["order.paid"], **fields})
    assert answer.status_code == 201, answer.text
    return dict(answer.json())


async def moving(relay: RunningRelay, url: str, shards: int, **fields: Any) -> str:
    """The id of an endpoint that the first relay gives away when it keeps so many shards only."""
    while True:
        one = await endpoint(relay, url, **fields)
        if shard_of(one["id"]) >= shards:
            return str(one["id"])
        await relay.api.delete(f"/v1/endpoints/{one['id']}")


async def nothing_is_open(relay: RunningRelay) -> None:
    """Returns once every delivery is over."""
    for status in ("pending", "sending"):
        await relay.eventually(f"/v1/deliveries?status={status}&limit=1", lambda page: not page["data"])


def most_within(times: Sequence[float], span: float) -> int:
    """How many there are at most in a span that begins with one of them."""
    return max(bisect_left(times, at + span) - place for place, at in enumerate(times))


async def test_what_any_relay_takes_is_delivered_once(world: World, fleet: Fleet, bell: str):
    relays = await fleet.joined(3)
    for number in range(9):
        await world.endpoint(relays[number % 3], f"/{number}", event_types=["order.paid"])
    made = [one for number in range(12) for one in await publish(relays[number % 3], 5)]
    await world.subscriber.got(60 * 9)
    await nothing_is_open(relays[0])
    got = Counter((one.path, one.headers["webhook-id"]) for one in world.subscriber.received)
    assert got == {(f"/{number}", one): 1 for number in range(9) for one in made}


async def test_the_limits_of_an_endpoint_hold_for_all_while_relays_come_and_go(fleet: Fleet, busy: Busy):
    fleet.changes = {"delivery": {"timeout": "5s", "endpoint_concurrency": 3}}
    [first] = await fleet.joined(1)

    narrow = await moving(first, f"{busy.origin}/narrow", share(3))
    steady = await moving(first, f"{busy.origin}/steady", share(3), rate_limit=10)
    made = await publish(first, 20)
    await busy.got("/steady", 3)
    for _ in range(2):
        made += await publish(await fleet.join(), 5)
    for relay in fleet.relays:
        made += await publish(relay, 5)
    await fleet.settled()
    assert first not in (await fleet.holder(narrow), await fleet.holder(steady))
    for moved in (narrow, steady):
        if (relay := await fleet.holder(moved)) is not first:
            leaving = asyncio.create_task(fleet.leave(relay))
            made += await publish(first, 5)
            await leaving
            await fleet.settled()
    await busy.until(lambda: len(busy.ids("/steady")) == len(made) and len(busy.ids("/narrow")) == len(made))
    await nothing_is_open(first)
    assert busy.ids("/narrow") == busy.ids("/steady") == dict.fromkeys(made, 1)
    assert busy.most_at_once["/narrow"] == 3
    assert most_within(busy.times["/steady"], 1.0) <= 12


async def test_an_endpoint_that_fails_is_left_alone_by_all(world: World, fleet: Fleet):
    fleet.changes = {"delivery": {"timeout": "5s", "endpoint_concurrency": 1}}
    relays = await fleet.joined(3)
    world.subscriber.answer(500, path="/broken")
    await world.endpoint(relays[0], "/broken", event_types=["order.paid"])
    await world.endpoint(relays[1], "/well", event_types=["order.paid"])
    for relay in relays:
        await publish(relay, 5)
    await world.subscriber.got(5, path="/broken")
    for relay in relays:
        await publish(relay, 5)
    await world.subscriber.got(30, path="/well")
    assert len(await world.subscriber.got(5, path="/broken")) == 5


async def test_a_change_of_an_endpoint_reaches_the_relay_that_sends_to_it(
    fleet: Fleet, busy: Busy, bell: str
):
    relays = await fleet.joined(3)
    paths = ("/moved", "/disabled", "/deleted", "/rotated")
    # What a relay holds in hand is what it sends within two seconds.
    made = {path: await endpoint(relays[0], busy.origin + path, rate_limit=5) for path in paths}
    ids = await publish(relays[1])
    for path in paths:
        await busy.got(path, 1)
    await nothing_is_open(relays[0])
    ids += await publish(relays[1], 20)
    for path in paths:
        await busy.got(path, 3)
    changed, old = dict[str, float](), {path: made[path]["id"] for path in paths}
    asked = {
        "/moved": ("PATCH", "", {"url": f"{busy.origin}/new"}),
        "/disabled": ("POST", "/disable", None),
        "/deleted": ("DELETE", "", None),
        "/rotated": ("POST", "/secret/rotate", {"overlap_seconds": 0}),
    }
    answers = {}
    for path, (method, action, body) in asked.items():
        other = (await fleet.others(old[path]))[0]
        answers[path] = await other.api.request(method, f"/v1/endpoints/{old[path]}{action}", json=body)
        assert answers[path].is_success, answers[path].text
        changed[path] = time.time()
    await nothing_is_open(relays[2])
    patience = 1.0 if bell == "heard" else 3.5
    for path in ("/moved", "/disabled", "/deleted"):
        assert max(busy.times[path]) < changed[path] + patience, path
    assert sorted([*busy.ids("/moved").elements(), *busy.ids("/new").elements()]) == sorted(ids)
    assert len(busy.times["/new"]) >= 5
    assert busy.ids("/rotated") == dict.fromkeys(ids, 1)
    secret = answers["/rotated"].json()["secret"]
    for at, one in zip(busy.times["/rotated"], busy.received["/rotated"], strict=True):
        if at >= changed["/rotated"] + patience:
            Webhook(secret).verify(one.body, one.headers)
        elif at < changed["/rotated"] - 1:
            with pytest.raises(WebhookVerificationError):
                Webhook(secret).verify(one.body, one.headers)


async def test_a_rotated_signing_secret_reaches_the_relay_that_sends_to_a_callback_url(
    world: World, fleet: Fleet, busy: Busy
):
    relays = await fleet.joined(2, delivery={"timeout": "15s", "endpoint_concurrency": 1})
    url = f"{busy.origin}/hanging"
    for _ in range(3):
        body = {"account": "luma", "job_id": world.simulator.submit("luma", duration=0), "callback_url": url}
        assert (await relays[0].api.post("/v1/generations", json=body)).status_code == 201
    await busy.got("/hanging", 1)
    await fleet.eventually("SELECT COUNT(*) AS n FROM deliveries WHERE status = 'sending'", 3)
    leases = {row["lease"] for row in await fleet.rows("SELECT lease FROM deliveries")}
    other = (await fleet.others(destination("default", None, url)))[0]
    answer = await other.api.post("/v1/signing-secret/rotate", json={"overlap_seconds": 0})
    # All but the one that is under way are read anew.
    as_before = "SELECT COUNT(*) AS n FROM deliveries WHERE lease IN (:leases)"
    await fleet.eventually(as_before, 1, leases=sorted(leases))
    busy.go_on.set()
    await busy.got("/hanging", 3)
    for one in busy.received["/hanging"][1:]:
        Webhook(answer.json()["secret"]).verify(one.body, one.headers)


async def test_replays_and_test_events_go_out_at_once_through_any_relay(
    world: World, fleet: Fleet, bell: str
):
    relays = await fleet.joined(3)
    mine = await world.endpoint(relays[0], event_types=["order.paid"])
    await publish(relays[0])
    await world.subscriber.got(1)
    page = await relays[1].eventually(
        "/v1/deliveries", lambda page: [one["status"] for one in page["data"]] == ["delivered"]
    )
    path = f"/v1/deliveries/{page['data'][0]['id']}"
    for count, relay in enumerate(relays, start=1):
        await relay.eventually(path, lambda one: one["status"] == "delivered")
        begun = time.monotonic()
        answer = await relay.api.post(f"{path}/replay")
        assert answer.status_code == 202, answer.text
        await world.subscriber.got(2 * count)
        answer = await relay.api.post(f"/v1/endpoints/{mine['id']}/test")
        assert answer.status_code == 202, answer.text
        await world.subscriber.got(2 * count + 1)
        assert time.monotonic() - begun < 3


async def test_of_replays_through_all_relays_at_once_one_is_taken(world: World, fleet: Fleet):
    relays = await fleet.joined(3)
    await world.endpoint(relays[0], event_types=["order.paid"])
    await publish(relays[0], 8)
    await world.subscriber.got(8)
    await nothing_is_open(relays[0])
    world.subscriber.received.clear()
    for one in (await relays[0].api.get("/v1/deliveries")).json()["data"]:
        path = f"/v1/deliveries/{one['id']}/replay"
        answers = await asyncio.gather(*(relay.api.post(path) for relay in relays))
        taken = [answer.status_code for answer in answers].count(202)
        assert taken >= 1
        await nothing_is_open(relays[0])
        assert len(world.subscriber.received) == taken
        world.subscriber.received.clear()


async def test_what_is_recorded_while_its_endpoint_is_being_disabled_is_canceled(fleet: Fleet, busy: Busy):
    stays, other = await fleet.joined(2)
    mine = await moving(stays, f"{busy.origin}/a", share(2))
    async with fleet.database.write() as tx:
        await tx.execute(
            "CREATE FUNCTION hold() RETURNS trigger LANGUAGE plpgsql AS"
            " 'BEGIN PERFORM pg_advisory_xact_lock_shared(1); RETURN NEW; END'"
        )
        await tx.execute(
            "CREATE TRIGGER held BEFORE INSERT ON deliveries FOR EACH ROW EXECUTE FUNCTION hold()"
        )
    async with fleet.database.write() as tx:
        await tx.execute("SELECT pg_advisory_xact_lock(1)")
        publishing = asyncio.create_task(publish(stays))
        waiting = "SELECT COUNT(*) AS n FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
        await fleet.eventually(waiting, 1)
        assert (await other.api.post(f"/v1/endpoints/{mine}/disable")).status_code == 200
    await publishing
    await nothing_is_open(stays)
    [delivery] = (await stays.api.get("/v1/deliveries")).json()["data"]
    assert (delivery["status"], busy.times["/a"]) == ("canceled", [])


async def test_a_relay_that_stops_hands_over_at_once_what_does_not_hang(fleet: Fleet, busy: Busy):
    fleet.changes = {"delivery": {"timeout": "15s"}}
    stays, stops = await fleet.joined(2)
    hanging = await moving(stays, f"{busy.origin}/hanging", share(2), event_types=["order.hanging"])
    while shard_of(other := await moving(stays, f"{busy.origin}/other", share(2))) == shard_of(hanging):
        await stays.api.delete(f"/v1/endpoints/{other}")
    await publish(stays, type_="order.hanging")
    await busy.got("/hanging", 1)
    stopping = asyncio.create_task(fleet.leave(stops))
    async with asyncio.timeout(8):
        while await fleet.holder(other) is not stays:  # noqa: ASYNC110 # nobody tells when
            await asyncio.sleep(0.02)
    await publish(stays)
    await busy.got("/other", 1)
    assert not stopping.done()
    busy.go_on.set()
    await stopping
    await nothing_is_open(stays)
    assert (len(busy.times["/hanging"]), len(busy.times["/other"])) == (1, 1)


async def test_nothing_is_sent_twice_while_relays_are_replaced(fleet: Fleet, busy: Busy):
    busy.pause, made = 0.01, []
    await fleet.joined(2)
    for number in range(6):
        await endpoint(fleet.relays[0], f"{busy.origin}/{number}")

    async def load(relay: RunningRelay) -> None:
        while not enough.is_set():
            made.extend(await publish(relay, 5))

    for _ in range(2):
        enough = asyncio.Event()
        loading = asyncio.create_task(load(fleet.relays[1]))
        await fleet.join()
        await fleet.settled()
        await fleet.leave(fleet.relays[0])
        await fleet.settled()
        enough.set()
        await loading
    await nothing_is_open(fleet.relays[0])
    for number in range(6):
        assert busy.ids(f"/{number}") == dict.fromkeys(made, 1)


async def test_what_is_sent_is_written_before_another_relay_takes_its_shard(fleet: Fleet, busy: Busy):
    [first] = await fleet.joined(1)
    mine = await moving(first, f"{busy.origin}/a", share(2))
    async with fleet.database.write() as tx:
        # No outcome can be written.
        await tx.execute("LOCK TABLE attempts IN EXCLUSIVE MODE")
        await publish(first)
        await busy.got("/a", 1)
        second = await fleet.join()
        held = "SELECT COUNT(*) AS n FROM shards WHERE holder = :holder"
        await fleet.eventually(held, share(2) - 1, holder=fleet.name(second))
        assert await fleet.holder(mine) is first
    await fleet.settled()
    await nothing_is_open(first)
    assert await fleet.holder(mine) is second
    assert len(busy.times["/a"]) == 1


async def test_one_relay_at_a_time_removes_what_is_old(fleet: Fleet, monkeypatch: pytest.MonkeyPatch):
    pruned: list[Store] = []

    async def noted(store: Store, **arguments: Any) -> int:
        pruned.append(store)
        return 0

    monkeypatch.setattr("relay.prune.prune", noted)
    monkeypatch.setattr("relay.app.PRUNE_TICK", 0.1)

    async def who() -> int:
        """Whoever does it now, alone."""
        pruned.clear()
        async with asyncio.timeout(10):
            while len(pruned) < 5:  # noqa: ASYNC110 # nobody tells when
                await asyncio.sleep(0.02)
        [found] = set(map(id, pruned))
        return found

    await fleet.joined(3)
    before = await who()
    await fleet.leave(await fleet.holder("retention"))
    await fleet.settled()
    assert await who() != before
