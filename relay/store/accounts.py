"""How accounts stand, at rest: what must survive a restart, and what one relay tells another."""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from relay.store.database import Database


@dataclass(frozen=True, slots=True)
class Kept:
    """What was kept of an account. `lent` is how many requests other relays may still make with it, less
    than nothing when they have made more; `wanted` how many more they would make. `heard` is what one of them
    was answered last, unless the holder knows."""

    state: Mapping[str, Any]
    lent: int = 0
    wanted: int = 0
    heard: Mapping[str, Any] | None = None
    holder: str | None = None


_NOTHING: Mapping[str, Kept] = MappingProxyType({})


class Accounts:
    """Every statement about accounts; each method is one transaction."""

    def __init__(self, database: Database) -> None:
        self._db = database

    async def kept(self) -> Mapping[str, Kept]:
        """What was kept of each account, by its name."""
        async with self._db.read() as tx:
            rows = await tx.fetch("SELECT name, state, lent, wanted, heard, holder FROM accounts")
        return {
            row["name"]: Kept(
                json.loads(row["state"]),
                row["lent"],
                row["wanted"],
                json.loads(row["heard"]) if row["heard"] is not None else None,
                row["holder"],
            )
            for row in rows
        }

    async def take(self, names: Collection[str], *, holder: str, now: int) -> None:
        """From now on only this holder keeps these accounts; one that had them before keeps nothing more."""
        rows = [{"name": name, "holder": holder, "now": now} for name in sorted(names)]
        if rows:
            async with self._db.write() as tx:
                await tx.execute_many(_TAKE, rows)

    async def keep(
        self,
        states: Mapping[str, Mapping[str, Any]],
        lent: Mapping[str, int],
        seen: Mapping[str, Kept] = _NOTHING,
        *,
        holder: str,
        now: int,
    ) -> None:
        """Writes the states of the accounts that the holder has, lends so many requests more of each, and
        strikes out what it has seen to be wanted and heard."""
        rows = [
            {
                "name": name,
                "state": json.dumps(states[name]),
                "more": lent.get(name, 0),
                "wanted": seen[name].wanted if name in seen else 0,
                "heard": json.dumps(seen[name].heard) if name in seen else None,
                "holder": holder,
                "now": now,
            }
            for name in sorted(states)
        ]
        async with self._db.write() as tx:
            await tx.execute_many(_KEEP, rows)

    async def want(self, name: str) -> None:
        """Asks the holder to lend one request more."""
        async with self._db.write() as tx:
            await tx.execute("UPDATE accounts SET wanted = wanted + 1 WHERE name = :name", name=name)

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

    async def tell(self, name: str, heard: Mapping[str, Any]) -> None:
        """Tells the holder what the last request was answered that somebody else has made."""
        async with self._db.write() as tx:
            await tx.execute(
                "UPDATE accounts SET heard = :heard WHERE name = :name", name=name, heard=json.dumps(heard)
            )


_TAKE = """
    INSERT INTO accounts (name, state, lent, wanted, holder, updated_at)
    VALUES (:name, '{}', 0, 0, :holder, :now)
    ON CONFLICT (name) DO UPDATE SET holder = EXCLUDED.holder
"""
_KEEP = """
    UPDATE accounts
    SET state = :state, lent = lent + :more, wanted = wanted - :wanted,
        heard = CASE WHEN heard = :heard THEN NULL ELSE heard END, updated_at = :now
    WHERE name = :name AND holder = :holder
"""
