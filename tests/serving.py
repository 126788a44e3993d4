"""Real servers on real sockets, for tests: anything ASGI, and a subscriber that can be told how to answer."""

import asyncio
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from relay.server import bind, serving
from relay.server import origin as origin_of

__all__ = ["Received", "Subscriber", "all_the_world", "listener", "origin_of", "serving", "until"]


async def until(true: Callable[[], bool], *, timeout: float = 15) -> None:
    """Returns as soon as it is so."""
    async with asyncio.timeout(timeout):
        while True:
            if true():
                return
            await asyncio.sleep(0.01)


def listener() -> socket.socket:
    """A socket on a free port of loopback, before anything is served on it."""
    return bind("127.0.0.1", 0)


def all_the_world(known: Mapping[str, ASGIApp], otherwise: ASGIApp) -> ASGIApp:
    """A proxy that stands for every host there is: whatever URL is made up, nothing leaves this machine.
    `known` are applications by their origins."""
    hosts = {origin.partition("://")[2]: app for origin, app in known.items()}

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        host = dict(scope.get("headers", ())).get(b"host", b"").decode("latin-1")
        await hosts.get(host, otherwise)(scope, receive, send)

    return app


@dataclass
class Received:
    """One request, as it came."""

    path: str
    headers: dict[str, str]
    body: bytes


@dataclass
class Subscriber:
    """Records what it receives at any path, and answers 204 unless it was told otherwise."""

    received: list[Received] = field(default_factory=list)
    _answers: dict[str, list[Response]] = field(default_factory=dict)
    _news: asyncio.Condition = field(default_factory=asyncio.Condition)
    origin: str = ""

    def answer(self, *statuses: int, path: str = "/", **options: Any) -> None:
        """The next answers at a path, in this order; the last one is given for ever after."""
        self._answers[path] = [Response(status_code=status, **options) for status in statuses]

    async def got(self, count: int, *, path: str | None = None, timeout: float = 15) -> Sequence[Received]:
        """What was received, as soon as it is `count` requests (at a path, when one is named)."""
        return await self.until(lambda found: len(found) >= count, path=path, timeout=timeout)

    async def until(
        self, enough: Callable[[Sequence[Received]], bool], *, path: str | None = None, timeout: float = 15
    ) -> Sequence[Received]:
        async with asyncio.timeout(timeout), self._news:
            await self._news.wait_for(lambda: enough(self._at(path)))
        return self._at(path)

    def _at(self, path: str | None) -> Sequence[Received]:
        return [one for one in self.received if path is None or one.path == path]

    async def _receive(self, request: Request) -> Response:
        body = await request.body()
        path = request.url.path
        async with self._news:
            self.received.append(Received(path, dict(request.headers), body))
            self._news.notify_all()
        answers = self._answers.get(path, [])
        if not answers:
            return Response(status_code=204)
        return answers.pop(0) if len(answers) > 1 else answers[0]

    @property
    def app(self) -> ASGIApp:
        return Starlette(routes=[Route("/{path:path}", self._receive, methods=["POST", "GET"])])
