"""A relay's state on its way from one database to another: real files, real servers, real processes."""

import asyncio
import json
import re
import sqlite3
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, closing
from itertools import count
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from relay.app import running, wall_clock
from relay.config import read_config
from relay.copy import Progress, copy
from relay.errors import ConfigError, CopyFailed
from relay.redact import without_password
from relay.store import open_database
from relay.store.migrate import migrate
from relay.store.tables import COPIED, NOT_COPIED, PAGE
from tests.conftest import World
from tests.postgres import Cluster, binaries
from tests.test_cli import BARE, relay, write

# The last moment that an id can be of: nothing is in flight any more.
DOOMSDAY = 2**48 - 1
NOW = 1_800_000_000_000
ODD = "ä🏮\u2028\x01\x7f\ufffd\U0010ffff'\"\\%$1 :id e\u0301"
BYTES = bytes(range(256))
KINDS = ("sqlite", "postgresql")
Rows = Mapping[str, Sequence[str]]
# What constraints ask of a row that has everything, and of one that has nothing it need not have.
FULL: Mapping[str, Mapping[str, Any]] = {
    "generations": {"status": "timed_out", "due_at": 5},
    "deliveries": {"status": "sending", "due_at": 5, "endpoint_id": None, "event_id": f"events {ODD}"},
    "attempts": {"delivery_id": f"deliveries {ODD}"},
    "replays": {"status": "failed"},
}
BARELY: Mapping[str, Mapping[str, Any]] = {
    "generations": {"status": "failed", "known_at": 1},
    "deliveries": {"status": "failed", "endpoint_id": "ep_1", "event_id": f"events {ODD}"},
    "attempts": {"delivery_id": f"deliveries {ODD}", "number": 1},
    "replays": {"status": "pending"},
}


@pytest.fixture
def empty(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[str, str], str]]:
    """The URL of an empty database of a kind; PostgreSQL's sort text as people do, not by its bytes."""
    made = []
    # Without a server only the tests that want one are skipped; it cannot be started inside of a test.
    cluster: Cluster | None = request.getfixturevalue("cluster") if binaries() else None

    def make(kind: str, name: str) -> str:
        if kind == "sqlite":
            return f"sqlite:///{tmp_path}/{name}.db"
        if cluster is None:
            request.getfixturevalue("cluster")
        assert cluster is not None
        made.append(cluster.database("template0", "--locale-provider=icu", "--icu-locale=en-US"))
        return made[-1]

    yield make
    for url in made:
        cluster.drop(url)


@asynccontextmanager
async def connected(url: str) -> Any:
    """What runs one statement and returns the rows, by the databases' own libraries."""
    if url.startswith("sqlite"):
        with closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as file:
            file.row_factory = sqlite3.Row

            async def run(sql: str, *values: Any) -> list[dict[str, Any]]:
                rows = [dict(row) for row in file.execute(sql, values)]
                file.commit()
                return rows

            yield run
        return
    server = await asyncpg.connect(url)
    try:

        async def ask(sql: str, *values: Any) -> list[dict[str, Any]]:
            places = count(1)
            sql = re.sub(r"\?", lambda match: f"${next(places)}", sql)
            return [dict(row) for row in await server.fetch(sql, *values)]

        yield ask
    finally:
        await server.close()


async def schema(url: str) -> set[str]:
    """The names of all tables."""
    sql = "SELECT table_name AS name FROM information_schema.tables WHERE table_schema = 'public'"
    if url.startswith("sqlite"):
        sql = "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite%'"
    async with connected(url) as run:
        return {row["name"] for row in await run(sql)}


async def contents(url: str) -> Rows:
    """Every row of every table but those of the database's own."""
    names = await schema(url) - set(NOT_COPIED)
    async with connected(url) as run:
        found = {name: await run(f"SELECT * FROM {name}") for name in names}  # noqa: S608 # our own names
    return {name: sorted(map(repr, rows)) for name, rows in found.items()}


async def columns(url: str, table: str) -> list[tuple[str, str, bool]]:
    """Name, type and whether it is needed."""
    async with connected(url) as run:
        if url.startswith("sqlite"):
            rows = await run(f"PRAGMA table_info({table})")
            return [(row["name"], row["type"].lower(), bool(row["notnull"] or row["pk"])) for row in rows]
        rows = await run("SELECT * FROM information_schema.columns WHERE table_name = ?", table)
        return [(row["column_name"], row["data_type"], row["is_nullable"] == "NO") for row in rows]


def value(type_: str, table: str, column: str, mark: str) -> Any:
    known = {"bytea": BYTES, "double precision": 0.1, "bigint": 2**63 - 1}
    return known.get(type_, f"{table if column == 'id' else column} {mark}")


async def insert(url: str, table: str, *rows: Mapping[str, Any]) -> None:
    async with connected(url) as run:
        for at in range(0, len(rows), 1000):
            page = rows[at : at + 1000]
            places = ", ".join(f"({', '.join('?' * len(row))})" for row in page)
            values = [value for row in page for value in row.values()]
            names = ", ".join(page[0])
            await run(f"INSERT INTO {table} ({names}) VALUES {places}", *values)  # noqa: S608 # our own names


async def migrated(url: str) -> None:
    database = await open_database(url)
    try:
        await migrate(database, now=1)
    finally:
        await database.close()


async def fill(url: str, *, keys: int = 0) -> None:
    """A row of each table that has everything and one that has as little as may be; some that sort oddly."""
    await migrated(url)
    for table in COPIED:
        known = await columns(url, table)
        full = {name: value(type_, table, name, ODD) for name, type_, _ in known}
        least = {
            name: value(type_, table, name, "least") if needed else None for name, type_, needed in known
        }
        await insert(url, table, full | FULL.get(table, {}), least | BARELY.get(table, {}))
    names = [f"{'aB_-ä'[number % 5]}{number}" for number in range(keys)]
    odd = {"tenant": "t", "request_hash": "h", "resource_id": "r", "status": 201, "created_at": 1}
    await insert(url, "idempotency_keys", *({"key": name, **odd} for name in names))


async def copied(
    source: str, target: str, *, now: int = DOOMSDAY, stop_after: int | None = None
) -> list[Progress]:
    """Copies, in this process; what was shown. Broken off when so much has been shown."""
    shown: list[Progress] = []

    def show(progress: Progress) -> None:
        shown.append(progress)
        if len(shown) == stop_after:
            raise KeyError("broken off")

    try:
        await copy(source, target, now=lambda: now, show=show)
    except KeyError:
        assert stop_after is not None
    return shown


@pytest.mark.parametrize("kind", KINDS)
async def test_every_table_is_copied_or_named_as_staying(empty: Any, kind: str) -> None:
    url = empty(kind, "a")
    await migrated(url)
    tables = await schema(url)
    assert tables - set(NOT_COPIED) == set(COPIED)
    assert not set(COPIED) & set(NOT_COPIED)


async def test_rows_are_known_by_their_primary_keys(empty: Any) -> None:
    url = empty("sqlite", "a")
    await migrated(url)
    async with connected(url) as run:
        for table, names in COPIED.items():
            columns = await run(f"PRAGMA table_info({table})")
            keys = sorted((row["pk"], row["name"]) for row in columns if row["pk"])
            assert [name for _, name in keys] == list(names)


@pytest.mark.parametrize("source_kind", KINDS)
@pytest.mark.parametrize("target_kind", KINDS)
async def test_the_whole_state_arrives_row_by_row(empty: Any, source_kind: str, target_kind: str) -> None:
    source, target = empty(source_kind, "a"), empty(target_kind, "b")
    await fill(source, keys=2 * PAGE + 10)
    before = await contents(source)
    counts = await copy(source, target, now=lambda: DOOMSDAY, show=lambda progress: None)
    assert await contents(target) == await contents(source) == before
    assert counts == {table: len(rows) for table, rows in before.items()}
    assert list(counts) == list(COPIED)


@pytest.mark.parametrize("target_kind", KINDS)
async def test_a_copy_that_was_broken_off_anywhere_goes_on_there(empty: Any, target_kind: str) -> None:
    source = empty("sqlite", "a")
    await fill(source, keys=PAGE + 10)
    whole = await contents(source)
    steps = await copied(source, empty(target_kind, "whole"))
    for broken_off in range(1, len(steps), 3):
        target = empty(target_kind, f"b{broken_off}")
        await copied(source, target, stop_after=broken_off)
        there = sum(map(len, (await contents(target)).values()))
        [first, *rest] = [step for step in await copied(source, target) if step.doing == "copying"]
        assert (first.done, first.total) == (there, steps[-1].total)
        assert [step.done for step in rest[-1:]] in ([], [first.total])
        assert await contents(target) == whole


@pytest.mark.parametrize("target_kind", KINDS)
async def test_a_killed_program_goes_on_and_meanwhile_nobody_serves_half_a_state(
    empty: Any, tmp_path: Path, target_kind: str
) -> None:
    source, target = empty("sqlite", "a"), empty(target_kind, "b")
    await fill(source, keys=20 * PAGE)
    await migrated(target)
    arguments = ("copy", "--from", source, "--to", target)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "relay", *arguments),
        env={**BARE, "PYTHONPATH": str(Path(__file__).parent.parent)},
    )
    count = "SELECT COUNT(*) AS rows FROM idempotency_keys"
    async with asyncio.timeout(60), connected(target) as run:
        while (await run(count))[0]["rows"] < 2 * PAGE:
            assert process.returncode is None
            await asyncio.sleep(0.005)
        process.kill()
        await process.wait()
        assert (await run(count))[0]["rows"] < 20 * PAGE

    write(tmp_path, {"secret_key": "s" * 32, "port": 0, "database": target})
    for command, code in (("serve", 2), ("check", 1)):
        refused = await relay(command, cwd=tmp_path)
        assert refused.code == code
        said = f"the copy from {source} into it did not end: run `relay copy` again, or use the old database"
        assert said in refused.err + refused.out

    ended = await relay(*arguments, "--json", cwd=tmp_path)
    assert ended.code == 0, ended.err
    assert json.loads(ended.out)["tables"]["idempotency_keys"] == 20 * PAGE + 2
    assert (await relay("check", cwd=tmp_path)).code == 0
    assert await contents(target) == await contents(source)


async def test_the_program_says_how_much_was_copied_and_what_to_do_now(empty: Any, tmp_path: Path) -> None:
    source, target = empty("sqlite", "a"), empty("sqlite", "b")
    await fill(source, keys=1500)
    ended = await relay("copy", "--from", source, "--to", target, cwd=tmp_path)
    assert ended.code == 0, ended.err
    assert "idempotency_keys" in ended.out
    assert "1,502" in ended.out
    assert f"set `database:` in the configuration to {target}" in ended.out
    assert (await relay("copy", "--from", source, cwd=tmp_path)).code == 2


def databases(directory: Path) -> list[str]:
    return sorted(f"sqlite:///{path}" for path in directory.glob("?.db"))


async def other_rows(source: str, target: str) -> None:
    await fill(source)
    await migrated(target)
    await insert(target, "tenants", {"id": "default", "signing_secrets": "s", "created_at": 1})


async def an_ended_copy(source: str, target: str) -> None:
    await fill(source)
    await copied(source, target)


async def a_copy_of_another(source: str, target: str) -> None:
    await fill(source)
    await fill(source + "-2")
    await copied(source + "-2", target, stop_after=8)


async def nothing(source: str, target: str) -> None:
    await migrated(target)


async def half_a_source(source: str, target: str) -> None:
    await fill(source + "-2")
    await copied(source + "-2", source, stop_after=8)


async def a_newer_source(source: str, target: str) -> None:
    await fill(source)
    await insert(source, "migrations", {"version": 9999, "name": "future", "applied_at": 1})


async def no_relay(source: str, target: str) -> None:
    async with connected(source) as run:
        await run("CREATE TABLE others (id TEXT)")


@pytest.mark.parametrize(
    ("prepare", "says"),
    [
        (other_rows, "--to: it is not empty: there are tenants in it"),
        (an_ended_copy, "into it has ended already"),
        (a_copy_of_another, "--to: it holds an unfinished copy from sqlite:///"),
        (nothing, "does not exist"),
        (half_a_source, "--from: the copy from sqlite:///"),
        (a_newer_source, "--from: it was written by a newer Relay"),
        (no_relay, "--from: it was not used by this version of Relay yet"),
    ],
)
async def test_databases_that_are_not_as_they_must_be_are_refused_and_left_alone(
    empty: Any, tmp_path: Path, prepare: Any, says: str
) -> None:
    source, target = empty("sqlite", "a"), empty("sqlite", "b")
    await prepare(source, target)
    files = databases(tmp_path)
    before = [await contents(url) for url in files]
    refused = await relay("copy", "--from", source, "--to", target, cwd=tmp_path)
    assert (refused.code, refused.out) == (2, "")
    assert says in refused.err
    assert "Traceback" not in refused.err
    assert databases(tmp_path) == files
    assert [await contents(url) for url in files] == before


async def test_a_database_is_not_copied_into_itself(empty: Any, tmp_path: Path) -> None:
    source = empty("sqlite", "a")
    await fill(source)
    (tmp_path / "link.db").symlink_to(tmp_path / "a.db")
    for same in (source, f"sqlite:///{tmp_path}/link.db"):
        with pytest.raises(ConfigError, match="--to: is the database that --from names"):
            await copied(source, same)


async def test_nothing_is_copied_while_a_relay_uses_the_database(world: World, empty: Any) -> None:
    busy, idle = f"sqlite:///{world.directory}/relay.db", empty("sqlite", "b")
    await fill(idle)
    await world.relay()
    for option, source, target in (("--from", busy, empty("sqlite", "c")), ("--to", idle, busy)):
        refused = await relay("copy", "--from", source, "--to", target, cwd=world.directory)
        assert refused.code == 2
        assert f"{option}: a relay is running on it: stop it first" in refused.err


async def test_of_two_programs_that_copy_at_once_one_gives_up(empty: Any) -> None:
    source, target = empty("postgresql", "a"), empty("postgresql", "b")
    await fill(source, keys=3 * PAGE)
    await migrated(target)
    ends = await asyncio.gather(copied(source, target), copied(source, target), return_exceptions=True)
    [failure] = [end for end in ends if isinstance(end, Exception)]
    assert isinstance(failure, CopyFailed)
    assert "another `relay copy`" in str(failure)
    assert await contents(target) == await contents(source)


@pytest.mark.parametrize("target_kind", KINDS)
@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("DELETE FROM attempts", "attempts: 0 rows in --from, 2 in --to;"),
        ("UPDATE deliveries SET attempts = 0", "deliveries: 2 rows in --from, 2 in --to, which differ;"),
    ],
)
async def test_a_source_that_was_used_while_its_copy_was_broken_off_is_noticed(
    empty: Any, tmp_path: Path, target_kind: str, change: str, says: str
) -> None:
    source, target = empty("sqlite", "a"), empty(target_kind, "b")
    await fill(source)
    steps = await copied(source, empty("sqlite", "whole"))
    await copied(source, target, stop_after=sum(step.doing == "copying" for step in steps))
    async with connected(source) as run:
        await run(change)
    failed = await relay("copy", "--from", source, "--to", target, cwd=tmp_path)
    assert failed.code == 1
    assert says in failed.err
    assert "begin again with an empty database" in failed.err
    settings = read_config({"secret_key": "s" * 32, "database": target}, {})
    with pytest.raises(ConfigError, match="did not end"):
        async with running(settings, now=wall_clock):
            pass


async def test_a_row_that_the_target_refuses_is_of_a_table_that_is_named(empty: Any) -> None:
    source, target = empty("sqlite", "a"), empty("postgresql", "b")
    await fill(source)
    async with connected(source) as run:
        await run("UPDATE endpoints SET description = ? WHERE description IS NULL", "a\0b")
    with pytest.raises(CopyFailed, match=r"endpoints: .* 0x00$"):
        await copied(source, target)


async def test_a_relay_on_the_target_goes_on_with_everything(world: World, empty: Any) -> None:
    target = empty("postgresql", "b")
    world.subscriber.answer(500)
    async with world.running() as old:
        endpoint = await world.endpoint(old, metadata={"nul": "a\0b", "odd": ODD}, description=ODD)
        done = await world.watch(old, "luma")
        running = await world.watch(old, "pixellabs", duration=60)
        [first] = await world.subscriber.got(1)
        await old.eventually(
            "/v1/deliveries", lambda page: [one["attempt_count"] for one in page["data"]] == [1]
        )
        before = (await old.api.get("/v1/deliveries")).json()
        signing = (await old.api.get("/v1/signing-secret")).json()
    await copied(f"sqlite:///{world.directory}/relay.db", target, now=world.clock())
    world.subscriber.answer(204)
    async with world.running(database=target) as new:
        assert (await new.api.get("/v1/deliveries")).json() == before
        assert (await new.api.get("/v1/signing-secret")).json() == signing
        assert (await new.api.get(f"/v1/endpoints/{endpoint['id']}")).json()["metadata"]["nul"] == "a\0b"
        world.clock.forward(seconds=60)
        messages = await world.subscriber.got(3)
        await new.eventually(
            "/v1/deliveries", lambda page: {one["status"] for one in page["data"]} == {"delivered"}
        )
        events = (await new.api.get("/v1/events")).json()["data"]
    assert {one["generation_id"] for one in events} == {done["id"], running["id"]}
    ids = [message.headers["webhook-id"] for message in messages]
    assert ids.count(first.headers["webhook-id"]) == 2
    assert set(ids) == {one["id"] for one in events}


async def test_the_password_of_a_database_is_neither_shown_nor_stored(empty: Any, tmp_path: Path) -> None:
    server, file = empty("postgresql", "a"), empty("sqlite", "b")
    await fill(server)
    secret = server.replace("relay@", "relay:s3cret-%2Fword@")
    ended = await relay("copy", "--from", secret, "--to", file, cwd=tmp_path)
    assert ended.code == 0, ended.err
    again = await relay("copy", "--from", file, "--to", secret, cwd=tmp_path)
    assert again.code == 2
    other = empty("postgresql", "c").replace("relay@", "relay:s3cret-%2Fword@")
    third = await relay("copy", "--from", file, "--to", other, cwd=tmp_path)
    assert "postgresql://relay@127.0.0.1" in third.out
    async with connected(file) as run:
        [row] = await run("SELECT source FROM copies")
    assert row["source"] == server
    wrong = [
        await relay("copy", "--from", url, "--to", f"{file}-2", cwd=tmp_path)
        for url in ("postgresql://u:s3cret/a@h/d", "postgresql://u:s3cret?a@h/d", "postgres://u:s3cret#a@h/d")
    ]
    assert {one.code for one in wrong} == {2}
    for one in (ended, again, third, *wrong):
        assert "s3cret" not in one.out + one.err


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://h/d", "postgresql://h/d"),
        ("postgresql://u@h:5432/d?sslmode=require", "postgresql://u@h:5432/d?sslmode=require"),
        ("postgresql://u:p@h:5432/d", "postgresql://u@h:5432/d"),
        ("postgresql://u:a@b:c/d?e#f@h/d", "postgresql://u@h/d"),
        ("postgresql://:p@h/d", "postgresql://@h/d"),
        ("postgresql:///d?user=u&PASSWORD=p&host=/s", "postgresql:///d?user=u&PASSWORD=[redacted]&host=/s"),
    ],
)
def test_a_password_is_taken_out_of_a_url_however_it_is_written(url: str, shown: str) -> None:
    assert without_password(url) == shown
