"""Events at rest: the one transaction in which a generation moves, is announced and fans out."""

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from operator import attrgetter
from typing import Any

from relay.delivery import Claimed, Status, Trigger, destination
from relay.endpoint import Endpoint, valid
from relay.errors import Collision, Conflict, Refused
from relay.event import ENDINGS, FLEETING, PROGRESS, Event
from relay.generation import FINAL, Generation
from relay.ids import new_id
from relay.keyring import KeyRing
from relay.schedule import CALLED, Asked
from relay.store.audit import Entry, note
from relay.store.database import Database, Row, Transaction, repeated
from relay.store.endpoints import read_endpoint
from relay.store.filters import where
from relay.store.generations import write_update
from relay.store.idempotency import Idempotency, correct, created, reserve
from relay.store.tenants import read_signing_secrets

# Deliveries that are made, or written, in one go: others have their turn between.
AT_ONCE = 500


@dataclass(frozen=True, slots=True)
class Change:
    """A generation as it stands after an update, and the events that say what is new."""

    after: Generation
    events: Sequence[Event]


@dataclass(frozen=True, slots=True)
class Publication:
    """Events that one tenant publishes in one request."""

    tenant: str
    events: Sequence[Event]
    idempotency: Idempotency | None


@dataclass(frozen=True, slots=True)
class Handoff:
    """Which fresh deliveries the caller takes at once, already leased to it; the others are pending."""

    lease: str
    lease_until: int
    takes: Callable[[str, int], bool]  # whether one more of so many bytes is taken for a destination
    elsewhere: set[int] = field(default_factory=set)  # shards of other relays that there was something for


class Events:
    """Every statement about events; each method is one transaction."""

    def __init__(self, database: Database, keyring: KeyRing) -> None:
        self._db, self._keyring = database, keyring

    @repeated
    async def record(
        self, changes: Sequence[Change], asked: Sequence[Asked], handoff: Handoff, *, now: int
    ) -> tuple[Sequence[Event], Sequence[Claimed]]:
        """Moves generations, announces what is new, fans the events out, and reschedules what was asked.

        Returns the events that are new and the deliveries that are handed over. A change whose generation
        has moved since it was read (`version`) changes nothing and announces nothing, and what was asked for
        it is asked again. Fleeting events that no endpoint wants are left out; those that are pending are
        canceled by newer ones and by the ending.
        """
        async with self._db.write() as tx:
            changes = await _heard(tx, self._keyring, sorted(changes, key=lambda one: one.after.id))
            await tx.execute_many(_MOVE, [_move(change) for change in changes])
            marks = {one.after.id: _mark(one) for one in changes}
            await tx.execute_many(
                _ASKED,
                [
                    {**asdict(one), "called": CALLED, "mark": marks.get(one.generation_id)}
                    for one in sorted(asked, key=attrgetter("generation_id"))
                ],
            )
            fresh = await _announce(tx, changes)
            await _cancel_older(tx, fresh, now=now)
            callbacks = {one.after.id: one.after.callback_url for one in changes if one.after.ended}
            claimed = await fan_out(tx, self._keyring, fresh, handoff, callbacks=callbacks, now=now)
        return fresh, claimed

    @repeated
    async def publish(
        self, publications: Sequence[Publication], handoff: Handoff, *, now: int
    ) -> tuple[Sequence[Sequence[Event] | Refused], Sequence[Claimed]]:
        """Stores events and fans them out: all of every publication, or nothing of any.

        Returns, for each, what is stored under its names (`source_id`) or its Idempotency-Key, which may
        have been there before, or why it is refused; and the deliveries that are handed over.
        """
        async with self._db.write() as tx:
            earlier = await _earlier(tx, publications, now=now)
            fresh = [one for place, one in enumerate(publications) if place not in earlier]
            events = [event for one in fresh for event in one.events]
            stored, claimed = await _publish(tx, self._keyring, events, handoff, now=now)
            kept = dict(zip((event.id for event in events), stored, strict=True))
            for one in fresh:
                await _correct(tx, one, kept)
            results: list[Sequence[Event] | Refused] = [
                await _again(tx, earlier[place], kept)
                if place in earlier
                else [kept[event.id] for event in one.events]
                for place, one in enumerate(publications)
            ]
        return results, claimed

    async def published_by(self, tenant: str, idempotency: Idempotency) -> Sequence[Event] | None:
        """What was published with this key, as it is stored; None when nothing was. Raises Invalid when it
        was something else, Conflict when it is gone."""
        async with self._db.read() as tx:
            before = await created(tx, tenant, idempotency)
            if before is None:
                return None
            kept = await _again(tx, before[0].split(), {})
        if isinstance(kept, Refused):
            raise kept
        return kept

    async def announce(self, events: Sequence[Event], handoff: Handoff, *, now: int) -> Sequence[Claimed]:
        """Stores new events of Relay's own and fans them out; the deliveries that are handed over."""
        async with self._db.write() as tx:
            await insert(tx, events)
            return await fan_out(tx, self._keyring, events, handoff, now=now)

    async def send(
        self, event: Event, endpoint: Endpoint, handoff: Handoff, *, now: int, entry: Entry | None = None
    ) -> tuple[str, Sequence[Claimed]]:
        """Stores an event for one endpoint only, whatever its filter; its delivery's id, and the delivery
        when it is handed over."""
        row = _delivery(event, endpoint.id, None, handoff, now=now)
        async with self._db.write() as tx:
            await insert(tx, [event])
            await tx.execute_many(_DELIVER, [row])
            await note(tx, entry)
        return row["id"], _claimed([row], {event.id: event}, {endpoint.id: endpoint}, {}, handoff, now=now)

    async def get(self, tenant: str, event_id: str) -> Event | None:
        async with self._db.read() as tx:
            rows = await tx.fetch(
                "SELECT * FROM events WHERE id = :id AND tenant = :tenant", id=event_id, tenant=tenant
            )
        return _read(rows[0]) if rows else None

    async def get_many(self, ids: Sequence[str], *, browse: bool = False) -> Sequence[Event]:
        """Those of the ids that exist, whoever's they are."""
        async with self._db.read(browse=browse) as tx:
            return [_read(row) for row in await tx.fetch("SELECT * FROM events WHERE id IN (:ids)", ids=ids)]

    async def ids(self, tenant: str, *, after: str, limit: int) -> Sequence[str]:
        """The ids behind `after`, oldest first."""
        async with self._db.read(browse=True) as tx:
            rows = await tx.fetch(
                """
                SELECT id FROM events WHERE (tenant, id) > (:tenant, :after) AND tenant <= :tenant
                ORDER BY tenant, id LIMIT :limit
                """,
                tenant=tenant,
                after=after,
                limit=limit,
            )
        return [row["id"] for row in rows]

    async def sizes(self, ids: Sequence[str]) -> Mapping[str, int]:
        """How many bytes the bodies have, of those of the ids that exist."""
        async with self._db.read(browse=True) as tx:
            rows = await tx.fetch("SELECT id, LENGTH(body) AS size FROM events WHERE id IN (:ids)", ids=ids)
        return {row["id"]: row["size"] for row in rows}

    async def renew(self, before: Event, after: Event) -> None:
        """Replaces the body and its expiry, unless somebody else did so since `before` was read."""
        async with self._db.write() as tx:
            await tx.execute(
                """
                UPDATE events SET body = :body, expires_at = :expires_at
                WHERE id = :id AND expires_at = :expired_at
                """,
                id=before.id,
                expired_at=before.expires_at,
                body=after.body,
                expires_at=after.expires_at,
            )

    async def page(
        self, tenant: str, filters: Mapping[str, Any], *, limit: int, cursor: str | None
    ) -> Mapping[str, int]:
        """The ids, newest first, those after `cursor`, each with how many bytes its body has.

        `filters`: type, generation_id, account, since, until.
        """
        conditions, order, values = where(
            tenant,
            filters,
            prefix="evt",
            columns={"type": "type", "generation_id": "generation_id", "account": "account"},
            narrow=("generation_id",),
            cursor=cursor,
        )
        async with self._db.read(browse=True) as tx:
            rows = await tx.fetch(
                f"""
                SELECT id, LENGTH(body) AS size FROM events WHERE {conditions}
                ORDER BY {order} LIMIT :limit
                """,
                limit=limit,
                **values,
            )
        return {row["id"]: row["size"] for row in rows}


def listed(types: Iterable[str]) -> str:
    """Event types as SQL text."""
    return ", ".join(f"'{type_}'" for type_ in types)


async def insert(tx: Transaction, events: Sequence[Event]) -> None:
    """Stores new events that nothing can have stored before."""
    await tx.execute_many(_INSERT, [_values(event) for event in events])


async def fan_out(
    tx: Transaction,
    keyring: KeyRing,
    events: Sequence[Event],
    handoff: Handoff,
    *,
    callbacks: Mapping[str, str | None] | None = None,
    now: int,
) -> Sequence[Claimed]:
    """Makes the deliveries of stored events, to the endpoints that want them and to the callback URLs of
    their generations; those that are handed over."""
    if not events:
        return []
    tenants = sorted({event.tenant for event in events})
    endpoints = {one.id: one for one in await _listening(tx, keyring, tenants)}
    rows: list[dict[str, Any]] = []
    pairs = 0
    for event in events:
        for endpoint in endpoints.values():
            if endpoint.tenant == event.tenant and endpoint.wants(event):
                rows.append(_delivery(event, endpoint.id, None, handoff, now=now))
            pairs += 1
            if endpoint.filter is not None or pairs % AT_ONCE == 0:
                # Others get on between them.
                await asyncio.sleep(0)
        url = (callbacks or {}).get(event.generation_id or "")
        if url is not None:
            rows.append(_delivery(event, None, url, handoff, now=now))
    for start in range(0, len(rows), AT_ONCE):
        await tx.execute_many(_DELIVER, rows[start : start + AT_ONCE])
    secrets: dict[str, Sequence[str]] = {}
    if any(row["callback_url"] is not None for row in rows):
        for row in await tx.fetch(_SIGNING, tenants=tenants):
            secrets[row["id"]] = valid(read_signing_secrets(keyring, row["id"], row["signing_secrets"]), now)
    return _claimed(rows, {event.id: event for event in events}, endpoints, secrets, handoff, now=now)


async def _earlier(
    tx: Transaction, publications: Sequence[Publication], *, now: int
) -> dict[int, Sequence[str] | Refused]:
    """The ids of what the Idempotency-Keys that were used before have published, by their places."""
    keyed = [(place, one, one.idempotency) for place, one in enumerate(publications) if one.idempotency]
    earlier: dict[int, Sequence[str] | Refused] = {}
    for place, one, key in sorted(keyed, key=lambda each: (each[1].tenant, each[2].key)):
        ids = " ".join(event.id for event in one.events)
        try:
            before = await reserve(tx, one.tenant, key, resource_id=ids, status=201, now=now)
        except Refused as refusal:
            earlier[place] = refusal
            continue
        if before is not None:
            earlier[place] = before[0].split()
    return earlier


async def _publish(
    tx: Transaction, keyring: KeyRing, events: Sequence[Event], handoff: Handoff, *, now: int
) -> tuple[Sequence[Event], Sequence[Claimed]]:
    """What is stored of each, by its name maybe an earlier one; and the deliveries that are handed over."""
    if not events:
        return [], []
    rows = [_values(event) for event in events]
    await tx.execute_many(_PUBLISH, sorted(rows, key=lambda row: (row["tenant"], row["source_id"] or "")))
    fresh = await _stored(tx, events)
    claimed = await fan_out(tx, keyring, fresh, handoff, now=now)
    known = {event.id for event in fresh}
    named = await _named(tx, [event for event in events if event.id not in known])
    stored = [event if event.id in known else named[event.tenant, event.source_id] for event in events]
    return stored, claimed


async def _correct(tx: Transaction, one: Publication, kept: Mapping[str, Event]) -> None:
    """What its key gives later: not the events whose names were taken, but those that have them."""
    ids = [kept[event.id].id for event in one.events]
    if one.idempotency is not None and ids != [event.id for event in one.events]:
        await correct(tx, one.tenant, one.idempotency, resource_id=" ".join(ids), status=201)


async def _again(
    tx: Transaction, before: Sequence[str] | Refused, kept: Mapping[str, Event]
) -> Sequence[Event] | Refused:
    """What a key that was used before gives: maybe in this very transaction."""
    if isinstance(before, Refused):
        return before
    found = dict(kept)
    missing = sorted({id_ for id_ in before if id_ not in kept})
    if missing:
        rows = await tx.fetch("SELECT * FROM events WHERE id IN (:ids)", ids=missing)
        found |= {row["id"]: _read(row) for row in rows}
    if any(id_ not in found for id_ in before):
        return Conflict("what this Idempotency-Key created is gone")
    return [found[id_] for id_ in before]


async def _announce(tx: Transaction, changes: Sequence[Change]) -> Sequence[Event]:
    """Those of the events that are now stored: their generation did move, and had not been announced."""
    events = [event for change in changes for event in change.events]
    if not events:
        return []
    rows = [{**_values(event), "mark": _mark(one)} for one in changes for event in one.events]
    await tx.execute_many(_ANNOUNCE, rows)
    return await _stored(tx, events)


async def _stored(tx: Transaction, events: Sequence[Event]) -> Sequence[Event]:
    rows = await tx.fetch("SELECT id FROM events WHERE id IN (:ids)", ids=[event.id for event in events])
    stored = {row["id"] for row in rows}
    return [event for event in events if event.id in stored]


async def _listening(tx: Transaction, keyring: KeyRing, tenants: Sequence[str]) -> Sequence[Endpoint]:
    return [read_endpoint(keyring, row) for row in await tx.fetch(_LISTENING, tenants=tenants)]


async def _heard(tx: Transaction, keyring: KeyRing, changes: Sequence[Change]) -> Sequence[Change]:
    """The changes without the fleeting events that no endpoint wants."""
    fleeting = [event for one in changes for event in one.events if event.type in FLEETING]
    if not fleeting:
        return changes
    endpoints = await _listening(tx, keyring, sorted({event.tenant for event in fleeting}))
    unheard = {event.id for event in fleeting if not await _is_heard(event, endpoints)}
    return [
        replace(one, events=[event for event in one.events if event.id not in unheard]) for one in changes
    ]


async def _is_heard(event: Event, endpoints: Sequence[Endpoint]) -> bool:
    for one in endpoints:
        if one.tenant != event.tenant or not one.takes(event.type, event.account):
            continue
        if one.lets_through(event.body):
            return True
        # Others get on between them.
        await asyncio.sleep(0)
    return False


async def _cancel_older(tx: Transaction, events: Sequence[Event], *, now: int) -> None:
    """Cancels what fleeting events and endings take the place of; they have no deliveries yet themselves."""
    replaced = {event.generation_id for event in events if event.type in (*FLEETING, *ENDINGS.values())}
    await tx.execute_many(
        _CANCEL_FLEETING, [{"generation_id": one, "now": now} for one in sorted(map(str, replaced))]
    )


_MOVE = """
    UPDATE generations
    SET status = :status, answer = :answer, known_at = :known_at, late = :late, learned_by = :learned_by,
        progress_told = COALESCE(:progress_told, progress_told),
        progress_at = COALESCE(:progress_at, progress_at),
        event_id = :event_id, due_at = CASE WHEN :final = 1 THEN NULL ELSE due_at END,
        version = version + 1
    WHERE id = :id AND version = :version
"""
_ASKED = """
    UPDATE generations
    SET due_at = CASE
            WHEN due_at IS NULL THEN NULL
            -- another move was faster, and what this ask brought was not taken
            WHEN COALESCE(event_id, '') <> :mark THEN CAST(:at AS BIGINT)
            -- a callback came meanwhile
            WHEN hints > :hints AND (CAST(:due_at AS BIGINT) > :hinted_at) IS NOT FALSE THEN :hinted_at
            ELSE CAST(:due_at AS BIGINT)
        END,
        hint_asks = CASE WHEN hints > :hints THEN COALESCE(:hint_asks, hint_asks) ELSE :hint_asks END,
        missing = CASE WHEN hints > :hints THEN 0 ELSE :missing END,
        deadline_at = :deadline_at, outage = :outage, rate = :rate,
        chance = CASE WHEN hints > :hints THEN :called ELSE :chance END,
        open_at = COALESCE(:open_at, open_at),
        lease = NULL, asked_at = :at, asks = asks + 1, errors = :errors, last_error = :last_error
    WHERE id = :generation_id AND lease = :lease
"""
_ANNOUNCE = """
    INSERT INTO events (id, tenant, type, generation_id, account, announces, body, expires_at, created_at)
    SELECT :id, :tenant, :type, :generation_id, :account, :announces, :body, :expires_at, :created_at
    FROM generations WHERE generations.id = :generation_id AND generations.event_id = :mark
    ON CONFLICT DO NOTHING
"""
_CANCEL_FLEETING = f"""
    UPDATE deliveries SET status = 'canceled', due_at = NULL, updated_at = :now
    WHERE status = 'pending' AND event_id IN (
        SELECT id FROM events
        WHERE generation_id = :generation_id AND type IN ({listed(FLEETING)})
    )
"""
_INSERT = """
    INSERT INTO events (id, tenant, type, generation_id, account, announces, source_id, body, created_at)
    VALUES (:id, :tenant, :type, :generation_id, :account, :announces, :source_id, :body, :created_at)
"""
_PUBLISH = _INSERT + " ON CONFLICT (tenant, source_id) DO NOTHING"
_LISTENING = """
    SELECT * FROM endpoints WHERE tenant IN (:tenants) AND deleted_at IS NULL AND disabled_at IS NULL
    ORDER BY id
"""
_SIGNING = "SELECT id, signing_secrets FROM tenants WHERE id IN (:tenants)"
_DELIVER = """
    INSERT INTO deliveries (
        id, tenant, event_id, endpoint_id, callback_url, destination, status, attempts, run_attempts,
        next_trigger,
        due_at, lease, created_at, updated_at
    ) VALUES (
        :id, :tenant, :event_id, :endpoint_id, :callback_url, :destination, :status, 0, 0, 'scheduled',
        :due_at, :lease, :now, :now
    )
"""


def _move(change: Change) -> dict[str, Any]:
    after = change.after
    told = [event for event in change.events if event.type == PROGRESS]
    return {
        "id": after.id,
        "version": after.version,
        "status": after.status.value,
        "answer": write_update(after.update),
        "known_at": after.known_at,
        "late": int(after.late),
        "learned_by": after.learned_by,
        "progress_told": after.update.progress if told and after.update else None,
        "progress_at": told[0].created_at if told else None,
        "event_id": _mark(change),
        "final": int(after.status in FINAL),
    }


def _mark(change: Change) -> str | None:
    """What a generation's row has of the change that moved it: the first of its events."""
    return change.events[0].id if change.events else None


def _delivery(
    event: Event, endpoint_id: str | None, callback_url: str | None, handoff: Handoff, *, now: int
) -> dict[str, Any]:
    where_to = destination(event.tenant, endpoint_id, callback_url)
    handed_over = handoff.takes(where_to, len(event.body))
    return {
        "id": new_id("dlv", now),
        "tenant": event.tenant,
        "event_id": event.id,
        "endpoint_id": endpoint_id,
        "callback_url": callback_url,
        "destination": where_to,
        "status": Status.SENDING.value if handed_over else Status.PENDING.value,
        "due_at": handoff.lease_until if handed_over else now,
        "lease": handoff.lease if handed_over else None,
        "now": now,
    }


def _claimed(
    rows: Sequence[Mapping[str, Any]],
    events: Mapping[str, Event],
    endpoints: Mapping[str, Endpoint],
    signing_secrets: Mapping[str, Sequence[str]],
    handoff: Handoff,
    *,
    now: int,
) -> Sequence[Claimed]:
    claimed = []
    for row in rows:
        if row["status"] != Status.SENDING:
            continue
        event = events[row["event_id"]]
        endpoint = endpoints.get(row["endpoint_id"])
        claimed.append(
            Claimed(
                id=row["id"],
                event_id=event.id,
                event_type=event.type,
                endpoint_id=row["endpoint_id"],
                destination=row["destination"],
                url=endpoint.url if endpoint else row["callback_url"],
                secrets=endpoint.signing(now) if endpoint else signing_secrets.get(event.tenant, ()),
                headers=endpoint.headers if endpoint else {},
                rate_limit=endpoint.rate_limit if endpoint else None,
                body=event.body,
                attempts=0,
                run_attempts=0,
                trigger=Trigger.SCHEDULED,
                lease=handoff.lease,
                lease_until=handoff.lease_until,
                expires_at=event.expires_at,
                generation_id=event.generation_id,
                event_at=event.created_at,
            )
        )
    return claimed


def _values(event: Event) -> dict[str, Any]:
    return {
        "id": event.id,
        "tenant": event.tenant,
        "type": event.type,
        "generation_id": event.generation_id,
        "account": event.account,
        "announces": event.announces,
        "source_id": event.source_id,
        "body": event.body,
        "expires_at": event.expires_at,
        "created_at": event.created_at,
    }


async def _named(tx: Transaction, events: Sequence[Event]) -> Mapping[tuple[str, str | None], Event]:
    """What is stored under the names of these events, by tenant and name."""
    if not events:
        return {}
    rows = await tx.fetch(
        "SELECT * FROM events WHERE source_id IN (:names) AND tenant IN (:tenants)",
        names=sorted({event.source_id or "" for event in events}),
        tenants=sorted({event.tenant for event in events}),
    )
    named = {(row["tenant"], row["source_id"]): _read(row) for row in rows}
    if any((event.tenant, event.source_id) not in named for event in events):
        raise Collision("the event that had this name has just been removed")
    return named


def _read(row: Row) -> Event:
    return Event(**dict(row))
