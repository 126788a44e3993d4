"""What Relay remembers, on both databases; what only one of them has is in a file of its own."""

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest

from relay import event
from relay.delivery import Answer, Claimed, Code, Settlement, Status, Trigger
from relay.endpoint import Endpoint, Secret
from relay.errors import ConfigError, Conflict, Invalid, NotFound, Refused, StoreError
from relay.generation import Generation, LearnedBy, Output, Update
from relay.generation import Status as Is
from relay.hints import Turns, pause
from relay.ids import new_id
from relay.key import Key, Scope
from relay.prune import prune
from relay.schedule import CALLED, LEAST_RATE, Ask, Asked
from relay.store import Store, open_database, store_on
from relay.store.audit import Entry, note
from relay.store.endpoints import Endpoints
from relay.store.events import AT_ONCE, Change, Handoff, Publication
from relay.store.generations import CONSIDERED, Hint, Watch
from relay.store.idempotency import Idempotency
from relay.store.migrate import migrate, pending
from tests.keyring import KEYRING
from tests.postgres import Cluster

NOW = 1_800_000_000_000
SECOND, DAY, YEAR = 1_000, 86_400_000, 365 * 86_400_000
TENANT = "default"
NOTHING_HANDED_OVER = Handoff("", NOW, lambda destination, size: False)
DONE = Update(status=Is.COMPLETED, provider_status="completed", outputs=(Output("https://a.test/1.png"),))
BROKEN = Update(status=Is.FAILED, provider_status="failed")
LATE = Update(status=Is.TIMED_OUT)


@asynccontextmanager
async def opened(url: str) -> AsyncIterator[Store]:
    database = await open_database(url)
    try:
        yield store_on(database, KEYRING)
    finally:
        await database.close()


@asynccontextmanager
async def prepared(url: str) -> AsyncIterator[Store]:
    """A store with all tables, and a tenant."""
    async with opened(url) as store:
        await migrate(store.database, now=NOW)
        await store.tenants.found(TENANT, "whsec_of_the_tenant", now=NOW)
        yield store


@pytest.fixture
async def store(database_url: str) -> AsyncIterator[Store]:
    async with prepared(database_url) as store:
        yield store


def a_generation(job_id: str | None = "job-1", *, at: int = NOW, **changes: Any) -> Generation:
    return replace(
        Generation(
            id=new_id("gen", at), tenant=TENANT, account="luma", provider="luma", job_id=job_id,
            status=Is.QUEUED, created_at=at, deadline_at=at + 1800 * SECOND, due_at=at + 6 * SECOND,
        ),
        **changes,
    )  # fmt: skip


def an_endpoint(*, at: int = NOW, **changes: Any) -> Endpoint:
    made = Endpoint(
        id=new_id("ep", at), tenant=TENANT, url="https://a.test/", secrets=(Secret("whsec_1"),),
        event_types=[], accounts=[], created_at=at, updated_at=at,
    )  # fmt: skip
    return replace(made, **changes)


async def watched(store: Store, job_id: str | None = "job-1", **changes: Any) -> Generation:
    [made] = await store.generations.create([Watch(a_generation(job_id, **changes))])
    assert made.generation is not None
    return made.generation


async def registered(store: Store, **changes: Any) -> Endpoint:
    made = await store.endpoints.create(an_endpoint(**changes), None)
    assert made is not None
    return made


def change_of(generation: Generation, update: Update = DONE, *, now: int = NOW) -> Change:
    after = generation.after(update, now=now, learned_by=LearnedBy.POLL)
    assert after is not None
    return Change(after, [event.ending(after, now=now)] if after.ended else [])


def taking(room: int, *, now: int = NOW) -> Handoff:
    """Takes the next `room` deliveries, wherever they go."""
    left = iter(range(room))
    return Handoff("handed over", now + 45 * SECOND, lambda destination, size: next(left, None) is not None)


async def announced(
    store: Store, generation: Generation, update: Update = DONE, *, now: int = NOW, room: int = 0
) -> tuple[event.Event, Sequence[Claimed]]:
    [made], claimed = await store.events.record(
        [change_of(generation, update, now=now)], [], taking(room, now=now), now=now
    )
    return made, claimed


async def claimed_delivery(store: Store, **changes: Any) -> Claimed:
    """One delivery that is due, claimed under the lease `lease`."""
    await registered(store)
    await announced(store, await watched(store, **changes))
    [one] = await claimed_deliveries(store)
    return one


def an_event(type_: str = "a.b", name: str | None = None, **changes: Any) -> event.Event:
    return replace(event.published(TENANT, type_, {}, name, now=NOW), **changes)


async def published(
    store: Store, *events: event.Event, key: Idempotency | None = None, handoff: Handoff = NOTHING_HANDED_OVER
) -> Sequence[event.Event]:
    [result], _ = await store.events.publish([Publication(TENANT, events, key)], handoff, now=NOW)
    assert not isinstance(result, Refused)
    return result


def settlement(one: Claimed, status: Status = Status.DELIVERED, **changes: Any) -> Settlement:
    answer = Answer(started_at=NOW, duration_ms=7, status=204, body="ok")
    due_at = NOW + 5 * SECOND if status is Status.PENDING else None
    made = Settlement(
        one.id, one.lease, one.attempts + 1, one.trigger, answer, status, due_at,
        endpoint_id=one.endpoint_id, event_id=one.event_id,
    )  # fmt: skip
    return replace(made, **changes)


def asked(generation: Generation, **changes: Any) -> Asked:
    made = Asked(
        generation_id=generation.id, lease=generation.lease or "", at=NOW, due_at=NOW + 4 * SECOND,
        chance=0.5, rate=1e-4, open_at=None, deadline_at=generation.deadline_at, outage=generation.outage,
        errors=0, missing=0, hint_asks=None, hints=generation.hints,
        hinted_at=changes.get("at", NOW) + pause(generation.hints + 1, 0), last_error=None,
    )  # fmt: skip
    return replace(made, **changes)


async def rows(store: Store, sql: str, **values: Any) -> list[dict[str, Any]]:
    async with store.database.read() as tx:
        return [dict(row) for row in await tx.fetch(sql, **values)]


async def claimed_generations(store: Store, *, now: int, lease: str = "lease", limit: int = 100) -> Any:
    wanted = {"luma": limit}
    return await store.generations.claim(wanted, now=now, lease=lease, lease_until=now + 60 * SECOND)


async def claimed_deliveries(
    store: Store, *, now: int = NOW, lease: str = "lease", limit: int = 10, lease_until: int | None = None
) -> Sequence[Claimed]:
    """Up to `limit` of each destination that has something due."""
    found = await store.deliveries.destinations(now=now, after="", limit=100)
    wanted = {name: limit for name, is_due in found if is_due}
    until = now + 45 * SECOND if lease_until is None else lease_until
    return await store.deliveries.claim(wanted, now=now, lease=lease, lease_until=until)


async def listed(
    noun: Any, filters: Mapping[str, Any] | None = None, *, tenant: str = TENANT, **options: Any
) -> list[Any]:
    """A page of a list: of what may be large the store tells ids and sizes first."""
    given = [] if isinstance(noun, Endpoints) else [filters or {}]
    found = await noun.page(tenant, *given, **{"limit": 100, "cursor": None, **options})
    if not isinstance(found, Mapping):
        return list(found)
    known = {one.id: one for one in await noun.get_many(list(found), browse=True)}
    return [known[id_] for id_ in found]


async def the(store: Store, generation: Generation) -> Generation:
    """The generation as it is now."""
    found = await store.generations.get(TENANT, generation.id)
    assert found is not None
    return found


async def delivery_of(store: Store, one: Claimed) -> Any:
    found = await store.deliveries.get(TENANT, one.id)
    assert found is not None
    return found


async def endpoint_of(store: Store, one: Claimed) -> Endpoint:
    found = await store.endpoints.get(TENANT, one.endpoint_id or "")
    assert found is not None
    return found


# What is impossible, the database refuses.

ROWS: dict[str, dict[str, Any]] = {
    "keys": {"id": "key_1", "tenant": "t", "scopes": "read", "hash": "h", "created_at": 1},
    "audit": {
        "id": "aud_1", "tenant": "t", "at": 1, "actor": "cli", "action": "key.created", "object": "key_1",
        "details": '{"fields": []}',
    },
    "endpoints": {
        "id": "ep_1", "tenant": "t", "url": "https://a.test/", "event_types": "[]", "accounts": "[]",
        "headers": "", "metadata": "{}", "secrets": "s", "created_at": 1, "updated_at": 1,
    },
    "generations": {
        "id": "gen_1", "tenant": "t", "account": "a", "provider": "p", "job_id": "j", "status": "queued",
        "metadata": "{}", "awaits_callback": 0, "late": 0, "created_at": 1, "deadline_at": 2, "due_at": 1,
        "chance": 0.0, "rate": 0.0, "outage": 0, "asks": 0, "errors": 0, "missing": 0, "hints": 0,
        "version": 0,
    },
    "events": {
        "id": "evt_1", "tenant": "t", "type": "x", "generation_id": "gen_1", "announces": "completed",
        "source_id": "order-1", "body": b"{}", "created_at": 1,
    },
    "deliveries": {
        "id": "dlv_1", "tenant": "t", "event_id": "evt_1", "endpoint_id": "ep_1", "destination": "ep_1",
        "status": "pending", "attempts": 0, "run_attempts": 0, "next_trigger": "scheduled", "due_at": 1,
        "created_at": 1, "updated_at": 1,
    },
    "attempts": {
        "id": "att_1", "delivery_id": "dlv_1", "number": 1, "started_at": 1, "duration_ms": 1,
        "reason": "scheduled",
    },
    "idempotency_keys": {
        "tenant": "t", "key": "k", "request_hash": "h", "resource_id": "gen_1", "status": 201,
        "created_at": 1,
    },
    "accounts": {"name": "luma", "state": "{}", "lent": 0, "wanted": 0, "holder": None, "updated_at": 1},
}  # fmt: skip


async def insert(store: Store, table: str, **changes: Any) -> None:
    row = ROWS[table] | changes
    names, values = ", ".join(row), ", ".join(f":{name}" for name in row)
    async with store.database.write() as tx:
        await tx.execute(f"INSERT INTO {table} ({names}) VALUES ({values})", **row)  # noqa: S608


@pytest.mark.parametrize("table", ROWS)
async def test_a_row_that_is_possible_is_taken(store: Store, table: str):
    for needed in ("events", "deliveries"):
        if table in ("deliveries", "attempts") and needed != table:
            await insert(store, needed)
    await insert(store, table)


@pytest.mark.parametrize(
    ("table", "changes", "constraint"),
    [
        ("endpoints", {"disabled_at": 1}, "disabled_endpoints_have_a_reason"),
        ("endpoints", {"disabled_reason": "why"}, "disabled_endpoints_have_a_reason"),
        ("generations", {"status": "lost", "due_at": None, "known_at": 1}, "generation_status_is_known"),
        ("generations", {"status": "completed", "known_at": 1}, "only_unfinished_generations_are_polled"),
        ("generations", {"status": "queued", "due_at": None}, "open_generations_are_due"),
        ("generations", {"status": "processing", "due_at": None}, "open_generations_are_due"),
        ("generations", {"status": "failed", "due_at": None}, "ended_generations_are_known_since"),
        ("generations", {"status": "timed_out"}, "ended_generations_are_known_since"),
        ("generations", {"known_at": 1}, "ended_generations_are_known_since"),
        ("deliveries", {"status": "lost", "due_at": None}, "delivery_status_is_known"),
        ("deliveries", {"endpoint_id": None}, "deliveries_have_one_destination"),
        ("deliveries", {"callback_url": "https://a.test/"}, "deliveries_have_one_destination"),
        ("deliveries", {"due_at": None}, "open_deliveries_are_due"),
        ("deliveries", {"status": "delivered"}, "open_deliveries_are_due"),
        ("deliveries", {"status": "failed"}, "open_deliveries_are_due"),
        ("deliveries", {"status": "canceled"}, "open_deliveries_are_due"),
        ("deliveries", {"status": "sending"}, "sending_deliveries_are_leased"),
    ],
)
async def test_an_impossible_row_is_refused_by_name(
    store: Store, table: str, changes: dict[str, Any], constraint: str
):
    await insert(store, "events")
    with pytest.raises(StoreError, match=constraint):
        await insert(store, table, **changes)


@pytest.mark.parametrize(
    ("table", "changes", "refusal"),
    # In the words of SQLite, or else of PostgreSQL.
    [
        ("keys", {"hash": "h2"}, "keys.id|keys_pkey"),
        ("generations", {"id": "gen_2"}, "generations.job_id|a_job_is_watched_once"),
        ("events", {"id": "evt_2", "source_id": None}, "events.announces|each_status_is_announced_once"),
        (
            "events",
            {"id": "evt_2", "generation_id": None},
            "events.source_id|a_publisher_names_an_event_once",
        ),
        ("idempotency_keys", {"resource_id": "gen_2"}, "idempotency_keys.key|idempotency_keys_pkey"),
        ("deliveries", {"id": "dlv_2"}, "deliveries.event_id|an_event_goes_to_an_endpoint_once"),
        ("deliveries", {"id": "dlv_2", "event_id": "evt_9"}, "FOREIGN KEY|foreign key"),
        ("attempts", {"id": "att_2"}, "attempts.number|attempts_are_numbered"),
        ("attempts", {"id": "att_2", "delivery_id": "dlv_9"}, "FOREIGN KEY|foreign key"),
        ("accounts", {"lent": 1}, "accounts.name|accounts_pkey"),
    ],
)
async def test_a_second_row_of_what_there_is_once_is_refused(
    store: Store, table: str, changes: dict[str, Any], refusal: str
):
    for one in ROWS:
        await insert(store, one)
    with pytest.raises(StoreError, match=refusal):
        await insert(store, table, **changes)


# One database.


@pytest.mark.parametrize("url", ["relay.db", "mysql://a/b", "sqlite://relay.db"])
async def test_an_unknown_kind_of_database_is_refused(url: str):
    with pytest.raises(ConfigError, match="database: "):
        await open_database(url)


async def test_migrations_are_applied_once(empty_database_url: str):
    async with opened(empty_database_url) as store:
        missing = await pending(store.database)
        assert missing != []
        assert await migrate(store.database, now=NOW) == missing
        assert await migrate(store.database, now=NOW) == await pending(store.database) == []


async def test_relays_that_begin_at_once_on_one_postgresql_migrate_it_once(cluster: Cluster):
    url = cluster.database(template=None)
    async with AsyncExitStack() as stack:
        stores = [await stack.enter_async_context(opened(url)) for _ in range(3)]
        applied = await asyncio.gather(*(migrate(store.database, now=NOW) for store in stores))
        assert sorted(map(bool, applied)) == [False, False, True]
    cluster.drop(url)


async def test_a_database_that_is_newer_than_the_program_is_refused(store: Store):
    async with store.database.write() as tx:
        await tx.execute("INSERT INTO migrations (version, name, applied_at) VALUES (9999, 'future', 1)")
    for refused in (migrate(store.database, now=NOW), pending(store.database)):
        with pytest.raises(ConfigError, match="newer Relay"):
            await refused


async def test_readers_neither_wait_for_a_writer_nor_see_what_it_has_not_committed(store: Store):
    async with store.database.write() as tx:
        await tx.execute("DELETE FROM tenants")
        assert await store.tenants.signing_secrets(TENANT) == (Secret("whsec_of_the_tenant"),)


@pytest.mark.parametrize("browse", [True, False])
async def test_somebody_who_browses_and_the_others_do_not_wait_for_each_other(store: Store, browse: bool):
    async with asyncio.timeout(10), store.database.read(browse=browse) as held:
        async with store.database.read(browse=not browse) as tx:
            assert await tx.fetch("SELECT id FROM tenants") != []
        assert await held.fetch("SELECT id FROM tenants") != []


async def test_who_browses_sees_what_was_committed_before(store: Store):
    for _ in range(2):
        made = await watched(store, None)
        assert await listed(store.generations, limit=1) == [made]


async def test_what_raises_inside_a_transaction_undoes_all_of_it(store: Store):
    with pytest.raises(RuntimeError, match="no"):
        async with store.database.write() as tx:
            await tx.execute("DELETE FROM tenants")
            raise RuntimeError("no")
    assert await store.tenants.signing_secrets(TENANT) == (Secret("whsec_of_the_tenant"),)


async def test_a_writer_that_is_canceled_in_the_middle_leaves_nothing(store: Store):
    inside = asyncio.Event()

    async def write() -> None:
        async with store.database.write() as tx:
            await tx.execute("DELETE FROM tenants")
            inside.set()
            await asyncio.Event().wait()

    writer = asyncio.create_task(write())
    await inside.wait()
    writer.cancel()
    await asyncio.gather(writer, return_exceptions=True)
    await store.database.probe()
    assert await store.tenants.signing_secrets(TENANT) == (Secret("whsec_of_the_tenant"),)


async def test_what_was_written_is_there_when_the_database_is_opened_again(database_url: str):
    async with prepared(database_url) as store:
        made = await watched(store)
    async with opened(database_url) as store:
        assert await the(store, made) == made


async def test_probe_fails_on_a_closed_database(database_url: str):
    async with prepared(database_url) as store:
        await store.database.probe()
    with pytest.raises(StoreError) as refusal:
        await store.database.probe()
    assert refusal.value.general


async def test_how_many_rows_were_changed_is_said(store: Store):
    async with store.database.write() as tx:
        assert await tx.execute("UPDATE tenants SET signing_secrets = 's' WHERE id = 'nobody'") == 0
        assert await tx.execute("UPDATE tenants SET signing_secrets = 's' WHERE id = :id", id=TENANT) == 1
        assert await tx.execute("DELETE FROM tenants") == 1


@pytest.mark.parametrize("count", [0, 1, 2, 3, 9, 1000])
async def test_a_list_of_any_length_is_looked_up(store: Store, count: int):
    [made, *others] = [await watched(store, None) for _ in range(3)]
    ids = [made.id, *(f"gen_{n}" for n in range(count))][:count]
    assert await store.generations.get_many(ids) == ([made] if count else [])
    everybody = {one.id for one in await store.generations.get_many([one.id for one in (made, *others)])}
    assert everybody == {made.id, *(one.id for one in others)}


@pytest.mark.parametrize("changes", [{"id": "ep_1"}, {"url": None}, {"description": "\ud800"}])
async def test_what_is_wrong_with_one_row_is_no_general_failure(store: Store, changes: dict[str, Any]):
    await insert(store, "endpoints")
    with pytest.raises(StoreError) as refusal:
        await insert(store, "endpoints", **{"id": "ep_2", **changes})
    assert not refusal.value.general
    await insert(store, "endpoints", id="ep_3")


# Tenants.


async def test_a_tenant_keeps_its_first_secret(store: Store):
    await store.tenants.found(TENANT, "another", now=NOW)
    assert await store.tenants.signing_secrets(TENANT) == (Secret("whsec_of_the_tenant"),)


# Keys.


def a_key(*, at: int = NOW, **changes: Any) -> Key:
    made = Key(new_id("key", at), TENANT, None, (Scope.READ, Scope.REPLAY), "hash", at)
    return replace(made, **changes)


async def fill_with_keys(store: Store, tenant: str, count: int, *, now: int) -> None:
    """All but one until they are revoked, that one for a minute; of a tenant that is there."""
    async with store.database.write() as tx:
        await tx.execute_many(
            """
            INSERT INTO keys (id, tenant, scopes, hash, created_at, expires_at)
            VALUES (:id, :tenant, 'read', 'hash', :now, :ends)
            """,
            [
                {"id": new_id("key", now), "tenant": tenant, "now": now, "ends": None if n else now + 60_000}
                for n in range(count)
            ],
        )


async def test_a_key_comes_back_as_it_was_made(store: Store):
    whole = {"name": "n", "expires_at": NOW + 1, "revoked_at": NOW, "last_used_at": NOW, "rate_limit": 0.5}
    for made in (a_key(), a_key(**whole), a_key(scopes=tuple(Scope))):
        assert await store.keys.create(made) == made
        assert await store.keys.find(made.id) == made == await store.keys.get(TENANT, made.id)
        assert await store.keys.get("another tenant", made.id) is None
    assert await store.keys.find("key_unknown") is None


async def test_keys_are_listed_by_tenant_newest_first(store: Store):
    mine = [await store.keys.create(a_key(at=NOW + n)) for n in range(5)]
    other = await store.keys.create(a_key(tenant="another tenant"))
    assert await store.keys.page(TENANT, limit=3, cursor=None) == mine[:1:-1]
    assert await store.keys.page(TENANT, limit=9, cursor=mine[2].id) == mine[1::-1]
    assert await store.keys.page("another tenant", limit=9, cursor=None) == [other]
    assert await store.keys.all(TENANT) == mine[::-1]
    assert set(await store.keys.all(None)) == {*mine, other}


async def test_only_its_tenant_revokes_a_key_and_the_first_time_counts(store: Store):
    made = await store.keys.create(a_key())
    entry = Entry(TENANT, NOW, "cli", "key.revoked", made.id)
    assert not await store.keys.revoke("another tenant", made.id, now=NOW, entry=entry)
    assert not await store.keys.revoke(TENANT, "key_unknown", now=NOW, entry=entry)
    assert await store.audit.page(TENANT, {}, limit=9, cursor=None) == []
    for now in (NOW + 1, NOW + 2):
        assert await store.keys.revoke(TENANT, made.id, now=now, entry=entry)
    assert await store.keys.find(made.id) == replace(made, revoked_at=NOW + 1)
    assert [one.entry for one in await store.audit.page(TENANT, {}, limit=9, cursor=None)] == [entry]


async def test_when_a_key_was_used_only_goes_forward(store: Store):
    one, other, unused = [await store.keys.create(a_key()) for _ in range(3)]
    await store.keys.used({one.id: NOW + 5, other.id: NOW + 1, "key_unknown": NOW})
    await store.keys.used({one.id: NOW + 4, other.id: NOW + 2})
    found = [await store.keys.find(key.id) for key in (one, other, unused)]
    assert [key.last_used_at for key in found] == [NOW + 5, NOW + 2, None]


async def test_the_first_key_is_the_first_of_all_tenants(store: Store):
    assert not await store.keys.any()
    await store.keys.create(a_key(tenant="another tenant"))
    assert await store.keys.any()
    assert not await store.keys.create_first(a_key())
    assert await store.keys.all(TENANT) == []


# The audit log.


async def test_an_entry_comes_back_as_it_was_written_and_to_its_tenant_only(store: Store):
    entries = [
        Entry(TENANT, NOW, "cli", "key.created", "key_1"),
        Entry(TENANT, NOW + 1, "key_1", "endpoint.changed", "ep_1", "2001:db8::1", ("metadata", "url")),
        Entry("another tenant", NOW + 2, "cli", "key.created", "key_2", "address"),
    ]
    for entry in entries:
        await store.audit.add(replace(entry, fields=entry.fields[::-1]))
    found = await store.audit.page(TENANT, {}, limit=9, cursor=None)
    assert [one.entry for one in found] == entries[1::-1]
    [other] = await store.audit.page("another tenant", {}, limit=9, cursor=None)
    assert other.entry == entries[2]


async def test_an_entry_is_rolled_back_with_what_it_tells_of(store: Store):
    entry = Entry(TENANT, NOW, "cli", "key.created", "key_1")
    with pytest.raises(KeyError):
        async with store.database.write() as tx:
            await note(tx, entry)
            raise KeyError
    await store.database.probe()
    assert await store.audit.page(TENANT, {}, limit=9, cursor=None) == []


async def test_the_audit_log_is_removed_with_its_age(store: Store):
    for age in (366, 365, 364, 0):
        await store.audit.add(Entry(TENANT, NOW - age * DAY, "cli", "key.created", f"key_{age}"))
    await prune(store, events=DAY, attempts=DAY, audit=YEAR, now=NOW)
    left = await store.audit.page(TENANT, {}, limit=9, cursor=None)
    assert [one.entry.object for one in left] == ["key_0", "key_364", "key_365"]


# Endpoints.


async def test_many_deliveries_of_one_transaction_leave_others_their_turn(store: Store):
    for _ in range(20):
        await registered(store, event_types=["a.b"])
    turns, seen = 0, list[int]()

    async def take_turns() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    def takes(destination: str, size: int) -> bool:
        seen.append(turns)
        return False

    others = asyncio.create_task(take_turns())
    await published(store, *(an_event() for _ in range(100)), handoff=Handoff("", NOW, takes))
    others.cancel()
    # Between the first that is made and the last.
    assert (len(seen), len(set(seen))) == (2000, 2000 // AT_ONCE)
    assert len(await rows(store, "SELECT id FROM deliveries")) == 2000


async def test_an_endpoint_comes_back_as_it_was_registered(store: Store):
    made = await registered(
        store, description="d", event_types=["generation.failed"], accounts=["luma"],
        headers={"x-a": "1"}, metadata={"n": [1, None]},
        secrets=(Secret("new", "whsk_1"), Secret("old", expires_at=5)),
    )  # fmt: skip
    assert await store.endpoints.get(TENANT, made.id) == made
    assert await store.endpoints.get("another tenant", made.id) is None


async def test_changing_an_endpoint_leaves_its_state_and_other_tenants_alone(store: Store):
    made = await registered(store)
    await store.endpoints.disable(TENANT, made.id, reason="why", now=NOW + 1)
    changes = {"url": "https://b.test/", "description": "new"}
    await store.endpoints.change(TENANT, made.id, lambda _: changes, now=NOW + 2)
    theirs = {"url": "https://evil.test/"}
    assert await store.endpoints.change("another tenant", made.id, lambda _: theirs, now=NOW) is None
    changed = await store.endpoints.get(TENANT, made.id)
    assert changed == replace(
        made, url="https://b.test/", description="new", updated_at=NOW + 2, disabled_at=NOW + 1,
        disabled_reason="why",
    )  # fmt: skip


async def test_every_field_that_its_owner_may_change_is_changed_and_no_other(store: Store):
    made = await registered(store)
    changes = {
        "url": "https://b.test/", "description": "d", "event_types": ["a.b"], "accounts": ["luma"],
        "headers": {"x-a": "1"}, "rate_limit": 2.5, "metadata": {"n": [1, None]},
    }  # fmt: skip
    others = {"id": "ep_other", "tenant": "t", "secrets": "s", "disabled_at": 1, "created_at": 1}
    changed = await store.endpoints.change(TENANT, made.id, lambda _: changes | others, now=NOW + 1)
    assert changed == replace(made, **changes, updated_at=NOW + 1)
    assert await store.endpoints.get(TENANT, made.id) == changed


async def test_what_is_deleted_is_neither_changed_nor_given_a_secret(store: Store):
    made = await registered(store)
    await store.endpoints.delete(TENANT, made.id, now=NOW)
    before = await rows(store, "SELECT * FROM endpoints")
    changes = {"url": "https://b.test/"}
    assert await store.endpoints.change(TENANT, made.id, lambda _: changes, now=NOW + 1) is None
    await store.endpoints.rotate(TENANT, made.id, "new", expires_at=NOW + 9, now=NOW + 1)
    await store.endpoints.enable(TENANT, made.id, now=NOW + 1)
    assert await rows(store, "SELECT * FROM endpoints") == before


async def test_a_rotated_secret_leaves_those_before_it_valid_for_a_while_and_no_longer(
    store: Store,
):
    made = await registered(store)
    await store.endpoints.rotate("another tenant", made.id, "evil", expires_at=NOW + 9, now=NOW)
    for n in (2, 3):
        await store.endpoints.rotate(TENANT, made.id, f"whsec_{n}", expires_at=NOW + 10 * n, now=NOW + n)
    assert await store.endpoints.get(TENANT, made.id) == replace(
        made,
        secrets=(
            Secret("whsec_3", is_rotated=True),
            Secret("whsec_2", expires_at=NOW + 30, is_rotated=True),
            Secret("whsec_1", expires_at=NOW + 20),
        ),
        updated_at=NOW + 3,
    )
    await published(store, an_event("generation.completed"))
    [valid] = await claimed_deliveries(store, now=NOW + 29, lease_until=NOW + 30)
    [expired] = await claimed_deliveries(store, now=NOW + 30)
    assert (valid.secrets, expired.secrets) == (("whsec_3", "whsec_2"), ("whsec_3",))


async def test_disabling_leaves_what_is_on_its_way_to_others_and_what_has_ended(store: Store):
    one = await claimed_delivery(store)
    await store.deliveries.settle([settlement(one)], now=NOW)
    other = await registered(store)
    await announced(store, await watched(store, "job-2", callback_url="https://callback.test/"))
    assert one.endpoint_id is not None
    await store.endpoints.disable("another tenant", other.id, reason="why", now=NOW)
    await store.endpoints.disable(TENANT, one.endpoint_id, reason="why", now=NOW)
    found = await rows(store, "SELECT destination, status FROM deliveries ORDER BY status, destination")
    assert found == [
        {"destination": one.endpoint_id, "status": "canceled"},
        {"destination": one.endpoint_id, "status": "delivered"},
        {"destination": "callback:default:callback.test", "status": "pending"},
        {"destination": other.id, "status": "pending"},
    ]


async def test_disabling_cancels_what_is_on_its_way_and_enabling_does_not_bring_it_back(store: Store):
    one = await claimed_delivery(store)
    assert one.endpoint_id is not None
    await store.endpoints.disable(TENANT, one.endpoint_id, reason="why", now=NOW)
    disabled = await store.endpoints.get(TENANT, one.endpoint_id)
    assert disabled is not None
    assert (disabled.disabled_at, disabled.disabled_reason) == (NOW, "why")
    await store.endpoints.enable(TENANT, one.endpoint_id, now=NOW + 1)
    enabled = await store.endpoints.get(TENANT, one.endpoint_id)
    assert enabled is not None
    assert (enabled.disabled_at, enabled.disabled_reason) == (None, None)
    canceled = await store.deliveries.get(TENANT, one.id)
    assert canceled is not None
    assert (canceled.status, canceled.due_at) == (Status.CANCELED, None)


async def test_a_deleted_endpoint_is_gone_with_its_secrets_and_its_history_is_readable(store: Store):
    one = await claimed_delivery(store)
    assert one.endpoint_id is not None
    await store.endpoints.delete("another tenant", one.endpoint_id, now=NOW)
    assert await store.endpoints.get(TENANT, one.endpoint_id) is not None
    await store.endpoints.delete(TENANT, one.endpoint_id, now=NOW)
    assert await store.endpoints.get(TENANT, one.endpoint_id) is None
    assert await store.endpoints.page(TENANT, limit=10, cursor=None) == []
    [row] = await rows(store, "SELECT secrets, headers FROM endpoints")
    assert row == {"secrets": "", "headers": ""}
    history = await store.deliveries.get(TENANT, one.id)
    assert history is not None
    assert (history.status, history.url) == (Status.CANCELED, "https://a.test/")


async def test_an_idempotency_key_registers_one_endpoint(store: Store):
    same, other = Idempotency("k", "hash"), Idempotency("k", "other hash")
    made = await store.endpoints.create(an_endpoint(), same)
    assert await store.endpoints.create(an_endpoint(), same) == made
    with pytest.raises(Invalid):
        await store.endpoints.create(an_endpoint(), other)
    assert made is not None
    await store.endpoints.delete(TENANT, made.id, now=NOW)
    assert await store.endpoints.create(an_endpoint(), same) is None


# Generations.


async def test_a_generation_comes_back_as_it_was_created(store: Store):
    made = await watched(
        store, metadata={"order": 42}, callback_url="https://a.test/", awaits_callback=True, job_id=None
    )
    assert await store.generations.get(TENANT, made.id) == made
    assert await store.generations.get("another tenant", made.id) is None
    assert await store.generations.get_many([made.id, "gen_unknown"]) == [made]


async def test_a_job_is_watched_once_even_within_one_write(store: Store):
    wishes = [Watch(a_generation("job-1", at=NOW + n)) for n in range(3)]
    first, second, third = await store.generations.create(wishes)
    assert [first.created, second.created, third.created] == [True, False, False]
    assert first.generation == second.generation == third.generation
    other = await watched(store, "job-1", account="luma-eu")
    assert first.generation is not None
    assert other.id != first.generation.id


async def test_many_generations_may_still_have_no_job(store: Store):
    assert (await watched(store, None)).id != (await watched(store, None)).id


async def test_an_idempotency_key_watches_once_and_a_misused_key_fails_alone(store: Store):
    same, other = Idempotency("k", "hash"), Idempotency("k", "other hash")
    first, again, misused, fine = await store.generations.create(
        [
            Watch(a_generation(None), same),
            Watch(a_generation(None), same),
            Watch(a_generation(None), other),
            Watch(a_generation("job-2")),
        ]
    )
    assert (again.generation, again.created) == (first.generation, True)
    assert isinstance(misused.error, Invalid)
    assert fine.created


async def test_a_claim_takes_at_most_its_limit_of_what_is_due(store: Store):
    # All alike: the longer one has been due, the likelier it has ended.
    made = [await watched(store, f"job-{n}", due_at=NOW + n, chance=0.5, rate=1e-3) for n in range(5)]
    first = await claimed_generations(store, now=NOW + 3, limit=2, lease="1")
    second = await claimed_generations(store, now=NOW + 3, limit=10, lease="2")
    assert {one.id for one in first} == {one.id for one in made[:2]}
    assert {one.id for one in second} == {one.id for one in made[2:4]}
    assert await claimed_generations(store, now=NOW + 3) == []


async def test_a_claim_takes_of_each_account_what_is_wanted_of_it(store: Store):
    made = {
        account: [
            await watched(store, f"{account}-{n}", account=account, due_at=NOW + n, rate=1e-3)
            for n in range(3)
        ]
        for account in ("luma", "pictory", "vivix")
    }
    claim = store.generations.claim
    taken = await claim({"luma": 2, "pictory": 9, "x": 9}, now=NOW + 2, lease="1", lease_until=NOW + DAY)
    assert {one.id for one in taken} == {one.id for one in (*made["luma"][:2], *made["pictory"])}
    assert {(one.lease, one.due_at) for one in taken} == {("1", NOW + DAY)}
    assert await claim({}, now=NOW + 2, lease="2", lease_until=NOW + DAY) == []


async def test_of_what_is_due_the_likeliest_to_have_ended_is_claimed_first(store: Store):
    likely = await watched(store, "likely", due_at=NOW + 50, chance=0.5, rate=1e-3)
    unlikely = await watched(store, "due for longer", due_at=NOW, chance=0.1, rate=1e-3)
    quick = await watched(store, "quick", due_at=NOW + 90, chance=0.4, rate=2e-2)
    await watched(store, "not due", due_at=NOW + 101, chance=9.0, rate=1.0)
    claims = [await claimed_generations(store, now=NOW + 100, limit=1, lease=f"{n}") for n in range(4)]
    # By now 0.6, 0.55 and 0.2.
    assert [[one.id for one in claim] for claim in claims] == [[quick.id], [likely.id], [unlikely.id], []]


async def test_what_can_hardly_have_ended_is_claimed_in_the_end_however_much_likelier_others_are(
    store: Store,
):
    patient = await watched(store, "patient", due_at=NOW, chance=0.0, rate=LEAST_RATE)
    now, claimed = NOW, []
    while patient.id not in claimed and now < NOW + DAY:
        now += 600 * SECOND
        await watched(store, f"job-{now}", due_at=now, chance=0.5, rate=1e-3)
        wanted = {"luma": 1}
        [one] = await store.generations.claim(wanted, now=now, lease="1", lease_until=now + 9 * DAY)
        claimed.append(one.id)
    assert claimed[-1] == patient.id
    assert len(claimed) > 5, "others were likelier for a while"


async def test_likeliness_is_compared_among_those_that_have_been_due_longest(store: Store):
    wishes = [
        Watch(a_generation(f"job-{n}", due_at=NOW + n, chance=0.1, rate=1e-9)) for n in range(CONSIDERED + 1)
    ]
    last = wishes[-1].generation
    wishes[-1] = Watch(replace(last, chance=9.0))
    await store.generations.create(wishes)
    first = await claimed_generations(store, now=NOW + DAY, limit=CONSIDERED, lease="1")
    assert last.id not in {one.id for one in first} and len(first) == CONSIDERED
    second = await claimed_generations(store, now=NOW + DAY - 1, limit=CONSIDERED, lease="2")
    assert [one.id for one in second] == [last.id]


async def test_what_is_overdue_is_claimed_the_latest_first(store: Store):
    late = [await watched(store, f"late {n}", deadline_at=NOW + n, due_at=NOW) for n in range(3)]
    await watched(store, "has time", deadline_at=NOW + 4, due_at=NOW)
    await watched(store, "not due", deadline_at=NOW, due_at=NOW + 4)
    announced_late = await watched(store, "timed out", deadline_at=NOW, due_at=NOW)
    await announced(store, announced_late, LATE)

    async def claim(lease: str, limit: int) -> Sequence[Generation]:
        return await store.generations.claim_overdue(
            {"luma": limit}, now=NOW + 3, lease=lease, lease_until=NOW + DAY
        )

    first, second = await claim("1", 2), await claim("2", 9)
    assert {one.id for one in first} == {one.id for one in late[:2]}
    assert [one.id for one in second] == [late[2].id]
    assert {(one.lease, one.due_at) for one in first} == {("1", NOW + DAY)}
    assert await claim("3", 9) == []


async def test_what_is_overdue_is_claimed_up_to_the_limit_of_each_account_that_is_named(store: Store):
    names = ("luma", "pictory", "vivix")
    made = [
        await watched(store, f"{name} {n}", account=name, deadline_at=NOW + n, due_at=NOW)
        for name in names
        for n in range(2)
    ]
    assert sorted(await store.generations.watching_accounts()) == list(names)
    claim, until = store.generations.claim_overdue, NOW + DAY
    wanted = {"vivix": 2, "luma": 1, "nobody's": 1}
    taken = await claim(wanted, now=NOW + 1, lease="1", lease_until=until)
    assert {one.id for one in taken} == {made[0].id, made[4].id, made[5].id}
    assert await the(store, made[2]) == made[2]
    assert await claim({}, now=NOW + 1, lease="2", lease_until=until) == []


async def test_the_last_that_ended_at_an_account_are_read_in_the_order_of_their_ends(store: Store):
    made = [await watched(store, f"job-{n}") for n in range(4)]
    await watched(store, "still open")
    await announced(store, await watched(store, "elsewhere", account="vivix"), now=NOW)
    for n in (2, 0, 3, 1):
        await announced(store, made[n], BROKEN if n else LATE, now=NOW + n)
    ended = await store.generations.ended("luma", limit=3)
    assert [(one.id, one.known_at) for one in ended] == [(made[n].id, NOW + n) for n in (1, 2, 3)]
    assert len(await store.generations.ended("luma", limit=9)) == 4
    assert await store.generations.ended("nobody's", limit=9) == []


async def test_a_claim_that_nobody_finishes_comes_due_again(store: Store):
    await watched(store, due_at=NOW)
    assert len(await claimed_generations(store, now=NOW)) == 1
    assert await claimed_generations(store, now=NOW + 59 * SECOND) == []
    assert len(await claimed_generations(store, now=NOW + 60 * SECOND)) == 1


async def test_recover_makes_the_claims_of_a_dead_relay_due_and_nothing_else(store: Store):
    claimed, waiting = await watched(store, due_at=NOW), await watched(store, "2", due_at=NOW + DAY)
    await claimed_generations(store, now=NOW)
    assert await store.generations.recover(["luma"], now=NOW) == 1
    assert [one.id for one in await claimed_generations(store, now=NOW)] == [claimed.id]
    assert await store.generations.get(TENANT, waiting.id) == waiting


async def test_one_can_be_claimed_before_it_is_due_unless_it_has_ended(store: Store):
    made = await watched(store, due_at=NOW + DAY)
    claimed = await store.generations.claim_one(made.id, lease="1", lease_until=NOW)
    assert claimed is not None
    assert claimed.lease == "1"
    await announced(store, made)
    assert await store.generations.claim_one(made.id, lease="2", lease_until=NOW) is None


async def test_an_ask_is_written_under_its_lease_only(store: Store):
    await watched(store, due_at=NOW)
    [stale] = await claimed_generations(store, now=NOW, lease="1")
    [held] = await claimed_generations(store, now=NOW + 60 * SECOND, lease="2")
    before = await store.generations.get(TENANT, held.id)
    await store.events.record([], [asked(stale)], NOTHING_HANDED_OVER, now=NOW)
    assert await store.generations.get(TENANT, held.id) == before
    changes = {
        "errors": 2, "missing": 1, "hint_asks": 3, "last_error": "why", "due_at": NOW + 4 * SECOND,
        "chance": 0.25, "rate": 0.125, "open_at": NOW - 1, "deadline_at": NOW + DAY, "outage": 7,
    }  # fmt: skip
    await store.events.record([], [asked(held, **changes)], NOTHING_HANDED_OVER, now=NOW)
    after = await store.generations.get(TENANT, held.id)
    assert after == replace(held, lease=None, asked_at=NOW, asks=1, **changes)


async def test_when_it_was_last_seen_unended_is_kept_by_an_ask_that_saw_nothing(store: Store):
    made = await watched(store, due_at=NOW)
    for open_at, kept in ((None, None), (NOW + 5, NOW + 5), (None, NOW + 5), (NOW + 9, NOW + 9)):
        claimed = await store.generations.claim_one(made.id, lease="1", lease_until=NOW + DAY)
        assert claimed is not None
        await store.events.record([], [asked(claimed, open_at=open_at)], NOTHING_HANDED_OVER, now=NOW)
        assert (await the(store, made)).open_at == kept


async def test_a_hint_makes_it_due_at_once_but_a_second_after_the_last_ask(store: Store):
    fresh, just_asked = await watched(store, "1"), await watched(store, "2", due_at=NOW)
    [claimed] = await claimed_generations(store, now=NOW)
    await store.events.record([], [asked(claimed, at=NOW)], NOTHING_HANDED_OVER, now=NOW)
    await store.generations.hint([Hint(fresh.id, None), Hint(just_asked.id, None)], now=NOW + 1)
    first = await store.generations.get(TENANT, fresh.id)
    second = await store.generations.get(TENANT, just_asked.id)
    assert first is not None and second is not None
    assert (first.due_at, first.hint_asks) == (NOW + 1, 0)
    assert (second.due_at, second.hint_asks) == (NOW + SECOND, 0)


async def test_hints_that_nobody_has_asked_because_of_yet_move_it_only_once(store: Store):
    made = await watched(store)
    await store.generations.hint([Hint(made.id, None)], now=NOW)
    await store.generations.hint([Hint(made.id, None)] * 3, now=NOW + SECOND)
    after = await the(store, made)
    assert (after.due_at, after.hint_asks, after.hints) == (NOW, 0, 4)


async def test_each_further_hint_is_asked_after_a_longer_pause_and_with_fewer_quick_asks(store: Store):
    await watched(store, due_at=NOW)
    [claimed] = await claimed_generations(store, now=NOW)
    far = asked(claimed, at=NOW, due_at=NOW + DAY)
    await store.events.record([], [far], NOTHING_HANDED_OVER, now=NOW)
    for number, seconds in ((1, 1), (2, 4), (3, 9)):
        await store.generations.hint([Hint(claimed.id, None)], now=NOW)
        hinted = await the(store, claimed)
        assert (hinted.due_at, hinted.hint_asks) == (NOW + seconds * SECOND, number - 1)
        [again] = await claimed_generations(store, now=NOW + seconds * SECOND)
        report = asked(again, at=NOW, due_at=NOW + DAY)
        await store.events.record([], [report], NOTHING_HANDED_OVER, now=NOW)


async def test_a_hint_never_makes_it_later_nor_begins_its_quick_asks_anew(store: Store):
    await watched(store, due_at=NOW)
    [claimed] = await claimed_generations(store, now=NOW)
    soon = asked(claimed, at=NOW, due_at=NOW + 500, hint_asks=2)
    await store.events.record([], [soon], NOTHING_HANDED_OVER, now=NOW)
    before = await the(store, claimed)
    await store.generations.hint([Hint(claimed.id, None)], now=NOW)
    assert await the(store, claimed) == replace(before, hints=1, chance=CALLED)
    [claimed] = await claimed_generations(store, now=NOW + 500)
    await store.generations.hint([Hint(claimed.id, None)] * 9, now=NOW + 500)
    report = asked(claimed, at=NOW + 500, due_at=NOW + 700, hint_asks=3)
    await store.events.record([], [report], NOTHING_HANDED_OVER, now=NOW + 500)
    after = await the(store, claimed)
    assert (after.due_at, after.hint_asks, after.hints) == (NOW + 700, 3, 10)


async def test_hints_beyond_an_accounts_turns_are_late_and_not_lost(store: Store):
    made = [await watched(store, f"job-{number}") for number in range(5)]
    hints = [Hint(one.id, None) for one in made for _ in "123"]
    await store.generations.hint(hints, turns={"luma": Turns(4)}.get, now=NOW - DAY)
    found = [(await the(store, one)).due_at for one in made]
    assert found == [NOW - DAY + place * 30 * SECOND for place in (0, 0, 1, 2, 3)]


async def test_a_hint_that_has_nothing_asked_sooner_takes_no_turn(store: Store):
    ended, nameless, other = await watched(store, "1"), await watched(store, None), await watched(store, "2")
    await announced(store, ended)
    await watched(store, "3", due_at=NOW)
    [held] = await claimed_generations(store, now=NOW)
    idle = [Hint(one, None) for one in (ended.id, nameless.id, held.id, "gen_gone")]
    await store.generations.hint([*idle, Hint(other.id, None)], turns={"luma": Turns(2)}.get, now=NOW - DAY)
    assert (await the(store, other)).due_at == NOW - DAY


async def test_a_job_is_watched_by_every_tenant_that_has_not_seen_its_end(store: Store):
    mine, yours, ended = [await watched(store, tenant=tenant) for tenant in (TENANT, "yours", "theirs")]
    await watched(store, "another job")
    await watched(store, account="another account")
    await announced(store, ended)
    found = await store.generations.watching("luma", "job-1")
    assert sorted(found) == sorted([mine.id, yours.id])
    assert await store.generations.watching("luma", "unknown") == []


async def test_a_hint_waits_for_the_ask_in_flight_and_has_it_asked_again_a_second_later(store: Store):
    await watched(store, due_at=NOW)
    [claimed] = await claimed_generations(store, now=NOW)
    await store.generations.hint([Hint(claimed.id, None)] * 2, now=NOW + 1)
    hinted = await the(store, claimed)
    assert hinted == replace(claimed, hints=2, hint_asks=0, chance=CALLED)
    report = asked(claimed, at=NOW + 2, missing=2, hint_asks=None)
    await store.events.record([], [report], NOTHING_HANDED_OVER, now=NOW + 2)
    after = await the(store, claimed)
    assert (after.lease, after.due_at) == (None, NOW + 2 + SECOND)
    assert (after.hint_asks, after.missing, after.asks, after.chance) == (0, 0, 1, CALLED)


async def test_a_hint_that_the_ask_knew_of_does_not_have_it_asked_again(store: Store):
    made = await watched(store)
    await store.generations.hint([Hint(made.id, None)], now=NOW)
    [claimed] = await claimed_generations(store, now=NOW)
    assert (claimed.hints, claimed.hint_asks) == (1, 0)
    await store.events.record([], [asked(claimed, hint_asks=1)], NOTHING_HANDED_OVER, now=NOW)
    after = await the(store, claimed)
    assert (after.due_at, after.hint_asks, after.hints) == (NOW + 4 * SECOND, 1, 1)


async def test_a_hint_during_the_ask_that_brings_the_end_asks_no_more(store: Store):
    await watched(store, due_at=NOW)
    [claimed] = await claimed_generations(store, now=NOW)
    await store.generations.hint([Hint(claimed.id, None)], now=NOW)
    await store.events.record(
        [change_of(claimed)], [asked(claimed, due_at=None)], NOTHING_HANDED_OVER, now=NOW
    )
    after = await the(store, claimed)
    assert (after.status, after.due_at, after.lease) == (Is.COMPLETED, None, None)


async def test_a_hint_claims_a_job_only_where_none_is_known(store: Store):
    nameless, named = await watched(store, None), await watched(store, "mine")
    await store.generations.hint([Hint(nameless.id, "claimed"), Hint(named.id, "claimed")], now=NOW)
    first = await store.generations.get(TENANT, nameless.id)
    second = await store.generations.get(TENANT, named.id)
    assert first is not None and second is not None
    assert (first.job_id, first.claimed_job_id) == (None, "claimed")
    assert (second.job_id, second.claimed_job_id) == ("mine", None)


async def test_a_claimed_job_is_dropped_unless_another_was_claimed_meanwhile(store: Store):
    made = await watched(store, None)
    await store.generations.hint([Hint(made.id, "wrong")], now=NOW)
    wrong = await the(store, made)
    await store.generations.hint([Hint(made.id, "right")], now=NOW)
    right = await the(store, made)
    await store.generations.drop_claim(wrong)
    assert await the(store, made) == right
    assert right.claimed_job_id == "right"
    await store.generations.drop_claim(right)
    assert await the(store, made) == replace(right, claimed_job_id=None, hint_asks=None)


@pytest.mark.parametrize("ended", [True, False])
async def test_a_hint_about_what_has_ended_or_names_no_job_changes_nothing(store: Store, ended: bool):
    made = await watched(store, "job-1" if ended else None)
    if ended:
        await announced(store, made)
    before = await store.generations.get(TENANT, made.id)
    await store.generations.hint([Hint(made.id, None)], now=NOW)
    assert await store.generations.get(TENANT, made.id) == before


async def test_naming_a_job(store: Store):
    made, other = await watched(store, None), await watched(store, "taken")
    await store.generations.name_job(made, "job-1", ask=Ask(NOW + 3, chance=0.7, rate=0.01))
    now = await the(store, made)
    assert (now.due_at, now.chance, now.rate) == (NOW + 3, 0.7, 0.01)
    named = await store.generations.get(TENANT, made.id)
    assert named is not None
    assert (named.job_id, named.due_at) == ("job-1", NOW + 3)
    await store.generations.name_job(made, "job-1", ask=None)
    for generation, job_id in ((made, "job-2"), (made, "taken"), (other, "job-1")):
        with pytest.raises(Conflict):
            await store.generations.name_job(generation, job_id, ask=None)


async def test_describing_replaces_the_metadata_of_its_own_tenant_only(store: Store):
    made = await watched(store, metadata={"a": 1})
    await store.generations.describe("another tenant", made.id, {"b": 2})
    assert await store.generations.get(TENANT, made.id) == made
    await store.generations.describe(TENANT, made.id, {"b": 2})
    assert await store.generations.get(TENANT, made.id) == replace(made, metadata={"b": 2})


async def test_a_deleted_generation_is_never_announced(store: Store):
    await registered(store)
    made = await watched(store)
    assert not await store.generations.delete("another tenant", made.id)
    assert await store.generations.delete(TENANT, made.id)
    assert not await store.generations.delete(TENANT, made.id)
    recorded = await store.events.record([change_of(made)], [], taking(9), now=NOW)
    assert recorded == ([], [])
    assert await rows(store, "SELECT * FROM deliveries") == []


# Events.


async def test_an_ending_is_announced_once_however_many_saw_it(store: Store):
    await registered(store)
    made = await watched(store)
    results = await asyncio.gather(
        *(
            store.events.record([change_of(made, update)], [], taking(9), now=NOW)
            for update in (DONE, BROKEN) * 5
        )
    )
    assert sum(len(fresh) for fresh, _ in results) == 1
    assert sum(len(claimed) for _, claimed in results) == 1
    [stored] = await listed(store.events)
    after = await store.generations.get(TENANT, made.id)
    assert after is not None
    assert stored.announces == after.status


async def test_a_generation_that_timed_out_is_announced_again_when_it_ends_late(store: Store):
    made = await watched(store)
    await announced(store, made, LATE)
    [timed_out] = await store.generations.get_many([made.id])
    assert timed_out.due_at is not None
    await announced(store, timed_out, now=NOW + 1)
    [ended] = await store.generations.get_many([made.id])
    assert (ended.status, ended.late, ended.due_at) == (Is.COMPLETED, True, None)
    stored = await listed(store.events)
    assert [one.announces for one in stored] == ["completed", "timed_out"]


async def test_a_change_of_what_has_moved_meanwhile_changes_nothing(store: Store):
    made = await watched(store)
    processing = Update(status=Is.PROCESSING, provider_status="processing")
    await store.events.record([change_of(made, processing)], [], NOTHING_HANDED_OVER, now=NOW)
    assert await store.events.record([change_of(made)], [], NOTHING_HANDED_OVER, now=NOW) == ([], [])
    [after] = await store.generations.get_many([made.id])
    assert (after.status, after.version, after.update) == (Is.PROCESSING, 1, processing)


async def test_an_event_fans_out_to_whom_it_concerns(store: Store):
    wants = await registered(store, accounts=["luma"])
    await registered(store, accounts=["pictory"])
    await registered(store, event_types=["generation.failed"])
    await registered(store, tenant="another tenant")
    disabled = await registered(store)
    await store.endpoints.disable(TENANT, disabled.id, reason="why", now=NOW)
    deleted = await registered(store)
    await store.endpoints.delete(TENANT, deleted.id, now=NOW)
    made = await watched(store, callback_url="https://callback.test/")
    announcement, claimed = await announced(store, made, room=9)
    assert {(one.endpoint_id, one.url) for one in claimed} == {
        (wants.id, "https://a.test/"),
        (None, "https://callback.test/"),
    }
    assert {one.secrets for one in claimed} == {("whsec_1",), ("whsec_of_the_tenant",)}
    assert {one.event_id for one in claimed} == {announcement.id}


async def test_only_as_many_deliveries_are_handed_over_as_there_is_room(store: Store):
    for _ in range(3):
        await registered(store)
    _, claimed = await announced(store, await watched(store), room=2)
    assert len(claimed) == 2
    statuses = await rows(store, "SELECT status, lease, due_at FROM deliveries ORDER BY status")
    assert statuses == [
        {"status": "pending", "lease": None, "due_at": NOW},
        *[{"status": "sending", "lease": "handed over", "due_at": NOW + 45 * SECOND}] * 2,
    ]


async def test_who_takes_a_delivery_is_told_where_it_goes_and_how_large_it_is(store: Store):
    first, second = await registered(store), await registered(store)
    made = await watched(store, callback_url="https://callback.test:8443/a?b")
    told = []

    def takes(destination: str, size: int) -> bool:
        told.append((destination, size))
        return destination == second.id

    handoff = Handoff("lease", NOW + SECOND, takes)
    [fact], [taken] = await store.events.record([change_of(made)], [], handoff, now=NOW)
    destinations = [first.id, second.id, "callback:default:callback.test:8443"]
    assert told == [(name, len(fact.body)) for name in destinations]
    assert (taken.endpoint_id, taken.destination) == (second.id, second.id)


async def test_what_is_handed_over_equals_what_a_claim_would_have_given(store: Store):
    await registered(
        store, headers={"x-a": "1"}, rate_limit=2.5,
        secrets=(Secret("whsec_1", "whsk_1"), Secret("old", expires_at=NOW + DAY)),
    )  # fmt: skip
    made = await watched(store, callback_url="https://callback.test/")
    _, handed_over = await announced(store, made, room=9)
    claimed = await claimed_deliveries(store, now=NOW + 45 * SECOND, lease_until=NOW + DAY - 1)
    released = [replace(one, lease="handed over", lease_until=NOW + 45 * SECOND) for one in claimed]
    for one in handed_over:
        assert replace(one, secrets=tuple(one.secrets)) in released
    assert len(handed_over) == len(released) == 2


async def test_a_test_event_goes_to_its_endpoint_only(store: Store):
    endpoint, _ = await registered(store, event_types=["generation.failed"]), await registered(store)
    made = event.test(TENANT, endpoint.id, now=NOW)
    delivery_id, [claimed] = await store.events.send(made, endpoint, taking(1), now=NOW)
    assert (claimed.id, claimed.endpoint_id, claimed.body) == (delivery_id, endpoint.id, made.body)
    assert await store.events.get(TENANT, made.id) == made
    assert await store.events.get("another tenant", made.id) is None
    later, nothing = await store.events.send(
        event.test(TENANT, endpoint.id, now=NOW), endpoint, NOTHING_HANDED_OVER, now=NOW
    )
    waiting = await store.deliveries.get(TENANT, later)
    assert (list(nothing), waiting.status if waiting else None) == ([], Status.PENDING)


async def test_what_relay_itself_has_to_say_goes_to_those_of_the_tenant_that_want_it(store: Store):
    wants = await registered(store, event_types=["endpoint.disabled"])
    await registered(store)
    await registered(store, event_types=["endpoint.disabled"], tenant="another tenant")
    made = event.disabled(TENANT, "ep_ill", "https://ill.test/", "why", now=NOW)
    [claimed] = await store.events.announce([made], taking(9), now=NOW)
    assert (claimed.endpoint_id, claimed.event_id, claimed.body) == (wants.id, made.id, made.body)
    assert await listed(store.events) == [made]
    assert await store.events.announce([], taking(9), now=NOW) == []


# Published events.


async def test_a_published_event_goes_to_those_of_its_tenant_that_ask_for_its_type(store: Store):
    wants = await registered(store, event_types=["a.b"])
    await registered(store)
    await registered(store, event_types=["a.c"])
    await registered(store, event_types=["a.b"], accounts=["luma"])
    another = await registered(store, event_types=["a.b"], tenant="another tenant")
    made, elsewhere = an_event("a.b", "order-1"), an_event(tenant=another.tenant)
    wishes = [Publication(TENANT, [made], None), Publication(another.tenant, [elsewhere], None)]
    results, claimed = await store.events.publish(wishes, taking(9), now=NOW)
    assert results == [[made], [elsewhere]]
    assert await store.events.get(TENANT, made.id) == made
    assert {(one.endpoint_id, one.event_id, one.body) for one in claimed} == {
        (wants.id, made.id, made.body),
        (another.id, elsewhere.id, elsewhere.body),
    }


async def test_a_name_is_published_once_for_each_tenant_and_no_name_always(store: Store):
    await registered(store, event_types=["a.b"])
    first, again, other = an_event(name="1"), an_event(name="1"), an_event(name="2")
    assert await published(store, first, again) == [first, first]
    nameless = [an_event(), an_event()]
    assert await published(store, again, other, *nameless) == [first, other, *nameless]
    elsewhere = an_event(name="1", tenant="another tenant")
    wish = Publication("another tenant", [elsewhere, replace(elsewhere, id=again.id)], None)
    [result], _ = await store.events.publish([wish], NOTHING_HANDED_OVER, now=NOW)
    assert result == [elsewhere, elsewhere]
    assert await published(store, again) == [first]
    assert {one.event_id for one in await claimed_deliveries(store)} == {
        one.id for one in (first, other, *nameless)
    }


async def test_an_idempotency_key_publishes_once_and_a_misused_key_fails_alone(store: Store):
    await registered(store, event_types=["a.b"])
    same, other = Idempotency("k", "hash"), Idempotency("k", "other hash")
    first = [an_event(), an_event(name="1")]
    wishes = [
        Publication(TENANT, first, same),
        Publication(TENANT, [an_event()], same),
        Publication(TENANT, [an_event()], other),
        Publication("another tenant", [an_event(tenant="another tenant")], other),
        Publication(TENANT, [plain := an_event()], None),
    ]
    (made, again, misused, elsewhere, fine), claimed = await store.events.publish(wishes, taking(9), now=NOW)
    assert made == again == first
    assert isinstance(misused, Invalid)
    assert (elsewhere, fine) == (list(wishes[3].events), [plain])
    assert {one.event_id for one in claimed} == {one.id for one in (*first, plain)}
    assert await published(store, an_event(), an_event(), key=same) == first
    assert len(await rows(store, "SELECT id FROM events")) == 4
    assert len(await rows(store, "SELECT id FROM deliveries")) == 3


async def test_a_key_remembers_what_it_was_answered_in_its_order_and_what_was_there_before(store: Store):
    key = Idempotency("k", "hash")
    before = an_event(name="before")
    await published(store, before)
    fresh = an_event(name="fresh")
    for _ in range(2):
        assert await published(store, fresh, an_event(name="before"), fresh, key=key) == [
            fresh, before, fresh,
        ]  # fmt: skip


async def test_a_key_whose_events_are_gone_is_refused(store: Store):
    key = Idempotency("k", "hash")
    await published(store, an_event(), key=key)
    assert (await store.retention.remove_events(before=NOW + DAY, limit=9)).removed == 1
    [refusal], _ = await store.events.publish(
        [Publication(TENANT, [an_event()], key)], NOTHING_HANDED_OVER, now=NOW
    )
    assert isinstance(refusal, Conflict)
    assert await rows(store, "SELECT id FROM events") == []


@pytest.mark.parametrize("key", [None, Idempotency("k", "hash")])
async def test_all_of_a_publication_is_stored_or_nothing(store: Store, key: Idempotency | None):
    await registered(store, event_types=["a.b"])
    stored = an_event()
    await published(store, stored)
    fine, bad = an_event(name="1"), replace(an_event(), id=stored.id)
    wishes = [Publication(TENANT, [an_event()], None), Publication(TENANT, [fine, bad], key)]
    with pytest.raises(StoreError) as refusal:
        await store.events.publish(wishes, taking(9), now=NOW)
    assert not refusal.value.general
    assert await rows(store, "SELECT id FROM events") == [{"id": stored.id}]
    assert len(await rows(store, "SELECT id FROM deliveries")) == 1
    assert await published(store, fine, key=key) == [fine]


# Deliveries.


async def test_destinations_are_walked_in_order_and_say_whether_something_is_due(store: Store):
    due, later, sending, done = sorted([await registered(store) for _ in range(4)], key=lambda one: one.id)
    await announced(store, await watched(store, callback_url="https://callback.test/1"))
    await announced(store, await watched(store, "2", callback_url="https://callback.test/2"))
    for one in await claimed_deliveries(store):
        status = Status.DELIVERED if one.endpoint_id == done.id else Status.PENDING
        if one.destination in (due.id, "callback:default:callback.test"):
            await store.deliveries.release([one], now=NOW)
        elif one.endpoint_id != sending.id:
            await store.deliveries.settle([settlement(one, status)], now=NOW)
    whole = [("callback:default:callback.test", True), (due.id, True), (later.id, False), (sending.id, False)]
    walk = store.deliveries.destinations
    assert await walk(now=NOW, after="", limit=9) == whole
    assert await walk(now=NOW, after="", limit=2) == whole[:2]
    assert await walk(now=NOW, after=whole[1][0], limit=2) == whole[2:]
    assert await walk(now=NOW, after=whole[3][0], limit=2) == []
    assert [is_due for _, is_due in await walk(now=NOW + 45 * SECOND, after="", limit=9)] == [True] * 4


async def test_a_claim_takes_of_each_destination_what_is_wanted_of_it_and_earliest_first(store: Store):
    first, second, third = [await registered(store, event_types=["a.b"]) for _ in range(3)]
    for n in range(3):
        wish = Publication(TENANT, [an_event(name=str(n))], None)
        await store.events.publish([wish], NOTHING_HANDED_OVER, now=NOW + n)
    wanted = {third.id: 1, first.id: 2, "ep_unknown": 5}
    claimed = await store.deliveries.claim(wanted, now=NOW + 2, lease="1", lease_until=NOW + DAY)
    names = {one["id"]: one["source_id"] for one in await rows(store, "SELECT id, source_id FROM events")}
    assert sorted((one.destination, names[one.event_id]) for one in claimed) == [
        (first.id, "0"), (first.id, "1"), (third.id, "0"),
    ]  # fmt: skip
    assert await store.deliveries.claim({}, now=NOW + 2, lease="2", lease_until=NOW + DAY) == []
    rest = await claimed_deliveries(store, now=NOW + 2, lease="3")
    assert Counter(one.destination for one in rest) == {first.id: 1, second.id: 3, third.id: 2}


@pytest.mark.parametrize(("most_bytes", "taken"), [(0, 1), (249, 1), (250, 2), (10_000, 4)])
async def test_a_claim_takes_no_more_bytes_than_it_is_told_but_one_however_large(
    store: Store, most_bytes: int, taken: int
):
    one, other = [await registered(store, event_types=["a.b"]) for _ in range(2)]
    await published(store, an_event(body=b"x" * 125), an_event(body=b"x" * 125))
    wanted = {one.id: 9, other.id: 9}
    first = await store.deliveries.claim(
        wanted, now=NOW, lease="1", lease_until=NOW + SECOND, most_bytes=most_bytes
    )
    assert len(first) == taken
    rest = await claimed_deliveries(store, lease="2")
    assert len({delivery.id for delivery in (*first, *rest)}) == len(first) + len(rest) == 4
    assert {delivery.attempts for delivery in rest} <= {0}


async def test_a_claim_of_deliveries_takes_at_most_its_limit_and_comes_due_again(store: Store):
    await registered(store, event_types=["a.b"])
    await published(store, an_event(), an_event(), an_event())
    first = await claimed_deliveries(store, limit=2, lease="1")
    second = await claimed_deliveries(store, limit=2, lease="2")
    assert (len(first), len(second)) == (2, 1)
    assert await claimed_deliveries(store, lease="3") == []
    again = await claimed_deliveries(store, now=NOW + 45 * SECOND, lease="4")
    assert {one.id for one in again} == {one.id for one in (*first, *second)}


async def test_a_claimed_delivery_signs_with_the_old_secret_only_while_it_is_valid(store: Store):
    await registered(store, secrets=(Secret("whsec_1"), Secret("old", expires_at=NOW + 10)))
    await announced(store, await watched(store))
    [valid] = await claimed_deliveries(store, lease_until=NOW + 10)
    [expired] = await claimed_deliveries(store, now=NOW + 10)
    assert (valid.secrets, expired.secrets) == (("whsec_1", "old"), ("whsec_1",))


async def test_settling_logs_the_attempt_and_moves_the_delivery(store: Store):
    one = await claimed_delivery(store)
    retry = Answer(NOW, 7, 500, "oops", Code.HTTP_STATUS, "the endpoint answered 500")
    await store.deliveries.settle([settlement(one, Status.PENDING, answer=retry)], now=NOW + 1)
    after = await store.deliveries.get(TENANT, one.id)
    assert after is not None
    assert (after.status, after.attempts, after.due_at) == (Status.PENDING, 1, NOW + 5 * SECOND)
    [attempt] = await store.deliveries.attempts(one.id)
    assert replace(attempt, id="") == type(attempt)(
        "", 1, NOW, 7, Trigger.SCHEDULED, 500, "oops", "http_status", "the endpoint answered 500"
    )
    [again] = await claimed_deliveries(store, now=NOW + 5 * SECOND)
    assert (again.attempts, again.run_attempts) == (1, 1)


async def test_postponed_deliveries_are_due_each_at_its_time_and_only_by_their_lease(store: Store):
    await registered(store)
    await registered(store)
    await announced(store, await watched(store))
    first, second = await claimed_deliveries(store)
    third = replace(first, lease="of somebody else")
    await store.deliveries.postpone([(third, NOW), (first, NOW + 5), (second, NOW + 9)])
    for one, due_at in ((first, NOW + 5), (second, NOW + 9)):
        shown = await store.deliveries.get(TENANT, one.id)
        assert shown is not None
        assert (shown.status, shown.due_at, shown.attempts) == (Status.PENDING, due_at, 0)
    await store.deliveries.postpone([(first, NOW)])
    assert await claimed_deliveries(store, now=NOW + 4) == []
    [again] = await claimed_deliveries(store, now=NOW + 5)
    assert again.id == first.id


async def test_settling_with_a_stale_lease_changes_nothing(store: Store):
    stale = await claimed_delivery(store)
    [held] = await claimed_deliveries(store, now=NOW + 45 * SECOND, lease="2")
    before = await rows(store, "SELECT * FROM deliveries")
    await store.deliveries.settle([settlement(stale)], now=NOW + 46 * SECOND)
    await store.deliveries.release([stale], now=NOW)
    assert await rows(store, "SELECT * FROM deliveries") == before
    assert await store.deliveries.attempts(stale.id) == []
    await store.deliveries.settle([settlement(held)], now=NOW + 46 * SECOND)
    await store.deliveries.settle([settlement(held, Status.FAILED)], now=NOW + 47 * SECOND)
    after = await store.deliveries.get(TENANT, held.id)
    assert after is not None
    assert (after.status, after.attempts) == (Status.DELIVERED, 1)


async def test_an_attempt_in_flight_when_its_delivery_is_canceled_is_logged_and_it_stays_canceled(
    store: Store,
):
    one = await claimed_delivery(store)
    assert one.endpoint_id is not None
    await store.endpoints.disable(TENANT, one.endpoint_id, reason="why", now=NOW)
    await store.deliveries.settle([settlement(one, Status.PENDING)], now=NOW)
    after = await store.deliveries.get(TENANT, one.id)
    assert after is not None
    assert (after.status, after.due_at, after.attempts) == (Status.CANCELED, None, 1)
    assert len(await store.deliveries.attempts(one.id)) == 1


async def test_gone_disables_the_endpoint_and_cancels_its_other_deliveries_in_the_same_write(store: Store):
    one, other = await claimed_delivery(store), await registered(store)
    await announced(store, await watched(store, "job-2"))
    gone = settlement(one, Status.FAILED, disable_endpoint=one.endpoint_id)
    for _ in range(2):
        assert await store.deliveries.settle([gone], now=NOW) == {one.endpoint_id}
    assert len(await store.events.page(TENANT, {"type": event.DISABLED}, limit=9, cursor=None)) == 1
    found = await store.deliveries.page(TENANT, {}, limit=10, cursor=None)
    assert sorted((each.endpoint_id == one.endpoint_id, each.status) for each in found) == [
        (False, Status.PENDING),
        (True, Status.CANCELED),
        (True, Status.FAILED),
    ]
    untouched = await store.endpoints.get(TENANT, other.id)
    assert untouched is not None
    assert untouched.disabled_at is None


async def test_releasing_makes_a_delivery_due_without_an_attempt(store: Store):
    one = await claimed_delivery(store)
    await store.deliveries.release([one], now=NOW)
    [again] = await claimed_deliveries(store, lease="2")
    assert (again.id, again.attempts) == (one.id, 0)


async def test_recover_makes_what_was_being_sent_due_and_leaves_retries_their_time(store: Store):
    one = await claimed_delivery(store)
    assert await store.deliveries.recover(now=NOW) == 1
    [again] = await claimed_deliveries(store, lease="2")
    assert again.id == one.id
    await store.deliveries.settle([settlement(again, Status.PENDING)], now=NOW)
    assert await store.deliveries.recover(now=NOW) == 0


async def test_a_replay_is_a_fresh_run_under_the_next_number(store: Store):
    one = await claimed_delivery(store)
    await store.deliveries.settle([settlement(one, Status.FAILED)], now=NOW)
    await store.deliveries.replay(TENANT, one.id, now=NOW + 1)
    [again] = await claimed_deliveries(store, now=NOW + 1, lease="2")
    assert (again.event_id, again.trigger, again.attempts, again.run_attempts) == (
        one.event_id, Trigger.REPLAY, 1, 0,
    )  # fmt: skip
    await store.deliveries.settle([settlement(again, Status.PENDING)], now=NOW + 1)
    [retry] = await claimed_deliveries(store, now=NOW + DAY, lease="3")
    assert (retry.trigger, retry.attempts, retry.run_attempts) == (Trigger.SCHEDULED, 2, 1)
    assert [each.trigger for each in await store.deliveries.attempts(one.id)] == ["scheduled", "replay"]


async def test_what_cannot_be_replayed(store: Store):
    one = await claimed_delivery(store)
    assert one.endpoint_id is not None
    with pytest.raises(NotFound):
        await store.deliveries.replay("another tenant", one.id, now=NOW)
    with pytest.raises(Conflict, match="sending"):
        await store.deliveries.replay(TENANT, one.id, now=NOW)
    await store.endpoints.disable(TENANT, one.endpoint_id, reason="why", now=NOW)
    with pytest.raises(Conflict, match="under way"):
        await store.deliveries.replay(TENANT, one.id, now=NOW)
    await store.deliveries.settle([settlement(one, Status.FAILED)], now=NOW)
    with pytest.raises(Conflict, match="disabled"):
        await store.deliveries.replay(TENANT, one.id, now=NOW)
    await store.endpoints.delete(TENANT, one.endpoint_id, now=NOW)
    with pytest.raises(Conflict, match="deleted"):
        await store.deliveries.replay(TENANT, one.id, now=NOW)


@pytest.mark.parametrize("how", ["settled", "released", "the relay was killed"])
async def test_what_was_canceled_while_it_was_claimed_can_be_replayed_once_that_is_over(
    store: Store, how: str
):
    one = await claimed_delivery(store)
    assert one.endpoint_id is not None
    await store.endpoints.disable(TENANT, one.endpoint_id, reason="why", now=NOW)
    await store.endpoints.enable(TENANT, one.endpoint_id, now=NOW)
    with pytest.raises(Conflict, match="under way"):
        await store.deliveries.replay(TENANT, one.id, now=NOW)
    if how == "settled":
        await store.deliveries.settle([settlement(one, Status.FAILED)], now=NOW)
    elif how == "released":
        await store.deliveries.release([one], now=NOW)
    else:
        await store.deliveries.recover(now=NOW)
    assert (await delivery_of(store, one)).status is Status.CANCELED
    await store.deliveries.replay(TENANT, one.id, now=NOW + 1)
    [again] = await claimed_deliveries(store, now=NOW + 1, lease="2")
    assert (again.id, again.trigger) == (one.id, Trigger.REPLAY)


# An endpoint that fails for long is given up.


async def failing(store: Store, count: int) -> Sequence[Claimed]:
    """Claimed deliveries of as many events to one endpoint."""
    await registered(store, event_types=["a.b", "endpoint.disabled"])
    await published(store, *[an_event() for _ in range(count)])
    return await claimed_deliveries(store, lease_until=NOW + 100 * DAY)


async def answers(store: Store, one: Claimed, status: int, *, at: int, news: bool = True) -> set[str]:
    answer = Answer(at, 7, status, None, None if status == 204 else Code.HTTP_STATUS)
    well = answer.accepted if news else None
    return await store.deliveries.settle(
        [settlement(one, Status.FAILED, answer=answer, endpoint_is_well=well)], now=at
    )


async def test_five_days_of_failures_of_two_events_give_an_endpoint_up_and_that_is_announced(store: Store):
    watcher = await registered(store, event_types=["endpoint.disabled"])
    await registered(store)
    await registered(store, event_types=["endpoint.disabled"], tenant="another tenant")
    first, second, third = await failing(store, 3)
    assert await answers(store, first, 500, at=NOW) == set()
    ill = await endpoint_of(store, first)
    assert (ill.failing_since, ill.failing_event, ill.disabled_at) == (NOW, first.event_id, None)
    then = NOW + 5 * DAY
    assert await answers(store, second, 500, at=then, news=False) == {first.endpoint_id}
    ill = await endpoint_of(store, first)
    assert (ill.disabled_at, ill.disabled_reason) == (then, "every attempt failed for 5 days")
    assert (await delivery_of(store, third)).status is Status.CANCELED
    [told] = await claimed_deliveries(store, now=then)
    assert (told.endpoint_id, told.event_type) == (watcher.id, "endpoint.disabled")
    data = json.loads(told.body)["data"]
    assert (data["endpoint_id"], data["url"], data["reason"]) == (ill.id, ill.url, ill.disabled_reason)
    assert await answers(store, third, 500, at=then + 1) == set()
    assert len(await store.events.page(TENANT, {"type": "endpoint.disabled"}, limit=9, cursor=None)) == 1


async def test_a_day_less_or_one_event_alone_does_not_give_it_up(store: Store):
    first, again, second = await failing(store, 3)
    again = replace(again, event_id=first.event_id)
    await answers(store, first, 500, at=NOW)
    assert await answers(store, second, 500, at=NOW + 5 * DAY - 1, news=False) == set()
    assert await answers(store, again, 500, at=NOW + 9 * DAY, news=False) == set()
    assert (await endpoint_of(store, first)).disabled_at is None


async def test_a_success_or_being_enabled_starts_the_five_days_over(store: Store):
    first, good, second, third = await failing(store, 4)
    await answers(store, first, 500, at=NOW)
    await answers(store, good, 204, at=NOW + 4 * DAY)
    well = await endpoint_of(store, first)
    assert (well.failing_since, well.failing_event) == (None, None)
    assert await answers(store, second, 500, at=NOW + 6 * DAY) == set()
    await store.endpoints.enable(TENANT, well.id, now=NOW + 7 * DAY)
    assert await answers(store, third, 500, at=NOW + 12 * DAY) == set()
    ill = await endpoint_of(store, first)
    assert (ill.failing_since, ill.failing_event) == (NOW + 12 * DAY, third.event_id)


@pytest.mark.parametrize("good_is_last", [True, False])
async def test_a_success_in_the_write_of_the_last_failure_keeps_it(store: Store, good_is_last: bool):
    first, good, bad = await failing(store, 3)
    await answers(store, first, 500, at=NOW)
    broken = Answer(NOW, 7, 500, None, Code.HTTP_STATUS)
    written = [
        settlement(good, endpoint_is_well=True),
        settlement(bad, Status.FAILED, answer=broken, endpoint_is_well=False),
    ]
    then = NOW + 6 * DAY
    assert await store.deliveries.settle(written[:: -1 if good_is_last else 1], now=then) == set()
    assert (await endpoint_of(store, first)).failing_since == (None if good_is_last else then)


# Lists.


async def test_lists_are_newest_first_and_go_on_behind_the_cursor(store: Store):
    await registered(store, at=NOW)
    await registered(store, at=NOW + 1)
    await registered(store, at=NOW + 2, tenant="another tenant")
    for n in range(3):
        await announced(store, await watched(store, f"job-{n}", at=NOW + n), now=NOW + n)

    for noun, count in (
        (store.endpoints, 2), (store.generations, 3), (store.events, 3), (store.deliveries, 6),
    ):  # fmt: skip
        whole = [one.id for one in await listed(noun)]
        assert whole == sorted(whole, reverse=True)
        assert len(whole) == count
        first = [one.id for one in await listed(noun, limit=1)]
        rest = [one.id for one in await listed(noun, cursor=first[-1])]
        assert first + rest == whole


async def test_filters(store: Store):
    endpoint = await registered(store)
    first = await watched(store, "job-1", at=NOW)
    second = await watched(store, "job-2", at=NOW + 10, account="luma-eu")
    await announced(store, first, now=NOW)
    await announced(store, second, BROKEN, now=NOW + 10)

    async def found(noun: Any, **filters: Any) -> int:
        return len(await noun.page(TENANT, filters, limit=100, cursor=None))

    for noun, filters in [
        (store.generations, {"account": "luma-eu"}), (store.generations, {"job_id": "job-1"}),
        (store.generations, {"status": "failed"}), (store.generations, {"since": NOW + 10}),
        (store.generations, {"until": NOW + 10}), (store.generations, {"since": NOW, "until": NOW + 1}),
        (store.events, {"type": "generation.failed"}), (store.events, {"generation_id": first.id}),
        (store.events, {"account": "luma-eu"}), (store.events, {"since": NOW + 1}),
        (store.deliveries, {"generation_id": second.id}), (store.deliveries, {"until": NOW + 1}),
        (store.deliveries, {"event_type": "generation.completed"}),
        (store.deliveries, {"status": "pending", "since": NOW + 10}),
    ]:  # fmt: skip
        assert await found(noun, **filters) == 1, filters
    assert await found(store.generations, provider="luma") == 2
    assert await found(store.generations, provider="vivix") == 0
    assert await found(store.deliveries, endpoint_id=endpoint.id) == 2
    assert await found(store.deliveries, status="delivered") == 0


@pytest.mark.parametrize("noun", ["generations", "events", "deliveries"])
async def test_since_is_inclusive_until_is_not_and_both_go_with_the_cursor(store: Store, noun: str):
    await registered(store)
    for n in range(5):
        await announced(store, await watched(store, f"job-{n}", at=NOW + n), now=NOW + n)

    async def times(filters: Mapping[str, Any], cursor: str | None = None) -> list[int]:
        found = await listed(getattr(store, noun), filters, cursor=cursor)
        return [one.created_at - NOW for one in found]

    [newest] = await listed(getattr(store, noun), {"until": NOW + 4}, limit=1)
    assert await times({"since": NOW + 2}) == [4, 3, 2]
    assert await times({"until": NOW + 2}) == [1, 0]
    assert await times({"since": NOW + 1, "until": NOW + 4}) == [3, 2, 1]
    assert await times({"since": NOW + 1, "until": NOW + 4}, newest.id) == [2, 1]
    assert await times({"since": 0, "until": 253_402_300_799_999}) == [4, 3, 2, 1, 0]


@pytest.mark.parametrize(
    ("noun", "narrow"),
    [("events", "generation_id"), ("deliveries", "generation_id"), ("deliveries", "event_id")],
)
async def test_a_narrow_list_is_newest_first_too_and_goes_on_behind_the_cursor(
    store: Store, noun: str, narrow: str
):
    for _ in range(3):
        await registered(store)
    made = await watched(store)
    first, _ = await announced(store, made, LATE)
    await announced(store, await the(store, made), now=NOW + 1)
    filters = {narrow: made.id if narrow == "generation_id" else first.id}
    whole = [one.id for one in await listed(getattr(store, noun), filters)]
    assert len(whole) == {"events": 2, "deliveries": 6 if narrow == "generation_id" else 3}[noun]
    assert whole == sorted(whole, reverse=True)
    rest = await listed(getattr(store, noun), filters, cursor=whole[0])
    assert [one.id for one in rest] == whole[1:]


@pytest.mark.parametrize("status", Status)
async def test_deliveries_are_listed_by_every_status(store: Store, status: Status):
    await registered(store, event_types=["a.b"])
    await published(store, *[an_event() for _ in Status])
    sending, *others = await claimed_deliveries(store)
    expected = {Status.SENDING: sending.id}
    for one, then in zip(others, [Status.DELIVERED, Status.FAILED, Status.PENDING], strict=False):
        await store.deliveries.settle([settlement(one, then)], now=NOW)
        expected[then] = one.id
    async with store.database.write() as tx:
        await tx.execute(
            "UPDATE deliveries SET status = 'canceled', due_at = NULL WHERE id = :id", id=others[-1].id
        )
    expected[Status.CANCELED] = others[-1].id
    found = await store.deliveries.page(TENANT, {"status": status}, limit=10, cursor=None)
    assert [(one.id, one.status) for one in found] == [(expected[status], status)]


# Retention.


async def settled(store: Store, job_id: str, status: Status, *, at: int) -> str:
    """A generation that ended at `at`, its one delivery in this status after one attempt; its id."""
    made = await watched(store, job_id, at=at, due_at=at)
    _, [one] = await announced(store, made, now=at, room=1)
    answer = Answer(at, 1, 500)
    await store.deliveries.settle(
        [settlement(one, status, answer=answer, due_at=at if status is Status.PENDING else None)], now=at
    )
    return made.id


async def counts(store: Store) -> list[int]:
    tables = ("generations", "events", "deliveries", "attempts")
    return [(await rows(store, f"SELECT COUNT(*) AS n FROM {table}"))[0]["n"] for table in tables]  # noqa: S608


@pytest.mark.parametrize("status", [Status.DELIVERED, Status.FAILED])
async def test_what_has_ended_and_is_old_is_removed(store: Store, status: Status):
    await registered(store)
    await settled(store, "old", status, at=NOW - 31 * DAY)
    kept = await settled(store, "young", status, at=NOW - 29 * DAY)
    assert await prune(store, events=30 * DAY, attempts=30 * DAY, audit=YEAR, now=NOW) > 0
    assert await counts(store) == [1, 1, 1, 1]
    assert await store.generations.get(TENANT, kept) is not None
    assert await prune(store, events=30 * DAY, attempts=30 * DAY, audit=YEAR, now=NOW) == 0


async def test_attempts_may_go_before_their_deliveries(store: Store):
    await registered(store)
    await settled(store, "old", Status.FAILED, at=NOW - 8 * DAY)
    await prune(store, events=30 * DAY, attempts=7 * DAY, audit=YEAR, now=NOW)
    assert await counts(store) == [1, 1, 1, 0]


@pytest.mark.parametrize("age", [31 * DAY, 4000 * DAY])
async def test_nothing_that_has_not_ended_is_ever_removed(store: Store, age: int):
    await registered(store)
    at = NOW - age
    await settled(store, "still being delivered", Status.PENDING, at=at)
    await watched(store, "still watched", at=at)
    timed_out = await watched(store, "may still end late", at=at)
    await announced(store, timed_out, LATE, now=at)
    before = await counts(store)
    await prune(store, events=DAY, attempts=DAY, audit=YEAR, now=NOW)
    assert await counts(store) == before


async def test_a_generation_that_ended_long_after_it_began_stays_as_long_as_its_end_is_young(store: Store):
    made = await watched(store, at=NOW - 40 * DAY)
    await announced(store, made, now=NOW - DAY)
    await prune(store, events=30 * DAY, attempts=30 * DAY, audit=YEAR, now=NOW)
    assert await store.generations.get(TENANT, made.id) is not None


async def test_more_is_removed_than_one_batch_holds(store: Store):
    wishes = [Watch(a_generation(f"job-{n}", at=NOW - 31 * DAY)) for n in range(1100)]
    made = [one.generation for one in await store.generations.create(wishes) if one.generation]
    changes = [change_of(one, now=NOW - 31 * DAY) for one in made]
    await store.events.record(changes, [], NOTHING_HANDED_OVER, now=NOW - 31 * DAY)
    await prune(store, events=30 * DAY, attempts=30 * DAY, audit=YEAR, now=NOW)
    assert await counts(store) == [0, 0, 0, 0]


async def test_an_idempotency_key_works_for_a_day(store: Store):
    key = Idempotency("k", "hash")
    [made] = await store.generations.create([Watch(a_generation(None), key)])
    await prune(store, events=DAY, attempts=DAY, audit=YEAR, now=NOW + DAY)
    [again] = await store.generations.create([Watch(a_generation(None), key)])
    assert again.generation == made.generation
    await prune(store, events=DAY, attempts=DAY, audit=YEAR, now=NOW + DAY + 1)
    [new] = await store.generations.create([Watch(a_generation(None), key)])
    assert new.generation != made.generation


# Outputs that expire.

ENDS = (NOW + 9, None, NOW + 7)
EXPIRING = replace(DONE, outputs=tuple(Output("https://a.test/1.png", expires_at=at) for at in ENDS))


async def test_deliveries_know_when_the_first_output_of_their_event_expires(store: Store):
    await registered(store)
    _, [handed_over] = await announced(store, await watched(store, "a"), EXPIRING, room=1)
    await announced(store, await watched(store, "b"), EXPIRING)
    await announced(store, await watched(store, "c"))
    assert handed_over.expires_at == NOW + 7
    assert [one.expires_at for one in await claimed_deliveries(store)] == [NOW + 7, None]


async def test_an_event_is_renewed_unless_somebody_else_did_it_first(store: Store):
    await registered(store)
    made, _ = await announced(store, await watched(store), EXPIRING)
    [before] = await store.events.get_many([made.id, "evt_unknown"])
    assert before == made
    mine, theirs = (replace(before, body=body, expires_at=NOW + 50) for body in (b"mine", b"theirs"))
    await store.events.renew(before, theirs)
    await store.events.renew(before, mine)
    assert await store.events.get(TENANT, made.id) == theirs
    [claimed] = await claimed_deliveries(store)
    assert (claimed.body, claimed.expires_at) == (b"theirs", NOW + 50)
    await store.events.renew(theirs, replace(theirs, body=b"at last", expires_at=None))
    await store.events.renew(theirs, mine)
    assert await store.events.get(TENANT, made.id) == replace(theirs, body=b"at last", expires_at=None)
