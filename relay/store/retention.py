"""What may go: only what has ended, is old enough, and is no longer on its way.

What another relay is just removing, or replaying, is left to it.
"""

from collections.abc import Sequence

from relay.ids import first_id
from relay.store.database import Database, Row


class Retention:
    """Removal in batches; each method is one transaction and returns how many rows it removed.

    Where a row may go only when it has no others, an OFFSET keeps a planner from joining whole tables to find
    that out: they are looked up for one row after the other, until there are enough.
    """

    def __init__(self, database: Database) -> None:
        self._db = database

    async def remove_attempts(self, *, before: int, limit: int) -> int:
        """Attempts of finished deliveries that began before `before`."""
        async with self._db.write() as tx:
            rows = await tx.fetch(
                f"""
                SELECT a.id FROM attempts a JOIN deliveries d ON d.id = a.delivery_id
                WHERE a.id < :before AND d.due_at IS NULL ORDER BY a.id LIMIT :limit
                {self._db.skip_locked}
                """,
                before=first_id("att", before),
                limit=limit,
            )
            await tx.execute_many("DELETE FROM attempts WHERE id = :id", _keys(rows))
        return len(rows)

    async def remove_events(self, *, before: int, limit: int) -> int:
        """Events older than `before` with no open delivery, with their deliveries and attempts."""
        async with self._db.write() as tx:
            rows = await tx.fetch(
                f"""
                SELECT id FROM events WHERE id < :before AND NOT EXISTS (
                    SELECT 1 FROM deliveries d WHERE d.event_id = events.id AND d.due_at IS NOT NULL
                    LIMIT 1 OFFSET 0
                ) ORDER BY id LIMIT :limit {self._db.skip_locked}
                """,
                before=first_id("evt", before),
                limit=limit,
            )
            if not rows:
                return 0
            ended = await tx.fetch(
                f"""
                SELECT id FROM deliveries WHERE event_id IN (:ids) AND due_at IS NULL
                {self._db.skip_locked}
                """,
                ids=[row["id"] for row in rows],
            )
            await tx.execute_many("DELETE FROM attempts WHERE delivery_id = :id", _keys(ended))
            await tx.execute_many("DELETE FROM deliveries WHERE id = :id", _keys(ended))
            await tx.execute_many(
                """
                DELETE FROM events
                WHERE id = :id AND NOT EXISTS (SELECT 1 FROM deliveries WHERE event_id = :id)
                """,
                _keys(rows),
            )
        return len(rows)

    async def remove_generations(self, *, before: int, limit: int) -> int:
        """Generations that ended before `before` and have nothing left to be asked or told."""
        async with self._db.write() as tx:
            rows = await tx.fetch(
                f"""
                SELECT id FROM generations
                WHERE id < :before_id AND known_at < :before AND due_at IS NULL AND NOT EXISTS (
                    SELECT 1 FROM events WHERE events.generation_id = generations.id LIMIT 1 OFFSET 0
                ) ORDER BY id LIMIT :limit {self._db.skip_locked}
                """,
                before=before,
                before_id=first_id("gen", before),
                limit=limit,
            )
            await tx.execute_many("DELETE FROM generations WHERE id = :id", _keys(rows))
        return len(rows)

    async def remove_audit(self, *, before: int, limit: int) -> int:
        """Entries of the audit log that were written before `before`."""
        async with self._db.write() as tx:
            rows = await tx.fetch(
                f"SELECT id FROM audit WHERE id < :before ORDER BY id LIMIT :limit {self._db.skip_locked}",
                before=first_id("aud", before),
                limit=limit,
            )
            await tx.execute_many("DELETE FROM audit WHERE id = :id", _keys(rows))
        return len(rows)

    async def remove_replays(self, *, before: int, limit: int) -> int:
        """Replays that ended before `before`."""
        async with self._db.write() as tx:
            rows = await tx.fetch(
                f"""
                SELECT id FROM replays WHERE id < :before_id AND ended_at < :before
                ORDER BY id LIMIT :limit {self._db.skip_locked}
                """,
                before=before,
                before_id=first_id("rpl", before),
                limit=limit,
            )
            await tx.execute_many("DELETE FROM replays WHERE id = :id", _keys(rows))
        return len(rows)

    async def remove_idempotency_keys(self, *, before: int, limit: int) -> int:
        """Idempotency keys that were used before `before`."""
        async with self._db.write() as tx:
            rows = await tx.fetch(
                f"""
                SELECT tenant, key FROM idempotency_keys WHERE created_at < :before
                ORDER BY created_at LIMIT :limit {self._db.skip_locked}
                """,
                before=before,
                limit=limit,
            )
            await tx.execute_many(
                "DELETE FROM idempotency_keys WHERE tenant = :tenant AND key = :key", _keys(rows)
            )
        return len(rows)


def _keys(rows: Sequence[Row]) -> Sequence[Row]:
    """What to remove, one by one: found again by their keys, whatever a planner thinks of the list."""
    return [dict(row) for row in rows]
