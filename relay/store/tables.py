"""Whole tables: what takes a relay's state from one database to another."""

import json
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from relay.errors import ConfigError, CopyFailed, DatabaseInUse
from relay.ids import new_id
from relay.store.database import Database
from relay.store.shards import Shards

# Each with its key, in the order that references need.
COPIED: Mapping[str, Sequence[str]] = MappingProxyType(
    {
        "tenants": ("id",),
        "keys": ("id",),
        "audit": ("id",),
        "endpoints": ("id",),
        "event_types": ("tenant", "type"),
        "generations": ("id",),
        "credentials": ("name",),
        "accounts": ("name",),
        "events": ("id",),
        "deliveries": ("id",),
        "attempts": ("id",),
        "replays": ("id",),
        "idempotency_keys": ("tenant", "key"),
    }
)
# What is about one database and stays there.
NOT_COPIED = ("migrations", "copies", "shards", "relays")
PAGE = 1000
# A row of these may hold a mebibyte.
_PAGES = {"generations": 100, "events": 100}


@dataclass(frozen=True, slots=True)
class Copy:
    """A copy under way: everything up to the row of `table` with this `key` has been taken over."""

    id: str
    table: str
    key: Sequence[str]


class Tables:
    """Every statement about whole tables; each method is one transaction."""

    def __init__(self, database: Database) -> None:
        self._db = database

    async def count(self) -> Mapping[str, int]:
        """How many rows there are in each table that is copied."""
        async with self._db.read(browse=True) as tx:
            found = {table: await tx.fetch(f"SELECT COUNT(*) AS count FROM {table}") for table in COPIED}
        return {table: rows[0]["count"] for table, rows in found.items()}

    async def pages(self, table: str, after: Sequence[str] = ()) -> AsyncIterator[Sequence[dict[str, Any]]]:
        """The rows in the order of their keys, those after a key; a transaction for each page."""
        limit = _PAGES.get(table, PAGE)
        while True:
            page = await self._page(table, after, limit)
            if page:
                yield page
            if len(page) < limit:
                return
            after = key(table, page[-1])

    async def begin(self, source: str, *, now: int) -> Copy:
        """A copy from `source` into this database, or the one that did not end. Raises ConfigError when the
        database holds anything else."""
        async with self._db.write(exclusive=True) as tx:
            for row in await tx.fetch("SELECT id, source, position, ended_at FROM copies"):
                if row["ended_at"] is not None:
                    raise ConfigError(f"database: a copy from {row['source']} into it has ended already")
                if row["source"] != source:
                    raise ConfigError(f"database: it holds an unfinished copy from {row['source']}")
                return Copy(row["id"], *_read(row["position"]))
            for table in COPIED:
                if await tx.fetch(f"SELECT 1 FROM {table} LIMIT 1"):
                    raise ConfigError(f"database: it is not empty: there are {table} in it")
            copy = Copy(new_id("cpy", now), next(iter(COPIED)), ())
            await tx.execute(
                """
                INSERT INTO copies (id, source, position, began_at) VALUES (:id, :source, :position, :now)
                """,
                id=copy.id,
                source=source,
                position=_write(copy),
                now=now,
            )
        return copy

    async def put(self, copy: Copy, table: str, rows: Sequence[Mapping[str, Any]]) -> Copy:
        """Takes rows over, which come after all that were taken over before; the copy then.

        Raises CopyFailed when another program does the same.
        """
        moved = Copy(copy.id, table, key(table, rows[-1]))
        names, values = ", ".join(rows[0]), ", ".join(f":{name}" for name in rows[0])
        async with self._db.write() as tx:
            await tx.execute_many(
                f"INSERT INTO {table} ({names}) VALUES ({values}) ON CONFLICT DO NOTHING", rows
            )
            alone = await tx.execute(
                """
                UPDATE copies SET position = :moved
                WHERE id = :id AND position = :position AND ended_at IS NULL
                """,
                id=copy.id,
                position=_write(copy),
                moved=_write(moved),
            )
            if not alone:
                raise CopyFailed("another `relay copy` writes into the same database: let it end")
        return moved

    async def finish(self, copy: Copy, *, now: int) -> None:
        """Lets relays use the database; what was in flight comes due when they take it."""
        async with self._db.write() as tx:
            await tx.execute("UPDATE copies SET ended_at = :now WHERE id = :id", id=copy.id, now=now)

    async def _page(self, table: str, after: Sequence[str], limit: int) -> Sequence[dict[str, Any]]:
        names = COPIED[table]
        columns = ", ".join(names)
        condition = f"WHERE ({columns}) > ({', '.join(f':{name}' for name in names)})" if after else ""
        async with self._db.read(browse=True) as tx:
            rows = await tx.fetch(
                f"SELECT * FROM {table} {condition} ORDER BY {columns} LIMIT :limit",
                limit=limit,
                **dict(zip(names, after, strict=False)),
            )
        return [dict(row) for row in rows]


def key(table: str, row: Mapping[str, Any]) -> Sequence[str]:
    """What `pages` orders a table's rows by."""
    return [row[name] for name in COPIED[table]]


async def check_whole(database: Database) -> None:
    """Raises ConfigError when a copy into this database has not ended: it holds half of a relay's state."""
    async with database.read() as tx:
        for row in await tx.fetch("SELECT source FROM copies WHERE ended_at IS NULL"):
            raise ConfigError(
                f"database: the copy from {row['source']} into it did not end: run `relay copy` again,"
                " or use the old database"
            )


async def check_unused(database: Database, *, now: int) -> None:
    """Raises DatabaseInUse while a relay works on the database, or has done so a minute ago and did not stop
    as it should. Whoever opens a SQLite file is told that already."""
    if not database.alone and await Shards(database).live(since=now - 60_000):
        raise DatabaseInUse("database: a relay is running on it")


def _write(copy: Copy) -> str:
    return json.dumps([copy.table, *copy.key])


def _read(position: str) -> tuple[str, Sequence[str]]:
    table, *key = json.loads(position)
    return table, key
