"""Accounts that tenants have added, at rest."""

import json
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from relay.errors import Conflict
from relay.keyring import KeyRing
from relay.store.audit import Entry, note
from relay.store.database import Database, Row, repeated
from relay.store.idempotency import Idempotency, reserve
from relay.store.sealed import opened

log = logging.getLogger(__name__)
# Of one tenant; every relay knows them all.
MOST = 100


@dataclass(frozen=True, slots=True)
class Credential:
    """What a tenant has said of an account; `name` is `<tenant>.<its name>`. Durations and times are
    milliseconds, None is the provider's own value. `repr` never shows the secrets."""

    name: str
    tenant: str
    provider: str
    api_key: str = field(repr=False)
    created_at: int
    updated_at: int
    webhook_secrets: tuple[str, ...] = field(default=(), repr=False)
    base_url: str | None = None
    timeout: int | None = None
    poll_interval: int | None = None
    requests_per_minute: int | None = None
    requests_per_day: int | None = None


_SETTINGS = ("timeout", "poll_interval", "requests_per_minute", "requests_per_day")


class Credentials:
    """Every statement about added accounts; each method is one transaction."""

    def __init__(self, database: Database, keyring: KeyRing) -> None:
        self._db, self._keyring = database, keyring

    @repeated
    async def create(
        self, new: Credential, idempotency: Idempotency | None, *, entry: Entry | None = None
    ) -> str:
        """Stores a credential; its name, or that of the one that the key created before, which may be gone.

        Raises Conflict when the tenant has an account of this name, or too many.
        """
        async with self._db.write() as tx:
            before = await reserve(
                tx, new.tenant, idempotency, resource_id=new.name, status=201, now=new.created_at
            )
            if before is not None:
                return before[0]
            [row] = await tx.fetch(
                "SELECT COUNT(*) AS count FROM credentials WHERE tenant = :tenant", tenant=new.tenant
            )
            if row["count"] >= MOST:
                raise Conflict(f"there are {MOST} accounts already, more are not taken: delete one")
            if not await tx.execute(_CREATE, **self._write(new)):
                raise Conflict("there is an account of this name already")
            await tx.execute("DELETE FROM accounts WHERE name = :name", name=new.name)
            await note(tx, entry)
        return new.name

    async def versions(self) -> Mapping[str, int]:
        """When each was changed last, by its name."""
        async with self._db.read() as tx:
            rows = await tx.fetch("SELECT name, updated_at FROM credentials")
        return {row["name"]: row["updated_at"] for row in rows}

    async def get_many(self, names: Collection[str]) -> Sequence[Credential]:
        """Those of the names that exist and can be opened, whoever's they are."""
        if not names:
            return []
        async with self._db.read() as tx:
            rows = await tx.fetch("SELECT * FROM credentials WHERE name IN (:names)", names=sorted(names))
        return [one for row in rows if (one := self._read(row)) is not None]

    @repeated
    async def change(
        self, name: str, made: Callable[[Credential], Credential], *, now: int, entry: Entry | None = None
    ) -> bool:
        """Replaces a credential by what is `made` of it; whether there is one. Raises what `made` raises."""
        async with self._db.write() as tx:
            # Who comes second waits here, and then changes what the other one has made of it.
            await tx.execute("UPDATE credentials SET name = name WHERE name = :name", name=name)
            rows = await tx.fetch("SELECT * FROM credentials WHERE name = :name", name=name)
            if not rows:
                return False
            before = self._read(rows[0])
            if before is None:
                raise Conflict(
                    "it cannot be opened, it was changed in the database: delete it, and add it again"
                )
            # Another time than before, also within one millisecond: by that a change is known.
            after = replace(made(before), updated_at=max(now, before.updated_at + 1))
            await tx.execute(_CHANGE, **self._write(after))
            await note(tx, entry)
        return True

    @repeated
    async def delete(self, name: str, *, entry: Entry | None = None) -> bool:
        """Removes a credential and how its account stands; whether there was one.

        Raises Conflict while there are open generations of it.
        """
        async with self._db.write() as tx:
            if not await tx.execute(_DELETE, name=name):
                if await tx.fetch("SELECT 1 FROM credentials WHERE name = :name", name=name):
                    raise Conflict("there are open generations of this account: delete them, or let them end")
                return False
            await tx.execute("DELETE FROM accounts WHERE name = :name", name=name)
            await note(tx, entry)
        return True

    def _write(self, one: Credential) -> dict[str, Any]:
        """The one place where secrets go into a row: sealed."""
        values = {each.name: getattr(one, each.name) for each in fields(one) if each.name not in _SETTINGS}
        return {
            **values,
            # Together: whoever changes the URL in the database is not sent the key.
            "api_key": self._keyring.seal(
                json.dumps([one.api_key, one.base_url]), *_place("api_key", one.name, one.tenant)
            ),
            "webhook_secrets": self._keyring.seal(
                json.dumps(one.webhook_secrets), *_place("webhook_secrets", one.name, one.tenant)
            ),
            "settings": json.dumps({name: getattr(one, name) for name in _SETTINGS}),
        }

    def _read(self, row: Row) -> Credential | None:
        """The one place where they come out of it; None when they cannot be opened."""
        values = dict(row)
        texts = {
            column: opened(self._keyring, row[column], *_place(column, row["name"], row["tenant"]))
            for column in ("api_key", "webhook_secrets")
        }
        if texts["api_key"] is None or texts["webhook_secrets"] is None:
            return None
        api_key, base_url = json.loads(texts["api_key"])
        if base_url != row["base_url"]:
            log.error("secret.not_opened", extra={"where": "credentials.base_url", "row": row["name"]})
            return None
        settings = json.loads(values.pop("settings"))
        return Credential(
            **{
                **values,
                **{name: settings.get(name) for name in _SETTINGS},
                "api_key": api_key,
                "webhook_secrets": tuple(json.loads(texts["webhook_secrets"])),
            }
        )


def _place(column: str, name: str, tenant: str) -> tuple[str, str, str, str]:
    return ("credentials", column, name, tenant)


_CREATE = """
    INSERT INTO credentials (
        name, tenant, provider, base_url, settings, api_key, webhook_secrets, created_at, updated_at
    ) VALUES (
        :name, :tenant, :provider, :base_url, :settings, :api_key, :webhook_secrets, :created_at, :updated_at
    ) ON CONFLICT DO NOTHING
"""
_CHANGE = """
    UPDATE credentials
    SET base_url = :base_url, settings = :settings, api_key = :api_key, webhook_secrets = :webhook_secrets,
        updated_at = :updated_at
    WHERE name = :name
"""
_DELETE = """
    DELETE FROM credentials WHERE name = :name AND NOT EXISTS (
        SELECT 1 FROM generations WHERE account = :name AND known_at IS NULL
    )
"""
