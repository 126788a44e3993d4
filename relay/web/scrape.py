"""What Prometheus gets: `/metrics`, for those who may know how the whole relay is."""

import asyncio
import hmac
from collections.abc import Sequence
from ipaddress import IPv4Network, IPv6Address, IPv6Network, ip_address

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import Response

from relay.errors import Forbidden, StoreError
from relay.health import Status
from relay.key import hash_of
from relay.tenant import DEFAULT
from relay.web.context import Relay, State

# What is asked of the database is asked again after so many milliseconds, however many ask us.
FRESH = 5_000
# Who asks us does not wait for long: seconds.
PATIENCE = 4
# So many deliveries, and destinations, are counted.
COUNTED = 100_000


class Scraper:
    """Answers one at a time."""

    def __init__(self) -> None:
        self._turn = asyncio.Lock()
        self._looked_at = 0

    async def answer(self, request: Request[State]) -> Response:
        relay = request.state["relay"]
        await _admit(relay, request)
        async with self._turn:
            now = relay.now()
            if not 0 <= now - self._looked_at < FRESH:
                await _look(relay)
                self._looked_at = now
            _show(relay)
            # Hundreds of lines: nobody's delivery waits for them.
            text = await asyncio.to_thread(relay.metrics.render)
        return Response(text, headers={"content-type": CONTENT_TYPE_LATEST})


async def _admit(relay: Relay, request: Request[State]) -> None:
    """Raises Unauthorized or Forbidden for who is neither in an allowed network nor has the token or an
    operator's key."""
    allowed = relay.settings.metrics.allow
    if request.client is not None and _is_in(request.client.host, allowed):
        return
    token = relay.settings.metrics.token
    scheme, _, text = request.headers.get("authorization", "").partition(" ")
    has_token = token is not None and hmac.compare_digest(hash_of(text.strip()), hash_of(token))
    if has_token and scheme.lower() == "bearer":
        return
    caller = await relay.gate.admit(request)
    if not (caller.is_admin and caller.tenant == DEFAULT):
        raise Forbidden("this needs metrics.token of the configuration, or a key of the operator")


def _is_in(host: str, networks: Sequence[IPv4Network | IPv6Network]) -> bool:
    try:
        address = ip_address(host)
    except ValueError:
        return False
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    return any(address in network for network in networks)


async def _look(relay: Relay) -> None:
    """What the database knows."""
    metrics, now = relay.metrics, relay.now()
    try:
        async with asyncio.timeout(PATIENCE):
            backlog = await relay.store.deliveries.backlog(now=now, most=COUNTED)
            sizes = await relay.store.database.sizes()
    except (StoreError, TimeoutError):
        # Old figures would look like good ones.
        metrics.forget_the_database()
        return
    metrics.show_database(backlog.due, backlog.open, backlog.oldest_due_at, sizes, now=now)


def _show(relay: Relay) -> None:
    """What this process knows."""
    metrics, now = relay.metrics, relay.now()
    metrics.show_breakers(relay.deliverer.breakers())
    waiting, sending = relay.deliverer.in_hand
    metrics.in_hand.labels("waiting").set(waiting)
    metrics.in_hand.labels("sending").set(sending)
    metrics.shards.set(len(relay.shards.staying))
    metrics.relays.set(relay.shards.relays)
    found = []
    for name, one in relay.poller.held().items():
        account = relay.accounts.get(name)
        if account is not None:
            available = one.budget.available(now) if one.health.may_ask(now) else 0
            left, wait = one.budget.left_today(now), one.wait(now)
            status: Status = one.health.status
            provider = account.provider.name
            found.append((provider, name, status, available, left, wait, one.health.failures))
    metrics.show_accounts(found)
