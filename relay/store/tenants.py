"""Tenants at rest."""

from collections.abc import Sequence

from relay.endpoint import Secret, rotated
from relay.keyring import KeyRing
from relay.store.audit import Entry, note
from relay.store.database import Database
from relay.store.sealed import opened_secrets, sealed_secrets


class Tenants:
    """Every statement about tenants; each method is one transaction."""

    def __init__(self, database: Database, keyring: KeyRing) -> None:
        self._db, self._keyring = database, keyring

    async def found(self, tenant: str, signing_secret: str, *, now: int) -> None:
        """Creates the tenant when it is not there yet."""
        async with self._db.write() as tx:
            await tx.execute(
                """
                INSERT INTO tenants (id, signing_secrets, created_at) VALUES (:id, :secrets, :now)
                ON CONFLICT DO NOTHING
                """,
                id=tenant,
                secrets=sealed_secrets(self._keyring, [Secret(signing_secret)], *_place(tenant)),
                now=now,
            )

    async def signing_secrets(self, tenant: str) -> Sequence[Secret]:
        """What deliveries to a generation's `callback_url` are signed with, newest first; none when they
        cannot be opened."""
        async with self._db.read() as tx:
            rows = await tx.fetch("SELECT signing_secrets FROM tenants WHERE id = :id", id=tenant)
        return read_signing_secrets(self._keyring, tenant, rows[0]["signing_secrets"])

    async def rotate(
        self, tenant: str, secret: str, *, expires_at: int, now: int, entry: Entry | None = None
    ) -> Sequence[Secret]:
        """The tenant's secrets with a new one; no old one is valid for longer than until `expires_at`."""
        async with self._db.write() as tx:
            # Who comes second waits here, and adds to what the other one has made of them.
            await tx.execute("UPDATE tenants SET id = id WHERE id = :id", id=tenant)
            [row] = await tx.fetch("SELECT signing_secrets FROM tenants WHERE id = :id", id=tenant)
            before = read_signing_secrets(self._keyring, tenant, row["signing_secrets"])
            secrets = rotated(before, secret, now=now, expires_at=expires_at)
            await tx.execute(
                "UPDATE tenants SET signing_secrets = :secrets WHERE id = :id",
                id=tenant,
                secrets=sealed_secrets(self._keyring, secrets, *_place(tenant)),
            )
            await note(tx, entry)
        return secrets


def read_signing_secrets(keyring: KeyRing, tenant: str, sealed: str) -> Sequence[Secret]:
    """Newest first; none when they cannot be opened."""
    return opened_secrets(keyring, sealed, *_place(tenant))


def _place(tenant: str) -> tuple[str, str, str, str]:
    return ("tenants", "signing_secrets", tenant, tenant)
