"""`Idempotency-Key`: the same request again creates nothing and gets the thing that was created."""

from dataclasses import dataclass

from relay.errors import FieldError, Invalid
from relay.store.database import Transaction


@dataclass(frozen=True, slots=True)
class Idempotency:
    """A client's key, and a hash of what it asked for under it."""

    key: str
    request_hash: str


async def created_before(tx: Transaction, tenant: str, request: Idempotency | None) -> tuple[str, int] | None:
    """The id and HTTP status of what this key created. Raises Invalid when the request was another one."""
    if request is None:
        return None
    rows = await tx.fetch(
        """
        SELECT request_hash, resource_id, status FROM idempotency_keys
        WHERE tenant = :tenant AND key = :key
        """,
        tenant=tenant,
        key=request.key,
    )
    if not rows:
        return None
    if rows[0]["request_hash"] != request.request_hash:
        raise Invalid(FieldError("Idempotency-Key", "was used for a different request"))
    return rows[0]["resource_id"], rows[0]["status"]


async def remember(
    tx: Transaction, tenant: str, request: Idempotency | None, *, resource_id: str, status: int, now: int
) -> None:
    """Ties the key to what was created, in the transaction that creates it."""
    if request is not None:
        await tx.execute(
            """
            INSERT INTO idempotency_keys (tenant, key, request_hash, resource_id, status, created_at)
            VALUES (:tenant, :key, :request_hash, :resource_id, :status, :now)
            """,
            tenant=tenant,
            key=request.key,
            request_hash=request.request_hash,
            resource_id=resource_id,
            status=status,
            now=now,
        )
