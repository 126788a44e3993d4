"""Live: whoever streams a tenant's events hears of each soon after it is stored, by whichever relay.

The store is the truth, and wake-ups are only hints. Ids are ordered by the time when they were made, but
transactions end in an order of their own, and clocks differ: an event may come to light behind younger ones.
So it is looked for as long as LATE after that time, and what was seen is remembered for longer. Who comes
back with the last id that it has is told again what was made up to LATE before: some of it may be new to it.
"""

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from relay.body import portions
from relay.endpoint import Endpoint
from relay.errors import Limited, StoreError
from relay.event import Event, is_test_of
from relay.ids import LATE, first_id, made_at
from relay.store import Store

log = logging.getLogger(__name__)
# All of that is looked through so often, what is younger whenever there may be something; seconds.
_SWEEP = 1.0
_YOUNG = 2_000
_QUIET = 0.02
# Other relays are told so often that somebody listens here; milliseconds.
_TELL = 10_000
# For each tenant, of one relay.
STREAMS = 50
# What a reader may lag behind, before it has to come back with the last id that it has.
MOST_EVENTS, MOST_BYTES = 1_000, 4 * 1024 * 1024
_PAGE, _IDS = 100, 1_000
# Who catches up holds so many bytes of bodies, or one body; and hears what comes when it lacks so few.
_PORTION = 512 * 1024
_NEARLY = 20


@dataclass(frozen=True, slots=True)
class Wish:
    """Which events somebody wants: all that fit whatever is given. `endpoint_id`: what this endpoint gets."""

    types: Collection[str] = ()
    generation_id: str | None = None
    account: str | None = None
    endpoint_id: str | None = None

    def fits(self, event: Event, wanted: Mapping[str, Collection[str]]) -> bool:
        """`wanted`: the ids of the events that endpoints get."""
        if self.types and event.type not in self.types:
            return False
        if self.generation_id is not None and event.generation_id != self.generation_id:
            return False
        if self.account is not None and event.account != self.account:
            return False
        return self.endpoint_id is None or event.id in wanted[self.endpoint_id]


class Reader:
    """One stream: iterate over it, and close it. It ends when the relay stops, when its endpoint is deleted
    or when it lags too far behind."""

    def __init__(self, channel: "_Channel", wish: Wish, after: str | None) -> None:
        self._channel, self.wish, self._after = channel, wish, after
        self._queue: deque[Event] = deque()
        self._size = 0
        self._news = asyncio.Event()
        self.ended = False
        # What to come back with before anything was given; None for who has come back.
        self.start: str | None = None

    def put(self, event: Event) -> None:
        self._queue.append(event)
        self._size += len(event.body)
        self._news.set()
        if len(self._queue) > MOST_EVENTS or (self._size > MOST_BYTES and len(self._queue) > 1):
            log.info("stream.dropped", extra={"tenant": event.tenant, "events": len(self._queue)})
            self.end()

    def end(self) -> None:
        """Gives nothing more; what it has not given yet is in the store."""
        self.ended = True
        self._queue.clear()
        self._channel.hearing.discard(self)
        self._news.set()

    def close(self) -> None:
        self.end()
        self._channel.readers.discard(self)

    async def __aiter__(self) -> AsyncIterator[Event]:
        if self._after is not None:
            async for event in self._channel.missed(self, self._after):
                if self.ended:
                    return
                yield event
        while True:
            while self._queue:
                event = self._queue.popleft()
                self._size -= len(event.body)
                yield event
            if self.ended:
                return
            self._news.clear()
            await self._news.wait()


class Live:
    """The streams of this relay. `ring` tells other relays."""

    def __init__(self, store: Store, *, ring: Callable[[str, str], None], now: Callable[[], int]) -> None:
        self._store, self._ring, self._now = store, ring, now
        self._channels: dict[str, _Channel] = {}
        # Which tenants' events other relays stream, and until when that was said.
        self._elsewhere: dict[str, int] = {}
        self._stopping = False

    async def open(self, tenant: str, wish: Wish, *, after: str | None = None) -> Reader:
        """A stream of what comes from now on, or of everything after the event with the id `after`. Raises
        Limited when the tenant has too many."""
        channel = self._channels.get(tenant)
        if channel is None or channel.is_over:
            self._channels = {name: one for name, one in self._channels.items() if not one.is_over}
            channel = self._channels[tenant] = _Channel(self._store, tenant, self._tell, self._now)
        if len(channel.readers) >= STREAMS:
            raise Limited(f"{STREAMS} streams of a tenant may be open at once", retry_after=1000)
        reader = Reader(channel, wish, after)
        channel.readers.add(reader)
        try:
            await channel.ready()
        except BaseException:
            reader.close()
            raise
        if self._stopping:
            reader.end()
        elif after is None:
            channel.hearing.add(reader)
            # Who comes back with it is given what was made from now on.
            reader.start = first_id("evt", self._now() + LATE)
        return reader

    def stored(self, tenants: Collection[str]) -> None:
        """There are new events of these tenants, stored by this relay."""
        for tenant in tenants:
            self.wake(tenant)
            if self._elsewhere.get(tenant, 0) > self._now():
                self._ring("events", tenant)

    def wake(self, tenant: str) -> None:
        """There may be new events of a tenant."""
        if tenant in self._channels:
            self._channels[tenant].wake()

    def heard(self, tenant: str) -> None:
        """Another relay streams this tenant's events."""
        now = self._now()
        self._elsewhere = {name: until for name, until in self._elsewhere.items() if until > now}
        self._elsewhere[tenant] = now + 3 * _TELL

    def stop(self) -> None:
        """Ends every stream at once."""
        self._stopping = True
        for channel in self._channels.values():
            channel.stop()

    async def close(self) -> None:
        """Returns when nothing is being read any more."""
        self.stop()
        await asyncio.gather(*(channel.close() for channel in self._channels.values()))

    def _tell(self, tenant: str) -> None:
        self._ring("streams", tenant)


class _Channel:
    """A tenant's events as they come to light, each read once for all of its readers."""

    def __init__(
        self, store: Store, tenant: str, tell: Callable[[str], None], now: Callable[[], int]
    ) -> None:
        self._store, self._tenant, self._tell, self._now = store, tenant, tell, now
        self.readers: set[Reader] = set()
        # Those that have caught up.
        self.hearing: set[Reader] = set()
        # In the order in which they came to light; whether they did so here, or were there at the beginning.
        self._seen: dict[str, bool] = {}
        self._swept_at = now() - LATE
        self._told_at = self._left_at = 0
        self._news, self._begun = asyncio.Event(), asyncio.Event()
        self._task = asyncio.create_task(self._run())

    @property
    def is_over(self) -> bool:
        return self._task.done()

    def wake(self) -> None:
        self._news.set()

    async def ready(self) -> None:
        """Returns when all that comes to light later is new. Raises StoreError when that cannot be told."""
        begun = asyncio.create_task(self._begun.wait())
        try:
            await asyncio.wait((begun, self._task), return_when=asyncio.FIRST_COMPLETED)
        finally:
            begun.cancel()
        if not self._begun.is_set():
            raise StoreError("the events cannot be read")

    def stop(self) -> None:
        for reader in list(self.readers):
            reader.end()

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.wait([self._task])

    async def missed(self, reader: Reader, after: str) -> AsyncIterator[Event]:
        """What was stored since the event `after` was told; then the reader hears what comes."""
        told = {after}
        settled = first_id("evt", max(0, self._now() - LATE))
        if self._store.database.alone and self._seen.get(after):
            # Only this relay can have told it: in the order of ids, or as it came to light.
            seen = list(self._seen)
            place = seen.index(after)
            cursor = min(after, settled)
            told |= {id_ for id_ in seen[:place] if id_ < after}
            missed = [id_ for id_ in seen[place + 1 :] if id_ <= cursor]
        else:
            cursor = first_id("evt", max(0, made_at(after) - LATE))
            missed = []
        while True:
            async for event in self._each(reader, missed):
                yield event
            told.update(missed)
            # What is older than LATE changes no more.
            settled = max(cursor, first_id("evt", max(0, self._now() - LATE)))
            while cursor < settled:
                ids = await self._store.events.ids(self._tenant, after=cursor, limit=_PAGE)
                cursor = ids[-1] if len(ids) == _PAGE and ids[-1] < settled else settled
                async for event in self._each(
                    reader, [id_ for id_ in ids if id_ <= cursor and id_ not in told]
                ):
                    yield event
            told = {id_ for id_ in told if id_ > cursor}
            missed = [id_ for id_ in self._seen if id_ > cursor and id_ not in told]
            if reader.ended or len(missed) < _NEARLY:
                break
        if not reader.ended:
            self.hearing.add(reader)
        async for event in self._each(reader, missed):
            yield event

    async def _each(self, reader: Reader, ids: Sequence[str]) -> AsyncIterator[Event]:
        """What the reader wants of these, in their order, read at its pace."""
        for place in range(0, len(ids), _PAGE):
            some = ids[place : place + _PAGE]
            sizes = await self._store.events.sizes(some)
            endpoints = await self._endpoints([reader])
            for portion in portions([id_ for id_ in some if id_ in sizes], sizes, _PORTION):
                if reader.ended:
                    return
                events = await self._read(portion)
                wanted = await _wanted(endpoints, events)
                for event in events:
                    if reader.wish.fits(event, wanted):
                        yield event

    async def _run(self) -> None:
        # What is there already is not news.
        if not await self._try(self._begin):
            return
        while not self._is_deserted():
            with suppress(TimeoutError):
                async with asyncio.timeout(_SWEEP):
                    await self._news.wait()
                    # What comes together is read together.
                    await asyncio.sleep(_QUIET)
            self._news.clear()
            await self._try(self._look)
            now = self._now()
            if self.readers and not 0 <= now - self._told_at < _TELL:
                self._told_at = now
                self._tell(self._tenant)

    async def _try(self, work: Callable[[], Awaitable[None]]) -> bool:
        try:
            await work()
        except Exception as error:
            # It is tried again at the next tick, and nothing is passed over.
            log.error("stream.not_read: %s", error, exc_info=None if isinstance(error, StoreError) else error)
            return False
        return True

    async def _begin(self) -> None:
        now = self._now()
        self._seen = dict.fromkeys(await self._new(now - 2 * LATE), False)
        self._swept_at = now
        self._begun.set()
        self._tell(self._tenant)
        self._told_at = now

    def _is_deserted(self) -> bool:
        """Whether nobody has read for a while: who comes back soon is told just what it missed."""
        now = self._now()
        if self.readers:
            self._left_at = now
        return now - self._left_at > LATE

    async def _look(self) -> None:
        now = self._now()
        is_sweep = not 0 <= now - self._swept_at < _SWEEP * 1000
        ids = await self._new(min(now, self._swept_at) - LATE if is_sweep else now - _YOUNG)
        for place in range(0, len(ids), _PAGE):
            # Seen when it is in every queue: who catches up meanwhile takes it from here, or from there.
            some = ids[place : place + _PAGE]
            events = await self._read(some) if self.hearing else []
            wanted: Mapping[str, Collection[str]] = {}
            while events and any(one.wish.endpoint_id not in (None, *wanted) for one in self.hearing):
                wanted = await _wanted(await self._endpoints(list(self.hearing)), events)
            self._seen |= dict.fromkeys(some, True)
            for event in events:
                for reader in list(self.hearing):
                    if reader.wish.fits(event, wanted):
                        reader.put(event)
        if is_sweep:
            self._swept_at = now
            oldest = first_id("evt", max(0, now - 2 * LATE))
            while self._seen and (first := next(iter(self._seen))) < oldest:
                del self._seen[first]

    async def _new(self, since: int) -> Sequence[str]:
        """Ids of what was not seen yet, of everything made since then."""
        found, cursor = list[str](), first_id("evt", max(0, since))
        while True:
            page = await self._store.events.ids(self._tenant, after=cursor, limit=_IDS)
            found += [id_ for id_ in page if id_ not in self._seen]
            if len(page) < _IDS:
                return found
            cursor = page[-1]

    async def _read(self, ids: Sequence[str]) -> Sequence[Event]:
        known = {event.id: event for event in await self._store.events.get_many(ids, browse=True)}
        return [known[id_] for id_ in ids if id_ in known]

    async def _endpoints(self, readers: Sequence[Reader]) -> Mapping[str, Endpoint | None]:
        """As they are now, those that readers name; a stream of one that is gone ends."""
        wanted = sorted({one.wish.endpoint_id for one in readers if one.wish.endpoint_id is not None})
        found = {id_: await self._store.endpoints.get(self._tenant, id_) for id_ in wanted}
        for reader in readers:
            if reader.wish.endpoint_id is not None and found[reader.wish.endpoint_id] is None:
                reader.end()
        return found


async def _wanted(
    endpoints: Mapping[str, Endpoint | None], events: Sequence[Event]
) -> Mapping[str, Collection[str]]:
    """The ids of what each of the endpoints gets."""
    wanted: dict[str, set[str]] = {id_: set() for id_ in endpoints}
    for event in events if endpoints else ():
        for id_, endpoint in endpoints.items():
            if endpoint is not None and (endpoint.wants(event) or is_test_of(event, id_)):
                wanted[id_].add(event.id)
            # Others get on between them.
            await asyncio.sleep(0)
    return wanted
