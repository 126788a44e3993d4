"""No statement reads more of a big table than it must: the plans of both databases, over 100,000 rows.

SQLite says how it would search. PostgreSQL says how many rows it has read, once with plans that know the
values and once with those that a prepared statement may come to; its planner has seen the tables.
"""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, Self

import pytest

from relay.ids import new_id
from relay.selection import Selection, Wanted
from relay.store import Store, open_database, store_on
from relay.store.database import Database, Transaction, expand
from relay.store.events import Publication
from relay.store.generations import CONSIDERED, Hint, Watch
from relay.store.idempotency import Idempotency
from tests.keyring import KEYRING
from tests.postgres import Cluster
from tests.test_store import (
    BROKEN,
    NOW,
    ROWS,
    SECOND,
    TENANT,
    a_generation,
    an_event,
    asked,
    change_of,
    prepared,
    registered,
    settlement,
    taking,
)

pytestmark = pytest.mark.xdist_group("explain")  # the tables are filled once

COUNT = 100_000
BIG = {"generations", "events", "deliveries", "attempts", "idempotency_keys", "keys", "audit"}
HALF, OLD, ENDPOINTS = COUNT // 2, COUNT // 10, 20
NUMBER = "SUBSTR(CAST(10000000000 + i AS TEXT), 2)"
# A tenant that has few of all these rows: some of the oldest, and some of every age.
SMALL, OWN = "small", 40
IS_ITS = f"i BETWEEN 101 AND 120 OR i % {2 * COUNT // OWN} = 1213"
TENANT_OF = f"CASE WHEN {IS_ITS} THEN '{SMALL}' ELSE :tenant END"
OPEN = f"i > {HALF}"
WAITS = f"{OPEN} AND i % 40 < 20"
FAILED = f"i <= {HALF} AND i % 20 = 1"
# The older half is done; what failed, one account and one endpoint are old.
FILLED: Mapping[str, Mapping[str, str]] = {
    "generations": {
        "tenant": TENANT_OF,
        "account": f"CASE WHEN i <= {OLD} THEN 'old' ELSE 'account-' || (i % 10) END",
        "provider": "'provider-' || (i % 5)",
        "job_id": "'job-' || i",
        "status": f"CASE WHEN {OPEN} THEN 'queued' WHEN {FAILED} THEN 'failed' ELSE 'completed' END",
        "due_at": f"CASE WHEN {OPEN} THEN i END",
        "known_at": f"CASE WHEN {OPEN} THEN NULL ELSE i END",
        "deadline_at": "i",
    },
    "events": {
        "tenant": TENANT_OF,
        "type": "CASE WHEN i % 20 = 1 THEN 'generation.failed' ELSE 'generation.completed' END",
        "account": "'account-' || (i % 10)",
        # Of the oldest generations nothing is left to tell.
        "generation_id": f"CASE WHEN i > 2000 THEN 'gen_' || {NUMBER} END",
        "source_id": "'order-' || i",
    },
    "deliveries": {
        "tenant": TENANT_OF,
        "event_id": f"'evt_' || {NUMBER}",
        "endpoint_id": f"CASE WHEN i <= {OLD} THEN 'old' ELSE 'ep_' || (i % {ENDPOINTS}) END",
        "destination": f"CASE WHEN i <= {OLD} THEN 'old' ELSE 'ep_' || (i % {ENDPOINTS}) END",
        "status": f"CASE WHEN {WAITS} THEN 'pending' WHEN {FAILED} THEN 'failed' ELSE 'delivered' END",
        "due_at": f"CASE WHEN {WAITS} THEN i END",
    },
    "attempts": {"delivery_id": f"'dlv_' || {NUMBER}"},
    "idempotency_keys": {"key": "'key-' || i", "created_at": "i"},
    # One tenant in a hundred thousand rows of others, and with few of its own.
    "keys": {"tenant": f"CASE WHEN i <= {OLD} THEN :tenant ELSE 'neighbour-' || (i % 7) END"},
    "audit": {
        "tenant": f"CASE WHEN i <= {OLD} THEN :tenant ELSE 'neighbour-' || (i % 7) END",
        "actor": "'key_' || (i % 50)",
        "action": "CASE WHEN i % 2000 = 1 THEN 'key.revoked' ELSE 'endpoint.tested' END",
        "object": "'ep_' || (i % 300)",
    },
}


async def fill(url: str) -> None:
    async with prepared(url) as store:
        for number in range(ENDPOINTS):
            await registered(store, id=f"ep_{number}")
        async with store.database.write() as tx:
            for table, computed in FILLED.items():
                row = {name: f":{name}" for name in ROWS[table]} | computed
                if "id" in row:
                    row["id"] = f"'{ROWS[table]['id'][:4]}' || {NUMBER}"
                values = {name: value for name, value in ROWS[table].items() if f":{name}" in row[name]}
                await tx.execute(
                    f"""
                    WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {COUNT})
                    INSERT INTO {table} ({", ".join(row)}) SELECT {", ".join(row.values())} FROM n
                    """,  # noqa: S608
                    **values | ({"tenant": TENANT} if "tenant" in values else {}),
                )


@pytest.fixture(scope="session")
def filled_sqlite(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Never analyzed, as in production."""
    url = f"sqlite:///{tmp_path_factory.mktemp('explain')}/relay.db"
    asyncio.run(fill(url))
    return url


@pytest.fixture(scope="session")
def filled_postgresql(cluster: Cluster) -> Iterator[str]:
    """Analyzed, as it does by itself in production."""
    url = cluster.database()
    asyncio.run(fill(url))
    cluster.run("vacuumdb", "--analyze", f"--dbname={url}")
    yield url
    cluster.drop(url)


class Undo(Exception):
    """Ends a transaction that is to leave nothing."""


@dataclass(frozen=True)
class Expected:
    """How the statements of one method are run."""

    searches: set[str] | None  # how SQLite finds rows of big tables, but by their id; None: somehow
    rows: int  # the most that PostgreSQL reads for one of them
    indexes: Iterable[str] = ()  # that both use
    sorts: bool = False  # whether SQLite sorts what it has found


class Explaining:
    """A database that explains each statement before it runs it, and in the end has changed nothing."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.skip_locked, self.alone = database.skip_locked, database.alone
        self.indexes: set[str] = set()

    @asynccontextmanager
    async def write(self) -> AsyncIterator[Transaction]:
        with suppress(Undo):
            async with self.database.write() as self._tx:
                yield self
                await self._done()
                raise Undo

    @asynccontextmanager
    async def read(self, *, browse: bool = False) -> AsyncIterator[Transaction]:
        async with self.write():
            yield self

    async def execute(self, sql: str, **values: Any) -> int:
        await self._explain(sql, values)
        return await self._tx.execute(sql, **values)

    async def execute_many(self, sql: str, rows: Sequence[Any]) -> None:
        for row in rows[:1]:
            await self._explain(sql, row)
        await self._tx.execute_many(sql, rows)

    async def fetch(self, sql: str, **values: Any) -> Any:
        await self._explain(sql, values)
        return await self._tx.fetch(sql, **values)

    async def _done(self) -> None:
        """Before all of it is undone."""

    async def _explain(self, sql: str, values: Mapping[str, Any]) -> None:
        raise NotImplementedError

    def complaints(self, expected: Expected) -> Sequence[str]:
        """What is wrong with how it was run."""
        return [f"{name} was not used" for name in expected.indexes if name not in self.indexes]

    def anew(self) -> Self:
        """The same database, of which nothing has been explained yet."""
        return type(self)(self.database)


class OnSQLite(Explaining):
    def __init__(self, database: Database) -> None:
        super().__init__(database)
        self.steps: list[str] = []

    async def _explain(self, sql: str, values: Mapping[str, Any]) -> None:
        found = await self._tx.fetch(f"EXPLAIN QUERY PLAN {sql}", **values)
        self.steps += [step["detail"] for step in found]
        self.indexes |= {name for step in self.steps for name in re.findall(r"INDEX (\w+)", step)}

    @property
    def searches(self) -> set[str]:
        """How rows of big tables are found, but for those that are looked up by their id."""
        steps = [re.sub(r" USING .*INDEX \w+", "", step) for step in self.steps]
        big = {*BIG, "e", "d", "a", "newer", "other"}
        by_id = ("(id=?)", "(tenant=? AND id=?)")
        return {step for step in steps if set(step.split()[:2]) & big and not step.endswith(by_id)}

    def complaints(self, expected: Expected) -> Sequence[str]:
        sorts = [] if expected.sorts else [step for step in self.steps if step.endswith("FOR ORDER BY")]
        searches = self.searches ^ expected.searches if expected.searches is not None else set()
        return [*super().complaints(expected), *sorts, *sorted(searches)]


class OnPostgreSQL(Explaining):
    def __init__(self, database: Database) -> None:
        super().__init__(database)
        self.ran: list[tuple[int, str]] = []
        self.scanned: set[str] = set()

    async def _explain(self, sql: str, values: Mapping[str, Any]) -> None:
        # A module that not every installation has.
        from relay.store.postgres import _numbered, _types

        sql, values = expand(sql, values)
        text, names = _numbered(sql, _types([values]))
        given = f"({', '.join(literal(values[name]) for name in names)})" if names else ""
        connection = self._tx._connection  # type: ignore[attr-defined] # literals may look like parameters
        await connection.execute(f"SAVEPOINT explained; PREPARE explained AS {text}")
        plan = await connection.fetchval(f"EXPLAIN (ANALYZE, FORMAT JSON) EXECUTE explained{given}")
        await connection.execute("ROLLBACK TO explained; DEALLOCATE explained")
        nodes = list(nodes_of(json.loads(plan)[0]["Plan"]))
        self.ran.append((round(sum(map(rows_read, nodes))), text))
        self.indexes |= {node["Index Name"] for node in nodes if "Index Name" in node}

    async def _done(self) -> None:
        # Also what foreign keys looked for.
        found = await self._tx.fetch("SELECT relname FROM pg_stat_xact_user_tables WHERE seq_scan > 0")
        self.scanned |= {row["relname"] for row in found} & BIG

    def complaints(self, expected: Expected) -> Sequence[str]:
        reads = [f"{rows} rows read by {text}" for rows, text in self.ran if rows > expected.rows]
        return [*super().complaints(expected), *reads, *sorted(self.scanned)]


def nodes_of(plan: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    yield plan
    for part in plan.get("Plans", []):
        yield from nodes_of(part)


def rows_read(node: Mapping[str, Any]) -> float:
    """Of a big table or an index, also those that a filter left out."""
    if node.get("Relation Name") not in BIG and node["Node Type"] != "Bitmap Index Scan":
        return 0
    if "Scan" not in node["Node Type"]:
        return 0
    left_out = sum(node.get(f"Rows Removed by {why}", 0) for why in ("Filter", "Index Recheck"))
    return float((node["Actual Rows"] + left_out) * node["Actual Loops"])


def literal(value: Any) -> str:
    if value is None:
        return "NULL"
    if isinstance(value, bytes):
        return f"'\\x{value.hex()}'"
    return "'" + value.replace("'", "''") + "'" if isinstance(value, str) else repr(value)


@pytest.fixture(params=["sqlite", "postgresql-known-values", "postgresql-any-values"])
def filled(request: pytest.FixtureRequest) -> str:
    if request.param == "sqlite":
        return str(request.getfixturevalue("filled_sqlite"))
    mode = "force_custom_plan" if request.param == "postgresql-known-values" else "force_generic_plan"
    return f"{request.getfixturevalue('filled_postgresql')}?plan_cache_mode={mode}"


@pytest.fixture
async def explaining(filled: str) -> AsyncIterator[Explaining]:
    database = await open_database(filled)
    try:
        yield OnSQLite(database) if filled.startswith("sqlite") else OnPostgreSQL(database)
    finally:
        await database.close()


def row(prefix: str, number: int) -> str:
    return f"{prefix}_{number:010d}"


CLAIM: dict[str, Any] = {"now": NOW, "lease": "lease", "lease_until": NOW + SECOND}
PAGE: dict[str, Any] = {"limit": 50, "cursor": None}
REMOVE: dict[str, Any] = {"before": NOW, "limit": 500}
DESTINATIONS = {f"ep_{number}": 9 for number in range(ENDPOINTS)} | {"ep_none": 9}
QUERIES: Mapping[str, tuple[Callable[[Store], Awaitable[object]], Expected]] = {
    "claim deliveries": (
        lambda store: store.deliveries.claim(DESTINATIONS, **CLAIM),
        Expected(
            {
                "SEARCH deliveries (destination=? AND due_at<?)",
                "SEARCH deliveries (destination=? AND due_at=?)",
                "SEARCH newer (generation_id=?)",
                "SEARCH d (destination=? AND due_at=?)",
            },
            rows=1000,
            indexes={"deliveries_due"},
            sorts=True,
        ),
    ),
    "destinations": (
        lambda store: store.deliveries.destinations(now=NOW, after="", limit=100),
        Expected(
            {
                "SEARCH deliveries (destination>?)",
                "SEARCH d (destination>?)",
                "SEARCH d (destination=? AND due_at<?)",
            },
            rows=100,
            indexes={"deliveries_due"},
        ),
    ),
    "claim what is fresh": (
        lambda store: store.deliveries.claim({}, DESTINATIONS, **CLAIM),
        Expected(
            {
                "SEARCH deliveries (destination=? AND due_at<?)",
                "SEARCH deliveries (destination=? AND due_at=?)",
                "SEARCH newer (generation_id=?)",
                "SEARCH d (destination=? AND due_at=?)",
            },
            rows=4000,
            indexes={"deliveries_due"},
            sorts=True,
        ),
    ),
    "who is crowded": (
        lambda store: store.replays.crowded(DESTINATIONS, now=NOW),
        Expected(
            {"SEARCH d (destination=? AND due_at<?)"},
            rows=16 * (ENDPOINTS + 1) + ENDPOINTS,
            indexes={"deliveries_due"},
        ),
    ),
    "what is open": (
        lambda store: store.deliveries.backlog(now=NOW, most=1000),
        Expected(
            {
                "SCAN deliveries",  # of the index, up to so many
                "SEARCH d (destination>?)",
                "SEARCH d (destination=? AND due_at>?)",
            },
            rows=1000,
            indexes={"deliveries_due"},
        ),
    ),
    "claim generations": (
        lambda store: store.generations.claim({"account-1": 50, "account-2": 9, "none": 9}, **CLAIM),
        Expected(
            {"SEARCH generations (account=? AND due_at<?)", "SEARCH generations (account=? AND due_at=?)"},
            rows=2 * CONSIDERED,
            sorts=True,
            indexes={"generations_due"},
        ),
    ),
    "claim what is overdue": (
        lambda store: store.generations.claim_overdue({"account-1": 50, "none": 9}, **CLAIM),
        Expected(
            {
                "SEARCH generations (account=? AND deadline_at<?)",
                "SEARCH generations (account=? AND due_at=?)",
            },
            rows=300,
            indexes={"generations_overdue", "generations_due"},
        ),
    ),
    "what ended at an account": (
        lambda store: store.generations.ended("account-1", limit=9),
        Expected(
            {"SEARCH generations (account=? AND known_at>?)"},
            rows=9,
            indexes={"generations_ended"},
        ),
    ),
    "who watches a job": (
        lambda store: store.generations.watching("account-1", "job-99991"),
        Expected(
            {"SEARCH generations (job_id=? AND account=?)"},
            rows=5,
        ),
    ),
    "disable an endpoint": (
        lambda store: store.endpoints.disable(TENANT, "ep_1", reason="why", now=NOW),
        Expected(
            {"SEARCH deliveries (destination=? AND due_at>?)"},
            # So many wait for it.
            rows=2 * (HALF // ENDPOINTS + 50),
            indexes={"deliveries_due"},
        ),
    ),
    "replay": (
        lambda store: store.deliveries.replay(TENANT, row("dlv", 1), now=NOW),
        Expected(
            set(),
            rows=2,
        ),
    ),
    "attempts of a delivery": (
        lambda store: store.deliveries.attempts(row("dlv", 1)),
        Expected(
            {"SEARCH attempts (delivery_id=?)"},
            rows=2,
        ),
    ),
    "many generations": (
        lambda store: store.generations.get_many([row("gen", 7 * number) for number in range(500)]),
        Expected(
            set(),
            rows=2 * 512,
        ),
    ),
    "many events": (
        lambda store: store.events.get_many([row("evt", 7 * number) for number in range(500)]),
        Expected(
            set(),
            rows=2 * 512,
        ),
    ),
    "prune attempts": (
        lambda store: store.retention.remove_attempts(**REMOVE),
        Expected(
            {"SEARCH attempts (id>? AND id<?)"},
            rows=1000,
        ),
    ),
    "prune bodies": (
        lambda store: store.retention.forget_bodies(**REMOVE),
        Expected(
            {"SEARCH attempts (id>? AND id<?)"},
            rows=1000,
        ),
    ),
    "prune events": (
        lambda store: store.retention.remove_events(**REMOVE),
        Expected(
            {
                "SEARCH events (id>? AND id<?)",
                "SEARCH d (event_id=?)",
                "SEARCH deliveries (event_id=?)",
                "SEARCH attempts (delivery_id=?)",
            },
            rows=1000,
        ),
    ),
    "prune generations": (
        lambda store: store.retention.remove_generations(**REMOVE),
        Expected(
            {"SEARCH generations (id>? AND id<?)", "SEARCH events (generation_id=?)"},
            rows=1000,
        ),
    ),
    "what is new to a stream": (
        lambda store: store.events.ids(TENANT, after=row("evt", COUNT // 2), limit=100),
        Expected({"SEARCH events ((tenant,id)>(?,?) AND tenant<?)"}, rows=2 * 101),
    ),
    "what is new to a stream of a small tenant": (
        lambda store: store.events.ids(SMALL, after=row("evt", 0), limit=100),
        Expected({"SEARCH events ((tenant,id)>(?,?) AND tenant<?)"}, rows=OWN),
    ),
    "whose filters to ask": (
        lambda store: store.endpoints.filtering([TENANT]),
        Expected(set(), rows=1),
    ),
    "what a stream has missed": (
        lambda store: store.events.sizes([row("evt", OLD), row("evt", COUNT)]),
        Expected(set(), rows=2),
    ),
    "who is asking": (
        lambda store: store.keys.find(row("key", 1)),
        Expected(set(), rows=1),
    ),
    "when keys were used": (
        lambda store: store.keys.used({row("key", number): NOW for number in range(9)}),
        Expected(set(), rows=1),
    ),
    "revoke a key": (
        lambda store: store.keys.revoke(TENANT, row("key", 1), now=NOW),
        Expected(set(), rows=1),
    ),
    "prune the audit log": (
        lambda store: store.retention.remove_audit(**REMOVE),
        Expected(
            {"SEARCH audit (id>? AND id<?)"},
            rows=1000,
        ),
    ),
    "prune idempotency keys": (
        lambda store: store.retention.remove_idempotency_keys(**REMOVE),
        Expected(
            {
                "SEARCH idempotency_keys (created_at<?)",
                "SEARCH idempotency_keys (tenant=? AND key=?)",
            },
            rows=1000,
            indexes={"idempotency_keys_by_age"},
        ),
    ),
}


# Of what a replay is, in the middle of it.
STRETCH = 500
FINISHED, OF_ONE = row("dlv", COUNT // 20), row("gen", COUNT // 3)
LOOKS: Mapping[str, tuple[dict[str, Any], str, Expected]] = {
    "what failed": (
        {"wanted": Wanted.FAILED},
        FINISHED,
        Expected({"SEARCH d (id>? AND id<?)"}, rows=2 * STRETCH, indexes={"deliveries_failed"}),
    ),
    "what is finished": (
        {"wanted": Wanted.ALL},
        FINISHED,
        Expected({"SEARCH d (id>? AND id<?)"}, rows=2 * STRETCH),
    ),
    "what failed of a generation": (
        {"wanted": Wanted.FAILED, "generation_id": OF_ONE},
        row("dlv", 1),
        Expected({"SEARCH e (generation_id=?)", "SEARCH d (event_id=?)"}, rows=9, sorts=True),
    ),
    "what is missing": (
        {"wanted": Wanted.MISSING},
        row("evt", COUNT // 20),
        Expected({"SEARCH e (id>? AND id<?)", "SEARCH deliveries (event_id=?)"}, rows=2 * STRETCH),
    ),
    "what is missing of a generation": (
        {"wanted": Wanted.MISSING, "generation_id": OF_ONE},
        row("evt", 1),
        Expected({"SEARCH e (generation_id=?)", "SEARCH deliveries (event_id=?)"}, rows=9, sorts=True),
    ),
}


@pytest.mark.parametrize("name", LOOKS)
async def test_a_replay_looks_at_no_more_rows_than_it_is_told_to(explaining: Explaining, name: str):
    given, position, expected = LOOKS[name]
    for endpoint_id in (None, "ep_1"):
        once = explaining.anew()
        selection = Selection(TENANT, until=NOW, endpoint_id=endpoint_id, **given)
        await store_on(once, KEYRING).replays.look(selection, position, limit=STRETCH, until=NOW)
        assert once.complaints(expected) == [], endpoint_id
        counting = explaining.anew()
        await store_on(counting, KEYRING).replays.tally(selection, position, limit=STRETCH)
        assert counting.complaints(Expected(None, rows=expected.rows, sorts=expected.sorts)) == []


@pytest.mark.parametrize("query", QUERIES)
async def test_a_query_searches_an_index_and_never_scans_a_big_table(explaining: Explaining, query: str):
    run, expected = QUERIES[query]
    await run(store_on(explaining, KEYRING))
    assert explaining.complaints(expected) == []


# Lists: by every filter, at their beginning and behind a cursor.

GENERATION, EVENT = row("gen", COUNT // 3), row("evt", COUNT // 3)
FEW: Sequence[tuple[str, dict[str, Any], set[str]]] = [
    ("generations", {"job_id": "job-1"}, {"SEARCH generations (job_id=?)"}),
    ("events", {"generation_id": GENERATION}, {"SEARCH events (generation_id=?)"}),
    ("deliveries", {"event_id": EVENT}, {"SEARCH d (event_id=?)"}),
    (
        "deliveries",
        {"generation_id": GENERATION},
        {"SEARCH e (generation_id=?)", "SEARCH d (event_id=?)"},
    ),
]
RANGES: Sequence[tuple[str, dict[str, Any], str]] = [
    *(
        ("generations", {"account": name}, "generations_of_an_account")
        for name in ("old", "account-1", "none")
    ),
    ("keys", {}, "keys_of_a_tenant"),
    ("audit", {}, "audit_of_a_tenant"),
    *(("audit", {"actor": name}, "audit_of_an_actor") for name in ("key_1", "none")),
    *(("audit", {"action": name}, "audit_of_an_action") for name in ("key.revoked", "none")),
    *(("audit", {"object": name}, "audit_of_an_object") for name in ("ep_1", "none")),
    *(
        ("generations", {"status": name}, "generations_by_status")
        for name in ("queued", "failed", "canceled")
    ),
    *(("deliveries", {"endpoint_id": name}, "deliveries_of_an_endpoint") for name in ("old", "ep_1", "none")),
    *(
        ("deliveries", {"status": name}, "deliveries_not_delivered")
        for name in ("pending", "sending", "failed", "canceled")
    ),
]
WALKS: Sequence[tuple[str, dict[str, Any]]] = [
    ("generations", {}),
    ("generations", {"provider": "provider-1"}),
    ("generations", {"account": "old", "status": "failed"}),
    ("events", {}),
    ("events", {"type": "generation.completed"}),
    ("events", {"account": "account-1"}),
    ("deliveries", {}),
    ("deliveries", {"status": "delivered"}),
    ("deliveries", {"event_type": "generation.completed"}),
    ("deliveries", {"status": "pending", "endpoint_id": "ep_1"}),
    ("deliveries", {"status": "delivered", "endpoint_id": "ep_1"}),
    ("deliveries", {"status": "pending", "event_type": "generation.completed"}),
]


def pages(noun: str, filters: Mapping[str, Any]) -> Iterator[tuple[Mapping[str, Any], str | None]]:
    """Also with times and a cursor, behind which are as many rows as before it."""
    prefix = ROWS[noun]["id"].split("_")[0]
    if noun == "keys":
        yield from ((filters, None), (filters, row(prefix, COUNT // 2)))
        return
    for times in ({}, {"since": 0}, {"until": NOW}, {"since": 0, "until": NOW}):
        for cursor in (None, row(prefix, COUNT // 2)):
            yield {**filters, **times}, cursor


@pytest.mark.parametrize(("noun", "filters", "searches"), FEW)
async def test_a_list_of_few_looks_them_up_and_sorts_them(
    explaining: Explaining, noun: str, filters: dict[str, Any], searches: set[str]
):
    for given, cursor in pages(noun, filters):
        once = explaining.anew()
        await getattr(store_on(once, KEYRING), noun).page(TENANT, given, limit=50, cursor=cursor)
        assert once.complaints(Expected(searches, rows=10, sorts=True)) == [], given


@pytest.mark.parametrize(("noun", "filters", "index"), RANGES)
async def test_a_list_that_has_an_index_is_a_range_of_it_however_rare_and_old_its_rows_are(
    explaining: Explaining, noun: str, filters: dict[str, Any], index: str
):
    for given, cursor in pages(noun, filters):
        once = explaining.anew()
        asked = (TENANT,) if noun == "keys" else (TENANT, given)
        await getattr(store_on(once, KEYRING), noun).page(*asked, limit=50, cursor=cursor)
        # Each delivery with its event.
        assert once.complaints(Expected(None, rows=2 * 51, indexes={index})) == [], given


@pytest.mark.parametrize(("noun", "filters"), WALKS)
async def test_any_other_list_stops_at_its_limit_rather_than_sorting_everything(
    explaining: Explaining, noun: str, filters: dict[str, Any]
):
    for given, cursor in pages(noun, filters):
        once = explaining.anew()
        await getattr(store_on(once, KEYRING), noun).page(TENANT, given, limit=50, cursor=cursor)
        # At least every twentieth row is one that is looked for.
        assert once.complaints(Expected(None, rows=20 * 2 * 51)) == [], given


@pytest.mark.parametrize(
    ("noun", "filters"),
    [
        *((noun, {}) for noun in ("generations", "events", "deliveries")),
        *(("generations", {"account": name}) for name in ("old", "account-1", "none")),
        *(("generations", {"provider": name}) for name in ("provider-1", "none")),
        *(("generations", {"status": name}) for name in ("queued", "completed", "canceled")),
        ("generations", {"account": "account-1", "status": "failed"}),
        *(("events", {"type": name}) for name in ("generation.completed", "none")),
        *(("events", {"account": name}) for name in ("account-1", "none")),
        *(("deliveries", {"status": name}) for name in ("pending", "delivered", "failed", "canceled")),
        *(("deliveries", {"endpoint_id": name}) for name in ("old", "ep_1", "none")),
        ("deliveries", {"event_type": "none"}),
    ],
)
async def test_the_lists_of_a_small_tenant_read_no_rows_of_its_neighbours(
    explaining: Explaining, noun: str, filters: dict[str, Any]
):
    for given, cursor in pages(noun, filters):
        once = explaining.anew()
        await getattr(store_on(once, KEYRING), noun).page(SMALL, given, limit=50, cursor=cursor)
        # Each delivery with its event.
        assert once.complaints(Expected(None, rows=2 * OWN)) == [], given
        assert all("tenant" in search for search in getattr(once, "searches", ())), given


# Writes.


async def test_writing_what_happened_looks_everything_up(explaining: Explaining):
    store, explained = store_on(explaining.database, KEYRING), store_on(explaining, KEYRING)
    claim = CLAIM | {"lease": new_id("lease", NOW)}
    [one] = await store.deliveries.claim({"ep_1": 1}, **claim)
    [made] = await store.generations.claim({"account-1": 1}, **claim)
    known = Publication(TENANT, [an_event(name="order-1")], None)
    await explained.deliveries.settle([settlement(one, endpoint_is_well=True)], now=NOW)
    await explained.deliveries.release([one], now=NOW)
    await explained.deliveries.postpone([(one, NOW)])
    await explained.events.record([change_of(made, BROKEN)], [asked(made)], taking(9), now=NOW)
    await explained.events.publish([known, known], taking(9), now=NOW)
    await explained.generations.create([Watch(a_generation("job-7", account="old"))])
    await explained.generations.create([Watch(a_generation(None), Idempotency("key-1", "h"))])
    await explained.generations.hint([Hint(made.id, None)], now=NOW)
    await explained.generations.name_job(made, f"{made.job_id}", ask=None)
    await explained.generations.drop_claim(made)
    await explained.generations.claim_one(made.id, lease="lease", lease_until=NOW)
    searches = {
        # What an ending takes the place of, and a foreign key.
        "SEARCH events (generation_id=?)",
        "SEARCH deliveries (event_id=?)",
        "SEARCH events (source_id=? AND tenant=?)",
        "SEARCH generations (job_id=? AND account=? AND tenant=?)",
        "SEARCH other (job_id=? AND account=? AND tenant=?)",
        "SEARCH idempotency_keys (tenant=? AND key=?)",
    }
    assert explaining.complaints(Expected(searches, rows=10)) == []
