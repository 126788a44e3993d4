"""Events at rest: the one transaction in which a generation moves, is announced and fans out."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from relay.delivery import Claimed, Status, Trigger
from relay.endpoint import Endpoint
from relay.event import Event
from relay.generation import FINAL, Generation
from relay.ids import new_id
from relay.schedule import Asked
from relay.store.database import Database, Row, Transaction
from relay.store.endpoints import read_endpoint
from relay.store.filters import where
from relay.store.generations import write_update
from relay.store.idempotency import Idempotency, created_before, remember


@dataclass(frozen=True, slots=True)
class Change:
    """A generation as it stands after an update, and the event that says so when it ended."""

    after: Generation
    event: Event | None


@dataclass(frozen=True, slots=True)
class Handoff:
    """How many fresh deliveries the caller takes at once, already leased to it; the others are pending."""

    lease: str
    lease_until: int
    room: int


class Events:
    """Every statement about events; each method is one transaction."""

    def __init__(self, database: Database) -> None:
        self._db = database

    async def record(
        self, changes: Sequence[Change], asked: Sequence[Asked], handoff: Handoff, *, now: int
    ) -> tuple[Sequence[Event], Sequence[Claimed]]:
        """Moves generations, announces their ends, fans the events out, and reschedules what was asked.

        Returns the events that are new and the deliveries that are handed over. A change whose generation
        has moved since it was read (`version`) changes nothing and announces nothing.
        """
        async with self._db.write() as tx:
            await tx.execute_many(_MOVE, [_move(change) for change in changes])
            await tx.execute_many(_ASKED, [asdict(one) for one in asked])
            events = [change.event for change in changes if change.event is not None]
            fresh = await self._insert(tx, events)
            callbacks = {change.after.id: change.after.callback_url for change in changes}
            claimed = await self._fan_out(tx, fresh, callbacks, handoff, now=now)
        return fresh, claimed

    async def publish(
        self, events: Sequence[Event], handoff: Handoff, *, now: int
    ) -> tuple[Sequence[Event], Sequence[Claimed]]:
        """Stores events and fans them out. Returns what is stored under each name (`source_id`), which may
        have been there before, and the deliveries that are handed over."""
        async with self._db.write() as tx:
            return await self._publish(tx, events, handoff, now=now)

    async def publish_once(
        self, tenant: str, events: Sequence[Event], idempotency: Idempotency, handoff: Handoff, *, now: int
    ) -> tuple[Sequence[Event], Sequence[Claimed]]:
        """As `publish`, of one tenant's events; or what was stored under this Idempotency-Key before."""
        async with self._db.write() as tx:
            before = await created_before(tx, tenant, idempotency)
            if before is not None:
                ids = before[0].split()
                rows = await tx.fetch("SELECT * FROM events WHERE id IN (:ids)", ids=ids)
                return sorted(map(_read, rows), key=lambda event: ids.index(event.id)), []
            stored, claimed = await self._publish(tx, events, handoff, now=now)
            names = " ".join(event.id for event in stored)
            await remember(tx, tenant, idempotency, resource_id=names, status=201, now=now)
            return stored, claimed

    async def _publish(
        self, tx: Transaction, events: Sequence[Event], handoff: Handoff, *, now: int
    ) -> tuple[Sequence[Event], Sequence[Claimed]]:
        await tx.execute_many(_PUBLISH, [_values(event) for event in events])
        fresh = await self._stored(tx, events)
        claimed = await self._fan_out(tx, fresh, {}, handoff, now=now)
        known = {event.id for event in fresh}
        return [event if event.id in known else await _named(tx, event) for event in events], claimed

    async def send(
        self, event: Event, endpoint: Endpoint, handoff: Handoff, *, now: int
    ) -> tuple[str, Sequence[Claimed]]:
        """Stores an event for one endpoint only, whatever its filter; its delivery's id, and the delivery
        when it is handed over."""
        row = _delivery(event, endpoint.id, None, handoff, 0, now=now)
        async with self._db.write() as tx:
            await tx.execute_many(_INSERT, [_values(event)])
            await tx.execute_many(_DELIVER, [row])
        return row["id"], _claimed([row], {event.id: event}, {endpoint.id: endpoint}, {}, handoff, now=now)

    async def get(self, tenant: str, event_id: str) -> Event | None:
        async with self._db.read() as tx:
            rows = await tx.fetch(
                "SELECT * FROM events WHERE id = :id AND tenant = :tenant", id=event_id, tenant=tenant
            )
        return _read(rows[0]) if rows else None

    async def page(
        self, tenant: str, filters: Mapping[str, Any], *, limit: int, cursor: str | None
    ) -> Sequence[Event]:
        """Newest first, those after `cursor`. `filters`: type, generation_id, account, since, until."""
        condition = where(filters, equal=("type", "generation_id", "account"), time="created_at")
        async with self._db.read() as tx:
            rows = await tx.fetch(
                f"""
                SELECT * FROM events
                WHERE tenant = :tenant AND (:cursor IS NULL OR id < :cursor) {condition}
                ORDER BY id DESC LIMIT :limit
                """,
                tenant=tenant,
                cursor=cursor,
                limit=limit,
                **filters,
            )
        return [_read(row) for row in rows]

    async def _insert(self, tx: Transaction, events: Sequence[Event]) -> Sequence[Event]:
        """Those of the events that are now stored: their generation did move, and had not been announced."""
        if not events:
            return []
        await tx.execute_many(_ANNOUNCE, [_values(event) for event in events])
        return await self._stored(tx, events)

    async def _stored(self, tx: Transaction, events: Sequence[Event]) -> Sequence[Event]:
        rows = await tx.fetch("SELECT id FROM events WHERE id IN (:ids)", ids=[event.id for event in events])
        stored = {row["id"] for row in rows}
        return [event for event in events if event.id in stored]

    async def _fan_out(
        self,
        tx: Transaction,
        events: Sequence[Event],
        callbacks: Mapping[str, str | None],
        handoff: Handoff,
        *,
        now: int,
    ) -> Sequence[Claimed]:
        if not events:
            return []
        tenants = sorted({event.tenant for event in events})
        endpoints = {row["id"]: read_endpoint(row) for row in await tx.fetch(_LISTENING, tenants=tenants)}
        rows: list[dict[str, Any]] = []
        for event in events:
            for endpoint in endpoints.values():
                if endpoint.tenant == event.tenant and endpoint.wants(event):
                    rows.append(_delivery(event, endpoint.id, None, handoff, len(rows), now=now))
            url = callbacks.get(event.generation_id or "")
            if url is not None:
                rows.append(_delivery(event, None, url, handoff, len(rows), now=now))
        await tx.execute_many(_DELIVER, rows)
        secrets = {row["id"]: row["signing_secret"] for row in await tx.fetch(_SIGNING, tenants=tenants)}
        return _claimed(rows, {event.id: event for event in events}, endpoints, secrets, handoff, now=now)


_MOVE = """
    UPDATE generations
    SET status = :status, answer = :answer, known_at = :known_at, late = :late, learned_by = :learned_by,
        event_id = :event_id, due_at = CASE WHEN :final = 1 THEN NULL ELSE due_at END,
        version = version + 1
    WHERE id = :id AND version = :version
"""
_ASKED = """
    UPDATE generations
    SET due_at = CASE WHEN due_at IS NULL THEN NULL ELSE :due_at END, lease = NULL,
        asked_at = :at, asks = asks + 1, errors = :errors, missing = :missing, hint_asks = :hint_asks,
        last_error = :last_error
    WHERE id = :generation_id AND lease = :lease
"""
_ANNOUNCE = """
    INSERT INTO events (id, tenant, type, generation_id, account, ending, body, created_at)
    SELECT :id, :tenant, :type, :generation_id, :account, :ending, :body, :created_at
    FROM generations WHERE generations.id = :generation_id AND generations.event_id = :id
    ON CONFLICT DO NOTHING
"""
_INSERT = """
    INSERT INTO events (id, tenant, type, generation_id, account, ending, source_id, body, created_at)
    VALUES (:id, :tenant, :type, :generation_id, :account, :ending, :source_id, :body, :created_at)
"""
_PUBLISH = _INSERT + " ON CONFLICT (tenant, source_id) DO NOTHING"
_LISTENING = """
    SELECT * FROM endpoints WHERE tenant IN (:tenants) AND deleted_at IS NULL AND disabled_at IS NULL
    ORDER BY id
"""
_SIGNING = "SELECT id, signing_secret FROM tenants WHERE id IN (:tenants)"
_DELIVER = """
    INSERT INTO deliveries (
        id, tenant, event_id, endpoint_id, callback_url, status, attempts, run_attempts, next_trigger,
        due_at, lease, created_at, updated_at
    ) VALUES (
        :id, :tenant, :event_id, :endpoint_id, :callback_url, :status, 0, 0, 'scheduled',
        :due_at, :lease, :now, :now
    )
"""


def _move(change: Change) -> dict[str, Any]:
    after = change.after
    return {
        "id": after.id,
        "version": after.version,
        "status": after.status.value,
        "answer": write_update(after.update),
        "known_at": after.known_at,
        "late": int(after.late),
        "learned_by": after.learned_by,
        "event_id": change.event.id if change.event else None,
        "final": int(after.status in FINAL),
    }


def _delivery(
    event: Event, endpoint_id: str | None, callback_url: str | None, handoff: Handoff, place: int, *, now: int
) -> dict[str, Any]:
    handed_over = place < handoff.room
    return {
        "id": new_id("dlv", now),
        "tenant": event.tenant,
        "event_id": event.id,
        "endpoint_id": endpoint_id,
        "callback_url": callback_url,
        "status": Status.SENDING.value if handed_over else Status.PENDING.value,
        "due_at": handoff.lease_until if handed_over else now,
        "lease": handoff.lease if handed_over else None,
        "now": now,
    }


def _claimed(
    rows: Sequence[Mapping[str, Any]],
    events: Mapping[str, Event],
    endpoints: Mapping[str, Endpoint],
    signing_secrets: Mapping[str, str],
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
                url=endpoint.url if endpoint else row["callback_url"],
                secrets=endpoint.secrets(now) if endpoint else (signing_secrets[event.tenant],),
                headers=endpoint.headers if endpoint else {},
                body=event.body,
                attempts=0,
                run_attempts=0,
                trigger=Trigger.SCHEDULED,
                lease=handoff.lease,
                lease_until=handoff.lease_until,
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
        "ending": event.ending,
        "source_id": event.source_id,
        "body": event.body,
        "created_at": event.created_at,
    }


async def _named(tx: Transaction, event: Event) -> Event:
    rows = await tx.fetch(
        "SELECT * FROM events WHERE tenant = :tenant AND source_id = :source_id",
        tenant=event.tenant,
        source_id=event.source_id,
    )
    return _read(rows[0])


def _read(row: Row) -> Event:
    return Event(**dict(row))
