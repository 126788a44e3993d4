"""What is sealed at rest, and sealing it anew when the `secret_key` has changed."""

import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from types import MappingProxyType

from relay.endpoint import Secret
from relay.errors import ConfigError, SealBroken
from relay.keyring import KeyRing, sealed_with
from relay.store.database import Database

log = logging.getLogger(__name__)
PAGE = 200
# Each with the column of its id, that of its tenant, and those that are sealed: an empty text is no secret.
SEALED: Mapping[str, tuple[str, str, Sequence[str]]] = MappingProxyType(
    {
        "tenants": ("id", "id", ("signing_secrets",)),
        "endpoints": ("id", "tenant", ("secrets", "headers")),
        "credentials": ("name", "tenant", ("api_key", "webhook_secrets")),
    }
)


@dataclass(frozen=True, slots=True)
class Page:
    """Rows that were looked at; `last` is the id of the last one, None at the end of the table."""

    last: str | None
    rows: int
    broken: Sequence[str]  # where the secrets are that could not be opened


class Sealed:
    """Every statement about sealed columns as such; each method is one transaction."""

    def __init__(self, database: Database, keyring: KeyRing) -> None:
        self._db, self._keyring = database, keyring

    @property
    def newest(self) -> str:
        """The id of the key that seals."""
        return self._keyring.newest

    async def check(self) -> None:
        """Raises ConfigError when the database holds secrets that the configuration has no key for."""
        unknown = sorted(key for key in await self.keys() if key and key not in self._keyring)
        if unknown:
            raise ConfigError(
                "secret_key: the secrets in the database were sealed with another one (its id is"
                f" {', '.join(unknown)}): set that one, or put it into previous_secret_keys"
            )

    async def keys(self) -> Mapping[str, int]:
        """How many texts are sealed with each key, by its id; what is not sealed at all is by ''."""
        found: Counter[str] = Counter()
        async with self._db.read(browse=True) as tx:
            for table, (_, _, columns) in SEALED.items():
                for column in columns:
                    # As long as the version and the id of a key are: one row for each key.
                    rows = await tx.fetch(
                        f"""
                        SELECT SUBSTR({column}, 1, 12) AS start, COUNT(*) AS count FROM {table}
                        WHERE {column} <> '' GROUP BY SUBSTR({column}, 1, 12)
                        """
                    )
                    for row in rows:
                        found[sealed_with(row["start"]) or ""] += row["count"]
        return found

    async def rekey(self, table: str, after: str) -> Page:
        """Seals the next rows of a table, those after an id, with the newest key; what changes meanwhile
        stays as it is."""
        id_, tenant, columns = SEALED[table]
        broken: list[str] = []
        async with self._db.read(browse=True) as tx:
            rows = await tx.fetch(
                f"""
                SELECT {", ".join(dict.fromkeys((id_, tenant, *columns)))} FROM {table}
                WHERE {id_} > :after ORDER BY {id_} LIMIT :limit
                """,
                after=after,
                limit=PAGE,
            )
        changes: dict[str, list[dict[str, str]]] = {column: [] for column in columns}
        for row in rows:
            for column in columns:
                if not row[column] or sealed_with(row[column]) == self._keyring.newest:
                    continue
                place = (table, column, row[id_], row[tenant])
                text = opened(self._keyring, row[column], *place)
                if text is None:
                    broken.append(f"{table}.{column} of {row[id_]}")
                    continue
                new = self._keyring.seal(text, *place)
                changes[column].append({"id": row[id_], "old": row[column], "new": new})
        if any(changes.values()):
            async with self._db.write() as tx:
                for column, values in changes.items():
                    await tx.execute_many(
                        f"UPDATE {table} SET {column} = :new WHERE {id_} = :id AND {column} = :old", values
                    )
        return Page(rows[-1][id_] if len(rows) == PAGE else None, len(rows), broken)


def opened(keyring: KeyRing, sealed: str, *place: str) -> str | None:
    """What was sealed for this place; None, and a line in the log, when it cannot be opened: one bad row must
    not be in the way of all the others."""
    try:
        return keyring.open(sealed, *place)
    except SealBroken as error:
        table, column, id_, _ = place
        log.error("secret.not_opened", extra={"where": f"{table}.{column}", "row": id_, "error": str(error)})
        return None


def sealed_secrets(keyring: KeyRing, secrets: Sequence[Secret], *place: str) -> str:
    """What `opened_secrets` opens."""
    return keyring.seal(json.dumps([asdict(one) for one in secrets]), *place)


def opened_secrets(keyring: KeyRing, sealed: str, *place: str) -> Sequence[Secret]:
    """In their order; none when they cannot be opened."""
    text = opened(keyring, sealed, *place)
    return tuple(Secret(**one) for one in json.loads(text)) if text else ()
