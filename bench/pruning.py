"""What removing old rows costs those who deliver: `python -m bench.pruning [--quick]`.

One relay publishes and delivers at a steady rate over a store full of what is old, and removes that in every
second stretch of some seconds: what else the machine does meanwhile counts on both sides.
"""

import argparse
import asyncio
import os
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import uvloop

from bench.delivery import Figures, console, register, show_all
from bench.programs import HOST, KEY, SinkProcess, fill, home, relay
from bench.wire import load

# Where this file is, the relay beside it removes what is old.
FLAG = "removing"


def removed(port: int) -> float:
    """How many rows retention has removed so far: an event takes its delivery with it."""
    request = urllib.request.Request(  # our own server
        f"http://{HOST}:{port}/metrics", headers={"authorization": f"Bearer {KEY}"}
    )
    lines = urllib.request.urlopen(request).read().decode().splitlines()  # noqa: S310 # our own server
    found = {line.split(" ")[0]: float(line.split(" ")[1]) for line in lines if not line.startswith("#")}
    events = found.get('relay_pruned_rows_total{kind="events"}', 0)
    return 2 * events + found.get('relay_pruned_rows_total{kind="attempts"}', 0)


def tell(directory: str, removes: bool) -> None:
    flag = Path(directory, FLAG)
    flag.touch() if removes else flag.unlink(missing_ok=True)


async def measure(events: int, stretches: int, seconds: float, rate: float) -> Figures:
    figures, sink = Figures(), SinkProcess()
    retention = {"events": "1h", "attempts": "1h"}
    with tempfile.TemporaryDirectory() as template:
        fill(template, events)
        with home(template) as directory, relay(directory, "bench.pruning", retention=retention) as (_, port):
            types = register(port, sink.port, fan_out=1)
            await load(HOST, port, KEY, types, seconds=2, rate=rate)
            try:
                for stretch in range(2 * stretches):
                    removes = stretch % 2 == 1
                    tell(directory, removes)
                    await asyncio.sleep(1)
                    sink.say("reset")
                    before, begun = removed(port), time.monotonic()
                    accepted = await load(HOST, port, KEY, types, seconds=seconds, rate=rate)
                    report = await sink.until(accepted)
                    doing = "removing" if removes else "keeping"
                    for name in ("p50", "p99"):
                        figures.add(f"{name} ms, {doing} what is old", report[name])
                    figures.add(f"deliveries/s, {doing}", accepted / seconds)
                    gone = removed(port) - before
                    if removes:
                        figures.add("rows removed/s", gone / (time.monotonic() - begun))
                    elif gone:
                        console.print(f"{gone:,.0f} rows went that should have been kept")
            finally:
                sink.stop()
    return figures


def serve() -> None:
    """The relay, which begins to remove every second, while the flag is there."""
    import relay.app
    import relay.prune
    from relay.cli import main

    def flagged(goes_on: Callable[[], bool]) -> Callable[[], bool]:
        return lambda: goes_on() and os.path.exists(FLAG)

    prune = relay.prune.prune

    async def when_told(*given: Any, goes_on: Callable[[], bool], **named: Any) -> int:
        return await prune(*given, goes_on=flagged(goes_on), **named)

    relay.prune.prune = when_told
    relay.app.PRUNE_TICK = 1
    main()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="less of everything, to see that it works")
    parser.add_argument("--rate", type=float, default=1000.0, help="deliveries a second")
    arguments = parser.parse_args()
    events, stretches, seconds = (60_000, 2, 3.0) if arguments.quick else (333_334, 12, 5.0)
    figures = uvloop.run(measure(events, stretches, seconds, arguments.rate))
    show_all(figures)
    for name in ("p50", "p99"):
        above, below = (
            figures.median(f"{name} ms, {doing} what is old") for doing in ("removing", "keeping")
        )
        console.print(f"{name}, removing / keeping: {above / below:.2f}", highlight=False)


if __name__ == "__main__":
    serve() if sys.argv[1:2] == ["serve"] else main()
