"""Copying: a stopped relay's whole state goes from one database to another, and is compared there."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from relay.errors import ConfigError, CopyFailed, DatabaseInUse, StoreError
from relay.redact import without_password
from relay.store import open_database
from relay.store.database import Database
from relay.store.migrate import migrate, pending
from relay.store.tables import Tables, check_unused, check_whole

_SQLITE = "sqlite:///"


@dataclass(frozen=True, slots=True)
class Progress:
    """So many of all rows are done; the last ones were of `table`."""

    doing: Literal["copying", "comparing"]
    table: str
    done: int
    total: int


@dataclass(slots=True)
class _Meter:
    show: Callable[[Progress], None]
    doing: Literal["copying", "comparing"]
    total: int
    done: int = 0

    def add(self, table: str, rows: int) -> None:
        self.done += rows
        self.show(Progress(self.doing, table, self.done, self.total))


async def copy(
    source_url: str, target_url: str, *, now: Callable[[], int], show: Callable[[Progress], None]
) -> Mapping[str, int]:
    """Brings all that a stopped relay remembers into an empty database; how many rows of each table.

    It may be killed at any moment: called again, it goes on. The source is left as it is.
    Raises ConfigError when one of the databases is not what it must be, CopyFailed when the copy does not
    come to its end.
    """
    name = database_name(source_url)
    if name == database_name(target_url):
        raise ConfigError("--to: is the database that --from names")
    try:
        _check_there(source_url)
        async with _opened("--from", source_url) as source:
            with _about("--from"):
                await _check_state(source)
                await check_unused(source, now=now())
            async with _opened("--to", target_url) as target:
                with _about("--to"):
                    await migrate(target, now=now())
                    await check_unused(target, now=now())
                return await _copy(Tables(source), Tables(target), name, now, show)
    except StoreError as error:
        # What is wrong with one row is so again.
        hint = "; what was copied stays: run it again to go on" if error.general else ""
        raise CopyFailed(f"{error}{hint}") from error


def database_name(url: str) -> str:
    """What a database is called where it is shown or stored: its URL without the password."""
    if url.startswith(_SQLITE):
        return f"{_SQLITE}{Path(url.removeprefix(_SQLITE)).resolve()}"
    return without_password(url)


async def _copy(
    source: Tables, target: Tables, name: str, now: Callable[[], int], show: Callable[[Progress], None]
) -> Mapping[str, int]:
    with _about("--to"):
        at = await target.begin(name, now=now())
    counts = await source.count()
    tables, total = list(counts), sum(counts.values())
    meter = _Meter(show, "copying", total, sum((await target.count()).values()))
    for table in tables[tables.index(at.table) :]:
        meter.add(table, 0)
        with _about(table):
            async for page in source.pages(table, at.key if table == at.table else ()):
                at = await target.put(at, table, page)
                meter.add(table, len(page))
    meter = _Meter(show, "comparing", total)
    for table in tables:
        before, after = await asyncio.gather(_content(source, table, meter), _content(target, table))
        if before != after:
            raise CopyFailed(
                f"{table}: {before[0]} rows in --from, {after[0]} in --to"
                f"{', which differ' if before[0] == after[0] else ''};"
                " if a relay used --from meanwhile, begin again with an empty database"
            )
    await target.finish(at, now=now())
    return counts


async def _content(tables: Tables, table: str, meter: _Meter | None = None) -> tuple[int, int]:
    """How many rows a table has, and a number that differs where theirs do, whatever their order."""
    count = content = 0
    async for page in tables.pages(table):
        count += len(page)
        content += sum(hash(tuple(row.values())) for row in page)
        if meter is not None:
            meter.add(table, len(page))
    return count, content


def _check_there(url: str) -> None:
    """Opening a file that is not there would make it."""
    if url.startswith(_SQLITE) and not Path(url.removeprefix(_SQLITE)).exists():
        raise ConfigError(f"--from: {database_name(url)} does not exist")


async def _check_state(source: Database) -> None:
    """Raises ConfigError unless all of a relay's state is there, as this version writes it."""
    if await pending(source):
        raise ConfigError("it was not used by this version of Relay yet: run `relay migrate` on it")
    await check_whole(source)


@asynccontextmanager
async def _opened(option: str, url: str) -> AsyncIterator[Database]:
    with _about(option):
        database = await open_database(url)
    try:
        yield database
    finally:
        await database.close()


@contextmanager
def _about(subject: str) -> Iterator[None]:
    """Says which database, or which table, a complaint is about."""
    try:
        yield
    except DatabaseInUse as error:
        raise DatabaseInUse(f"{subject}: a relay is running on it: stop it first") from error
    except ConfigError as error:
        raise ConfigError(f"{subject}: {str(error).removeprefix('database: ')}") from error
    except StoreError as error:
        raise StoreError(f"{subject}: {error}", general=error.general) from error
