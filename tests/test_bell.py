"""The bell: what relays tell each other, and that it is only a hint."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.bell import Bell
from relay.errors import StoreError
from relay.store import open_database
from relay.store.database import Transaction
from tests.postgres import Cluster

TEXT = st.text(st.characters(exclude_characters=" \n", exclude_categories=["Cs"]), min_size=1, max_size=30)


class Belfry:
    """A database as far as a bell needs one: each message is taken when it is let through."""

    skip_locked, alone = "", False

    def __init__(self) -> None:
        self.messages: list[str] = []
        self.trouble = 0  # so often it takes nothing
        self.open = asyncio.Event()
        self.begun = asyncio.Event()
        self.open.set()

    async def notify(self, message: str) -> None:
        self.begun.set()
        await self.open.wait()
        if self.trouble:
            self.trouble -= 1
            raise StoreError("the database is away")
        self.messages.append(message)

    def write(self) -> AbstractAsyncContextManager[Transaction]:
        raise NotImplementedError

    def read(self, *, browse: bool = False) -> AbstractAsyncContextManager[Transaction]:
        raise NotImplementedError

    def migrating(self) -> AbstractAsyncContextManager[None]:
        raise NotImplementedError

    def listening(self, heard: Callable[[str], None]) -> AbstractAsyncContextManager[None]:
        raise NotImplementedError

    async def probe(self) -> None: ...

    async def close(self) -> None: ...


@pytest.fixture
async def belfry() -> Belfry:
    return Belfry()


def heard(bell: Bell, *messages: str) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for message in messages:
        bell.hear(message, lambda what, which: found.append((what, which)))
    return found


async def test_what_is_rung_meanwhile_goes_out_together_and_once(belfry: Belfry):
    bell, other = Bell(belfry, relay="a"), Bell(belfry, relay="b")
    belfry.open.clear()
    bell.ring("shards")
    await belfry.begun.wait()
    for number in (7, 3, 7, 3, 7):
        bell.ring("deliveries", number)
    bell.ring("endpoint", "ep_1")
    belfry.open.set()
    await bell.flush()
    first, second = belfry.messages
    assert heard(other, first) == [("shards", "")]
    assert heard(other, second) == [("deliveries", "7"), ("deliveries", "3"), ("endpoint", "ep_1")]


async def test_nobody_hears_himself(belfry: Belfry):
    bell = Bell(belfry, relay="a")
    bell.ring("shards")
    await bell.flush()
    assert heard(bell, *belfry.messages) == []
    assert heard(Bell(belfry, relay="b"), *belfry.messages) == [("shards", "")]


async def test_a_long_list_is_told_in_parts(belfry: Belfry):
    bell = Bell(belfry, relay="rly_" + "0" * 26)
    wanted = [("endpoint", f"ep_{number:026}") for number in range(1000)]
    for what, which in wanted:
        bell.ring(what, which)
    await bell.flush()
    assert all(len(message.encode()) < 8000 for message in belfry.messages)
    assert len(belfry.messages) <= 7
    assert heard(Bell(belfry, relay="b"), *belfry.messages) == wanted


@given(words=st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=50, unique=True))
async def test_what_is_rung_is_what_is_heard(words: list[tuple[str, str]]):
    belfry = Belfry()
    bell = Bell(belfry, relay="a")
    for what, which in words:
        bell.ring(what, which)
    await bell.flush()
    assert heard(Bell(belfry, relay="b"), *belfry.messages) == words


async def test_a_database_that_is_away_silences_the_bell_but_stops_nobody(belfry: Belfry):
    bell = Bell(belfry, relay="a")
    belfry.trouble = 1
    bell.ring("deliveries", 1)
    await bell.flush()
    bell.ring("deliveries", 2)
    await bell.flush()
    assert heard(Bell(belfry, relay="b"), *belfry.messages) == [("deliveries", "2")]


async def test_where_nobody_else_can_be_nothing_is_rung(belfry: Belfry):
    belfry.alone = True
    bell = Bell(belfry, relay="a")
    bell.ring("shards")
    await bell.flush()
    assert belfry.messages == []


@asynccontextmanager
async def listening(url: str, relay: str) -> AsyncIterator[tuple[Bell, asyncio.Queue[tuple[str, str]]]]:
    """A bell on a PostgreSQL, and what it hears."""
    database, found = await open_database(url), asyncio.Queue[tuple[str, str]]()
    bell = Bell(database, relay=relay)
    async with database.listening(lambda message: bell.hear(message, lambda *word: found.put_nowait(word))):
        yield bell, found
        await bell.flush()
    await database.close()


async def test_relays_hear_each_other_through_postgresql(cluster: Cluster):
    url = cluster.database(template=None)
    async with listening(url, "a") as (a, heard_by_a), listening(url, "b") as (b, heard_by_b):
        async with asyncio.timeout(15):
            while heard_by_a.empty() or heard_by_b.empty():  # until both listen
                a.ring("shards")
                b.ring("shards")
                await asyncio.sleep(0.02)
            for number in range(1000):
                a.ring("endpoint", f"ep_{number:026}")
            got = [await heard_by_b.get() for _ in range(1000)]
            while ("shards", "") in got:
                got.remove(("shards", ""))
                got.append(await heard_by_b.get())
    assert got == [("endpoint", f"ep_{number:026}") for number in range(1000)]
    assert {heard_by_a.get_nowait() for _ in range(heard_by_a.qsize())} == {("shards", "")}
    cluster.drop(url)
