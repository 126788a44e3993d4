"""Holding: which shards are this relay's, so that each is one relay's and all have about as many."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Coroutine

from relay.shard import FOREVER, SHARDS, Held, share
from relay.store import Store

log = logging.getLogger(__name__)
# A shard is held for so much longer than an attempt may last: a few beats, and some patience with a database.
SPARE = 10_000
CLOCKS_DIFFER = 2_000


class Holder:
    """Holds shards in the name of `relay`, each for `lease` milliseconds from the last beat.

    `take` readies what has come, before it counts as held; `let_go` returns when nothing of what goes is
    under way any more; `changed` is called when a shard has become free for others.
    """

    def __init__(
        self,
        store: Store,
        held: Held,
        *,
        relay: str,
        lease: int,
        take: Callable[[Collection[int]], Awaitable[None]],
        let_go: Callable[[Collection[int]], Awaitable[None]],
        changed: Callable[[], None],
        now: Callable[[], int],
    ) -> None:
        self._store, self._held, self._relay, self._lease = store, held, relay, lease
        self._take, self._let_go, self._changed, self._now = take, let_go, changed, now
        self._beating = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopping = False

    async def start(self) -> None:
        """Holds everything at once and for ever where no other relay can be; else begins to take part."""
        if self._store.database.alone:
            await self._take(range(SHARDS))
            self._held.take(range(SHARDS), since=0, until=FOREVER)
            return
        await self.beat()
        # Who has more than its share now gives some of it away.
        self._changed()

    async def beat(self) -> None:
        """Stays alive, takes what is free, gives away what is more than a fair share; idempotent."""
        async with self._beating:
            if self._stopping or self._store.database.alone:
                return
            now, before = self._now(), set(self._held.numbers)
            beat = await self._store.shards.beat(self._relay, now=now, lease=self._lease)
            if beat.ahead > CLOCKS_DIFFER:
                log.warning("relay.clocks_differ", extra={"ms": beat.ahead})
            if lost := set(self._held.staying).difference(beat.held):
                self._held.lose(lost)
                self._spawn(self._drop(lost))
            self._held.renew(until=now + self._lease)
            if fresh := set(beat.held) - before:
                await self._take(fresh)
                self._held.take(fresh, since=now, until=now + self._lease)
            surplus = sorted(self._held.staying)[share(beat.relays) :]
            if surplus:
                self._held.leave(surplus)
                for number in surplus:
                    self._spawn(self._give(number))
            if lost or fresh or surplus or beat.relays != self._held.relays:
                said = {"held": len(self._held.staying), "relays": beat.relays}
                log.info("relay.shards", extra=said)
            self._held.relays = beat.relays

    def wake(self) -> None:
        """Beats now rather than at the next tick."""
        if not self._stopping and not self._store.database.alone:
            self._spawn(self.beat())

    async def stop(self) -> None:
        """Gives everything away; nothing of it may be under way any more."""
        self._stopping = True
        async with self._beating:
            pass
        for task in self._tasks:
            task.cancel()
        if not self._store.database.alone:
            await self._store.shards.leave(self._relay)
            self._changed()

    async def _give(self, number: int) -> None:
        try:
            await self._let_go([number])
            await self._store.shards.release(self._relay, [number])
            self._held.lose([number])
        finally:
            # If it could not be given away, the next beat sees that it is too many again.
            self._held.stay([number])
        self._changed()

    async def _drop(self, numbers: Collection[int]) -> None:
        log.warning("relay.shards_lost", extra={"shards": len(numbers)})
        await self._let_go(numbers)

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("relay.shards_failed: %s", error)
