"""The SQLite driver: one connection that writes and checkpoints, one that only reads."""

import asyncio
import fcntl
import sqlite3
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Self

import aiosqlite

from relay.errors import ConfigError, DatabaseInUse, StoreError
from relay.store.database import Row, Transaction, expand

# WAL with FULL: one fsync for each commit, and group commit makes those few.
_SETTINGS = ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON", "temp_store = MEMORY")
_BUSY_SECONDS = 5


class SQLite:
    """An open database file, locked against a second relay."""

    skip_locked = ""  # there is only ever one writer

    def __init__(
        self, writer: aiosqlite.Connection, reader: aiosqlite.Connection, lock: IO[str] | None
    ) -> None:
        self._writer, self._reader, self._lock = writer, reader, lock
        self._writing, self._reading = asyncio.Lock(), asyncio.Lock()

    @classmethod
    async def open(cls, path: Path) -> Self:
        """Creates the file when it is not there. Raises ConfigError when it cannot be had."""
        lock = _lock(path)
        try:
            writer = await _connect(path)
            for setting in ("auto_vacuum = INCREMENTAL", *_SETTINGS):
                await writer.execute(f"PRAGMA {setting}")
            reader = await _connect(path)
            for setting in ("query_only = ON", "wal_autocheckpoint = 0", "foreign_keys = ON"):
                await reader.execute(f"PRAGMA {setting}")
        except (sqlite3.Error, OSError) as error:
            lock.close()
            raise ConfigError(f"database: {path} cannot be opened: {error}") from error
        return cls(writer, reader, lock)

    async def close(self) -> None:
        # The last one to close checkpoints: that must be the writer.
        await self._reader.close()
        await self._writer.close()
        if self._lock is not None:
            self._lock.close()

    async def probe(self) -> None:
        async with self.write() as tx:
            await tx.execute("UPDATE tenants SET id = id WHERE id = ''")

    @asynccontextmanager
    async def write(self) -> AsyncIterator[Transaction]:
        async with self._writing, _transaction(self._writer) as transaction:
            yield transaction

    @asynccontextmanager
    async def read(self) -> AsyncIterator[Transaction]:
        async with self._reading:
            with _as_store_error((sqlite3.Error,)):
                yield _SQLiteTransaction(self._reader)


class _SQLiteTransaction:
    def __init__(self, connection: aiosqlite.Connection) -> None:
        self._connection = connection

    async def execute(self, sql: str, **values: Any) -> int:
        sql, values = expand(sql, values)
        async with self._connection.execute(sql, values) as cursor:
            return cursor.rowcount

    async def execute_many(self, sql: str, rows: Sequence[Row]) -> None:
        if rows:
            await self._connection.executemany(sql, rows)

    async def fetch(self, sql: str, **values: Any) -> list[Row]:
        sql, values = expand(sql, values)
        return list(await self._connection.execute_fetchall(sql, values))  # type: ignore[arg-type] # sqlite3.Row is a mapping in all but its stub


@asynccontextmanager
async def _transaction(connection: aiosqlite.Connection) -> AsyncIterator[_SQLiteTransaction]:
    try:
        with _as_store_error():
            await connection.execute("BEGIN IMMEDIATE")
        with _as_store_error((sqlite3.Error,)):
            yield _SQLiteTransaction(connection)
        with _as_store_error():
            await connection.commit()
    except BaseException:
        # Also when BEGIN itself was canceled: it goes on in its thread, and this comes after it there.
        with suppress(sqlite3.Error, ValueError):
            await asyncio.shield(connection.rollback())
        raise


@contextmanager
def _as_store_error(
    kinds: tuple[type[Exception], ...] = (sqlite3.Error, ValueError),
) -> Iterator[None]:
    """A closed connection raises ValueError; inside a transaction that may be anybody's."""
    try:
        yield
    except kinds as error:
        raise StoreError(f"the database did not take it: {error}") from error


async def _connect(path: Path) -> aiosqlite.Connection:
    connection = await aiosqlite.connect(path, isolation_level=None, timeout=_BUSY_SECONDS)
    connection.row_factory = sqlite3.Row
    return connection


def _lock(path: Path) -> IO[str]:
    # By whatever name it is opened: one file, one lock.
    path = path.resolve()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.with_name(path.name + ".lock").open("w")
    except OSError as error:
        raise ConfigError(f"database: {path} cannot be opened: {error.strerror}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.close()
        raise DatabaseInUse(
            f"database: another relay is running on {path}; one SQLite file serves one process"
            " (several relays need one PostgreSQL)"
        ) from error
    return lock
