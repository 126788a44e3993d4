"""The PostgreSQL driver alone: how it connects, and what comes of everything that goes wrong."""

import asyncio
import logging
import os
import pwd
import random
import signal
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from importlib.resources import files
from pathlib import Path

import asyncpg
import pytest
import trustme

from relay.errors import ConfigError, StoreError
from relay.store import open_database
from relay.store.database import Database
from relay.store.migrate import migrate, pending
from tests.postgres import Cluster
from tests.serving import listener, until

COUNT = "SELECT COUNT(*) AS n FROM tenants"
ADD = "INSERT INTO tenants (id, signing_secrets, created_at) VALUES (:id, 's', 0)"
BUSY = "FROM pg_stat_activity WHERE application_name = 'relay' AND state <> 'idle'"


@asynccontextmanager
async def opened(url: str, *, patience: float = 0) -> AsyncIterator[Database]:
    database = await open_database(url, patience=patience)
    try:
        yield database
    finally:
        await database.close()


async def count(database: Database) -> int:
    async with database.read() as tx:
        [row] = await tx.fetch(COUNT)
    return int(row["n"])


async def add(database: Database, name: str) -> None:
    async with database.write() as tx:
        await tx.execute(ADD, id=name)


async def refusal(url: str, *, patience: float = 0) -> str:
    with pytest.raises(ConfigError) as refused:
        async with opened(url, patience=patience):
            pass
    assert str(refused.value).startswith("database: ")
    assert "pass-word" not in str(refused.value)
    return str(refused.value)


# Getting in.


@pytest.fixture
def asking_for_passwords(server: Cluster) -> Iterator[Cluster]:
    rules = server.data / "pg_hba.conf"
    trusting = rules.read_text()
    server.query("CREATE ROLE visitor LOGIN PASSWORD 'right'")
    rules.write_text(f"host all visitor 127.0.0.1/32 scram-sha-256\n{trusting}")
    server.set()
    yield server
    rules.write_text(trusting)
    server.set()
    server.query("DROP ROLE visitor")


async def test_a_wrong_password_is_refused_at_once_and_not_shown(asking_for_passwords: Cluster):
    url = asking_for_passwords.url("relay_template").replace("relay@", "visitor:pass-word@")
    begun = time.monotonic()
    said = await refusal(url, patience=30)
    assert "check the user and the password in the URL" in said
    assert time.monotonic() - begun < 5
    async with opened(url.replace("pass-word", "right")):
        pass


async def test_an_unknown_database_user_or_setting_is_refused_at_once(server: Cluster):
    url = server.url("nowhere")
    assert "create that database, or name another one" in await refusal(url, patience=30)
    assert "check the user" in await refusal(url.replace("relay@", "nobody:pass-word@"), patience=30)
    wrong = server.url() + "?connect_timeout=3"
    assert "connect_timeout" in await refusal(wrong, patience=30)
    assert "`sslmode` parameter must be one of" in await refusal(
        server.url() + "?sslmode=always", patience=30
    )


async def test_a_server_without_tls_is_refused_where_tls_is_required(server: Cluster):
    assert "check sslmode" in await refusal(server.url() + "?sslmode=require", patience=30)


async def test_tls_is_verified_as_the_url_says(server: Cluster, tmp_path: Path):
    authority, stranger = trustme.CA(), trustme.CA()
    certificate = authority.issue_cert("127.0.0.1")
    certificate.private_key_pem.write_to_path(server.data / "server.key")
    certificate.cert_chain_pems[0].write_to_path(server.data / "server.crt")
    os.chmod(server.data / "server.key", 0o600)
    if os.getuid() == 0:
        owner = pwd.getpwuid(server.data.stat().st_uid)
        for name in ("server.key", "server.crt"):
            os.chown(server.data / name, owner.pw_uid, owner.pw_gid)
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    stranger.cert_pem.write_to_path(tmp_path / "other.pem")
    server.set(ssl="on")
    url = server.url("relay_template") + "?sslmode=verify-full&sslrootcert="
    async with opened(f"{url}{tmp_path}/ca.pem") as database, database.read() as tx:
        [row] = await tx.fetch("SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()")
        assert row["ssl"]
    assert "check sslmode and sslrootcert" in await refusal(f"{url}{tmp_path}/other.pem", patience=30)


async def test_a_server_that_is_not_there_yet_is_waited_for(
    server: Cluster, caplog: pytest.LogCaptureFixture
):
    server.stop()
    opening = asyncio.create_task(open_database(server.url("relay_template"), patience=30))
    await until(lambda: len(caplog.records) >= 2)
    await asyncio.to_thread(server.start)
    async with asyncio.timeout(10):
        database = await opening
    assert await count(database) == 0
    await database.close()
    waits = [record for record in caplog.records if record.message == "database.awaited"]
    assert len(waits) >= 2
    assert {record.levelno for record in waits} == {logging.WARNING}
    assert not any(record.exc_info for record in caplog.records)


async def test_a_server_that_does_not_come_is_given_up_in_time(server: Cluster):
    server.stop()
    begun = time.monotonic()
    said = await refusal(server.url().replace("relay@", "relay:pass-word@"), patience=1.2)
    assert f"127.0.0.1:{server.port}/postgres cannot be reached" in said
    assert 1.2 <= time.monotonic() - begun < 5
    begun = time.monotonic()
    await refusal(server.url())
    assert time.monotonic() - begun < 1


async def test_a_host_that_does_not_even_refuse_leaves_time_for_the_next_one(server: Cluster):
    with listener() as silent:
        silent.listen()
        url = server.url("relay_template").replace("@", f"@127.0.0.1:{silent.getsockname()[1]},")
        async with opened(url, patience=10) as database:
            begun = time.monotonic()
            assert await count(database) == 0
            assert time.monotonic() - begun < 1


# Transactions.


async def test_what_the_caller_raises_in_the_block_stays_what_it_is(
    server: Cluster, caplog: pytest.LogCaptureFixture
):
    async with opened(server.database()) as database:
        for mistake in (OSError("mine"), TimeoutError("mine"), asyncpg.PostgresError("mine"), ValueError()):
            with pytest.raises(type(mistake)) as raised:
                async with database.write() as tx:
                    await tx.execute(ADD, id="one")
                    raise mistake
            assert raised.value is mistake
            with pytest.raises(type(mistake)):
                async with database.read():
                    raise mistake
        assert await count(database) == 0
    assert caplog.records == []


async def test_a_commit_after_a_failed_statement_is_no_success(server: Cluster):
    async with opened(server.database()) as database:
        with pytest.raises(StoreError, match="ROLLBACK"):
            async with database.write() as tx:
                await tx.execute(ADD, id="one")
                with suppress(StoreError):
                    await tx.execute(ADD, id="one")
        assert await count(database) == 0


async def test_an_error_shows_no_row(server: Cluster):
    async with opened(server.database()) as database:
        await add(database, "the-id")
        with pytest.raises(StoreError, match="tenants_pkey") as refused:
            await add(database, "the-id")
        assert not refused.value.general
        assert "the-id" not in str(refused.value)
        async with database.write() as tx:
            await tx.execute("ALTER TABLE tenants ADD CONSTRAINT short CHECK (LENGTH(id) < 10)")
        with pytest.raises(StoreError, match="short") as refused:
            await add(database, "a very long one")
        assert "a very long one" not in str(refused.value)


async def test_a_statement_that_waits_too_long_is_ended_on_the_server_too(server: Cluster):
    url = server.database()
    async with opened(f"{url}?command_timeout=300ms") as database, opened(url) as other:
        async with other.write() as held:
            await held.execute("LOCK TABLE tenants IN ACCESS EXCLUSIVE MODE")
            for work in (add(database, "one"), count(database)):
                with pytest.raises(StoreError) as refused:
                    await work
                assert refused.value.general
            await until(lambda: server.query(f"SELECT COUNT(*) {BUSY} AND wait_event_type = 'Lock'") == "0")
        await add(database, "one")
        assert await count(database) == 1


async def test_a_relay_that_falls_silent_within_a_transaction_loses_its_locks(server: Cluster):
    url = server.database()
    async with opened(f"{url}?command_timeout=300ms") as silent, opened(url) as other:
        await add(other, "one")
        with pytest.raises(StoreError):
            async with silent.write() as tx:
                await tx.execute("UPDATE tenants SET created_at = 1")
                async with other.write() as theirs:
                    await theirs.execute("UPDATE tenants SET created_at = 2")
        async with other.read() as tx:
            assert [row["created_at"] for row in await tx.fetch("SELECT created_at FROM tenants")] == [2]


async def test_who_gets_no_connection_is_told_so_in_time(server: Cluster):
    async with opened(f"{server.database()}?pool_size=2") as database:
        async with database.write(), database.write():
            begun = time.monotonic()
            with pytest.raises(StoreError, match="gave no connection") as refused:
                await count(database)
            assert refused.value.general
            assert time.monotonic() - begun < 8
        assert await count(database) == 0


async def test_cancellation_loses_no_connection_and_leaves_nothing_open(server: Cluster):
    dice = random.Random(1)  # noqa: S311 # chance that can be repeated
    async with opened(f"{server.database()}?pool_size=3") as database:

        async def work(number: int) -> None:
            async with database.write() as tx:
                await tx.execute(ADD, id=f"t{number}")
                await tx.fetch("SELECT pg_sleep(:seconds)", seconds=0.002)

        for number in range(150):
            task = asyncio.create_task(work(number))
            await asyncio.sleep(dice.uniform(0, 0.012))
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
        assert 0 < await count(database) < 150
        await until(lambda: server.query(f"SELECT COUNT(*) {BUSY}") == "0")
        async with database.write(), database.write(), database.write():
            pass
        assert (
            int(server.query("SELECT COUNT(*) FROM pg_stat_activity WHERE application_name = 'relay'")) <= 3
        )


async def test_closing_ends_in_time_when_the_server_says_nothing_any_more(server: Cluster):
    database = await open_database(server.database())
    await count(database)
    server.signal(signal.SIGSTOP)
    try:
        begun = time.monotonic()
        await database.close()
        assert time.monotonic() - begun < 7
    finally:
        server.signal(signal.SIGCONT)


async def test_nothing_is_told_to_a_session(server: Cluster):
    async with opened(server.database()) as database:
        async with database.write() as tx:
            [row] = await tx.fetch("SHOW statement_timeout")
            assert row["statement_timeout"] == "10s"
        async with database.read() as tx:
            [row] = await tx.fetch("SHOW statement_timeout")
            assert row["statement_timeout"] == "0"


# Migrations.


async def test_of_many_that_start_at_once_one_migrates(server: Cluster):
    url = server.database(template=None)
    databases = [await open_database(url) for _ in range(5)]
    assert all(await asyncio.gather(*(pending(one) for one in databases)))
    applied = await asyncio.gather(*(migrate(one, now=7) for one in databases))
    assert sorted(map(len, applied))[:-1] == [0, 0, 0, 0]
    assert max(applied, key=len)[0] == "0001_start"
    assert await asyncio.gather(*(pending(one) for one in databases)) == [[]] * 5
    for one in databases:
        await one.close()


async def test_a_migration_that_fails_leaves_nothing(server: Cluster):
    url = server.database(template=None)
    server.query("CREATE TABLE deliveries (in_the_way BIGINT)", url.rsplit("/", 1)[1])
    async with opened(url) as database:
        with pytest.raises(StoreError, match="already exists"):
            await migrate(database, now=0)
        async with database.read() as tx:
            tables = await tx.fetch("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")
        assert [row["tablename"] for row in tables] == ["deliveries"]


async def test_who_may_not_create_tables_runs_on_a_database_that_is_up_to_date(server: Cluster):
    url = server.database()
    name = url.rsplit("/", 1)[1]
    server.query("CREATE ROLE worker LOGIN")
    server.query("GRANT SELECT ON migrations TO worker", name)
    try:
        async with opened(url.replace("relay@", "worker@")) as database:
            assert await pending(database) == []
            assert await migrate(database, now=0) == []
    finally:
        server.drop(url)
        server.query("DROP ROLE worker")


async def test_what_only_postgresql_understands_is_applied_there_alone(server: Cluster, tmp_path: Path):
    names = [one.name for one in files("relay.store").joinpath("migrations").iterdir()]
    assert "0001_start.postgres.sql" in names
    async with opened(server.database()) as database, database.read() as tx:
        [row] = await tx.fetch("SELECT reloptions FROM pg_class WHERE relname = 'deliveries'")
        assert "autovacuum_vacuum_scale_factor=0.01" in row["reloptions"]
    async with opened(f"sqlite:///{tmp_path}/relay.db") as database:
        assert await migrate(database, now=0) == ["0001_start"]
