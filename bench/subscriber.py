"""The subscribers of the soak: they take what comes, fail in every way, and keep the books."""

import asyncio
import random
import time
from array import array
from collections import Counter
from dataclasses import dataclass, field

from aiohttp import web
from standardwebhooks import Webhook, WebhookVerificationError

ENDPOINTS, WELL = 50, 40
FAULTY = {
    "5 % 500": range(40, 44),
    "1 % hang": [44],
    "2 % 429": [45],
    "outages": [46, 47],
    "2 % dropped": [48],
    "slow": [49],
}


@dataclass
class Books:
    """What was acknowledged, and what came: the two must agree in the end."""

    acknowledged: bytearray = field(default_factory=bytearray)  # by an event's number
    received: bytearray = field(default_factory=bytearray)
    again: int = 0
    refused: Counter[int] = field(default_factory=Counter)  # how often, by number, until taken
    watched: set[str] = field(default_factory=set)  # generations whose end has not been announced
    early: set[str] = field(default_factory=set)  # announced before the watcher had its answer
    ended: int = 0
    dead: dict[int, int] = field(default_factory=dict)  # how often each event was sent to who never takes any
    forged: int = 0
    lags: "array[float]" = field(
        default_factory=lambda: array("f")
    )  # ms from publishing to a healthy endpoint
    answers: Counter[str] = field(default_factory=Counter)

    def acknowledge(self, number: int) -> None:
        mark(self.acknowledged, number)

    def take(self, number: int) -> None:
        """A subscriber has taken it."""
        self.again += mark(self.received, number)
        self.refused.pop(number, None)

    def take_end(self, generation: str) -> None:
        self.ended += 1
        if generation in self.watched:
            self.watched.discard(generation)
        else:
            self.early.add(generation)

    def missing(self) -> list[int]:
        """The numbers of what was acknowledged and has not come."""
        come = self.received.ljust(len(self.acknowledged), b"\0")
        return [n for n, acknowledged in enumerate(self.acknowledged) if acknowledged and not come[n]]


def mark(numbers: bytearray, number: int) -> int:
    """What stood there before."""
    if number >= len(numbers):
        numbers.extend(bytes(max(number + 1 - len(numbers), 65_536)))
    before, numbers[number] = numbers[number], 1
    return before


class Subscriber:
    """All endpoints, by their paths; each verifies what comes, and fails in its own way while `faults`."""

    def __init__(self, books: Books, begun: float) -> None:
        self._books, self._begun = books, begun
        self._dice = random.Random(1)  # noqa: S311 # faults, not secrets
        self.hooks: dict[str, Webhook] = {}
        self.faults = True
        self.app = web.Application()
        self.app.router.add_post("/{name}", self._receive)

    async def _receive(self, request: web.Request) -> web.Response:
        name, body = request.match_info["name"], await request.read()
        try:
            event = self.hooks[name].verify(body, dict(request.headers))
        except WebhookVerificationError:
            self._books.forged += 1
            return web.Response(status=401)
        if name == "generations":
            self._books.take_end(event["data"]["id"])
            return web.Response(status=204)
        if name == "dead":
            self._books.dead[event["data"]["number"]] += 1
            return web.Response(status=500)
        number, sent_at = event["data"]["number"], event["data"]["sent_at"]
        status = await self._mood(int(name), request)
        self._books.answers[str(status)] += 1
        if status == 204:
            self._books.take(number)
            if int(name) < WELL:
                self._books.lags.append((time.time_ns() - sent_at) / 1e6)
        else:
            self._books.refused[number] += 1
        return web.Response(status=status, headers={"retry-after": "2"} if status == 429 else None)

    async def _mood(self, number: int, request: web.Request) -> int:
        """The status it answers with."""
        if not self.faults or number < WELL:
            return 204
        chance = self._dice.random()
        if number in FAULTY["5 % 500"]:
            return 500 if chance < 0.05 else 204
        if number in FAULTY["1 % hang"] and chance < 0.01:
            await asyncio.sleep(20)
        if number in FAULTY["2 % 429"] and chance < 0.02:
            return 429
        if number in FAULTY["outages"] and (time.monotonic() - self._begun) % 420 > 360:
            return 503
        if number in FAULTY["2 % dropped"] and chance < 0.02 and request.transport is not None:
            request.transport.abort()
            return 500
        if number in FAULTY["slow"]:
            await asyncio.sleep(0.3)
        return 204
