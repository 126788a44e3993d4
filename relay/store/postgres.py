"""The PostgreSQL driver: a pool of connections, and the one SQL text with its parameters numbered.

Everything about a transaction goes with its BEGIN: behind PgBouncer in transaction mode a session is
nobody's, so nothing is ever set for one.
"""

import asyncio
import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from functools import lru_cache
from typing import Any, Self, TypeAlias, TypeVar

import asyncpg

from relay.errors import Collision, ConfigError, StoreError
from relay.store.database import Row, Transaction, expand
from relay.store.hosts import Address, Hosts, advice, is_away, read_url, why
from relay.tenant import DEFAULT

T = TypeVar("T")
Connection: TypeAlias = "asyncpg.pool.PoolConnectionProxy[asyncpg.Record]"
log = logging.getLogger(__name__)
# Whoever needs a connection waits for so long; where the server has none left, it is asked again so often.
_ACQUIRE_SECONDS, _CROWDED_SECONDS = 5.0, 0.05
_EXCLUSIVE_SECONDS = 3600.0
_CLEANING_SECONDS = 2.0
_CLOSE_SECONDS = 5.0
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 5.0
# Any number, as long as every release has the same.
_EXCLUSIVE_LOCK = 0x52656C6179
_CHANNEL = "relay"
# Whether the connection that listens still stands is seen so often; seconds.
_LISTEN_AGAIN = 5
_PARAMETER = re.compile(r"(?<![:\w]):([a-z_][a-z0-9_]*)")
_TYPES: Sequence[tuple[type, str]] = (
    (int, "BIGINT"),
    (float, "DOUBLE PRECISION"),
    (str, "TEXT"),
    (bytes, "BYTEA"),
)
# What concerns these rows and these values (a ValueError is asyncpg's word for one it cannot send); anything
# else would have kept every write from happening.
_PARTICULAR = (
    asyncpg.IntegrityConstraintViolationError,
    asyncpg.DataError,
    asyncpg.SyntaxOrAccessError,
    ValueError,
)
# Whoever looks before writing meets a unique constraint only when another was faster.
_COLLISIONS = (
    asyncpg.UniqueViolationError,
    asyncpg.DeadlockDetectedError,
    asyncpg.SerializationError,
)
# The server is not what it was: its other connections are not either.
_MOVED = (
    asyncpg.ReadOnlySQLTransactionError,
    asyncpg.PostgresConnectionError,
    asyncpg.AdminShutdownError,
    asyncpg.CrashShutdownError,
    asyncpg.CannotConnectNowError,
    OSError,
)


class PostgreSQL:
    """A database that any number of relays share."""

    skip_locked = "FOR UPDATE SKIP LOCKED"
    alone = False
    dialect = "postgres"
    finds_table = "SELECT relname FROM pg_class WHERE oid = to_regclass(:name)"

    def __init__(self, address: Address) -> None:
        self.name, self._timeout = address.name, address.command_timeout
        self._hosts = Hosts(address)
        self._at = self._hosts.current
        # A floor would be kept by a task of asyncpg's own, which logs a traceback every time it fails.
        self._pool = asyncpg.create_pool(
            connect=self._join, min_size=0, max_size=address.pool_size, reset=_nothing
        )

    @classmethod
    async def open(cls, url: str, *, patience: float = 0) -> Self:
        """Waits so many seconds for a server that is not there yet. Raises ConfigError, at once for what
        will not change by itself."""
        database = cls(read_url(url))
        await database._pool
        try:
            await database._reach(patience)
        except BaseException:
            database._pool.terminate()
            raise
        return database

    async def _join(self, *given: Any, **options: Any) -> "asyncpg.Connection[asyncpg.Record]":
        """A connection for the pool."""
        connection = await self._hosts.connect(*given, **options)
        if self._hosts.current != self._at:
            # Who is still connected to the other host would read what is old, and be refused what is new.
            self._at = self._hosts.current
            await self._pool.expire_connections()
        return connection

    async def connect(self) -> "asyncpg.Connection[asyncpg.Record]":
        """A connection beside the pool, for the caller to close."""
        return await self._hosts.connect()

    async def close(self) -> None:
        # In time, also when nobody answers; asyncpg drops then what it has.
        with suppress(Exception):
            async with asyncio.timeout(_CLOSE_SECONDS):
                await self._pool.close()

    async def notify(self, message: str) -> None:
        async with self._connection() as connection:
            await self._speak(lambda: connection.execute("SELECT pg_notify($1, $2)", _CHANNEL, message))

    @asynccontextmanager
    async def listening(self, heard: Callable[[str], None]) -> AsyncIterator[None]:
        task = asyncio.create_task(self._listen(heard))
        try:
            yield
        finally:
            task.cancel()
            await asyncio.wait([task])

    async def _listen(self, heard: Callable[[str], None]) -> None:
        while True:
            try:
                connection = await self.connect()
                try:
                    await connection.add_listener(_CHANNEL, lambda *said: heard(str(said[-1])))
                    while True:
                        await asyncio.sleep(_LISTEN_AGAIN)
                        await connection.execute("SELECT 1")
                finally:
                    connection.terminate()
            except Exception as error:
                # Nothing is lost without it, only later.
                log.info("database.deaf: %s", why(error))
            await asyncio.sleep(_LISTEN_AGAIN)

    async def free(self) -> int | None:
        return None

    async def probe(self) -> None:
        # Of no row nothing would be written.
        async with self.write() as tx:
            await tx.execute("UPDATE tenants SET id = id WHERE id = :id", id=DEFAULT)

    async def sizes(self) -> Mapping[str, int]:
        async with self.read() as tx:
            [row] = await tx.fetch("SELECT pg_database_size(current_database()) AS bytes")
        return {"main": row["bytes"]}

    async def shrink(self, pages: int) -> bool:
        return False  # its own affair

    async def tidy(self) -> None:
        pass  # so is this

    @asynccontextmanager
    async def write(self, *, exclusive: bool = False) -> AsyncIterator[Transaction]:
        async with self._connection() as connection:
            tx = _Writing(connection, self._speak, _EXCLUSIVE_SECONDS if exclusive else None)
            try:
                await tx.begin(0 if exclusive else self._timeout, self._timeout)
                if exclusive:
                    await tx.execute(f"SELECT pg_advisory_xact_lock({_EXCLUSIVE_LOCK})")
                yield tx
                await tx.commit()
            except BaseException:
                await _roll_back(connection)
                raise

    @asynccontextmanager
    async def read(self, *, browse: bool = False) -> AsyncIterator[Transaction]:
        async with self._connection() as connection:
            yield _Reading(connection, self._speak)

    @asynccontextmanager
    async def _connection(self) -> AsyncIterator[Connection]:
        connection = await self._acquire()
        try:
            yield connection
        finally:
            # What was committed is committed, whatever becomes of the connection.
            try:
                await self._pool.release(connection, timeout=_CLEANING_SECONDS)
            except Exception:
                _drop(connection)

    async def _acquire(self) -> Connection:
        said: Exception | None = None
        try:
            async with asyncio.timeout(_ACQUIRE_SECONDS):
                while True:
                    try:
                        connection: Connection = await self._pool.acquire()
                        return connection
                    except asyncpg.TooManyConnectionsError as error:
                        # Others have them all; one of ours may come back sooner.
                        said = error
                    await asyncio.sleep(_CROWDED_SECONDS)
        except Exception as error:
            if isinstance(error, asyncpg.CannotConnectNowError):
                await self._pool.expire_connections()
            raise StoreError(f"the database gave no connection: {why(said or error)}") from error

    async def _speak(self, say: Callable[[], Awaitable[T]]) -> T:
        """What the server answers. Raises nothing but StoreError and cancellation."""
        try:
            return await say()
        except Exception as error:
            if isinstance(error, _MOVED):
                await self._pool.expire_connections()
            message = f"the database did not take it: {why(error)}"
            if isinstance(error, _COLLISIONS):
                raise Collision(message) from error
            particular = isinstance(error, _PARTICULAR) and not isinstance(
                error, asyncpg.InsufficientPrivilegeError
            )
            raise StoreError(message, general=not particular) from error

    async def _reach(self, patience: float) -> None:
        loop = asyncio.get_running_loop()
        until, pause = loop.time() + patience, _FIRST_PAUSE
        while True:
            try:
                async with asyncio.timeout(_ACQUIRE_SECONDS), self._pool.acquire():
                    return
            except Exception as error:
                if not is_away(error):
                    raise ConfigError(f"database: {self.name}: {advice(error)}") from error
                if loop.time() >= until:
                    message = f"{self.name} cannot be reached: {why(error)}; start it, or correct the URL"
                    raise ConfigError(f"database: {message}") from error
                log.warning("database.awaited", extra={"database": self.name, "error": why(error)})
            await asyncio.sleep(min(pause, max(0.0, until - loop.time())))
            pause = min(2 * pause, _LONGEST_PAUSE)


class _Reading:
    """Statements, each by itself."""

    def __init__(
        self,
        connection: Connection,
        speak: Callable[[Callable[[], Awaitable[Any]]], Awaitable[Any]],
        timeout: float | None = None,
    ) -> None:
        self._connection, self._speak, self._timeout = connection, speak, timeout

    async def execute(self, sql: str, **values: Any) -> int:
        raise StoreError("the database did not take it: this only reads", general=False)

    async def execute_many(self, sql: str, rows: Sequence[Row]) -> None:
        await self.execute(sql)

    async def fetch(self, sql: str, **values: Any) -> list[Row]:
        sql, values = expand(sql, values)
        text, names = _numbered(sql, _types([values]))
        arguments = [values[name] for name in names]
        # Its stubs do not say so, but a record is a mapping.
        found = await self._speak(lambda: self._connection.fetch(text, *arguments, timeout=self._timeout))
        return list(found)


class _Writing(_Reading):
    """Statements between BEGIN and COMMIT."""

    async def begin(self, timeout: int, silence: int) -> None:
        # Whatever becomes of this relay, the server takes its locks from it after that time.
        text = f"""
            BEGIN;
            SET LOCAL statement_timeout = {timeout};
            SET LOCAL idle_in_transaction_session_timeout = {silence}
        """
        await self._speak(lambda: self._connection.execute(text))

    async def commit(self) -> None:
        said = await self._speak(lambda: self._connection.execute("COMMIT", timeout=self._timeout))
        if said != "COMMIT":
            # A statement had failed, and whoever asked for it went on.
            raise StoreError(f"the database did not take it: it answered {said} to COMMIT", general=False)

    async def execute(self, sql: str, **values: Any) -> int:
        sql, values = expand(sql, values)
        text, names = _numbered(sql, _types([values]))
        arguments = [values[name] for name in names]
        said = await self._speak(lambda: self._connection.execute(text, *arguments, timeout=self._timeout))
        count = str(said).rsplit(" ", 1)[-1]
        return int(count) if count.isdigit() else 0

    async def execute_many(self, sql: str, rows: Sequence[Row]) -> None:
        if rows:
            text, names = _numbered(sql, _types(rows))
            arguments = [[row[name] for name in names] for row in rows]
            await self._speak(lambda: self._connection.executemany(text, arguments, timeout=self._timeout))


async def _nothing(connection: "asyncpg.Connection[asyncpg.Record]") -> None:
    """What asyncpg has to reset before it gives a connection to the next one: no session has anything."""


async def _roll_back(connection: Connection) -> None:
    try:
        await connection.execute("ROLLBACK", timeout=_CLEANING_SECONDS)
    except BaseException as error:
        _drop(connection)
        if not isinstance(error, Exception):
            raise


def _drop(connection: Connection) -> None:
    """The server undoes by itself what it has of it."""
    with suppress(asyncpg.InterfaceError):
        connection.terminate()


def _types(rows: Sequence[Mapping[str, Any]]) -> tuple[tuple[str, str | None], ...]:
    """What each value is to the database; None where no row has one."""
    found: dict[str, str | None] = {}
    for row in rows:
        for name, value in row.items():
            kind = next((kind for type_, kind in _TYPES if isinstance(value, type_)), None)
            if kind == "DOUBLE PRECISION" or found.get(name) is None:
                found[name] = kind
    return tuple(found.items())


@lru_cache(maxsize=1024)
def _numbered(sql: str, types: tuple[tuple[str, str | None], ...]) -> tuple[str, list[str]]:
    """`:name` as `$n` of its own type: otherwise an expression alone would decide what a number is."""
    kinds, names = dict(types), list[str]()

    def number(match: re.Match[str]) -> str:
        name = match[1]
        if name not in names:
            names.append(name)
        place = f"${names.index(name) + 1}"
        return f"CAST({place} AS {kinds[name]})" if kinds[name] else place

    return _PARAMETER.sub(number, sql), names
