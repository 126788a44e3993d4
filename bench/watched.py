"""What watching many generations costs: `python -m bench.watched [--quick]`.

A relay that watches 100,000 jobs of a provider that always says "processing": how many it asks about, what a
tick takes, whether the loop answers meanwhile, and its memory.
"""

import argparse
import asyncio
import json
import sqlite3
import statistics
import tempfile
import time
from pathlib import Path

import httpx
import uvloop
from rich.console import Console

from bench.programs import HOST, KEY, Process, free_port, wait_until_ready
from bench.wire import percentile
from relay.app import wall_clock
from relay.config import read_config
from relay.ids import new_id
from relay.keyring import KeyRing
from relay.store import open_database, store_on

ANSWER = json.dumps({"id": "job", "state": "processing", "created_at": "2026-01-01T00:00:00Z"}).encode()
OVER = 600  # seconds over which the first asks are spread
console = Console(width=110)


class Provider(asyncio.Protocol):
    """Answers every request that the job is processing; `asked` counts them."""

    asked = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._buffer = b""

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while b"\r\n\r\n" in self._buffer:
            _, self._buffer = self._buffer.split(b"\r\n\r\n", 1)
            Provider.asked += 1
            head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(
                ANSWER
            )
            self._transport.write(head + ANSWER)  # type: ignore[attr-defined] # a socket's transport


def settings(directory: str, port: int, provider: int) -> dict[str, object]:
    return {
        "port": port,
        "database": f"sqlite:///{directory}/relay.db",
        "secret_key": "bench" * 8,
        "admin_key": KEY,
        "log_level": "warning",
        "network": {"allow": ["127.0.0.0/8"]},
        "accounts": {
            "luma": {
                "provider": "luma",
                "api_key": "k",
                "base_url": f"http://{HOST}:{provider}/v1",
                "timeout": "10h",
            }
        },
    }


def fill(path: str, count: int) -> None:
    now = wall_clock()
    with sqlite3.connect(path) as database:
        database.executemany(
            """
            INSERT INTO generations (
                id, tenant, account, provider, job_id, status, metadata, awaits_callback, late, created_at,
                deadline_at, due_at, chance, rate, outage, asks, errors, missing, hints, version
            )
            VALUES (
                ?, 'default', 'luma', 'luma', ?, 'queued', '{}', 0, 0, ?,
                ?, ?, 0.5, 0.00001, 0, 0, 0, 0, 0, 0
            )
            """,
            (
                (new_id("gen", now), f"job-{n}", now, now + 36_000_000, now + OVER * 1000 * n // count)
                for n in range(count)
            ),
        )
    database.close()


async def watch(count: int, seconds: float) -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Provider, HOST, 0, backlog=1024)
    provider = server.sockets[0].getsockname()[1]
    with tempfile.TemporaryDirectory() as directory:
        port = free_port()
        config = settings(directory, port, provider)
        await asyncio.to_thread(Path(directory, "config.yaml").write_text, json.dumps(config))
        command = ("relay", "serve", "--config", f"{directory}/config.yaml")
        process = Process(*command, cwd=directory)
        await asyncio.to_thread(wait_until_ready, port)
        empty = process.memory()
        await asyncio.to_thread(process.stop)
        fill(f"{directory}/relay.db", count)
        process = Process(*command, cwd=directory)
        await asyncio.to_thread(wait_until_ready, port)
        Provider.asked, latencies = 0, []
        begun = time.monotonic()
        async with httpx.AsyncClient(base_url=f"http://{HOST}:{port}") as client:
            while time.monotonic() < begun + seconds:
                at = time.monotonic()
                await client.get("/healthz")
                latencies.append((time.monotonic() - at) * 1000)
                await asyncio.sleep(0.02)
        console.print(
            f"asked: {Provider.asked / seconds:.0f}/s of {count / OVER:.0f}/s due for the first time"
        )
        say("the loop answers, p50", f"{statistics.median(latencies):.1f} ms")
        say("the loop answers, p99", f"{percentile(latencies, 0.99):.1f} ms")
        say("memory, nothing watched", f"{empty:.1f} MiB")
        say("memory", f"{process.memory():.1f} MiB, peak {process.memory('VmHWM'):.1f} MiB")
        await asyncio.to_thread(process.stop)
        await claims(config)
    server.close()


def say(what: str, value: str) -> None:
    console.print(f"{what}: {value}", highlight=False)


async def claims(config: dict[str, object]) -> None:
    """What the statements of a tick take, with 32 and with 10,000 due."""
    database = await open_database(read_config(config).database)
    generations = store_on(database, KeyRing(["bench"])).generations
    for ahead in (0, 60_000):
        times = []
        for turn in range(30):
            now = wall_clock() + ahead + turn * 250
            at = time.perf_counter()
            await generations.claim_overdue({"luma": 100}, now=now, lease="overdue", lease_until=now + 60_000)
            await generations.claim({"luma": 32}, now=now, lease=f"lease-{turn}", lease_until=now + 60_000)
            times.append((time.perf_counter() - at) * 1000)
        taken = f"{statistics.median(times):.1f} ms, at most {max(times):.1f} ms"
        say(f"a tick's claims, {ahead // 1000} s behind", taken)
    await database.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer jobs, to see that it works")
    quick = parser.parse_args().quick
    uvloop.run(watch(10_000 if quick else 100_000, 5 if quick else 30))


if __name__ == "__main__":
    main()
