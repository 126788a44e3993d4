"""Endpoints at rest."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, replace
from functools import lru_cache
from typing import Any

from relay.endpoint import Endpoint, Secret, rotated, with_ed25519
from relay.errors import Conflict
from relay.keyring import KeyRing
from relay.store.audit import Entry, note
from relay.store.database import Database, Row, Transaction, repeated
from relay.store.filters import where
from relay.store.idempotency import Idempotency, reserve
from relay.store.sealed import opened, opened_secrets, sealed_secrets

# Of a tenant: each is asked about every event, in the transaction that stores it.
MOST, MOST_FILTERS = 1_000, 20
_CHANGEABLE = ("url", "description", "event_types", "accounts", "filter", "headers", "rate_limit", "metadata")
_JSON = ("event_types", "accounts", "metadata")


class Endpoints:
    """Every statement about endpoints; each method is one transaction."""

    def __init__(self, database: Database, keyring: KeyRing) -> None:
        self._db, self._keyring = database, keyring

    @repeated
    async def create(
        self, endpoint: Endpoint, idempotency: Idempotency | None, *, entry: Entry | None = None
    ) -> Endpoint | None:
        """The new endpoint, or the one that the key created before; None when that one is gone. Raises
        Conflict when there are MOST, or when it has a filter and MOST_FILTERS others have."""
        async with self._db.write() as tx:
            before = await reserve(
                tx, endpoint.tenant, idempotency, resource_id=endpoint.id, status=201, now=endpoint.created_at
            )
            if before is not None:
                return await self._get(tx, endpoint.tenant, before[0])
            await _check_room(tx, endpoint.tenant)
            if endpoint.filter is not None:
                await _check_filters(tx, endpoint.tenant, endpoint.id)
            await tx.execute(
                """
                INSERT INTO endpoints (
                    id, tenant, url, description, event_types, accounts, filter, headers, metadata,
                    rate_limit, secrets, disabled_at, disabled_reason, deleted_at, created_at, updated_at
                ) VALUES (
                    :id, :tenant, :url, :description, :event_types, :accounts, :filter, :headers, :metadata,
                    :rate_limit, :secrets, :disabled_at, :disabled_reason, :deleted_at, :created_at,
                    :updated_at
                )
                """,
                **self._values(endpoint),
            )
            await note(tx, entry)
        return endpoint

    async def get(self, tenant: str, endpoint_id: str) -> Endpoint | None:
        async with self._db.read() as tx:
            return await self._get(tx, tenant, endpoint_id)

    async def filtering(self, tenants: Sequence[str]) -> Sequence[Endpoint]:
        """Those of the tenants with a filter that take something."""
        async with self._db.read() as tx:
            rows = await tx.fetch(
                """
                SELECT * FROM endpoints
                WHERE tenant IN (:tenants) AND deleted_at IS NULL AND disabled_at IS NULL
                    AND filter IS NOT NULL
                """,
                tenants=tenants,
            )
        return [read_endpoint(self._keyring, row) for row in rows]

    async def page(self, tenant: str, *, limit: int, cursor: str | None) -> Sequence[Endpoint]:
        """Newest first, those after the id `cursor`."""
        conditions, order, values = where(tenant, {}, prefix="ep", cursor=cursor)
        async with self._db.read(browse=True) as tx:
            rows = await tx.fetch(
                f"""
                SELECT * FROM endpoints WHERE deleted_at IS NULL AND {conditions}
                ORDER BY {order} LIMIT :limit
                """,
                limit=limit,
                **values,
            )
        return [read_endpoint(self._keyring, row) for row in rows]

    async def change(
        self,
        tenant: str,
        endpoint_id: str,
        made: Callable[[Endpoint], Mapping[str, Any]],
        *,
        now: int,
        entry: Entry | None = None,
    ) -> Endpoint | None:
        """Writes the fields that are `made` of the endpoint as it is, and no other; the endpoint then, None
        without one. The fields are named in the entry; there is none without any.

        `ed25519` gives it a key of that kind, or takes it away. Raises what `made` raises, and Conflict for a
        filter when MOST_FILTERS others have one.
        """
        async with self._db.write() as tx:
            before = await self._locked(tx, tenant, endpoint_id, now=now)
            if before is None:
                return None
            changes = made(before)
            values = {
                name: json.dumps(value) if name in _JSON else value
                for name, value in changes.items()
                if name in _CHANGEABLE
            }
            if "headers" in changes:
                values["headers"] = self._sealed_headers(tenant, endpoint_id, changes["headers"])
            if values.get("filter") is not None:
                await _check_filters(tx, tenant, endpoint_id)
            if values:
                columns = ", ".join(f"{name} = :{name}" for name in values)
                await tx.execute(
                    f"UPDATE endpoints SET {columns} WHERE id = :id",
                    id=endpoint_id,
                    **values,
                )
            if entry is not None and changes:
                await note(tx, replace(entry, fields=list(changes)))
            found = await self._get(tx, tenant, endpoint_id)
            if found is not None and found.secrets and "ed25519" in changes:
                secrets = with_ed25519(found.secrets, changes["ed25519"])
                found = await self._put_secrets(tx, found, secrets)
            return found

    async def rotate(
        self,
        tenant: str,
        endpoint_id: str,
        secret: str,
        *,
        expires_at: int,
        now: int,
        entry: Entry | None = None,
    ) -> Endpoint | None:
        """The endpoint with a new secret, None without one; no old secret is valid for longer than until
        `expires_at`."""
        async with self._db.write() as tx:
            found = await self._locked(tx, tenant, endpoint_id, now=now)
            if found is None:
                return None
            await note(tx, entry)
            secrets = rotated(found.secrets, secret, now=now, expires_at=expires_at)
            return await self._put_secrets(tx, found, secrets)

    async def enable(self, tenant: str, endpoint_id: str, *, now: int, entry: Entry | None = None) -> None:
        async with self._db.write() as tx:
            enabled = await tx.execute(
                """
                UPDATE endpoints
                SET disabled_at = NULL, disabled_reason = NULL, failing_since = NULL, failing_event = NULL,
                    updated_at = :now
                WHERE id = :id AND tenant = :tenant AND deleted_at IS NULL
                    AND (disabled_at IS NOT NULL OR failing_since IS NOT NULL)
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
            if await self._get(tx, tenant, endpoint_id) is not None:
                disabled = await disable(tx, [endpoint_id], reason=reason, now=now)
                await cancel_open(tx, [endpoint_id], now=now)
                await note(tx, entry if disabled else None)

    @repeated
    async def delete(self, tenant: str, endpoint_id: str, *, now: int, entry: Entry | None = None) -> None:
        """Its history stays readable; its secrets are gone."""
        async with self._db.write() as tx:
            deleted = await tx.execute(
                """
                UPDATE endpoints
                SET deleted_at = :now, secrets = '', headers = '',
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

    async def _get(self, tx: Transaction, tenant: str, endpoint_id: str) -> Endpoint | None:
        rows = await tx.fetch(
            "SELECT * FROM endpoints WHERE id = :id AND tenant = :tenant AND deleted_at IS NULL",
            id=endpoint_id,
            tenant=tenant,
        )
        return read_endpoint(self._keyring, rows[0]) if rows else None

    async def _locked(self, tx: Transaction, tenant: str, endpoint_id: str, *, now: int) -> Endpoint | None:
        """The endpoint, which nobody else changes until this transaction has ended: who comes second waits
        here, and then has what the other one has made of it."""
        await tx.execute(
            """
            UPDATE endpoints SET updated_at = :now
            WHERE id = :id AND tenant = :tenant AND deleted_at IS NULL
            """,
            id=endpoint_id,
            tenant=tenant,
            now=now,
        )
        return await self._get(tx, tenant, endpoint_id)

    async def _put_secrets(self, tx: Transaction, endpoint: Endpoint, secrets: Sequence[Secret]) -> Endpoint:
        """Of an endpoint that was read after this transaction had written to it: nobody else has it now."""
        await tx.execute(
            "UPDATE endpoints SET secrets = :secrets WHERE id = :id",
            id=endpoint.id,
            secrets=self._sealed_secrets(endpoint.tenant, endpoint.id, secrets),
        )
        return replace(endpoint, secrets=secrets)

    def _values(self, endpoint: Endpoint) -> dict[str, Any]:
        values = {one.name: getattr(endpoint, one.name) for one in fields(endpoint)}
        return {
            **values,
            **{name: json.dumps(values[name]) for name in _JSON},
            "headers": self._sealed_headers(endpoint.tenant, endpoint.id, endpoint.headers),
            "secrets": self._sealed_secrets(endpoint.tenant, endpoint.id, endpoint.secrets),
        }

    def _sealed_headers(self, tenant: str, endpoint_id: str, headers: Mapping[str, str]) -> str:
        place = ("endpoints", "headers", endpoint_id, tenant)
        return self._keyring.seal(json.dumps(dict(headers)), *place) if headers else ""

    def _sealed_secrets(self, tenant: str, endpoint_id: str, secrets: Sequence[Secret]) -> str:
        return sealed_secrets(self._keyring, secrets, "endpoints", "secrets", endpoint_id, tenant)


async def _check_room(tx: Transaction, tenant: str) -> None:
    [row] = await tx.fetch(
        "SELECT COUNT(*) AS count FROM endpoints WHERE tenant = :tenant AND deleted_at IS NULL", tenant=tenant
    )
    if row["count"] >= MOST:
        raise Conflict(f"there are {MOST} endpoints already, more are not taken: delete one")


async def _check_filters(tx: Transaction, tenant: str, endpoint_id: str) -> None:
    [row] = await tx.fetch(
        """
        SELECT COUNT(*) AS count FROM endpoints
        WHERE tenant = :tenant AND deleted_at IS NULL AND filter IS NOT NULL AND id <> :id
        """,
        tenant=tenant,
        id=endpoint_id,
    )
    if row["count"] >= MOST_FILTERS:
        raise Conflict(
            f"{MOST_FILTERS} endpoints have a filter, and no more can: remove one, or choose by event_types"
            " and accounts"
        )


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


def read_endpoint(keyring: KeyRing, row: Row) -> Endpoint:
    return _read(keyring, tuple(row.keys()), tuple(row.values() if isinstance(row, dict) else row))


def read_secrets(keyring: KeyRing, tenant: str, endpoint_id: str, sealed: str) -> Sequence[Secret]:
    """Newest first; none when they cannot be opened."""
    return opened_secrets(keyring, sealed, "endpoints", "secrets", endpoint_id, tenant) if sealed else ()


def read_headers(keyring: KeyRing, tenant: str, endpoint_id: str, sealed: str) -> Mapping[str, str]:
    """None of them when they cannot be opened."""
    text = opened(keyring, sealed, "endpoints", "headers", endpoint_id, tenant) if sealed else None
    return dict(json.loads(text)) if text else {}


@lru_cache(maxsize=10_000)
def _read(keyring: KeyRing, names: tuple[str, ...], row: tuple[Any, ...]) -> Endpoint:
    """The same row is the same endpoint: every fan-out reads them all."""
    values = dict(zip(names, row, strict=True))
    place = (keyring, values["tenant"], values["id"])
    return Endpoint(
        **{
            **values,
            **{name: json.loads(values[name]) for name in _JSON},
            "secrets": read_secrets(*place, values["secrets"]),
            "headers": read_headers(*place, values["headers"]),
        }
    )
