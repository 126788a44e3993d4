"""Tenants and their API keys at rest."""

from relay.keyring import KeyRing
from relay.store.database import Database, Transaction
from relay.store.sealed import opened

DEFAULT = "default"


class Tenants:
    """Every statement about tenants and keys; each method is one transaction."""

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

    async def has_keys(self) -> bool:
        async with self._db.read() as tx:
            return bool(await tx.fetch("SELECT id FROM keys LIMIT 1"))

    async def add_key(self, key_id: str, tenant: str, name: str, hash_: str, *, now: int) -> None:
        """Stores the hash of a key; the key itself is nowhere."""
        async with self._db.write() as tx:
            await _add_key(tx, key_id, tenant, name, hash_, now=now)

    async def add_first_key(self, key_id: str, tenant: str, name: str, hash_: str, *, now: int) -> bool:
        """As `add_key`, but only when there is no key at all; whether it did. Of relays that start at once,
        one does."""
        async with self._db.write() as tx:
            # Who comes second waits here, and then sees the other one's key.
            await tx.execute("UPDATE tenants SET id = id WHERE id = :id", id=tenant)
            if await tx.fetch("SELECT id FROM keys LIMIT 1"):
                return False
            await _add_key(tx, key_id, tenant, name, hash_, now=now)
            return True

    async def key_tenant(self, hash_: str) -> str | None:
        """The tenant of the key with this hash."""
        async with self._db.read() as tx:
            rows = await tx.fetch("SELECT tenant FROM keys WHERE hash = :hash", hash=hash_)
        return str(rows[0]["tenant"]) if rows else None


def read_signing_secret(keyring: KeyRing, tenant: str, sealed: str) -> str | None:
    """None when it cannot be opened."""
    return opened(keyring, sealed, *_place(tenant))


def _place(tenant: str) -> tuple[str, str, str, str]:
    return ("tenants", "signing_secret", tenant, tenant)


async def _add_key(tx: Transaction, key_id: str, tenant: str, name: str, hash_: str, *, now: int) -> None:
    await tx.execute(
        "INSERT INTO keys (id, tenant, name, hash, created_at) VALUES (:id, :tenant, :name, :hash, :now)",
        id=key_id,
        tenant=tenant,
        name=name,
        hash=hash_,
        now=now,
    )
