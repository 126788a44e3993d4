"""For operators and readers: health, the OpenAPI document and its page."""

import asyncio
import math
import time
from collections.abc import Mapping, Sequence
from importlib.resources import files
from itertools import groupby

from jinja2 import Environment
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from relay.body import compact
from relay.errors import ConfigError, StoreError
from relay.signature import TOLERANCE
from relay.store.migrate import pending
from relay.web.context import Relay, State
from relay.web.openapi import document
from relay.web.operation import Operation
from relay.web.scrape import Scraper

MEBIBYTE = 1024 * 1024
# What the database has said is told again for so long; seconds.
FRESH = 1.0
_NOTHING = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
_CSP = f"{_NOTHING}; style-src 'unsafe-inline'"


async def live(request: Request) -> Response:
    """The process answers."""
    return JSONResponse({"status": "ok"})


class Readiness:
    """Whether the database takes writes and has room and its migrations, the clock is right enough to sign
    with, and every loop beats."""

    def __init__(self) -> None:
        self._turn = asyncio.Lock()
        self._asked_at = -math.inf
        self._database: Mapping[str, str] = {}

    async def answer(self, request: Request[State]) -> Response:
        relay = request.state["relay"]
        # Anybody may ask, and what the database is asked is a write.
        async with self._turn:
            if time.monotonic() - self._asked_at > FRESH:
                self._database = await _database(relay)
                self._asked_at = time.monotonic()
            checks = {**self._database, "clock": "ok"}
        skew = relay.asker.skew
        if skew is not None and abs(skew) > TOLERANCE * 1000:
            checks["clock"] = f"{skew / 1000:+.0f} s off the providers': subscribers refuse what is signed so"
        checks |= await _disk(relay)
        for loop, silent in relay.pulse.silent(time.monotonic()).items():
            checks[loop] = "ok" if silent is None else f"has not come to its end for {silent:.0f} s"
        good = all(verdict == "ok" for verdict in checks.values())
        return JSONResponse({"status": "ok" if good else "failing", "checks": checks}, 200 if good else 503)


async def _database(relay: Relay) -> Mapping[str, str]:
    checks = {"database": "ok", "migrations": "ok"}
    try:
        await relay.store.database.probe()
        if names := await pending(relay.store.database):
            checks["migrations"] = f"missing: {', '.join(names)}"
    except StoreError as error:
        # What follows names databases and users, and this is told to everybody; the log has it.
        checks["database"] = str(error).partition(":")[0]
    except ConfigError:
        pass  # a newer release has migrated it, and leaves this one working until it is replaced
    return checks


async def _disk(relay: Relay) -> Mapping[str, str]:
    try:
        free, least = await relay.store.database.free(), relay.settings.min_free
    except StoreError:
        return {"disk": "cannot be seen"}
    if free is None:
        return {}
    enough = free >= least
    return {"disk": "ok" if enough else f"{free // MEBIBYTE} MiB are left, below min_free"}


def routes(operations: Sequence[Operation]) -> list[Route]:
    """The pages are made once: they are the same for everybody."""
    described = document(operations)
    listed = [
        (path, method, operation)
        for path, methods in described["paths"].items()
        for method, operation in methods.items()
    ]
    tags = [(tag, list(group)) for tag, group in groupby(listed, key=lambda one: one[2]["tags"][0])]
    template = Environment(autoescape=True).from_string(files("relay.web").joinpath("docs.html").read_text())
    page, text = template.render(document=described, tags=tags), compact(described)

    async def openapi(request: Request) -> Response:
        return Response(text, media_type="application/json")

    async def docs(request: Request) -> Response:
        return HTMLResponse(page, headers={"content-security-policy": _CSP})

    return [
        Route("/healthz", live),
        Route("/readyz", Readiness().answer),
        Route("/metrics", Scraper().answer),
        Route("/openapi.json", openapi),
        Route("/docs", docs),
    ]
