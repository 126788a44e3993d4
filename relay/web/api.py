"""What the operations of the API do; `relay.web.operations` is the table of them."""

import asyncio
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from relay import account as accounts
from relay import event, schema, signature
from relay.body import compact
from relay.endpoint import Endpoint, Secret, origin
from relay.errors import Conflict, FieldError, Invalid, Limited, NotFound
from relay.event import Event
from relay.generation import Generation, Status
from relay.ids import new_id
from relay.limit import Limit
from relay.live import Wish
from relay.redact import BLOT
from relay.selection import Replay, Selection
from relay.selection import Status as ReplayStatus
from relay.store.deliveries import Attempt, Delivery
from relay.store.events import Publication
from relay.store.generations import Watch
from relay.store.types import DeclaredType
from relay.times import rfc3339
from relay.web import resources as r
from relay.web.context import Relay
from relay.web.operation import LONGEST_NAME, Call, Result, checked_url, page_of, paged, paged_by_size
from relay.web.stream import Stream

# For each endpoint, and for each tenant: of one relay.
TESTS_A_MINUTE = 10
REPLAYS_A_SECOND, REPLAYS_AT_ONCE = 10, 100
_BROKEN = "its secret cannot be opened: it was changed in the database; rotate it"


async def create_endpoint(call: Call[r.EndpointCreate, None]) -> Result:
    now = call.relay.now()
    body = call.body
    endpoint = Endpoint(
        id=new_id("ep", now),
        tenant=call.tenant,
        url=checked_url(call.relay, "url", body.url),
        secrets=[
            Secret(
                body.secret or signature.new_secret(),
                signature.new_private_key() if body.ed25519 else None,
            )
        ],
        created_at=now,
        updated_at=now,
        description=body.description,
        event_types=body.event_types or (),
        accounts=await _known_accounts(call, body.accounts),
        filter=body.filter,
        headers=_headers(body.headers or {}, {}),
        rate_limit=body.rate_limit,
        metadata=body.metadata or {},
    )
    entry = call.entry("endpoint.created", endpoint.id)
    created = await call.relay.store.endpoints.create(endpoint, call.idempotency, entry=entry)
    if created is None:
        raise Conflict("what this Idempotency-Key created is gone")
    if not created.secrets:
        raise Conflict(_BROKEN)
    shown = r.EndpointWithSecret.of(created, to_admin=call.caller.is_admin)
    if created.id != endpoint.id and shown.secret is not None:
        await call.relay.store.audit.add(call.entry("endpoint.secret_revealed", created.id))
    return Result(201, shown)


async def list_endpoints(call: Call[None, r.PageQuery]) -> Result:
    found = await call.relay.store.endpoints.page(
        call.tenant, limit=call.query.limit + 1, cursor=call.query.cursor
    )
    return paged(found, call.query, lambda one: r.EndpointResource.of(one, to_admin=call.caller.is_admin))


async def get_endpoint(call: Call[Any, None]) -> Result:
    return Result(200, r.EndpointResource.of(await _endpoint(call), to_admin=call.caller.is_admin))


async def change_endpoint(call: Call[r.EndpointChange, None]) -> Result:
    id_, given = call.path["id"], call.body.model_dump(exclude_unset=True)
    if "url" in given:
        given["url"] = checked_url(call.relay, "url", given["url"])
    if "accounts" in given:
        given["accounts"] = await _known_accounts(call, given["accounts"])
    given |= {name: [] for name in ("event_types", "accounts") if name in given and not given[name]}
    given |= {name: {} for name in ("headers", "metadata") if name in given and not given[name]}

    def made(before: Endpoint) -> Mapping[str, Any]:
        changes, kept = dict(given), before.headers
        # Headers may hold a secret of the old host: they do not follow to another one.
        if "url" in changes and origin(changes["url"]) != origin(before.url):
            kept = {}
            changes.setdefault("headers", {})
        if "headers" in changes:
            changes["headers"] = _headers(changes["headers"], kept)
        return changes

    changed = await call.relay.store.endpoints.change(
        call.tenant, id_, made, now=call.relay.now(), entry=call.entry("endpoint.changed", id_)
    )
    if changed is None:
        raise NotFound(f"no endpoint {id_}")
    call.relay.deliverer.changed(id_)
    return Result(200, r.EndpointResource.of(changed, to_admin=call.caller.is_admin))


async def delete_endpoint(call: Call[None, None]) -> Result:
    endpoint = await _endpoint(call)
    entry = call.entry("endpoint.deleted", endpoint.id)
    await call.relay.store.endpoints.delete(call.tenant, endpoint.id, now=call.relay.now(), entry=entry)
    call.relay.deliverer.changed(endpoint.id)
    return Result(204)


async def enable_endpoint(call: Call[None, None]) -> Result:
    endpoint = await _endpoint(call)
    entry = call.entry("endpoint.enabled", endpoint.id)
    await call.relay.store.endpoints.enable(call.tenant, endpoint.id, now=call.relay.now(), entry=entry)
    return await get_endpoint(call)


async def disable_endpoint(call: Call[None, None]) -> Result:
    endpoint = await _endpoint(call)
    await call.relay.store.endpoints.disable(
        call.tenant,
        endpoint.id,
        reason="disabled by its owner",
        now=call.relay.now(),
        entry=call.entry("endpoint.disabled", endpoint.id),
    )
    call.relay.deliverer.changed(endpoint.id)
    return await get_endpoint(call)


async def test_endpoint(call: Call[None, None]) -> Result:
    relay, endpoint = call.relay, await _endpoint(call)
    if endpoint.disabled_at is not None:
        raise Conflict("this endpoint is disabled: enable it first")
    now = relay.now()
    _take(relay.test_limit, endpoint.id, now, f"an endpoint may be tested {TESTS_A_MINUTE} times a minute")
    made = event.test(call.tenant, endpoint.id, now=now)
    handoff = relay.deliverer.handoff()
    entry = call.entry("endpoint.tested", endpoint.id)
    delivery_id, claimed = await relay.store.events.send(made, endpoint, handoff, now=now, entry=entry)
    relay.deliverer.accept(claimed, handoff)
    relay.live.stored([call.tenant])
    return Result(202, _delivery(await _get_delivery(relay, call.tenant, delivery_id)))


async def rotate_secret(call: Call[r.SecretRotate, None]) -> Result:
    endpoint, now = await _endpoint(call), call.relay.now()
    secret = call.body.secret or signature.new_secret()
    expires_at = now + call.body.overlap_seconds * 1000
    rotated = await call.relay.store.endpoints.rotate(
        call.tenant,
        endpoint.id,
        secret,
        expires_at=expires_at,
        now=now,
        entry=call.entry("endpoint.secret_rotated", endpoint.id),
    )
    if rotated is None:
        raise NotFound(f"no endpoint {endpoint.id}")
    call.relay.deliverer.changed(endpoint.id)
    return Result(200, _secret(rotated.secrets, now))


async def get_secret(call: Call[None, None]) -> Result:
    endpoint = await _endpoint(call)
    await call.relay.store.audit.add(call.entry("endpoint.secret_revealed", endpoint.id))
    return Result(200, _secret(endpoint.secrets, call.relay.now()))


async def get_signing_secret(call: Call[None, None]) -> Result:
    await call.relay.store.audit.add(call.entry("tenant.secret_revealed", call.tenant))
    return Result(200, _secret(await call.relay.store.tenants.signing_secrets(call.tenant), call.relay.now()))


async def rotate_signing_secret(call: Call[r.SecretRotate, None]) -> Result:
    now = call.relay.now()
    secrets = await call.relay.store.tenants.rotate(
        call.tenant,
        call.body.secret or signature.new_secret(),
        expires_at=now + call.body.overlap_seconds * 1000,
        now=now,
        entry=call.entry("tenant.secret_rotated", call.tenant),
    )
    call.relay.deliverer.rotated(call.tenant)
    return Result(200, _secret(secrets, now))


async def create_generation(call: Call[r.GenerationCreate, None]) -> Result:
    relay, body, now = call.relay, call.body, call.relay.now()
    account = await relay.accounts.find(call.tenant, body.account)
    if account is None:
        raise Invalid(FieldError("account", f"there is no account {body.account!r}"))
    if body.job_id is None and not account.provider.calls_back:
        raise Invalid(
            FieldError("job_id", f"is required: {account.provider.name} does not call back, it is polled")
        )
    timeout = account.pace.timeout
    if body.timeout_seconds is not None:
        timeout = math.ceil(body.timeout_seconds * 1000)
    awaits_callback = body.job_id is None
    first = relay.poller.first_ask(
        account,
        now=now,
        deadline_at=now + timeout,
        job_known=body.job_id is not None,
        awaits_callback=awaits_callback,
    )
    generation = Generation(
        id=new_id("gen", now),
        tenant=call.tenant,
        account=account.name,
        provider=account.provider.name,
        job_id=body.job_id,
        status=Status.QUEUED,
        created_at=now,
        deadline_at=now + timeout,
        due_at=first.due_at,
        chance=first.chance,
        rate=first.rate,
        metadata=body.metadata or {},
        callback_url=checked_url(relay, "callback_url", body.callback_url)
        if body.callback_url is not None
        else None,
        awaits_callback=awaits_callback,
    )
    watched = await relay.watch(Watch(generation, call.idempotency))
    if watched.error is not None:
        raise watched.error
    if watched.generation is None:
        raise Conflict("what this Idempotency-Key created is gone")
    return Result(201 if watched.created else 200, _generation(relay, watched.generation))


async def list_generations(call: Call[None, r.GenerationQuery]) -> Result:
    filters, limit = call.query.filters(), call.query.limit + 1
    wanted = [filters]
    if "account" in filters:
        wanted = [{**filters, "account": name} for name in accounts.meant(call.tenant, filters["account"])]
    generations = call.relay.store.generations
    found = dict[str, int]()
    for each in wanted:
        found |= await generations.page(call.tenant, each, limit=limit, cursor=call.query.cursor)
    return await paged_by_size(
        dict(sorted(found.items(), reverse=True)[:limit]),
        call.query,
        partial(generations.get_many, browse=True),
        lambda one: compact(_generation(call.relay, one)),
    )


async def get_generation(call: Call[Any, None]) -> Result:
    return Result(200, _generation(call.relay, await _get_generation(call)))


async def change_generation(call: Call[r.GenerationChange, None]) -> Result:
    relay, generation = call.relay, await _get_generation(call)
    if call.body.job_id is not None and call.body.job_id != generation.job_id:
        ask = None
        if not generation.ended:
            ask = relay.poller.first_ask(
                await relay.poller.account(generation),
                now=relay.now(),
                deadline_at=generation.deadline_at,
                job_known=True,
                awaits_callback=generation.awaits_callback,
            )
        await relay.store.generations.name_job(generation, call.body.job_id, ask=ask)
    if call.body.metadata is not None:
        await relay.store.generations.describe(call.tenant, generation.id, call.body.metadata)
    return await get_generation(call)


async def delete_generation(call: Call[None, None]) -> Result:
    if not await call.relay.store.generations.delete(call.tenant, call.path["id"]):
        raise NotFound(f"no generation {call.path['id']}")
    return Result(204)


async def refresh_generation(call: Call[None, None]) -> Result:
    refreshed = await call.relay.poller.refresh(await _get_generation(call))
    if refreshed is None:
        raise NotFound(f"no generation {call.path['id']}")
    return await get_generation(call)


async def wait_for_generation(call: Call[None, r.WaitQuery]) -> Result:
    found = await call.relay.ingest.ended(call.tenant, call.path["id"], timeout=call.query.timeout)
    if found is None:
        raise NotFound(f"no generation {call.path['id']}")
    return Result(200, _generation(call.relay, found))


async def publish_event(call: Call[r.EventPublish | list[r.EventPublish], None]) -> Result:
    relay, now = call.relay, call.relay.now()
    items = call.body if isinstance(call.body, list) else [call.body]
    made = [event.published(call.tenant, one.type, one.data, one.id, now=now) for one in items]
    kept = await _stored_before(call, items)
    if kept is None:
        kept = await relay.ingest.publish(Publication(call.tenant, made, call.idempotency))
    stored = [_event(one, r.PublishedEvent, created=one is new) for one, new in zip(kept, made, strict=True)]
    return Result(201, page_of(stored, None) if isinstance(call.body, list) else stored[0])


async def put_event_type(call: Call[r.EventTypePut, None]) -> Result:
    type_, now = call.path["type"], call.relay.now()
    problem = r.problem_of_type(type_)
    if problem is not None:
        raise Invalid(FieldError("type", problem))
    schema = call.body.schema_
    text = compact(schema).decode() if schema is not None else None
    given = call.body.model_dump(exclude_unset=True, by_alias=True)
    declared, is_new = await call.relay.store.types.put(
        DeclaredType(call.tenant, type_, call.body.description, text, now, now),
        entry=call.entry("event_type.declared", type_, fields=list(given)),
    )
    call.relay.catalog.changed(call.tenant)
    return Result(201 if is_new else 200, r.EventTypeResource.of(declared))


async def list_event_types(call: Call[None, r.PageQuery]) -> Result:
    limit = call.query.limit
    found = await call.relay.store.types.page(call.tenant, limit=limit + 1, cursor=call.query.cursor)
    page, more = [r.EventTypeResource.of(one) for one in found[:limit]], len(found) > limit
    return Result(200, r.Page[r.EventTypeResource](data=page, next_cursor=page[-1].type if more else None))


async def get_event_type(call: Call[None, None]) -> Result:
    found = await call.relay.store.types.get(call.tenant, call.path["type"])
    if found is None:
        raise NotFound(f"no event type {call.path['type']}")
    return Result(200, r.EventTypeResource.of(found))


async def delete_event_type(call: Call[None, None]) -> Result:
    type_ = call.path["type"]
    entry = call.entry("event_type.deleted", type_)
    if not await call.relay.store.types.delete(call.tenant, type_, entry=entry):
        raise NotFound(f"no event type {type_}")
    call.relay.catalog.changed(call.tenant)
    return Result(204)


async def list_events(call: Call[None, r.EventQuery]) -> Result:
    events = call.relay.store.events
    found = await events.page(
        call.tenant, call.query.filters(), limit=call.query.limit + 1, cursor=call.query.cursor
    )
    return await paged_by_size(found, call.query, partial(events.get_many, browse=True), _event)


async def stream_events(call: Call[None, r.StreamQuery]) -> Result:
    # A browser that comes back sends the header, and still the query that it began with.
    after = call.headers.get("last-event-id") or call.query.last_event_id
    if after is not None and not r.is_event_id(after):
        raise Invalid(FieldError("Last-Event-ID", "is not the id of an event"))
    wish = Wish(
        types=call.query.types,
        generation_id=call.query.generation_id,
        account=call.query.account,
        endpoint_id=call.query.endpoint_id,
    )
    if wish.endpoint_id is not None:
        found = await call.relay.store.endpoints.get(call.tenant, wish.endpoint_id)
        if found is None:
            raise NotFound(f"no endpoint {wish.endpoint_id}")
    reader = await call.relay.live.open(call.tenant, wish, after=after)
    return Result(200, stream=Stream(reader, call.relay.gate, call.caller, timeout=call.query.timeout))


async def get_event(call: Call[None, None]) -> Result:
    found = await call.relay.store.events.get(call.tenant, call.path["id"])
    if found is None:
        raise NotFound(f"no event {call.path['id']}")
    return Result(200, _event(found))


async def list_deliveries(call: Call[None, r.DeliveryQuery]) -> Result:
    found = await call.relay.store.deliveries.page(
        call.tenant, call.query.filters(), limit=call.query.limit + 1, cursor=call.query.cursor
    )
    return paged(found, call.query, _delivery)


async def get_delivery(call: Call[None, None]) -> Result:
    found = await _get_delivery(call.relay, call.tenant, call.path["id"])
    attempts = await call.relay.store.deliveries.attempts(found.id)
    return Result(200, _delivery_with_attempts(found, attempts))


async def replay_delivery(call: Call[None, None]) -> Result:
    relay, id_, now = call.relay, call.path["id"], call.relay.now()
    _take(relay.replay_limit, call.tenant, now, f"{REPLAYS_A_SECOND} deliveries a second may be replayed")
    entry = call.entry("delivery.replayed", id_)
    where_to = await relay.store.deliveries.replay(call.tenant, id_, now=now, entry=entry)
    relay.deliverer.wake(where_to)
    return Result(202, _delivery(await _get_delivery(relay, call.tenant, id_)))


async def create_replay(call: Call[r.ReplayCreate, None]) -> Result:
    relay, body, now = call.relay, call.body, call.relay.now()
    if call.idempotency is not None:
        before = await relay.store.replays.created_by(call.tenant, call.idempotency)
        if before is not None:
            return Result(202, r.ReplayResource.of(before))
    _take(relay.replay_limit, call.tenant, now, f"{REPLAYS_A_SECOND} replays a second may be asked for")
    selection = await _selection(call, now)
    total = await relay.counting.count(selection)
    replay = Replay(
        id=new_id("rpl", now),
        selection=selection,
        rate_limit=body.rate_limit,
        status=ReplayStatus.PENDING,
        total=total,
        done=0,
        position=selection.start,
        paced_at=now - math.ceil(1000 / body.rate_limit),
        created_at=now,
        updated_at=now,
    )
    if body.dry_run:
        return Result(202, r.ReplayResource.of(replay, counted_only=True))
    entry = call.entry("replay.created", replay.id)
    created = await relay.store.replays.create(replay, call.idempotency, entry=entry)
    if created is None:
        raise Conflict("what this Idempotency-Key created is gone")
    return Result(202, r.ReplayResource.of(created))


async def list_replays(call: Call[None, r.ReplayQuery]) -> Result:
    found = await call.relay.store.replays.page(
        call.tenant, call.query.filters(), limit=call.query.limit + 1, cursor=call.query.cursor
    )
    return paged(found, call.query, r.ReplayResource.of)


async def get_replay(call: Call[None, None]) -> Result:
    found = await call.relay.store.replays.get(call.tenant, call.path["id"])
    if found is None:
        raise NotFound(f"no replay {call.path['id']}")
    return Result(200, r.ReplayResource.of(found))


async def cancel_replay(call: Call[None, None]) -> Result:
    id_, entry = call.path["id"], call.entry("replay.canceled", call.path["id"])
    await call.relay.store.replays.cancel(call.tenant, id_, now=call.relay.now(), entry=entry)
    return Result(204)


async def _selection(call: Call[r.ReplayCreate, None], now: int) -> Selection:
    """What is asked for. Raises Invalid for what the tenant does not have."""
    body, store = call.body, call.relay.store
    until = min(now if body.until is None else body.until, now)
    if body.until is not None and body.since is not None and body.until <= body.since:
        raise Invalid(FieldError("until", "must be later than since"))
    if body.endpoint_id is not None:
        endpoint = await store.endpoints.get(call.tenant, body.endpoint_id)
        if endpoint is None:
            raise Invalid(FieldError("endpoint_id", f"there is no endpoint {body.endpoint_id}"))
        if endpoint.disabled_at is not None:
            raise Conflict(f"the endpoint {endpoint.id} is disabled: enable it first")
    if body.generation_id is not None:
        generation = await store.generations.get(call.tenant, body.generation_id)
        if generation is None:
            raise Invalid(FieldError("generation_id", f"there is no generation {body.generation_id}"))
    return Selection(
        tenant=call.tenant,
        wanted=body.status,
        until=until,
        since=body.since,
        endpoint_id=body.endpoint_id,
        generation_id=body.generation_id,
        account=body.account,
        event_type=body.event_type,
    )


def _secret(secrets: Sequence[Secret], now: int) -> r.SecretResource:
    if not secrets:
        raise Conflict(_BROKEN)
    newest, *older = secrets
    expires_at = max((one.expires_at or 0 for one in older), default=0)
    return r.SecretResource(
        secret=newest.symmetric,
        public_key=signature.public_key(newest.private) if newest.private else None,
        previous_secret_expires_at=rfc3339(expires_at) if expires_at > now else None,
    )


def _take(limit: Limit, key: str, now: int, what: str) -> None:
    if wait := limit.take(key, now):
        raise Limited(what, retry_after=wait)


def _headers(given: Mapping[str, str], kept: Mapping[str, str]) -> Mapping[str, str]:
    """The custom headers that are meant, where callers send back what they were shown."""
    known = {name.lower(): value for name, value in kept.items()}
    for name, value in given.items():
        if value == BLOT and name.lower() not in known:
            raise Invalid(FieldError("headers", f"{name!r} has no value yet that could be kept: send it"))
    return {name: known[name.lower()] if value == BLOT else value for name, value in given.items()}


async def _known_accounts(call: Call[Any, Any], names: Sequence[str] | None) -> Sequence[str]:
    for name in names or ():
        if await call.relay.accounts.find(call.tenant, name) is None:
            raise Invalid(FieldError("accounts", f"there is no account {name!r}"))
    return names or ()


async def _endpoint(call: Call[Any, Any]) -> Endpoint:
    found = await call.relay.store.endpoints.get(call.tenant, call.path["id"])
    if found is None:
        raise NotFound(f"no endpoint {call.path['id']}")
    return found


async def _get_generation(call: Call[Any, Any]) -> Generation:
    found = await call.relay.store.generations.get(call.tenant, call.path["id"])
    if found is None:
        raise NotFound(f"no generation {call.path['id']}")
    return found


async def _get_delivery(relay: Relay, tenant: str, delivery_id: str) -> Delivery:
    found = await relay.store.deliveries.get(tenant, delivery_id)
    if found is None:
        raise NotFound(f"no delivery {delivery_id}")
    return found


def _generation(relay: Relay, one: Generation) -> r.GenerationResource:
    account = relay.accounts.get(one.account)
    calls_back = account is not None and account.provider.calls_back
    return r.GenerationResource.of(one, relay.callbacks.url(one.account, one.id) if calls_back else None)


async def _stored_before(call: Call[Any, Any], items: Sequence[r.EventPublish]) -> Sequence[Event] | None:
    """What the Idempotency-Key has published, when the schema has become another one since; None when all of
    it fits its schemas. Raises Invalid for what neither fits nor is stored."""
    try:
        await _check_data(call, items)
    except Invalid:
        store, key = call.relay.store, call.idempotency
        kept = await store.events.published_by(call.tenant, key) if key is not None else None
        if kept is None:
            raise
        return kept
    return None


async def _check_data(call: Call[Any, Any], items: Sequence[r.EventPublish]) -> None:
    """Raises Invalid, naming the place in each of them that does not fit the schema of its type."""
    schemas = await call.relay.catalog.schemas(call.tenant)
    errors = []
    for place, one in enumerate(items):
        if one.type not in schemas:
            continue
        found = schema.complaint(schemas[one.type], one.data)
        # Others get on between them.
        await asyncio.sleep(0)
        if found is not None:
            prefix = f"{place}." if isinstance(call.body, list) else ""
            errors.append(FieldError(f"{prefix}data{found[0]}"[:LONGEST_NAME], found[1]))
    if errors:
        raise Invalid(*errors)


def _event(one: Event, shown_as: type[r.EventResource] = r.EventResource, **more: Any) -> bytes:
    """With its data as it is stored: parsed that would take twenty times its bytes."""
    timestamp, data = event.told(one)
    shown = shown_as(
        id=one.id,
        type=one.type,
        timestamp=timestamp,
        data={},
        generation_id=one.generation_id,
        account=one.account,
        source_id=one.source_id,
        created_at=rfc3339(one.created_at),
        **more,
    )
    before, _, after = compact(shown).partition(b'"data":{}')
    return b'%b"data":%b%b' % (before, data, after)


def _delivery(one: Delivery) -> r.DeliveryResource:
    return r.DeliveryResource(**_delivery_fields(one))


def _delivery_with_attempts(one: Delivery, attempts: Sequence[Attempt]) -> r.DeliveryWithAttempts:
    return r.DeliveryWithAttempts(
        **_delivery_fields(one),
        attempts=[
            r.AttemptResource(
                id=attempt.id,
                number=attempt.number,
                started_at=rfc3339(attempt.started_at),
                duration_ms=attempt.duration_ms,
                trigger=attempt.trigger,
                response_status=attempt.response_status,
                response_body=attempt.response_body,
                error=r.AttemptError(code=attempt.error_code, message=attempt.error_message or "")
                if attempt.error_code
                else None,
            )
            for attempt in attempts
        ],
    )


def _delivery_fields(one: Delivery) -> dict[str, Any]:
    return {
        "id": one.id,
        "event_id": one.event_id,
        "event_type": one.event_type,
        "generation_id": one.generation_id,
        "endpoint_id": one.endpoint_id,
        "url": one.url,
        "status": one.status,
        "attempt_count": one.attempts,
        "next_attempt_at": rfc3339(one.due_at) if one.due_at is not None else None,
        "created_at": rfc3339(one.created_at),
        "updated_at": rfc3339(one.updated_at),
    }
