"""Polling: claim due generations, ask their provider, hand on what it said."""

import asyncio
import logging
import math
import random
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, replace
from typing import Literal
from uuid import uuid4

from relay.asker import Asker
from relay.errors import Conflict, Limited, NotFound, ProviderError, StoreError
from relay.generation import ENDINGS, OPEN, Code, Generation, LearnedBy, Update
from relay.providers import Account
from relay.schedule import AFTER_CALLBACK, MISSING_PAUSES, Asked, Report, next_ask
from relay.store import Store

log = logging.getLogger(__name__)
LEASE = 60_000
# Of one account: a provider that hangs costs the others nothing.
AT_ONCE = 32
OVERDUE = 100
FAILING = 3


class Budget:
    """An account's requests: nine tenths of `per_minute` evenly, one tenth in a burst; None is no limit."""

    def __init__(self, per_minute: int | None) -> None:
        self._pause = 60_000 / (per_minute * 0.9) if per_minute else 0.0
        self._burst = self._pause * max(0.0, (per_minute or 0) / 10 - 1)
        self._next = 0.0

    def available(self, now: int) -> int:
        """How many requests may be made at once now."""
        if not self._pause:
            return AT_ONCE
        # Nothing is booked further ahead than one pause: what is, was booked before the clock was set back.
        self._next = min(self._next, now + self._burst + self._pause)
        return max(0, int((now + self._burst - max(self._next, now)) / self._pause + 1))

    def take(self, now: int) -> None:
        """Books one request."""
        self._next = max(self._next, now) + self._pause

    def wait(self, now: int) -> int:
        """Milliseconds until a request may be made."""
        return 0 if self.available(now) else math.ceil(self._next - now - self._burst)


@dataclass(frozen=True, slots=True)
class Health:
    """How an account's last requests went. `status` is `ok`, `unauthorized` or `failing`."""

    status: Literal["ok", "unauthorized", "failing"] = "ok"
    failures: int = 0
    last_error: str | None = None
    last_error_at: int | None = None

    def after(self, error: ProviderError | None, now: int) -> "Health":
        if error is None:
            return replace(self, status="ok", failures=0)
        failures = self.failures + 1
        status: Literal["ok", "unauthorized", "failing"] = self.status
        if failures >= FAILING:
            status = "failing"
        if error.code == "unauthorized":
            status = "unauthorized"
        return Health(status, failures, f"{error.code}: {error}", now)


class Poller:
    """Asks about what is due. `record` takes reports (it is `Ingest.record`)."""

    def __init__(
        self,
        store: Store,
        asker: Asker,
        accounts: Mapping[str, Account],
        *,
        record: Callable[[Report], Coroutine[None, None, Generation | None]],
        now: Callable[[], int],
    ) -> None:
        self._store, self._asker, self._accounts = store, asker, accounts
        self._record, self._now = record, now
        self.health = {name: Health() for name in accounts}
        self._budgets = {name: Budget(account.requests_per_minute) for name, account in accounts.items()}
        self._asking: set[asyncio.Task[None]] = set()
        self._under_way: Counter[str] = Counter()
        self._more: set[str] = set()
        self._tick = asyncio.Lock()
        self._woken = self._stopping = False

    def wake(self) -> None:
        """Looks for due generations now rather than at the next tick."""
        if not self._stopping and not self._woken:
            self._woken = True
            self._spawn(self.tick())

    async def tick(self) -> None:
        """Claims what is due, of each account as much as may be asked now, and begins to ask; idempotent."""
        async with self._tick:
            self._woken = False
            if self._stopping:
                return
            now = self._now()
            lease, lease_until = uuid4().hex, now + LEASE
            overdue = await self._store.generations.claim_overdue(
                now=now, limit=OVERDUE, lease=lease, lease_until=lease_until
            )
            for generation in overdue:
                # Without a request to spare it is over all the same, unasked.
                may_ask = self._room(generation.account, now) > 0
                self._begin(generation, now, asks=may_ask)
            rooms = {name: self._room(name, now) for name in self._accounts}
            wanted = {name: room for name, room in rooms.items() if room > 0}
            due = await self._store.generations.claim(
                wanted, now=now, lease=uuid4().hex, lease_until=lease_until
            )
            for generation in due:
                self._begin(generation, now, asks=True)
            got = Counter(generation.account for generation in due)
            self._more = {name for name, room in wanted.items() if got[name] >= room}

    async def refresh(self, generation: Generation) -> Generation | None:
        """Asks now, whatever the schedule says; the generation afterwards, None when it is gone.

        Raises Conflict when the account is not configured or the job is not known, Limited when the
        account's budget is used up.
        """
        if generation.account not in self._accounts:
            raise Conflict(f"account {generation.account!r} is not configured any more")
        if generation.job_id is None and generation.claimed_job_id is None:
            raise Conflict("the job id is not known yet: set it, or wait for the provider's callback")
        budget, now = self._budgets[generation.account], self._now()
        if wait := budget.wait(now):
            raise Limited("this account's requests are used up for the moment", retry_after=wait)
        claimed = await self._store.generations.claim_one(
            generation.id, lease=uuid4().hex, lease_until=now + LEASE
        )
        if claimed is None:
            return generation
        budget.take(now)
        return await self._ask(claimed, LearnedBy.REFRESH)

    async def look(self, account: str, job_id: str) -> Update:
        """What the provider says about a job now, for one request of the account's budget.

        Raises NotFound for an account that is not configured, Limited when its budget is used up,
        ProviderError when the provider cannot be asked.
        """
        if account not in self._accounts:
            raise NotFound(f"account {account!r} is not configured")
        budget, now = self._budgets[account], self._now()
        if wait := budget.wait(now):
            raise Limited("this account's requests are used up for the moment", retry_after=wait)
        budget.take(now)
        return await self._asker.ask(self._accounts[account], job_id)

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

    def _room(self, account: str, now: int) -> int:
        """How many more jobs of an account may be asked about now."""
        if account not in self._accounts:
            return 0
        return min(AT_ONCE - self._under_way[account], self._budgets[account].available(now))

    def _begin(self, generation: Generation, now: int, *, asks: bool) -> None:
        self._under_way[generation.account] += 1
        if asks and (generation.job_id or generation.claimed_job_id):
            self._budgets[generation.account].take(now)
        self._spawn(self._visit(generation, asks=asks))

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._asking.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._asking.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            # The lease brings the generation back; the loop goes on.
            log.error("poll.failed: %s", error, exc_info=None if isinstance(error, StoreError) else error)

    async def _visit(self, generation: Generation, *, asks: bool) -> None:
        try:
            by = LearnedBy.POLL if generation.hint_asks is None else LearnedBy.CALLBACK
            await self._ask(generation, by, asks=asks)
        finally:
            self._under_way[generation.account] -= 1
            if generation.account in self._more:
                self.wake()

    async def _ask(
        self, generation: Generation, learned_by: LearnedBy, *, asks: bool = True
    ) -> Generation | None:
        update, error, missing = None, None, 0
        job_id = generation.job_id or generation.claimed_job_id
        account = self._accounts.get(generation.account)
        if account is None:
            error = ProviderError("unreachable", f"account {generation.account!r} is not configured any more")
        elif job_id is not None and asks:
            try:
                update = await self._asker.ask(account, job_id)
            except ProviderError as problem:
                error = problem
            self.health[account.name] = self.health[account.name].after(error, self._now())
        if update is not None and _says_missing(update):
            missing = generation.missing + 1
            if missing <= len(MISSING_PAUSES):
                update = None
        if generation.job_id is None and job_id is not None and asks:
            generation, update = await self._check_claim(generation, job_id, update, missing)
        if self._is_over(generation, update):
            update, learned_by = generation.timed_out(), LearnedBy.DEADLINE
        asked = self._asked(generation, account, error=error, missing=missing)
        return await self._record(Report(generation.id, learned_by, update, asked))

    async def _check_claim(
        self, generation: Generation, job_id: str, update: Update | None, missing: int
    ) -> tuple[Generation, Update | None]:
        """A job id that only a callback claimed is believed once the provider knows such a job of ours."""
        if update is not None and not missing:
            try:
                await self._store.generations.name_job(generation, job_id, due_at=None)
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
        self, generation: Generation, account: Account | None, *, error: ProviderError | None, missing: int
    ) -> Callable[[Generation], Asked]:
        now = self._now()
        errors = generation.errors + 1 if error is not None else 0
        hint_asks = None
        if generation.hint_asks is not None and generation.hint_asks < len(AFTER_CALLBACK):
            hint_asks = generation.hint_asks + 1
        last_error = f"{error.code}: {error}" if error is not None else None

        def asked(after: Generation) -> Asked:
            counted = replace(
                after,
                errors=errors,
                missing=missing,
                hint_asks=hint_asks,
                claimed_job_id=generation.claimed_job_id,
            )
            due_at: int | None = after.deadline_at
            if account is not None:
                due_at = next_ask(
                    counted,
                    account.pace,
                    now=now,
                    spread=random.random(),  # noqa: S311 # jitter, not a secret
                    error=error,
                )
            elif after.ended:
                due_at = None
            return Asked(
                generation_id=generation.id,
                lease=generation.lease or "",
                at=now,
                due_at=due_at,
                errors=errors,
                missing=missing,
                hint_asks=hint_asks,
                hints=generation.hints,
                last_error=last_error,
            )

        return asked


def _says_missing(update: Update) -> bool:
    return update.error is not None and update.error.code is Code.NOT_FOUND
