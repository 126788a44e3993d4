"""The real program, killed at any moment: what it acknowledged goes on, and is told once it is back."""

import asyncio
import random
import signal
import sqlite3
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

from relay.simulator import Simulator
from tests.program import IN_FLIGHT, Program, Receiver, drained, everything, seeded, was_in_flight
from tests.serving import serving

KILLS = 20
PROVIDERS = ("pixellabs", "vivix", "pictory", "luma")


@dataclass
class Stage:
    program: Program
    simulator: Simulator
    receiver: Receiver
    endpoints: dict[str, dict[str, Any]] = field(default_factory=dict)


@pytest.fixture
async def stage(tmp_path: Path) -> AsyncIterator[Stage]:
    receiver, simulator = Receiver(seeded(7)), Simulator(seed=7)
    async with serving(simulator.app) as providers, serving(receiver.app) as subscriber:
        accounts = {
            name: {
                "provider": name, "api_key": simulator.keys[name], "base_url": url, "poll_interval": "100ms",
                "requests_per_minute": 100_000,
            }
            for name, url in Simulator.base_urls(providers).items()
        }  # fmt: skip
        delivery = {"timeout": "5s", "schedule": ["200ms"] * 20}
        stage = Stage(Program.placed(tmp_path, accounts=accounts, delivery=delivery), simulator, receiver)
        await stage.program.start()
        try:
            async with stage.program.api() as api:
                for path in ("/steady", "/moody"):
                    answer = await api.post("/v1/endpoints", json={"url": subscriber + path})
                    stage.endpoints[path] = answer.json()
                    receiver.secrets[path] = stage.endpoints[path]["secret"]
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
        async with self.stage.program.api() as api:
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
        async with self.stage.program.api() as api:
            while True:
                with suppress(httpx.HTTPError):
                    page = (await api.get("/v1/deliveries?status=delivered&limit=50")).json()["data"]
                    for one in self.dice.sample(page, min(3, len(page))):
                        # Even one whose answer never comes may have been taken.
                        self.replayed[one["event_id"]].append(time.monotonic())
                        await api.post(f"/v1/deliveries/{one['id']}/replay")
                await asyncio.sleep(0.2)


async def finished(stage: Stage) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """All events and deliveries, once everything is over."""
    async with stage.program.api() as api:
        await drained(api)
        return await everything(api, "/v1/events"), await everything(api, "/v1/deliveries")


def assert_sound(directory: Path) -> None:
    with sqlite3.connect(directory / "relay.db") as database:
        assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert database.execute("PRAGMA foreign_key_check").fetchall() == []
    database.close()


async def test_what_was_acknowledged_survives_twenty_kills(stage: Stage):
    dice = seeded(2026)
    load, kills = Load(stage, seeded(1)), []
    async with load.running():
        for _ in range(KILLS):
            await asyncio.sleep(dice.uniform(0.05, 1.5))
            kills.append(time.monotonic())
            assert await stage.program.end(signal.SIGKILL) == -signal.SIGKILL
            await stage.program.start()
    events, deliveries = await finished(stage)
    assert len(load.acknowledged) > 5 * KILLS

    announced = defaultdict(list)
    for event in events:
        announced[event["generation_id"]].append(event)
    for generation_id, outcome in load.acknowledged.items():
        assert [one["type"] for one in announced[generation_id]] == [f"generation.{outcome}"]
    assert {one["status"] for one in deliveries} == {"delivered"}
    for path in stage.endpoints:
        assert set(stage.receiver.received[path]) == {one["id"] for one in events}
    assert not stage.receiver.forged

    # Where nothing is refused, an event comes again only by a kill in its flight, or by a replay.
    for event_id, times in stage.receiver.received["/steady"].items():
        for first, again in pairwise(times):
            killed = was_in_flight(first, again, kills)
            replayed = any(first - IN_FLIGHT <= at <= again for at in load.replayed[event_id])
            assert killed or replayed, (event_id, times, kills)
        assert len(times) <= 1 + KILLS + len(load.replayed[event_id])

    assert await stage.program.end(signal.SIGTERM) == 0
    assert_sound(stage.program.directory)


async def test_a_stopped_relay_finishes_what_is_in_flight_and_sends_nothing_twice(stage: Stage):
    stage.receiver.pause = 0.3
    load = Load(stage, seeded(1))
    async with load.running():
        await stage.receiver.got("/steady", 30)
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
    events, _ = await finished(stage)
    for event in events:
        times = stage.receiver.received["/steady"][event["id"]]
        assert 1 <= len(times) <= 1 + len(load.replayed[event["id"]])
    assert load.acknowledged.keys() <= {one["generation_id"] for one in events}
    assert await stage.program.end(signal.SIGTERM) == 0
    assert_sound(stage.program.directory)
