"""Several relays in one process over one PostgreSQL, which come and go, and whose shards can be looked at."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from relay.shard import SHARDS, shard_of, share
from relay.store.database import Database, Row

if TYPE_CHECKING:
    from tests.conftest import RunningRelay, World


@dataclass
class Fleet:
    """Relays over one database; `changes` are those of their configuration."""

    world: World
    url: str
    database: Database
    changes: dict[str, Any] = field(default_factory=dict)
    relays: list[RunningRelay] = field(default_factory=list)
    _names: dict[str, RunningRelay] = field(default_factory=dict)
    _stacks: dict[str, AsyncExitStack] = field(default_factory=dict)

    async def join(self, **changes: Any) -> RunningRelay:
        """One more relay, which works already but need not have its share yet."""
        before, stack = set(await self.names()), AsyncExitStack()
        running = self.world.running(**{"database": self.url, **self.changes, **changes})
        relay = await stack.enter_async_context(running)
        [name] = set(await self.names()) - before
        self._names[name], self._stacks[name] = relay, stack
        self.relays.append(relay)
        return relay

    async def joined(self, count: int, **changes: Any) -> Sequence[RunningRelay]:
        """So many more relays, once all have their shares."""
        found = [await self.join(**changes) for _ in range(count)]
        await self.settled()
        return found

    async def leave(self, relay: RunningRelay) -> None:
        """Stops a relay as SIGTERM would; returns when it has ended."""
        name = self.name(relay)
        self.relays.remove(relay)
        await self._stacks.pop(name).aclose()

    async def close(self) -> None:
        await asyncio.gather(*map(self.leave, list(self.relays)))

    async def settled(self) -> None:
        """Returns when every shard is held, by about as many relays as there are."""
        count = len(self.relays)
        async with asyncio.timeout(20):
            while True:
                held = Counter(row["holder"] for row in await self.rows("SELECT holder FROM shards"))
                if held.keys() == set(map(self.name, self.relays)) and max(held.values()) <= share(count):
                    return
                await asyncio.sleep(0.02)

    async def holder(self, name: str) -> RunningRelay | None:
        """Who holds the shard of an account or a destination; None while it changes hands."""
        [row] = await self.rows("SELECT holder FROM shards WHERE number = :number", number=shard_of(name))
        return self._names.get(row["holder"])

    async def others(self, name: str) -> Sequence[RunningRelay]:
        """Those that do not."""
        holder = await self.holder(name)
        return [one for one in self.relays if one is not holder]

    def name(self, relay: RunningRelay) -> str:
        """What a relay calls itself in the database."""
        return next(name for name, one in self._names.items() if one is relay)

    async def eventually(self, sql: str, count: int, **values: Any) -> None:
        """Returns once a statement counts so many as `n`."""
        async with asyncio.timeout(20):
            while (await self.rows(sql, **values))[0]["n"] != count:  # noqa: ASYNC110
                await asyncio.sleep(0.02)

    async def names(self) -> Sequence[str]:
        return [row["id"] for row in await self.rows("SELECT id FROM relays")]

    async def rows(self, sql: str, **values: Any) -> Sequence[Row]:
        async with self.database.read() as tx:
            return await tx.fetch(sql, **values)


def named(prefix: str, wanted: Callable[[int], bool]) -> str:
    """A name whose shard is as wished."""
    return next(name for number in range(100 * SHARDS) if wanted(shard_of(name := f"{prefix}{number}")))
