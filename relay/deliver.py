"""Delivering: claim due deliveries, sign, send, settle. The hot loop."""

import asyncio
import logging
import random
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from uuid import uuid4

from relay import event, signature
from relay.batch import Batch
from relay.delivery import Answer, Claimed, Code, Settlement, settle
from relay.sender import Sender
from relay.store import Store
from relay.store.events import Handoff

log = logging.getLogger(__name__)
# What is taken into memory; the rest waits in the store.
HELD = 2_000
LEASE = 45_000
MARGIN = 5_000


class Lane:
    """The deliveries to one endpoint that are in memory, and how many of them are being sent."""

    __slots__ = ("sending", "waiting")

    def __init__(self) -> None:
        self.waiting: deque[Claimed] = deque()
        self.sending = 0


class Deliverer:
    """Sends what is handed over and what comes due: round-robin over endpoints, at most
    `endpoint_concurrency` at once to one and `concurrency` in all. Times are milliseconds."""

    def __init__(
        self,
        store: Store,
        sender: Sender,
        *,
        schedule: Sequence[int],
        timeout: int,
        concurrency: int,
        endpoint_concurrency: int,
        now: Callable[[], int],
    ) -> None:
        self._store, self._sender, self._now = store, sender, now
        self._schedule, self._timeout = schedule, timeout
        self._concurrency, self._endpoint_concurrency = concurrency, endpoint_concurrency
        self._settle: Batch[Settlement, None] = Batch(self._write)
        self._lanes: dict[str, Lane] = {}
        self._ready: deque[str] = deque()
        self._held = 0
        self._sending = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._claiming = asyncio.Lock()
        self._stopping = False

    def handoff(self) -> Handoff:
        """How many fresh deliveries `accept` takes now, and the lease to insert them with."""
        room = 0 if self._stopping else max(0, HELD - self._held)
        return Handoff(uuid4().hex, self._now() + self._lease, room)

    def accept(self, claimed: Sequence[Claimed]) -> None:
        """Takes deliveries that are leased to this process and begins to send them."""
        for one in claimed:
            key = one.endpoint_id or one.url
            lane = self._lanes.get(key)
            if lane is None:
                lane = self._lanes[key] = Lane()
            lane.waiting.append(one)
            if len(lane.waiting) == 1 and lane.sending < self._endpoint_concurrency:
                self._ready.append(key)
        self._held += len(claimed)
        self._pump()

    async def tick(self) -> None:
        """Claims what is due; idempotent."""
        async with self._claiming:
            room = HELD - self._held
            if self._stopping or room <= 0:
                return
            now = self._now()
            self.accept(
                await self._store.deliveries.claim(
                    now=now, limit=min(room, 500), lease=uuid4().hex, lease_until=now + self._lease
                )
            )

    def wake(self) -> None:
        """Looks for due deliveries now rather than at the next tick."""
        if not self._stopping:
            self._spawn(self.tick())

    async def stop(self) -> None:
        """Claims nothing more, gives back what has not begun, and returns when the rest is settled."""
        self._stopping = True
        unsent = [one for lane in self._lanes.values() for one in lane.waiting]
        self._ready.clear()
        for lane in self._lanes.values():
            lane.waiting.clear()
        self._held -= len(unsent)
        if unsent:
            await self._store.deliveries.release(unsent, now=self._now())
        while self._tasks:
            await asyncio.wait(self._tasks)

    @property
    def _lease(self) -> int:
        return max(LEASE, 3 * self._timeout)

    def _pump(self) -> None:
        while self._ready and self._sending < self._concurrency:
            key = self._ready.popleft()
            lane = self._lanes[key]
            one = lane.waiting.popleft()
            lane.sending += 1
            self._sending += 1
            self._spawn(self._attempt(key, lane, one))
            if lane.waiting and lane.sending < self._endpoint_concurrency:
                self._ready.append(key)

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            # The lease brings the delivery back; the loop goes on.
            log.error("delivery.failed: %s", error, exc_info=error)

    async def _attempt(self, key: str, lane: Lane, one: Claimed) -> None:
        try:
            answer = await self._send(one)
        finally:
            self._sending -= 1
            lane.sending -= 1
            if lane.waiting:
                if lane.sending == self._endpoint_concurrency - 1:
                    self._ready.append(key)
            elif not lane.sending:
                del self._lanes[key]
            self._pump()
        try:
            if answer is not None:
                await self._log_and_settle(one, answer)
        finally:
            self._held -= 1

    async def _send(self, one: Claimed) -> Answer | None:
        now = self._now()
        if now + self._timeout + MARGIN > one.lease_until:
            # It waited too long here: it comes due again by itself, and may be another's by then.
            return None
        try:
            headers = signature.headers(one.secrets, one.event_id, now // 1000, one.body)
            return await self._sender.send(one.url, one.body, {**one.headers, **headers})
        except Exception as error:
            log.error("delivery.internal: %s", error, exc_info=error)
            return Answer(now, 0, code=Code.INTERNAL, message="Relay could not make this attempt")

    async def _log_and_settle(self, one: Claimed, answer: Answer) -> None:
        # A test is for somebody who looks at it now: it is not tried again for days.
        schedule = () if one.event_type == event.TEST else self._schedule
        outcome = settle(
            one,
            answer,
            schedule=schedule,
            now=self._now(),
            spread=random.random(),  # noqa: S311 # jitter, not a secret
        )
        await self._settle(outcome)
        log.info(
            "delivery.attempted",
            extra={
                "delivery": one.id,
                "event": one.event_id,
                "endpoint": one.endpoint_id,
                "attempt": outcome.number,
                "status": outcome.status.value,
                "response": answer.status,
                "code": answer.code,
                "ms": answer.duration_ms,
            },
        )

    async def _write(self, settlements: Sequence[Settlement]) -> Sequence[None]:
        return await self._store.deliveries.settle(settlements, now=self._now())
