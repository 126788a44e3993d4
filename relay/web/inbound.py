"""Providers call here. A callback only ever makes Relay ask: nothing in it is believed."""

import logging

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from relay.body import parse
from relay.errors import Malformed, NotFound
from relay.generation import is_job_id
from relay.store.generations import Hint
from relay.web.context import State
from relay.web.operation import read_body

log = logging.getLogger(__name__)


async def receive(request: Request[State]) -> Response:
    """Answers exactly 200 once the hint is durable; 404, and nothing else, to a token that is not ours."""
    relay = request.state["relay"]
    name = request.path_params["account"]
    generation_id = relay.callbacks.generation(name, request.path_params["token"])
    account = relay.accounts.get(name)
    if generation_id is None or account is None or not account.provider.calls_back:
        raise NotFound("nothing is here")
    body = await read_body(request)
    try:
        claimed = account.provider.claimed_job(parse(body))
    except Malformed:
        claimed = None
    if claimed is not None and not is_job_id(claimed):
        claimed = None
    log.info("callback.received", extra={"account": name, "generation": generation_id, "job": claimed})
    await relay.hint(Hint(generation_id, claimed))
    relay.poller.wake()
    return Response(status_code=200)


ROUTES = [Route("/hooks/{account}/{token}", receive, methods=["POST"])]
