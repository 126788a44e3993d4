"""What only SQLite has: one file, one process that writes it, and what can become of a file."""

import asyncio
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from relay.endpoint import Secret
from relay.errors import ConfigError, StoreError
from relay.store import Store
from tests.test_store import NOW, insert, opened, prepared


def url_of(path: Path) -> str:
    return f"sqlite:///{path}"


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    async with prepared(url_of(tmp_path / "relay.db")) as store:
        yield store


# One file, one process.


async def another_process(path: Path) -> subprocess.CompletedProcess[str]:
    """A program that opens the file, and ends."""
    program = (
        "import asyncio, sys; from relay.store import open_database;"
        "asyncio.run(open_database('sqlite:///' + sys.argv[1]))"
    )
    command = [sys.executable, "-c", program, str(path)]
    return await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, timeout=10)


async def test_a_second_process_on_the_same_file_is_refused_and_told_of_postgresql(tmp_path: Path):
    async with opened(url_of(tmp_path / "relay.db")):
        second = await another_process(tmp_path / "relay.db")
    assert second.returncode != 0
    assert "database: another relay is running" in second.stderr
    assert "PostgreSQL" in second.stderr


async def test_a_file_by_another_name_is_still_the_same_file(tmp_path: Path):
    (tmp_path / "link.db").symlink_to(tmp_path / "relay.db")
    async with opened(url_of(tmp_path / "relay.db")):
        with pytest.raises(ConfigError, match="another relay"):
            async with opened(url_of(tmp_path / "link.db")):
                pass


async def test_a_file_is_free_again_once_it_is_closed(tmp_path: Path):
    for _ in range(2):
        async with opened(url_of(tmp_path / "relay.db")):
            pass


@pytest.mark.parametrize("make", [Path.mkdir, lambda path: path.write_text("no database" * 100)])
async def test_a_file_that_is_no_database_is_refused_and_the_program_ends(tmp_path: Path, make: Any):
    make(tmp_path / "relay.db")
    refused = await another_process(tmp_path / "relay.db")
    assert refused.returncode != 0
    assert "ConfigError: database: " in refused.stderr


# How it is written and read.


async def test_commits_are_durable(store: Store):
    async with store.database.write() as tx:
        [journal], [synchronous], [keys] = [
            await tx.fetch(f"PRAGMA {name}") for name in ("journal_mode", "synchronous", "foreign_keys")
        ]
        assert (journal[0], synchronous[0], keys[0]) == ("wal", 2, 1)


@pytest.mark.parametrize("browse", [True, False])
async def test_nothing_is_written_while_reading(store: Store, browse: bool):
    with pytest.raises(StoreError):
        async with store.database.read(browse=browse) as tx:
            await tx.execute("DELETE FROM tenants")


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
    assert await store.tenants.signing_secrets("after") == (Secret("s"),)


async def test_a_full_disk_is_a_general_failure_that_passes(store: Store):
    async with store.database.write() as tx:
        [[pages]] = await tx.fetch("PRAGMA page_count")
        await tx.fetch(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(StoreError) as refusal:
        await insert(store, "endpoints", description="x" * 100_000)
    assert refusal.value.general
    async with store.database.write() as tx:
        await tx.fetch("PRAGMA max_page_count = 1000000")
    await insert(store, "endpoints", description="x" * 100_000)
