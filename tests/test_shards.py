"""Shards: who is in charge of what, in the store and in memory, and what holders lend each other."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.errors import StoreError
from relay.hold import PATIENCE, Holder
from relay.shard import FOREVER, SHARDS, Held, shard_of, share
from relay.store import Store, open_database, store_on
from relay.store.migrate import migrate
from relay.store.shards import Shards
from tests.keyring import KEYRING

NOW = 1_700_000_000_000
LEASE = 20_000
NAMES = [f"ep_{number}" for number in range(500)]


@pytest.fixture
async def store(database_url: str) -> AsyncIterator[Store]:
    database = await open_database(database_url)
    await migrate(database, now=0)
    yield store_on(database, KEYRING)
    await database.close()


@given(st.text())
def test_every_name_has_one_shard(name: str):
    assert 0 <= shard_of(name) < SHARDS
    assert shard_of(name) == shard_of(str(name))


def test_names_spread_over_all_shards():
    found = Counter(shard_of(f"ep_{number:026}") for number in range(SHARDS * 100))
    assert len(found) == SHARDS
    assert max(found.values()) < 200


@given(st.integers(1, 200))
def test_the_shares_of_all_relays_are_enough_and_no_more_than_one_too_many(relays: int):
    assert (relays - 1) * share(relays) < SHARDS + relays
    assert relays * share(relays) >= SHARDS


def test_what_is_held_is_covered_until_it_runs_out_or_is_about_to_go():
    held = Held()
    number = shard_of("luma")
    assert not held.covers("luma", 0)
    held.take([number], since=5, until=100)
    assert (held.covers("luma", 100), held.covers("luma", 101), held.since("luma")) == (True, False, 5)
    held.renew(until=200)
    assert held.covers("luma", 200)
    held.leave([number])
    assert not held.covers("luma", 6)
    assert (set(held.numbers), set(held.staying)) == ({number}, set())
    held.stay([number])
    assert held.covers("luma", 200)
    held.leave([number])
    held.lose([number])
    assert (set(held.numbers), held.covers("luma", 6)) == (set(), False)
    held.take([number], since=7, until=300)
    assert held.covers("luma", 300)


async def test_the_first_relay_holds_everything_and_the_second_what_is_given_away(store: Store):
    first = await store.shards.beat("a", now=NOW, lease=LEASE)
    assert (first.relays, set(first.held)) == (1, set(range(SHARDS)))
    second = await store.shards.beat("b", now=NOW + 1, lease=LEASE)
    assert (second.relays, second.held) == (2, set())
    await store.shards.release("b", range(SHARDS))  # they are not its own
    assert not (await store.shards.beat("b", now=NOW + 2, lease=LEASE)).held
    await store.shards.release("a", range(40))
    second = await store.shards.beat("b", now=NOW + 3, lease=LEASE)
    assert len(second.held) == SHARDS // 2  # and not all 40: that is its share
    assert set((await store.shards.beat("a", now=NOW + 4, lease=LEASE)).held) >= set(range(40, SHARDS))


async def test_what_a_silent_relay_held_is_free_when_its_lease_has_run_out(store: Store):
    await store.shards.beat("a", now=NOW, lease=LEASE)
    assert not (await store.shards.beat("b", now=NOW + LEASE - 1, lease=LEASE)).held
    beat = await store.shards.beat("b", now=NOW + LEASE, lease=LEASE)
    assert (beat.relays, len(beat.held)) == (1, SHARDS)
    # It hung, and comes back.
    assert (await store.shards.beat("a", now=NOW + LEASE + 1, lease=LEASE)).held == set()


async def test_who_leaves_is_not_counted_and_holds_nothing(store: Store):
    await store.shards.beat("a", now=NOW, lease=LEASE)
    await store.shards.leave("a")
    assert await store.shards.live(since=NOW - 1) == 0
    assert (await store.shards.beat("b", now=NOW, lease=LEASE)).relays == 1


async def test_a_clock_that_is_ahead_is_noticed(store: Store):
    await store.shards.beat("a", now=NOW + 7_000, lease=LEASE)
    assert (await store.shards.beat("b", now=NOW, lease=LEASE)).ahead == 7_000


async def test_only_who_took_an_account_last_keeps_it(store: Store):
    assert await store.accounts.kept() == {}
    await store.accounts.keep({"luma": {"a": 0}}, {}, holder="a", now=NOW)
    assert await store.accounts.kept() == {}
    await store.accounts.take(["luma", "vivix"], holder="a", now=NOW)
    await store.accounts.keep({"luma": {"a": 1}, "vivix": {}}, {"luma": 2}, holder="a", now=NOW)
    await store.accounts.take(["luma"], holder="b", now=NOW)
    await store.accounts.keep({"luma": {"a": 2}, "vivix": {"v": [1, None]}}, {"luma": 5}, holder="a", now=NOW)
    kept = await store.accounts.kept()
    assert {name: (dict(one.state), one.lent) for name, one in kept.items()} == {
        "luma": ({"a": 1}, 2),
        "vivix": ({"v": [1, None]}, 0),
    }


async def test_no_more_is_borrowed_than_was_lent_and_what_was_drawn_is_a_debt(store: Store):
    assert await store.accounts.borrow("luma") is False
    await store.accounts.take(["luma"], holder="a", now=NOW)
    await store.accounts.keep({"luma": {}}, {"luma": 3}, holder="a", now=NOW)
    assert Counter(await asyncio.gather(*(store.accounts.borrow("luma") for _ in range(8)))) == {
        True: 3,
        False: 5,
    }
    await store.accounts.draw("luma")
    await store.accounts.draw("vivix")  # nobody has it: nobody is told
    assert {name: one.lent for name, one in (await store.accounts.kept()).items()} == {"luma": -1}


async def test_what_is_wanted_and_heard_is_there_until_the_holder_has_seen_it(store: Store):
    accounts = store.accounts
    await accounts.take(["luma"], holder="a", now=NOW)
    for _ in range(3):
        await accounts.want("luma")
    await accounts.tell("luma", {"at": 1, "code": "unauthorized"})
    seen = await accounts.kept()
    assert (seen["luma"].wanted, seen["luma"].heard, seen["luma"].holder) == (
        3,
        {"at": 1, "code": "unauthorized"},
        "a",
    )
    await accounts.want("luma")
    await accounts.keep({"luma": {}}, {"luma": 2}, seen, holder="a", now=NOW)
    after = (await accounts.kept())["luma"]
    assert (after.lent, after.wanted, after.heard) == (2, 1, None)
    # What was heard later than it was seen stays.
    await accounts.tell("luma", {"at": 2})
    await accounts.keep({"luma": {}}, {}, seen, holder="a", now=NOW)
    assert (await accounts.kept())["luma"].heard == {"at": 2}


@dataclass
class Member:
    """One relay of several, as far as its shards go."""

    holder: Holder
    held: Held
    taken: list[Collection[int]] = field(default_factory=list)
    trouble: int = 0  # so often it cannot let go
    stuck: set[int] = field(default_factory=set)  # of these something is under way
    let_go: list[int] = field(default_factory=list)
    may_go: asyncio.Event = field(default_factory=asyncio.Event)


class Broken(Shards):
    """Loses the connection when it has released a shard, so often."""

    trouble = 0

    async def release(self, relay: str, numbers: Collection[int]) -> None:
        await super().release(relay, numbers)
        if self.trouble:
            self.trouble -= 1
            raise StoreError("the connection is lost")


class Time:
    now = NOW

    def __call__(self) -> int:
        return self.now


def member(store: Store, name: str, time: Time) -> Member:
    held = Held()

    async def take(numbers: Collection[int]) -> None:
        assert not any(number in held.numbers for number in numbers)
        one.taken.append(numbers)

    async def let_go(numbers: Collection[int]) -> None:
        await one.may_go.wait()
        await until(lambda: not one.stuck.intersection(numbers))
        if one.trouble:
            one.trouble -= 1
            raise StoreError("the database is away")
        one.let_go.extend(numbers)

    holder = Holder(
        store, held, relay=name, lease=LEASE, take=take, let_go=let_go, changed=lambda: None, now=time
    )
    one = Member(holder, held)
    one.may_go.set()
    return one


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not true():  # noqa: ASYNC110 # nobody tells when
            await asyncio.sleep(0.01)


async def eventually_held(one: Member, count: int, *others: Member) -> None:
    async with asyncio.timeout(10):
        while len(one.held.staying) != count:
            for each in (*others, one):
                await each.holder.beat()


async def test_a_relay_that_can_only_be_alone_holds_everything_for_ever(tmp_path):
    database = await open_database(f"sqlite:///{tmp_path}/relay.db")
    await migrate(database, now=0)
    alone = member(store_on(database, KEYRING), "a", Time())
    await alone.holder.start()
    assert alone.held.covers("anything", FOREVER)
    assert [set(one) for one in alone.taken] == [set(range(SHARDS))]
    await alone.holder.stop()
    await database.close()


@pytest.fixture
async def shared(cluster) -> AsyncIterator[Store]:
    url = cluster.database()
    database = await open_database(url)
    yield store_on(database, KEYRING)
    await database.close()
    cluster.drop(url)


async def test_relays_that_come_and_go_share_everything_evenly(shared: Store):
    time = Time()
    a, b, c = (member(shared, name, time) for name in "abc")
    await a.holder.start()
    assert len(a.held.staying) == SHARDS
    await b.holder.start()
    await eventually_held(b, SHARDS // 2, a)
    await c.holder.start()
    await eventually_held(c, SHARDS - 2 * share(3), a, b)
    assert sorted([*a.held.numbers, *b.held.numbers, *c.held.numbers]) == list(range(SHARDS))
    await b.holder.stop()
    await eventually_held(c, SHARDS // 2, a)
    assert sorted([*a.held.numbers, *c.held.numbers]) == list(range(SHARDS))


async def test_a_shard_is_given_away_only_when_nothing_of_it_is_under_way(shared: Store):
    time = Time()
    a, b = member(shared, "a", time), member(shared, "b", time)
    await a.holder.start()
    a.may_go.clear()
    await b.holder.start()
    for _ in range(3):
        await a.holder.beat()
        await b.holder.beat()
    assert (len(a.held.staying), len(a.held.numbers), len(b.held.numbers)) == (SHARDS // 2, SHARDS, 0)
    a.may_go.set()
    await eventually_held(b, SHARDS // 2, a)
    assert sorted(a.let_go) == sorted(b.held.numbers)


async def test_a_relay_that_hung_knows_that_it_lost_everything(shared: Store):
    time = Time()
    a, b = member(shared, "a", time), member(shared, "b", time)
    await a.holder.start()
    await b.holder.start()
    for _ in range(3):
        time.now += LEASE // 3 + 1
        await b.holder.beat()
    assert len(b.held.numbers) == SHARDS
    assert not any(a.held.covers(f"ep_{number}", time.now) for number in range(100))
    a.may_go.clear()
    await a.holder.beat()
    assert set(a.held.staying) == set()
    await b.holder.beat()
    await until(lambda: len(b.held.numbers) == SHARDS // 2)
    time.now += PATIENCE
    await a.holder.beat()
    # Half of it is free again, but not taken while something of it is still under way.
    assert not a.held.staying
    a.may_go.set()
    await eventually_held(a, SHARDS // 2, b)
    assert not set(a.held.numbers) & set(b.held.numbers)


async def test_after_an_outage_everybody_goes_on_with_what_he_had(shared: Store):
    time = Time()
    a, b, c = (member(shared, name, time) for name in "abc")
    for one, many in ((a, 64), (b, 32), (c, 20)):
        await one.holder.start()
        await eventually_held(one, many, a, b)
    before = {name: set(one.held.numbers) for name, one in (("a", a), ("b", b), ("c", c))}
    time.now += 3 * LEASE  # for so long nobody could reach the database
    for one in (b, a, b):
        await one.holder.beat()
    assert {"a": set(a.held.numbers), "b": set(b.held.numbers)} == {name: before[name] for name in "ab"}
    # The third one does not come back.
    time.now += PATIENCE
    await eventually_held(b, SHARDS // 2, a)
    assert sorted([*a.held.numbers, *b.held.numbers]) == list(range(SHARDS))


async def test_what_could_not_be_given_away_is_given_at_the_next_beat(shared: Store):
    time = Time()
    a, b = member(shared, "a", time), member(shared, "b", time)
    await a.holder.start()
    a.trouble = share(2)
    await b.holder.start()
    await eventually_held(b, SHARDS // 2, a)
    assert not set(a.held.numbers) & set(b.held.numbers)


async def test_a_shard_whose_release_failed_counts_as_gone_until_a_beat_says_otherwise(shared: Store):
    time = Time()
    broken = Broken(shared.database)
    a, b = member(replace(shared, shards=broken), "a", time), member(shared, "b", time)
    await a.holder.start()
    broken.trouble = 3
    await b.holder.start()
    await a.holder.beat()
    await until(lambda: len(a.held.numbers) == SHARDS // 2)
    given = [number for number in range(SHARDS) if number not in a.held.numbers]
    await b.holder.beat()
    assert sorted(b.held.numbers) == given
    assert not any(a.held.covers(name, time.now) for name in NAMES if shard_of(name) in given)


async def test_a_relay_that_winds_down_gives_away_at_once_what_has_ended(shared: Store):
    time = Time()
    a, b = member(shared, "a", time), member(shared, "b", time)
    await a.holder.start()
    await b.holder.start()
    await eventually_held(b, SHARDS // 2, a)
    await eventually_held(a, SHARDS // 2, b)
    stuck = min(b.held.numbers)
    b.stuck.add(stuck)
    b.holder.wind_down()
    async with asyncio.timeout(10):
        while len(a.held.staying) < SHARDS - 1:
            await a.holder.beat()
    assert set(b.held.numbers) == {stuck}
    assert not b.held.staying
    stopping = asyncio.create_task(b.holder.stop())
    await a.holder.beat()
    assert len(a.held.staying) == SHARDS - 1
    b.stuck.clear()
    await stopping
    await a.holder.beat()
    assert len(a.held.staying) == SHARDS
    await b.holder.beat()
    assert not b.held.numbers


async def test_who_stops_while_the_database_is_away_stops_all_the_same(shared: Store):
    time = Time()
    a = member(shared, "a", time)
    await a.holder.start()
    await shared.database.close()
    async with asyncio.timeout(10):
        await a.holder.stop()
