"""The ledger: how every account stands, and which of its requests are booked.

The relay that holds an account keeps its page, and writes it down about once a second; the others read there.
One of them that needs a request of its own asks the holder to lend one, and tells it what was answered.
"""

import asyncio
import math
import random
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any

from relay.budget import AT_ONCE, Budget
from relay.errors import Limited, ProviderError
from relay.health import Health, Status
from relay.providers import Account
from relay.shard import Held, shard_of
from relay.standing import Standing
from relay.store import Store
from relay.store.accounts import Kept

# What is known of the accounts is written down so often, and what others know is read.
KEPT_EVERY = 700
# Who wants to borrow a request looks for it after so many seconds each; soon after that it is void.
BORROWING = (0.03, 0.05, 0.1, 0.2, 0.4, 0.7)
LENT_FOR = 2_000
# No request begins so short before the account may be another relay's.
BEFORE_LOSS = 5_000
# Of an account's past so much is read at the start to learn from.
LEARNED_FROM = 500


class Ledger:
    """The `standings` of the accounts: those of its `shards` are this relay's to keep, others are as their
    holders wrote them down last. `accounts` may come, change and go. `ring` tells other relays; `changed` is
    told when an account stops to work, and when it works again."""

    def __init__(
        self,
        store: Store,
        accounts: Mapping[str, Account],
        *,
        relay: str,
        shards: Held,
        ring: Callable[[str, int], None],
        changed: Callable[[Account, Health], None],
        now: Callable[[], int],
    ) -> None:
        self._store, self._accounts, self._relay, self._shards = store, accounts, relay, shards
        self._ring, self._changed, self._now = ring, changed, now
        self.standings: dict[str, Standing] = {}
        self._known: dict[str, Account] = {}  # as they were when their standings were looked at last
        self.taken: set[str] = set()  # those that this relay has put its name to
        self._kept_at = 0
        self._writing = asyncio.Lock()
        self._news: set[str] = set()  # accounts of which something is not written down yet

    def holds(self, name: str) -> bool:
        """Whether this relay alone asks with an account, and will long enough for a request."""
        return name in self.taken and self._shards.covers(name, self._now() + BEFORE_LOSS)

    def held(self) -> dict[str, Standing]:
        """The accounts that this relay asks with, alone."""
        return {name: one for name, one in self.standings.items() if self.holds(name)}

    def standing(self, account: Account) -> Standing:
        """How an account stands, as far as this relay knows."""
        if account.name not in self.standings:
            self.standings[account.name], self._known[account.name] = _unknown(account), account
        return self.standings[account.name]

    async def follow(self) -> bool:
        """Takes the accounts of its shards that are new, begins anew with those that were changed, and
        forgets those that are gone; whether any are."""
        gone = self.standings.keys() - self._accounts.keys()
        for name in gone:
            self._forget(name)
        now = self._now()
        for name, standing in self.standings.items():
            if self._known[name] is not self._accounts[name]:
                self._adapt(standing, self._known[name], self._accounts[name])
        await self.take(
            [name for name in self._accounts if name not in self.taken and self._shards.covers(name, now)]
        )
        return bool(gone)

    async def take(self, names: Collection[str]) -> None:
        """These accounts are this relay's to keep."""
        if not names:
            return
        await self._store.accounts.take(names, holder=self._relay, now=self._now())
        await self.study(names)
        self.taken.update(names)

    async def study(self, names: Iterable[str]) -> None:
        """Reads how accounts were left, and what their generations have taught."""
        names, kept = list(names), await self._store.accounts.kept()
        for name in names:
            if name not in self._accounts:
                continue  # it has just been deleted
            self.standings.pop(name, None)
            standing = self.standing(self._accounts[name])
            standing.lent_at = self._now()
            if name in kept:
                standing.resume(kept[name].state)
                standing.lent = kept[name].lent
            for generation in await self._store.generations.ended(name, limit=LEARNED_FROM):
                standing.learn(generation)

    async def book(self, account: Account) -> None:
        """Books one request of an account, whoever holds it. Raises Limited when its budget is used up."""
        name, budget, now = account.name, self.standing(account).budget, self._now()
        if wait := budget.wait(now):
            raise Limited("this account's requests are used up for the moment", retry_after=wait)
        if self.holds(name):
            budget.take(now)
            await self.count([name])
        elif budget.is_limited:
            await self._borrow(account)
        else:
            await self._store.accounts.draw(name)

    async def count(self, names: Collection[str]) -> None:
        """Writes down at once what is booked where a day has only so many requests: whoever has the account
        next must know of them, even if this relay dies now."""
        known = [(name, self.standings[name]) for name in names if name in self.standings]
        await self._write([name for name, one in known if one.budget.per_day is not None], {}, {})

    async def learn(self, account: Account, error: ProviderError | None) -> None:
        """How an account is, by a request that was made with it; its holder learns of what is news."""
        if self._accounts.get(account.name) is not account:
            return  # it was changed meanwhile: the answer is to the one it was
        health = self.standing(account).health
        if self._shards.covers(account.name, self._now()):
            self._note(account, error)
        elif error is not None or health.failures or health.status is not Status.OK:
            await self._store.accounts.tell(account.name, _told(error, self._now()))

    def hurry(self) -> None:
        """There is something to write down that cannot wait."""
        self._kept_at = 0

    async def keep(self, *, now: int) -> None:
        """As `write`, when it is time to."""
        if not 0 <= now - self._kept_at < KEPT_EVERY:
            self._kept_at = now
            await self.write()

    async def write(self) -> None:
        """Writes down what is new of the accounts that it holds, and reads what others wrote."""
        kept, lent, seen = await self._store.accounts.kept(), dict[str, int](), dict[str, Kept]()
        held = self.held()
        for name, one in kept.items():
            if name in held:
                lent[name], answered = self._lend(held[name], one)
                seen[name] = replace(one, wanted=answered)
                if one.heard is not None and name in self._accounts:
                    self._hear(self._accounts[name], one.heard)
                if lent[name] or answered or one.heard is not None:
                    self._news.add(name)
            elif name in self._accounts and not self._shards.has(name):
                self.standing(self._accounts[name]).observe(one.state, one.lent)
        # Whoever hung while it took an account may have put its name to it later.
        await self._store.accounts.take(
            [name for name in held if name not in kept or kept[name].holder != self._relay],
            holder=self._relay,
            now=self._now(),
        )
        names, self._news = self._news, set()
        try:
            await self._write([name for name in names if name in held], lent, seen)
        except BaseException:
            # It is written down with what comes next.
            self._news |= names
            raise

    async def close(self, names: Collection[str]) -> None:
        """Writes down how these accounts stand, which are not this relay's to keep any more."""
        await self._write(names, {}, {})
        self.taken.difference_update(names)

    def _forget(self, name: str) -> None:
        self.taken.discard(name)
        del self.standings[name], self._known[name]

    def _adapt(self, standing: Standing, before: Account, account: Account) -> None:
        self._known[account.name] = account
        standing.pace = account.pace
        budget = standing.budget
        budget.per_minute, budget.per_day = account.requests_per_minute, account.requests_per_day
        if (before.api_key, before.base_url) != (account.api_key, account.base_url):
            standing.health = standing.health.tried_at_once()
            self._news.add(account.name)
            self.hurry()

    async def _write(self, names: Collection[str], lent: Mapping[str, int], seen: Mapping[str, Kept]) -> None:
        if not names:
            return
        async with self._writing:  # what is known later is written later
            states = {name: self.standings[name].kept() for name in names if name in self.standings}
            await self._store.accounts.keep(states, lent, seen, holder=self._relay, now=self._now())

    async def _borrow(self, account: Account) -> None:
        """Makes a request that the account's holder books. Raises Limited when it does not in time."""
        name = account.name
        await self._store.accounts.want(name)
        self._ring("account", shard_of(name))
        for seconds in BORROWING:
            await asyncio.sleep(seconds)
            if await self._store.accounts.borrow(name):
                return
        wait = max(KEPT_EVERY, self.standing(account).budget.wait(self._now()))
        raise Limited("this account's requests are used up for the moment", retry_after=wait)

    def _lend(self, standing: Standing, kept: Kept) -> tuple[int, int]:
        """How many requests more others may make, and how many of those that they want are answered so. Books
        what is lent, and what was made unasked; what was not fetched in time is void."""
        now, budget = self._now(), standing.budget
        debt, lent = max(0, -kept.lent), max(0, kept.lent)
        for _ in range(debt):
            budget.take(now)
        more = max(0, min(kept.wanted, budget.available(now), AT_ONCE - lent))
        for _ in range(more):
            budget.take(now)
        if more or not (kept.wanted or lent):
            standing.lent_at = now
        is_void = not 0 <= now - standing.lent_at <= LENT_FOR
        more -= lent if is_void else 0
        standing.lent = kept.lent + debt + more
        return debt + more, kept.wanted if is_void else max(0, more)

    def _hear(self, account: Account, told: Mapping[str, Any]) -> None:
        """What another relay was answered for a request with the account."""
        error = None
        if told.get("code") is not None:
            error = ProviderError(told["code"], told["message"], retry_after=told["retry_after"])
            if error.code == "rate_limited":
                headers = {"retry-after": str(math.ceil((error.retry_after or 0) / 1000))}
                self.standing(account).budget.hear(429, headers, self._now())
        self._note(account, error)

    def _note(self, account: Account, error: ProviderError | None) -> None:
        standing = self.standing(account)
        before = standing.health.status
        standing.health = standing.health.after(error, now=self._now(), spread=_spread())
        self._news.add(account.name)
        if (before is Status.OK) is not (standing.health.status is Status.OK):
            self.hurry()
            self._changed(account, standing.health)


def _unknown(account: Account) -> Standing:
    return Standing(account.pace, Budget(account.requests_per_minute, account.requests_per_day))


def _told(error: ProviderError | None, now: int) -> Mapping[str, Any]:
    """What one relay tells another of an answer, or of the lack of one."""
    if error is None:
        return {"at": now}
    return {"at": now, "code": error.code, "message": str(error), "retry_after": error.retry_after}


def _spread() -> float:
    return random.random()  # noqa: S311 # jitter, not a secret
