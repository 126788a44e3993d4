"""The ceiling: sign and POST, with nothing stored. `python -m bench.bare PORT SECONDS AT_ONCE`
prints a rate."""

import asyncio
import gc
import ipaddress
import sys
import time

import uvloop

from bench.wire import event
from relay import signature
from relay.app import NEW_OBJECTS
from relay.guard import Guard
from relay.sender import Sender


async def main(port: int, seconds: float, at_once: int) -> None:
    gc.set_threshold(NEW_OBJECTS)
    guard = Guard([ipaddress.ip_network("127.0.0.0/8")])
    sender = Sender.open(guard, timeout=15_000, now=lambda: time.time_ns() // 1_000_000)
    secret, end, count = signature.new_secret(), time.monotonic() + seconds, 0

    async def one(number: int) -> None:
        nonlocal count
        while time.monotonic() < end:
            body = event("x" * 900)
            headers = signature.headers([secret], "evt_bench", int(time.time()), body)
            answer = await sender.send(f"http://127.0.0.1:{port}/{number % 50}", body, headers)
            count += answer.accepted

    await asyncio.gather(*(one(number) for number in range(at_once)))
    await sender.close()
    print(count / seconds)


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])))
