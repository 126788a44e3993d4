"""Providers call here. A callback only ever makes Relay ask: nothing in it is believed."""

import asyncio
import logging

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from relay.body import parse
from relay.errors import Limited, Malformed, Unsigned
from relay.generation import is_job_id
from relay.limit import Limit
from relay.providers import Provider
from relay.store.generations import Hint
from relay.web.context import Relay, State
from relay.web.operation import read_body

log = logging.getLogger(__name__)


class _Hooks:
    """Where providers call. How often they may is counted by this process, and only of who has shown that it
    may call at all: nobody else can use it up."""

    def __init__(self) -> None:
        self._of_job = Limit(per_second=100, burst=500)
        self._of_account = Limit(per_second=100, burst=500)

    async def receive(self, request: Request[State]) -> Response:
        """The callback of one job: answers exactly 200 once the hint is durable; to a token that is not ours
        as to any unknown path."""
        relay = request.state["relay"]
        name = request.path_params["account"]
        generation_id = relay.callbacks.generation(name, request.path_params["token"])
        account = await relay.accounts.seek(name) if generation_id is not None else None
        if generation_id is None or account is None or not account.provider.calls_back:
            raise HTTPException(404)
        _let_in(self._of_job.take(generation_id, relay.now()))
        claimed = _claimed(account.provider, await read_body(request))
        relay.metrics.called_back(account.provider.name)
        log.info("callback.received", extra={"account": name, "generation": generation_id, "job": claimed})
        await _take(relay, name, generation_id, claimed)
        relay.poller.wake(name)
        return Response(status_code=200)

    async def receive_signed(self, request: Request[State]) -> Response:
        """The callback of any job of an account: 401 unless it is signed, else exactly 200 once the hints are
        durable, or at once when nobody watches the job; 404 as to any unknown path where none is expected."""
        relay = request.state["relay"]
        name = request.path_params["account"]
        account = await relay.accounts.seek(name)
        if account is None or not account.takes_signed_callbacks:
            raise HTTPException(404)
        body = await read_body(request)
        if not account.provider.signed(request.headers, body, account.webhook_secrets):
            log.warning("callback.unsigned", extra={"account": name})
            raise Unsigned("this callback is not signed with a secret of this account")
        _let_in(self._of_account.take(name, relay.now()))
        claimed = _claimed(account.provider, body)
        watching = await relay.store.generations.watching(name, claimed) if claimed is not None else []
        relay.metrics.called_back(account.provider.name)
        log.info("callback.received", extra={"account": name, "generations": len(watching), "job": claimed})
        if watching:
            await asyncio.gather(*(_take(relay, name, generation_id, claimed) for generation_id in watching))
            relay.poller.wake(name)
        return Response(status_code=200)


async def _take(relay: Relay, account: str, generation_id: str, claimed: str | None) -> None:
    begun = relay.now()
    await relay.hint(Hint(generation_id, claimed))
    if relay.tracing is not None:
        about = {"relay.generation": generation_id, "relay.account": account}
        relay.tracing.note(
            "callback", generation_id, begun=begun, ended=relay.now(), kind="server", attributes=about
        )


def _let_in(wait: int) -> None:
    if wait:
        raise Limited("callbacks come too often: the job is asked about in any case", retry_after=wait)


def _claimed(provider: Provider, body: bytes) -> str | None:
    """The job that a callback names, if what it names can be one."""
    try:
        claimed = provider.claimed_job(parse(body))
    except Malformed:
        return None
    return claimed if claimed is not None and is_job_id(claimed) else None


def routes() -> list[Route]:
    hooks = _Hooks()
    return [
        Route("/hooks/{account}", hooks.receive_signed, methods=["POST"]),
        Route("/hooks/{account}/{token}", hooks.receive, methods=["POST"]),
    ]
