"""How fast, how soon, how fair: `python -m bench.delivery [--quick] [--json FILE]`.

Everything runs on this machine in one go, alternating, load generator and sink included: compare the
figures of one run with each other, never with those of another machine or day.
"""

import argparse
import asyncio
import json
import platform
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvloop
from rich.console import Console
from rich.table import Table

from bench.wire import load
from relay import __version__
from relay.ids import new_id

HOST, KEY, ENDPOINTS = "127.0.0.1", "bench-key", 50
console = Console(width=110)


@dataclass
class Figures:
    """Everything that was measured, by name: the values of its repetitions."""

    values: dict[str, list[float]] = field(default_factory=dict)

    def add(self, name: str, value: float) -> None:
        self.values.setdefault(name, []).append(value)
        console.print(f"  {name}: {value:,.1f}", highlight=False)

    def median(self, name: str) -> float:
        return statistics.median(self.values[name])


class Process:
    """A program of the measurement, with its memory."""

    def __init__(self, *command: str, cwd: str | None = None, pipes: bool = False) -> None:
        pipe = subprocess.PIPE if pipes else None
        self.it = subprocess.Popen(  # noqa: S603 # our own programs
            [sys.executable, "-m", *command], cwd=cwd, stdin=pipe, stdout=pipe, text=True
        )

    def memory(self, what: str = "VmRSS") -> float:
        """MiB; `VmHWM` is the most it ever was."""
        status = Path(f"/proc/{self.it.pid}/status").read_text()
        return int(status.split(f"{what}:")[1].split()[0]) / 1024

    def stop(self) -> None:
        self.it.terminate()
        self.it.wait(60)


class SinkProcess(Process):
    """The subscriber."""

    def __init__(self) -> None:
        self.port = free_port()
        super().__init__("bench.sink", str(self.port), pipes=True)
        assert self.it.stdout is not None  # noqa: S101 # it was asked for
        self.it.stdout.readline()

    def say(self, word: str) -> dict[str, Any]:
        assert self.it.stdin is not None and self.it.stdout is not None  # noqa: S101 # they were asked for
        self.it.stdin.write(word + "\n")
        self.it.stdin.flush()
        return dict(json.loads(self.it.stdout.readline()))

    async def until(self, count: int, *, timeout: float = 120) -> dict[str, Any]:
        """The report, once so many have arrived."""
        async with asyncio.timeout(timeout):
            while (report := self.say("report"))["count"] < count:  # noqa: ASYNC110 # it is another process
                await asyncio.sleep(0.05)
        return report


def free_port() -> int:
    with socket.socket() as bound:
        bound.bind((HOST, 0))
        return int(bound.getsockname()[1])


def post(port: int, path: str, body: Any) -> Any:
    request = urllib.request.Request(  # our own server
        f"http://{HOST}:{port}{path}",
        data=json.dumps(body).encode(),
        headers={"authorization": f"Bearer {KEY}", "content-type": "application/json"},
    )
    return json.load(urllib.request.urlopen(request))  # noqa: S310 # our own server


def wait_until_ready(port: int) -> None:
    while True:
        try:
            urllib.request.urlopen(f"http://{HOST}:{port}/readyz")  # our own server
            return
        except OSError:
            time.sleep(0.05)


@contextmanager
def relay(directory: str, *, timeout: str = "15s") -> Iterator[tuple[Process, int]]:
    """A relay on a database in this directory."""
    port = free_port()
    settings = {
        "port": port,
        "secret_key": "bench" * 8,
        "admin_key": KEY,
        "log_level": "warning",
        "network": {"allow": ["127.0.0.0/8"]},
        "delivery": {"timeout": timeout},
    }
    Path(directory, "config.yaml").write_text(json.dumps(settings))
    process = Process("relay", "serve", "--config", f"{directory}/config.yaml", cwd=directory)
    try:
        wait_until_ready(port)
        yield process, port
    finally:
        process.stop()


@contextmanager
def naive(directory: str) -> Iterator[tuple[Process, int]]:
    port = free_port()
    process = Process("bench.naive", str(port), f"{directory}/naive.db")
    try:
        wait_until_ready(port)
        yield process, port
    finally:
        process.stop()


def register(port: int, sink: int, *, fan_out: int) -> list[str]:
    """Endpoints, `fan_out` of them for each type; the types."""
    types = [f"bench.{number}" for number in range(ENDPOINTS // fan_out)]
    for number in range(ENDPOINTS):
        type_ = types[number % len(types)]
        post(port, "/v1/endpoints", {"url": f"http://{HOST}:{sink}/{number}", "event_types": [type_]})
    return types


async def throughput(figures: Figures, sink: SinkProcess, seconds: float, finished: int = 0) -> None:
    """1: durable deliveries a second, from the publisher's request to the sink's receipt."""
    suffix = f", {finished:,} finished" if finished else ""
    for fan_out in (1, 10):
        makers = {"relay": relay} if finished else {"relay": relay, "naive": naive}
        for name, make in makers.items():
            with tempfile.TemporaryDirectory() as directory:
                if finished:
                    fill(directory, finished)
                with make(directory) as (process, port):
                    types = register(port, sink.port, fan_out=fan_out)
                    sink.say("reset")
                    accepted = await load(HOST, port, KEY, types, seconds=seconds)
                    report = await sink.until(accepted * fan_out, timeout=300)
                    rate = report["count"] / (report["last"] - report["first"])
                    figures.add(f"deliveries/s, {name}, fan-out {fan_out}{suffix}", rate)
                    if name == "relay":
                        figures.add(f"peak MiB, fan-out {fan_out}{suffix}", process.memory("VmHWM"))
    if not finished:
        ran = await asyncio.to_thread(
            subprocess.run,
            [sys.executable, "-m", "bench.bare", str(sink.port), str(seconds)],
            capture_output=True,
            text=True,
            check=True,
        )
        figures.add("deliveries/s, bare loop, nothing stored", float(ran.stdout))


async def latency(
    figures: Figures, sink: SinkProcess, seconds: float, rate: float, finished: int = 0
) -> None:
    """2: from the publisher's request to the sink's receipt, at half of the load."""
    suffix = f", {finished:,} finished" if finished else ""
    with tempfile.TemporaryDirectory() as directory:
        if finished:
            fill(directory, finished)
        with relay(directory) as (process, port):
            types = register(port, sink.port, fan_out=1)
            figures.add(f"idle MiB{suffix}", process.memory())
            await load(HOST, port, KEY, types, seconds=1, rate=rate)
            sink.say("reset")
            accepted = await load(HOST, port, KEY, types, seconds=seconds, rate=rate)
            report = await sink.until(accepted)
            figures.add(f"rate at half load{suffix}", accepted / seconds)
            figures.add(f"p50 ms at half load{suffix}", report["p50"])
            figures.add(f"p99 ms at half load{suffix}", report["p99"])


async def drain(figures: Figures, sink: SinkProcess, backlog: int, finished: int = 0) -> None:
    """3: time to empty a store full of due deliveries."""
    suffix = f", {finished:,} finished" if finished else ""
    with tempfile.TemporaryDirectory() as directory:
        with relay(directory) as (_, port):
            register(port, sink.port, fan_out=1)
        fill(directory, finished)
        fill(directory, backlog, due=True)
        sink.say("reset")
        with relay(directory) as (process, _):
            report = await sink.until(backlog, timeout=600)
            figures.add(f"drained/s{suffix}", backlog / (report["last"] - report["first"]))
            figures.add(f"peak MiB, draining {backlog:,}{suffix}", process.memory("VmHWM"))


async def isolation(figures: Figures, sink: SinkProcess, seconds: float, rate: float) -> None:
    """4: what endpoints that hang cost the others."""
    for hanging in (0, 1, 50):
        with tempfile.TemporaryDirectory() as directory:
            async with black_hole() as hole:
                with relay(directory) as (_, port):
                    healthy = []
                    for number in range(100):
                        target = hole if number < hanging else sink.port
                        type_ = f"bench.{number}"
                        body = {"url": f"http://{HOST}:{target}/{number}", "event_types": [type_]}
                        post(port, "/v1/endpoints", body)
                        if number >= hanging:
                            healthy.append(type_)
                    sick = [f"bench.{number}" for number in range(hanging)]
                    sink.say("reset")
                    # The sick ones get ten times their share when there is one of them.
                    mixed = healthy + sick * (10 if hanging == 1 else 1)
                    accepted = await load(HOST, port, KEY, mixed, seconds=seconds, rate=rate)
                    least = int(accepted * len(healthy) / len(mixed)) - len(mixed)
                    report = await sink.until(least)
                    figures.add(f"p99 ms of the healthy, {hanging} of 100 hang", report["p99"])


async def pending_memory(figures: Figures, sink: SinkProcess, count: int) -> None:
    """5: what deliveries cost in memory that wait for a retry."""
    with tempfile.TemporaryDirectory() as directory:
        with relay(directory) as (_, port):
            register(port, sink.port, fan_out=1)
        with relay(directory) as (process, _):
            before = process.memory()
        fill(directory, count, due=True, later=3_600_000)
        with relay(directory) as (process, _):
            await asyncio.sleep(2)
            figures.add(
                f"MiB per 10,000 pending (of {count:,})", (process.memory() - before) * 10_000 / count
            )


@asynccontextmanager
async def black_hole() -> AsyncIterator[int]:
    """A server that takes connections and never says a word."""

    async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await reader.read(65536):
                pass
        finally:
            writer.close()

    server = await asyncio.start_server(hang, HOST, 0, backlog=1024)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


def fill(directory: str, count: int, *, due: bool = False, later: int = 0) -> None:
    """Writes deliveries into a stopped relay's store: finished ones with an attempt each, or due ones."""
    if not count:
        return
    path = f"{directory}/relay.db"
    if not Path(path).exists():
        with relay(directory):
            pass
    now = time.time_ns() // 1_000_000
    filler = json.dumps({"type": "bench.0", "data": {"sent_at": time.time_ns(), "filler": "x" * 900}})
    with sqlite3.connect(path) as database:
        database.execute("PRAGMA synchronous = OFF")
        endpoints = [row[0] for row in database.execute("SELECT id FROM endpoints")] or ["ep_none"]
        stem = new_id("evt", now - 86_400_000)[4:20]
        numbers = range(count)
        database.executemany(
            "INSERT INTO events (id, tenant, type, body, created_at) VALUES (?, 'default', 'bench.0', ?, ?)",
            ((f"evt_{stem}{n:010d}", filler.encode(), now) for n in numbers),
        )
        status, due_at = ("pending", now + later) if due else ("delivered", None)
        database.executemany(
            """
            INSERT INTO deliveries (
                id, tenant, event_id, endpoint_id, destination, status, attempts, run_attempts,
                next_trigger, due_at, created_at, updated_at
            ) VALUES (?, 'default', ?, ?, ?, ?, ?, ?, 'scheduled', ?, ?, ?)
            """,
            (
                (
                    *(f"dlv_{stem}{n:010d}", f"evt_{stem}{n:010d}"),
                    *[endpoints[n % len(endpoints)]] * 2,
                    *(status, 0 if due else 1, 0 if due else 1, due_at, now, now),
                )
                for n in numbers
            ),
        )
        if not due:
            database.executemany(
                """
                INSERT INTO attempts (
                    id, delivery_id, number, started_at, duration_ms, reason, response_status
                ) VALUES (?, ?, 1, ?, 5, 'scheduled', 204)
                """,
                ((f"att_{stem}{n:010d}", f"dlv_{stem}{n:010d}", now) for n in numbers),
            )
    database.close()


async def measure(quick: bool) -> Figures:
    figures, sink = Figures(), SinkProcess()
    much = (5.0, 3, 100_000, 1_000_000)
    seconds, repetitions, backlog, finished = (2.0, 1, 10_000, 50_000) if quick else much
    try:
        for repetition in range(repetitions):
            console.print(f"[bold]run {repetition + 1} of {repetitions}[/]")
            await throughput(figures, sink, seconds)
            half = figures.median("deliveries/s, relay, fan-out 1") / 2
            await latency(figures, sink, seconds, half)
            await drain(figures, sink, backlog)
            await isolation(figures, sink, seconds, half / 2)
        console.print(f"[bold]with {finished:,} finished deliveries in the store[/]")
        await throughput(figures, sink, seconds, finished)
        half = figures.median("deliveries/s, relay, fan-out 1") / 2
        await latency(figures, sink, seconds, half, finished)
        await drain(figures, sink, backlog, finished)
        await pending_memory(figures, sink, backlog)
    finally:
        sink.stop()
    return figures


def show(figures: Figures) -> None:
    table = Table("figure", "median", "range", title=f"Relay {__version__}, {platform.platform()}")
    for name, values in figures.values.items():
        spread = f"{min(values):,.1f} – {max(values):,.1f}" if len(values) > 1 else ""
        table.add_row(name, f"{statistics.median(values):,.1f}", spread)
    console.print(table)
    ratios: Sequence[tuple[str, str, str]] = (
        ("relay / naive, fan-out 1", "deliveries/s, relay, fan-out 1", "deliveries/s, naive, fan-out 1"),
        ("relay / naive, fan-out 10", "deliveries/s, relay, fan-out 10", "deliveries/s, naive, fan-out 10"),
        ("relay / bare loop", "deliveries/s, relay, fan-out 1", "deliveries/s, bare loop, nothing stored"),
        ("drained / published", "drained/s", "deliveries/s, relay, fan-out 1"),
    )
    for name, above, below in ratios:
        console.print(f"{name}: {figures.median(above) / figures.median(below):.2f}", highlight=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="less of everything, to see that it works")
    parser.add_argument("--json", type=Path, help="write all values there")
    arguments = parser.parse_args()
    figures = uvloop.run(measure(arguments.quick))
    show(figures)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures.values, indent=1))


if __name__ == "__main__":
    main()
