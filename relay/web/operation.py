"""An operation of the API: one description from which its route and its OpenAPI entry are both made."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from relay.body import compact, parse, portions
from relay.endpoint import canonical_url
from relay.errors import FieldError, Invalid, Malformed, NotFound, TooLarge, Unsupported
from relay.key import Scope as KeyScope
from relay.store.audit import Entry
from relay.store.idempotency import Idempotency
from relay.web import resources as r
from relay.web.auth import Caller
from relay.web.context import Relay, State

LARGEST_BODY = 1024 * 1024
# Bytes of a page of what may be large, and of what is read of it at once; of either, or one row.
LARGEST_PAGE, _PORTION = 4 * 1024 * 1024, 512 * 1024
BODY_DEADLINE = 10.0
MOST_ERRORS, LONGEST_NAME = 100, 100
B = TypeVar("B")
Q = TypeVar("Q")
T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Call(Generic[B, Q]):
    """A request that has been let in and read: who makes it and what it says."""

    relay: Relay
    caller: Caller
    path: Mapping[str, str]
    body: B
    query: Q
    headers: Mapping[str, str]
    idempotency: Idempotency | None

    @property
    def tenant(self) -> str:
        return self.caller.tenant

    def entry(
        self, action: str, about: str, *, fields: Sequence[str] = (), tenant: str | None = None
    ) -> Entry:
        """What the audit log is to say of this: `action` is done to what has the id `about`."""
        return Entry(
            tenant=tenant or self.tenant,
            at=self.relay.now(),
            actor=self.caller.actor,
            action=action,
            object=about,
            address=self.caller.address,
            fields=fields,
        )


@dataclass(frozen=True, slots=True)
class Result:
    """What to answer; `resource` may be written already, and None is an empty answer, unless there is a
    `stream`."""

    status: int
    resource: BaseModel | bytes | None = None
    stream: Response | None = None


@dataclass(frozen=True, slots=True)
class Operation:
    """`scope` is what a key must have for it; `answers` says what each status means; `creates` honours
    Idempotency-Key; a `body` that may be empty may be left out; `at_most` bodies may come as a list, and are
    answered as a `page`; one that `streams` answers with server-sent events."""

    method: str
    path: str
    scope: KeyScope
    summary: str
    handler: Callable[[Call[Any, Any]], Awaitable[Result]]
    returns: type[BaseModel] | None
    answers: Mapping[int, str]
    body: type[BaseModel] | None = None
    query: type[BaseModel] | None = None
    creates: bool = False
    at_most: int = 0
    streams: bool = False
    page: type[BaseModel] | None = None
    example: Mapping[str, Any] = field(default_factory=dict)

    def route(self) -> Route:
        return Route(self.path, self, methods=[self.method])

    @property
    def needs_body(self) -> bool:
        try:
            return self.body is not None and not self.body()
        except ValidationError:
            return True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As an ASGI application: the errors it raises are made into problems around it."""
        response = await self._answer(Request(scope, receive, send))
        await response(scope, receive, send)

    async def _answer(self, request: Request[State]) -> Response:
        relay = request.state["relay"]
        caller = await relay.gate.admit(request)
        caller.need(self.scope)
        if "\0" in request.scope["path"]:
            raise NotFound("there is no such thing")
        raw = await read_body(request)
        call = Call(
            relay=relay,
            caller=caller,
            path=request.path_params,
            body=self._read(raw),
            query=_validate(self.query, dict(request.query_params)) if self.query else None,
            headers=request.headers,
            idempotency=self._idempotency(request, raw),
        )
        result = await self.handler(call)
        if result.stream is not None:
            return result.stream
        if result.resource is None:
            return Response(status_code=result.status)
        content = result.resource if isinstance(result.resource, bytes) else compact(result.resource)
        return Response(content, result.status, media_type="application/json")

    def _read(self, raw: bytes) -> BaseModel | list[BaseModel] | None:
        if self.body is None:
            return None
        if not raw and not self.needs_body:
            return self.body()
        document = parse(raw)
        if isinstance(document, list) and self.at_most:
            if not 1 <= len(document) <= self.at_most:
                raise Invalid(FieldError("body", f"may hold 1 to {self.at_most} items"))
            return [_validate(self.body, one, f"{place}.") for place, one in enumerate(document)]
        if not isinstance(document, dict):
            raise Malformed("the body must be a JSON object")
        return _validate(self.body, document)

    def _idempotency(self, request: Request[Any], raw: bytes) -> Idempotency | None:
        key = request.headers.get("idempotency-key")
        if key is None or not self.creates:
            return None
        if not 1 <= len(key) <= 255 or not key.isprintable():
            raise Invalid(FieldError("Idempotency-Key", "must be 1 to 255 printable characters"))
        asked = f"{self.method} {request.url.path}\n".encode() + raw
        newest, *older = request.state["relay"].keyring.fingerprints(asked)
        return Idempotency(key, newest, tuple(older))


def paged(found: Sequence[T], query: r.PageQuery, render: Callable[[T], R]) -> Result:
    """A page of what was found; `found` holds one more than was asked for when there is more."""
    more = len(found) > query.limit
    page = [render(one) for one in found[: query.limit]]
    last = getattr(page[-1], "id", None) if page else None
    return Result(200, r.Page[Any](data=page, next_cursor=last if more else None))


async def paged_by_size(
    sizes: Mapping[str, int],
    query: r.PageQuery,
    load: Callable[[Sequence[str]], Awaitable[Sequence[T]]],
    write: Callable[[T], bytes],
) -> Result:
    """A page of what was found, which ends early where it would be larger than LARGEST_PAGE; `sizes` has one
    more than was asked for when there is more."""
    ids = next(portions(list(sizes)[: query.limit], sizes, LARGEST_PAGE), [])
    written = []
    for portion in portions(ids, sizes, _PORTION):
        # One that was removed meanwhile is not there any more.
        known = {getattr(one, "id", None): write(one) for one in await load(portion)}
        written += [known[id_] for id_ in portion if id_ in known]
    return Result(200, page_of(written, ids[-1] if len(ids) < len(sizes) else None))


def page_of(written: Sequence[bytes], next_cursor: str | None) -> bytes:
    """A page of what is written already."""
    return b'{"data":[%b],"next_cursor":%b}' % (b",".join(written), compact(next_cursor))


def checked_url(relay: Relay, field: str, url: str) -> str:
    """The URL in its canonical form. Raises Invalid, naming the field, for one that must not be used."""
    network = relay.settings.network
    try:
        return canonical_url(url, allow_http=network.allow_http, allow=network.allow)
    except ValueError as error:
        raise Invalid(FieldError(field, str(error))) from error


async def read_body(request: Request[Any]) -> bytes:
    """The body, within its limits of size and time. Raises Unsupported, TooLarge or Malformed."""
    encodings = request.headers.getlist("content-encoding")
    if any(one.strip().lower() not in ("", "identity") for one in encodings):
        raise Unsupported("send the body as it is, without a Content-Encoding")
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length) > LARGEST_BODY:
        raise TooLarge(f"the body may be {LARGEST_BODY} bytes at most")
    body, more = bytearray(), True
    try:
        async with asyncio.timeout(BODY_DEADLINE):
            while more:
                message = await request.receive()
                if message["type"] != "http.request":
                    raise Malformed("the body did not arrive")
                body += message.get("body", b"")
                more = message.get("more_body", False)
                if len(body) > LARGEST_BODY:
                    raise TooLarge(f"the body may be {LARGEST_BODY} bytes at most")
    except TimeoutError as error:
        raise Malformed(f"the body did not arrive within {BODY_DEADLINE:g} s") from error
    return bytes(body)


def _validate(model: type[BaseModel], document: Any, prefix: str = "") -> BaseModel:
    try:
        return model.model_validate(document)
    except ValidationError as error:
        if error.error_count() > MOST_ERRORS:
            raise Invalid(FieldError("body", f"is wrong in {error.error_count()} places")) from error
        raise Invalid(*(_field_error(one, prefix) for one in error.errors(include_url=False))) from error


def _field_error(error: Any, prefix: str) -> FieldError:
    name = (prefix + ".".join(str(part) for part in error["loc"]) or "body")[:LONGEST_NAME]
    if error["type"] == "extra_forbidden":
        return FieldError(name, "is not a field of this request")
    if error["type"] == "missing":
        return FieldError(name, "is required")
    return FieldError(name, error["msg"].removeprefix("Value error, "))
