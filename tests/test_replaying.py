"""Replaying on the store: whoever goes on, how often and how fast, all that is missing is there once."""

import asyncio
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Sequence
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from relay.body import compact
from relay.delivery import Status as Is
from relay.endpoint import Endpoint
from relay.errors import Conflict, Limited, StoreError
from relay.event import Event
from relay.ids import LATE, new_id
from relay.replay import COUNTS, Counting, advance, count
from relay.selection import Replay, Selection, Status, Wanted
from relay.store import Store, replays
from relay.store.deliveries import LONGEST_ATTEMPT
from relay.store.replays import MOST_OPEN
from tests.test_store import (
    NOTHING_HANDED_OVER,
    NOW,
    SECOND,
    TENANT,
    an_event,
    claimed_deliveries,
    prepared,
    published,
    registered,
    rows,
    settlement,
)

SOON = NOW + SECOND


@pytest.fixture
async def store(database_url: str) -> AsyncIterator[Store]:
    async with prepared(database_url) as store:
        yield store


def a_replay(wanted: Wanted, *, rate: float = 1000, at: int = SOON, **fields: Any) -> Replay:
    selection = Selection(TENANT, wanted, until=at, since=fields.pop("since", 0), **fields)
    return Replay(
        id=new_id("rpl", at), selection=selection, rate_limit=rate, status=Status.PENDING, total=0, done=0,
        position=selection.start, paced_at=at - 1000, created_at=at, updated_at=at,
    )  # fmt: skip


async def begun(store: Store, wanted: Wanted, **fields: Any) -> Replay:
    made = await store.replays.create(a_replay(wanted, **fields), None)
    assert made is not None
    return made


async def beat(store: Store, now: int, *, holds: bool = True) -> Sequence[str]:
    """One beat of a relay; where it made something pending."""
    woken = list[str]()
    await advance(store, covers=lambda name, until: holds, wake=woken.append, now=lambda: now)
    return woken


async def ended(store: Store, replay: Replay, *, now: int = SOON + SECOND, relays: int = 1) -> Replay:
    """The replay once it has ended, with beats of so many relays at once that all take it for theirs; what it
    makes pending is taken by who delivers it."""
    for number in range(500):
        at = now + 250 * number
        for woken in await asyncio.gather(*(beat(store, at) for _ in range(relays))):
            rooms = dict.fromkeys(woken, 999)
            await store.deliveries.claim(rooms, now=at, lease="l", lease_until=at + 3_600 * SECOND)
        found = await store.replays.get(TENANT, replay.id)
        assert found is not None
        if found.ended_at is not None:
            return found
    raise AssertionError("it does not end")


async def failed(store: Store, number: int, **fields: Any) -> Endpoint:
    """An endpoint with so many failed deliveries."""
    endpoint = await registered(store, event_types=["a.b"], **fields)
    for _ in range(number):
        await published(store, an_event(id=new_id("evt", NOW)))
    claimed = await claimed_deliveries(store, limit=99)
    await store.deliveries.settle([settlement(one, Is.FAILED) for one in claimed], now=NOW)
    return endpoint


async def statuses(store: Store) -> Counter[str]:
    return Counter(row["status"] for row in await rows(store, "SELECT status FROM deliveries"))


# The property.

TYPES, ACCOUNTS = ("a.b", "c.d", "generation.completed"), ("luma", "vivix")
subsets = st.lists(st.sampled_from(TYPES), max_size=2, unique=True)
owners = st.lists(st.sampled_from(ACCOUNTS), max_size=1)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("event"), st.sampled_from(TYPES), st.sampled_from([None, *ACCOUNTS])),
        st.tuples(st.just("endpoint"), subsets, owners),
        st.tuples(st.just("filter"), subsets, owners),
        st.tuples(st.just("disable"), st.booleans(), st.just(None)),
        st.tuples(st.just("enable"), st.booleans(), st.just(None)),
    ),
    max_size=25,
)


@dataclass
class Course:
    """What happens before a replay: events, endpoints that come, change and are disabled for a while."""

    store: Store
    events: list[Event]
    endpoints: list[Endpoint]

    async def take(self, steps: Sequence[tuple[str, Any, Any]]) -> None:
        for number, (what, one, other) in enumerate(steps):
            at = NOW + number
            match what:
                case "event":
                    made = replace(an_event(one), id=new_id("evt", at), account=other)
                    await self.store.events.announce([made], NOTHING_HANDED_OVER, now=at)
                    self.events.append(made)
                case "endpoint":
                    fields = {"event_types": one, "accounts": other}
                    self.endpoints.append(await registered(self.store, at=at, **fields))
                case _ if not self.endpoints:
                    pass
                case "filter":
                    await self._change(0, {"event_types": one, "accounts": other}, at)
                case "disable":
                    id_ = self.endpoints[-1 if one else 0].id
                    await self.store.endpoints.disable(TENANT, id_, reason="why", now=at)
                case "enable":
                    await self.store.endpoints.enable(TENANT, self.endpoints[-1 if one else 0].id, now=at)

    async def _change(self, place: int, changes: dict[str, Any], at: int) -> None:
        id_ = self.endpoints[place].id
        changed = await self.store.endpoints.change(TENANT, id_, lambda _: changes, now=at)
        assert changed is not None
        self.endpoints[place] = changed

    async def wanted(self, only: str | None) -> set[tuple[str, str]]:
        """Each event with each endpoint that wants it, as they are now."""
        found = [await self.store.endpoints.get(TENANT, one.id) for one in self.endpoints]
        enabled = [one for one in found if one and one.disabled_at is None and only in (None, one.id)]
        return {(event.id, one.id) for event in self.events for one in enabled if one.wants(event)}


async def there(store: Store) -> Counter[tuple[str, str]]:
    found = await rows(store, "SELECT event_id, endpoint_id FROM deliveries")
    return Counter((row["event_id"], row["endpoint_id"]) for row in found)


@settings(max_examples=20, deadline=None)
@given(STEPS, st.sampled_from([3, 40, 1000]), st.booleans(), st.integers(1, 3))
def test_after_a_replay_of_what_is_missing_everything_wanted_has_one_delivery(
    steps: Sequence[tuple[str, Any, Any]], rate: float, of_one: bool, relays: int
):
    async def check(url: str) -> None:
        async with prepared(url) as store:
            course = Course(store, [], [])
            await course.take(steps)
            enabled = [one.id for one in course.endpoints if await _is_enabled(store, one)]
            only = enabled[0] if of_one and enabled else None
            before, wanted = await there(store), await course.wanted(only)
            replay = a_replay(Wanted.MISSING, rate=rate, endpoint_id=only)
            counted = await count(store, replay.selection)
            assert counted == len(wanted - before.keys())
            await store.replays.create(replay, None)
            done = await ended(store, replay, relays=relays)
            assert (done.status, done.done) == (Status.COMPLETED, counted)
            assert await there(store) == before + Counter(wanted - before.keys())
            assert await count(store, replay.selection) == 0
            await _kept_to_its_rate(store, rate)

    with tempfile.TemporaryDirectory() as directory:
        asyncio.run(check(f"sqlite:///{directory}/relay.db"))


async def _is_enabled(store: Store, one: Endpoint) -> bool:
    found = await store.endpoints.get(TENANT, one.id)
    return found is not None and found.disabled_at is None


async def _kept_to_its_rate(store: Store, rate: float) -> None:
    sql = "SELECT destination, created_at FROM deliveries WHERE replay_id IS NOT NULL ORDER BY created_at"
    times: dict[str, list[int]] = {}
    for row in await rows(store, sql):
        times.setdefault(row["destination"], []).append(row["created_at"])
    for made in times.values():
        for place, at in enumerate(made):
            # A second's worth at once, and then as time goes on.
            assert place + 1 <= max(1, rate) + rate * (at - made[0]) / 1000 + 1


# One by one.


async def test_relays_that_all_take_it_for_theirs_make_everything_pending_once(store: Store):
    endpoint = await failed(store, 40)
    replay = await begun(store, Wanted.FAILED, endpoint_id=endpoint.id, rate=20)
    done = await ended(store, replay, relays=4)
    assert (done.status, done.done) == (Status.COMPLETED, 40)
    assert await statuses(store) == {"sending": 40}
    found = await rows(store, "SELECT replay_id, next_trigger, run_attempts FROM deliveries")
    assert {tuple(row.values()) for row in found} == {(replay.id, "replay", 0)}


async def test_only_who_holds_its_shard_goes_on_with_it(store: Store):
    endpoint = await failed(store, 3)
    replay = await begun(store, Wanted.FAILED, endpoint_id=endpoint.id)
    assert await beat(store, SOON + SECOND, holds=False) == []
    assert await store.replays.get(TENANT, replay.id) == replay
    assert await beat(store, SOON + SECOND) == [endpoint.id]
    assert (await ended(store, replay)).done == 3


async def test_what_a_replay_has_sent_and_failed_again_is_not_sent_by_it_again(store: Store):
    endpoint = await failed(store, 2)
    replay = await begun(store, Wanted.ALL, endpoint_id=endpoint.id, rate=1)
    now = SOON
    for _ in range(20 + LATE // SECOND):
        now += SECOND
        await beat(store, now)
        claimed = await store.deliveries.claim({endpoint.id: 9}, now=now, lease="l", lease_until=now + SECOND)
        answers = [Is.FAILED, Is.DELIVERED]
        await store.deliveries.settle(
            [settlement(one, answer) for one, answer in zip(claimed, answers, strict=False)], now=now
        )
    done = await store.replays.get(TENANT, replay.id)
    assert done is not None and (done.status, done.done) == (Status.COMPLETED, 2)
    assert [row["attempts"] for row in await rows(store, "SELECT attempts FROM deliveries")] == [2, 2]


async def test_a_replay_waits_for_an_endpoint_that_does_not_keep_up(store: Store):
    endpoint = await failed(store, 60)
    replay = await begun(store, Wanted.FAILED, endpoint_id=endpoint.id, rate=20)
    now = SOON
    for _ in range(20):
        now += SECOND
        await beat(store, now)
    found = await store.replays.get(TENANT, replay.id)
    assert found is not None and found.status is Status.RUNNING and found.done == 20
    await store.deliveries.claim({endpoint.id: 99}, now=now, lease="l", lease_until=now + 9 * SECOND)
    await beat(store, now + SECOND)
    found = await store.replays.get(TENANT, replay.id)
    assert found is not None and found.done == 40


async def test_a_replay_of_all_waits_for_an_endpoint_that_does_not_keep_up(store: Store):
    slow = await failed(store, 60, id="ep_1")
    fast = await registered(store, id="ep_2", event_types=["a.b"])
    replay = await begun(store, Wanted.ALL, rate=20)

    async def beaten(now: int, *taken: str) -> Counter[str]:
        """How many it has made pending for each, where these take what is due."""
        for beat_at in range(now, now + 20 * SECOND, SECOND):
            await beat(store, beat_at)
            rooms = dict.fromkeys(taken, 99)
            await store.deliveries.claim(rooms, now=beat_at, lease="l", lease_until=beat_at + 99 * SECOND)
        found = await rows(store, "SELECT destination FROM deliveries WHERE replay_id IS NOT NULL")
        return Counter(row["destination"] for row in found)

    assert await beaten(SOON + SECOND, fast.id) == {slow.id: 20}
    assert await beaten(SOON + 30 * SECOND, fast.id, slow.id) == {slow.id: 60, fast.id: 60}
    done = await store.replays.get(TENANT, replay.id)
    assert done is not None and done.status is Status.COMPLETED


async def test_what_was_canceled_in_flight_is_waited_for_and_not_left_out(store: Store):
    endpoint = await failed(store, 0)
    for _ in range(3):
        await published(store, an_event(id=new_id("evt", NOW)))
    await claimed_deliveries(store)
    await store.endpoints.disable(TENANT, endpoint.id, reason="why", now=NOW)
    await store.endpoints.enable(TENANT, endpoint.id, now=NOW)
    assert await statuses(store) == {"canceled": 3}
    replay = await begun(store, Wanted.FAILED, endpoint_id=endpoint.id)
    await beat(store, SOON + SECOND)
    assert await statuses(store) == {"canceled": 3}
    done = await ended(store, replay, now=NOW + LONGEST_ATTEMPT)
    assert (done.done, await statuses(store)) == (3, {"sending": 3})


async def test_of_replays_that_are_begun_at_once_one_is_made(store: Store):
    replays = [a_replay(Wanted.ALL, endpoint_id=id_) for id_ in ("ep_0", "ep_0", None, "ep_1", "ep_0")]
    told = await asyncio.gather(*(store.replays.create(one, None) for one in replays), return_exceptions=True)
    made = [one for one in told if isinstance(one, Replay)]
    refused = [one for one in told if isinstance(one, Conflict)]
    assert len(made) + len(refused) == 5
    of = [one.selection.endpoint_id for one in made]
    assert of == [None] or sorted(str(one) for one in of) == ["ep_0", "ep_1"]
    for refusal in refused:
        assert any(one.id in str(refusal) for one in made)


async def test_what_many_endpoints_lack_is_looked_for_in_smaller_steps_and_none_is_left_out(
    store: Store, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(replays, "PAIRS", 6)
    for _ in range(10):
        await published(store, an_event(id=new_id("evt", NOW)))
    for _ in range(3):
        await registered(store, event_types=["a.b"])
    replay = a_replay(Wanted.MISSING)
    first = await store.replays.look(replay.selection, replay.selection.start, limit=100, until=SOON)
    assert (len(first.found), first.more) == (6, True)
    assert await count(store, replay.selection) == 30
    await store.replays.create(replay, None)
    assert (await ended(store, replay)).done == 30
    assert len(await there(store)) == 30


async def test_a_tenant_has_only_so_many_replays_that_have_not_ended(store: Store):
    first, *_ = [await begun(store, Wanted.ALL, endpoint_id=f"ep_{n}") for n in range(MOST_OPEN)]
    one_more = a_replay(Wanted.ALL, endpoint_id="ep_more")
    with pytest.raises(Conflict, match=f"{MOST_OPEN} replays have not ended"):
        await store.replays.create(one_more, None)
    theirs = a_replay(Wanted.ALL, endpoint_id="ep_theirs")
    assert await store.replays.create(
        replace(theirs, selection=replace(theirs.selection, tenant="acme")), None
    )
    await store.replays.cancel(TENANT, first.id, now=SOON)
    assert await store.replays.create(one_more, None) == one_more


async def test_the_database_itself_refuses_a_second_replay_of_an_endpoint(store: Store):
    for id_ in ("ep_0", None):
        await store.replays.create(a_replay(Wanted.ALL, endpoint_id=id_), None)
        sql = """
            INSERT INTO replays (
                id, tenant, wanted, until, endpoint_id, rate_limit, status, total, done, position, paced_at,
                created_at, updated_at
            )
            SELECT 'rpl_2', tenant, wanted, until, endpoint_id, rate_limit, status, total, done, position,
                paced_at, created_at, updated_at
            FROM replays WHERE ended_at IS NULL
        """
        with pytest.raises(StoreError, match=r"(?i)unique"):
            async with store.database.write() as tx:
                await tx.execute(sql)
        async with store.database.write() as tx:
            await tx.execute("UPDATE replays SET status = 'canceled', ended_at = 1")


async def test_a_replay_of_all_ends_beside_endpoints_that_are_disabled(store: Store):
    await failed(store, 3, id="ep_1")
    await registered(store, id="ep_2", event_types=["a.b"])
    await store.endpoints.disable(TENANT, "ep_1", reason="why", now=NOW)
    replay = await begun(store, Wanted.ALL)
    done = await ended(store, replay)
    assert (done.status, done.done) == (Status.COMPLETED, 3)
    assert Counter(row["endpoint_id"] for row in await rows(store, "SELECT * FROM deliveries")) == {
        "ep_1": 3, "ep_2": 3,
    }  # fmt: skip


@pytest.mark.parametrize("rate", [0.01, 0.5, 1, 10, 333, 1000])
def test_an_allowance_is_used_up_and_comes_back_as_time_goes_on(rate: float):
    replay = a_replay(Wanted.ALL, rate=rate)
    now, got = replay.paced_at, 0
    for _ in range(200):
        now += round(100 * max(1, 1 / rate))
        room = replay.allowance(now)
        if room:
            got += room
            replay = replace(replay, paced_at=replay.paced(room, now))
        assert replay.allowance(now) == 0
    seconds = (now - (SOON - 1000)) / 1000
    assert 0.95 * rate * seconds - 1 <= got <= rate * seconds
    # A clock that was set back costs no more than a moment.
    assert replay.allowance(now - 3_600_000) >= 1


@given(st.floats(0.001, 1000) | st.integers(1, 1000).map(lambda every: 1 / every), st.integers(1, 5_000))
@example(1 / 161, 250)
def test_a_replay_gets_on_at_any_rate(rate: float, beat: int):
    replay = a_replay(Wanted.ALL, rate=rate)
    now = begun_at = replay.paced_at
    for _ in range(3):
        # A beat later than when the next one may go.
        now += max(1000, ceil(1000 / rate)) + beat
        room = replay.allowance(now)
        assert 1 <= room <= max(1, rate)
        replay = replace(replay, paced_at=replay.paced(room, now))
    assert replay.paced_at > begun_at


async def test_counts_of_one_tenant_do_not_keep_others_waiting(store: Store):
    await failed(store, 3)
    counting, selection = Counting(store), a_replay(Wanted.FAILED).selection
    other = replace(selection, tenant="other")
    counts = [counting.count(one) for one in (*[selection] * COUNTS, selection, other)]
    *counted, refused, of_other = await asyncio.gather(*counts, return_exceptions=True)
    assert (counted, of_other) == ([3] * COUNTS, 0)
    assert isinstance(refused, Limited) and refused.retry_after > 0
    assert await counting.count(selection) == 3


async def test_what_is_listed_comes_between_counts(tmp_path: Path):
    order = list[str]()

    async def noted(name: str, work: Awaitable[object]) -> None:
        await work
        order.append(name)

    async with prepared(f"sqlite:///{tmp_path}/relay.db") as store:
        await failed(store, 3)
        counting, selection = Counting(store), a_replay(Wanted.FAILED).selection
        counts = [noted("count", counting.count(selection)) for _ in range(COUNTS)]
        listing = store.deliveries.page(TENANT, {}, limit=9, cursor=None)
        await asyncio.gather(*counts, noted("list", listing))
    assert order.index("list") <= 1


async def test_a_beat_ends_in_time_wherever_its_filters_have_come_to(
    store: Store, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("relay.replay.LOOKING", 0)
    await published(store, *(an_event(id=new_id("evt", NOW)) for _ in range(5)))
    made = [await registered(store, event_types=["a.b"], filter=f"type || '{name}'") for name in "ab"]
    replays = [await begun(store, Wanted.MISSING, endpoint_id=one.id) for one in made]
    await beat(store, SOON + LATE)
    # Each has its turn, and what is done is written down.
    again = [await store.replays.get(TENANT, one.id) for one in replays]
    assert [one.done for one in again if one is not None] == [1, 1]
    assert [(await ended(store, one, now=SOON + LATE)).done for one in replays] == [5, 5]


async def test_a_look_ends_in_time_wherever_its_filters_have_come_to(store: Store):
    numbers = [an_event(id=new_id("evt", NOW + n), body=compact({"data": {"n": n}})) for n in range(5)]
    await published(store, *numbers)
    await registered(store, event_types=["a.b"], filter="data.n != `1`")
    await registered(store, event_types=["a.b"])
    selection = a_replay(Wanted.MISSING).selection
    one = await store.replays.look(selection, selection.start, limit=9, until=SOON, seconds=0)
    assert (len(one.found), one.position, one.more) == (2, numbers[0].id, True)
    assert await count(store, selection) == 4 + 5


async def test_what_is_listed_does_not_wait_for_filters(tmp_path: Path):
    order = list[str]()

    async def noted(name: str, work: Awaitable[object]) -> None:
        await work
        order.append(name)

    async with prepared(f"sqlite:///{tmp_path}/relay.db") as store:
        await published(store, *(an_event(id=new_id("evt", NOW)) for _ in range(3)))
        await registered(store, event_types=["a.b"], filter="data.a")
        selection = a_replay(Wanted.MISSING).selection
        for work in (
            store.replays.look(selection, selection.start, limit=9, until=SOON),
            store.replays.tally(selection, selection.start, limit=9),
        ):
            listing = store.deliveries.page(TENANT, {}, limit=9, cursor=None)
            await asyncio.gather(noted("look", work), noted("list", listing))
    assert order == ["list", "look"] * 2


async def test_what_another_relay_writes_late_is_not_passed_over(store: Store):
    endpoint = await registered(store, event_types=["a.b"])
    replay = await begun(store, Wanted.MISSING)
    await beat(store, SOON + LATE // 2)
    # Its transaction did not see the endpoint, and ends only now.
    await store.endpoints.disable(TENANT, endpoint.id, reason="why", now=SOON)
    late = an_event(id=new_id("evt", SOON - 1))
    await store.events.announce([late], NOTHING_HANDED_OVER, now=SOON + LATE // 2)
    await store.endpoints.enable(TENANT, endpoint.id, now=SOON)
    done = await ended(store, replay, now=SOON + LATE // 2)
    # Beside a file there is no other relay.
    assert done.done == (0 if store.database.alone else 1)
    assert (done.ended_at or 0) - SOON < LATE + SECOND


async def test_what_ended_long_ago_is_forgotten_and_what_goes_on_is_not(store: Store):
    gone = await begun(store, Wanted.FAILED, endpoint_id="ep_1", at=NOW)
    await store.replays.cancel(TENANT, gone.id, now=NOW)
    open_ = await begun(store, Wanted.FAILED, endpoint_id="ep_1", at=NOW)
    assert (await store.retention.remove_replays(before=NOW, limit=9)).removed == 0
    assert (await store.retention.remove_replays(before=SOON, limit=9)).removed == 1
    assert await store.replays.open() == [open_]
    assert await store.replays.get(TENANT, gone.id) is None
