"""What PostgreSQL and more relays cost and give: `python -m bench.scaling [--quick] [--json FILE]`.

One relay on SQLite, and one, two and three on one PostgreSQL, in turn, with the same work and on the same
cores as the load, the sink and the database: a ratio tells what each costs, not what more machines give.
"""

import argparse
import asyncio
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import asyncpg
import uvloop

from bench.delivery import Figures, console, register, show_all
from bench.programs import ENDPOINTS, HOST, KEY, Process, SinkProcess, cpu_of, fill, home, relay
from bench.wire import load, percentile
from relay.delivery import Answer, settle
from relay.endpoint import Endpoint
from relay.event import published
from relay.ids import new_id
from relay.keyring import KeyRing
from relay.shard import SHARDS
from relay.store import open_database, store_on
from relay.store.events import Handoff, Publication
from relay.tenant import DEFAULT
from tests.postgres import Cluster, running_cluster

# As a server that is relied on is set up.
DURABLE = {"fsync": "on", "full_page_writes": "on", "shared_buffers": "512MB", "max_wal_size": "4GB"}
SHAPES = {"SQLite": 0, "PostgreSQL, 1 relay": 1, "PostgreSQL, 2 relays": 2, "PostgreSQL, 3 relays": 3}


@dataclass
class Fleet:
    relays: Sequence[tuple[Process, int]]
    cluster: Cluster | None

    def cpu(self) -> tuple[float, float]:
        """Seconds of CPU that the relays and the database have used."""
        return sum(process.cpu() for process, _ in self.relays), _cpu_of_server(self.cluster)


@contextmanager
def fleet(cluster: Cluster, shape: str) -> Iterator[Fleet]:
    """Relays at work on an empty database, which have shared everything."""
    count = SHAPES[shape]
    with home(None) as directory, ExitStack() as stack:
        if not count:
            yield Fleet([stack.enter_context(relay(directory))], None)
            return
        url = cluster.database()
        stack.callback(cluster.drop, url)
        relays = [stack.enter_context(relay(directory, database=url)) for _ in range(count)]
        while _fewest_shards(cluster, url) < SHARDS // count - count:
            time.sleep(0.2)
        yield Fleet(relays, cluster)


async def throughput(figures: Figures, sink: SinkProcess, shape: str, one: Fleet, seconds: float) -> None:
    types = register(one.relays[0][1], sink.port, fan_out=1)
    sink.say("reset")
    before = one.cpu()
    accepted = await _load(one, types, seconds)
    report = await sink.until(accepted, timeout=300)
    relays, server = (after - then for after, then in zip(one.cpu(), before, strict=True))
    figures.add(f"deliveries/s, {shape}", report["count"] / (report["last"] - report["first"]))
    figures.add(f"CPU µs a delivery, {shape}: relays", relays * 1e6 / accepted)
    if one.cluster is not None:
        figures.add(f"CPU µs a delivery, {shape}: PostgreSQL", server * 1e6 / accepted)
        figures.add(f"PostgreSQL's share of the CPU, {shape}, %", 100 * server / (server + relays))


async def latency(
    figures: Figures, sink: SinkProcess, shape: str, one: Fleet, seconds: float, rate: float
) -> None:
    types = register(one.relays[0][1], sink.port, fan_out=1)
    await _load(one, types, 1, rate)
    sink.say("reset")
    report = await sink.until(await _load(one, types, seconds, rate))
    figures.add(f"p50 ms at {rate:,.0f}/s, {shape}", report["p50"])
    figures.add(f"p99 ms at {rate:,.0f}/s, {shape}", report["p99"])


async def claims(figures: Figures, name: str, url: str, finished: int, times: int) -> None:
    """How long it takes to find and claim two deliveries of each of fifty endpoints."""
    database = await open_database(url)
    store = store_on(database, KeyRing(["bench"]))
    now = time.time_ns() // 1_000_000
    for number in range(ENDPOINTS):
        to = f"https://example.com/{number}"
        types = ("bench.0",)
        one = Endpoint(new_id("ep", now), DEFAULT, to, "whsec_", now, now, event_types=types)
        await store.endpoints.create(one, None)
    took = []
    for _ in range(times):
        events = [published(DEFAULT, "bench.0", {}, None, now=now) for _ in range(2)]
        await store.events.publish([Publication(DEFAULT, events, None)], _TO_NOBODY, now=now)
        lease = uuid4().hex
        began = time.perf_counter()
        found = await store.deliveries.destinations(now=now, after="", limit=500)
        wanted = {destination: 2 for destination, is_due in found if is_due}
        claimed = await store.deliveries.claim(wanted, now=now, lease=lease, lease_until=now + 45_000)
        took.append((time.perf_counter() - began) * 1000)
        done = [settle(one, Answer(now, 5, status=204), schedule=(), now=now, spread=0) for one in claimed]
        await store.deliveries.settle(done, now=now)
    for one in await store.endpoints.page(DEFAULT, limit=1_000, cursor=None):
        await store.endpoints.delete(DEFAULT, one.id, now=now)
    await database.close()
    for share in (0.5, 0.99):
        label = f"ms to claim {2 * ENDPOINTS}, {finished:,} finished, p{share * 100:.0f}, {name}"
        figures.add(label, percentile(took, share))


async def fill_server(url: str, count: int) -> None:
    """As `fill` writes finished deliveries into a file."""
    connection = await asyncpg.connect(url)
    now = time.time_ns() // 1_000_000
    stem = new_id("evt", now - 86_400_000)[4:20]
    filler = json.dumps({"type": "bench.0", "data": {"filler": "x" * 900}}).encode()
    numbers = f"generate_series(1, {count}) AS n"
    await connection.execute(
        f"""
        INSERT INTO events (id, tenant, type, body, created_at)
        SELECT 'evt_{stem}' || lpad(CAST(n AS TEXT), 10, '0'), 'default', 'bench.0',
            decode('{filler.hex()}', 'hex'), {now} FROM {numbers}
        """
    )
    await connection.execute(
        f"""
        INSERT INTO deliveries (
            id, tenant, event_id, endpoint_id, destination, status, attempts, run_attempts, next_trigger,
            created_at, updated_at
        ) SELECT 'dlv_{stem}' || lpad(CAST(n AS TEXT), 10, '0'), 'default',
            'evt_{stem}' || lpad(CAST(n AS TEXT), 10, '0'), 'ep_old' || n % 50, 'ep_old' || n % 50,
            'delivered', 1, 1, 'scheduled', {now}, {now} FROM {numbers}
        """
    )
    await connection.execute(
        f"""
        INSERT INTO attempts (id, delivery_id, number, started_at, duration_ms, reason, response_status)
        SELECT 'att_{stem}' || lpad(CAST(n AS TEXT), 10, '0'),
            'dlv_{stem}' || lpad(CAST(n AS TEXT), 10, '0'), 1, {now}, 5, 'scheduled', 204 FROM {numbers}
        """
    )
    await connection.execute("VACUUM ANALYZE")
    await connection.close()


async def claims_on_both(figures: Figures, cluster: Cluster, finished: int, times: int) -> None:
    with home(None) as directory:
        fill(directory, finished)
        url = cluster.database()
        await fill_server(url, finished)
        for _ in range(3):
            await claims(figures, "SQLite", f"sqlite:///{directory}/relay.db", finished, times)
            await claims(figures, "PostgreSQL", url, finished, times)
        cluster.drop(url)


async def measure(cluster: Cluster, quick: bool) -> Figures:
    figures, sink = Figures(), SinkProcess()
    seconds, repetitions, finished = (2.0, 1, 50_000) if quick else (5.0, 3, 1_000_000)
    try:
        rate = 0.0
        for repetition in range(repetitions):
            console.print(f"[bold]run {repetition + 1} of {repetitions}[/]")
            for shape in SHAPES:
                with fleet(cluster, shape) as one:
                    await throughput(figures, sink, shape, one, seconds)
            # The same for all, which the slowest of them bears easily.
            rate = rate or round(min(figures.median(f"deliveries/s, {shape}") for shape in SHAPES) / 2, -1)
            for shape in SHAPES:
                with fleet(cluster, shape) as one:
                    await latency(figures, sink, shape, one, seconds, rate)
    finally:
        sink.stop()
    await claims_on_both(figures, cluster, finished, 20 if quick else 300)
    return figures


async def _load(one: Fleet, types: Sequence[str], seconds: float, rate: float | None = None) -> int:
    """As much as one relay gets, spread over all of them."""
    among = len(one.relays)
    share = {"connections": 64 // among, "rate": rate / among if rate else None}
    accepted = await asyncio.gather(
        *(load(HOST, port, KEY, types, seconds=seconds, **share) for _, port in one.relays)
    )
    return sum(accepted)


def _fewest_shards(cluster: Cluster, url: str) -> int:
    sql = "SELECT COUNT(s.number) FROM relays r LEFT JOIN shards s ON s.holder = r.id GROUP BY r.id"
    return min(map(int, cluster.run("psql", url, "-Atc", sql).split()), default=0)


def _cpu_of_server(cluster: Cluster | None) -> float:
    """Of the server's processes, those that have ended included."""
    if cluster is None:
        return 0.0
    main = int((cluster.data / "postmaster.pid").read_text().split("\n", 1)[0])
    children = map(int, Path(f"/proc/{main}/task/{main}/children").read_text().split())
    return cpu_of(main, with_ended_children=True) + sum(cpu_of(pid) for pid in children)


_TO_NOBODY = Handoff("", 0, takes=lambda destination, size: False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="less of everything, to see that it works")
    parser.add_argument("--json", type=Path, help="write all values there")
    arguments = parser.parse_args()
    with running_cluster(**DURABLE) as cluster:
        cluster.make_template()
        figures = uvloop.run(measure(cluster, arguments.quick))
    show_all(figures)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures.values, indent=1))


if __name__ == "__main__":
    main()
