"""How fast, how soon, how fair: `python -m bench.delivery [--quick] [--json FILE]`.

Everything runs on this machine in one go, alternating, load generator and sink included: compare the
figures of one run with each other, never with those of another machine or day.
"""

import argparse
import asyncio
import gzip
import json
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import uvloop
from rich.console import Console
from rich.table import Table

from bench.programs import ENDPOINTS, HOST, KEY, SinkProcess, fill, home, naive, post, relay
from bench.wire import load
from relay import __version__

MIB = 1024 * 1024
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


@dataclass(frozen=True)
class Store:
    """What a relay finds when it starts: a template with so many finished deliveries, or nothing."""

    template: str | None = None
    finished: int = 0

    def named(self, figure: str) -> str:
        return f"{figure}, {self.finished:,} finished" if self.finished else figure


def register(port: int, sink: int, *, fan_out: int) -> list[str]:
    """Endpoints, `fan_out` of them for each type; the types."""
    types = [f"bench.{number}" for number in range(ENDPOINTS // fan_out)]
    for number in range(ENDPOINTS):
        type_ = types[number % len(types)]
        post(port, "/v1/endpoints", {"url": f"http://{HOST}:{sink}/{number}", "event_types": [type_]})
    return types


async def throughput(figures: Figures, sink: SinkProcess, seconds: float, store: Store) -> None:
    """1: durable deliveries a second, from the publisher's request to the sink's receipt."""
    for fan_out in (1, 10):
        makers = {"relay": relay} if store.finished else {"relay": relay, "naive": naive}
        for name, make in makers.items():
            with home(store.template) as directory, make(directory) as (process, port):
                types = register(port, sink.port, fan_out=fan_out)
                sink.say("reset")
                accepted = await load(HOST, port, KEY, types, seconds=seconds)
                report = await sink.until(accepted * fan_out, timeout=300)
                rate = report["count"] / (report["last"] - report["first"])
                figures.add(store.named(f"deliveries/s, {name}, fan-out {fan_out}"), rate)
                if name == "relay":
                    figures.add(store.named(f"peak MiB, fan-out {fan_out}"), process.memory("VmHWM"))


async def ceiling(figures: Figures, sink: SinkProcess, seconds: float) -> None:
    """1: the same sender without a store, with as many requests at once as the load has and as a drain."""
    for at_once in (64, 256):
        ran = await asyncio.to_thread(
            subprocess.run,
            [sys.executable, "-m", "bench.bare", str(sink.port), str(seconds), str(at_once)],
            capture_output=True,
            text=True,
            check=True,
        )
        figures.add(f"deliveries/s, bare loop, {at_once} at once", float(ran.stdout))


async def latency(figures: Figures, sink: SinkProcess, seconds: float, rate: float, store: Store) -> None:
    """2: from the publisher's request to the sink's receipt, at half of the load."""
    with home(store.template) as directory, relay(directory) as (process, port):
        types = register(port, sink.port, fan_out=1)
        figures.add(store.named("idle MiB"), process.memory())
        await load(HOST, port, KEY, types, seconds=1, rate=rate)
        sink.say("reset")
        accepted = await load(HOST, port, KEY, types, seconds=seconds, rate=rate)
        report = await sink.until(accepted)
        figures.add(store.named("rate at half load"), accepted / seconds)
        figures.add(store.named("p50 ms at half load"), report["p50"])
        figures.add(store.named("p99 ms at half load"), report["p99"])


async def drain(figures: Figures, sink: SinkProcess, backlog: int, store: Store) -> None:
    """3: time to empty a store full of due deliveries."""
    with home(store.template) as directory:
        with relay(directory) as (_, port):
            register(port, sink.port, fan_out=1)
        fill(directory, backlog, due=True)
        sink.say("reset")
        with relay(directory) as (process, _):
            report = await sink.until(backlog, timeout=600)
            figures.add(store.named("drained/s"), backlog / (report["last"] - report["first"]))
            figures.add(store.named(f"peak MiB, draining {backlog:,}"), process.memory("VmHWM"))


async def isolation(figures: Figures, sink: SinkProcess, seconds: float, rate: float) -> None:
    """4: what endpoints that hang cost the others."""
    for hanging in (0, 1, 50):
        async with black_hole() as hole:
            with home(None) as directory, relay(directory) as (_, port):
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
    with home(None) as directory:
        with relay(directory) as (_, port):
            register(port, sink.port, fan_out=1)
        with relay(directory) as (process, _):
            await asyncio.sleep(2)
            before = process.memory()
        fill(directory, count, due=True, later=3_600_000)
        with relay(directory) as (process, _):
            await asyncio.sleep(2)
            figures.add(
                f"MiB per 10,000 pending (of {count:,})", (process.memory() - before) * 10_000 / count
            )


async def huge_answers(figures: Figures) -> None:
    """What 100 subscribers cost in memory that answer with 100 MiB, or with a gzip bomb, all at once."""
    zeros = bytes(MIB)
    plain = (b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % (100 * MIB), zeros, 100)
    packed = gzip.compress(zeros * 64)
    bomb = (
        b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: %d\r\n\r\n" % (100 * len(packed)),
        packed,
        100,
    )
    for name, answer in {"100 MiB": plain, "a gzip bomb": bomb}.items():
        async with flood(*answer) as (hose, answered):
            with home(None) as directory, relay(directory) as (process, port):
                for number in range(100):
                    url = f"http://{HOST}:{hose}/{number}"
                    post(port, "/v1/endpoints", {"url": url, "event_types": ["bench.0"]})
                process.forget_peak()
                before = process.memory("VmHWM")
                async with asyncio.timeout(60):
                    for number in range(5):
                        post(port, "/v1/events", {"type": "bench.0", "data": {}})
                        while len(answered) < 100 * (number + 1):  # noqa: ASYNC110 # it is another process
                            await asyncio.sleep(0.05)
                figures.add(f"MiB more, 100 answer {name} at once", process.memory("VmHWM") - before)


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


@asynccontextmanager
async def flood(head: bytes, piece: bytes, pieces: int) -> AsyncIterator[tuple[int, list[int]]]:
    """A server that answers each request with so many pieces, as far as they are taken; how many it sent."""
    answered: list[int] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        sent = 0
        try:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(head)
            for _ in range(pieces):
                writer.write(piece)
                await writer.drain()
                sent += 1
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            answered.append(sent)
            writer.close()

    server = await asyncio.start_server(answer, HOST, 0, backlog=1024)
    try:
        yield server.sockets[0].getsockname()[1], answered
    finally:
        server.close()


async def measure(quick: bool) -> Figures:
    figures, sink, empty = Figures(), SinkProcess(), Store()
    much = (5.0, 3, 100_000, 1_000_000)
    seconds, repetitions, backlog, finished = (2.0, 1, 10_000, 50_000) if quick else much
    with tempfile.TemporaryDirectory() as template:
        fill(template, finished)
        full = Store(template, finished)
        try:
            for repetition in range(repetitions):
                console.print(f"[bold]run {repetition + 1} of {repetitions}[/]")
                await throughput(figures, sink, seconds, empty)
                await throughput(figures, sink, seconds, full)
                await ceiling(figures, sink, seconds)
                half = figures.median("deliveries/s, relay, fan-out 1") / 2
                await latency(figures, sink, seconds, half, empty)
                await latency(figures, sink, seconds, half, full)
                await drain(figures, sink, backlog, empty)
                await drain(figures, sink, backlog, full)
                await isolation(figures, sink, seconds, half / 2)
                await huge_answers(figures)
            await pending_memory(figures, sink, backlog)
        finally:
            sink.stop()
    return figures


def show_all(figures: Figures) -> None:
    table = Table("figure", "median", "range", title=f"Relay {__version__}, {platform.platform()}")
    for name, values in figures.values.items():
        spread = f"{min(values):,.1f} – {max(values):,.1f}" if len(values) > 1 else ""
        table.add_row(name, f"{statistics.median(values):,.1f}", spread)
    console.print(table)


def show_ratios(figures: Figures) -> None:
    published = "deliveries/s, relay, fan-out 1"
    ratios: Sequence[tuple[str, str, str]] = (
        ("relay / naive, fan-out 1", published, "deliveries/s, naive, fan-out 1"),
        ("relay / naive, fan-out 10", "deliveries/s, relay, fan-out 10", "deliveries/s, naive, fan-out 10"),
        ("relay / bare loop", published, "deliveries/s, bare loop, 64 at once"),
        ("drained / bare loop", "drained/s", "deliveries/s, bare loop, 256 at once"),
        ("drained / published", "drained/s", published),
        *(
            (
                f"empty / full, {name}",
                name,
                next(full for full in figures.values if full.startswith(f"{name},")),
            )
            for name in (published, "deliveries/s, relay, fan-out 10", "drained/s")
        ),
    )
    for name, above, below in ratios:
        console.print(f"{name}: {figures.median(above) / figures.median(below):.2f}", highlight=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="less of everything, to see that it works")
    parser.add_argument("--json", type=Path, help="write all values there")
    arguments = parser.parse_args()
    figures = uvloop.run(measure(arguments.quick))
    show_all(figures)
    show_ratios(figures)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures.values, indent=1))


if __name__ == "__main__":
    main()
