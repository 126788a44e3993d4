"""Tenants at rest."""

from relay.store.database import Database
from relay.tenant import DEFAULT as DEFAULT


class Tenants:
    """Every statement about tenants; each method is one transaction."""

    def __init__(self, database: Database) -> None:
        self._db = database

    async def found(self, tenant: str, signing_secret: str, *, now: int) -> None:
        """Creates the tenant when it is not there yet."""
        async with self._db.write() as tx:
            await tx.execute(
                """
                INSERT INTO tenants (id, signing_secret, created_at) VALUES (:id, :secret, :now)
                ON CONFLICT DO NOTHING
                """,
                id=tenant,
                secret=signing_secret,
                now=now,
            )

    async def signing_secret(self, tenant: str) -> str:
        """What deliveries to a generation's `callback_url` are signed with."""
        async with self._db.read() as tx:
            rows = await tx.fetch("SELECT signing_secret FROM tenants WHERE id = :id", id=tenant)
        return str(rows[0]["signing_secret"])
