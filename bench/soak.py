"""Relay for an hour under load and faults: `python -m bench.soak [--minutes M] [--json FILE] [--plot FILE]`.

A quarter of the rate of `bench.delivery`, watched generations beside it, subscribers that fail in every way,
providers with outages, and a relay that is stopped or killed every five minutes. Afterwards everything that
was acknowledged must have been delivered, or it is said why not; memory and files must have stopped growing;
no error may stand in the log. Exits with 1 when one of these is not so.
"""

import argparse
import asyncio
import itertools
import json
import logging
import random
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pygal
import uvloop
from aiohttp import web
from rich.console import Console
from standardwebhooks import Webhook

from bench.programs import HOST, KEY, free_port
from bench.subscriber import ENDPOINTS, Books, Subscriber
from bench.wire import percentile
from relay.server import serving
from relay.simulator import Simulator

RATE = 566  # events a second: a quarter of docs/performance.md, fan-out 1
SCHEDULE = ["1s", "5s", "15s", "30s", "1m", "2m", "2m", "5m"]
KEPT = "2m"  # what is over is forgotten so soon that sizes can be seen to stop growing
FLAT = 1.25  # how much more the last third may need than the third before
EVERY = 5.0  # seconds between two samples
console = Console(width=110)


class Relay:
    """`relay serve`, at one address for all its lives."""

    def __init__(self, directory: Path, accounts: Mapping[str, Any]) -> None:
        self.port, self._directory = free_port(), directory
        self.log = directory / "log"
        self.ends: Counter[str] = Counter()
        self.downtimes: list[float] = []
        config = {
            "port": self.port,
            "public_url": f"http://{HOST}:{self.port}",
            "secret_key": "soak" * 8,
            "admin_key": KEY,
            "log_level": "warning",
            "accounts": accounts,
            "network": {"allow": ["127.0.0.0/8"]},
            "delivery": {"timeout": "5s", "schedule": SCHEDULE},
            "retention": {"events": KEPT, "attempts": KEPT},
        }
        (directory / "config.yaml").write_text(json.dumps(config))

    async def start(self) -> None:
        with self.log.open("ab") as log:
            self._it = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "relay", "serve", "--config", "config.yaml"),
                cwd=self._directory,
                stderr=log,
                stdout=log,
            )
        async with aiohttp.ClientSession() as session:
            while True:
                if self._it.returncode is not None:
                    raise RuntimeError(f"it ended with {self._it.returncode} at its start: {self.log}")
                with suppress(aiohttp.ClientError):
                    async with session.get(f"http://{HOST}:{self.port}/readyz") as answer:
                        if answer.status == 200:
                            return
                await asyncio.sleep(0.02)

    async def end(self, how: signal.Signals) -> None:
        if self._it.returncode is not None:
            return
        self._it.send_signal(how)
        async with asyncio.timeout(60):
            code = await self._it.wait()
        self.ends[f"{how.name}: {code}"] += 1

    async def restart(self, how: signal.Signals) -> None:
        begun = time.monotonic()
        await self.end(how)
        await self.start()
        self.downtimes.append(time.monotonic() - begun)

    def sizes(self) -> dict[str, float]:
        """MiB of memory, of the database and of its log."""
        status = Path(f"/proc/{self._it.pid}/status").read_text()
        mib = {"memory": int(status.split("VmRSS:")[1].split()[0]) / 1024}
        for name, file in (("database", "relay.db"), ("WAL", "relay.db-wal")):
            path = self._directory / file
            mib[name] = path.stat().st_size / 2**20 if path.exists() else 0.0
        return mib

    def said(self) -> tuple[Counter[str], list[str]]:
        """What it logged, by level and event, and every line above a warning or out of form."""
        events, errors = Counter[str](), []
        for line in self.log.read_text().splitlines():
            try:
                said = json.loads(line)
                events[f"{said['level']} {said['event']}"] += 1
                if said["level"] not in ("info", "warning"):
                    errors.append(line)
            except (ValueError, KeyError):
                errors.append(line)
        return events, errors


@dataclass
class Sample:
    """`life` counts the relay's processes."""

    seconds: float
    life: int
    mib: dict[str, float]
    open: int  # acknowledged and not delivered yet


class Soak:
    """The hour."""

    def __init__(
        self, relay: Relay, simulator: Simulator, simulated: str, api: aiohttp.ClientSession
    ) -> None:
        self.relay, self.simulator, self._simulated, self._api = relay, simulator, simulated, api
        self.begun = time.monotonic()
        self.books = Books()
        self.subscriber = Subscriber(self.books, self.begun)
        self.samples: list[Sample] = []
        self.over = asyncio.Event()
        self.owed: dict[str, int] = {}
        self._numbers = itertools.count()
        self._slot = self.begun

    async def ask(self, method: str, path: str, body: Any = None) -> Any:
        """The answer of the API, however often it must be asked."""
        while True:
            with suppress(aiohttp.ClientError, TimeoutError):
                async with self._api.request(method, path, json=body) as answer:
                    if answer.status < 300:
                        return await answer.json()
                    if answer.status not in (429, 503):
                        raise RuntimeError(f"{method} {path}: {answer.status} {await answer.text()}")
            await asyncio.sleep(0.1)

    async def register(self, origin: str) -> None:
        types = {str(number): [f"soak.{number}"] for number in range(ENDPOINTS)}
        for name, wanted in (types | {"dead": ["soak.dead"], "generations": None}).items():
            made = await self.ask("POST", "/v1/endpoints", {"url": f"{origin}/{name}", "event_types": wanted})
            self.subscriber.hooks[name] = Webhook(made["secret"])

    async def publish(self, rate: float) -> None:
        """One of the publishers that share `rate`: what is not acknowledged is published again."""
        filler = "x" * 900
        while not self.over.is_set():
            self._slot = slot = max(self._slot, time.monotonic() - 0.1) + 1 / rate
            await asyncio.sleep(max(0.0, slot - time.monotonic()))
            number = next(self._numbers)
            data = {"sent_at": time.time_ns(), "number": number, "filler": filler}
            event = {"type": f"soak.{number % ENDPOINTS}", "id": f"soak-{number}", "data": data}
            await self.ask("POST", "/v1/events", event)
            self.books.acknowledge(number)

    async def publish_to_the_dead(self) -> None:
        for number in itertools.count():
            self.books.dead[number] = 0
            data = {"number": number}
            await self.ask("POST", "/v1/events", {"type": "soak.dead", "id": f"dead-{number}", "data": data})
            await self._rest(5)
            if self.over.is_set():
                return

    async def watch(self, account: str) -> None:
        """One generation a second; some fail at their provider, and Pictory's call back."""
        dice = random.Random(account)  # noqa: S311 # chance, not a secret
        while not self.over.is_set():
            plan: dict[str, Any] = {"outcome": "failed" if dice.random() < 0.1 else "completed"}
            if account == "pictory":
                made = await self.ask("POST", "/v1/generations", {"account": account})
                job = self.simulator.submit(account, request={"webhook": made["webhook_url"]}, **plan)
                await self.ask("PATCH", f"/v1/generations/{made['id']}", {"job_id": job})
            else:
                job = self.simulator.submit(account, **plan)
                made = await self.ask("POST", "/v1/generations", {"account": account, "job_id": job})
            if made["id"] in self.books.early:
                self.books.early.discard(made["id"])
            else:
                self.books.watched.add(made["id"])
            await self._rest(1)

    async def fail_providers(self) -> None:
        """Each provider in turn is out for half a minute, in another way each time."""
        kinds = itertools.cycle(("server_error", "rate_limited", "html", "dropped", "truncated"))
        for provider in itertools.cycle(Simulator.base_urls("")):
            await self._rest(60)
            if self.over.is_set():
                return
            self.simulator.trouble(provider, next(kinds), count=1_000_000)
            await self._rest(30)
            async with self._api.delete(f"{self._simulated}/_simulator/troubles"):
                pass

    async def restart(self, every: float) -> None:
        for how in itertools.cycle((signal.SIGTERM, signal.SIGKILL)):
            await self._rest(every)
            if self.over.is_set():
                return
            self.say(how.name)
            await self.relay.restart(how)

    def say(self, why: str) -> None:
        """One line of how it stands."""
        last, books = self.samples[-1], self.books
        sizes = ", ".join(f"{name} {mib:.0f} MiB" for name, mib in last.mib.items())
        console.print(
            f"{last.seconds / 60:4.0f} min {why}: {books.acknowledged.count(1):,} acknowledged,"
            f" {last.open:,} under way, {sizes}",
            highlight=False,
        )

    async def sample(self) -> None:
        while True:
            with suppress(OSError, IndexError):  # it is just being restarted
                mib = self.relay.sizes()
                waiting = self.books.acknowledged.count(1) - self.books.received.count(1)
                life = len(self.relay.downtimes)
                self.samples.append(Sample(time.monotonic() - self.begun, life, mib, waiting))
            await asyncio.sleep(EVERY)

    async def list_owed(self) -> dict[str, int]:
        """How many deliveries are not over, by their event's type."""
        owed = Counter[str]()
        for status in ("pending", "sending"):
            path = cursor = f"/v1/deliveries?limit=200&status={status}"
            while cursor:
                page = await self.ask("GET", cursor)
                owed.update(one["event_type"] for one in page["data"])
                cursor = f"{path}&cursor={page['next_cursor']}" if page["next_cursor"] else ""
        return owed

    async def settle(self, timeout: float) -> None:
        """Everything is well now; returns once nothing is missing any more, or after `timeout` seconds."""
        self.subscriber.faults = False
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                while self.books.missing() or self.books.watched:  # noqa: ASYNC110 # nobody says when
                    await asyncio.sleep(1)

    async def _rest(self, seconds: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self.over.wait()


async def soak(directory: Path, *, minutes: float, rate: float, every: float) -> Soak:
    """Runs it, and waits until what is owed has come."""
    simulator = Simulator(median=8)
    async with AsyncExitStack() as stack, serving(simulator.app) as simulated:
        accounts = {
            name: {
                "provider": name,
                "api_key": simulator.keys[name],
                "base_url": url,
                "requests_per_minute": 600,
                "requests_per_day": 1_000_000,
            }
            for name, url in Simulator.base_urls(simulated).items()
        }
        relay = Relay(directory, accounts)
        stack.push_async_callback(relay.end, signal.SIGKILL)
        await relay.start()
        session = aiohttp.ClientSession(
            f"http://{HOST}:{relay.port}",
            headers={"authorization": f"Bearer {KEY}"},
            timeout=aiohttp.ClientTimeout(total=15),
            connector=aiohttp.TCPConnector(limit=0),
        )
        async with session as api:
            it = Soak(relay, simulator, simulated, api)
            runner = web.AppRunner(it.subscriber.app, access_log=None)
            await runner.setup()
            site = web.TCPSite(runner, HOST, free_port(), backlog=1024)
            await site.start()
            await it.register(site.name)
            async with asyncio.TaskGroup() as group:
                sampling = group.create_task(it.sample())
                working = [group.create_task(it.publish(rate)) for _ in range(64)]
                working += [group.create_task(it.watch(account)) for account in accounts]
                working.append(group.create_task(it.publish_to_the_dead()))
                working.append(group.create_task(it.fail_providers()))
                working.append(group.create_task(it.restart(every * 60)))
                await asyncio.sleep(minutes * 60)
                it.say("is over, what is owed is waited for")
                it.over.set()
                await asyncio.wait(working)
                await it.settle(timeout=600)
                sampling.cancel()
            it.owed = await it.list_owed()
            await relay.end(signal.SIGTERM)
            await runner.cleanup()
    return it


def flat(values: list[float]) -> float:
    """The most of the last third as a ratio of the most of the third before it."""
    third = len(values) // 3
    return max(values[-third:]) / max(values[third : 2 * third]) if third else float("nan")


def plot(samples: list[Sample]) -> bytes:
    """Memory and files over time, as SVG."""
    chart = pygal.XY(
        title="Memory and files of one relay under load and faults, restarted every five minutes",
        x_title="minutes",
        y_title="MiB",
        js=[],
        show_dots=False,
        style=pygal.style.CleanStyle,
        disable_xml_declaration=True,
    )
    times = [samples[start : start + 3] for start in range(0, len(samples), 3)]
    for name in ("memory", "database", "WAL"):
        chart.add(name, [(some[0].seconds / 60, max(one.mib[name] for one in some)) for some in times])
    return str(chart.render()).encode()


def verdict(it: Soak) -> tuple[dict[str, Any], list[str]]:
    """What was seen, and what is wrong with it."""
    books, relay = it.books, it.relay
    events, errors = relay.said()
    missing = books.missing()
    attempts = len(SCHEDULE) + 1
    given_up = [number for number in missing if books.refused[number] >= attempts]
    dead_open = sum(1 for times in books.dead.values() if times < attempts)
    growth = {name: flat([one.mib[name] for one in it.samples]) for name in ("memory", "database", "WAL")}
    seen = {
        "acknowledged": books.acknowledged.count(1),
        "delivered": books.received.count(1),
        "received again": books.again,
        "given up after all attempts": len(given_up),
        "missing": len(missing) - len(given_up),
        "generations ended": books.ended,
        "generations missing": len(books.watched),
        "events for the dead endpoint": len(books.dead),
        "of them not given up yet": dead_open,
        "still to be sent at the end": dict(it.owed),
        "answers of the others": dict(books.answers),
        "forged": books.forged,
        "lag of the healthy, ms": {f"p{p}": round(percentile(books.lags, p / 100), 1) for p in (50, 90, 99)},
        "ends of the relay": dict(relay.ends),
        "seconds until ready again": {
            "median": round(statistics.median(relay.downtimes or [0]), 1),
            "most": round(max(relay.downtimes, default=0), 1),
        },
        "MiB at most": {name: round(max(one.mib[name] for one in it.samples), 1) for name in growth},
        "last third / third before": {name: round(ratio, 2) for name, ratio in growth.items()},
        "logged": dict(events),
    }
    checks = {
        "events that were acknowledged have not come": not seen["missing"],
        "generations that ended were not announced": not books.watched,
        "webhooks had a bad signature": not books.forged,
        "deliveries are owed to endpoints that are well": set(it.owed) <= {"soak.dead"},
        "what the dead endpoint is owed is not known": it.owed.get("soak.dead", 0) == dead_open,
        "memory grew": growth["memory"] <= FLAT,
        "the database grew": growth["database"] <= FLAT,
        "the WAL grew": growth["WAL"] <= FLAT,
        f"errors in the log: {errors[:5]}": not errors,
        "the relay did not stop cleanly": set(relay.ends) <= {"SIGTERM: 0", "SIGKILL: -9"},
    }
    return seen, [wrong for wrong, well in checks.items() if not well]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--rate", type=float, default=RATE, help="events a second")
    parser.add_argument("--every", type=float, default=5, help="minutes between two restarts")
    parser.add_argument("--json", type=Path, help="write what was seen and all samples there")
    parser.add_argument("--plot", type=Path, help="draw memory and files there (SVG)")
    arguments = parser.parse_args()
    # Callbacks to a relay that is just being restarted are a part of it.
    logging.getLogger("relay.simulator").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as directory:
        it = uvloop.run(
            soak(Path(directory), minutes=arguments.minutes, rate=arguments.rate, every=arguments.every)
        )
        seen, wrong = verdict(it)
    console.print_json(json.dumps(seen))
    if arguments.plot:
        arguments.plot.write_bytes(plot(it.samples))
    if arguments.json:
        arguments.json.write_text(
            json.dumps({**seen, "samples": [vars(one) for one in it.samples]}, indent=1)
        )
    for one in wrong:
        console.print(f"[red]wrong:[/] {one}")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
