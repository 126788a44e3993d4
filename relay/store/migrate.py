"""Migrations: numbered SQL files, applied once, in order, each in its own transaction."""

import re
from importlib.resources import files

from relay.errors import ConfigError
from relay.store.database import Database

_HISTORY = """
    CREATE TABLE IF NOT EXISTS migrations (
        version BIGINT PRIMARY KEY, name TEXT NOT NULL, applied_at BIGINT NOT NULL
    )
"""


async def migrate(database: Database, *, now: int) -> list[str]:
    """Brings the schema up to date; returns the names of what was applied.

    Raises ConfigError when the database is newer than this program.
    """
    applied = []
    async with database.migrating():
        for version, (name, text) in await _missing(database):
            async with database.write() as tx:
                for statement in _statements(text):
                    await tx.execute(statement)
                await tx.execute(
                    "INSERT INTO migrations (version, name, applied_at) VALUES (:version, :name, :now)",
                    version=version,
                    name=name,
                    now=now,
                )
            applied.append(name)
    return applied


async def pending(database: Database) -> list[str]:
    """The names of what `migrate` would apply. Raises ConfigError as it does."""
    return [name for _, (name, _) in await _missing(database)]


async def is_current(database: Database) -> bool:
    """Whether its schema is exactly this program's; writes nothing. Raises StoreError where there is none."""
    async with database.read() as tx:
        rows = await tx.fetch("SELECT version FROM migrations")
    return {row["version"] for row in rows} == _known().keys()


async def _missing(database: Database) -> list[tuple[int, tuple[str, str]]]:
    known = _known()
    async with database.write() as tx:
        await tx.execute(_HISTORY)
        rows = await tx.fetch("SELECT version FROM migrations")
    done = {row["version"] for row in rows}
    newer = done - known.keys()
    if newer:
        raise ConfigError(
            f"database: it was written by a newer Relay (migration {max(newer)}); run that version or newer"
        )
    return sorted((version, known[version]) for version in known.keys() - done)


def _known() -> dict[int, tuple[str, str]]:
    found = {}
    for file in files("relay.store").joinpath("migrations").iterdir():
        if match := re.fullmatch(r"(\d{4})_\w+\.sql", file.name):
            found[int(match[1])] = (file.name.removesuffix(".sql"), file.read_text())
    return found


def _statements(text: str) -> list[str]:
    code = re.sub(r"--.*", "", text)
    return [statement.strip() for statement in code.split(";") if statement.strip()]
