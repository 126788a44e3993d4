"""What may go: only what has ended, is old enough, and is no longer on its way.

What another relay is just removing, or replaying, is left to it.
"""

import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from relay.ids import first_id
from relay.store.database import Database, Row, Transaction


@dataclass(frozen=True, slots=True)
class Step:
    """So many rows went; the next step begins `after`, or there is none when that is None."""

    removed: int
    after: str | None


class Retention:
    """Removal in steps; each method is one transaction, and looks at no more than `limit` rows of its kind,
    those that come `after` the last step's.

    One bound alone ends a step: of two, SQLite may read up to the other one, through all that is old. The
    LIMIT beside it tells planners what is so anyway. Where a row may go only when it has no others, an OFFSET
    keeps them from joining whole tables to find that out: those are looked up for one row after the other.
    """

    def __init__(self, database: Database) -> None:
        self._db = database
        # Seconds for which the last step kept others from writing.
        self.held = 0.0

    async def remove_attempts(self, *, before: int, limit: int, after: str = "") -> Step:
        """Attempts of finished deliveries that began before `before`."""
        async with self._db.read(browse=True) as tx:
            found = await tx.fetch(
                """
                SELECT id, delivery_id FROM attempts WHERE id > :after AND id < :before
                ORDER BY id LIMIT :limit
                """,
                after=after,
                before=first_id("att", before),
                limit=limit,
            )
        if not found:
            return Step(0, None)
        async with self._write() as tx:
            ended = await tx.fetch(
                f"""
                SELECT id FROM deliveries WHERE id IN (:ids) AND due_at IS NULL ORDER BY id
                {self._db.skip_locked}
                """,
                ids=sorted({row["delivery_id"] for row in found}),
            )
            free = {row["id"] for row in ended}
            gone = [{"id": row["id"]} for row in found if row["delivery_id"] in free]
            await tx.execute_many("DELETE FROM attempts WHERE id = :id", gone)
        return Step(len(gone), found[-1]["id"] if len(found) == limit else None)

    async def forget_bodies(self, *, before: int, limit: int, after: str = "") -> Step:
        """What endpoints answered to attempts that began before `before`; the attempts stay."""
        first = first_id("att", before)
        last = await self._last("attempts", after, first, limit)
        async with self._write() as tx:
            rows = await tx.fetch(
                f"""
                SELECT id FROM attempts
                WHERE id > :after AND id <= :end AND response_body <> ''
                ORDER BY id LIMIT :limit {self._db.skip_locked}
                """,
                after=after,
                end=last or first,
                limit=limit,
            )
            await tx.execute_many("UPDATE attempts SET response_body = NULL WHERE id = :id", _keys(rows))
        return Step(len(rows), last)

    async def remove_events(self, *, before: int, limit: int, after: str = "") -> Step:
        """Events older than `before` with no open delivery, with their deliveries and attempts. Events and
        deliveries together are about `limit`: an event goes whole."""
        first = first_id("evt", before)
        last = await self._last_event(after, first, limit)
        async with self._write() as tx:
            rows = await tx.fetch(
                f"""
                SELECT id FROM events WHERE id > :after AND id <= :end AND NOT EXISTS (
                    SELECT 1 FROM deliveries d WHERE d.event_id = events.id AND d.due_at IS NOT NULL
                    LIMIT 1 OFFSET 0
                ) ORDER BY id LIMIT :limit {self._db.skip_locked}
                """,
                after=after,
                end=last or first,
                limit=limit,
            )
            if rows:
                await _remove_events(tx, rows, skip_locked=self._db.skip_locked)
        return Step(len(rows), last)

    async def remove_generations(self, *, before: int, limit: int, after: str = "") -> Step:
        """Generations that ended before `before` and have nothing left to be asked or told."""
        first = first_id("gen", before)
        last = await self._last("generations", after, first, limit)
        async with self._write() as tx:
            rows = await tx.fetch(
                f"""
                SELECT id FROM generations
                WHERE id > :after AND id <= :end AND known_at < :before AND due_at IS NULL
                    AND NOT EXISTS (
                        SELECT 1 FROM events WHERE events.generation_id = generations.id LIMIT 1 OFFSET 0
                    )
                ORDER BY id LIMIT :limit {self._db.skip_locked}
                """,
                after=after,
                before=before,
                end=last or first,
                limit=limit,
            )
            await tx.execute_many("DELETE FROM generations WHERE id = :id", _keys(rows))
        return Step(len(rows), last)

    async def remove_audit(self, *, before: int, limit: int, after: str = "") -> Step:
        """Entries of the audit log that were written before `before`."""
        async with self._write() as tx:
            rows = await tx.fetch(
                f"""
                SELECT id FROM audit WHERE id > :after AND id < :before ORDER BY id LIMIT :limit
                {self._db.skip_locked}
                """,
                after=after,
                before=first_id("aud", before),
                limit=limit,
            )
            await tx.execute_many("DELETE FROM audit WHERE id = :id", _keys(rows))
        return Step(len(rows), rows[-1]["id"] if len(rows) == limit else None)

    async def remove_replays(self, *, before: int, limit: int, after: str = "") -> Step:
        """Replays that ended before `before`."""
        async with self._write() as tx:
            rows = await tx.fetch(
                f"""
                SELECT id FROM replays WHERE id > :after AND id < :before_id AND ended_at < :before
                ORDER BY id LIMIT :limit {self._db.skip_locked}
                """,
                after=after,
                before=before,
                before_id=first_id("rpl", before),
                limit=limit,
            )
            await tx.execute_many("DELETE FROM replays WHERE id = :id", _keys(rows))
        return Step(len(rows), rows[-1]["id"] if len(rows) == limit else None)

    async def remove_idempotency_keys(self, *, before: int, limit: int, after: str = "") -> Step:
        """Idempotency keys that were used before `before`; all of them may go, so each step begins anew."""
        async with self._write() as tx:
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
        return Step(len(rows), after if len(rows) == limit else None)

    @asynccontextmanager
    async def _write(self) -> AsyncIterator[Transaction]:
        begun = time.monotonic()
        try:
            async with self._db.write() as tx:
                begun = time.monotonic()
                yield tx
        finally:
            self.held = time.monotonic() - begun

    async def _last(self, table: str, after: str, before: str, limit: int) -> str | None:
        """The id up to which a step looks, None when fewer rows than `limit` are left: read while others may
        write."""
        async with self._db.read(browse=True) as tx:
            rows = await tx.fetch(
                f"""
                SELECT id FROM {table} WHERE id > :after AND id < :before
                ORDER BY id LIMIT 1 OFFSET :others
                """,
                after=after,
                before=before,
                others=limit - 1,
            )
        return str(rows[0]["id"]) if rows else None

    async def _last_event(self, after: str, before: str, limit: int) -> str | None:
        """The same for events, whose deliveries count as well."""
        async with self._db.read(browse=True) as tx:
            rows = await tx.fetch(
                """
                SELECT id, (SELECT COUNT(*) FROM deliveries d WHERE d.event_id = events.id) AS deliveries
                FROM events WHERE id > :after AND id < :before ORDER BY id LIMIT :limit
                """,
                after=after,
                before=before,
                limit=limit,
            )
        weight = 0
        for row in rows:
            weight += 1 + row["deliveries"]
            if weight >= limit:
                return str(row["id"])
        return None


async def _remove_events(tx: Transaction, rows: Sequence[Row], *, skip_locked: str) -> None:
    ended = await tx.fetch(
        f"SELECT id FROM deliveries WHERE event_id IN (:ids) AND due_at IS NULL {skip_locked}",
        ids=[row["id"] for row in rows],
    )
    await tx.execute_many("DELETE FROM attempts WHERE delivery_id = :id", _keys(ended))
    await tx.execute_many("DELETE FROM deliveries WHERE id = :id", _keys(ended))
    await tx.execute_many(
        """
        DELETE FROM events WHERE id = :id AND NOT EXISTS (SELECT 1 FROM deliveries WHERE event_id = :id)
        """,
        _keys(rows),
    )


def _keys(rows: Sequence[Row]) -> Sequence[Row]:
    """What to remove, one by one: found again by their keys, whatever a planner thinks of the list."""
    return [dict(row) for row in rows]
