"""How accounts stood, at rest: what must survive a restart."""

import json
from collections.abc import Mapping
from typing import Any

from relay.store.database import Database


class Accounts:
    """Every statement about accounts; each method is one transaction."""

    def __init__(self, database: Database) -> None:
        self._db = database

    async def states(self) -> Mapping[str, Mapping[str, Any]]:
        """What was kept of each account, by its name."""
        async with self._db.read() as tx:
            rows = await tx.fetch("SELECT name, state FROM accounts")
        return {row["name"]: json.loads(row["state"]) for row in rows}

    async def keep(self, states: Mapping[str, Mapping[str, Any]], *, now: int) -> None:
        """Writes the states of these accounts."""
        rows = [{"name": name, "state": json.dumps(state), "now": now} for name, state in states.items()]
        async with self._db.write() as tx:
            await tx.execute_many(_KEEP, rows)

    async def drawn(self) -> Mapping[str, int]:
        """How many requests others have made with each account; each is told once."""
        async with self._db.read() as tx:
            rows = await tx.fetch("SELECT name, drawn FROM accounts WHERE drawn > 0")
        if not rows:
            return {}
        async with self._db.write() as tx:
            await tx.execute_many(
                "UPDATE accounts SET drawn = drawn - :drawn WHERE name = :name", [dict(row) for row in rows]
            )
        return {row["name"]: row["drawn"] for row in rows}

    async def draw(self, name: str, *, now: int) -> None:
        """Tells a relay that somebody else has made a request with its account."""
        async with self._db.write() as tx:
            await tx.execute(_DRAW, name=name, now=now)


_KEEP = """
    INSERT INTO accounts (name, state, drawn, updated_at) VALUES (:name, :state, 0, :now)
    ON CONFLICT (name) DO UPDATE SET state = EXCLUDED.state, updated_at = EXCLUDED.updated_at
"""
_DRAW = """
    INSERT INTO accounts (name, state, drawn, updated_at) VALUES (:name, '{}', 1, :now)
    ON CONFLICT (name) DO UPDATE SET drawn = accounts.drawn + 1
"""
