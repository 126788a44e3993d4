"""A straightforward relay to compare with: httpx, aiosqlite, a commit for every step.

It is what one writes in an afternoon, without mistakes: durable before it answers, signed, an attempt log,
64 workers that take the oldest due delivery. `python -m bench.naive PORT DATABASE`.
"""

import asyncio
import json
import sys
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiosqlite
import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from relay import signature

SCHEMA = """
    CREATE TABLE endpoints (id TEXT PRIMARY KEY, url TEXT, type TEXT, secret TEXT);
    CREATE TABLE events (id TEXT PRIMARY KEY, body BLOB, created_at REAL);
    CREATE TABLE deliveries (
        id TEXT PRIMARY KEY, event_id TEXT, endpoint_id TEXT, status TEXT, attempts INT, due_at REAL
    );
    CREATE INDEX due ON deliveries (due_at) WHERE status = 'pending';
    CREATE TABLE attempts (id TEXT PRIMARY KEY, delivery_id TEXT, status INT, at REAL, response TEXT);
"""
WORKERS = 64


class Naive:
    """One connection, one lock, one commit for every step."""

    def __init__(self, database: aiosqlite.Connection) -> None:
        self.db = database
        self.lock = asyncio.Lock()
        self.due = asyncio.Semaphore(0)

    async def add_endpoint(self, request: Request) -> Response:
        given = await request.json()
        secret = signature.new_secret()
        async with self.lock:
            for type_ in given["event_types"]:
                row = (uuid.uuid4().hex, given["url"], type_, secret)
                await self.db.execute("INSERT INTO endpoints VALUES (?, ?, ?, ?)", row)
            await self.db.commit()
        return JSONResponse({"secret": secret}, 201)

    async def publish(self, request: Request) -> Response:
        given = await request.json()
        event_id, now = uuid.uuid4().hex, time.time()
        body = json.dumps({"type": given["type"], "timestamp": now, "data": given["data"]}).encode()
        async with self.lock:
            await self.db.execute("INSERT INTO events VALUES (?, ?, ?)", (event_id, body, now))
            found = await self.db.execute_fetchall(
                "SELECT id FROM endpoints WHERE type = ?", (given["type"],)
            )
            for (endpoint_id,) in found:
                row = (uuid.uuid4().hex, event_id, endpoint_id, now)
                await self.db.execute("INSERT INTO deliveries VALUES (?, ?, ?, 'pending', 0, ?)", row)
            await self.db.commit()
        for _ in found:
            self.due.release()
        return JSONResponse({"id": event_id}, 201)

    async def work(self, client: httpx.AsyncClient) -> None:
        while True:
            await self.due.acquire()
            async with self.lock:
                rows = await self.db.execute_fetchall(
                    "UPDATE deliveries SET status = 'sending', attempts = attempts + 1 WHERE id = ("
                    "SELECT id FROM deliveries WHERE status = 'pending' AND due_at <= ?"
                    " ORDER BY due_at LIMIT 1"
                    ") RETURNING id, event_id, endpoint_id",
                    (time.time(),),
                )
                await self.db.commit()
            for delivery_id, event_id, endpoint_id in rows:
                await self.deliver(client, delivery_id, event_id, endpoint_id)

    async def deliver(
        self, client: httpx.AsyncClient, delivery_id: str, event_id: str, endpoint_id: str
    ) -> None:
        async with self.lock:
            [(body,)] = await self.db.execute_fetchall("SELECT body FROM events WHERE id = ?", (event_id,))
            [(url, secret)] = await self.db.execute_fetchall(
                "SELECT url, secret FROM endpoints WHERE id = ?", (endpoint_id,)
            )
        headers = {
            "content-type": "application/json",
            **signature.headers([secret], event_id, int(time.time()), body),
        }
        try:
            answer = await client.post(url, content=body, headers=headers)
            status, text = answer.status_code, answer.text
        except httpx.HTTPError as error:
            status, text = 0, str(error)
        good = 200 <= status <= 299
        async with self.lock:
            await self.db.execute(
                "INSERT INTO attempts VALUES (?, ?, ?, ?, ?)",
                (uuid.uuid4().hex, delivery_id, status, time.time(), text[:16384]),
            )
            await self.db.execute(
                "UPDATE deliveries SET status = ?, due_at = ? WHERE id = ?",
                ("delivered" if good else "pending", time.time() + 5, delivery_id),
            )
            await self.db.commit()


def build(path: str) -> Starlette:
    """The application; it makes its database anew."""
    running: dict[str, Naive] = {}

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with aiosqlite.connect(path) as database, httpx.AsyncClient(timeout=15) as client:
            await database.execute("PRAGMA journal_mode = WAL")
            await database.executescript(SCHEMA)
            running["it"] = Naive(database)
            workers = [asyncio.create_task(running["it"].work(client)) for _ in range(WORKERS)]
            yield
            for worker in workers:
                worker.cancel()

    async def add_endpoint(request: Request) -> Response:
        return await running["it"].add_endpoint(request)

    async def publish(request: Request) -> Response:
        return await running["it"].publish(request)

    async def ready(request: Request) -> Response:
        return Response()

    return Starlette(
        lifespan=lifespan,
        routes=[
            Route("/v1/endpoints", add_endpoint, methods=["POST"]),
            Route("/v1/events", publish, methods=["POST"]),
            Route("/readyz", ready),
        ],
    )


if __name__ == "__main__":
    uvicorn.run(build(sys.argv[2]), port=int(sys.argv[1]), log_level="warning", access_log=False)
