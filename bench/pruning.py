"""What removing old rows costs those who deliver: `python -m bench.pruning [--quick]`.

A relay publishes and delivers at a steady rate over a store full of what is old: once it keeps that, once it
removes it meanwhile. Alternating; compare the figures of one run with each other only.
"""

import argparse
import asyncio
import statistics
import tempfile
import time
import urllib.request

import uvloop

from bench.delivery import Figures, console, register, show_all
from bench.programs import HOST, KEY, SinkProcess, fill, home, relay
from bench.wire import load

# As long as it takes until the first old rows go.
PATIENCE = 120


def removed(port: int) -> float:
    """How many rows retention has removed so far: an event takes its delivery with it, and its attempt."""
    request = urllib.request.Request(  # our own server
        f"http://{HOST}:{port}/metrics", headers={"authorization": f"Bearer {KEY}"}
    )
    lines = urllib.request.urlopen(request).read().decode().splitlines()  # noqa: S310 # our own server
    found = {line.split(" ")[0]: float(line.split(" ")[1]) for line in lines if not line.startswith("#")}
    events = found.get('relay_pruned_rows_total{kind="events"}', 0)
    return 2 * events + found.get('relay_pruned_rows_total{kind="attempts"}', 0)


async def under_way(port: int) -> None:
    async with asyncio.timeout(PATIENCE):
        while not removed(port):  # noqa: ASYNC110 # it is another process
            await asyncio.sleep(0.2)


async def measure(events: int, repetitions: int, seconds: float, rate: float) -> Figures:
    figures, sink = Figures(), SinkProcess()
    with tempfile.TemporaryDirectory() as template:
        fill(template, events)
        try:
            for _ in range(repetitions):
                for what, kept in (("keeping", "365d"), ("removing", "1h")):
                    retention = {"events": kept, "attempts": kept}
                    with home(template) as directory, relay(directory, retention=retention) as (_, port):
                        types = register(port, sink.port, fan_out=1)
                        await load(HOST, port, KEY, types, seconds=1, rate=rate)
                        if what == "removing":
                            await under_way(port)
                        sink.say("reset")
                        before, begun = removed(port), time.monotonic()
                        accepted = await load(HOST, port, KEY, types, seconds=seconds, rate=rate)
                        report = await sink.until(accepted)
                        for name in ("p50", "p99"):
                            figures.add(f"{name} ms, {what} what is old", report[name])
                        figures.add(f"deliveries/s, {what}", accepted / seconds)
                        if what == "removing":
                            gone = removed(port) - before
                            figures.add("rows removed/s", gone / (time.monotonic() - begun))
        finally:
            sink.stop()
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="less of everything, to see that it works")
    parser.add_argument("--rate", type=float, default=1000.0, help="deliveries a second")
    parser.add_argument("--repetitions", type=int, default=3)
    arguments = parser.parse_args()
    much = (333_334, arguments.repetitions, 45.0)
    events, repetitions, seconds = (60_000, 1, 5.0) if arguments.quick else much
    figures = uvloop.run(measure(events, repetitions, seconds, arguments.rate))
    show_all(figures)
    ratio = statistics.median(figures.values["p99 ms, removing what is old"]) / statistics.median(
        figures.values["p99 ms, keeping what is old"]
    )
    console.print(f"p99, removing / keeping: {ratio:.2f}", highlight=False)


if __name__ == "__main__":
    main()
