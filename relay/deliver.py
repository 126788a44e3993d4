"""Delivering: claim due deliveries, sign, send, settle. The hot loop.

Every destination has a lane. A lane holds in memory what can be sent soon, and no more: what waits
behind it waits in the store, and is never read ahead of others' work.
"""

import asyncio
import logging
import math
import random
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Collection, Coroutine, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from itertools import islice
from uuid import uuid4

from relay import event, signature
from relay.batch import Batch, insist
from relay.breaker import Breaker, State
from relay.delivery import Answer, Claimed, Code, Settlement, destination, settle
from relay.errors import StoreError
from relay.lane import PATIENCE, Lane
from relay.metrics import Metrics
from relay.redact import Redactor, credentials, traces
from relay.sender import Sender
from relay.shard import Held, shard_of
from relay.store import Store
from relay.store.events import Handoff
from relay.times import rfc3339
from relay.tracing import Tracing

log = logging.getLogger(__name__)
LEASE = 45_000
MARGIN = 5_000
# In memory at most: deliveries in all, bytes of bodies in all.
HELD, HELD_BYTES = 4_000, 64 * 1024 * 1024
SWEPT = 500
# Idle lanes are kept for what is known of their endpoints.
LANES_KEPT = 10_000
# How long at least a delivery waits for fresh URLs when its provider cannot give them now.
POSTPONED = 60_000
# A relay that stops offers the store its outcomes for so long.
LAST_TRIES = 5_000


class Deliverer:
    """Sends what is handed over and what comes due: round-robin over destinations, at most
    `endpoint_concurrency` at once to one and `concurrency` in all, a quarter of it kept for first
    attempts. Times are milliseconds.

    Only to the destinations of its `shards`; `ring` tells those who hold the others that there is work.

    `renew` is asked about an event whose URLs would be dead by a time: whether it may be sent as it is stored
    now. Until then its delivery is given back."""

    def __init__(
        self,
        store: Store,
        sender: Sender,
        *,
        schedule: Sequence[int],
        timeout: int,
        concurrency: int,
        endpoint_concurrency: int,
        shards: Held,
        ring: Callable[[str, int | str], None],
        renew: Callable[[str, int], Awaitable[bool]],
        metrics: Metrics,
        tracing: Tracing | None,
        now: Callable[[], int],
    ) -> None:
        self._store, self._sender, self._renewal, self._now = store, sender, renew, now
        self._metrics, self._tracing = metrics, tracing
        self._shards, self._ring = shards, ring
        self._schedule, self._timeout = schedule, timeout
        self._concurrency, self._most = concurrency, endpoint_concurrency
        self._retry_slots = max(1, concurrency * 3 // 4)
        self._unproven_slots = max(1, concurrency // 2)
        self._settle: Batch[Settlement, None] = Batch(self._write, observed=metrics.written("settle"))
        self._give_back: Batch[tuple[Claimed, int], None] = Batch(self._postpone)
        self._lanes: dict[str, Lane] = {}
        self._ready: deque[str] = deque()
        self._parked: dict[str, None] = {}
        self._held = self._held_bytes = self._sending = self._retrying = self._unproven = 0
        # Whose outcomes the store does not take now: nothing more is sent meanwhile.
        self._unwritten: set[str] = set()
        self._tries_end: float = math.inf
        self._tasks: set[asyncio.Task[None]] = set()
        self._renewing: dict[asyncio.Task[None], Claimed] = {}
        self._claiming = asyncio.Lock()
        self._over = asyncio.Event()  # an attempt has ended and is settled
        self._swept_to = ""
        self._woken = self._stopping = False
        self._traces = lru_cache(maxsize=1000)(_traces)
        self._stranger = Redactor()

    def handoff(self) -> Handoff:
        """Which fresh deliveries `accept` takes now, and the lease to insert them with."""
        taken: Counter[str] = Counter()
        elsewhere: set[int] = set()
        size, deadline = 0, self._deadline()

        def takes(destination: str, length: int) -> bool:
            nonlocal size
            if not self._shards.covers(destination, deadline):
                elsewhere.add(shard_of(destination))
                return False
            lane = self._lanes.get(destination)
            if (
                self._stopping
                or taken.total() >= HELD - self._held
                or size + length > HELD_BYTES - self._held_bytes
                or taken[destination] >= (lane or Lane()).room_for_fresh(self._now(), self._most)
            ):
                if lane is not None:
                    lane.backlog = True
                return False
            taken[destination] += 1
            size += length
            return True

        return Handoff(uuid4().hex, self._now() + self._lease, takes, elsewhere)

    def accept(self, claimed: Sequence[Claimed], handoff: Handoff) -> None:
        """Takes what was handed over and begins to send it, and tells other relays what is theirs."""
        for number in handoff.elsewhere:
            self._ring("deliveries", number)
        self._put(claimed)

    def _put(self, claimed: Sequence[Claimed]) -> None:
        """Into their lanes with deliveries that are leased to this process; a relay that is stopping gives
        them back."""
        if self._stopping:
            self._spawn(self._store.deliveries.release(claimed, now=self._now()))
            return
        for one in claimed:
            lane = self._lanes.get(one.destination)
            if lane is None:
                lane = self._lanes[one.destination] = Lane()
            if one.rate_limit is not None:
                # Another relay may have sent something just before it became ours.
                first = self._shards.since(one.destination) + 1000 / one.rate_limit
                lane.next_at = max(lane.next_at, first)
            lane.put(one)
            self._held += 1
            self._held_bytes += len(one.body)
            self._offer(one.destination, lane)
        self._pump()

    async def tick(self) -> None:
        """Claims what is due, a little of every destination; idempotent."""
        async with self._claiming:
            self._woken = False
            if self._stopping:
                return
            now = self._now()
            wanted, fresh = await self._sweep(now)
            budget = HELD - self._held
            if self._held_bytes >= HELD_BYTES or budget <= 0 or not (wanted or fresh):
                return
            # Everybody gets less rather than somebody nothing.
            share = max(1, budget // (len(wanted) + len(fresh)))
            fresh = {name: min(room, share) for name, room in list(fresh.items())[:budget]}
            wanted = {name: min(room, share) for name, room in list(wanted.items())[: budget - len(fresh)]}
            claimed = await self._store.deliveries.claim(
                wanted,
                fresh,
                now=now,
                lease=uuid4().hex,
                lease_until=now + self._lease,
                most_bytes=HELD_BYTES - self._held_bytes,
            )
            got = Counter(one.destination for one in claimed)
            self._put(claimed)
            for name, room in wanted.items():
                if name in self._lanes:
                    self._lanes[name].backlog = got[name] >= room

    def wake(self, destination: str | None = None) -> None:
        """Looks for due deliveries now rather than at the next tick, or has whoever sends them to that
        destination look."""
        if destination is not None and not self._shards.covers(destination, self._now()):
            self._ring("deliveries", shard_of(destination))
        elif not self._stopping and not self._woken:
            self._woken = True
            self._spawn(self.tick())

    def changed(self, endpoint_id: str) -> None:
        """The endpoint has changed: whoever sends to it forgets what it holds of it."""
        if not self._shards.covers(endpoint_id, self._now()):
            self._ring("endpoint", endpoint_id)
        self.forget(endpoint_id)

    def forget(self, endpoint_id: str) -> None:
        """What waits here for the endpoint goes back to the store, to be read anew."""
        lane = self._lanes.get(endpoint_id)
        if lane is None:
            return
        lane.well, lane.breaker = None, Breaker()
        if lane.waiting:
            lane.backlog = True
            self._spawn(self._store.deliveries.release(self._empty(lane), now=self._now()))

    def rotated(self, tenant: str) -> None:
        """The tenant has another signing secret: whoever sends to its callback URLs forgets what it holds."""
        self._ring("callbacks", tenant)
        self.forget_callbacks(tenant)

    def forget_callbacks(self, tenant: str) -> None:
        """As `forget`, for all of a tenant's callback URLs."""
        theirs = destination(tenant, None, None)
        for name in [name for name in self._lanes if name.startswith(theirs)]:
            self.forget(name)

    async def take(self, shards: Collection[int]) -> None:
        """Makes due at once what a relay had in hand for the destinations of these shards that is gone; one
        that gave them away left nothing."""
        now, left = self._now(), 0
        if self._store.database.alone:
            left = await self._store.deliveries.recover(now=now)
        else:
            after = ""
            while found := await self._store.deliveries.destinations(now=now, after=after, limit=SWEPT):
                after = found[-1][0]
                names = [name for name, _ in found if shard_of(name) in shards]
                if names:
                    left += await self._store.deliveries.recover(names, now=now)
        if left:
            log.info("delivery.recovered", extra={"deliveries": left})

    async def let_go(self, shards: Collection[int]) -> None:
        """Returns when nothing is on its way to the destinations of these shards, which it does not hold any
        more, and how it ended is written; what waits here goes back to the store."""
        async with self._claiming:
            pass  # what is being claimed is among it
        lanes = {name: lane for name, lane in self._lanes.items() if shard_of(name) in shards}
        for name, lane in lanes.items():
            # What was promised to be taken before may still be put in.
            while lane.waiting or lane.unsettled:
                if lane.waiting:
                    await self._store.deliveries.release(self._empty(lane), now=self._now())
                else:
                    self._over.clear()
                    await self._over.wait()
            if self._lanes.get(name) is lane:
                del self._lanes[name]

    def stop_claiming(self) -> None:
        """What is under way goes on."""
        self._stopping = True

    async def stop(self) -> None:
        """Claims nothing more, gives back what has not begun, and returns when the rest is settled."""
        self.stop_claiming()
        async with self._claiming:
            pass  # the last tick, if one is at it, has given back what it claimed
        self._ready.clear()
        unsent = [one for lane in self._lanes.values() for one in self._empty(lane)]
        for task, one in self._renewing.items():
            task.cancel()
            unsent.append(one)
        self._tries_end = self._now() + LAST_TRIES
        if unsent:
            try:
                await self._store.deliveries.release(unsent, now=self._now())
            except StoreError as error:
                log.error("delivery.not_given_back: %s", error)
        while self._tasks:
            await asyncio.wait(self._tasks)

    def breakers(self) -> Mapping[State, int]:
        """How many of the destinations that it remembers are in which state."""
        now = self._now()
        return Counter(lane.breaker.state(now) for lane in self._lanes.values())

    @property
    def in_hand(self) -> tuple[int, int]:
        """How many deliveries wait in memory, and how many are being sent."""
        return self._held - self._sending, self._sending

    @property
    def _lease(self) -> int:
        return max(LEASE, 3 * self._timeout)

    async def _sweep(self, now: int) -> tuple[dict[str, int], dict[str, int]]:
        """How many to claim of each destination: those known to have more, and the next ones in order; and
        how many more of what is fresh, where that has what is replayed in front of it."""
        found = await self._store.deliveries.destinations(now=now, after=self._swept_to, limit=SWEPT)
        self._swept_to = found[-1][0] if len(found) == SWEPT else ""
        if len(self._lanes) > LANES_KEPT:
            for name, lane in list(self._lanes.items()):
                if lane.is_idle(now, self._most):
                    del self._lanes[name]
        names = {name for name, is_due in found if is_due}
        names |= {name for name, lane in self._lanes.items() if lane.backlog}
        deadline = self._deadline()
        lanes = {
            name: self._lanes.get(name) or Lane() for name in names if self._shards.covers(name, deadline)
        }
        rooms = {name: lane.room(now, self._most) for name, lane in lanes.items()}
        fresh = {name: lane.passes(now, self._most) for name, lane in lanes.items() if lane.retries}
        return (
            {name: room for name, room in rooms.items() if room > 0},
            {name: room for name, room in fresh.items() if room > 0},
        )

    def _offer(self, name: str, lane: Lane) -> None:
        """Puts a lane into the ring when it has something that may be sent now."""
        if lane.ready or not lane.waiting or (name in self._parked and not lane.fresh):
            return
        now = self._now()
        if now < lane.breaker.paused_until or now < lane.next_at:
            self._wait(name, lane, max(lane.breaker.paused_until, lane.next_at) - now)
        elif self._may_send(lane):
            lane.ready = True
            self._ready.append(name)

    def _wait(self, name: str, lane: Lane, pause: float) -> None:
        if pause > PATIENCE:
            unsent = self._empty(lane)
            lane.backlog = False
            self._spawn(self._store.deliveries.release(unsent, now=self._now()))
            return
        lane.ready = True  # nobody else offers it meanwhile

        def again() -> None:
            lane.ready = False
            if not self._stopping:
                self._offer(name, lane)
                self._pump()

        asyncio.get_running_loop().call_later(pause / 1000, again)

    def _empty(self, lane: Lane) -> Sequence[Claimed]:
        unsent = [*lane.fresh, *lane.retries]
        lane.fresh.clear()
        lane.retries.clear()
        self._held -= len(unsent)
        self._held_bytes -= sum(len(one.body) for one in unsent)
        return unsent

    def _pump(self) -> None:
        while self._ready and self._sending < self._concurrency and not (self._stopping or self._unwritten):
            name = self._ready.popleft()
            lane = self._lanes.get(name)
            if lane is None:
                continue  # it was emptied in the ring, and then forgotten
            lane.ready = False
            if not lane.waiting or not self._may_send(lane):
                self._offer(name, lane)  # things have changed since it got in line
                continue
            unproven = not lane.is_proven(self._now())
            one = None
            if not unproven or self._unproven < self._unproven_slots:
                one = lane.take(retries_allowed=self._retrying < self._retry_slots)
            if one is None:
                # There are enough retries, or enough of what may hang, under way.
                self._parked[name] = None
                continue
            self._parked.pop(name, None)
            if not self._is_fit(one):
                self._offer(name, lane)
                continue
            lane.sending += 1
            lane.unsettled += 1
            self._sending += 1
            self._retrying += one.is_retry
            lane.rate_limit = one.rate_limit
            if one.rate_limit is not None:
                lane.next_at = max(self._now(), lane.next_at) + 1000 / one.rate_limit
            lane.begun[one.id] = self._now()
            self._unproven += unproven
            self._spawn(self._attempt(name, lane, one, unproven=unproven))
            self._offer(name, lane)

    def _is_fit(self, one: Claimed) -> bool:
        """Whether it may be sent now; otherwise it is not held here any more."""
        dies = one.expires_at is not None and one.expires_at <= self._deadline()
        is_ours = self._shards.covers(one.destination, self._deadline())
        if is_ours and not dies and not self._is_too_late(one):
            return True
        self._held -= 1
        self._held_bytes -= len(one.body)
        if not is_ours:
            self._spawn(self._give_back((one, self._now())))
        elif dies:
            one = replace(one, body=b"")
            self._renewing[self._spawn(self._renew(one))] = one
        return False

    def _spawn(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._renewing.pop(task, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            # The lease brings the delivery back; the loop goes on.
            traced = None if isinstance(error, StoreError) else error
            log.error("delivery.failed: %s", error, exc_info=traced)

    async def _renew(self, one: Claimed) -> None:
        """Nothing is held meanwhile, no slot and no body: a provider that hangs delays nobody's deliveries.

        The delivery is read anew then, so that what is sent is what is stored."""
        is_fit = await self._renewal(one.event_id, self._deadline())
        pause = 0 if is_fit else round(POSTPONED * (1 + _spread()))
        await self._give_back((one, self._now() + pause))
        if is_fit:
            self.wake()

    async def _attempt(self, name: str, lane: Lane, one: Claimed, *, unproven: bool) -> None:
        answer = news = None
        span = self._tracing.new_span() if self._tracing is not None else 0
        try:
            answer = await self._send(one, span)
        finally:
            self._sending -= 1
            lane.sending -= 1
            lane.begun.pop(one.id, None)
            self._unproven -= unproven
            if answer is not None:
                news = self._learn(lane, one, answer)
            self._retrying -= one.is_retry
            self._unpark()
            self._offer(name, lane)
            self._pump()
        try:
            if answer is not None:
                await self._log_and_settle(one, answer, news, span)
        finally:
            lane.unsettled -= 1
            self._over.set()
            self._held -= 1
            self._held_bytes -= len(one.body)
            if lane.backlog and lane.held <= lane.room(self._now(), self._most):
                self.wake()

    def _learn(self, lane: Lane, one: Claimed, answer: Answer) -> bool | None:
        """Whether the endpoint is well now, when that is news to the store."""
        if answer.code is Code.INTERNAL:
            return None
        before, now = lane.breaker, self._now()
        lane.breaker = before.after(answer, now=now, most=self._most, spread=_spread())
        if lane.breaker.trips > before.trips:
            pause = lane.breaker.paused_until - now
            log.warning("endpoint.paused", extra={"destination": one.destination, "ms": pause})
        if answer.status == 410 and one.endpoint_id:
            # Until this attempt's settlement cancels all the others, and they are forgotten.
            lane.breaker = replace(lane.breaker, paused_until=now + LEASE)
        known, lane.well = lane.well, answer.accepted
        return lane.well if known is not lane.well else None

    def _may_send(self, lane: Lane) -> bool:
        now = self._now()
        crowded = self._unproven * 4 >= self._unproven_slots
        return lane.sending < lane.slots(now, self._most, crowded=crowded) and now >= lane.next_at

    def _is_too_late(self, one: Claimed) -> bool:
        """Whether it waited too long here: it comes due again by itself, and may be another's by then."""
        return self._deadline() > one.lease_until

    @property
    def longest_attempt(self) -> int:
        """Within so many milliseconds an attempt is certainly over."""
        return self._timeout + MARGIN

    def _deadline(self) -> int:
        """When an attempt that begins now is certainly over."""
        return self._now() + self.longest_attempt

    def _unpark(self) -> None:
        """One attempt has ended: whoever waits for a slot of its kind may try again, two at a time."""
        for name in list(islice(self._parked, 2)):
            del self._parked[name]
            if name in self._lanes:
                self._offer(name, self._lanes[name])

    async def _send(self, one: Claimed, span: int) -> Answer | None:
        if self._is_too_late(one):
            return None
        now = self._now()
        if not one.secrets:
            message = "its secret cannot be opened: it was changed in the database; rotate it"
            return Answer(now, 0, code=Code.INTERNAL, message=message)
        try:
            headers = {**one.headers, **signature.headers(one.secrets, one.event_id, now // 1000, one.body)}
            if self._tracing is not None:
                headers.update(self._tracing.headers(one.generation_id or one.event_id, span))
            clean = partial(self._without_secrets, one)
            return await self._sender.send(one.url, one.body, headers, clean=clean)
        except Exception as error:
            log.error("delivery.internal: %s", error, exc_info=error)
            return Answer(now, 0, code=Code.INTERNAL, message="Relay could not make this attempt")

    def _without_secrets(self, one: Claimed, said: str) -> str:
        """What an endpoint said, or was said of it, without what only it and its owner know."""
        known = (*one.secrets, *one.headers.values())
        if not any(trace in said for trace in self._traces(known)):
            return self._stranger(said)
        return Redactor(*(secret for value in known for secret in credentials(value)))(said)

    async def _log_and_settle(self, one: Claimed, answer: Answer, news: bool | None, span: int) -> None:
        schedule = () if one.event_type in event.TRIED_ONCE else self._schedule
        outcome = settle(
            one, answer, schedule=schedule, now=self._now(), spread=_spread(), endpoint_is_well=news
        )
        self._metrics.settled(one, outcome)
        if self._tracing is not None:
            _trace(self._tracing, span, one, outcome)
        await self._keep_settling(one, outcome)
        log.info("delivery.attempted", extra=_line(one, outcome))

    async def _keep_settling(self, one: Claimed, outcome: Settlement) -> None:
        """Until the store takes it, or another may have the delivery: whoever was told is not told again."""

        def again() -> bool:
            self._unwritten.add(one.id)
            return self._now() < min(one.lease_until, self._tries_end)

        try:
            await insist(lambda: self._settle(outcome), again=again)
        finally:
            if one.id in self._unwritten:
                self._unwritten.remove(one.id)
                self._pump()

    async def _write(self, settlements: Sequence[Settlement]) -> Sequence[None]:
        for endpoint_id in await self._store.deliveries.settle(settlements, now=self._now()):
            self.forget(endpoint_id)
        return [None] * len(settlements)

    async def _postpone(self, postponed: Sequence[tuple[Claimed, int]]) -> Sequence[None]:
        await self._store.deliveries.postpone(postponed)
        return [None] * len(postponed)


def _traces(known: Sequence[str]) -> Sequence[str]:
    return [trace for value in known for trace in traces(credentials(value)[-1])]


def _spread() -> float:
    return random.random()  # noqa: S311 # jitter, not a secret


def _trace(tracing: Tracing, span: int, one: Claimed, outcome: Settlement) -> None:
    answer = outcome.answer
    attributes: dict[str, str | int | None] = {
        "http.request.method": "POST",
        "http.response.status_code": answer.status,
        "error.type": answer.code.value if answer.code is not None else None,
        "relay.event": one.event_id,
        "relay.event_type": one.event_type,
        "relay.delivery": one.id,
        "relay.endpoint": one.endpoint_id,
        "relay.attempt": outcome.number,
        "relay.status": outcome.status.value,
    }
    tracing.note(
        "attempt",
        one.generation_id or one.event_id,
        begun=answer.started_at,
        ended=answer.started_at + answer.duration_ms,
        kind="client",
        span=span,
        failed=not answer.accepted,
        attributes=attributes,
    )


def _line(one: Claimed, outcome: Settlement) -> Mapping[str, object]:
    """The one wide line of an attempt."""
    answer = outcome.answer
    return {
        "delivery": one.id,
        "event_id": one.event_id,
        "type": one.event_type,
        "generation": one.generation_id,
        "endpoint": one.endpoint_id,
        "attempt": outcome.number,
        "trigger": one.trigger.value,
        "status": outcome.status.value,
        "response": answer.status,
        "code": answer.code,
        "bytes": len(one.body),
        "ms": answer.duration_ms,
        "since_event_ms": answer.started_at - one.event_at,
        "again_at": rfc3339(outcome.due_at) if outcome.due_at is not None else None,
    }
