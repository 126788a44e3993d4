"""`Idempotency-Key`: the same request again creates nothing and gets the thing that was created."""

from collections.abc import Sequence
from dataclasses import dataclass

from relay.errors import Collision, FieldError, Invalid
from relay.store.database import Transaction


@dataclass(frozen=True, slots=True)
class Idempotency:
    """A client's key, and a hash of what it asked for under it; by `older_hashes`
    the same request may be known as well."""

    key: str
    request_hash: str
    older_hashes: Sequence[str] = ()


async def reserve(
    tx: Transaction, tenant: str, request: Idempotency | None, *, resource_id: str, status: int, now: int
) -> tuple[str, int] | None:
    """The id and HTTP status of what this key created; None ties it to what is about to be created.

    Of relays that are asked at once, one is told None, and the others wait until it is done. So a transaction
    begins with its keys, in their order. Raises Invalid when the request was another one.
    """
    if request is None:
        return None
    is_new = await tx.execute(
        """
        INSERT INTO idempotency_keys (tenant, key, request_hash, resource_id, status, created_at)
        VALUES (:tenant, :key, :request_hash, :resource_id, :status, :now)
        ON CONFLICT DO NOTHING
        """,
        tenant=tenant,
        key=request.key,
        request_hash=request.request_hash,
        resource_id=resource_id,
        status=status,
        now=now,
    )
    if is_new:
        return None
    before = await created(tx, tenant, request)
    if before is None:
        raise Collision("this Idempotency-Key has just been forgotten")
    return before


async def created(tx: Transaction, tenant: str, request: Idempotency) -> tuple[str, int] | None:
    """The id and HTTP status of what this key created. Raises Invalid when the request was another one."""
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
    if rows[0]["request_hash"] not in (request.request_hash, *request.older_hashes):
        raise Invalid(FieldError("Idempotency-Key", "was used for a different request"))
    return rows[0]["resource_id"], rows[0]["status"]


async def correct(
    tx: Transaction, tenant: str, request: Idempotency, *, resource_id: str, status: int
) -> None:
    """Ties a key that `reserve` took to what was there already."""
    await tx.execute(
        """
        UPDATE idempotency_keys SET resource_id = :resource_id, status = :status
        WHERE tenant = :tenant AND key = :key
        """,
        tenant=tenant,
        key=request.key,
        resource_id=resource_id,
        status=status,
    )
