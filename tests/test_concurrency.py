"""Several relays over one PostgreSQL: what they do at the same moment is done once, and none of it is lost.

A relay is a store here, on connections of its own. Where the order matters it is made: another connection
holds what the relays need, until as many of them as there should be wait for it.
"""

import asyncio
import logging
import random
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import replace
from typing import Any

import asyncpg
import pytest

from relay.app import running
from relay.config import read_config
from relay.delivery import Answer, Claimed, Code, Status
from relay.errors import Collision, Conflict, Invalid, NotFound, StoreError
from relay.event import DISABLED
from relay.generation import Status as Is
from relay.generation import Update
from relay.prune import prune
from relay.store import Store, open_database, store_on
from relay.store.audit import Entry
from relay.store.events import Publication
from relay.store.generations import Hint, Watch
from relay.store.idempotency import Idempotency
from relay.store.keys import MOST as MOST_KEYS
from tests.conftest import Clock
from tests.keyring import KEYRING
from tests.postgres import Cluster
from tests.test_store import (
    BROKEN,
    DAY,
    DONE,
    NOTHING_HANDED_OVER,
    NOW,
    SECOND,
    TENANT,
    YEAR,
    a_generation,
    a_key,
    an_endpoint,
    an_event,
    announced,
    asked,
    change_of,
    claimed_deliveries,
    fill_with_keys,
    published,
    registered,
    rows,
    settlement,
    taking,
    the,
    watched,
)

PROCESSING = Update(status=Is.PROCESSING, provider_status="processing")
KEY = Idempotency("k", "hash")


@pytest.fixture
def url(cluster: Cluster) -> Iterator[str]:
    url = cluster.database()
    yield url
    cluster.drop(url)


@pytest.fixture
async def relays(url: str) -> AsyncIterator[Sequence[Store]]:
    async with AsyncExitStack() as stack:
        stores = []
        for _ in range(4):
            database = await open_database(url)
            stack.push_async_callback(database.close)
            stores.append(store_on(database, KEYRING))
        await asyncio.gather(*(one.tenants.found(TENANT, "whsec_of_the_tenant", now=NOW) for one in stores))
        yield stores


@asynccontextmanager
async def connected(url: str) -> AsyncIterator[Any]:
    connection = await asyncpg.connect(url)
    try:
        yield connection
    finally:
        await connection.close()


@asynccontextmanager
async def holding(url: str, statement: str, *values: Any) -> AsyncIterator[Any]:
    """Somebody else's transaction, which has locked what this statement locks; it is committed at the end."""
    async with connected(url) as connection, connection.transaction():
        await connection.execute(statement, *values)
        yield connection


async def until_waiting(url: str, count: int) -> None:
    """Returns once so many wait for somebody else's transaction."""
    waiting = """
        SELECT COUNT(*) FROM pg_stat_activity
        WHERE datname = current_database() AND wait_event_type = 'Lock'
    """
    async with connected(url) as connection, asyncio.timeout(10):
        while True:
            if await connection.fetchval(waiting) == count:
                return
            await asyncio.sleep(0.01)


async def all_at_once(url: str, held: str, *works: Awaitable[Any], values: Sequence[Any] = ()) -> list[Any]:
    """What each of the works brings or raises, when all got as far as they can without what is held."""
    async with holding(url, held, *values):
        tasks = [asyncio.ensure_future(work) for work in works]
        await until_waiting(url, len(works))
    return await asyncio.gather(*tasks, return_exceptions=True)


async def count(store: Store, table: str) -> int:
    [row] = await rows(store, f"SELECT COUNT(*) AS n FROM {table}")  # noqa: S608
    return int(row["n"])


async def a_claimed_delivery(store: Store, **endpoint: Any) -> Claimed:
    await registered(store, event_types=["a.b"], **endpoint)
    await published(store, an_event())
    [one] = await claimed_deliveries(store)
    return one


async def delivery(store: Store, id_: str) -> dict[str, Any]:
    [row] = await rows(store, "SELECT * FROM deliveries WHERE id = :id", id=id_)
    return row


@pytest.fixture
def repeats(caplog: pytest.LogCaptureFixture) -> Any:
    """How many transactions were begun anew, when it is called."""
    caplog.set_level(logging.INFO)
    return lambda: [record.getMessage() for record in caplog.records].count("store.repeated")


# A transaction that another one undid.


async def test_a_transaction_that_is_lost_to_a_deadlock_is_begun_anew(
    url: str, relays: Sequence[Store], repeats: Any
):
    await registered(relays[0], event_types=["a.b"])
    await published(relays[0], an_event(), an_event())
    first, second = sorted(await claimed_deliveries(relays[0]), key=lambda one: one.id)
    lock = "SELECT 1 FROM deliveries WHERE id = $1 FOR UPDATE"
    async with holding(url, "SET LOCAL deadlock_timeout = '1min'") as other:
        await other.execute(lock, second.id)
        settling = asyncio.create_task(
            relays[0].deliveries.settle([settlement(second), settlement(first)], now=NOW)
        )
        await until_waiting(url, 1)
        await other.execute(lock, first.id)  # returns when the relay has been told to give way
    await settling
    assert {(await delivery(relays[0], one.id))["status"] for one in (first, second)} == {"delivered"}
    assert [len(await relays[0].deliveries.attempts(one.id)) for one in (first, second)] == [1, 1]
    assert repeats() == 1


async def test_a_transaction_that_never_gets_its_way_is_refused_as_not_stored(relays: Sequence[Store]):
    taken = an_event()
    await published(relays[0], taken)
    with pytest.raises(Collision) as refusal:
        await relays[1].events.publish(
            [Publication(TENANT, [replace(an_event(), id=taken.id)], None)], NOTHING_HANDED_OVER, now=NOW
        )
    assert isinstance(refusal.value, StoreError)
    assert not refusal.value.general
    assert taken.id not in str(refusal.value)


# Idempotency keys.


def an_endpoint_made(store: Store, key: Idempotency) -> Awaitable[Any]:
    return store.endpoints.create(an_endpoint(), key)


async def a_generation_made(store: Store, key: Idempotency) -> Any:
    [watched] = await store.generations.create([Watch(a_generation(None), key)])
    if watched.error is not None:
        raise watched.error
    return watched.generation


async def an_event_made(store: Store, key: Idempotency) -> Any:
    [result], _ = await store.events.publish(
        [Publication(TENANT, [an_event()], key)], NOTHING_HANDED_OVER, now=NOW
    )
    if isinstance(result, Invalid):
        raise result
    return result[0]


MAKES: dict[str, Any] = {
    "endpoints": an_endpoint_made, "generations": a_generation_made, "events": an_event_made,
}  # fmt: skip


@pytest.mark.parametrize("table", MAKES)
async def test_one_key_at_several_relays_at_once_creates_one_thing_and_all_get_it(
    url: str, relays: Sequence[Store], table: str
):
    makes = [MAKES[table](relay, KEY) for relay in relays]
    made = await all_at_once(url, f"LOCK TABLE {table} IN SHARE MODE", *makes)
    assert [one.id for one in made] == [made[0].id] * len(relays)
    assert await count(relays[0], table) == 1


@pytest.mark.parametrize("table", MAKES)
async def test_one_key_for_two_requests_at_once_is_refused_to_one_of_them(
    url: str, relays: Sequence[Store], table: str
):
    keys = [KEY, Idempotency("k", "other hash")]
    makes = [MAKES[table](relay, key) for relay, key in zip(relays, keys, strict=False)]
    made = await all_at_once(url, f"LOCK TABLE {table} IN SHARE MODE", *makes)
    assert [isinstance(one, Invalid) for one in made].count(True) == 1
    assert await count(relays[0], table) == 1


async def test_a_key_whose_first_use_was_undone_is_free(url: str, relays: Sequence[Store]):
    with suppress(RuntimeError):
        async with holding(
            url, "INSERT INTO idempotency_keys VALUES ($1, 'k', 'other', 'gen_1', 201, 1)", TENANT
        ):
            making = asyncio.ensure_future(a_generation_made(relays[0], KEY))
            await until_waiting(url, 1)
            raise RuntimeError("undone")
    assert await a_generation_made(relays[1], KEY) == await making


async def test_keys_in_any_order_meet_without_anybody_giving_way(relays: Sequence[Store], repeats: Any):
    for round_ in range(10):
        keys = [Idempotency(f"{round_}-{n}", "hash") for n in range(30)]
        shuffled = [random.sample(keys, len(keys)) for _ in relays]
        made = await asyncio.gather(
            *(
                relay.generations.create([Watch(a_generation(f"job {one.key}"), one) for one in order])
                for relay, order in zip(relays, shuffled, strict=True)
            )
        )
        ids = [
            {key.key: one.generation.id for key, one in zip(order, watched, strict=True)}
            for order, watched in zip(shuffled, made, strict=True)
        ]
        assert ids == [ids[0]] * len(relays)
        published = await asyncio.gather(
            *(
                relay.events.publish(
                    [
                        Publication(TENANT, [an_event(name=one.key)], replace(one, key=f"e {one.key}"))
                        for one in order
                    ],
                    NOTHING_HANDED_OVER,
                    now=NOW,
                )
                for relay, order in zip(relays, shuffled, strict=True)
            )
        )
        names = [{event.source_id: event.id for [event] in results} for results, _ in published]
        assert names == [names[0]] * len(relays)
    assert (await count(relays[0], "generations"), await count(relays[0], "events")) == (300, 300)
    assert repeats() == 0


async def test_jobs_and_names_in_any_order_meet_without_anybody_giving_way(
    relays: Sequence[Store], repeats: Any
):
    for round_ in range(20):
        names = [f"{round_}-{n}" for n in range(50)]
        orders = [random.sample(names, len(names)) for _ in relays]
        await asyncio.gather(
            *(
                relay.generations.create([Watch(a_generation(name)) for name in order])
                for relay, order in zip(relays, orders, strict=True)
            )
        )
        await asyncio.gather(
            *(
                published(relay, *[an_event(name=name) for name in order])
                for relay, order in zip(relays, orders, strict=True)
            )
        )
    assert (await count(relays[0], "generations"), await count(relays[0], "events")) == (1000, 1000)
    assert repeats() == 0


async def test_a_key_gives_what_watched_the_job_or_had_the_name_before(relays: Sequence[Store]):
    before = await watched(relays[0], "job-1")
    [event] = await published(relays[0], an_event(name="1"))
    for relay in relays:
        wishes = [Watch(a_generation("job-1"), KEY) for _ in range(2)]
        first, again = await relay.generations.create(wishes)
        assert (first.generation, first.created) == (again.generation, again.created) == (before, False)
        wish = Publication(TENANT, [an_event(name="1")], replace(KEY, key="e"))
        results, claimed = await relay.events.publish([wish, wish], taking(9), now=NOW)
        assert (results, claimed) == ([[event], [event]], [])


# Generations.


async def test_one_job_at_several_relays_at_once_is_watched_once(url: str, relays: Sequence[Store]):
    wishes = [relay.generations.create([Watch(a_generation("job-1"))]) for relay in relays]
    made = [one for [one] in await all_at_once(url, "LOCK TABLE generations IN SHARE MODE", *wishes)]
    assert [one.created for one in made].count(True) == 1
    assert {one.generation.id for one in made} == {
        one["id"] for one in await rows(relays[0], "SELECT id FROM generations")
    }


async def test_a_job_whose_generation_is_deleted_meanwhile_is_watched_anew(url: str, relays: Sequence[Store]):
    deleted = await watched(relays[0], "job-1")
    other = await watched(relays[0], None)
    async with holding(url, "UPDATE generations SET job_id = 'job-2' WHERE id = $1", other.id):
        wishes = [Watch(a_generation("job-1")), Watch(a_generation("job-2"))]
        watching = asyncio.create_task(relays[0].generations.create(wishes))
        await until_waiting(url, 1)  # at the second job: the first is known to be watched
        await relays[1].generations.delete(TENANT, deleted.id)
    first, second = await watching
    assert (second.generation.id, second.created) == (other.id, False)
    assert first.created
    assert await the(relays[1], first.generation) == first.generation


async def test_a_job_that_another_relay_names_at_that_moment_is_a_conflict(url: str, relays: Sequence[Store]):
    made = [await watched(relays[0], None) for _ in range(3)]
    name = "UPDATE generations SET job_id = 'job-1' WHERE id = $1"
    names = [
        relay.generations.name_job(one, "job-1", ask=None)
        for relay, one in zip(relays, made[1:], strict=False)
    ]
    refused = await all_at_once(url, name, *names, values=[made[0].id])
    assert [type(one) for one in refused] == [Conflict, Conflict]
    assert [(await the(relays[0], one)).job_id for one in made] == ["job-1", None, None]


async def test_an_end_that_several_relays_hear_at_once_is_announced_once(url: str, relays: Sequence[Store]):
    await registered(relays[0])
    made = await watched(relays[0], callback_url="https://callback.test/")
    records = [
        relay.events.record([change_of(made, update)], [], taking(9), now=NOW)
        for relay, update in zip(relays, (DONE, BROKEN, DONE, BROKEN), strict=True)
    ]
    lock = "SELECT 1 FROM generations WHERE id = $1 FOR UPDATE"
    recorded = await all_at_once(url, lock, *records, values=[made.id])
    [event] = [event for fresh, _ in recorded for event in fresh]
    assert event.announces == (await the(relays[0], made)).status
    assert sorted(len(claimed) for _, claimed in recorded) == [0, 0, 0, 2]
    assert (await count(relays[0], "events"), await count(relays[0], "deliveries")) == (1, 2)


@pytest.mark.parametrize("update", [DONE, Update(status=Is.TIMED_OUT)])
async def test_what_an_ask_brought_too_late_to_be_taken_is_asked_for_again(
    relays: Sequence[Store], update: Update
):
    made = await watched(relays[0], due_at=NOW)
    [read] = await relays[0].generations.get_many([made.id])
    held = await relays[0].generations.claim_one(made.id, lease="1", lease_until=NOW + 60 * SECOND)
    await relays[1].events.record([change_of(read, PROCESSING)], [], NOTHING_HANDED_OVER, now=NOW)
    ask = asked(held, at=NOW + 1, due_at=None if update is DONE else NOW + DAY)
    fresh, _ = await relays[0].events.record([change_of(read, update)], [ask], NOTHING_HANDED_OVER, now=NOW)
    after = await the(relays[0], made)
    assert (list(fresh), after.status, after.lease, after.due_at) == ([], Is.PROCESSING, None, NOW + 1)
    again = await relays[1].generations.claim_one(made.id, lease="2", lease_until=NOW + 60 * SECOND)
    await announced(relays[1], again, update)
    assert (await the(relays[0], made)).status is update.status


async def test_a_callback_while_an_ask_ends_has_it_asked_again_soon(url: str, relays: Sequence[Store]):
    made = await watched(relays[0], due_at=NOW)
    await relays[0].generations.claim_one(made.id, lease="1", lease_until=NOW + 60 * SECOND)
    ends = "UPDATE generations SET lease = NULL, asked_at = $2, due_at = $3 WHERE id = $1"
    hint = relays[1].generations.hint([Hint(made.id, None)], now=NOW)
    await all_at_once(url, ends, hint, values=[made.id, NOW, NOW + DAY])
    after = await the(relays[0], made)
    assert (after.due_at, after.hints, after.hint_asks) == (NOW + SECOND, 1, 0)


async def test_callbacks_at_several_relays_at_once_all_count(relays: Sequence[Store], repeats: Any):
    made = [await watched(relays[0], f"job-{n}") for n in range(20)]
    for _ in range(5):
        orders = [random.sample(made, len(made)) for _ in relays]
        await asyncio.gather(
            *(
                relay.generations.hint([Hint(one.id, None) for one in order], now=NOW)
                for relay, order in zip(relays, orders, strict=True)
            )
        )
    assert {one["hints"] for one in await rows(relays[0], "SELECT hints FROM generations")} == {20}
    assert repeats() == 0


async def test_what_is_due_or_overdue_is_claimed_by_one_relay(relays: Sequence[Store]):
    for n in range(200):
        await watched(relays[0], str(n), due_at=NOW, deadline_at=NOW + (0 if n % 2 else DAY))
    taken = Counter[str]()
    leases = dict[str, str]()

    async def claim(number: int, relay: Store) -> None:
        for round_ in range(10):
            for name in ("claim", "claim_overdue"):
                lease = f"{number} {round_} {name}"
                found = await getattr(relay.generations, name)(
                    {"luma": 7}, now=NOW, lease=lease, lease_until=NOW + 60 * SECOND
                )
                taken.update(one.id for one in found)
                leases.update((one.id, lease) for one in found)

    await asyncio.gather(*(claim(number, relay) for number, relay in enumerate(relays)))
    assert taken and set(taken.values()) == {1}
    held = await rows(relays[0], "SELECT id, lease FROM generations WHERE lease IS NOT NULL")
    assert {row["id"]: row["lease"] for row in held} == leases


async def test_of_one_that_is_claimed_in_two_ways_at_once_the_later_claim_alone_writes(
    url: str, relays: Sequence[Store]
):
    for n in range(20):
        made = await watched(relays[0], str(n), due_at=NOW)
        until = NOW + 60 * SECOND
        due, one = await asyncio.gather(
            relays[0].generations.claim({"luma": 1}, now=NOW, lease="due", lease_until=until),
            relays[1].generations.claim_one(made.id, lease="one", lease_until=until),
        )
        held = await the(relays[0], made)
        assert held.lease in {claim.lease for claim in (*due, one)}
        for claim in (*due, one):
            ask = asked(claim, due_at=NOW + DAY, last_error=claim.lease)
            await relays[2].events.record([], [ask], NOTHING_HANDED_OVER, now=NOW)
        after = await the(relays[0], made)
        assert (after.asks, after.last_error, after.lease) == (1, held.lease, None)


# Published events.


async def test_one_name_at_several_relays_at_once_is_published_once(url: str, relays: Sequence[Store]):
    await registered(relays[0], event_types=["a.b"])
    wishes = [
        relay.events.publish([Publication(TENANT, [an_event(name="1")], None)], taking(9), now=NOW)
        for relay in relays
    ]
    results = await all_at_once(url, "LOCK TABLE events IN SHARE MODE", *wishes)
    assert len({event.id for [[event]], _ in results}) == 1
    assert sum(len(claimed) for _, claimed in results) == 1
    assert (await count(relays[0], "events"), await count(relays[0], "deliveries")) == (1, 1)


async def test_a_name_whose_event_is_removed_meanwhile_is_published_anew(url: str, relays: Sequence[Store]):
    [old] = await published(relays[0], an_event(name="1"))
    [other] = await published(relays[0], an_event())
    async with holding(url, "UPDATE events SET source_id = '2' WHERE id = $1", other.id):
        wish = Publication(TENANT, [an_event(name="1"), an_event(name="2")], None)
        publishing = asyncio.create_task(relays[0].events.publish([wish], NOTHING_HANDED_OVER, now=NOW))
        await until_waiting(url, 1)  # at the second name: the first is known to be there
        assert (await relays[1].retention.remove_events(before=NOW + DAY, limit=9)).removed == 1
    [[first, second]], _ = await publishing
    assert (second.id, first.id == old.id) == (other.id, False)
    assert await relays[1].events.get(TENANT, first.id) == first


# Endpoints.


async def test_rotations_and_changes_at_once_all_happen(url: str, relays: Sequence[Store]):
    made = await registered(relays[0])
    works = [
        relays[0].endpoints.rotate(TENANT, made.id, "whsec_2", expires_at=NOW + DAY, now=NOW),
        relays[1].endpoints.rotate(TENANT, made.id, "whsec_3", expires_at=NOW + DAY, now=NOW),
        relays[2].endpoints.change(TENANT, made.id, lambda _: {"description": "d"}, now=NOW),
        relays[3].endpoints.change(TENANT, made.id, lambda _: {"rate_limit": 2.5}, now=NOW),
    ]
    lock = "SELECT 1 FROM endpoints WHERE id = $1 FOR UPDATE"
    await all_at_once(url, lock, *works, values=[made.id])
    after = await relays[0].endpoints.get(TENANT, made.id)
    assert after is not None
    assert {one.symmetric for one in after.secrets} == {"whsec_1", "whsec_2", "whsec_3"}
    assert (after.description, after.rate_limit) == ("d", 2.5)


async def test_a_change_is_made_of_what_the_change_before_it_has_left(url: str, relays: Sequence[Store]):
    made = await registered(relays[0], headers={"x-auth": "some-value"})
    moved = {"url": "https://other.test/", "headers": {}}
    lock = "SELECT 1 FROM endpoints WHERE id = $1 FOR UPDATE"
    async with holding(url, lock, made.id):
        first = asyncio.create_task(relays[0].endpoints.change(TENANT, made.id, lambda _: moved, now=NOW))
        await until_waiting(url, 1)
        second = asyncio.create_task(
            relays[1].endpoints.change(
                TENANT,
                made.id,
                lambda before: {"description": before.url, "headers": before.headers},
                now=NOW,
            )
        )
        await until_waiting(url, 2)
    await asyncio.gather(first, second)
    after = await relays[0].endpoints.get(TENANT, made.id)
    assert after is not None
    assert (after.url, after.description, after.headers) == ("https://other.test/", "https://other.test/", {})


async def test_rotations_of_a_tenants_secret_at_once_all_happen(url: str, relays: Sequence[Store]):
    works = [
        relay.tenants.rotate(TENANT, f"whsec_{n}", expires_at=NOW + DAY, now=NOW)
        for n, relay in enumerate(relays[:3])
    ]
    lock = "SELECT 1 FROM tenants WHERE id = $1 FOR UPDATE"
    await all_at_once(url, lock, *works, values=[TENANT])
    after = {one.symmetric for one in await relays[0].tenants.signing_secrets(TENANT)}
    assert after >= {"whsec_0", "whsec_1", "whsec_2"}
    assert len(after) == 4


async def test_what_is_deleted_stays_disabled_however_it_is_enabled_at_that_moment(
    url: str, relays: Sequence[Store]
):
    made = await registered(relays[0])
    await relays[0].endpoints.disable(TENANT, made.id, reason="why", now=NOW)
    works = [
        relays[0].endpoints.delete(TENANT, made.id, now=NOW + 1),
        relays[1].endpoints.enable(TENANT, made.id, now=NOW + 1),
    ]
    lock = "SELECT 1 FROM endpoints WHERE id = $1 FOR UPDATE"
    await all_at_once(url, lock, *works, values=[made.id])
    [row] = await rows(relays[0], "SELECT deleted_at, disabled_at, secrets FROM endpoints")
    assert (row["deleted_at"], row["disabled_at"] is None, row["secrets"]) == (NOW + 1, False, "")


@pytest.mark.parametrize("verb", ["disable", "delete"])
@pytest.mark.parametrize("room", [0, 9])
async def test_what_is_added_for_an_endpoint_just_when_it_ends_is_canceled_when_it_is_due(
    url: str, relays: Sequence[Store], verb: str, room: int
):
    endpoint = await registered(relays[0])
    made = await watched(relays[0], callback_url="https://callback.test/")
    # Deliveries to callback URLs need the tenant's secret, which is read last.
    async with holding(url, "LOCK TABLE tenants IN ACCESS EXCLUSIVE MODE"):
        recording = asyncio.create_task(relays[0].events.record([change_of(made)], [], taking(room), now=NOW))
        await until_waiting(url, 1)
        why = {"reason": "why"} if verb == "disable" else {}
        await getattr(relays[1].endpoints, verb)(TENANT, endpoint.id, **why, now=NOW)
    _, handed_over = await recording
    tried = [settlement(one, Status.PENDING) for one in handed_over]
    await relays[0].deliveries.settle(tried, now=NOW)
    claimed = await claimed_deliveries(relays[2], now=NOW + DAY)
    assert [one.endpoint_id for one in claimed] == [None]
    [row] = await rows(
        relays[0], "SELECT status, lease, due_at FROM deliveries WHERE endpoint_id IS NOT NULL"
    )
    assert row == {"status": "canceled", "lease": None, "due_at": None}


async def test_nothing_is_signed_with_the_secret_of_an_endpoint_that_is_deleted_while_it_is_claimed(
    url: str, relays: Sequence[Store]
):
    endpoint = await registered(relays[0], event_types=["a.b"])
    await published(relays[0], an_event())
    async with holding(url, "LOCK TABLE tenants IN ACCESS EXCLUSIVE MODE") as other:
        await other.execute(
            """
            UPDATE endpoints SET deleted_at = 1, disabled_at = 1, disabled_reason = 'deleted', secrets = ''
            """
        )
        claiming = asyncio.create_task(claimed_deliveries(relays[0]))
        await until_waiting(url, 1)  # where a claim reads the secrets
    assert await claiming == []
    assert await claimed_deliveries(relays[0], now=NOW + DAY) == []
    assert [row["status"] for row in await rows(relays[0], "SELECT status FROM deliveries")] == ["canceled"]
    assert await relays[0].endpoints.get(TENANT, endpoint.id) is None


@pytest.mark.parametrize("reason", ["410", "5 days"])
async def test_an_endpoint_that_several_relays_give_up_at_once_is_announced_once(
    url: str, relays: Sequence[Store], reason: str
):
    watcher = await registered(relays[0], event_types=[DISABLED])
    ill = await registered(relays[0], event_types=["a.b"])
    await published(relays[0], *[an_event() for _ in range(len(relays) + 2)])
    until = NOW + 100 * DAY
    first, *others = await relays[0].deliveries.claim({ill.id: 5}, now=NOW, lease="1", lease_until=until)
    failed = Answer(NOW, 7, 500, None, Code.HTTP_STATUS)
    await relays[0].deliveries.settle(
        [settlement(first, Status.FAILED, answer=failed, endpoint_is_well=False)], now=NOW
    )
    gone = ill.id if reason == "410" else None
    settling = [
        relay.deliveries.settle(
            [settlement(one, Status.FAILED, answer=failed, disable_endpoint=gone)], now=NOW + 5 * DAY
        )
        for relay, one in zip(relays, others, strict=True)
    ]
    lock = "SELECT 1 FROM endpoints WHERE id = $1 FOR UPDATE"
    assert await all_at_once(url, lock, *settling, values=[ill.id]) == [{ill.id}] * len(relays)
    assert len(await relays[0].events.page(TENANT, {"type": DISABLED}, limit=9, cursor=None)) == 1
    found = await rows(relays[0], "SELECT destination, status FROM deliveries")
    assert Counter((row["destination"], row["status"]) for row in found) == {
        (watcher.id, "pending"): 1,
        # Those that were in flight when the first of the relays gave it up were canceled by that.
        (ill.id, "failed"): 2,
        (ill.id, "canceled"): 4,
    }


async def test_health_that_several_relays_note_in_any_order_makes_nobody_give_way(
    relays: Sequence[Store], repeats: Any
):
    for _ in range(8):
        await registered(relays[0], event_types=["a.b"])
    await published(relays[0], *[an_event() for _ in range(4)])
    claimed = await claimed_deliveries(relays[0])
    luck = random.Random(1)  # noqa: S311
    for _ in range(50):
        await asyncio.gather(
            *(
                relay.deliveries.settle(
                    [
                        # Of nobody's delivery: only the health is noted.
                        settlement(one, lease="none", endpoint_is_well=luck.choice([True, False]))
                        for one in luck.sample(claimed, len(claimed))
                    ],
                    now=NOW,
                )
                for relay in relays
            )
        )
    assert repeats() == 0


# Deliveries.


async def test_a_replay_does_not_take_back_what_another_relay_is_sending_again(
    url: str, relays: Sequence[Store]
):
    one = await a_claimed_delivery(relays[0])
    await relays[0].deliveries.settle([settlement(one, Status.FAILED)], now=NOW)
    sends = "UPDATE deliveries SET status = 'sending', due_at = $2, lease = 'theirs' WHERE id = $1"
    replay = relays[0].deliveries.replay(TENANT, one.id, now=NOW + 1)
    [refusal] = await all_at_once(url, sends, replay, values=[one.id, NOW + DAY])
    assert isinstance(refusal, Conflict)
    after = await delivery(relays[0], one.id)
    assert (after["status"], after["lease"], after["due_at"]) == ("sending", "theirs", NOW + DAY)


async def test_of_replays_at_once_one_happens_and_the_others_are_told_why_not(
    url: str, relays: Sequence[Store]
):
    one = await a_claimed_delivery(relays[0])
    await relays[0].deliveries.settle([settlement(one, Status.FAILED)], now=NOW)
    replays = [relay.deliveries.replay(TENANT, one.id, now=NOW + 1) for relay in relays]
    lock = "SELECT 1 FROM deliveries WHERE id = $1 FOR UPDATE"
    done = await all_at_once(url, lock, *replays, values=[one.id])
    assert sorted(isinstance(each, Conflict) for each in done) == [False, True, True, True]
    assert {str(each) for each in done if isinstance(each, Conflict)} == {
        "this delivery is still pending: only a finished one can be replayed"
    }


async def test_an_attempt_whose_lease_is_lost_while_it_is_settled_is_not_logged(
    url: str, relays: Sequence[Store]
):
    stale = await a_claimed_delivery(relays[0])
    claims = "UPDATE deliveries SET lease = 'theirs', due_at = $2 WHERE id = $1"
    settle = relays[0].deliveries.settle([settlement(stale)], now=NOW)
    await all_at_once(url, claims, settle, values=[stale.id, NOW + DAY])
    after = await delivery(relays[0], stale.id)
    assert (after["status"], after["lease"], after["attempts"]) == ("sending", "theirs", 0)
    assert await relays[0].deliveries.attempts(stale.id) == []
    theirs = replace(stale, lease="theirs")
    await relays[1].deliveries.settle([settlement(theirs)], now=NOW + 1)
    assert len(await relays[0].deliveries.attempts(stale.id)) == 1


class Hands:
    """Relays that deliver at one made-up time, and who has what until when."""

    def __init__(self) -> None:
        self.now = NOW
        self.until = dict[str, int]()
        self.stale: list[Claimed] = []

    def take(self, claimed: Sequence[Claimed], now: int) -> None:
        for one in claimed:
            assert self.until.get(one.id, 0) <= now, "it is in two hands"
            self.until[one.id] = one.lease_until

    def put_down(self, one: Claimed) -> None:
        self.until.pop(one.id)


async def work(relay: Store, hands: Hands, luck: random.Random) -> None:
    """Claims a few, and does with each what may happen to one, until there is nothing left."""
    while await rows(relay, "SELECT 1 FROM deliveries WHERE due_at IS NOT NULL LIMIT 1"):
        hands.now += 1
        now = hands.now
        found = await relay.deliveries.destinations(now=now, after="", limit=9)
        claimed = await relay.deliveries.claim(
            {name: luck.randint(1, 20) for name, is_due in found if is_due},
            now=now,
            lease=f"{luck.random()}",
            lease_until=now + 5,
        )
        hands.take(claimed, now)
        settled, released = [], []
        for one in claimed:
            fate = luck.random()
            if fate < 0.1:
                hands.stale.append(one)  # its relay hangs, and wakes up when the lease is over
                continue
            hands.put_down(one)
            if fate < 0.2:
                released.append(one)
            elif fate < 0.6:
                answer = Answer(now, 7, 500, None, Code.HTTP_STATUS)
                settled.append(settlement(one, Status.PENDING, answer=answer, due_at=now))
            else:
                settled.append(settlement(one))
        luck.shuffle(settled)
        late = [one for one in hands.stale if one.lease_until < now]
        hands.stale = [one for one in hands.stale if one.lease_until >= now]
        # Of those that nobody has claimed again, a late outcome counts too.
        await asyncio.gather(
            relay.deliveries.settle(settled, now=now),
            relay.deliveries.release(released, now=now),
            relay.deliveries.settle([settlement(one) for one in late], now=now),
        )


async def test_what_many_relays_deliver_is_delivered_once_and_its_attempts_are_numbered_without_gaps(
    relays: Sequence[Store],
):
    for _ in range(5):
        await registered(relays[0], event_types=["a.b"])
    await published(relays[0], *[an_event() for _ in range(100)])
    hands = Hands()
    async with asyncio.timeout(90):
        await asyncio.gather(*(work(relay, hands, random.Random(n)) for n, relay in enumerate(relays)))  # noqa: S311
    made = await rows(relays[0], "SELECT id, status, attempts FROM deliveries")
    assert Counter(row["status"] for row in made) == {"delivered": 500}
    logged = await rows(
        relays[0], "SELECT delivery_id, number, response_status FROM attempts ORDER BY delivery_id, number"
    )
    for one in made:
        mine = [row for row in logged if row["delivery_id"] == one["id"]]
        assert [row["number"] for row in mine] == list(range(1, one["attempts"] + 1))
        assert [row["response_status"] for row in mine] == [*[500] * (len(mine) - 1), 204]


async def test_endpoints_that_come_and_go_while_relays_deliver_leave_nothing_on_its_way_to_them(
    relays: Sequence[Store],
):
    endpoints = [await registered(relays[0], event_types=["a.b"]) for _ in range(3)]
    over = False

    async def publish() -> None:
        for _ in range(40):
            await published(relays[0], *[an_event() for _ in range(5)])

    async def come_and_go() -> None:
        for n in range(60):
            endpoint = endpoints[n % 3]
            await relays[1].endpoints.disable(TENANT, endpoint.id, reason="why", now=NOW)
            await relays[1].endpoints.enable(TENANT, endpoint.id, now=NOW)
        for endpoint in endpoints:
            await relays[1].endpoints.disable(TENANT, endpoint.id, reason="why", now=NOW)

    async def deliver(relay: Store, luck: random.Random) -> None:
        while not over:
            claimed = list(await claimed_deliveries(relay, lease=f"{luck.random()}"))
            luck.shuffle(claimed)
            answer = Answer(NOW, 7, 500, None, Code.HTTP_STATUS)
            await relay.deliveries.settle(
                [
                    settlement(
                        one, Status.PENDING, answer=answer, due_at=NOW,
                        endpoint_is_well=luck.choice([True, False, None]),
                    )
                    for one in claimed
                ],
                now=NOW,
            )  # fmt: skip

    deliverers = [asyncio.create_task(deliver(relay, random.Random(n))) for n, relay in enumerate(relays)]  # noqa: S311
    await asyncio.gather(publish(), come_and_go())
    over = True
    await asyncio.gather(*deliverers)
    assert await claimed_deliveries(relays[3], lease="the last") == []
    assert await rows(relays[3], "SELECT id FROM deliveries WHERE status <> 'canceled'") == []


# Retention.


async def an_old_delivery(store: Store) -> Claimed:
    """One that failed after one attempt, 30 days ago."""
    await registered(store, event_types=["a.b"])
    await store.events.publish(
        [Publication(TENANT, [replace(an_event(), id=f"evt_{0:026}")], None)], NOTHING_HANDED_OVER, now=1
    )
    [one] = await claimed_deliveries(store)
    answer = Answer(1, 7, 500, None, Code.HTTP_STATUS)
    await store.deliveries.settle([settlement(one, Status.FAILED, answer=answer)], now=1)
    return one


@pytest.mark.parametrize("verb", ["remove_events", "remove_attempts"])
async def test_what_is_replayed_while_old_things_are_removed_stays_with_its_attempts(
    url: str, relays: Sequence[Store], verb: str
):
    one = await an_old_delivery(relays[0])
    replays = "UPDATE deliveries SET status = 'pending', due_at = $2 WHERE id = $1"
    async with holding(url, replays, one.id, NOW):
        removing = asyncio.create_task(getattr(relays[1].retention, verb)(before=NOW, limit=9))
        waiting = asyncio.create_task(until_waiting(url, 1))
        await asyncio.wait([removing, waiting], return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    await removing
    assert (await delivery(relays[0], one.id))["status"] == "pending"
    assert len(await relays[0].deliveries.attempts(one.id)) == 1
    assert await relays[0].events.get(TENANT, one.event_id) is not None


async def test_many_relays_remove_what_is_old_at_once_while_it_is_replayed(relays: Sequence[Store]):
    await registered(relays[0], event_types=["a.b"])
    old = NOW - 31 * DAY
    events = [replace(an_event(), id=f"evt_{n:026}") for n in range(1200)]
    _, handed_over = await relays[0].events.publish(
        [Publication(TENANT, events, None)], taking(9999, now=old), now=old
    )
    answer = Answer(old, 7, 500, None, Code.HTTP_STATUS)
    await relays[0].deliveries.settle(
        [settlement(one, Status.FAILED, answer=answer) for one in handed_over], now=old
    )
    replayed = set()

    async def replay(relay: Store, some: Sequence[Claimed]) -> None:
        for one in some:
            with suppress(NotFound):
                await relay.deliveries.replay(TENANT, one.id, now=NOW)
                replayed.add(one.id)

    await asyncio.gather(
        *(prune(relay, events=30 * DAY, attempts=30 * DAY, audit=YEAR, now=NOW) for relay in relays),
        *(replay(relay, handed_over[-number - 1 :: -40]) for number, relay in enumerate(relays)),
    )
    assert replayed
    left = await rows(relays[0], "SELECT id, event_id, status FROM deliveries")
    assert {row["id"] for row in left if row["status"] == "pending"} == replayed
    await prune(relays[0], events=30 * DAY, attempts=30 * DAY, audit=YEAR, now=NOW)
    assert {row["id"] for row in await rows(relays[0], "SELECT id FROM deliveries")} == replayed
    assert await count(relays[0], "events") == len(replayed)


# Keys.


async def test_of_relays_that_revoke_a_key_at_once_one_puts_it_on_record(relays: Sequence[Store], url: str):
    made = await relays[0].keys.create(a_key())
    entry = Entry(TENANT, NOW, "cli", "key.revoked", made.id)
    revoked = [relay.keys.revoke(TENANT, made.id, now=NOW, entry=entry) for relay in relays]
    assert await all_at_once(url, "LOCK TABLE keys IN SHARE MODE", *revoked) == [True] * 4
    assert await count(relays[0], "audit") == 1


async def test_of_relays_that_are_asked_for_the_same_key_at_once_one_makes_it(
    relays: Sequence[Store], url: str
):
    wishes = [a_key() for _ in relays]
    entries = [Entry(TENANT, NOW, "cli", "key.created", key.id) for key in wishes]
    made = await all_at_once(
        url,
        "LOCK TABLE idempotency_keys IN SHARE MODE",
        *(
            relay.keys.create(key, KEY, entry=entry)
            for relay, key, entry in zip(relays, wishes, entries, strict=True)
        ),
    )
    [key] = await relays[0].keys.all(None)
    assert made == [key] * 4
    assert await rows(relays[0], "SELECT object FROM audit") == [{"object": key.id}]


async def test_of_relays_that_make_the_last_key_that_a_tenant_may_have_at_once_one_does(
    relays: Sequence[Store], url: str
):
    await fill_with_keys(relays[0], TENANT, MOST_KEYS - 1, now=NOW)
    made = await all_at_once(
        url,
        "SELECT 1 FROM tenants WHERE id = $1 FOR UPDATE",
        *(relay.keys.create(a_key()) for relay in relays),
        values=[TENANT],
    )
    assert sorted(type(one).__name__ for one in made) == ["Conflict"] * 3 + ["Key"]


async def test_relays_that_write_down_the_uses_of_the_same_keys_at_once_keep_the_latest(
    relays: Sequence[Store], url: str
):
    ids = [(await relays[0].keys.create(a_key())).id for _ in range(20)]
    uses = [
        relay.keys.used({id_: NOW + number for id_ in ids[:: (-1) ** number]})
        for number, relay in enumerate(relays)
    ]
    assert await all_at_once(url, "LOCK TABLE keys IN SHARE MODE", *uses) == [None] * 4
    assert {key.last_used_at for key in await relays[0].keys.all(None)} == {NOW + 3}


# The first start.


async def test_of_relays_that_start_at_once_on_a_new_database_one_makes_and_shows_the_first_key(
    url: str, clock: Clock
):
    settings = read_config({"database": url, "secret_key": "of the tests"}, {})
    shown: list[str] = []
    async with AsyncExitStack() as stack:

        async def start() -> None:
            await stack.enter_async_context(running(settings, now=clock, show_key=shown.append))

        assert (
            await all_at_once(url, "LOCK TABLE keys IN SHARE MODE", start(), start(), start()) == [None] * 3
        )
        async with connected(url) as connection:
            assert await connection.fetchval("SELECT COUNT(*) FROM keys") == len(shown) == 1


async def test_relays_that_start_at_once_found_one_tenant(relays: Sequence[Store]):
    await asyncio.gather(
        *(relay.tenants.found("new", f"whsec_{n}", now=NOW) for n, relay in enumerate(relays))
    )
    secrets = {await relay.tenants.signing_secrets("new") for relay in relays}
    assert len(secrets) == 1
