"""`relay serve` as a process of its own, and a receiver that remembers when what came: for tests that stop,
kill and hang it.
"""

import asyncio
import os
import random
import signal
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import httpx
import yaml
from standardwebhooks import Webhook, WebhookVerificationError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from tests.conftest import ADMIN_KEY
from tests.serving import listener, origin_of

THOROUGH = bool(os.environ.get("RELAY_THOROUGH"))


def seeded(seed: int) -> random.Random:
    return random.Random(seed)  # noqa: S311 # chance that can be repeated, not a secret


@dataclass
class Receiver:
    """Endpoints, by their paths: each checks what comes with its secret, and answers 204 after `pause`
    seconds (its own, if `pauses` has one), those of `moody` now and then 500, as their chance says."""

    dice: random.Random
    pause: float = 0.0
    pauses: Mapping[str, float] = field(default_factory=dict)
    moody: Mapping[str, float] = field(default_factory=lambda: {"/moody": 0.2})
    received: dict[str, dict[str, list[float]]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(list))
    )
    secrets: dict[str, str] = field(default_factory=dict)
    forged: list[str] = field(default_factory=list)  # the paths of what was not signed with their secrets
    came: Counter[str] = field(default_factory=Counter)
    open: Counter[str] = field(default_factory=Counter)  # requests that are not answered yet, by path
    most: Counter[str] = field(default_factory=Counter)  # and how many of them there ever were at once
    _news: asyncio.Condition = field(default_factory=asyncio.Condition)

    @property
    def app(self) -> Starlette:
        return Starlette(routes=[Route("/{path:path}", self._receive, methods=["POST"])])

    async def got(self, path: str, count: int) -> None:
        """Returns once so many have come there."""
        async with asyncio.timeout(20), self._news:
            await self._news.wait_for(lambda: self.came[path] >= count)

    async def _receive(self, request: Request) -> Response:
        body, path = await request.body(), request.url.path
        try:
            Webhook(self.secrets[path]).verify(body, dict(request.headers))
        except WebhookVerificationError:
            self.forged.append(path)
        self.received[path][request.headers["webhook-id"]].append(time.monotonic())
        async with self._news:
            self.came[path] += 1
            self._news.notify_all()
        self.open[path] += 1
        self.most[path] = max(self.most[path], self.open[path])
        try:
            await asyncio.sleep(self.pauses.get(path, self.pause))
        finally:
            self.open[path] -= 1
        return Response(status_code=500 if self.dice.random() < self.moody.get(path, 0) else 204)


@dataclass
class Program:
    """`relay serve`, at one address for all its lives."""

    directory: Path
    origin: str
    process: asyncio.subprocess.Process | None = None

    @classmethod
    def placed(cls, directory: Path, database: str | None = None, **config: Any) -> Self:
        """One that is not running yet, with a configuration of its own; `config` are its top-level keys."""
        with listener() as bound:
            origin = origin_of(bound)
        document = {
            "public_url": origin,
            "port": int(origin.rsplit(":", 1)[1]),
            "database": database or f"sqlite:///{directory}/relay.db",
            "secret_key": "secret-key-of-the-tests-0123456789",
            "admin_key": ADMIN_KEY,
            "log_level": "warning",
            "network": {"allow": ["127.0.0.0/8"]},
            **config,
        }
        directory.mkdir(exist_ok=True)
        (directory / "config.yaml").write_text(yaml.safe_dump(document))
        return cls(directory, origin)

    def api(self, *, timeout: float = 5) -> httpx.AsyncClient:
        headers = {"authorization": f"Bearer {ADMIN_KEY}"}
        return httpx.AsyncClient(base_url=self.origin, headers=headers, timeout=timeout)

    @property
    def log(self) -> str:
        """The end of what it said."""
        return (self.directory / "log").read_text()[-3000:]

    async def start(self) -> None:
        """Returns once it is ready."""
        with (self.directory / "log").open("ab") as log:
            self.process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "relay",
                "serve",
                "--config",
                self.directory / "config.yaml",
                stdout=log,
                stderr=log,
            )
        async with asyncio.timeout(30), self.api() as api:
            while True:
                assert self.process.returncode is None, self.log
                with suppress(httpx.HTTPError):
                    if (await api.get("/readyz")).status_code == 200:
                        return
                await asyncio.sleep(0.01)

    def tell(self, which: signal.Signals) -> None:
        assert self.process is not None
        with suppress(ProcessLookupError):
            self.process.send_signal(which)

    async def end(self, how: signal.Signals, *, timeout: float = 30) -> int:
        """Its exit code."""
        assert self.process is not None
        self.tell(how)
        async with asyncio.timeout(timeout):
            return await self.process.wait()

    async def stop(self) -> tuple[int, float]:
        """Its exit code, and how many seconds it took."""
        begun = time.monotonic()
        return await self.end(signal.SIGTERM), time.monotonic() - begun


async def everything(api: httpx.AsyncClient, path: str) -> list[dict[str, Any]]:
    """All that a list of the API has."""
    found, cursor = [], ""
    while True:
        page = (await api.get(path, params={"limit": 200} | ({"cursor": cursor} if cursor else {}))).json()
        found += page["data"]
        if not page["next_cursor"]:
            return found
        cursor = page["next_cursor"]


async def drained(api: httpx.AsyncClient, *, timeout: float = 60) -> None:
    """Returns once every generation has ended and every delivery is over, also those of an endpoint that has
    just failed five times in a row by chance, and is left alone for half a minute."""
    until = time.monotonic() + timeout
    while True:
        waiting = [
            one
            for path, status in (
                ("/v1/generations", "queued"),
                ("/v1/generations", "processing"),
                ("/v1/deliveries", "pending"),
                ("/v1/deliveries", "sending"),
            )
            for one in (await api.get(path, params={"limit": 10, "status": status})).json()["data"]
        ]
        if not waiting:
            return
        assert time.monotonic() < until, waiting
        await asyncio.sleep(0.1)


IN_FLIGHT = 2.0  # seconds within which an attempt is answered and its outcome is durable, with room to spare


def was_in_flight(first: float, again: float, moments: Sequence[float]) -> bool:
    """Whether what came at first, and then again, was on its way at one of these moments."""
    return any(first - 0.5 <= at <= min(again, first + IN_FLIGHT) for at in moments)
