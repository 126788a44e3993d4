"""HTTP at its barest, so that the load and the sink cost the machine as little as can be."""

import asyncio
import json
import time
from collections import deque
from collections.abc import Callable, Sequence
from itertools import cycle


class Sink(asyncio.Protocol):
    """Answers 204 to every POST at once, and keeps the age of each by the `sent_at` (ns) in its body."""

    def __init__(self, received: Callable[[bytes], None]) -> None:
        self._received = received
        self._buffer = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while (end := self._buffer.find(b"\r\n\r\n")) >= 0:
            head = self._buffer[:end].lower()
            at = head.find(b"content-length:")
            length = int(head[at + 15 :].split(b"\r\n", 1)[0]) if at >= 0 else 0
            if len(self._buffer) < end + 4 + length:
                return
            body = bytes(self._buffer[end + 4 : end + 4 + length])
            del self._buffer[: end + 4 + length]
            self._received(body)
            self._transport.write(b"HTTP/1.1 204 No Content\r\n\r\n")


class Client(asyncio.Protocol):
    """One connection; one request at a time."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._waiting: asyncio.Future[int] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0 or self._waiting is None:
            return
        head = self._buffer[:end].lower()
        at = head.find(b"content-length:")
        length = int(head[at + 15 :].split(b"\r\n", 1)[0]) if at >= 0 else 0
        if len(self._buffer) >= end + 4 + length:
            status = int(self._buffer[9:12])
            self._buffer.clear()
            waiting, self._waiting = self._waiting, None
            waiting.set_result(status)

    def connection_lost(self, error: Exception | None) -> None:
        if self._waiting is not None:
            self._waiting.set_exception(error or ConnectionError("closed"))

    def send(self, request: bytes) -> asyncio.Future[int]:
        """The status of the answer."""
        self._waiting = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return self._waiting


def request(host: str, path: str, key: str, body: bytes) -> bytes:
    return (
        f"POST {path} HTTP/1.1\r\nhost: {host}\r\nauthorization: Bearer {key}\r\n"
        f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    ).encode() + body


def event(filler: str, *, type_: str = "bench.0") -> bytes:
    """An event of about a kilobyte that says when it was sent."""
    return json.dumps({"type": type_, "data": {"sent_at": time.time_ns(), "filler": filler}}).encode()


def age_ms(body: bytes) -> float:
    """How long ago the event in a delivery was sent."""
    at = body.find(b'"sent_at":') + 10
    return (time.time_ns() - int(body[at : body.find(b",", at)])) / 1e6


async def load(
    host: str,
    port: int,
    key: str,
    types: Sequence[str],
    *,
    seconds: float,
    connections: int = 64,
    rate: float | None = None,
) -> int:
    """Publishes events of these types in turn, as fast as they are answered or at `rate` a second; how many
    were accepted."""
    loop = asyncio.get_running_loop()
    filler = "x" * 900
    accepted = 0
    end = loop.time() + seconds
    slots = deque([loop.time()])
    turn = cycle(types)

    async def one() -> None:
        nonlocal accepted
        _, client = await loop.create_connection(Client, host, port)
        while (now := loop.time()) < end:
            if rate is not None:
                slot = max(slots[0], now - 0.1)
                slots[0] = slot + 1 / rate
                await asyncio.sleep(max(0, slot - now))
            body = event(filler, type_=next(turn))
            status = await client.send(request(f"{host}:{port}", "/v1/events", key, body))
            accepted += 200 <= status <= 299

    await asyncio.gather(*(one() for _ in range(connections)))
    return accepted


def percentile(values: Sequence[float], share: float) -> float:
    """The value that `share` of them do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))] if ordered else float("nan")
