"""What Relay remembers, on a real SQLite file."""

import asyncio
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from relay import event
from relay.delivery import Answer, Claimed, Code, Settlement, Status, Trigger
from relay.endpoint import Endpoint
from relay.errors import ConfigError, Conflict, Invalid, NotFound, StoreError
from relay.generation import Generation, LearnedBy, Output, Update
from relay.generation import Status as Is
from relay.ids import new_id
from relay.prune import prune
from relay.schedule import Asked
from relay.store import Store, open_database, store_on
from relay.store.events import Change, Handoff
from relay.store.generations import Hint, Watch
from relay.store.idempotency import Idempotency
from relay.store.migrate import migrate

NOW = 1_800_000_000_000
SECOND, DAY = 1_000, 86_400_000
TENANT = "default"
NOTHING_HANDED_OVER = Handoff("", NOW, 0)
DONE = Update(status=Is.COMPLETED, provider_status="completed", outputs=(Output("https://a.test/1.png"),))
BROKEN = Update(status=Is.FAILED, provider_status="failed")
LATE = Update(status=Is.TIMED_OUT)


@asynccontextmanager
async def opened(path: Path) -> AsyncIterator[Store]:
    database = await open_database(f"sqlite:///{path}")
    try:
        yield store_on(database)
    finally:
        await database.close()


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    async with opened(tmp_path / "relay.db") as store:
        await migrate(store.database, now=NOW)
        await store.tenants.found(TENANT, "whsec_of_the_tenant", now=NOW)
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
        id=new_id("ep", at), tenant=TENANT, url="https://a.test/", secret="whsec_1",
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
    return Change(after, event.ending(after, now=now) if after.ended else None)


async def announced(
    store: Store, generation: Generation, update: Update = DONE, *, now: int = NOW, room: int = 0
) -> tuple[event.Event, Sequence[Claimed]]:
    handoff = Handoff("handed over", now + 45 * SECOND, room)
    [made], claimed = await store.events.record(
        [change_of(generation, update, now=now)], [], handoff, now=now
    )
    return made, claimed


async def pending(store: Store, **changes: Any) -> Claimed:
    """One delivery that is due, claimed under the lease `lease`."""
    await registered(store)
    await announced(store, await watched(store, **changes))
    [one] = await store.deliveries.claim(now=NOW, limit=10, lease="lease", lease_until=NOW + 45 * SECOND)
    return one


def settlement(one: Claimed, status: Status = Status.DELIVERED, **changes: Any) -> Settlement:
    answer = Answer(started_at=NOW, duration_ms=7, status=204, body="ok")
    due_at = NOW + 5 * SECOND if status is Status.PENDING else None
    made = Settlement(one.id, one.lease, one.attempts + 1, one.trigger, answer, status, due_at)
    return replace(made, **changes)


def asked(generation: Generation, **changes: Any) -> Asked:
    made = Asked(
        generation_id=generation.id, lease=generation.lease or "", at=NOW, due_at=NOW + 4 * SECOND, errors=0,
        missing=0, hint_asks=None, last_error=None,
    )  # fmt: skip
    return replace(made, **changes)


async def rows(store: Store, sql: str, **values: Any) -> list[dict[str, Any]]:
    async with store.database.read() as tx:
        return [dict(row) for row in await tx.fetch(sql, **values)]


async def claimed_generations(store: Store, *, now: int, lease: str = "lease", limit: int = 100) -> Any:
    return await store.generations.claim(now=now, limit=limit, lease=lease, lease_until=now + 60 * SECOND)


# What is impossible, the database refuses.

ROWS: dict[str, dict[str, Any]] = {
    "keys": {"id": "key_1", "tenant": "t", "name": "n", "hash": "h", "created_at": 1},
    "endpoints": {
        "id": "ep_1", "tenant": "t", "url": "https://a.test/", "event_types": "[]", "accounts": "[]",
        "headers": "{}", "metadata": "{}", "secret": "s", "created_at": 1, "updated_at": 1,
    },
    "generations": {
        "id": "gen_1", "tenant": "t", "account": "a", "provider": "p", "job_id": "j", "status": "queued",
        "metadata": "{}", "awaits_callback": 0, "late": 0, "created_at": 1, "deadline_at": 2, "due_at": 1,
        "asks": 0, "errors": 0, "missing": 0, "version": 0,
    },
    "events": {
        "id": "evt_1", "tenant": "t", "type": "x", "generation_id": "gen_1", "ending": "completed",
        "body": b"{}", "created_at": 1,
    },
    "deliveries": {
        "id": "dlv_1", "tenant": "t", "event_id": "evt_1", "endpoint_id": "ep_1", "status": "pending",
        "attempts": 0, "run_attempts": 0, "next_trigger": "scheduled", "due_at": 1, "created_at": 1,
        "updated_at": 1,
    },
    "attempts": {
        "id": "att_1", "delivery_id": "dlv_1", "number": 1, "started_at": 1, "duration_ms": 1,
        "reason": "scheduled",
    },
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
        ("endpoints", {"previous_secret": "s"}, "previous_secrets_expire"),
        ("endpoints", {"previous_secret_expires_at": 1}, "previous_secrets_expire"),
        ("generations", {"status": "hibernating"}, "generation_status_is_known"),
        ("generations", {"status": "completed", "known_at": 1}, "only_unfinished_generations_are_polled"),
        ("generations", {"status": "queued", "due_at": None}, "open_generations_are_due"),
        ("generations", {"status": "processing", "due_at": None}, "open_generations_are_due"),
        ("generations", {"status": "failed", "due_at": None}, "ended_generations_are_known_since"),
        ("generations", {"status": "timed_out"}, "ended_generations_are_known_since"),
        ("generations", {"known_at": 1}, "ended_generations_are_known_since"),
        ("deliveries", {"status": "lost"}, "delivery_status_is_known"),
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
    [
        ("keys", {"id": "key_2"}, "UNIQUE constraint failed: keys.hash"),
        ("generations", {"id": "gen_2"}, "UNIQUE constraint failed: generations.tenant"),
        ("events", {"id": "evt_2"}, "UNIQUE constraint failed: events.generation_id, events.ending"),
        ("deliveries", {"id": "dlv_2"}, "UNIQUE constraint failed: deliveries.event_id"),
        ("deliveries", {"id": "dlv_2", "event_id": "evt_9"}, "FOREIGN KEY"),
        ("attempts", {"id": "att_2"}, "UNIQUE constraint failed: attempts.delivery_id, attempts.number"),
        ("attempts", {"id": "att_2", "delivery_id": "dlv_9"}, "FOREIGN KEY"),
    ],
)
async def test_a_second_row_of_what_there_is_once_is_refused(
    store: Store, table: str, changes: dict[str, Any], refusal: str
):
    for one in ROWS:
        await insert(store, one)
    with pytest.raises(StoreError, match=refusal):
        await insert(store, table, **changes)


# One file, one process, one version.


async def another_process(path: Path) -> subprocess.CompletedProcess[str]:
    """A program that opens the file, and ends."""
    program = (
        "import asyncio, sys; from relay.store import open_database;"
        "asyncio.run(open_database('sqlite:///' + sys.argv[1]))"
    )
    command = [sys.executable, "-c", program, str(path)]
    return await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, timeout=10)


async def test_a_second_process_on_the_same_file_is_refused_and_told_of_postgresql(tmp_path: Path):
    async with opened(tmp_path / "relay.db"):
        second = await another_process(tmp_path / "relay.db")
    assert second.returncode != 0
    assert "database: another relay is running" in second.stderr
    assert "PostgreSQL" in second.stderr


async def test_a_file_by_another_name_is_still_the_same_file(tmp_path: Path):
    (tmp_path / "link.db").symlink_to(tmp_path / "relay.db")
    async with opened(tmp_path / "relay.db"):
        with pytest.raises(ConfigError, match="another relay"):
            async with opened(tmp_path / "link.db"):
                pass


async def test_a_file_is_free_again_once_it_is_closed(tmp_path: Path):
    for _ in range(2):
        async with opened(tmp_path / "relay.db"):
            pass


@pytest.mark.parametrize("make", [Path.mkdir, lambda path: path.write_text("no database" * 100)])
async def test_a_file_that_is_no_database_is_refused_and_the_program_ends(tmp_path: Path, make: Any):
    make(tmp_path / "relay.db")
    refused = await another_process(tmp_path / "relay.db")
    assert refused.returncode != 0
    assert "ConfigError: database: " in refused.stderr


@pytest.mark.parametrize("url", ["relay.db", "mysql://a/b", "sqlite://relay.db"])
async def test_an_unknown_kind_of_database_is_refused(url: str):
    with pytest.raises(ConfigError, match="database: "):
        await open_database(url)


async def test_migrations_are_applied_once(tmp_path: Path):
    async with opened(tmp_path / "relay.db") as store:
        assert await migrate(store.database, now=NOW) != []
        assert await migrate(store.database, now=NOW) == []


async def test_a_database_that_is_newer_than_the_program_is_refused(store: Store):
    async with store.database.write() as tx:
        await tx.execute("INSERT INTO migrations (version, name, applied_at) VALUES (9999, 'future', 1)")
    with pytest.raises(ConfigError, match="newer Relay"):
        await migrate(store.database, now=NOW)


async def test_commits_are_durable_and_readers_do_not_wait(store: Store):
    async with store.database.write() as tx:
        [journal], [synchronous], [keys] = [
            await tx.fetch(f"PRAGMA {name}") for name in ("journal_mode", "synchronous", "foreign_keys")
        ]
        assert (journal[0], synchronous[0], keys[0]) == ("wal", 2, 1)
        await tx.execute("DELETE FROM tenants")
        assert await store.tenants.signing_secret(TENANT) == "whsec_of_the_tenant"


async def test_nothing_is_written_while_reading(store: Store):
    with pytest.raises(StoreError):
        async with store.database.read() as tx:
            await tx.execute("DELETE FROM tenants")


async def test_what_raises_inside_a_transaction_undoes_all_of_it(store: Store):
    with pytest.raises(RuntimeError, match="no"):
        async with store.database.write() as tx:
            await tx.execute("DELETE FROM tenants")
            raise RuntimeError("no")
    assert await store.tenants.signing_secret(TENANT) == "whsec_of_the_tenant"


async def test_a_writer_that_is_canceled_while_it_begins_does_not_stop_the_next_one(
    store: Store, tmp_path: Path
):
    other = sqlite3.connect(tmp_path / "relay.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    writer = asyncio.create_task(store.database.probe())
    for _ in range(3):  # until it waits for the other one's lock
        await asyncio.sleep(0)
    writer.cancel()
    other.execute("COMMIT")
    other.close()
    await asyncio.gather(writer, return_exceptions=True)
    await store.tenants.found("after", "s", now=NOW)
    assert await store.tenants.signing_secret("after") == "s"


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
    assert await store.tenants.signing_secret(TENANT) == "whsec_of_the_tenant"


async def test_probe_fails_on_a_closed_database(tmp_path: Path):
    async with opened(tmp_path / "relay.db") as store:
        await migrate(store.database, now=NOW)
        await store.database.probe()
    with pytest.raises(StoreError):
        await store.database.probe()


# Tenants and keys.


async def test_a_tenant_keeps_its_first_secret(store: Store):
    await store.tenants.found(TENANT, "another", now=NOW)
    assert await store.tenants.signing_secret(TENANT) == "whsec_of_the_tenant"


async def test_a_key_is_known_by_its_hash(store: Store):
    assert not await store.tenants.has_keys()
    await store.tenants.add_key("key_1", TENANT, "admin", "hash", now=NOW)
    assert await store.tenants.has_keys()
    assert await store.tenants.key_tenant("hash") == TENANT
    assert await store.tenants.key_tenant("other") is None


# Endpoints.


async def test_an_endpoint_comes_back_as_it_was_registered(store: Store):
    made = await registered(
        store, description="d", event_types=["generation.failed"], accounts=["luma"],
        headers={"x-a": "1"}, metadata={"n": [1, None]}, previous_secret="old", previous_secret_expires_at=5,
    )  # fmt: skip
    assert await store.endpoints.get(TENANT, made.id) == made
    assert await store.endpoints.get("another tenant", made.id) is None


async def test_changing_an_endpoint_leaves_its_state_and_other_tenants_alone(store: Store):
    made = await registered(store)
    await store.endpoints.disable(TENANT, made.id, reason="why", now=NOW + 1)
    changes = {"url": "https://b.test/", "description": "new"}
    await store.endpoints.change(TENANT, made.id, changes, now=NOW + 2)
    assert (
        await store.endpoints.change("another tenant", made.id, {"url": "https://evil.test/"}, now=NOW)
        is None
    )
    changed = await store.endpoints.get(TENANT, made.id)
    assert changed == replace(
        made, url="https://b.test/", description="new", updated_at=NOW + 2, disabled_at=NOW + 1,
        disabled_reason="why",
    )  # fmt: skip


async def test_disabling_cancels_what_is_on_its_way_and_enabling_does_not_bring_it_back(store: Store):
    one = await pending(store)
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
    one = await pending(store)
    assert one.endpoint_id is not None
    await store.endpoints.delete("another tenant", one.endpoint_id, now=NOW)
    assert await store.endpoints.get(TENANT, one.endpoint_id) is not None
    await store.endpoints.delete(TENANT, one.endpoint_id, now=NOW)
    assert await store.endpoints.get(TENANT, one.endpoint_id) is None
    assert await store.endpoints.page(TENANT, limit=10, cursor=None) == []
    [row] = await rows(store, "SELECT secret, previous_secret, headers FROM endpoints")
    assert row == {"secret": "", "previous_secret": None, "headers": "{}"}
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


async def test_a_claim_takes_at_most_its_limit_of_what_is_due_and_earliest_first(store: Store):
    made = [await watched(store, f"job-{n}", due_at=NOW + n) for n in range(5)]
    first = await claimed_generations(store, now=NOW + 3, limit=2, lease="1")
    second = await claimed_generations(store, now=NOW + 3, limit=10, lease="2")
    assert {one.id for one in first} == {one.id for one in made[:2]}
    assert {one.id for one in second} == {one.id for one in made[2:4]}
    assert await claimed_generations(store, now=NOW + 3) == []


async def test_a_claim_that_nobody_finishes_comes_due_again(store: Store):
    await watched(store, due_at=NOW)
    assert len(await claimed_generations(store, now=NOW)) == 1
    assert await claimed_generations(store, now=NOW + 59 * SECOND) == []
    assert len(await claimed_generations(store, now=NOW + 60 * SECOND)) == 1


async def test_recover_makes_the_claims_of_a_dead_relay_due_and_nothing_else(store: Store):
    claimed, waiting = await watched(store, due_at=NOW), await watched(store, "2", due_at=NOW + DAY)
    await claimed_generations(store, now=NOW)
    assert await store.generations.recover(now=NOW) == 1
    assert [one.id for one in await claimed_generations(store, now=NOW)] == [claimed.id]
    assert await store.generations.get(TENANT, waiting.id) == waiting


async def test_postponing_gives_a_claim_back_but_not_one_that_was_lost(store: Store):
    made = await watched(store, due_at=NOW)
    [stale] = await claimed_generations(store, now=NOW, lease="1")
    [held] = await claimed_generations(store, now=NOW + 60 * SECOND, lease="2")
    await store.generations.postpone([(stale, NOW)])
    assert await claimed_generations(store, now=NOW + 60 * SECOND) == []
    await store.generations.postpone([(held, NOW + 61 * SECOND)])
    [again] = await claimed_generations(store, now=NOW + 61 * SECOND)
    assert (again.id, again.asks) == (made.id, 0)


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
    report = asked(held, errors=2, missing=1, hint_asks=3, last_error="why")
    await store.events.record([], [report], NOTHING_HANDED_OVER, now=NOW)
    after = await store.generations.get(TENANT, held.id)
    assert after == replace(
        held, lease=None, asked_at=NOW, due_at=NOW + 4 * SECOND, asks=1, errors=2, missing=1, hint_asks=3,
        last_error="why",
    )  # fmt: skip


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


async def test_a_hint_takes_the_lease_of_an_ask_in_flight(store: Store):
    await watched(store, due_at=NOW)
    [claimed] = await claimed_generations(store, now=NOW)
    await store.generations.hint([Hint(claimed.id, None)], now=NOW)
    await store.events.record([], [asked(claimed)], NOTHING_HANDED_OVER, now=NOW)
    assert [one.id for one in await claimed_generations(store, now=NOW)] == [claimed.id]


async def test_a_hint_claims_a_job_only_where_none_is_known(store: Store):
    nameless, named = await watched(store, None), await watched(store, "mine")
    await store.generations.hint([Hint(nameless.id, "claimed"), Hint(named.id, "claimed")], now=NOW)
    first = await store.generations.get(TENANT, nameless.id)
    second = await store.generations.get(TENANT, named.id)
    assert first is not None and second is not None
    assert (first.job_id, first.claimed_job_id) == (None, "claimed")
    assert (second.job_id, second.claimed_job_id) == ("mine", None)
    await store.generations.drop_claim(first.id)
    dropped = await store.generations.get(TENANT, first.id)
    assert dropped is not None
    assert (dropped.claimed_job_id, dropped.hint_asks) == (None, None)


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
    await store.generations.name_job(made, "job-1", due_at=NOW + 3)
    named = await store.generations.get(TENANT, made.id)
    assert named is not None
    assert (named.job_id, named.due_at) == ("job-1", NOW + 3)
    await store.generations.name_job(made, "job-1", due_at=None)
    for generation, job_id in ((made, "job-2"), (made, "taken"), (other, "job-1")):
        with pytest.raises(Conflict):
            await store.generations.name_job(generation, job_id, due_at=None)


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
    recorded = await store.events.record([change_of(made)], [], Handoff("l", NOW, 9), now=NOW)
    assert recorded == ([], [])
    assert await rows(store, "SELECT * FROM deliveries") == []


# Events.


async def test_an_ending_is_announced_once_however_many_saw_it(store: Store):
    await registered(store)
    made = await watched(store)
    handoff = Handoff("lease", NOW + SECOND, 9)
    results = await asyncio.gather(
        *(
            store.events.record([change_of(made, update)], [], handoff, now=NOW)
            for update in (DONE, BROKEN) * 5
        )
    )
    assert sum(len(fresh) for fresh, _ in results) == 1
    assert sum(len(claimed) for _, claimed in results) == 1
    [stored] = await store.events.page(TENANT, {}, limit=10, cursor=None)
    after = await store.generations.get(TENANT, made.id)
    assert after is not None
    assert stored.ending == after.status


async def test_a_generation_that_timed_out_is_announced_again_when_it_ends_late(store: Store):
    made = await watched(store)
    await announced(store, made, LATE)
    [timed_out] = await store.generations.get_many([made.id])
    assert timed_out.due_at is not None
    await announced(store, timed_out, now=NOW + 1)
    [ended] = await store.generations.get_many([made.id])
    assert (ended.status, ended.late, ended.due_at) == (Is.COMPLETED, True, None)
    stored = await store.events.page(TENANT, {}, limit=10, cursor=None)
    assert [one.ending for one in stored] == ["completed", "timed_out"]


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


async def test_what_is_handed_over_equals_what_a_claim_would_have_given(store: Store):
    await registered(store, headers={"x-a": "1"}, previous_secret="old", previous_secret_expires_at=NOW + DAY)
    made = await watched(store, callback_url="https://callback.test/")
    _, handed_over = await announced(store, made, room=9)
    claimed = await store.deliveries.claim(
        now=NOW + 45 * SECOND, limit=9, lease="lease", lease_until=NOW + DAY - 1
    )
    released = [replace(one, lease="handed over", lease_until=NOW + 45 * SECOND) for one in claimed]
    for one in handed_over:
        assert replace(one, secrets=tuple(one.secrets)) in released
    assert len(handed_over) == len(released) == 2


async def test_a_test_event_goes_to_its_endpoint_only(store: Store):
    endpoint, _ = await registered(store, event_types=["generation.failed"]), await registered(store)
    made = event.test(TENANT, endpoint.id, now=NOW)
    delivery_id, [claimed] = await store.events.send(made, endpoint, Handoff("l", NOW + SECOND, 1), now=NOW)
    assert (claimed.id, claimed.endpoint_id, claimed.body) == (delivery_id, endpoint.id, made.body)
    assert await store.events.get(TENANT, made.id) == made
    assert await store.events.get("another tenant", made.id) is None
    later, nothing = await store.events.send(
        event.test(TENANT, endpoint.id, now=NOW), endpoint, NOTHING_HANDED_OVER, now=NOW
    )
    waiting = await store.deliveries.get(TENANT, later)
    assert (list(nothing), waiting.status if waiting else None) == ([], Status.PENDING)


# Deliveries.


async def test_a_claim_of_deliveries_takes_at_most_its_limit_and_comes_due_again(store: Store):
    for _ in range(3):
        await registered(store)
    await announced(store, await watched(store))
    deliveries = store.deliveries
    first = await deliveries.claim(now=NOW, limit=2, lease="1", lease_until=NOW + 45 * SECOND)
    second = await deliveries.claim(now=NOW, limit=2, lease="2", lease_until=NOW + 45 * SECOND)
    assert (len(first), len(second)) == (2, 1)
    assert await deliveries.claim(now=NOW, limit=9, lease="3", lease_until=NOW + 45 * SECOND) == []
    again = await deliveries.claim(now=NOW + 45 * SECOND, limit=9, lease="4", lease_until=NOW + 90 * SECOND)
    assert {one.id for one in again} == {one.id for one in (*first, *second)}


async def test_a_claimed_delivery_signs_with_the_old_secret_only_while_it_is_valid(store: Store):
    await registered(store, previous_secret="old", previous_secret_expires_at=NOW + 10)
    await announced(store, await watched(store))
    deliveries = store.deliveries
    [valid] = await deliveries.claim(now=NOW, limit=1, lease="1", lease_until=NOW + 10)
    [expired] = await deliveries.claim(now=NOW + 10, limit=1, lease="2", lease_until=NOW + 20)
    assert (valid.secrets, expired.secrets) == (("whsec_1", "old"), ("whsec_1",))


async def test_settling_logs_the_attempt_and_moves_the_delivery(store: Store):
    one = await pending(store)
    retry = Answer(NOW, 7, 500, "oops", Code.HTTP_STATUS, "the endpoint answered 500")
    await store.deliveries.settle([settlement(one, Status.PENDING, answer=retry)], now=NOW + 1)
    after = await store.deliveries.get(TENANT, one.id)
    assert after is not None
    assert (after.status, after.attempts, after.due_at) == (Status.PENDING, 1, NOW + 5 * SECOND)
    [attempt] = await store.deliveries.attempts(one.id)
    assert replace(attempt, id="") == type(attempt)(
        "", 1, NOW, 7, Trigger.SCHEDULED, 500, "oops", "http_status", "the endpoint answered 500"
    )
    [again] = await store.deliveries.claim(
        now=NOW + 5 * SECOND, limit=1, lease="2", lease_until=NOW + 50 * SECOND
    )
    assert (again.attempts, again.run_attempts) == (1, 1)


async def test_settling_with_a_stale_lease_changes_nothing(store: Store):
    stale = await pending(store)
    [held] = await store.deliveries.claim(
        now=NOW + 45 * SECOND, limit=1, lease="2", lease_until=NOW + 90 * SECOND
    )
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
    one = await pending(store)
    assert one.endpoint_id is not None
    await store.endpoints.disable(TENANT, one.endpoint_id, reason="why", now=NOW)
    await store.deliveries.settle([settlement(one, Status.PENDING)], now=NOW)
    after = await store.deliveries.get(TENANT, one.id)
    assert after is not None
    assert (after.status, after.due_at, after.attempts) == (Status.CANCELED, None, 1)
    assert len(await store.deliveries.attempts(one.id)) == 1


async def test_gone_disables_the_endpoint_and_cancels_its_other_deliveries_in_the_same_write(store: Store):
    one, other = await pending(store), await registered(store)
    await announced(store, await watched(store, "job-2"))
    await store.deliveries.settle([settlement(one, Status.FAILED, disable_endpoint=one.endpoint_id)], now=NOW)
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
    one = await pending(store)
    await store.deliveries.release([one], now=NOW)
    [again] = await store.deliveries.claim(now=NOW, limit=1, lease="2", lease_until=NOW + SECOND)
    assert (again.id, again.attempts) == (one.id, 0)


async def test_recover_makes_what_was_being_sent_due_and_leaves_retries_their_time(store: Store):
    one = await pending(store)
    assert await store.deliveries.recover(now=NOW) == 1
    [again] = await store.deliveries.claim(now=NOW, limit=1, lease="2", lease_until=NOW + SECOND)
    assert again.id == one.id
    await store.deliveries.settle([settlement(again, Status.PENDING)], now=NOW)
    assert await store.deliveries.recover(now=NOW) == 0


async def test_a_replay_is_a_fresh_run_under_the_next_number(store: Store):
    one = await pending(store)
    await store.deliveries.settle([settlement(one, Status.FAILED)], now=NOW)
    await store.deliveries.replay(TENANT, one.id, now=NOW + 1)
    [again] = await store.deliveries.claim(now=NOW + 1, limit=1, lease="2", lease_until=NOW + SECOND)
    assert (again.event_id, again.trigger, again.attempts, again.run_attempts) == (
        one.event_id, Trigger.REPLAY, 1, 0,
    )  # fmt: skip
    await store.deliveries.settle([settlement(again, Status.PENDING)], now=NOW + 1)
    [retry] = await store.deliveries.claim(now=NOW + DAY, limit=1, lease="3", lease_until=NOW + 2 * DAY)
    assert (retry.trigger, retry.attempts, retry.run_attempts) == (Trigger.SCHEDULED, 2, 1)
    assert [each.trigger for each in await store.deliveries.attempts(one.id)] == ["scheduled", "replay"]


async def test_what_cannot_be_replayed(store: Store):
    one = await pending(store)
    assert one.endpoint_id is not None
    with pytest.raises(NotFound):
        await store.deliveries.replay("another tenant", one.id, now=NOW)
    with pytest.raises(Conflict, match="sending"):
        await store.deliveries.replay(TENANT, one.id, now=NOW)
    await store.endpoints.disable(TENANT, one.endpoint_id, reason="why", now=NOW)
    with pytest.raises(Conflict, match="disabled"):
        await store.deliveries.replay(TENANT, one.id, now=NOW)
    await store.endpoints.delete(TENANT, one.endpoint_id, now=NOW)
    with pytest.raises(Conflict, match="deleted"):
        await store.deliveries.replay(TENANT, one.id, now=NOW)


# Lists.


async def test_lists_are_newest_first_and_go_on_behind_the_cursor(store: Store):
    await registered(store, at=NOW)
    await registered(store, at=NOW + 1)
    await registered(store, at=NOW + 2, tenant="another tenant")
    for n in range(3):
        await announced(store, await watched(store, f"job-{n}", at=NOW + n), now=NOW + n)

    def page(noun: Any, **options: Any) -> Any:
        filters = [] if noun is store.endpoints else [{}]
        return noun.page(TENANT, *filters, **options)

    for noun, count in (
        (store.endpoints, 2), (store.generations, 3), (store.events, 3), (store.deliveries, 6),
    ):  # fmt: skip
        whole = [one.id for one in await page(noun, limit=100, cursor=None)]
        assert whole == sorted(whole, reverse=True)
        assert len(whole) == count
        first = [one.id for one in await page(noun, limit=1, cursor=None)]
        rest = [one.id for one in await page(noun, limit=100, cursor=first[-1])]
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


# The hot queries use their partial index.


class Explaining:
    """A database that also notes the query plan of every statement about a table."""

    def __init__(self, store: Store, table: str) -> None:
        self._database, self._table = store.database, table
        self.skip_locked = store.database.skip_locked
        self.plans: list[str] = []

    @asynccontextmanager
    async def write(self) -> AsyncIterator[Any]:
        async with self._database.write() as tx:
            self._tx = tx
            yield self

    async def execute(self, sql: str, **values: Any) -> int:
        await self._explain(sql, values)
        return await self._tx.execute(sql, **values)

    async def fetch(self, sql: str, **values: Any) -> Any:
        await self._explain(sql, values)
        return await self._tx.fetch(sql, **values)

    async def _explain(self, sql: str, values: dict[str, Any]) -> None:
        plan = await self._tx.fetch(f"EXPLAIN QUERY PLAN {sql}", **values)
        self.plans += [row["detail"] for row in plan if row["detail"].split()[1:2] in ([self._table], ["d"])]


@pytest.mark.parametrize("table", ["generations", "deliveries"])
async def test_claiming_reads_the_partial_index_of_what_is_due_and_never_the_table(store: Store, table: str):
    await registered(store)
    await announced(store, await watched(store, "job-1", due_at=NOW))
    await watched(store, "job-2", due_at=NOW)
    explaining = Explaining(store, table)
    noun = type(getattr(store, table))(explaining)
    assert len(await noun.claim(now=NOW, limit=9, lease="lease", lease_until=NOW + SECOND)) == 1
    searches = [plan for plan in explaining.plans if f"{table}_due (due_at" in plan]
    assert [plan.split(" (")[-1] for plan in searches] == ["due_at<?)", "due_at=?)"]
    assert not [plan for plan in explaining.plans if plan.startswith("SCAN")]


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
    assert await prune(store, events=30 * DAY, attempts=30 * DAY, now=NOW) > 0
    assert await counts(store) == [1, 1, 1, 1]
    assert await store.generations.get(TENANT, kept) is not None
    assert await prune(store, events=30 * DAY, attempts=30 * DAY, now=NOW) == 0


async def test_attempts_may_go_before_their_deliveries(store: Store):
    await registered(store)
    await settled(store, "old", Status.FAILED, at=NOW - 8 * DAY)
    await prune(store, events=30 * DAY, attempts=7 * DAY, now=NOW)
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
    await prune(store, events=DAY, attempts=DAY, now=NOW)
    assert await counts(store) == before


async def test_a_generation_that_ended_long_after_it_began_stays_as_long_as_its_end_is_young(store: Store):
    made = await watched(store, at=NOW - 40 * DAY)
    await announced(store, made, now=NOW - DAY)
    await prune(store, events=30 * DAY, attempts=30 * DAY, now=NOW)
    assert await store.generations.get(TENANT, made.id) is not None


async def test_more_is_removed_than_one_batch_holds(store: Store):
    wishes = [Watch(a_generation(f"job-{n}", at=NOW - 31 * DAY)) for n in range(1100)]
    made = [one.generation for one in await store.generations.create(wishes) if one.generation]
    changes = [change_of(one, now=NOW - 31 * DAY) for one in made]
    await store.events.record(changes, [], NOTHING_HANDED_OVER, now=NOW - 31 * DAY)
    await prune(store, events=30 * DAY, attempts=30 * DAY, now=NOW)
    assert await counts(store) == [0, 0, 0, 0]


async def test_an_idempotency_key_works_for_a_day(store: Store):
    key = Idempotency("k", "hash")
    [made] = await store.generations.create([Watch(a_generation(None), key)])
    await prune(store, events=DAY, attempts=DAY, now=NOW + DAY)
    [again] = await store.generations.create([Watch(a_generation(None), key)])
    assert again.generation == made.generation
    await prune(store, events=DAY, attempts=DAY, now=NOW + DAY + 1)
    [new] = await store.generations.create([Watch(a_generation(None), key)])
    assert new.generation != made.generation
