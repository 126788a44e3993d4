"""Errors as problem+json (RFC 9457): one handler for everything that is raised."""

import logging
import math

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match, Route

from relay.body import compact
from relay.errors import Invalid, Limited, Refused, StoreError, Unauthorized

log = logging.getLogger(__name__)
RETRY_AFTER = "2"
_TITLES = {404: "Not found", 405: "Method not allowed", 503: "Storage cannot accept"}


def problem(
    status: int,
    title: str,
    detail: str,
    *,
    errors: list[dict[str, str]] | None = None,
    headers: dict[str, str] | None = None,
) -> Response:
    """A problem+json response; `type` is a URN that is made of the title."""
    body: dict[str, object] = {
        "type": "urn:relay:problem:" + title.lower().replace(" ", "-"),
        "title": title,
        "status": status,
        "detail": detail,
    }
    if errors is not None:
        body["errors"] = errors
    return Response(compact(body), status, headers, media_type="application/problem+json")


async def refused(request: Request, error: Exception) -> Response:
    """For Refused: what the caller did wrong."""
    assert isinstance(error, Refused)  # noqa: S101 # registered for this class only
    # Some repeat what was wrong, and that may be a secret in the wrong place.
    clean = request.scope["state"]["relay"].redactor
    errors = None
    if isinstance(error, Invalid):
        errors = [{"field": clean(one.field), "message": clean(one.message)} for one in error.errors]
    headers = {"www-authenticate": "Bearer"} if isinstance(error, Unauthorized) else None
    if isinstance(error, Limited):
        headers = {"retry-after": str(math.ceil(error.retry_after / 1000))}
    return problem(error.status, error.title, clean(str(error)), errors=errors, headers=headers)


async def not_stored(request: Request, error: Exception) -> Response:
    """For StoreError: nothing was acknowledged."""
    log.error("store.failed: %s", error)
    return problem(
        503,
        _TITLES[503],
        "the database did not take it; nothing was changed, try again",
        headers={"retry-after": RETRY_AFTER},
    )


async def http_error(request: Request, error: Exception) -> Response:
    """For what Starlette itself refuses: unknown paths and methods."""
    assert isinstance(error, HTTPException)  # noqa: S101 # registered for this class only
    title = _TITLES.get(error.status_code, error.detail)
    if error.status_code == 405:
        allowed = ", ".join(_methods(request))
        return problem(405, title, f"this path takes {allowed}", headers={"allow": allowed})
    return problem(error.status_code, title, "there is nothing at this path")


def _methods(request: Request) -> list[str]:
    """All that this path knows, of whichever route."""
    found = {
        method
        for route in request.app.routes
        if isinstance(route, Route) and route.matches(request.scope)[0] is not Match.NONE
        for method in route.methods or ()
    }
    return sorted(found)


async def crashed(request: Request, error: Exception) -> Response:
    """For bugs: the traceback is in the log, not in the answer."""
    return problem(500, "Internal error", "Relay made a mistake; its log says which")


HANDLERS = {Refused: refused, StoreError: not_stored, HTTPException: http_error, Exception: crashed}
