"""The audit log at rest: who did what to what, and from where.

Written once, never changed; only retention removes what is old.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from relay.ids import new_id
from relay.store.database import Database, Row, Transaction
from relay.store.filters import where

_FILTERS = ("object", "actor", "action")
_COLUMNS = {name: name for name in _FILTERS}


@dataclass(frozen=True, slots=True)
class Entry:
    """`action` is named like an event (`endpoint.created`), `object` is the id of what it was done to.

    `actor` is a key's id, `admin_key`, `cli` or `relay`; `fields` are the names of what was changed, never
    the values.
    """

    tenant: str
    at: int
    actor: str
    action: str
    object: str
    address: str | None = None
    fields: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Noted:
    """An entry as it stands in the log."""

    id: str
    entry: Entry


async def note(tx: Transaction, entry: Entry | None) -> None:
    """Writes an entry in the transaction of what it tells of: both are there, or neither. None is none."""
    if entry is None:
        return
    await tx.execute(
        """
        INSERT INTO audit (id, tenant, at, actor, action, object, address, details)
        VALUES (:id, :tenant, :at, :actor, :action, :object, :address, :details)
        """,
        id=new_id("aud", entry.at),
        tenant=entry.tenant,
        at=entry.at,
        actor=entry.actor,
        action=entry.action,
        object=entry.object,
        address=entry.address,
        details=json.dumps({"fields": sorted(entry.fields)}),
    )


class Audit:
    """Every statement about the audit log, but for retention; each method is one transaction."""

    def __init__(self, database: Database) -> None:
        self._db = database

    async def add(self, entry: Entry) -> None:
        """For what changes nothing else: durable before it is answered."""
        async with self._db.write() as tx:
            await note(tx, entry)

    async def page(
        self, tenant: str, filters: Mapping[str, Any], *, limit: int, cursor: str | None
    ) -> Sequence[Noted]:
        """Newest first, those after the id `cursor`; filters: actor, action, object, since, until."""
        conditions, order, values = where(
            tenant, filters, prefix="aud", columns=_COLUMNS, leading=_FILTERS, cursor=cursor
        )
        async with self._db.read(browse=True) as tx:
            rows = await tx.fetch(
                f"SELECT * FROM audit WHERE {conditions} ORDER BY {order} LIMIT :limit",
                limit=limit,
                **values,
            )
        return [_read(row) for row in rows]


def _read(row: Row) -> Noted:
    names = ("tenant", "at", "actor", "action", "object", "address")
    fields = tuple(json.loads(row["details"])["fields"])
    return Noted(row["id"], Entry(**{name: row[name] for name in names}, fields=fields))
