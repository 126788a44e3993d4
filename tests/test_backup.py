"""`relay backup`: one whole file, made beside a relay at work, from which another one goes on."""

import asyncio
import json
import os
import shutil
import signal
import sqlite3
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from relay.errors import ConfigError, CopyFailed
from relay.store.backup import STEP, backup
from tests.conftest import RunningRelay, World
from tests.postgres import Cluster, binaries
from tests.program import Program, drained
from tests.serving import Subscriber, serving
from tests.test_cli import relay, write


def rows(path: Path, sql: str) -> list[Any]:
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
        return database.execute(sql).fetchall()


async def publish(program: Program, *names: str, type: str = "order.paid") -> None:
    async with program.api(timeout=30) as api:
        body = [{"type": type, "data": {}, "id": name} for name in names]
        assert (await api.post("/v1/events", json=body)).status_code == 201


async def has_events(program: Program, count: int) -> None:
    async with asyncio.timeout(30):
        while count_of_events(program.directory / "relay.db") < count:  # noqa: ASYNC110 # no event for it
            await asyncio.sleep(0.02)


def count_of_events(database: Path) -> int:
    return int(rows(database, "SELECT COUNT(*) FROM events")[0][0])


def put(copy: Path, database: Path) -> None:
    """As docs/operating.md says."""
    for suffix in ("", "-wal", "-shm"):
        Path(f"{database}{suffix}").unlink(missing_ok=True)
    shutil.copy(copy, database)


async def load(program: Program) -> None:
    for number in range(100_000):
        await publish(program, *(f"{number}-{one}" for one in range(20)), type="nobody.listens")


async def test_a_copy_made_under_load_is_whole_and_a_relay_on_it_tells_again_what_was_open_then(
    tmp_path: Path,
):
    subscriber, program = Subscriber(), Program.placed(tmp_path, delivery={"timeout": "5s"})
    database, copy = tmp_path / "relay.db", tmp_path / "copy.db"
    async with serving(subscriber.app) as origin, program.api() as api:
        try:
            await program.start()
            asked = {"url": f"{origin}/", "event_types": ["order.paid"], "rate_limit": 10}
            endpoint = (await api.post("/v1/endpoints", json=asked)).json()["id"]
            await publish(program, *(f"order-{number}" for number in range(90)))
            await subscriber.got(5)
            loading = asyncio.create_task(load(program))
            await has_events(program, 500)
            made = await relay("backup", "copy.db", "--json", cwd=tmp_path)
            assert made.code == 0, made.err
            await has_events(program, count_of_events(copy) + 100)
            loading.cancel()
            await asyncio.wait([loading])
            await api.patch(f"/v1/endpoints/{endpoint}", json={"rate_limit": None})
            await publish(program, "after")
            told = {one.headers["webhook-id"] for one in await subscriber.got(91)}
            assert (await program.stop())[0] == 0

            assert json.loads(made.out)["bytes"] == copy.stat().st_size > 100_000
            assert copy.stat().st_mode & 0o777 == 0o600
            assert [name for name in os.listdir(tmp_path) if "copy" in name] == ["copy.db"]
            assert rows(copy, "PRAGMA foreign_key_check") == []
            was_open = {row[0] for row in rows(copy, "SELECT event_id FROM deliveries WHERE due_at > 0")}
            assert was_open
            assert was_open < told

            put(copy, database)
            subscriber.received.clear()
            await program.start()
            await api.patch(f"/v1/endpoints/{endpoint}", json={"rate_limit": None})
            await drained(api)
            # The same events: whoever remembers ids sees that.
            assert Counter(one.headers["webhook-id"] for one in subscriber.received) == dict.fromkeys(
                was_open, 1
            )
            # It does not know this one any more: published again, it is a new event.
            await publish(program, "after", "order-0")
            await drained(api)
            assert len(subscriber.received) == len(was_open) + 1
            assert subscriber.received[-1].headers["webhook-id"] not in told
        finally:
            await program.end(signal.SIGKILL)


def files(directory: Path) -> dict[str, tuple[int, bytes]]:
    return {one.name: (one.stat().st_mtime_ns, one.read_bytes()) for one in directory.iterdir()}


@pytest.fixture
async def stopped(tmp_path: Path) -> Path:
    """The database of a relay that does not run."""
    write(tmp_path, {"secret_key": "s" * 32})
    assert (await relay("migrate", cwd=tmp_path)).code == 0
    return tmp_path / "relay.db"


async def test_a_stopped_relay_is_copied_and_left_as_it_was(stopped: Path):
    before = files(stopped.parent)
    made = await relay("backup", "copy.db", cwd=stopped.parent)
    assert (made.code, "whole and checked" in made.out) == (0, True)
    after = files(stopped.parent)
    assert after.pop("copy.db")
    assert after == before


async def test_nothing_is_overwritten_and_nothing_is_made_of_nothing(stopped: Path):
    directory = stopped.parent
    (directory / "copy.db").write_text("precious")
    refused = await relay("backup", "copy.db", cwd=directory)
    assert (refused.code, refused.out) == (2, "")
    assert "exists: name another file" in refused.err
    assert (directory / "copy.db").read_text() == "precious"
    elsewhere = await relay("backup", "new.db", cwd=directory, RELAY_DATABASE_URL="postgresql://x@y/z")
    assert (elsewhere.code, "pg_dump" in elsewhere.err) == (2, True)
    with pytest.raises(ConfigError, match="cannot be written"):
        backup(stopped, directory / "nowhere" / "copy.db", show=lambda done, total: None)
    with pytest.raises(ConfigError, match="does not exist"):
        backup(directory / "missing.db", directory / "new.db", show=lambda done, total: None)
    assert sorted(os.listdir(directory)) == ["config.yaml", "copy.db", "relay.db", "relay.db.lock"]


def test_a_damaged_database_makes_no_backup(tmp_path: Path):
    source, copy = tmp_path / "relay.db", tmp_path / "copy.db"
    with closing(sqlite3.connect(source)) as file:
        file.execute("CREATE TABLE t (id INTEGER PRIMARY KEY, x TEXT)")
        file.executemany("INSERT INTO t (x) VALUES (?)", [("y" * 500,)] * 2000)
        file.commit()
    with source.open("r+b") as raw:
        raw.seek(4096 * 20)
        raw.write(b"\xff" * 4096)
    with pytest.raises(CopyFailed, match="damaged"):
        backup(source, copy, show=lambda done, total: None)
    assert [one.name for one in tmp_path.iterdir()] == ["relay.db"]


def test_what_is_written_meanwhile_neither_gets_into_the_copy_nor_has_it_begin_anew(tmp_path: Path):
    source, copy = tmp_path / "relay.db", tmp_path / "copy.db"
    with closing(sqlite3.connect(source)) as relays:
        relays.execute("PRAGMA journal_mode = WAL")
        relays.execute("CREATE TABLE t (x TEXT)")
        relays.executemany("INSERT INTO t VALUES (?)", [("y" * 4000,)] * (STEP * 5))
        relays.commit()
        steps: list[int] = []

        def write(done: int, total: int) -> None:
            assert len(steps) < 20
            steps.append(done)
            relays.execute("INSERT INTO t VALUES ('z')")
            relays.commit()

        backup(source, copy, show=write)
    assert len(steps) > 5
    assert steps == sorted(set(steps))
    assert rows(copy, "SELECT COUNT(*) FROM t") == [(STEP * 5,)]


def test_of_two_backups_with_one_name_the_later_one_is_refused(tmp_path: Path):
    source, copy = tmp_path / "relay.db", tmp_path / "copy.db"
    with closing(sqlite3.connect(source)) as file:
        file.execute("CREATE TABLE t (x TEXT)")
        file.executemany("INSERT INTO t VALUES (?)", [("y" * 4000,)] * (STEP * 3))
        file.commit()
    steps: list[int] = []

    def somebody_else_was_faster(done: int, total: int) -> None:
        steps.append(done)
        copy.write_text("precious")

    with pytest.raises(CopyFailed, match="exists"):
        backup(source, copy, show=somebody_else_was_faster)
    assert len(steps) > 2  # in small steps
    assert copy.read_text() == "precious"
    with pytest.raises(ConfigError):
        backup(source, copy, show=lambda done, total: None)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["copy.db", "relay.db"]


async def test_a_dump_of_postgresql_restores_a_relay(world: World, cluster: Cluster):
    folder = binaries()
    assert folder is not None
    url, dump = cluster.database(None), world.directory / "relay.dump"

    async def run(name: str, *options: str) -> None:
        process = await asyncio.create_subprocess_exec(folder / name, *options)
        assert await asyncio.wait_for(process.wait(), 60) == 0

    async def pay(relay: RunningRelay) -> None:
        answer = await relay.api.post("/v1/events", json={"type": "order.paid", "data": {}})
        assert answer.status_code == 201

    async with world.running(database=url) as relay:
        await world.endpoint(relay, event_types=["order.paid"])
        await pay(relay)
        await relay.eventually("/v1/deliveries?status=delivered", lambda page: page["data"])
        before = (await relay.api.get("/v1/events")).json()
        await run("pg_dump", "--format=custom", f"--file={dump}", url)
        await pay(relay)
    await run("pg_restore", "--clean", "--if-exists", f"--dbname={url}", str(dump))
    # The shards are still held by the relay of then, for the lease of one that was killed.
    world.clock.forward(seconds=60)
    async with world.running(database=url) as relay:
        assert (await relay.api.get("/v1/events")).json() == before
        await pay(relay)
        await relay.eventually("/v1/deliveries?status=delivered", lambda page: len(page["data"]) == 2)
    cluster.drop(url)
