"""The real program, killed at any moment: what it acknowledged goes on, and is told once it is back."""

import asyncio
import random
import signal
import sqlite3
import sys
import time
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from standardwebhooks import Webhook
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from relay.simulator import Simulator
from tests.conftest import ADMIN_KEY
from tests.serving import listener, origin_of, serving

KILLS = 20
PROVIDERS = ("pixellabs", "vivix", "pictory", "luma")
IN_FLIGHT = 2.0  # seconds within which an attempt is answered and its outcome is durable, with room to spare


def seeded(seed: int) -> random.Random:
    return random.Random(seed)  # noqa: S311 # chance that can be repeated, not a secret


@dataclass
class Receiver:
    """Endpoints: `/steady` always answers 204, `/moody` now and then 500, each after `pause` seconds."""

    dice: random.Random
    pause: float = 0.0
    busy: asyncio.Event = field(default_factory=asyncio.Event)  # set once a few dozen have come
    received: dict[str, dict[str, list[float]]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(list))
    )
    messages: dict[str, list[tuple[dict[str, str], bytes]]] = field(default_factory=lambda: defaultdict(list))

    async def receive(self, request: Request) -> Response:
        body, path = await request.body(), request.url.path
        self.received[path][request.headers["webhook-id"]].append(time.monotonic())
        self.messages[path].append((dict(request.headers), body))
        if len(self.messages["/steady"]) >= 30:
            self.busy.set()
        await asyncio.sleep(self.pause)
        return Response(status_code=500 if path == "/moody" and self.dice.random() < 0.2 else 204)


@dataclass
class Program:
    """`relay serve` as a process of its own, at one address for all its lives."""

    directory: Path
    origin: str
    process: asyncio.subprocess.Process | None = None

    @property
    def api(self) -> httpx.AsyncClient:
        headers = {"authorization": f"Bearer {ADMIN_KEY}"}
        return httpx.AsyncClient(base_url=self.origin, headers=headers, timeout=5)

    async def start(self) -> None:
        """Returns once it is ready."""
        with (self.directory / "log").open("ab") as log:
            self.process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "relay", "serve", "--config", self.directory / "config.yaml", stderr=log
            )
        async with asyncio.timeout(20), self.api as api:
            while True:
                assert self.process.returncode is None, (self.directory / "log").read_text()[-3000:]
                with suppress(httpx.HTTPError):
                    if (await api.get("/readyz")).status_code == 200:
                        return
                await asyncio.sleep(0.01)

    async def end(self, how: signal.Signals, *, timeout: float = 20) -> int:
        """Its exit code."""
        assert self.process is not None
        with suppress(ProcessLookupError):
            self.process.send_signal(how)
        async with asyncio.timeout(timeout):
            return await self.process.wait()


@dataclass
class Stage:
    program: Program
    simulator: Simulator
    receiver: Receiver
    endpoints: dict[str, dict[str, Any]] = field(default_factory=dict)


@pytest.fixture
async def stage(tmp_path: Path) -> AsyncIterator[Stage]:
    receiver, simulator = Receiver(seeded(7)), Simulator(seed=7)
    hooks = Starlette(routes=[Route("/{path:path}", receiver.receive, methods=["POST"])])
    with listener() as bound:
        origin = origin_of(bound)
    async with serving(simulator.app) as providers, serving(hooks) as subscriber:
        accounts = {
            name: {
                "provider": name, "api_key": simulator.keys[name], "base_url": url, "poll_interval": "100ms",
                "requests_per_minute": 100_000,
            }
            for name, url in Simulator.base_urls(providers).items()
        }  # fmt: skip
        config = {
            "public_url": origin,
            "port": int(origin.rsplit(":", 1)[1]),
            "database": f"sqlite:///{tmp_path}/relay.db",
            "secret_key": "secret-key-of-the-tests-0123456789",
            "admin_key": ADMIN_KEY,
            "log_level": "warning",
            "accounts": accounts,
            "network": {"allow": ["127.0.0.0/8"]},
            "delivery": {"timeout": "5s", "schedule": ["200ms"] * 20},
        }
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
        stage = Stage(Program(tmp_path, origin), simulator, receiver)
        await stage.program.start()
        try:
            async with stage.program.api as api:
                for path in ("/steady", "/moody"):
                    answer = await api.post("/v1/endpoints", json={"url": subscriber + path})
                    stage.endpoints[path] = answer.json()
            yield stage
        finally:
            await stage.program.end(signal.SIGKILL)


@dataclass
class Load:
    """Watches new generations and replays deliveries, as fast as it is answered, through every outage."""

    stage: Stage
    dice: random.Random
    acknowledged: dict[str, str] = field(default_factory=dict)  # generation id → outcome
    replayed: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        tasks = [
            asyncio.create_task(work()) for work in (self._watch, self._watch, self._watch, self._replay)
        ]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
            assert {type(one) for one in results} == {asyncio.CancelledError}, results

    async def _watch(self) -> None:
        async with self.stage.program.api as api:
            while True:
                provider = self.dice.choice(PROVIDERS)
                outcome = self.dice.choice(("completed", "completed", "failed"))
                job_id = self.stage.simulator.submit(
                    provider, duration=self.dice.uniform(0, 1.5), outcome=outcome
                )
                with suppress(httpx.HTTPError):
                    request = {"account": provider, "job_id": job_id}
                    answer = await api.post("/v1/generations", json=request)
                    if answer.is_success:
                        self.acknowledged[answer.json()["id"]] = outcome
                await asyncio.sleep(0.05)

    async def _replay(self) -> None:
        async with self.stage.program.api as api:
            while True:
                with suppress(httpx.HTTPError):
                    page = (await api.get("/v1/deliveries?status=delivered&limit=50")).json()["data"]
                    for one in self.dice.sample(page, min(3, len(page))):
                        # Even one whose answer never comes may have been taken.
                        self.replayed[one["event_id"]].append(time.monotonic())
                        await api.post(f"/v1/deliveries/{one['id']}/replay")
                await asyncio.sleep(0.2)


async def everything(api: httpx.AsyncClient, path: str) -> list[dict[str, Any]]:
    found, cursor = [], ""
    while True:
        page = (await api.get(path, params={"limit": 200} | ({"cursor": cursor} if cursor else {}))).json()
        found += page["data"]
        if not page["next_cursor"]:
            return found
        cursor = page["next_cursor"]


async def drained(stage: Stage) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """All events and deliveries, once every generation has ended and every delivery is over."""
    async with asyncio.timeout(30), stage.program.api as api:
        while True:
            waiting = [
                (await api.get(path, params={"limit": 1, "status": status})).json()["data"]
                for path, status in (
                    ("/v1/generations", "queued"),
                    ("/v1/generations", "processing"),
                    ("/v1/deliveries", "pending"),
                    ("/v1/deliveries", "sending"),
                )
            ]
            if not any(waiting):
                return await everything(api, "/v1/events"), await everything(api, "/v1/deliveries")
            await asyncio.sleep(0.1)


def assert_sound(directory: Path) -> None:
    with sqlite3.connect(directory / "relay.db") as database:
        assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert database.execute("PRAGMA foreign_key_check").fetchall() == []
    database.close()


def assert_signed(stage: Stage) -> None:
    for path, messages in stage.receiver.messages.items():
        webhook = Webhook(stage.endpoints[path]["secret"])
        for headers, body in messages:
            webhook.verify(body, headers)


async def test_what_was_acknowledged_survives_twenty_kills(stage: Stage):
    dice = seeded(2026)
    load, kills = Load(stage, seeded(1)), []
    async with load.running():
        for _ in range(KILLS):
            await asyncio.sleep(dice.uniform(0.05, 1.5))
            kills.append(time.monotonic())
            assert await stage.program.end(signal.SIGKILL) == -signal.SIGKILL
            await stage.program.start()
    events, deliveries = await drained(stage)
    assert len(load.acknowledged) > 5 * KILLS

    announced = defaultdict(list)
    for event in events:
        announced[event["generation_id"]].append(event)
    for generation_id, outcome in load.acknowledged.items():
        assert [one["type"] for one in announced[generation_id]] == [f"generation.{outcome}"]
    assert {one["status"] for one in deliveries} == {"delivered"}
    for path in stage.endpoints:
        assert set(stage.receiver.received[path]) == {one["id"] for one in events}
    assert_signed(stage)

    # Where nothing is refused, an event comes again only by a kill in its flight, or by a replay.
    for event_id, times in stage.receiver.received["/steady"].items():
        for first, again in pairwise(times):
            killed = any(first - 0.5 <= at <= min(again, first + IN_FLIGHT) for at in kills)
            replayed = any(first - IN_FLIGHT <= at <= again for at in load.replayed[event_id])
            assert killed or replayed, (event_id, times, kills)
        assert len(times) <= 1 + KILLS + len(load.replayed[event_id])

    assert await stage.program.end(signal.SIGTERM) == 0
    assert_sound(stage.program.directory)


async def test_a_stopped_relay_finishes_what_is_in_flight_and_sends_nothing_twice(stage: Stage):
    stage.receiver.pause = 0.3
    load = Load(stage, seeded(1))
    async with load.running():
        async with asyncio.timeout(20):
            await stage.receiver.busy.wait()
        assert await stage.program.end(signal.SIGTERM) == 0
    with sqlite3.connect(stage.program.directory / "relay.db") as database:
        logged = dict(
            database.execute(
                "SELECT d.event_id, COUNT(*) FROM attempts a JOIN deliveries d ON d.id = a.delivery_id"
                " WHERE d.endpoint_id = ? GROUP BY d.event_id",
                [stage.endpoints["/steady"]["id"]],
            )
        )
    database.close()
    received = {event_id: len(times) for event_id, times in stage.receiver.received["/steady"].items()}
    assert logged == received
    await stage.program.start()
    events, _ = await drained(stage)
    for event in events:
        times = stage.receiver.received["/steady"][event["id"]]
        assert 1 <= len(times) <= 1 + len(load.replayed[event["id"]])
    assert load.acknowledged.keys() <= {one["generation_id"] for one in events}
    assert await stage.program.end(signal.SIGTERM) == 0
    assert_sound(stage.program.directory)
