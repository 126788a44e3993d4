"""Fixtures: a relay, the provider simulator and a subscriber, each on a socket of its own."""

import asyncio
import gc
import os
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import settings as hypothesis_settings

from relay.app import NEW_OBJECTS, build
from relay.config import Settings, read_config
from relay.simulator import Simulator
from relay.store import open_database
from tests.fleet import Fleet
from tests.postgres import (
    TEMPLATE,
    WHY_MISSING,
    WHY_NO_POOLER,
    Cluster,
    binaries,
    pgbouncer,
    running_cluster,
)
from tests.serving import Subscriber, all_the_world, listener, origin_of, serving

# How long an example takes is the machine's affair.
hypothesis_settings.register_profile("relaxed", deadline=None)
hypothesis_settings.load_profile("relaxed")
hypothesis_settings.register_profile("thorough", max_examples=3000, deadline=None)
ADMIN_KEY = "admin-key-of-the-tests"
# What asks somebody in the network.
collect_ignore = [] if os.environ.get("RELAY_THOROUGH") else ["test_vulnerabilities.py"]


def pytest_report_header() -> str | None:
    return WHY_MISSING if binaries() is None else None


@dataclass
class Clock:
    """Wall time, in milliseconds, that can be moved forward."""

    ahead: int = 0

    def __call__(self) -> int:
        return time.time_ns() // 1_000_000 + self.ahead

    def forward(self, *, seconds: float) -> None:
        self.ahead += round(seconds * 1000)


@dataclass
class RunningRelay:
    """A relay that is being served; `api` is an authorized client of it."""

    origin: str
    settings: Settings
    api: httpx.AsyncClient
    clock: Clock

    async def eventually(self, path: str, true: Callable[[Any], bool], *, timeout: float = 15) -> Any:
        """The JSON at a path, as soon as it is as wished."""
        async with asyncio.timeout(timeout):
            while True:
                answer = await self.api.get(path)
                if answer.status_code == 200 and true(answer.json()):
                    return answer.json()
                await asyncio.sleep(0.02)


@dataclass
class World:
    """Simulated providers, a subscriber, and relays that know both."""

    simulator: Simulator
    simulator_origin: str
    subscriber: Subscriber
    directory: Path
    clock: Clock
    stack: AsyncExitStack = field(repr=False)

    def document(self, **changes: Any) -> dict[str, Any]:
        """A configuration with an account at each simulated provider; `changes` replace top-level keys."""
        accounts = {
            name: {
                "provider": name,
                "api_key": self.simulator.keys[name],
                "base_url": url,
                "poll_interval": "100ms",
            }
            for name, url in Simulator.base_urls(self.simulator_origin).items()
        }
        return {
            "database": f"sqlite:///{self.directory}/relay.db",
            "secret_key": "secret-key-of-the-tests-0123456789",
            "admin_key": ADMIN_KEY,
            "accounts": accounts,
            "network": {"allow": ["127.0.0.0/8"]},
            "delivery": {"timeout": "2s"},
            **changes,
        }

    def unhurried(self) -> dict[str, Any]:
        """The accounts, but Relay asks about nothing by itself for an hour."""
        accounts = self.document()["accounts"]
        return {name: one | {"poll_interval": "1h", "timeout": "1d"} for name, one in accounts.items()}

    async def relay(self, **changes: Any) -> RunningRelay:
        """Starts a relay, which runs until the test ends."""
        return await self.stack.enter_async_context(self.running(**changes))

    @asynccontextmanager
    async def running(self, **changes: Any) -> AsyncIterator[RunningRelay]:
        """A relay that stops when the block ends; the next one finds its database."""
        # Its public URL is known before it starts, because the socket is bound before.
        bound = listener()
        origin = origin_of(bound)
        settings = read_config({"public_url": origin, **self.document(**changes)}, {})
        headers = {"authorization": f"Bearer {ADMIN_KEY}"}
        async with (
            serving(build(settings, now=self.clock), bound, trusted_proxies=settings.network.trusted_proxies),
            httpx.AsyncClient(base_url=origin, headers=headers, timeout=30) as api,
        ):
            yield RunningRelay(origin, settings, api, self.clock)

    async def key(self, relay: RunningRelay, *scopes: str, **fields: Any) -> dict[str, Any]:
        """A new API key, as it is shown once."""
        answer = await relay.api.post("/v1/keys", json={"scopes": scopes, **fields})
        assert answer.status_code == 201, answer.text
        return dict(answer.json())

    async def client(self, relay: RunningRelay, key: str) -> httpx.AsyncClient:
        """Who has this key."""
        headers = {"authorization": f"Bearer {key}"}
        client = httpx.AsyncClient(base_url=relay.origin, headers=headers, timeout=30)
        return await self.stack.enter_async_context(client)

    async def member(self, relay: RunningRelay, *scopes: str, **fields: Any) -> httpx.AsyncClient:
        """Who has a new key with these scopes."""
        return await self.client(relay, (await self.key(relay, *scopes, **fields))["key"])

    @asynccontextmanager
    async def confined(self, **changes: Any) -> AsyncIterator[RunningRelay]:
        """A relay whose every way out leads to the simulated providers, or else to the subscriber."""
        proxy = all_the_world({self.simulator_origin: self.simulator.app}, self.subscriber.app)
        async with serving(proxy) as origin:
            network = {"allow": ["127.0.0.0/8"], "allow_http": True, "proxy": origin}
            async with self.running(network=network, **changes) as relay:
                yield relay

    async def endpoint(self, relay: RunningRelay, path: str = "/", **fields: Any) -> dict[str, Any]:
        """Registers the subscriber, at one of its paths."""
        answer = await relay.api.post("/v1/endpoints", json={"url": self.subscriber.origin + path, **fields})
        assert answer.status_code == 201, answer.text
        return dict(answer.json())

    async def watch(self, relay: RunningRelay, provider: str, **plan: Any) -> dict[str, Any]:
        """Begins a job at a simulated provider and watches it."""
        job_id = self.simulator.submit(provider, **{"duration": 0.3, **plan})
        answer = await relay.api.post("/v1/generations", json={"account": provider, "job_id": job_id})
        assert answer.status_code == 201, answer.text
        return dict(answer.json())


def need(program: Path | None, why_missing: str) -> None:
    """Skips a test whose program is not there, or fails it where all must run."""
    if program is None:
        if os.environ.get("RELAY_REQUIRE_ALL_TESTS"):
            pytest.fail(why_missing)
        pytest.skip(why_missing)


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A PostgreSQL server for all tests of one process, each with databases of its own."""
    need(binaries(), WHY_MISSING)
    with running_cluster() as cluster:
        cluster.make_template()
        yield cluster


@pytest.fixture(scope="module")
def own_cluster() -> Iterator[Cluster]:
    need(binaries(), WHY_MISSING)
    with running_cluster() as cluster:
        cluster.make_template()
        yield cluster


@pytest.fixture
def server(own_cluster: Cluster) -> Iterator[Cluster]:
    """A PostgreSQL server that a test may do anything to: the next one finds it running and as it was."""
    yield own_cluster
    if own_cluster.settings and own_cluster.is_running:
        own_cluster.stop()
    own_cluster.settings = {}
    if not own_cluster.is_running:
        own_cluster.start()
    own_cluster.set()


@pytest.fixture
def tidy() -> Iterator[None]:
    """For tests of how long something takes: garbage is looked for as seldom as in `relay serve`, and not in
    what else this process holds."""
    usual = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(NEW_OBJECTS, *usual[1:])
    yield
    gc.set_threshold(*usual)
    gc.unfreeze()


@pytest.fixture
def pooled() -> None:
    """For tests with PgBouncer."""
    need(pgbouncer(), WHY_NO_POOLER)


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A new database of each kind; PostgreSQL's is migrated already, at time 0."""
    yield from _new_database(request, tmp_path, template=TEMPLATE)


@pytest.fixture(params=["sqlite", "postgresql"])
def empty_database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A new database of each kind, without a table."""
    yield from _new_database(request, tmp_path, template=None)


def _new_database(request: pytest.FixtureRequest, directory: Path, *, template: str | None) -> Iterator[str]:
    if request.param == "sqlite":
        yield f"sqlite:///{directory}/relay.db"
        return
    cluster: Cluster = request.getfixturevalue("cluster")
    url = cluster.database(template)
    yield url
    cluster.drop(url)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def world(tmp_path: Path, clock: Clock) -> AsyncIterator[World]:
    async with AsyncExitStack() as stack:
        simulator, subscriber = Simulator(seed=1, now=lambda: clock() / 1000), Subscriber()
        simulator_origin = await stack.enter_async_context(serving(simulator.app))
        subscriber.origin = await stack.enter_async_context(serving(subscriber.app))
        yield World(simulator, simulator_origin, subscriber, tmp_path, clock, stack)


@pytest.fixture
async def fleet(world: World, cluster: Cluster) -> AsyncIterator[Fleet]:
    """Relays that are yet to join, over a PostgreSQL of their own."""
    url = cluster.database()
    database = await open_database(url)
    fleet = Fleet(world, url, database)
    yield fleet
    await fleet.close()
    await database.close()
    cluster.drop(url)
