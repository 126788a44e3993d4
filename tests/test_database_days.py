"""The database's bad days: what a relay answers and keeps meanwhile, and how it finds back by itself."""

import asyncio
import json
import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import asyncpg
import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from relay.errors import StoreError
from relay.key import new_key
from relay.store import open_database
from relay.store.migrate import migrate
from relay.web.operations import OPERATIONS
from tests.conftest import RunningRelay, World
from tests.postgres import Cluster, pooler
from tests.serving import serving, until
from tests.test_stop import listening, started
from tests.test_vivix_callbacks import body_of, signature

SOON = 10  # seconds within which a relay has found back, on a machine that has much else to do
# What is answered without a look into it: the account of the example is one of the configuration.
STORELESS = {"GET /v1/accounts": 200}
ORDER = {"type": "order.paid", "data": {}}


@dataclass
class Receiver:
    """A subscriber whose requests wait for `go_on`; `received` are the webhook-ids, as they came."""

    received: list[str] = field(default_factory=list)
    go_on: asyncio.Event = field(default_factory=asyncio.Event)
    origin: str = ""
    _news: asyncio.Condition = field(default_factory=asyncio.Condition)

    async def until(self, enough: Callable[[Sequence[str]], bool], *, timeout: float = 30) -> None:
        async with asyncio.timeout(timeout), self._news:
            await self._news.wait_for(lambda: enough(self.received))

    async def _receive(self, request: Request) -> Response:
        await request.body()
        async with self._news:
            self.received.append(request.headers["webhook-id"])
            self._news.notify_all()
        await self.go_on.wait()
        return Response(status_code=204)

    @property
    def app(self) -> Starlette:
        return Starlette(routes=[Route("/{path:path}", self._receive, methods=["POST"])])


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    receiver = Receiver()
    async with serving(receiver.app) as receiver.origin:
        yield receiver
        receiver.go_on.set()


@pytest.fixture
async def relay(world: World, server: Cluster) -> RunningRelay:
    return await world.relay(database=server.database(), delivery={"timeout": "10s"})


async def listen(relay: RunningRelay, receiver: Receiver) -> None:
    asked = {"url": receiver.origin, "event_types": ["order.paid"]}
    assert (await relay.api.post("/v1/endpoints", json=asked)).status_code == 201


async def publish(relay: RunningRelay, count: int = 1) -> list[str]:
    """The ids of events that were acknowledged."""
    answer = await relay.api.post("/v1/events", json=[ORDER] * count)
    assert answer.status_code == 201, answer.text
    return [one["id"] for one in answer.json()["data"]]


async def publish_once_possible(relay: RunningRelay) -> list[str]:
    """The same, asked again until it is acknowledged, which must be soon."""
    async with asyncio.timeout(SOON):
        while True:
            answer = await relay.api.post("/v1/events", json=[ORDER])
            if answer.status_code == 201:
                return [one["id"] for one in answer.json()["data"]]
            refused(answer)
            await asyncio.sleep(0.05)


def refused(answer: httpx.Response) -> None:
    assert answer.status_code == 503, answer.text
    assert int(answer.headers["retry-after"]) > 0
    assert answer.headers["content-type"] == "application/problem+json"
    assert "Traceback" not in answer.text


async def until_not_ready(relay: RunningRelay) -> None:
    async with asyncio.timeout(SOON):
        while True:
            if (await relay.api.get("/readyz")).status_code == 503:
                return
            await asyncio.sleep(0.02)


async def delivered(relay: RunningRelay, count: int) -> list[dict[str, Any]]:
    """All deliveries, once so many are delivered."""
    found = await relay.eventually(
        "/v1/deliveries?status=delivered&limit=200", lambda page: len(page["data"]) >= count, timeout=30
    )
    return list(found["data"])


async def stop(server: Cluster, mode: str = "fast") -> None:
    await asyncio.to_thread(server.kill if mode == "kill" else lambda: server.stop(mode))


async def start(server: Cluster) -> None:
    await asyncio.to_thread(server.start)


@asynccontextmanager
async def down(server: Cluster) -> AsyncIterator[None]:
    await stop(server)
    yield
    await start(server)


# What is answered meanwhile.


async def test_without_a_database_everything_that_needs_one_is_answered_503(
    world: World, relay: RunningRelay, server: Cluster
):
    waiting = (await relay.api.post("/v1/generations", json={"account": "pictory"})).json()
    hook = httpx.URL(waiting["webhook_url"]).path
    async with down(server):
        for operation in OPERATIONS:
            path = operation.path.format(id="gen_1", name="studio", type="order.shipped")
            answer = await relay.api.request(
                operation.method, path, json=dict(operation.example) if operation.body else None
            )
            if status := STORELESS.get(f"{operation.method} {operation.path}"):
                assert answer.status_code == status
            else:
                refused(answer)
        refused(await relay.api.post(hook, json={"job_id": "job-1"}))
        refused(await relay.api.get("/v1/events", headers={"authorization": f"Bearer {new_key(0)[1]}"}))
        ready = await relay.api.get("/readyz")
        assert ready.status_code == 503
        # Anybody may ask: no name, no user, no address.
        assert ready.json()["checks"]["database"] == "the database gave no connection"
        assert (await relay.api.get("/healthz")).status_code == 200
    await relay.eventually("/readyz", lambda said: said["status"] == "ok", timeout=SOON)
    assert (await relay.api.post(hook, json={"job_id": "job-1"})).status_code == 200


async def test_a_signed_callback_is_not_acknowledged_either(world: World, server: Cluster):
    accounts = world.document()["accounts"]
    accounts["vivix"]["webhook_secret"] = "of-the-webhook"
    relay = await world.relay(database=server.database(), accounts=accounts)
    generation = await world.watch(relay, "vivix", duration=600)
    body = body_of(generation["job_id"])
    signed = signature(body, "of-the-webhook")
    async with down(server):
        refused(await relay.api.post("/hooks/vivix", content=body, headers=signed))
    await relay.eventually("/readyz", lambda said: said["status"] == "ok", timeout=SOON)
    assert (await relay.api.post("/hooks/vivix", content=body, headers=signed)).status_code == 200


async def test_the_log_says_once_that_it_began_and_once_that_it_is_over(
    relay: RunningRelay, server: Cluster, caplog: pytest.LogCaptureFixture
):
    def said(line: str) -> Counter[str]:
        return Counter(one.tick for one in caplog.records if one.message == line)  # type: ignore[attr-defined]

    async with down(server):
        await until(lambda: len(said("store.unavailable")) == 4)
        for _ in range(5):
            await relay.api.get("/readyz")
        await asyncio.sleep(2)  # eight beats of every tick
    await until(lambda: len(said("store.available")) == 4, timeout=SOON)
    assert said("store.unavailable") == said("store.available")
    assert said("store.available") == {"poll": 1, "deliver": 1, "replay": 1, "hold": 1}
    ours = [one for one in caplog.records if one.name.startswith("relay.") and one.levelno >= logging.WARNING]
    assert len(ours) == 8
    assert not any(one.exc_info for one in caplog.records)


# What is kept meanwhile.


async def test_an_attempt_whose_outcome_cannot_be_written_is_kept_and_not_repeated(
    relay: RunningRelay, server: Cluster, receiver: Receiver
):
    await listen(relay, receiver)
    [event] = await publish(relay)
    await receiver.until(lambda received: len(received) == 1)
    async with down(server):
        receiver.go_on.set()
        await asyncio.sleep(1.5)  # more than one try to write it
    [one] = await delivered(relay, 1)
    found = (await relay.api.get(f"/v1/deliveries/{one['id']}")).json()
    assert [(attempt["number"], attempt["response_status"]) for attempt in found["attempts"]] == [(1, 204)]
    assert receiver.received == [event]


async def test_nothing_more_is_sent_while_outcomes_cannot_be_written(
    world: World, server: Cluster, receiver: Receiver
):
    relay = await world.relay(
        database=server.database(), delivery={"timeout": "10s", "endpoint_concurrency": 4}
    )
    await listen(relay, receiver)
    receiver.go_on.set()
    await publish(relay, 5)
    await delivered(relay, 5)  # it is known to be well, and gets all its slots
    receiver.go_on.clear()
    events = await publish(relay, 100)
    await receiver.until(lambda received: len(received) == 5 + 4)
    async with down(server):
        receiver.go_on.set()
        await asyncio.sleep(1)
        assert len(receiver.received) <= 5 + 2 * 4
    await delivered(relay, 105)
    assert Counter(receiver.received[5:]) == dict.fromkeys(events, 1)


async def test_an_answer_that_cannot_be_recorded_is_kept_and_not_asked_for_again(
    world: World, server: Cluster, receiver: Receiver
):
    asked, go_on = [], asyncio.Event()

    async def answer(request: Request) -> Response:
        asked.append(request.url.path)
        await go_on.wait()
        return JSONResponse({"id": "job-1", "state": "failed", "failure_reason": "no"})

    async with serving(Starlette(routes=[Route("/{path:path}", answer)])) as provider:
        account = {"provider": "luma", "api_key": "key", "base_url": provider, "poll_interval": "100ms"}
        relay = await world.relay(database=server.database(), accounts={"luma": account})
        await world.endpoint(relay)
        watched = await relay.api.post("/v1/generations", json={"account": "luma", "job_id": "job-1"})
        assert watched.status_code == 201
        await until(lambda: len(asked) > 0)
        async with down(server):
            go_on.set()
            await asyncio.sleep(1)
        [received] = await world.subscriber.got(1)
        assert json.loads(received.body)["type"] == "generation.failed"
        assert len(asked) == 1


@pytest.mark.parametrize("mode", ["fast", "immediate", "kill"])
async def test_what_was_acknowledged_is_delivered_however_the_server_restarts(
    world: World, relay: RunningRelay, server: Cluster, receiver: Receiver, mode: str
):
    await listen(relay, receiver)
    receiver.go_on.set()
    acknowledged: list[str] = []

    async def load() -> None:
        while True:
            answer = await relay.api.post("/v1/events", json=[ORDER] * 5)
            if answer.status_code == 201:
                acknowledged.extend(one["id"] for one in answer.json()["data"])
            else:
                refused(answer)
                await asyncio.sleep(0.05)

    loads = [asyncio.create_task(load()) for _ in range(3)]
    try:
        for _ in range(3):
            least = len(receiver.received) + 30
            await until(lambda least=least: len(receiver.received) > least)
            await stop(server, mode)
            await start(server)
            least = len(acknowledged)
            await until(lambda least=least: len(acknowledged) > least, timeout=SOON)
    finally:
        for task in loads:
            task.cancel()
        ended = await asyncio.gather(*loads, return_exceptions=True)
    assert {type(one) for one in ended} == {asyncio.CancelledError}, ended
    # What was being claimed at that very moment comes due again when its lease is over.
    await asyncio.sleep(1)
    world.clock.forward(seconds=60)
    await receiver.until(lambda received: set(acknowledged) <= set(received))
    for status in ("pending", "sending"):
        await relay.eventually(f"/v1/deliveries?status={status}", lambda page: page["data"] == [])
    if mode == "fast":
        assert max(Counter(receiver.received).values()) == 1


async def test_a_relay_stops_in_time_without_its_database(
    tmp_path: Path, server: Cluster, receiver: Receiver
):
    async with started(tmp_path, database=server.database()) as program:
        await listening(program)
        async with program.api() as api:
            asked = {"url": receiver.origin, "event_types": ["order.paid"]}
            assert (await api.post("/v1/endpoints", json=asked)).status_code == 201
            assert (await api.post("/v1/events", json=[ORDER] * 30)).status_code == 201
            await receiver.until(lambda received: len(received) > 1)
            await stop(server)
            receiver.go_on.set()
            code, seconds = await program.stop()
        assert code == 0
        assert seconds < 20


# Days that are bad in other ways.


async def test_a_lock_of_somebody_else_costs_answers_and_no_connections(
    world: World, server: Cluster, receiver: Receiver
):
    database = server.database()
    relay = await world.relay(database=f"{database}?command_timeout=500ms&pool_size=4")
    await listen(relay, receiver)
    receiver.go_on.set()
    other = await asyncpg.connect(database)
    async with other.transaction():
        await other.execute("LOCK TABLE deliveries IN ACCESS EXCLUSIVE MODE")
        async with asyncio.timeout(SOON):
            answers = await asyncio.gather(*(relay.api.post("/v1/events", json=ORDER) for _ in range(10)))
        for answer in answers:
            refused(answer)
        ours = "SELECT COUNT(*) FROM pg_stat_activity WHERE application_name = 'relay'"
        assert int(server.query(ours)) <= 4 + 1  # one listens
    await other.close()
    [event] = await publish_once_possible(relay)
    await receiver.until(lambda received: received == [event], timeout=SOON)


async def test_others_who_have_all_connections_do_not_stop_a_relay_that_has_one(
    world: World, server: Cluster, receiver: Receiver
):
    server.stop()
    server.settings = {"max_connections": "12", "max_wal_senders": "0"}
    server.start()
    url = server.database()
    relay = await world.relay(database=url)
    await listen(relay, receiver)
    receiver.go_on.set()
    await publish(relay)
    others = []
    with suppress(asyncpg.TooManyConnectionsError):
        while True:
            others.append(await asyncpg.connect(url))
    try:
        refusal = "too many clients already"
        with pytest.raises(asyncpg.TooManyConnectionsError, match=refusal):
            await asyncpg.connect(url)
        answers = await asyncio.gather(*(publish(relay) for _ in range(30)))
        await receiver.until(lambda received: len(received) == 31)
        assert {one[0] for one in answers} <= set(receiver.received)
        # Whoever starts now waits for a place.
        opening = asyncio.create_task(open_database(url, patience=30))
        await asyncio.wait([opening], timeout=1)
        assert not opening.done()
    finally:
        for one in others:
            await one.close()
    await (await opening).close()


async def test_a_server_that_only_reads_is_answered_503_until_it_writes_again(
    relay: RunningRelay, server: Cluster, receiver: Receiver
):
    await listen(relay, receiver)
    receiver.go_on.set()
    [event] = await publish(relay)
    server.set(default_transaction_read_only="on")
    await until_not_ready(relay)
    refused(await relay.api.post("/v1/events", json=ORDER))
    assert (await relay.api.get(f"/v1/events/{event}")).status_code == 200
    server.set()  # which writes no table
    [another] = await publish_once_possible(relay)
    await receiver.until(lambda received: another in received, timeout=SOON)
    assert Counter(receiver.received) == {event: 1, another: 1}


@pytest.mark.parametrize("how", ["killed", "made read-only"])
async def test_after_a_failover_the_new_primary_is_found_and_has_everything(
    world: World, server: Cluster, receiver: Receiver, how: str
):
    with server.standby() as standby:
        database = server.database()
        both = database.replace("@", f"@127.0.0.1:{standby.port},")
        relay = await world.relay(database=both, delivery={"timeout": "10s"})
        await listen(relay, receiver)
        acknowledged = await publish(relay, 20)
        await receiver.until(lambda received: len(received) > 0)
        if how == "killed":
            await stop(server, "kill")
        else:
            server.set(default_transaction_read_only="on")
        receiver.go_on.set()
        await asyncio.to_thread(standby.promote)
        acknowledged += await publish_once_possible(relay)
        # The first one that was refused, or that came to the new one, has made all others useless.
        for _ in range(10):
            acknowledged += await publish(relay)
        await receiver.until(lambda received: set(acknowledged) <= set(received))
        found = await delivered(relay, 31)
        assert {one["event_id"] for one in found} == set(acknowledged)
        assert Counter(receiver.received) == dict.fromkeys(acknowledged, 1)
        name = database.rsplit("/", 1)[1]
        assert standby.query("SELECT COUNT(*) FROM events", name) == "31"


# PgBouncer.


@pytest.mark.usefixtures("pooled")
async def test_a_relay_works_behind_pgbouncer_in_transaction_mode(
    world: World, server: Cluster, receiver: Receiver
):
    with pooler(server) as port:
        name = server.database(template=None).rsplit("/", 1)[1]
        url = f"postgresql://relay@127.0.0.1:{port}/{name}?statement_cache_size=0"
        databases = [await open_database(url) for _ in range(3)]
        applied = await asyncio.gather(*(migrate(one, now=0) for one in databases))
        assert sorted(applied) == [[], [], ["0001_start"]]
        for one in databases:
            await one.close()
        relay = await world.relay(database=url)
        await listen(relay, receiver)
        receiver.go_on.set()
        await world.endpoint(relay)
        await asyncio.gather(*(world.watch(relay, "luma") for _ in range(10)))
        events = [
            event for one in await asyncio.gather(*(publish(relay, 20) for _ in range(10))) for event in one
        ]
        await receiver.until(lambda received: len(received) >= 200)
        assert len(await world.subscriber.got(10)) == 10
        async with down(server):
            refused(await relay.api.post("/v1/events", json=ORDER))
        events += await publish_once_possible(relay)
        await receiver.until(lambda received: len(received) >= 201)
        assert Counter(receiver.received) == dict.fromkeys(events, 1)


@pytest.mark.usefixtures("pooled")
async def test_a_pgbouncer_that_forgets_statements_is_explained(server: Cluster):
    name = server.database().rsplit("/", 1)[1]
    with pooler(server, default_pool_size="2") as port:
        database = await open_database(f"postgresql://relay@127.0.0.1:{port}/{name}")

        async def work(number: int) -> None:
            async with database.write() as tx:
                await tx.fetch(f"SELECT {number} FROM tenants WHERE id = :id", id="a")  # noqa: S608

        with pytest.raises(StoreError, match="behind PgBouncer add statement_cache_size=0"):
            async with asyncio.timeout(20):
                while True:
                    await asyncio.gather(*(work(number) for number in range(4)))
        await database.close()
