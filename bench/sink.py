"""The subscriber of the measurements, a process of its own: `python -m bench.sink PORT`.

A line `reset` on standard input forgets; `report` prints what was received since, as JSON.
"""

import asyncio
import json
import sys
import time

import uvloop

from bench.wire import Sink, age_ms, percentile


async def main(port: int) -> None:
    """Serves until standard input ends."""
    ages: list[float] = []
    times = [0.0, 0.0]

    def received(body: bytes) -> None:
        now = time.monotonic()
        if not ages:
            times[0] = now
        times[1] = now
        ages.append(age_ms(body))

    loop = asyncio.get_running_loop()
    await loop.create_server(lambda: Sink(received), "127.0.0.1", port, backlog=1024)
    print("ready", flush=True)
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        if line.strip() == "reset":
            ages.clear()
        report = {
            "count": len(ages),
            "first": times[0],
            "last": times[1],
            "p50": percentile(ages, 0.5),
            "p99": percentile(ages, 0.99),
        }
        print(json.dumps(report), flush=True)


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1])))
