"""The PostgreSQL driver: a pool of connections, and the one SQL text with its parameters numbered."""

import asyncio
import logging
import re
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from functools import lru_cache
from typing import Any, Self

import asyncpg

from relay.errors import Collision, ConfigError, StoreError
from relay.store.database import Row, Transaction, expand

log = logging.getLogger(__name__)
_CONNECTIONS = 8
_COMMAND_SECONDS = 30
# Whoever migrates holds this lock: any number, as long as every release has the same.
_MIGRATION_LOCK = 0x52656C6179
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
# What concerns these rows and these values; anything else would have kept every write from happening.
_PARTICULAR = (
    asyncpg.IntegrityConstraintViolationError,
    asyncpg.DataError,
    asyncpg.SyntaxOrAccessError,
)
# Whoever looks before writing meets a unique constraint only when another was faster.
_COLLISIONS = (
    asyncpg.UniqueViolationError,
    asyncpg.DeadlockDetectedError,
    asyncpg.SerializationError,
)


class PostgreSQL:
    """A database that any number of relays share."""

    skip_locked = "FOR UPDATE SKIP LOCKED"
    alone = False

    def __init__(self, pool: "asyncpg.Pool[asyncpg.Record]") -> None:
        self._pool = pool

    @classmethod
    async def open(cls, url: str) -> Self:
        """Raises ConfigError when it cannot be reached."""
        try:
            pool = await asyncpg.create_pool(
                url, min_size=1, max_size=_CONNECTIONS, command_timeout=_COMMAND_SECONDS
            )
        except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
            raise ConfigError(f"database: PostgreSQL cannot be reached: {error}") from error
        except ValueError as error:
            # Its message quotes the URL, and there is a password in that.
            raise ConfigError(
                "database: write postgresql://user:password@host:5432/name, with %2F and the like for"
                " / ? # @ : in the password"
            ) from error
        return cls(pool)

    async def close(self) -> None:
        await self._pool.close()

    async def probe(self) -> None:
        async with self.write() as tx:
            await tx.execute("UPDATE tenants SET id = id WHERE id = ''")

    @asynccontextmanager
    async def migrating(self) -> AsyncIterator[None]:
        with _as_store_error():
            async with self._pool.acquire() as connection:
                await connection.execute("SELECT pg_advisory_lock($1)", _MIGRATION_LOCK)
                try:
                    yield
                finally:
                    await connection.execute("SELECT pg_advisory_unlock($1)", _MIGRATION_LOCK)

    async def notify(self, message: str) -> None:
        with _as_store_error():
            await self._pool.execute("SELECT pg_notify($1, $2)", _CHANNEL, message)

    @asynccontextmanager
    async def listening(self, heard: Callable[[str], None]) -> AsyncIterator[None]:
        task = asyncio.create_task(self._listen(heard))
        try:
            yield
        finally:
            task.cancel()
            await asyncio.wait([task])

    async def _listen(self, heard: Callable[[str], None]) -> None:
        def hear(*said: object) -> None:
            heard(str(said[-1]))

        while True:
            try:
                async with self._pool.acquire() as connection:
                    await connection.add_listener(_CHANNEL, hear)
                    try:
                        while True:
                            await asyncio.sleep(_LISTEN_AGAIN)
                            await connection.execute("SELECT 1")
                    finally:
                        await connection.remove_listener(_CHANNEL, hear)
            except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError, TimeoutError) as error:
                # Nothing is lost without it, only later.
                log.info("database.deaf: %s", error)
            await asyncio.sleep(_LISTEN_AGAIN)

    @asynccontextmanager
    async def write(self) -> AsyncIterator[Transaction]:
        with _as_store_error():
            async with self._pool.acquire() as connection, connection.transaction():
                yield _Transaction(connection)

    @asynccontextmanager
    async def read(self, *, browse: bool = False) -> AsyncIterator[Transaction]:
        with _as_store_error():
            async with self._pool.acquire() as connection:
                yield _Transaction(connection)


class _Transaction:
    def __init__(self, connection: "asyncpg.pool.PoolConnectionProxy[asyncpg.Record]") -> None:
        self._connection = connection

    async def execute(self, sql: str, **values: Any) -> int:
        sql, values = expand(sql, values)
        text, names = _numbered(sql, _types([values]))
        status: str = await self._connection.execute(text, *(values[name] for name in names))
        count = status.rsplit(" ", 1)[-1]
        return int(count) if count.isdigit() else 0

    async def execute_many(self, sql: str, rows: Sequence[Row]) -> None:
        if rows:
            text, names = _numbered(sql, _types(rows))
            await self._connection.executemany(text, [[row[name] for name in names] for row in rows])

    async def fetch(self, sql: str, **values: Any) -> list[Row]:
        sql, values = expand(sql, values)
        text, names = _numbered(sql, _types([values]))
        # Its stubs do not say so, but a record is a mapping.
        found: Sequence[Any] = await self._connection.fetch(text, *(values[name] for name in names))
        return list(found)


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


@contextmanager
def _as_store_error() -> Iterator[None]:
    try:
        yield
    except _COLLISIONS as error:
        raise Collision(f"the database did not take it: {_said(error)}") from error
    except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError, TimeoutError) as error:
        general = not isinstance(error, _PARTICULAR)
        raise StoreError(f"the database did not take it: {_said(error)}", general=general) from error


def _said(error: Exception) -> object:
    # The details of a database's error are the row that it refused, with all that is secret in it.
    return error.args[0] if isinstance(error, asyncpg.PostgresError) else error
