"""Stopping: SIGTERM ends the program soon and cleanly, and the next one goes on where it ended."""

import asyncio
import signal
import sqlite3
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from tests.conftest import ADMIN_KEY
from tests.program import Program, drained
from tests.serving import serving

DEADLINE = 3


@dataclass
class Slow:
    """A subscriber that holds every request until it is told to go on, and those of /hanging until they are
    given up."""

    origin: str = ""
    received: list[str] = field(default_factory=list)
    go_on: asyncio.Event = field(default_factory=asyncio.Event)
    _news: asyncio.Condition = field(default_factory=asyncio.Condition)

    async def got(self, count: int) -> None:
        async with asyncio.timeout(15), self._news:
            await self._news.wait_for(lambda: len(self.received) >= count)

    async def _receive(self, request: Request) -> Response:
        await request.body()
        async with self._news:
            self.received.append(request.headers["webhook-id"])
            self._news.notify_all()
        if request.url.path == "/hanging":
            await request.receive()  # nothing more comes but that the other side has gone
        else:
            await self.go_on.wait()
        return Response(status_code=204)

    @property
    def app(self) -> Starlette:
        return Starlette(routes=[Route("/{path:path}", self._receive, methods=["POST"])])


@asynccontextmanager
async def started(directory: Path, *, database: str | None = None, **delivery: Any) -> AsyncIterator[Program]:
    program = Program.placed(directory, database, delivery={"timeout": f"{DEADLINE}s", **delivery})
    try:
        await program.start()
        yield program
    finally:
        await program.end(signal.SIGKILL)


def rows(program: Program, sql: str) -> list[Any]:
    with closing(sqlite3.connect(program.directory / "relay.db")) as database:
        return database.execute(sql).fetchall()


@pytest.fixture
async def slow() -> AsyncIterator[Slow]:
    subscriber = Slow()
    async with serving(subscriber.app) as subscriber.origin:
        yield subscriber
        subscriber.go_on.set()


async def publish(program: Program, slow: Slow, count: int, path: str = "/", **fields: Any) -> list[str]:
    """The ids of new events, for a new endpoint."""
    async with program.api(timeout=30) as api:
        asked = {"url": slow.origin + path, "event_types": ["order.paid"], **fields}
        assert (await api.post("/v1/endpoints", json=asked)).status_code == 201
        answer = await api.post("/v1/events", json=[{"type": "order.paid", "data": {}}] * count)
        assert answer.status_code == 201
        return [one["id"] for one in answer.json()["data"]]


async def listening(program: Program, *, wanted: bool = True) -> None:
    """Returns once it takes connections, or takes none."""
    port = int(program.origin.rsplit(":", 1)[1])
    async with asyncio.timeout(10):
        while True:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
            except OSError:
                listens = False
            else:
                listens = True
                writer.close()
                await writer.wait_closed()
            if listens is wanted:
                return
            await asyncio.sleep(0.01)


async def test_what_is_in_flight_is_finished_and_what_waits_is_kept(tmp_path: Path, slow: Slow):
    async with started(tmp_path) as program:
        ids = await publish(program, slow, 40, rate_limit=20)
        await slow.got(2)
        stopping = asyncio.create_task(program.stop())
        # It takes no more connections, and so knows that it shall stop.
        await listening(program, wanted=False)
        slow.go_on.set()
        code, seconds = await stopping
        assert code == 0
        assert seconds < DEADLINE + 2
        attempted = rows(
            program,
            "SELECT d.event_id, a.response_status FROM attempts a JOIN deliveries d ON d.id = a.delivery_id",
        )
        assert sorted(attempted) == sorted((one, 204) for one in slow.received)
        assert 2 <= len(attempted) < 40
        states = Counter(row[0] for row in rows(program, "SELECT status FROM deliveries"))
        assert states == {"delivered": len(attempted), "pending": 40 - len(attempted)}
    async with started(tmp_path) as program:
        async with program.api() as api:
            await drained(api)
        code, _ = await program.stop()
        assert code == 0
        assert Counter(slow.received) == dict.fromkeys(ids, 1)
        assert rows(program, "SELECT DISTINCT status, attempts FROM deliveries") == [("delivered", 1)]


async def test_what_hangs_ends_at_its_deadline_and_is_settled_as_a_failure(tmp_path: Path, slow: Slow):
    async with started(tmp_path) as program:
        await publish(program, slow, 10, "/hanging")
        await slow.got(2)
        code, seconds = await program.stop()
        assert code == 0
        assert seconds < DEADLINE + 2
        attempts = rows(program, "SELECT error_code FROM attempts")
        assert attempts == [("timeout",)] * len(slow.received)
        found = rows(program, "SELECT status, attempts FROM deliveries ORDER BY attempts")
        assert found == [("pending", 0)] * (10 - len(attempts)) + [("pending", 1)] * len(attempts)


async def test_a_request_that_waits_does_not_keep_it_from_stopping_in_time(tmp_path: Path, slow: Slow):
    async with started(tmp_path, schedule=["1s"] * 9) as program:
        await publish(program, slow, 10, "/hanging")
        await slow.got(2)
        async with waiting_request(program):
            code, seconds = await program.stop()
        assert code == 0
        assert seconds < DEADLINE + 2


@asynccontextmanager
async def waiting_request(program: Program) -> AsyncIterator[None]:
    """A request whose body never comes."""
    port = int(program.origin.rsplit(":", 1)[1])
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"POST /v1/events HTTP/1.1\r\nhost: a\r\nauthorization: Bearer {ADMIN_KEY}\r\n"
    writer.write((head + "content-type: application/json\r\ncontent-length: 100\r\n\r\n{").encode())
    await writer.drain()
    async with program.api() as api:
        assert (await api.get("/readyz")).status_code == 200  # the other one has been read by then
    try:
        yield
    finally:
        writer.transport.abort()


async def test_nothing_is_lost_or_doubled_over_many_stops_under_load(tmp_path: Path, slow: Slow):
    slow.go_on.set()
    acknowledged: list[str] = []
    for number in range(3):
        async with started(tmp_path) as program:
            if number == 0:
                await publish(program, slow, 1)

            async def load(program: Program = program) -> None:
                async with program.api(timeout=30) as api:
                    while True:
                        body = [{"type": "order.paid", "data": {}}] * 20
                        answer = await api.post("/v1/events", json=body)
                        acknowledged.extend(one["id"] for one in answer.json()["data"])
                        # Not further ahead than can be delivered in time, however slow this machine is.
                        await slow.got(len(acknowledged) - 400)

            loading = asyncio.create_task(load())
            await slow.got(len(slow.received) + 200)
            code, seconds = await program.stop()
            assert code == 0
            assert seconds < DEADLINE + 2
            loading.cancel()
            with pytest.raises((httpx.TransportError, asyncio.CancelledError)):
                await loading
    async with started(tmp_path) as program:
        async with program.api() as api:
            await drained(api)
        await program.stop()
        assert rows(program, "SELECT DISTINCT status, attempts FROM deliveries") == [("delivered", 1)]
        stored = {row[0] for row in rows(program, "SELECT id FROM events")}
    assert set(acknowledged) <= stored
    assert len(acknowledged) > 300
    assert Counter(slow.received) == dict.fromkeys(stored, 1)
