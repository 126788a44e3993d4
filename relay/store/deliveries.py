"""Deliveries and their attempts at rest."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter, itemgetter
from typing import Any

from relay import event
from relay.delivery import Claimed, Settlement, Status, Trigger
from relay.endpoint import valid
from relay.errors import Conflict, NotFound
from relay.ids import new_id
from relay.keyring import KeyRing
from relay.store.audit import Entry, note
from relay.store.database import Database, Row, Transaction, repeated
from relay.store.endpoints import cancel_open, disable, read_headers, read_secrets
from relay.store.events import Handoff, fan_out, insert, listed
from relay.store.filters import where
from relay.store.tenants import read_signing_secrets

_NOTHING_HANDED_OVER = Handoff("", 0, takes=lambda destination, size: False)
FAILING_LONG = 5 * 86_400_000
# A canceled delivery may still be in flight for so long.
LONGEST_ATTEMPT = 60_000
# Of a delivery, that are shown: one may be replayed without end.
MOST_ATTEMPTS = 100


@dataclass(frozen=True, slots=True)
class Delivery:
    """A delivery as its owner sees it."""

    id: str
    event_id: str
    event_type: str
    generation_id: str | None
    endpoint_id: str | None
    url: str
    status: Status
    attempts: int
    due_at: int | None
    created_at: int
    updated_at: int


@dataclass(frozen=True, slots=True)
class Attempt:
    """One HTTP request for a delivery, as it went."""

    id: str
    number: int
    started_at: int
    duration_ms: int
    trigger: Trigger
    response_status: int | None
    response_body: str | None
    error_code: str | None
    error_message: str | None


@dataclass(frozen=True, slots=True)
class Backlog:
    """How many deliveries are due, how many have not ended at all, and when the first was due."""

    due: int
    open: int
    oldest_due_at: int | None


class Deliveries:
    """Every statement about deliveries; each method is one transaction."""

    def __init__(self, database: Database, keyring: KeyRing) -> None:
        self._db, self._keyring = database, keyring

    async def destinations(self, *, now: int, after: str, limit: int) -> Sequence[tuple[str, bool]]:
        """Up to `limit` destinations with open deliveries, in order, those that come after `after`; and
        whether one of theirs is due. Each costs two look-ups in the index, however much is waiting."""
        async with self._db.read() as tx:
            rows = await tx.fetch(_DESTINATIONS, now=now, after=after, limit=limit)
        return [(row["destination"], bool(row["is_due"])) for row in rows]

    async def backlog(self, *, now: int, most: int) -> Backlog:
        """What is open, counted up to `most`."""
        async with self._db.read(browse=True) as tx:
            [counted] = await tx.fetch(_COUNTED, now=now, most=most)
            [found] = await tx.fetch(_OLDEST, destinations=most)
        return Backlog(counted["due"] or 0, counted["open"], found["oldest"])

    async def claim(
        self,
        wanted: Mapping[str, int],
        fresh: Mapping[str, int] | None = None,
        *,
        now: int,
        lease: str,
        lease_until: int,
        most_bytes: int = 2**62,
    ) -> Sequence[Claimed]:
        """Takes what is due, up to so many of each destination and about so many bytes in all; a crash gives
        it back at `lease_until`. What a newer event has taken the place of is canceled instead, and what
        was added for an endpoint just when that was disabled. Of those in `fresh`, so many more that are told
        for the first time: they pass what is replayed."""
        names = sorted({*wanted, *(fresh or {})})
        taken = {"now": now, "lease": lease, "lease_until": lease_until}
        if not names:
            return []
        async with self._db.write() as tx:
            for sql, limits in ((_CLAIM, wanted), (_CLAIM_FRESH, fresh or {})):
                rows = [{"destination": name, "limit": limit, **taken} for name, limit in limits.items()]
                await tx.execute_many(sql.format(skip_locked=self._db.skip_locked), rows)
            await tx.execute_many(_CANCEL_CLAIMED, [{"destination": name, **taken} for name in names])
            sizes = await tx.fetch(_SIZES, destinations=names, lease=lease, lease_until=lease_until)
            total, surplus = 0, []
            for row in sizes:
                # One is taken however large it is.
                if total and total + row["size"] > most_bytes:
                    surplus.append({"id": row["id"], "lease": lease, "now": now})
                total += row["size"]
            await tx.execute_many(_RELEASE, surplus)
            found = await tx.fetch(_LOAD_CLAIMED, destinations=names, lease=lease, lease_until=lease_until)
        return [_claimed(self._keyring, row, now) for row in found]

    @repeated
    async def settle(self, settlements: Sequence[Settlement], *, now: int) -> set[str]:
        """Logs attempts and moves their deliveries, each only while its lease is held.

        A delivery that was canceled meanwhile stays canceled; its attempt is logged. Returns the endpoints
        that were given up.
        """
        gone = {one.disable_endpoint for one in settlements if one.disable_endpoint}
        rows = [_settlement(one, now) for one in sorted(settlements, key=attrgetter("delivery_id"))]
        async with self._db.write() as tx:
            await _note_health(tx, settlements, now)
            dead = await _long_failing(tx, settlements, now) - gone
            ended = [
                *(await _give_up(tx, gone, "it answered 410 Gone", now=now)),
                *(await _give_up(tx, dead, "every attempt failed for 5 days", now=now)),
            ]
            await tx.execute_many(_SETTLE, rows)
            await tx.execute_many(_LOG, rows)
            if gone or dead:
                await cancel_open(tx, [*gone, *dead], now=now)
                await insert(tx, ended)
                await fan_out(tx, self._keyring, ended, _NOTHING_HANDED_OVER, now=now)
        return gone | dead

    async def release(self, deliveries: Sequence[Claimed], *, now: int) -> None:
        """Makes claimed deliveries due again, unattempted."""
        await self.postpone([(one, now) for one in deliveries])

    @repeated
    async def postpone(self, postponed: Sequence[tuple[Claimed, int]]) -> None:
        """Makes claimed deliveries due again at the times beside them, unattempted."""
        rows = [{"id": one.id, "lease": one.lease, "now": due_at} for one, due_at in postponed]
        async with self._db.write() as tx:
            await tx.execute_many(_RELEASE, sorted(rows, key=itemgetter("id")))

    @repeated
    async def recover(self, destinations: Collection[str] | None = None, *, now: int) -> int:
        """Makes due now what was being sent to these destinations, or to any, without waiting for its leases;
        returns how many.

        Only for those to which no relay can be sending.
        """
        only = "" if destinations is None else "AND destination IN (:destinations)"
        values = {} if destinations is None else {"destinations": sorted(destinations)}
        async with self._db.write() as tx:
            if destinations is None:
                await tx.execute(_FORGET_ATTEMPTS)
            return await tx.execute(
                f"UPDATE deliveries SET due_at = :now WHERE status = 'sending' AND due_at > :now {only}",
                now=now,
                **values,
            )

    async def get(self, tenant: str, delivery_id: str) -> Delivery | None:
        async with self._db.read() as tx:
            rows = await tx.fetch(
                f"{_SELECT} WHERE d.id = :id AND d.tenant = :tenant", id=delivery_id, tenant=tenant
            )
        return _read(rows[0]) if rows else None

    async def attempts(self, delivery_id: str) -> Sequence[Attempt]:
        """The last MOST_ATTEMPTS of a delivery, the first of them first."""
        async with self._db.read() as tx:
            rows = await tx.fetch(
                "SELECT * FROM attempts WHERE delivery_id = :id ORDER BY number DESC LIMIT :limit",
                id=delivery_id,
                limit=MOST_ATTEMPTS,
            )
        return [_read_attempt(row) for row in reversed(rows)]

    async def page(
        self, tenant: str, filters: Mapping[str, Any], *, limit: int, cursor: str | None
    ) -> Sequence[Delivery]:
        """Newest first, those after the id `cursor`.

        `filters`: status, endpoint_id, event_id, generation_id, event_type; since and until on the time of
        creation.
        """
        delivered = filters.get("status") == Status.DELIVERED
        conditions, order, values = where(
            tenant,
            filters,
            prefix="dlv",
            table="d.",
            columns={
                "status": "d.status",
                "endpoint_id": "d.endpoint_id",
                "event_id": "d.event_id",
                "generation_id": "e.generation_id",
                "event_type": "e.type",
            },
            narrow=("event_id", "generation_id"),
            leading=("endpoint_id",) if delivered else ("status", "endpoint_id"),
            cursor=cursor,
        )
        if "status" in filters and not delivered:
            # As text, so that the index of what was not delivered can be seen to serve.
            conditions += " AND d.status <> 'delivered'"
        async with self._db.read(browse=True) as tx:
            rows = await tx.fetch(
                f"""
                {_SELECT} WHERE {conditions}
                ORDER BY {order} LIMIT :limit
                """,
                limit=limit,
                **values,
            )
        return [_read(row) for row in rows]

    async def replay(self, tenant: str, delivery_id: str, *, now: int, entry: Entry | None = None) -> str:
        """Makes a finished delivery pending again, with a fresh run of the schedule; its destination.

        Raises NotFound, or Conflict when it is not finished or its endpoint takes nothing now.
        """
        async with self._db.write() as tx:
            replayed = await tx.execute(
                REPLAY,
                id=delivery_id,
                tenant=tenant,
                delivered=1,
                replay_id=delivery_id,
                now=now,
                over=now - LONGEST_ATTEMPT,
            )
            rows = await tx.fetch(_REPLAYED, id=delivery_id, tenant=tenant)
            await note(tx, entry if replayed else None)
        if not rows:
            raise NotFound(f"no delivery {delivery_id}")
        if not replayed:
            raise _refusal(rows[0], now=now)
        return str(rows[0]["destination"])


# From one destination to the next by the index: the rows between are not read.
_DESTINATIONS = """
    WITH RECURSIVE lanes(destination) AS (
        SELECT (
            SELECT destination FROM deliveries WHERE due_at IS NOT NULL AND destination > :after
            ORDER BY destination LIMIT 1
        )
        UNION ALL
        SELECT (
            SELECT d.destination FROM deliveries d
            WHERE d.due_at IS NOT NULL AND d.destination > lanes.destination
            ORDER BY d.destination LIMIT 1
        ) FROM lanes WHERE lanes.destination IS NOT NULL
    )
    SELECT destination, EXISTS (
        SELECT 1 FROM deliveries d WHERE d.destination = lanes.destination AND d.due_at <= :now
    ) AS is_due
    FROM lanes WHERE destination IS NOT NULL LIMIT :limit
"""
_COUNTED = """
    SELECT COUNT(*) AS open, SUM(CASE WHEN due_at <= :now THEN 1 ELSE 0 END) AS due FROM (
        SELECT due_at FROM deliveries WHERE due_at IS NOT NULL ORDER BY destination, due_at LIMIT :most
    ) AS counted
"""
_OLDEST = """
    WITH RECURSIVE lanes(destination) AS (
        SELECT (SELECT destination FROM deliveries WHERE due_at IS NOT NULL ORDER BY destination LIMIT 1)
        UNION ALL
        SELECT (
            SELECT d.destination FROM deliveries d
            WHERE d.due_at IS NOT NULL AND d.destination > lanes.destination
            ORDER BY d.destination LIMIT 1
        ) FROM lanes WHERE lanes.destination IS NOT NULL
    )
    SELECT MIN(due_at) AS oldest FROM (
        SELECT (
            SELECT d.due_at FROM deliveries d
            WHERE d.destination = lanes.destination AND d.due_at IS NOT NULL ORDER BY d.due_at LIMIT 1
        ) AS due_at
        FROM lanes WHERE destination IS NOT NULL LIMIT :destinations
    ) AS firsts
"""
_CLAIM = """
    WITH due AS (
        SELECT id FROM deliveries WHERE destination = :destination AND due_at <= :now
        ORDER BY due_at LIMIT :limit {skip_locked}
    )
    UPDATE deliveries SET status = 'sending', due_at = :lease_until, lease = :lease
    FROM due WHERE deliveries.id = due.id
"""
# Behind what is replayed, of which replays make no more than so many due at once.
_CLAIM_FRESH = """
    WITH due AS (
        SELECT id FROM deliveries
        WHERE due_at <= :now AND id IN (
            SELECT id FROM (
                SELECT id, due_at, next_trigger, run_attempts FROM deliveries
                WHERE destination = :destination AND due_at <= :now ORDER BY due_at LIMIT 1000
            ) AS first
            WHERE next_trigger = 'scheduled' AND run_attempts = 0 ORDER BY due_at LIMIT :limit
        )
        {skip_locked}
    )
    UPDATE deliveries SET status = 'sending', due_at = :lease_until, lease = :lease
    FROM due WHERE deliveries.id = due.id
"""
# A delivery that was in somebody's hands when the newer event was recorded, and was given back; or that
# was being added, by who still saw its endpoint enabled, while that was disabled.
_CANCEL_CLAIMED = f"""
    UPDATE deliveries SET status = 'canceled', due_at = NULL, lease = NULL, updated_at = :now
    WHERE destination = :destination AND due_at = :lease_until AND lease = :lease
        AND (
            (SELECT disabled_at FROM endpoints WHERE id = :destination) IS NOT NULL
            OR next_trigger = 'scheduled' AND EXISTS (
                SELECT 1 FROM events e JOIN events newer ON newer.generation_id = e.generation_id
                WHERE e.id = deliveries.event_id AND e.type IN ({listed(event.FLEETING)}) AND (
                    newer.type IN ({listed(event.ENDINGS.values())})
                    OR (newer.type IN ({listed(event.FLEETING)}) AND newer.created_at > e.created_at)
                )
            )
        )
"""
_SIZES = """
    SELECT d.id, LENGTH(e.body) AS size FROM deliveries d JOIN events e ON e.id = d.event_id
    WHERE d.destination IN (:destinations) AND d.due_at = :lease_until AND d.lease = :lease
    ORDER BY d.id
"""
_FORGET_ATTEMPTS = """
    UPDATE deliveries SET lease = NULL
    WHERE status = 'canceled' AND status <> 'delivered' AND lease IS NOT NULL
"""
_RELEASE = """
    UPDATE deliveries
    SET due_at = CASE WHEN status = 'sending' THEN CAST(:now AS BIGINT) END,
        status = CASE WHEN status = 'sending' THEN 'pending' ELSE status END, lease = NULL
    WHERE id = :id AND lease = :lease
"""
_LOAD_CLAIMED = """
    SELECT d.id, d.tenant, d.event_id, e.type AS event_type, d.endpoint_id, d.destination,
        COALESCE(p.url, d.callback_url) AS url, p.secrets, p.headers, p.rate_limit, t.signing_secrets,
        e.body, e.expires_at, e.generation_id, e.created_at AS event_at,
        d.attempts, d.run_attempts, d.next_trigger, d.lease, d.due_at AS lease_until, d.replay_id
    FROM deliveries d
    JOIN events e ON e.id = d.event_id
    JOIN tenants t ON t.id = d.tenant
    LEFT JOIN endpoints p ON p.id = d.endpoint_id
    WHERE d.destination IN (:destinations) AND d.due_at = :lease_until AND d.lease = :lease
        -- deleted since the statement before: what has no secret any more cannot be signed
        AND p.deleted_at IS NULL
    ORDER BY d.id
"""
_SELECT = """
    SELECT d.id, d.event_id, e.type AS event_type, e.generation_id, d.endpoint_id,
        COALESCE(p.url, d.callback_url) AS url, d.status, d.attempts, d.due_at, d.created_at, d.updated_at
    FROM deliveries d
    JOIN events e ON e.id = d.event_id
    LEFT JOIN endpoints p ON p.id = d.endpoint_id
"""
REPLAY = """
    UPDATE deliveries
    SET status = 'pending', due_at = :now, lease = NULL, run_attempts = 0,
        next_trigger = 'replay', updated_at = :now, replay_id = CAST(:replay_id AS TEXT)
    WHERE id = :id AND tenant = :tenant AND due_at IS NULL AND (lease IS NULL OR updated_at <= :over)
        AND (status <> 'delivered' OR :delivered = 1)
        AND NOT EXISTS (
            SELECT 1 FROM endpoints p WHERE p.id = deliveries.endpoint_id AND p.disabled_at IS NOT NULL
        )
"""
_REPLAYED = """
    SELECT d.destination, d.status, d.lease, d.updated_at, p.disabled_at, p.deleted_at
    FROM deliveries d LEFT JOIN endpoints p ON p.id = d.endpoint_id
    WHERE d.id = :id AND d.tenant = :tenant
"""
_SETTLE = """
    UPDATE deliveries
    SET due_at = CASE WHEN status = 'sending' THEN CAST(:due_at AS BIGINT) END,
        status = CASE WHEN status = 'sending' THEN :status ELSE status END,
        attempts = :number, run_attempts = run_attempts + 1, next_trigger = 'scheduled', lease = NULL,
        updated_at = :now
    WHERE id = :delivery_id AND lease = :lease
"""
# Of what has just been settled: its lease was held until then.
_LOG = """
    INSERT INTO attempts (
        delivery_id, number, id, started_at, duration_ms, reason, response_status, response_body,
        error_code, error_message
    )
    SELECT :delivery_id, :number, :attempt_id, :started_at, :duration_ms, :reason, :response_status,
        :response_body, :error_code, :error_message
    FROM deliveries
    WHERE id = :delivery_id AND lease IS NULL AND attempts = :number AND updated_at = :now
    ON CONFLICT DO NOTHING
"""


def _refusal(row: Row, *, now: int) -> Conflict:
    """Why a delivery was not replayed."""
    if row["status"] in (Status.PENDING, Status.SENDING):
        return Conflict(f"this delivery is still {row['status']}: only a finished one can be replayed")
    if row["lease"] is not None and now < row["updated_at"] + LONGEST_ATTEMPT:
        return Conflict("an attempt is still under way: try again when it has ended")
    if row["deleted_at"] is not None:
        return Conflict("its endpoint has been deleted")
    if row["disabled_at"] is not None:
        return Conflict(f"its endpoint {row['destination']} is disabled: enable it first")
    return Conflict("it has just changed: try again")


async def _note_health(tx: Transaction, settlements: Sequence[Settlement], now: int) -> None:
    """Since when every attempt of an endpoint has failed: written when that changes."""
    told = [one for one in settlements if one.endpoint_id and one.endpoint_is_well is not None]
    # One success is enough, also when a failure came after it in the same write.
    well = {one.endpoint_id: {"since": None, "event_id": None} for one in told if one.endpoint_is_well}
    last = {one.endpoint_id: one for one in told}
    ill = {
        name: {"since": now, "event_id": one.event_id}
        for name, one in last.items()
        if not one.endpoint_is_well
    }
    news = [{"id": name, **values} for one in (well, ill) for name, values in one.items()]
    await tx.execute_many(
        """
        UPDATE endpoints SET failing_since = :since, failing_event = :event_id
        WHERE id = :id AND (failing_since IS NULL) = (CAST(:since AS BIGINT) IS NOT NULL)
        """,
        sorted(news, key=itemgetter("id")),
    )


async def _long_failing(tx: Transaction, settlements: Sequence[Settlement], now: int) -> set[str]:
    """Endpoints whose every attempt failed for FAILING_LONG, the last of another event than the first."""
    failed = [(one.endpoint_id, one.event_id) for one in settlements if not one.answer.accepted]
    names = sorted({name for name, _ in failed if name is not None})
    if not names:
        return set()
    rows = await tx.fetch(
        """
        SELECT id, failing_event FROM endpoints
        WHERE id IN (:ids) AND failing_since <= :since AND disabled_at IS NULL
        """,
        ids=names,
        since=now - FAILING_LONG,
    )
    first = {row["id"]: row["failing_event"] for row in rows}
    return {name for name, event_id in failed if name and first.get(name, event_id) != event_id}


async def _give_up(
    tx: Transaction, endpoint_ids: Iterable[str], reason: str, *, now: int
) -> Sequence[event.Event]:
    """Disables endpoints; what is to be announced of it, to those of the same tenant that want to hear it."""
    names = await disable(tx, endpoint_ids, reason=reason, now=now)
    if not names:
        return []
    rows = await tx.fetch("SELECT id, tenant, url FROM endpoints WHERE id IN (:ids)", ids=names)
    for row in rows:
        await note(tx, Entry(row["tenant"], now, "relay", "endpoint.disabled", row["id"]))
    return [event.disabled(row["tenant"], row["id"], row["url"], reason, now=now) for row in rows]


def _settlement(one: Settlement, now: int) -> dict[str, Any]:
    answer = one.answer
    return {
        "delivery_id": one.delivery_id,
        "lease": one.lease,
        "number": one.number,
        "attempt_id": new_id("att", answer.started_at),
        "started_at": answer.started_at,
        "duration_ms": answer.duration_ms,
        "reason": one.trigger.value,
        "response_status": answer.status,
        "response_body": answer.body,
        "error_code": answer.code.value if answer.code else None,
        "error_message": answer.message,
        "status": one.status.value,
        "due_at": one.due_at,
        "now": now,
    }


def _claimed(keyring: KeyRing, row: Row, now: int) -> Claimed:
    endpoint_id = row["endpoint_id"]
    secrets: Sequence[str]
    headers: Mapping[str, str] = {}
    if endpoint_id is None:
        secrets = valid(read_signing_secrets(keyring, row["tenant"], row["signing_secrets"]), now)
    else:
        secrets = valid(read_secrets(keyring, row["tenant"], endpoint_id, row["secrets"]), now)
        headers = read_headers(keyring, row["tenant"], endpoint_id, row["headers"])
    return Claimed(
        id=row["id"],
        event_id=row["event_id"],
        event_type=row["event_type"],
        endpoint_id=endpoint_id,
        destination=row["destination"],
        url=row["url"],
        secrets=secrets,
        headers=headers,
        rate_limit=row["rate_limit"],
        body=bytes(row["body"]),
        attempts=row["attempts"],
        run_attempts=row["run_attempts"],
        trigger=Trigger(row["next_trigger"]),
        lease=row["lease"],
        lease_until=row["lease_until"],
        expires_at=row["expires_at"],
        generation_id=row["generation_id"],
        event_at=row["event_at"],
        is_replayed=row["replay_id"] is not None,
    )


def _read(row: Row) -> Delivery:
    values = dict(row)
    return Delivery(**{**values, "status": Status(values["status"])})


def _read_attempt(row: Row) -> Attempt:
    values = dict(row)
    del values["delivery_id"]
    return Attempt(trigger=Trigger(values.pop("reason")), **values)
