"""Endpoints at rest."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import lru_cache
from typing import Any

from relay.endpoint import Endpoint
from relay.store.audit import Entry, note
from relay.store.database import Database, Row, Transaction, repeated
from relay.store.filters import where
from relay.store.idempotency import Idempotency, reserve

_CHANGEABLE = ("url", "description", "event_types", "accounts", "headers", "rate_limit", "metadata")
_JSON = ("event_types", "accounts", "headers", "metadata")


class Endpoints:
    """Every statement about endpoints; each method is one transaction."""

    def __init__(self, database: Database) -> None:
        self._db = database

    @repeated
    async def create(
        self, endpoint: Endpoint, idempotency: Idempotency | None, *, entry: Entry | None = None
    ) -> Endpoint | None:
        """The new endpoint, or the one that the key created before; None when that one is gone."""
        async with self._db.write() as tx:
            before = await reserve(
                tx, endpoint.tenant, idempotency, resource_id=endpoint.id, status=201, now=endpoint.created_at
            )
            if before is not None:
                return await _get(tx, endpoint.tenant, before[0])
            await tx.execute(
                """
                INSERT INTO endpoints (
                    id, tenant, url, description, event_types, accounts, headers, metadata, rate_limit,
                    secret, previous_secret, previous_secret_expires_at, disabled_at, disabled_reason,
                    deleted_at, created_at, updated_at
                ) VALUES (
                    :id, :tenant, :url, :description, :event_types, :accounts, :headers, :metadata,
                    :rate_limit, :secret, :previous_secret, :previous_secret_expires_at, :disabled_at,
                    :disabled_reason, :deleted_at, :created_at, :updated_at
                )
                """,
                **_values(endpoint),
            )
            await note(tx, entry)
        return endpoint

    async def get(self, tenant: str, endpoint_id: str) -> Endpoint | None:
        async with self._db.read() as tx:
            return await _get(tx, tenant, endpoint_id)

    async def page(self, tenant: str, *, limit: int, cursor: str | None) -> Sequence[Endpoint]:
        """Newest first, those after the id `cursor`."""
        conditions, order, values = where({}, prefix="ep", columns={}, cursor=cursor)
        async with self._db.read(browse=True) as tx:
            rows = await tx.fetch(
                f"""
                SELECT * FROM endpoints WHERE tenant = :tenant AND deleted_at IS NULL {conditions}
                ORDER BY {order} LIMIT :limit
                """,
                tenant=tenant,
                limit=limit,
                **values,
            )
        return [read_endpoint(row) for row in rows]

    async def change(
        self,
        tenant: str,
        endpoint_id: str,
        changes: Mapping[str, Any],
        *,
        now: int,
        entry: Entry | None = None,
    ) -> Endpoint | None:
        """Writes the fields that `changes` names, and no other; the endpoint then, None without one."""
        values = {
            name: json.dumps(value) if name in _JSON else value
            for name, value in changes.items()
            if name in _CHANGEABLE
        }
        async with self._db.write() as tx:
            changed = await tx.execute(
                f"""
                UPDATE endpoints SET {"".join(f"{name} = :{name}, " for name in values)} updated_at = :now
                WHERE id = :id AND tenant = :tenant AND deleted_at IS NULL
                """,
                id=endpoint_id,
                tenant=tenant,
                now=now,
                **values,
            )
            await note(tx, entry if changed else None)
            return await _get(tx, tenant, endpoint_id)

    async def rotate(
        self,
        tenant: str,
        endpoint_id: str,
        secret: str,
        *,
        expires_at: int,
        now: int,
        entry: Entry | None = None,
    ) -> None:
        """Gives an endpoint a new secret; the old one is valid until `expires_at`."""
        async with self._db.write() as tx:
            rotated = await tx.execute(
                """
                UPDATE endpoints
                SET previous_secret = secret, previous_secret_expires_at = :expires_at, secret = :secret,
                    updated_at = :now
                WHERE id = :id AND tenant = :tenant AND deleted_at IS NULL
                """,
                id=endpoint_id,
                tenant=tenant,
                secret=secret,
                expires_at=expires_at,
                now=now,
            )
            await note(tx, entry if rotated else None)

    async def enable(self, tenant: str, endpoint_id: str, *, now: int, entry: Entry | None = None) -> None:
        async with self._db.write() as tx:
            enabled = await tx.execute(
                """
                UPDATE endpoints
                SET disabled_at = NULL, disabled_reason = NULL, failing_since = NULL, failing_event = NULL,
                    updated_at = :now
                WHERE id = :id AND tenant = :tenant AND deleted_at IS NULL
                """,
                id=endpoint_id,
                tenant=tenant,
                now=now,
            )
            await note(tx, entry if enabled else None)

    @repeated
    async def disable(
        self, tenant: str, endpoint_id: str, *, reason: str, now: int, entry: Entry | None = None
    ) -> None:
        """Its open deliveries become canceled, and may be replayed once it is enabled again."""
        async with self._db.write() as tx:
            if await _get(tx, tenant, endpoint_id) is not None:
                await disable(tx, [endpoint_id], reason=reason, now=now)
                await cancel_open(tx, [endpoint_id], now=now)
                await note(tx, entry)

    @repeated
    async def delete(self, tenant: str, endpoint_id: str, *, now: int, entry: Entry | None = None) -> None:
        """Its history stays readable; its secrets are gone."""
        async with self._db.write() as tx:
            deleted = await tx.execute(
                """
                UPDATE endpoints
                SET deleted_at = :now, secret = '', headers = '{}',
                    previous_secret = NULL, previous_secret_expires_at = NULL,
                    disabled_at = COALESCE(disabled_at, :now),
                    disabled_reason = COALESCE(disabled_reason, 'deleted'), updated_at = :now
                WHERE id = :id AND tenant = :tenant AND deleted_at IS NULL
                """,
                id=endpoint_id,
                tenant=tenant,
                now=now,
            )
            if deleted:
                await cancel_open(tx, [endpoint_id], now=now)
                await note(tx, entry)


async def disable(tx: Transaction, endpoint_ids: Iterable[str], *, reason: str, now: int) -> Sequence[str]:
    """Disables endpoints; those that were not before. What is on its way to them is for `cancel_open`."""
    return [
        endpoint_id
        for endpoint_id in sorted(endpoint_ids)
        if await tx.execute(_DISABLE, id=endpoint_id, reason=reason, now=now)
    ]


async def cancel_open(tx: Transaction, endpoint_ids: Iterable[str], *, now: int) -> None:
    """Cancels what is on its way to endpoints; what another transaction is just adding, its claim cancels.

    A canceled delivery keeps its lease, so that an attempt in flight can still log its outcome.
    """
    await tx.execute_many(
        """
        UPDATE deliveries SET status = 'canceled', due_at = NULL, updated_at = :now
        WHERE destination = :id AND due_at IS NOT NULL
        """,
        [{"id": endpoint_id, "now": now} for endpoint_id in sorted(endpoint_ids)],
    )


_DISABLE = """
    UPDATE endpoints SET disabled_at = :now, disabled_reason = :reason, updated_at = :now
    WHERE id = :id AND disabled_at IS NULL
"""


async def _get(tx: Transaction, tenant: str, endpoint_id: str) -> Endpoint | None:
    rows = await tx.fetch(
        "SELECT * FROM endpoints WHERE id = :id AND tenant = :tenant AND deleted_at IS NULL",
        id=endpoint_id,
        tenant=tenant,
    )
    return read_endpoint(rows[0]) if rows else None


def read_endpoint(row: Row) -> Endpoint:
    return _read(tuple(row.keys()), tuple(row.values() if isinstance(row, dict) else row))


@lru_cache(maxsize=10_000)
def _read(names: tuple[str, ...], row: tuple[Any, ...]) -> Endpoint:
    """The same row is the same endpoint: every fan-out reads them all."""
    values = dict(zip(names, row, strict=True))
    return Endpoint(**{**values, **{name: json.loads(values[name]) for name in _JSON}})


def _values(endpoint: Endpoint) -> dict[str, Any]:
    values = asdict(replace(endpoint, headers=dict(endpoint.headers), metadata=dict(endpoint.metadata)))
    return {**values, **{name: json.dumps(values[name]) for name in _JSON}}
