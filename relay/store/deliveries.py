"""Deliveries and their attempts at rest."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from relay.delivery import Claimed, Settlement, Status, Trigger
from relay.errors import Conflict, NotFound
from relay.ids import new_id
from relay.store.database import Database, Row
from relay.store.endpoints import disable
from relay.store.filters import where


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


class Deliveries:
    """Every statement about deliveries; each method is one transaction."""

    def __init__(self, database: Database) -> None:
        self._db = database

    async def claim(self, *, now: int, limit: int, lease: str, lease_until: int) -> Sequence[Claimed]:
        """Takes up to `limit` deliveries that are due. A crashed claim comes due at `lease_until`."""
        async with self._db.write() as tx:
            taken = await tx.execute(
                f"""
                WITH due AS (
                    SELECT id FROM deliveries WHERE due_at <= :now
                    ORDER BY due_at LIMIT :limit {self._db.skip_locked}
                )
                UPDATE deliveries SET status = 'sending', due_at = :lease_until, lease = :lease
                FROM due WHERE deliveries.id = due.id
                """,
                now=now,
                limit=limit,
                lease=lease,
                lease_until=lease_until,
            )
            if not taken:
                return []
            rows = await tx.fetch(_LOAD_CLAIMED, lease=lease, lease_until=lease_until)
        return [_claimed(row, now) for row in rows]

    async def settle(self, settlements: Sequence[Settlement], *, now: int) -> Sequence[None]:
        """Logs attempts and moves their deliveries, each only while its lease is held.

        A delivery that was canceled meanwhile stays canceled; its attempt is logged.
        """
        gone = sorted({one.disable_endpoint for one in settlements if one.disable_endpoint})
        rows = [_settlement(one, now) for one in settlements]
        async with self._db.write() as tx:
            await tx.execute_many(_LOG, rows)
            await tx.execute_many(_SETTLE, rows)
            if gone:
                await disable(tx, gone, reason="the endpoint answered 410 Gone", now=now)
        return [None] * len(settlements)

    async def release(self, deliveries: Sequence[Claimed], *, now: int) -> None:
        """Makes claimed deliveries due again, unattempted."""
        async with self._db.write() as tx:
            await tx.execute_many(
                """
                UPDATE deliveries SET status = 'pending', due_at = :now, lease = NULL
                WHERE id = :id AND lease = :lease AND status = 'sending'
                """,
                [{"id": one.id, "lease": one.lease, "now": now} for one in deliveries],
            )

    async def recover(self, *, now: int) -> int:
        """Makes what a stopped relay was sending due now, without waiting for its leases; returns how many.

        Only for a database that no other relay uses.
        """
        async with self._db.write() as tx:
            return await tx.execute(
                "UPDATE deliveries SET due_at = :now WHERE status = 'sending' AND due_at > :now", now=now
            )

    async def get(self, tenant: str, delivery_id: str) -> Delivery | None:
        async with self._db.read() as tx:
            rows = await tx.fetch(
                f"{_SELECT} WHERE d.id = :id AND d.tenant = :tenant", id=delivery_id, tenant=tenant
            )
        return _read(rows[0]) if rows else None

    async def attempts(self, delivery_id: str) -> Sequence[Attempt]:
        """All attempts of a delivery, the first one first."""
        async with self._db.read() as tx:
            rows = await tx.fetch(
                "SELECT * FROM attempts WHERE delivery_id = :id ORDER BY number", id=delivery_id
            )
        return [_read_attempt(row) for row in rows]

    async def page(
        self, tenant: str, filters: Mapping[str, Any], *, limit: int, cursor: str | None
    ) -> Sequence[Delivery]:
        """Newest first, those after the id `cursor`.

        `filters`: status, endpoint_id, event_id, generation_id, event_type; since and until on the time of
        creation.
        """
        condition = where(
            filters, equal=("status", "endpoint_id", "event_id"), time="created_at", prefix="d."
        )
        if "generation_id" in filters:
            condition += " AND e.generation_id = :generation_id"
        if "event_type" in filters:
            condition += " AND e.type = :event_type"
        async with self._db.read() as tx:
            rows = await tx.fetch(
                f"""
                {_SELECT}
                WHERE d.tenant = :tenant AND (:cursor IS NULL OR d.id < :cursor) {condition}
                ORDER BY d.id DESC LIMIT :limit
                """,
                tenant=tenant,
                cursor=cursor,
                limit=limit,
                **filters,
            )
        return [_read(row) for row in rows]

    async def replay(self, tenant: str, delivery_id: str, *, now: int) -> None:
        """Makes a finished delivery pending again, with a fresh run of the schedule.

        Raises NotFound, or Conflict when it is not finished or its endpoint takes nothing now.
        """
        async with self._db.write() as tx:
            rows = await tx.fetch(
                """
                SELECT d.status, p.id AS endpoint_id, p.disabled_at, p.deleted_at
                FROM deliveries d LEFT JOIN endpoints p ON p.id = d.endpoint_id
                WHERE d.id = :id AND d.tenant = :tenant
                """,
                id=delivery_id,
                tenant=tenant,
            )
            if not rows:
                raise NotFound(f"no delivery {delivery_id}")
            row = rows[0]
            if row["status"] in (Status.PENDING, Status.SENDING):
                raise Conflict(f"this delivery is still {row['status']}: only a finished one can be replayed")
            if row["deleted_at"] is not None:
                raise Conflict("its endpoint has been deleted")
            if row["disabled_at"] is not None:
                raise Conflict(f"its endpoint {row['endpoint_id']} is disabled: enable it first")
            await tx.execute(
                """
                UPDATE deliveries
                SET status = 'pending', due_at = :now, lease = NULL, run_attempts = 0,
                    next_trigger = 'replay', updated_at = :now
                WHERE id = :id
                """,
                id=delivery_id,
                now=now,
            )


_LOAD_CLAIMED = """
    SELECT d.id, d.event_id, e.type AS event_type, d.endpoint_id, COALESCE(p.url, d.callback_url) AS url,
        COALESCE(p.secret, t.signing_secret) AS secret, p.previous_secret, p.previous_secret_expires_at,
        p.headers, e.body, d.attempts, d.run_attempts, d.next_trigger, d.lease, d.due_at AS lease_until
    FROM deliveries d
    JOIN events e ON e.id = d.event_id
    JOIN tenants t ON t.id = d.tenant
    LEFT JOIN endpoints p ON p.id = d.endpoint_id
    WHERE d.due_at = :lease_until AND d.lease = :lease
    ORDER BY d.id
"""
_SELECT = """
    SELECT d.id, d.event_id, e.type AS event_type, e.generation_id, d.endpoint_id,
        COALESCE(p.url, d.callback_url) AS url, d.status, d.attempts, d.due_at, d.created_at, d.updated_at
    FROM deliveries d
    JOIN events e ON e.id = d.event_id
    LEFT JOIN endpoints p ON p.id = d.endpoint_id
"""
_LOG = """
    INSERT INTO attempts (
        delivery_id, number, id, started_at, duration_ms, reason, response_status, response_body,
        error_code, error_message
    )
    SELECT :delivery_id, :number, :attempt_id, :started_at, :duration_ms, :reason, :response_status,
        :response_body, :error_code, :error_message
    FROM deliveries WHERE id = :delivery_id AND lease = :lease
    ON CONFLICT DO NOTHING
"""
_SETTLE = """
    UPDATE deliveries
    SET due_at = CASE WHEN status = 'sending' THEN :due_at ELSE NULL END,
        status = CASE WHEN status = 'sending' THEN :status ELSE status END,
        attempts = :number, run_attempts = run_attempts + 1, next_trigger = 'scheduled', lease = NULL,
        updated_at = :now
    WHERE id = :delivery_id AND lease = :lease
"""


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


def _claimed(row: Row, now: int) -> Claimed:
    previous = row["previous_secret"] if (row["previous_secret_expires_at"] or 0) > now else None
    return Claimed(
        id=row["id"],
        event_id=row["event_id"],
        event_type=row["event_type"],
        endpoint_id=row["endpoint_id"],
        url=row["url"],
        secrets=(row["secret"], previous) if previous else (row["secret"],),
        headers=json.loads(row["headers"] or "{}"),
        body=bytes(row["body"]),
        attempts=row["attempts"],
        run_attempts=row["run_attempts"],
        trigger=Trigger(row["next_trigger"]),
        lease=row["lease"],
        lease_until=row["lease_until"],
    )


def _read(row: Row) -> Delivery:
    values = dict(row)
    return Delivery(**{**values, "status": Status(values["status"])})


def _read_attempt(row: Row) -> Attempt:
    values = dict(row)
    del values["delivery_id"]
    return Attempt(trigger=Trigger(values.pop("reason")), **values)
