"""How accounts stand, at rest: what must survive a restart, and what one relay tells another."""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from relay.store.database import Database


@dataclass(frozen=True, slots=True)
class Kept:
    """What was kept of an account. `lent` is how many requests other relays may still make with it; less
    than nothing when they have made more."""

    state: Mapping[str, Any]
    lent: int


class Accounts:
    """Every statement about accounts; each method is one transaction."""

    def __init__(self, database: Database) -> None:
        self._db = database

    async def kept(self) -> Mapping[str, Kept]:
        """What was kept of each account, by its name."""
        async with self._db.read() as tx:
            rows = await tx.fetch("SELECT name, state, lent FROM accounts")
        return {row["name"]: Kept(json.loads(row["state"]), row["lent"]) for row in rows}

    async def take(self, names: Collection[str], *, holder: str, now: int) -> None:
        """From now on only this holder keeps these accounts; one that had them before keeps nothing more."""
        rows = [{"name": name, "holder": holder, "now": now} for name in sorted(names)]
        async with self._db.write() as tx:
            await tx.execute_many(_TAKE, rows)

    async def keep(
        self, states: Mapping[str, Mapping[str, Any]], lent: Mapping[str, int], *, holder: str, now: int
    ) -> None:
        """Writes the states of the accounts that the holder has, and lends so many requests more of each."""
        rows = [
            {
                "name": name,
                "state": json.dumps(states[name]),
                "more": lent.get(name, 0),
                "holder": holder,
                "now": now,
            }
            for name in sorted(states)
        ]
        async with self._db.write() as tx:
            await tx.execute_many(_KEEP, rows)

    async def borrow(self, name: str) -> bool:
        """Takes one of the requests that were lent; whether there was one."""
        async with self._db.write() as tx:
            taken = await tx.execute(
                "UPDATE accounts SET lent = lent - 1 WHERE name = :name AND lent > 0", name=name
            )
        return taken > 0

    async def draw(self, name: str) -> None:
        """Tells the holder that somebody else has made a request with its account, if there is a holder."""
        async with self._db.write() as tx:
            await tx.execute("UPDATE accounts SET lent = lent - 1 WHERE name = :name", name=name)


_TAKE = """
    INSERT INTO accounts (name, state, lent, holder, updated_at) VALUES (:name, '{}', 0, :holder, :now)
    ON CONFLICT (name) DO UPDATE SET holder = EXCLUDED.holder
"""
_KEEP = """
    UPDATE accounts SET state = :state, lent = lent + :more, updated_at = :now
    WHERE name = :name AND holder = :holder
"""
