"""API keys at rest: their hashes, never the keys."""

from collections.abc import Mapping, Sequence
from typing import Any

from relay.errors import Conflict
from relay.key import Key, Scope
from relay.store.audit import Entry, note
from relay.store.database import Database, Row, Transaction, repeated
from relay.store.filters import where
from relay.store.idempotency import Idempotency, reserve

# Of one tenant, neither revoked nor expired.
MOST = 1000


class Keys:
    """Every statement about keys; each method is one transaction."""

    def __init__(self, database: Database) -> None:
        self._db = database

    @repeated
    async def create(
        self,
        key: Key,
        idempotency: Idempotency | None = None,
        *,
        asker: str | None = None,
        entry: Entry | None = None,
    ) -> Key | None:
        """The new key, or the one that the idempotency key of the tenant `asker` created before; None when
        that one is gone. Raises Conflict when the tenant has MOST keys."""
        async with self._db.write() as tx:
            before = await reserve(
                tx, asker or key.tenant, idempotency, resource_id=key.id, status=201, now=key.created_at
            )
            if before is not None:
                return await _of(tx, key.tenant, before[0])
            # Who comes second waits here, and then counts the other one's key too.
            await tx.execute("UPDATE tenants SET id = id WHERE id = :id", id=key.tenant)
            [row] = await tx.fetch(_COUNT, tenant=key.tenant, now=key.created_at)
            if row["count"] >= MOST:
                raise Conflict(
                    f"the tenant {key.tenant} has {MOST} keys that are neither revoked nor expired, no more"
                    " are made: revoke one"
                )
            await _add(tx, key, entry)
        return key

    async def create_first(self, key: Key, *, entry: Entry | None = None) -> bool:
        """As `create`, but only when there is no key at all; whether it did. Of relays that start at once,
        one does."""
        async with self._db.write() as tx:
            # Who comes second waits here, and then sees the other one's key.
            await tx.execute("UPDATE tenants SET id = id WHERE id = :id", id=key.tenant)
            if await tx.fetch("SELECT id FROM keys LIMIT 1"):
                return False
            await _add(tx, key, entry)
            return True

    async def any(self) -> bool:
        """Whether there are keys at all, whoever's."""
        async with self._db.read() as tx:
            return bool(await tx.fetch("SELECT id FROM keys LIMIT 1"))

    async def find(self, key_id: str) -> Key | None:
        """The key with this id, whoever's it is: to see who is asking."""
        async with self._db.read() as tx:
            rows = await tx.fetch("SELECT * FROM keys WHERE id = :id", id=key_id)
        return _read(rows[0]) if rows else None

    async def get(self, tenant: str, key_id: str) -> Key | None:
        async with self._db.read() as tx:
            return await _of(tx, tenant, key_id)

    async def page(self, tenant: str, *, limit: int, cursor: str | None) -> Sequence[Key]:
        """Newest first, those after the id `cursor`."""
        conditions, order, values = where(tenant, {}, prefix="key", cursor=cursor)
        async with self._db.read(browse=True) as tx:
            rows = await tx.fetch(
                f"SELECT * FROM keys WHERE {conditions} ORDER BY {order} LIMIT :limit",
                limit=limit,
                **values,
            )
        return [_read(row) for row in rows]

    async def all(self, tenant: str | None) -> Sequence[Key]:
        """Newest first; those of every tenant when none is named: for who has the database."""
        condition, values = ("WHERE tenant = :tenant", {"tenant": tenant}) if tenant else ("", {})
        async with self._db.read(browse=True) as tx:
            rows = await tx.fetch(f"SELECT * FROM keys {condition} ORDER BY id DESC", **values)
        return [_read(row) for row in rows]

    async def revoke(self, tenant: str, key_id: str, *, now: int, entry: Entry | None = None) -> bool:
        """Ends a key, for the next request on any relay; whether there is one. Ending it twice is no news."""
        async with self._db.write() as tx:
            revoked = await tx.execute(
                """
                UPDATE keys SET revoked_at = :now WHERE id = :id AND tenant = :tenant AND revoked_at IS NULL
                """,
                id=key_id,
                tenant=tenant,
                now=now,
            )
            if revoked:
                await note(tx, entry)
            return bool(revoked) or await _of(tx, tenant, key_id) is not None

    @repeated
    async def used(self, times: Mapping[str, int]) -> None:
        """When keys were used last, by their ids."""
        async with self._db.write() as tx:
            await tx.execute_many(
                """
                UPDATE keys SET last_used_at = :at
                WHERE id = :id AND (last_used_at IS NULL OR last_used_at < :at)
                """,
                [{"id": key_id, "at": at} for key_id, at in sorted(times.items())],
            )


_COUNT = """
    SELECT
        (SELECT COUNT(*) FROM keys WHERE tenant = :tenant AND revoked_at IS NULL AND expires_at IS NULL)
        + (SELECT COUNT(*) FROM keys WHERE tenant = :tenant AND revoked_at IS NULL AND expires_at > :now)
        AS count
"""


async def _add(tx: Transaction, key: Key, entry: Entry | None) -> None:
    await tx.execute(
        """
        INSERT INTO keys (
            id, tenant, name, scopes, hash, rate_limit, created_at, expires_at, revoked_at, last_used_at
        ) VALUES (
            :id, :tenant, :name, :scopes, :hash, :rate_limit, :created_at, :expires_at, :revoked_at,
            :last_used_at
        )
        """,
        **_values(key),
    )
    await note(tx, entry)


async def _of(tx: Transaction, tenant: str, key_id: str) -> Key | None:
    rows = await tx.fetch("SELECT * FROM keys WHERE id = :id AND tenant = :tenant", id=key_id, tenant=tenant)
    return _read(rows[0]) if rows else None


def _values(key: Key) -> dict[str, Any]:
    return {
        "id": key.id,
        "tenant": key.tenant,
        "name": key.name,
        "scopes": " ".join(key.scopes),
        "hash": key.hash,
        "rate_limit": key.rate_limit,
        "created_at": key.created_at,
        "expires_at": key.expires_at,
        "revoked_at": key.revoked_at,
        "last_used_at": key.last_used_at,
    }


def _read(row: Row) -> Key:
    return Key(**{**row, "scopes": tuple(Scope(name) for name in row["scopes"].split())})
