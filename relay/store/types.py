"""Declared types of events at rest."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from relay.errors import Conflict
from relay.store.audit import Entry, note
from relay.store.database import Database, Row, repeated

MOST = 200


@dataclass(frozen=True, slots=True)
class DeclaredType:
    """A type that a tenant publishes; `schema` is JSON text, what its events' `data` must fit."""

    tenant: str
    type: str
    description: str | None
    schema: str | None
    created_at: int
    updated_at: int


class Types:
    """Every statement about declared types; each method is one transaction."""

    def __init__(self, database: Database) -> None:
        self._db = database

    @repeated
    async def put(self, declared: DeclaredType, *, entry: Entry | None = None) -> tuple[DeclaredType, bool]:
        """The type as it is now, and whether it is new. Raises Conflict when there are too many."""
        async with self._db.write() as tx:
            values: dict[str, Any] = {
                "tenant": declared.tenant,
                "type": declared.type,
                "description": declared.description,
                "schema": declared.schema,
                "now": declared.updated_at,
            }
            is_new = not await tx.execute(
                """
                UPDATE event_types SET description = :description, schema = :schema, updated_at = :now
                WHERE tenant = :tenant AND type = :type
                """,
                **values,
            )
            if is_new:
                [row] = await tx.fetch(
                    "SELECT COUNT(*) AS count FROM event_types WHERE tenant = :tenant", tenant=declared.tenant
                )
                if row["count"] >= MOST:
                    raise Conflict(f"there are {MOST} declared types, and no more can be: delete one")
                await tx.execute(
                    """
                    INSERT INTO event_types (tenant, type, description, schema, created_at, updated_at)
                    VALUES (:tenant, :type, :description, :schema, :now, :now)
                    """,
                    **values,
                )
            await note(tx, entry)
            [row] = await tx.fetch(_ONE, tenant=declared.tenant, type=declared.type)
        return _read(row), is_new

    async def get(self, tenant: str, type_: str) -> DeclaredType | None:
        async with self._db.read() as tx:
            rows = await tx.fetch(_ONE, tenant=tenant, type=type_)
        return _read(rows[0]) if rows else None

    async def delete(self, tenant: str, type_: str, *, entry: Entry | None = None) -> bool:
        """Whether there was one."""
        async with self._db.write() as tx:
            deleted = await tx.execute(
                "DELETE FROM event_types WHERE tenant = :tenant AND type = :type", tenant=tenant, type=type_
            )
            await note(tx, entry if deleted else None)
        return bool(deleted)

    async def page(self, tenant: str, *, limit: int, cursor: str | None) -> Sequence[DeclaredType]:
        """In the order of their names, those after `cursor`."""
        async with self._db.read(browse=True) as tx:
            rows = await tx.fetch(
                """
                SELECT * FROM event_types WHERE tenant = :tenant AND type > :cursor
                ORDER BY type LIMIT :limit
                """,
                tenant=tenant,
                cursor=cursor or "",
                limit=limit,
            )
        return [_read(row) for row in rows]

    async def schemas(self, tenant: str) -> Mapping[str, str]:
        """By their types, where they have one."""
        async with self._db.read() as tx:
            rows = await tx.fetch(
                "SELECT type, schema FROM event_types WHERE tenant = :tenant AND schema IS NOT NULL",
                tenant=tenant,
            )
        return {row["type"]: row["schema"] for row in rows}


_ONE = "SELECT * FROM event_types WHERE tenant = :tenant AND type = :type"


def _read(row: Row) -> DeclaredType:
    return DeclaredType(**dict(row))
