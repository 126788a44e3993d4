"""Polling: claim due generations, ask their provider, hand on what it said."""

import asyncio
import logging
import random
from collections import Counter
from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from dataclasses import replace
from uuid import uuid4

from relay import account as accounts
from relay.asker import Asker
from relay.batch import insist
from relay.errors import Conflict, Limited, NotFound, ProviderError, StoreError
from relay.generation import ENDINGS, OPEN, Generation, LearnedBy, Update
from relay.health import Health, Status
from relay.hints import pause
from relay.ledger import BEFORE_LOSS, Ledger
from relay.metrics import Metrics
from relay.providers import Account
from relay.roster import Roster
from relay.schedule import AFTER_CALLBACK, MISSING_PAUSES, Ask, Asked, Report, first_ask, next_ask, sightings
from relay.shard import Held, shard_of
from relay.standing import Standing
from relay.store import Store
from relay.tracing import Tracing

log = logging.getLogger(__name__)
LEASE = 60_000
OVERDUE = 100
# Without a request to spare for so long, what is overdue is over unasked.
UNASKED_AFTER = 60_000
# Whether there are generations of accounts that are not there is looked up so often.
STRANGERS_EVERY = 60_000


class Poller:
    """Asks about what is due, at the accounts of the `shards` that this relay holds; `ring` tells those who
    hold the others. `record` takes reports (it is `Ingest.record`); `changed` is told when an account stops
    to work, and when it works again.

    Requests are booked in its ledger."""

    def __init__(
        self,
        store: Store,
        asker: Asker,
        roster: Roster,
        *,
        relay: str,
        shards: Held,
        ring: Callable[[str, int], None],
        record: Callable[[Report], Coroutine[None, None, Generation | None]],
        changed: Callable[[Account, Health], Coroutine[None, None, None]],
        metrics: Metrics,
        tracing: Tracing | None,
        now: Callable[[], int],
    ) -> None:
        self._store, self._asker, self._roster, self._metrics = store, asker, roster, metrics
        self._tracing = tracing
        self._shards, self._ring, self._record, self._now = shards, ring, record, now
        self._ledger = Ledger(
            store,
            roster,
            relay=relay,
            shards=shards,
            ring=ring,
            changed=lambda account, health: self._spawn(changed(account, health)),
            now=now,
        )
        self._strangers: Sequence[str] = ()  # accounts with open generations that are not there any more
        self._asking: set[asyncio.Task[None]] = set()
        self._tick = asyncio.Lock()
        self._over = asyncio.Event()  # a visit has ended
        self._looked_at = 0
        self._woken = self._stopping = False

    def standing(self, account: Account) -> Standing:
        """How an account stands, as far as this relay knows."""
        return self._ledger.standing(account)

    def held(self) -> Mapping[str, Standing]:
        """How the accounts stand that this relay asks with."""
        return self._ledger.held()

    async def resume(self) -> None:
        """Goes on where the last relay stopped: budgets, health, and what its generations have taught."""
        await self._look_for_strangers()
        if not self._store.database.alone:
            await self._ledger.study(self._roster)

    async def take(self, shards: Collection[int]) -> None:
        """Readies itself to ask at the accounts of these shards, as whoever held them has left them."""
        names = [name for name in self._roster if shard_of(name) in shards]
        strangers = [name for name in self._strangers if shard_of(name) in shards]
        # What a relay was asking about that is gone; one that gave them away left nothing.
        left = await self._store.generations.recover([*names, *strangers], now=self._now())
        if left:
            log.info("poll.recovered", extra={"generations": left})
        await self._ledger.take(names)

    async def let_go(self, shards: Collection[int]) -> None:
        """Returns when nobody is asked any more at the accounts of these shards, which it does not hold any
        more, and how they stand is written down."""
        async with self._tick:
            pass  # what is being claimed is among it
        names = [name for name in self._ledger.taken if shard_of(name) in shards]
        standings = self._ledger.standings
        while any(standings[name].under_way for name in names if name in standings):
            self._over.clear()
            await self._over.wait()
        await self._ledger.close(names)

    def first_ask(
        self, account: Account, *, now: int, deadline_at: int, job_known: bool, awaits_callback: bool
    ) -> Ask:
        """When a generation that is being watched from `now` on is asked about first."""
        return first_ask(
            account.pace,
            self.standing(account).plan(),
            now=now,
            deadline_at=deadline_at,
            job_known=job_known,
            awaits_callback=awaits_callback,
        )

    def wake(self, account: str | None = None) -> None:
        """Looks for due generations now rather than at the next tick, or has whoever holds the account
        look."""
        if account is not None and not self._shards.covers(account, self._now()):
            self._ring("generations", shard_of(account))
        elif not self._stopping and not self._woken:
            self._woken = True
            self._spawn(self.tick())

    def lend(self) -> None:
        """Somebody wants to borrow requests: that cannot wait until they are written down anyway."""
        self._ledger.hurry()
        self.wake()

    async def tick(self) -> None:
        """Claims what is due, of each account as much as may be asked now, and begins to ask; idempotent."""
        async with self._tick:
            self._woken = False
            if self._stopping:
                return
            await self._follow()
            now = self._now()
            await self._claim_overdue(now)
            held = self._ledger.held()
            rooms = {name: one.room(now) for name, one in held.items()}
            wanted = {name: room for name, room in rooms.items() if room > 0}
            due = await self._store.generations.claim(
                wanted, now=now, lease=uuid4().hex, lease_until=now + LEASE
            )
            await self._begin(due, asks=wanted)
            got = Counter(generation.account for generation in due)
            for name, standing in held.items():
                if rooms[name] > 0:
                    standing.short = got[name] >= rooms[name]
            await self._ledger.keep(now=now)

    async def account(self, generation: Generation) -> Account:
        """What it is asked about with. Raises Conflict when its tenant has that not any more."""
        account = await self._roster.seek(generation.account)
        if account is None or not account.is_of(generation.tenant):
            raise Conflict(_gone(generation.account))
        return account

    async def refresh(self, generation: Generation) -> Generation | None:
        """Asks now, whatever the schedule says; the generation afterwards, None when it is gone.

        Raises Conflict when its tenant has not the account any more or the job is not known, Limited when
        the account's budget is used up.
        """
        account = await self.account(generation)
        if generation.job_id is None and generation.claimed_job_id is None:
            raise Conflict("the job id is not known yet: set it, or wait for the provider's callback")
        await self._ledger.book(account)
        now = self._now()
        claimed = await self._store.generations.claim_one(
            generation.id, lease=uuid4().hex, lease_until=now + LEASE
        )
        if claimed is None:
            return generation
        return await self._ask(claimed, LearnedBy.REFRESH)

    async def look(self, tenant: str, name: str, job_id: str) -> Update:
        """What the provider says about a tenant's job now, for one request of the account's budget.

        Raises NotFound when the tenant has no such account any more, Limited when its budget is used up or
        its provider is only probed, ProviderError when the provider cannot be asked.
        """
        account = await self._roster.seek(name)
        if account is None or not account.is_of(tenant):
            raise NotFound(_gone(name))
        standing, now = self.standing(account), self._now()
        probes = standing.health.status is not Status.OK
        if probes and (standing.under_way or not standing.health.may_ask(now)):
            wait = max(0, standing.health.paused_until - now)
            raise Limited("this account is not asked for the moment", retry_after=wait)
        standing.under_way += probes
        try:
            await self._ledger.book(account)
            return await self._look(account, job_id)
        finally:
            standing.under_way -= probes
            self._over.set()

    def stop_claiming(self) -> None:
        """What is under way goes on."""
        self._stopping = True

    async def stop(self) -> None:
        """Claims nothing more and returns when every ask under way has been recorded."""
        self.stop_claiming()
        async with self._tick:
            pass  # the last tick, if one is at it, has begun what it claimed
        while self._asking:
            await asyncio.wait(self._asking)
        try:
            await self._ledger.write()
        except StoreError as error:
            log.error("poll.not_kept: %s", error)

    async def _follow(self) -> None:
        """Accounts may have come, changed or gone."""
        await self._roster.renew()
        some_are_gone = await self._ledger.follow()
        is_old = not self._store.database.alone and not 0 <= self._now() - self._looked_at < STRANGERS_EVERY
        if some_are_gone or is_old:
            await self._look_for_strangers()

    async def _claim_overdue(self, now: int) -> None:
        judged = {name: one for name, one in self._ledger.held().items() if not one.is_excused(now)}
        rooms = {name: room for name, one in judged.items() if (room := one.room(now)) > 0}
        unasked = [name for name, one in judged.items() if one.wait(now) > UNASKED_AFTER]
        strangers = [
            name for name in self._strangers if name not in self._roster and self._shards.covers(name, now)
        ]
        wanted = {**dict.fromkeys([*unasked, *strangers], OVERDUE), **rooms}
        overdue = await self._store.generations.claim_overdue(
            wanted, now=now, lease=uuid4().hex, lease_until=now + LEASE
        )
        await self._begin(overdue, asks=rooms)

    async def _begin(self, claimed: Sequence[Generation], *, asks: Collection[str]) -> None:
        """Visits what was claimed, and asks at those of its accounts that may be asked."""
        for one in claimed:
            standing = self._ledger.standings.get(one.account)
            if standing is not None and one.account in asks and (one.job_id or one.claimed_job_id):
                standing.budget.take(self._now())
        await self._ledger.count({one.account for one in claimed if one.account in asks})
        for one in claimed:
            # Claiming may have taken long, and the account may be another's by now, who finds it in time.
            if self._shards.covers(one.account, self._now() + BEFORE_LOSS):
                standing = self._ledger.standings.get(one.account)
                if standing is not None:
                    standing.under_way += 1
                self._spawn(self._visit(one, standing, asks=one.account in asks))

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._asking.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._asking.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            # The lease brings the generation back; the loop goes on.
            log.error("poll.failed: %s", error, exc_info=None if isinstance(error, StoreError) else error)

    async def _visit(self, generation: Generation, standing: Standing | None, *, asks: bool) -> None:
        try:
            by = LearnedBy.POLL if generation.hint_asks is None else LearnedBy.CALLBACK
            await self._ask(generation, by, asks=asks)
        finally:
            if standing is not None:
                standing.under_way -= 1
                self._over.set()
                if standing.short:
                    self.wake()

    async def _look(self, account: Account, job_id: str) -> Update:
        """Asks, and notes how the account is; the request is already booked."""
        standing = self.standing(account)
        try:
            reply = await self._asker.fetch(account, job_id)
            standing.budget.hear(reply.status, reply.headers, self._now())
            update = self._asker.read(account, reply)
        except ProviderError as error:
            self._metrics.asked(account.provider.name, account.name, error)
            await self._ledger.learn(account, error)
            raise
        self._metrics.asked(account.provider.name, account.name, None)
        await self._ledger.learn(account, None)
        return update

    async def _look_for_strangers(self) -> None:
        watched = await self._store.generations.watching_accounts()
        self._strangers = [name for name in watched if name not in self._roster]
        self._looked_at = self._now()

    async def _ask(
        self, generation: Generation, learned_by: LearnedBy, *, asks: bool = True
    ) -> Generation | None:
        update, error, missing = None, None, generation.missing
        # Who waits for a refresh is told at once that the store takes nothing.
        kept_until = 0 if learned_by is LearnedBy.REFRESH else generation.due_at or 0
        job_id = generation.job_id or generation.claimed_job_id
        # What is watched goes on, also when its tenant has lost the account meanwhile.
        account = await self._roster.seek(generation.account)
        if account is None:
            error = ProviderError("unreachable", _gone(generation.account))
        elif job_id is not None and asks:
            begun = self._now()
            try:
                update = await self._look(account, job_id)
            except ProviderError as problem:
                error = problem
            if self._tracing is not None:
                self._tracing.note(
                    "ask",
                    generation.id,
                    begun=begun,
                    ended=self._now(),
                    kind="client",
                    failed=error is not None,
                    attributes=_told(generation, learned_by, update, error),
                )
        if update is not None:
            missing = sightings(generation, now=self._now()) if update.is_missing else 0
            if 0 < missing <= len(MISSING_PAUSES):
                update = None
        if generation.job_id is None and job_id is not None and asks:
            generation, update = await self._check_claim(generation, job_id, update, missing)
        if account is not None:
            generation = self.standing(account).excuse(generation, now=self._now())
        if self._is_over(generation, update):
            update, learned_by = generation.timed_out(), LearnedBy.DEADLINE
        asked = self._asked(generation, account, update, error=error, missing=missing)
        report = Report(generation.id, learned_by, update, asked)
        after = await insist(
            lambda: self._record(report),
            again=lambda: not self._stopping and self._now() < kept_until,
        )
        if after is not None and account is not None and after.known_at != generation.known_at:
            self.standing(account).learn(after)
        return after

    async def _check_claim(
        self, generation: Generation, job_id: str, update: Update | None, missing: int
    ) -> tuple[Generation, Update | None]:
        """A job id that only a callback claimed is believed once the provider knows such a job of ours."""
        if update is not None and not missing:
            try:
                await self._store.generations.name_job(generation, job_id, ask=None)
                return replace(generation, job_id=job_id, claimed_job_id=None), update
            except Conflict:
                log.warning("poll.claim_refused", extra={"generation": generation.id, "job": job_id})
        elif missing <= len(MISSING_PAUSES):
            return generation, None
        await self._store.generations.drop_claim(generation)
        return replace(generation, claimed_job_id=None, hint_asks=None, missing=0), None

    def _is_over(self, generation: Generation, update: Update | None) -> bool:
        told = update is not None and update.status in ENDINGS
        return not told and generation.status in OPEN and self._now() >= generation.deadline_at

    def _asked(
        self,
        generation: Generation,
        account: Account | None,
        update: Update | None,
        *,
        error: ProviderError | None,
        missing: int,
    ) -> Callable[[Generation], Asked]:
        now = self._now()
        errors = generation.errors + 1 if error is not None else 0
        hint_asks = None
        if generation.hint_asks is not None and generation.hint_asks < len(AFTER_CALLBACK):
            hint_asks = generation.hint_asks + 1

        def asked(after: Generation) -> Asked:
            counted = replace(
                after,
                deadline_at=generation.deadline_at,
                errors=errors,
                missing=missing,
                hint_asks=hint_asks,
                claimed_job_id=generation.claimed_job_id,
            )
            ask = self._next_ask(counted, account, now, update, error)
            return Asked(
                generation_id=generation.id,
                lease=generation.lease or "",
                at=now,
                due_at=ask.due_at,
                chance=ask.chance,
                rate=ask.rate,
                open_at=now if update is not None and update.status not in ENDINGS else None,
                deadline_at=generation.deadline_at,
                outage=generation.outage,
                errors=errors,
                missing=missing,
                hint_asks=hint_asks,
                hints=generation.hints,
                hinted_at=now + pause(generation.hints + 1, account.pace.interval if account else 0),
                last_error=f"{error.code}: {error}" if error is not None else None,
            )

        return asked

    def _next_ask(
        self,
        generation: Generation,
        account: Account | None,
        now: int,
        heard: Update | None,
        error: ProviderError | None,
    ) -> Ask:
        if account is None:
            return Ask(None if generation.ended else generation.deadline_at)
        standing = self.standing(account)
        if error is not None and standing.health.status is not Status.OK:
            # It keeps its place: what is wrong is not about this job, and the account's pause holds it.
            generation = replace(generation, errors=1)
        return next_ask(
            generation,
            account.pace,
            standing.plan(generation),
            now=now,
            spread=_spread(),
            scarcity=standing.budget.scarcity(now),
            heard=heard,
            error=error,
        )


def _told(
    generation: Generation, learned_by: LearnedBy, update: Update | None, error: ProviderError | None
) -> Mapping[str, str | None]:
    """What a trace says of an ask."""
    return {
        "relay.generation": generation.id,
        "relay.provider": generation.provider,
        "relay.account": generation.account,
        "relay.learned_by": learned_by.value,
        "relay.status": update.status.value if update is not None and update.status is not None else None,
        "error.type": error.code if error is not None else None,
    }


def _gone(name: str) -> str:
    return f"there is no account {accounts.shown(name)!r} any more"


def _spread() -> float:
    return random.random()  # noqa: S311 # jitter, not a secret
