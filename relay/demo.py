"""`relay demo`: a relay, simulated providers and a verifying subscriber, over real HTTP on loopback."""

import asyncio
import json
import secrets
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from relay import signature
from relay.app import build
from relay.config import read_config
from relay.server import bind, origin, serving
from relay.simulator import Simulator

DEADLINE = 50.0
# One of each provider's ends well; one of all fails at its provider.
JOBS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("pixellabs", {"duration": 2.0}),
    ("vivix", {"duration": 3.0, "outputs": 2}),
    ("pictory", {"duration": 2.5}),
    ("luma", {"duration": 3.5}),
    ("luma", {"duration": 1.5, "outcome": "failed", "code": "content_moderated"}),
)
HOOK, DOWN = "/hook", "/down"


@dataclass
class Subscriber:
    """Verifies what it receives. `/hook` fails its first request; `/down` fails until it is `repaired`."""

    secrets: dict[str, str] = field(default_factory=dict)
    lines: list[tuple[str, str, str, str]] = field(default_factory=list)
    accepted: dict[str, set[str]] = field(default_factory=lambda: {HOOK: set(), DOWN: set()})
    forged: int = 0
    stumbled: bool = False
    repaired: bool = False
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    async def receive(self, request: Request) -> Response:
        path, body, headers = request.url.path, await request.body(), request.headers
        verdict, status = "valid", 204
        try:
            signature.verify(
                self.secrets[path],
                headers["webhook-id"],
                headers["webhook-timestamp"],
                headers["webhook-signature"],
                body,
                now=int(time.time()),
            )
        except (signature.BadSignature, KeyError) as error:
            self.forged += 1
            verdict, status = f"NOT valid: {error}", 401
        else:
            status = self._answer(path)
            if status == 204:
                self.accepted[path].add(headers["webhook-id"])
        event = json.loads(body)
        self.lines.append((f"{path} {event['type']}", event["data"].get("account", ""), verdict, str(status)))
        self.changed.set()
        return Response(status_code=status)

    def _answer(self, path: str) -> int:
        if path == DOWN:
            return 204 if self.repaired else 503
        if not self.stumbled:
            self.stumbled = True
            return 500
        return 204


async def demo(console: Console) -> bool:
    """Runs the demonstration; whether every expected webhook was received with a valid signature."""
    simulator, subscriber = Simulator(), Subscriber()
    hooks = Starlette(routes=[Route(path, subscriber.receive, methods=["POST"]) for path in (HOOK, DOWN)])
    with tempfile.TemporaryDirectory() as directory:
        async with (
            serving(simulator.app) as simulated,
            serving(hooks) as subscribed,
            _relay(directory, simulator, simulated) as (address, api),
        ):
            console.print(
                f"Relay is at {address}, the simulated providers at {simulated}, a subscriber at {subscribed}"
            )
            for path in (HOOK, DOWN):
                types = None if path == HOOK else ["generation.failed"]
                endpoint = await _post(api, "/v1/endpoints", {"url": subscribed + path, "event_types": types})
                subscriber.secrets[path] = endpoint["secret"]
            with Live(console=console, refresh_per_second=8) as live:
                story = _play(api, simulator, subscriber)
                try:
                    async with asyncio.timeout(DEADLINE):
                        await _watch(live, api, subscriber, story)
                    done = True
                except TimeoutError:
                    done = False
                live.update(await _picture(api, subscriber))
    if not console.is_terminal:
        console.print()
    count = sum(len(ids) for ids in subscriber.accepted.values())
    good = done and not subscriber.forged
    verdict = "[green]Every webhook arrived[/]" if good else "[red]Not every webhook arrived[/]"
    console.print(
        f"{verdict}: {count} accepted, {subscriber.forged} with a bad signature,"
        f" {len(subscriber.lines) - count} refused on purpose and sent again."
    )
    return good


@asynccontextmanager
async def _relay(
    directory: str, simulator: Simulator, simulated: str
) -> AsyncIterator[tuple[str, httpx.AsyncClient]]:
    bound, key = bind("127.0.0.1", 0), secrets.token_urlsafe(16)
    settings = read_config(
        {
            "public_url": origin(bound),
            "database": f"sqlite:///{directory}/demo.db",
            "secret_key": secrets.token_urlsafe(32),
            "admin_key": key,
            "accounts": {
                name: {
                    "provider": name,
                    "api_key": simulator.keys[name],
                    "base_url": url,
                    "poll_interval": "500ms",
                }
                for name, url in Simulator.base_urls(simulated).items()
            },
            "delivery": {"timeout": "5s", "schedule": ["1s", "2s"]},
            "network": {"allow": ["127.0.0.0/8"]},
        },
        {},
    )
    async with (
        serving(build(settings), bound) as address,
        httpx.AsyncClient(
            base_url=address, headers={"authorization": f"Bearer {key}"}, timeout=60, trust_env=False
        ) as api,
    ):
        yield address, api


async def _play(api: httpx.AsyncClient, simulator: Simulator, subscriber: Subscriber) -> None:
    """Begins and watches the jobs, repairs the broken subscriber, replays what failed, waits for it all."""
    for name, plan in JOBS:
        if name == "pictory":
            generation = await _post(api, "/v1/generations", {"account": name})
            simulator.submit(name, request={"webhook": generation["webhook_url"]}, **plan)
        else:
            await _post(api, "/v1/generations", {"account": name, "job_id": simulator.submit(name, **plan)})
    failed = await _until(api, "/v1/deliveries?status=failed", lambda found: bool(found))
    subscriber.repaired = True
    await _post(api, f"/v1/deliveries/{failed[0]['id']}/replay")
    while len(subscriber.accepted[HOOK]) < len(JOBS) or not subscriber.accepted[DOWN]:
        subscriber.changed.clear()
        await subscriber.changed.wait()
    await _until(api, "/v1/deliveries", lambda found: all(one["status"] == "delivered" for one in found))


async def _watch(live: Live, api: httpx.AsyncClient, subscriber: Subscriber, story: Any) -> None:
    playing = asyncio.create_task(story)
    try:
        while not playing.done():
            live.update(await _picture(api, subscriber))
            await asyncio.wait({playing}, timeout=0.15)
        await playing
    finally:
        playing.cancel()


async def _picture(api: httpx.AsyncClient, subscriber: Subscriber) -> Table:
    generations = Table("account", "job", "status", "learned by", title="Generations", min_width=72)
    for one in reversed((await _get(api, "/v1/generations"))["data"]):
        color = {"completed": "green", "failed": "red"}.get(one["status"], "yellow")
        generations.add_row(
            one["account"],
            (one["job_id"] or "not known yet")[:20],
            f"[{color}]{one['status']}[/]",
            one["learned_by"] or "",
        )
    deliveries = Table("event", "to", "status", "attempts", title="Deliveries", min_width=72)
    for one in reversed((await _get(api, "/v1/deliveries"))["data"]):
        color = {"delivered": "green", "failed": "red"}.get(one["status"], "yellow")
        deliveries.add_row(
            one["event_type"],
            httpx.URL(one["url"]).path,
            f"[{color}]{one['status']}[/]",
            str(one["attempt_count"]),
        )
    received = Table("received", "account", "signature", "answered", title="Subscriber", min_width=72)
    for line in subscriber.lines:
        received.add_row(*map(escape, line))
    whole = Table.grid()
    for part in (generations, deliveries, received):
        whole.add_row(part)
    return whole


async def _until(api: httpx.AsyncClient, path: str, true: Callable[[Any], bool]) -> Any:
    while not true(found := (await _get(api, path))["data"]):  # noqa: ASYNC110 # the API has no event for it
        await asyncio.sleep(0.1)
    return found


async def _get(api: httpx.AsyncClient, path: str) -> Any:
    return (await api.get(path)).raise_for_status().json()


async def _post(api: httpx.AsyncClient, path: str, body: Any = None) -> Any:
    return (await api.post(path, json=body)).raise_for_status().json()
