"""Tenants at rest."""

from relay.keyring import KeyRing
from relay.store.database import Database
from relay.store.sealed import opened


class Tenants:
    """Every statement about tenants; each method is one transaction."""

    def __init__(self, database: Database, keyring: KeyRing) -> None:
        self._db, self._keyring = database, keyring

    async def found(self, tenant: str, signing_secret: str, *, now: int) -> None:
        """Creates the tenant when it is not there yet."""
        async with self._db.write() as tx:
            await tx.execute(
                """
                INSERT INTO tenants (id, signing_secret, created_at) VALUES (:id, :secret, :now)
                ON CONFLICT DO NOTHING
                """,
                id=tenant,
                secret=self._keyring.seal(signing_secret, *_place(tenant)),
                now=now,
            )

    async def signing_secret(self, tenant: str) -> str | None:
        """What deliveries to a generation's `callback_url` are signed with; None when it cannot be opened."""
        async with self._db.read() as tx:
            rows = await tx.fetch("SELECT signing_secret FROM tenants WHERE id = :id", id=tenant)
        return read_signing_secret(self._keyring, tenant, rows[0]["signing_secret"])


def read_signing_secret(keyring: KeyRing, tenant: str, sealed: str) -> str | None:
    """None when it cannot be opened."""
    return opened(keyring, sealed, *_place(tenant))


def _place(tenant: str) -> tuple[str, str, str, str]:
    return ("tenants", "signing_secret", tenant, tenant)
