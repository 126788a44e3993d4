"""Migrations: numbered SQL files, applied once, in order, all that are missing in one transaction.

What only one kind of database understands stands beside them: `0001_start.postgres.sql`.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from relay.errors import ConfigError
from relay.store.database import Database, Transaction

_HISTORY = """
    CREATE TABLE IF NOT EXISTS migrations (
        version BIGINT PRIMARY KEY, name TEXT NOT NULL, applied_at BIGINT NOT NULL
    )
"""


@dataclass(frozen=True, slots=True)
class _Migration:
    version: int
    name: str
    statements: Sequence[str]


async def migrate(database: Database, *, now: int) -> list[str]:
    """Brings the schema up to date; returns the names of what was applied.

    However many relays start at once, one does it and the others wait. Raises ConfigError when the database
    is newer than this program.
    """
    if not await pending(database):
        return []
    async with database.write(exclusive=True) as tx:
        # Another one may have done it by now.
        missing = await _missing(database, tx)
        await tx.execute(_HISTORY)
        for one in missing:
            for statement in one.statements:
                await tx.execute(statement)
            await tx.execute(
                "INSERT INTO migrations (version, name, applied_at) VALUES (:version, :name, :now)",
                version=one.version,
                name=one.name,
                now=now,
            )
    return [one.name for one in missing]


async def pending(database: Database) -> list[str]:
    """The names of what `migrate` would apply; changes nothing. Raises ConfigError as it does."""
    async with database.read() as tx:
        return [one.name for one in await _missing(database, tx)]


async def _missing(database: Database, tx: Transaction) -> list[_Migration]:
    known = _known(database.dialect)
    there = await tx.fetch(database.finds_table, name="migrations")
    done = {row["version"] for row in await tx.fetch("SELECT version FROM migrations")} if there else set()
    newer = done - known.keys()
    if newer:
        raise ConfigError(
            f"database: it was written by a newer Relay (migration {max(newer)}); run that version or newer"
        )
    return sorted((known[version] for version in known.keys() - done), key=lambda one: one.version)


@cache
def _known(dialect: str) -> Mapping[int, _Migration]:
    texts = {file.name: file.read_text() for file in files("relay.store").joinpath("migrations").iterdir()}
    found = {}
    for file, text in texts.items():
        if match := re.fullmatch(r"(\d{4})_\w+\.sql", file):
            name = file.removesuffix(".sql")
            statements = [*_statements(text), *_statements(texts.get(f"{name}.{dialect}.sql", ""))]
            found[int(match[1])] = _Migration(int(match[1]), name, statements)
    return found


def _statements(text: str) -> list[str]:
    code = re.sub(r"--.*", "", text)
    return [statement.strip() for statement in code.split(";") if statement.strip()]
