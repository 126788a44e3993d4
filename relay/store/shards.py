"""Relays and the shards that they hold, at rest."""

from collections.abc import Collection
from dataclasses import dataclass

from relay.shard import share
from relay.store.database import Database, Transaction

_DAY = 86_400_000


@dataclass(frozen=True, slots=True)
class Beat:
    """What a relay learns when it says that it is alive. `ahead` is how far another's clock is ahead."""

    relays: int
    held: Collection[int]
    ahead: int


class Shards:
    """Every statement about who holds which shard; each method is one transaction."""

    def __init__(self, database: Database) -> None:
        self._db = database

    async def beat(self, relay: str, *, now: int, lease: int, takes: bool = True) -> Beat:
        """Says that a relay is alive, holds its shards for `lease` milliseconds more, and, if it `takes` any,
        gives it free ones up to its share. A relay that was not heard of for `lease` is gone, and what it
        held is free."""
        async with self._db.write() as tx:
            await tx.execute(_SEEN, relay=relay, now=now)
            await tx.execute(_RENEW, relay=relay, until=now + lease)
            [row] = await tx.fetch(_LIVE, since=now - lease)
            held = await _held(tx, relay)
            room = share(row["live"]) - len(held) if takes else 0
            if room > 0 and await tx.execute(
                _TAKE.format(skip_locked=self._db.skip_locked),
                relay=relay,
                now=now,
                until=now + lease,
                limit=room,
            ):
                held = await _held(tx, relay)
            await tx.execute("DELETE FROM relays WHERE seen_at < :before", before=now - _DAY)
        return Beat(row["live"], held, row["latest"] - now)

    async def release(self, relay: str, numbers: Collection[int]) -> None:
        """Makes shards free, if the relay still holds them."""
        rows = [{"relay": relay, "number": number} for number in sorted(numbers)]
        async with self._db.write() as tx:
            await tx.execute_many(_RELEASE, rows)

    async def retire(self, relay: str) -> None:
        """The relay does not count any more; what it holds is its still, until it runs out."""
        async with self._db.write() as tx:
            await tx.execute(_RETIRE, relay=relay)

    async def leave(self, relay: str) -> None:
        """The relay is gone, and what it held is free."""
        async with self._db.write() as tx:
            await tx.execute(_RETIRE, relay=relay)
            await tx.execute(
                "UPDATE shards SET holder = NULL, held_until = 0 WHERE holder = :relay", relay=relay
            )

    async def live(self, *, since: int) -> int:
        """How many relays have been heard of since then."""
        async with self._db.read() as tx:
            [row] = await tx.fetch(_LIVE, since=since)
        return int(row["live"])


async def _held(tx: Transaction, relay: str) -> Collection[int]:
    rows = await tx.fetch("SELECT number FROM shards WHERE holder = :relay", relay=relay)
    return {row["number"] for row in rows}


_SEEN = """
    INSERT INTO relays (id, seen_at) VALUES (:relay, :now)
    ON CONFLICT (id) DO UPDATE SET seen_at = EXCLUDED.seen_at
"""
_RETIRE = "DELETE FROM relays WHERE id = :relay"
_RENEW = "UPDATE shards SET held_until = :until WHERE holder = :relay"
_LIVE = "SELECT COUNT(*) AS live, COALESCE(MAX(seen_at), 0) AS latest FROM relays WHERE seen_at > :since"
_TAKE = """
    WITH free AS (
        SELECT number FROM shards WHERE held_until <= :now ORDER BY number LIMIT :limit {skip_locked}
    )
    UPDATE shards SET holder = :relay, held_until = :until FROM free WHERE shards.number = free.number
"""
_RELEASE = "UPDATE shards SET holder = NULL, held_until = 0 WHERE number = :number AND holder = :relay"
