"""Holding: which shards are this relay's, so that each is one relay's and all have about as many."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Coroutine

from relay.errors import StoreError
from relay.shard import FOREVER, SHARDS, Held, share
from relay.store import Store

log = logging.getLogger(__name__)
# A shard is held for so much longer than an attempt may last: a few beats, and some patience with a database.
SPARE = 10_000
CLOCKS_DIFFER = 2_000
# After an outage, its own or the database's, a relay cannot tell who is gone: the others have so long to say
# that they are there.
PATIENCE = 5_000


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
        self._woken = self._stopping = False
        self._beaten_at: int | None = None
        self._takes_from = 0

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
            self._woken = False
            if self._stopping or self._store.database.alone:
                return
            now, before, staying = self._now(), set(self._held.numbers), set(self._held.staying)
            if self._beaten_at is not None and now - self._beaten_at > self._lease // 2:
                self._takes_from = now + PATIENCE
            takes = not 0 < self._takes_from - now <= PATIENCE
            beat = await self._store.shards.beat(self._relay, now=now, lease=self._lease, takes=takes)
            self._beaten_at = now
            if beat.ahead > CLOCKS_DIFFER:
                log.warning("relay.clocks_differ", extra={"ms": beat.ahead})
            # What is about to go anyway may have gone meanwhile.
            if lost := staying.difference(beat.held):
                self._held.leave(lost)
                self._spawn(self._drop(lost))
            self._held.renew(until=now + self._lease)
            if fresh := set(beat.held) - before:
                await self._take(fresh)
                self._held.take(fresh, since=self._now(), until=now + self._lease)
            surplus = sorted(self._held.staying)[share(beat.relays) :]
            self._begin_to_give(surplus)
            if lost or fresh or surplus or beat.relays != self._held.relays:
                said = {"held": len(self._held.staying), "relays": beat.relays}
                log.info("relay.shards", extra=said)
            self._held.relays = beat.relays

    def wake(self) -> None:
        """Beats now rather than at the next tick."""
        if not self._stopping and not self._woken and not self._store.database.alone:
            self._woken = True
            self._spawn(self.beat())

    def wind_down(self) -> None:
        """Takes nothing more, and gives each shard away as soon as nothing of it is under way."""
        if not self._stopping and not self._store.database.alone:
            self._spawn(self._give_all())
        self._stopping = True

    async def stop(self) -> None:
        """Returns when everything is given away; nothing of it may be under way any more."""
        self.wind_down()
        while self._tasks:
            await asyncio.wait(self._tasks)
        if self._store.database.alone:
            return
        try:
            await self._store.shards.leave(self._relay)
        except StoreError as error:
            # It runs out by itself.
            log.error("relay.shards_kept: %s", error)
        self._changed()

    async def _give_all(self) -> None:
        async with self._beating:
            pass  # what is being taken is among it
        numbers = sorted(self._held.staying)
        self._held.leave(numbers)
        # The others have room for it as soon as this one does not count.
        await self._store.shards.retire(self._relay)
        self._begin_to_give(numbers)

    def _begin_to_give(self, numbers: Collection[int]) -> None:
        self._held.leave(numbers)
        for number in numbers:
            self._spawn(self._give(number))

    async def _give(self, number: int) -> None:
        try:
            await self._let_go([number])
        except BaseException:
            # It is this relay's still, and too many again at the next beat.
            self._held.stay([number])
            raise
        try:
            await self._store.shards.release(self._relay, [number])
        finally:
            # Nobody knows whether a release that failed was one: the next beat says so.
            self._held.lose([number])
        self._changed()

    async def _drop(self, numbers: Collection[int]) -> None:
        log.warning("relay.shards_lost", extra={"shards": len(numbers)})
        try:
            await self._let_go(numbers)
        finally:
            self._held.lose(numbers)

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("relay.shards_failed: %s", error)
