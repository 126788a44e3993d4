"""The SQLite driver: one connection that writes and checkpoints, two that only read."""

import asyncio
import fcntl
import os
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Self, TypeVar, cast

import aiosqlite

from relay.errors import ConfigError, DatabaseInUse, StoreError
from relay.store.database import Row, Transaction, expand
from relay.tenant import DEFAULT

T = TypeVar("T")
# What is written beside the file is cut to this once nobody reads in it any more.
WAL_BYTES = 16 * 1024 * 1024
# So many pages, or a tenth of all, stay in the file for what comes next.
SPARE_PAGES = 4096
# WAL with FULL: one fsync for each commit, and group commit makes those few.
_WRITES = (
    *("auto_vacuum = INCREMENTAL", "journal_mode = WAL", "synchronous = FULL"),
    *("foreign_keys = ON", "temp_store = MEMORY", f"journal_size_limit = {WAL_BYTES}"),
)
_READS = ("query_only = ON", "wal_autocheckpoint = 0")
_SPACE = ("page_count", "freelist_count", "page_size")
_BUSY_SECONDS = 5


class SQLite:
    """An open database file, locked against a second relay."""

    skip_locked = ""  # there is only ever one writer
    alone = True
    dialect = "sqlite"
    finds_table = "SELECT name FROM sqlite_master WHERE type = 'table' AND name = :name"

    def __init__(self, path: Path, connections: Sequence[aiosqlite.Connection], lock: IO[str] | None) -> None:
        self.name, file = str(path), path.resolve()
        # SQLite puts it beside the file itself, whatever link it was opened by.
        self._directory, self._wal = file.parent, file.with_name(f"{file.name}-wal")
        self._writer, self._reader, self._browser = connections
        self._connections, self._lock = connections, lock
        self._locks = {connection: asyncio.Lock() for connection in connections}

    @classmethod
    async def open(cls, path: Path, *, alone: bool = True) -> Self:
        """Creates the file when it is not there. Raises ConfigError when it cannot be had, and DatabaseInUse
        when it is to be ours alone and is not."""
        lock = _lock(path) if alone else None
        connections: list[aiosqlite.Connection] = []
        try:
            for settings in (_WRITES, _READS, _READS):
                connections.append(await _connect(path))
                for setting in settings:
                    await connections[-1].execute(f"PRAGMA {setting}")
        except (sqlite3.Error, OSError) as error:
            # Each has a thread of its own, which would keep the program from ending.
            for connection in connections:
                await connection.close()
            if lock is not None:
                lock.close()
            raise ConfigError(f"database: {path} cannot be opened: {error}") from error
        return cls(path, connections, lock)

    async def close(self) -> None:
        # The last one to close checkpoints: that must be the writer.
        for connection in reversed(self._connections):
            await connection.close()
        if self._lock is not None:
            self._lock.close()

    async def notify(self, message: str) -> None:
        pass  # there is nobody else

    @asynccontextmanager
    async def listening(self, heard: Callable[[str], None]) -> AsyncIterator[None]:
        yield

    async def probe(self) -> None:
        # Of no row nothing would be written.
        async with self.write() as tx:
            await tx.execute("UPDATE tenants SET id = id WHERE id = :id", id=DEFAULT)

    async def free(self) -> int | None:
        try:
            disk = await asyncio.to_thread(os.statvfs, self._directory)
        except OSError as error:
            raise StoreError(f"the database has no directory: {error}") from error
        return disk.f_bavail * disk.f_frsize

    async def sizes(self) -> Mapping[str, int]:
        async with self.read(browse=True) as tx:
            pages, free, size = [(await tx.fetch(f"PRAGMA {name}"))[0][name] for name in _SPACE]
        return {"main": pages * size, "free": free * size, "wal": _size(self._wal)}

    async def shrink(self, pages: int) -> bool:
        async with self._locks[self._writer]:
            tx = _SQLiteTransaction(self._writer)
            with _as_store_error():
                there, free = [int((await tx.fetch(f"PRAGMA {name}"))[0][name]) for name in _SPACE[:2]]
                surplus = min(pages, free - max(SPARE_PAGES, there // 10))
                if surplus > 0:
                    # A statement without columns is ended after its first step, which is one page; a script
                    # is not.
                    await self._writer.executescript(f"PRAGMA incremental_vacuum({surplus})")
                left = int((await tx.fetch(f"PRAGMA {_SPACE[1]}"))[0][_SPACE[1]])
        # A file that was not made by Relay may not be able to give anything back.
        return left < free

    async def tidy(self) -> None:
        if _size(self._wal) <= 2 * WAL_BYTES:
            return
        # It begins anew only when nobody reads in it. Who reads for long is waited for before anybody else
        # has to wait, and another program not at all.
        async with self._locks[self._browser], self._locks[self._reader], self._locks[self._writer]:
            tx = _SQLiteTransaction(self._writer)
            with _as_store_error():
                await tx.fetch("PRAGMA busy_timeout = 0")
                try:
                    await tx.fetch("PRAGMA wal_checkpoint(TRUNCATE)")
                finally:
                    await tx.fetch(f"PRAGMA busy_timeout = {1000 * _BUSY_SECONDS}")

    @asynccontextmanager
    async def write(self, *, exclusive: bool = False) -> AsyncIterator[Transaction]:
        async with self._locks[self._writer], _transaction(self._writer) as transaction:
            yield transaction

    @asynccontextmanager
    async def read(self, *, browse: bool = False) -> AsyncIterator[Transaction]:
        connection = self._browser if browse else self._reader
        async with self._locks[connection]:
            with _as_store_error((sqlite3.Error,)):
                yield _SQLiteTransaction(connection)


class _SQLiteTransaction:
    """Statements whose results nobody reads wait for the next one: a trip to the connection's thread costs
    more than most statements do. Their errors come with it, at the latest with the commit."""

    def __init__(self, connection: aiosqlite.Connection) -> None:
        self._connection = connection
        self._waiting: list[Callable[[sqlite3.Connection], object]] = []

    def begin(self) -> None:
        self._waiting.append(lambda connection: connection.execute("BEGIN IMMEDIATE"))

    async def commit(self) -> None:
        await self._run(lambda connection: connection.commit())

    async def execute(self, sql: str, **values: Any) -> int:
        sql, values = expand(sql, values)
        return await self._run(lambda connection: connection.execute(sql, values).rowcount)

    async def execute_many(self, sql: str, rows: Sequence[Row]) -> None:
        if rows:
            self._waiting.append(lambda connection: connection.executemany(sql, rows))

    async def fetch(self, sql: str, **values: Any) -> list[Row]:
        sql, values = expand(sql, values)
        return await self._run(lambda connection: connection.execute(sql, values).fetchall())

    async def _run(self, last: Callable[[sqlite3.Connection], T]) -> T:
        waiting, self._waiting = self._waiting, []

        def work() -> T:
            connection = self._connection._conn
            for statement in waiting:
                statement(connection)
            return last(connection)

        # aiosqlite has no public way to run several statements in one trip.
        run = cast(Callable[[Callable[[], T]], Awaitable[T]], self._connection._execute)
        try:
            return await run(work)
        except UnicodeError as error:
            raise sqlite3.ProgrammingError(str(error)) from error
        except ValueError as error:
            # What aiosqlite says of a closed connection.
            raise sqlite3.OperationalError(str(error)) from error


@asynccontextmanager
async def _transaction(connection: aiosqlite.Connection) -> AsyncIterator[_SQLiteTransaction]:
    transaction = _SQLiteTransaction(connection)
    try:
        transaction.begin()
        with _as_store_error((sqlite3.Error,)):
            yield transaction
        with _as_store_error():
            await transaction.commit()
    except BaseException:
        # Also after a cancellation: what was begun goes on in its thread, and this comes after it there.
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
        # What is wrong with a row concerns that row; anything else concerns whoever writes now.
        general = not isinstance(error, sqlite3.IntegrityError | sqlite3.ProgrammingError)
        raise StoreError(f"the database did not take it: {error}", general=general) from error


async def _connect(path: Path) -> aiosqlite.Connection:
    connection = await aiosqlite.connect(path, isolation_level=None, timeout=_BUSY_SECONDS)
    connection.row_factory = sqlite3.Row
    return connection


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


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
