"""Events as they are stored, over one long answer: all of them, whoever stored them, and nobody else's."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from httpx_sse import EventSource, ServerSentEvent

from relay import live
from relay.body import portions
from relay.endpoint import Endpoint
from relay.event import Event, envelope
from relay.ids import new_id
from relay.store import Store, open_database, store_on
from relay.store.events import Handoff
from relay.store.migrate import migrate
from tests.conftest import World
from tests.fleet import Fleet
from tests.keyring import KEYRING
from tests.program import THOROUGH
from tests.serving import until

PATH = "/v1/events/stream"


@dataclass
class Listener:
    """Who reads a stream, in a task of its own."""

    answer: httpx.Response
    events: list[ServerSentEvent] = field(default_factory=list)
    ended: bool = False

    async def read(self) -> None:
        try:
            async for event in EventSource(self.answer).aiter_sse():
                if event.data:
                    self.events.append(event)
        except httpx.HTTPError:
            pass
        self.ended = True

    @property
    def ids(self) -> Sequence[str]:
        return [one.id for one in self.events]

    async def got(self, count: int) -> Sequence[ServerSentEvent]:
        await until(lambda: len(self.events) >= count)
        return self.events

    async def end(self) -> None:
        await until(lambda: self.ended)


@asynccontextmanager
async def listening(
    api: httpx.AsyncClient, after: str | None = None, **query: Any
) -> AsyncIterator[Listener]:
    headers = {"last-event-id": after} if after is not None else {}
    async with api.stream("GET", PATH, params=query, headers=headers, timeout=60) as answer:
        assert answer.status_code == 200, await answer.aread()
        listener = Listener(answer)
        task = asyncio.create_task(listener.read())
        try:
            yield listener
        finally:
            task.cancel()
            await asyncio.wait([task])


async def publish(api: httpx.AsyncClient, *numbers: int, type_: str = "order.shipped") -> list[str]:
    body = [{"type": type_, "data": {"number": number}} for number in numbers]
    ids = list[str]()
    for place in range(0, len(body), 100):
        answer = await api.post("/v1/events", json=body[place : place + 100])
        assert answer.status_code == 201, answer.text
        ids += [one["id"] for one in answer.json()["data"]]
    return ids


async def test_a_stream_carries_what_subscribers_receive_byte_for_byte(
    database_url: str, world: World
) -> None:
    relay = await world.relay(database=database_url)
    await world.endpoint(relay)
    async with listening(relay.api) as listener:
        assert listener.answer.headers["content-type"].startswith("text/event-stream")
        assert listener.answer.headers.get_list("cache-control") == ["no-store"]
        assert listener.answer.headers["x-content-type-options"] == "nosniff"
        await world.watch(relay, "luma", duration=0)
        [received] = await world.subscriber.got(1)
        [event] = await listener.got(1)
    assert (event.id, event.event) == (received.headers["webhook-id"], "generation.completed")
    assert event.data.encode() == received.body


async def test_who_comes_back_gets_what_it_missed_in_order(database_url: str, world: World) -> None:
    relay = await world.relay(database=database_url)
    async with listening(relay.api) as listener:
        first = await publish(relay.api, 1, 2, 3)
        await listener.got(3)
        assert sorted(listener.ids) == sorted(first)
        last = listener.ids[-1]
    missed = await publish(relay.api, *range(250))
    async with listening(relay.api, after=last) as listener:
        await until(lambda: set(missed) <= set(listener.ids))
        more = await publish(relay.api, 4)
        await until(lambda: more[0] in listener.ids)
        assert last not in listener.ids
        assert len(listener.ids) == len(set(listener.ids))
        # Only where other relays may have told it is anything told again.
        again = set(listener.ids) - {*missed, *more}
        assert again <= (set() if database_url.startswith("sqlite") else set(first))


async def test_nothing_is_missing_after_a_restart_or_half_an_hour(database_url: str, world: World) -> None:
    async with world.running(database=database_url) as relay:
        old = await publish(relay.api, *range(150))
        world.clock.forward(seconds=600)
        before = await publish(relay.api, 1, 2)
        async with listening(relay.api, after=old[9]) as listener:
            await until(lambda: {*old[10:], *before} <= set(listener.ids))
            assert [one for one in listener.ids if one in old[10:]] == sorted(old[10:])
    world.clock.forward(seconds=1800)
    async with world.running(database=database_url) as relay:
        late = await publish(relay.api, 3)
        async with listening(relay.api, after=before[0]) as listener:
            await until(lambda: {before[1], *late} <= set(listener.ids))
            assert not {*old} & {*listener.ids}
        async with listening(relay.api, last_event_id=before[1]) as listener:
            await until(lambda: late[0] in listener.ids)


async def test_a_stream_gives_what_its_filters_let_through(world: World) -> None:
    relay = await world.relay()
    endpoint = await world.endpoint(relay, event_types=["order.shipped"], accounts=None)
    other = await world.endpoint(relay, path="/other")
    generation = await world.watch(relay, "luma", duration=600)
    queries: Sequence[dict[str, str]] = [
        {},
        {"type": "order.shipped"},
        {"type": "generation.completed, order.paid"},
        {"endpoint_id": endpoint["id"]},
        {"endpoint_id": other["id"]},
        {"account": "vivix"},
        {"generation_id": generation["id"]},
    ]
    async with (
        listening(relay.api, **queries[0]) as every,
        listening(relay.api, **queries[1]) as shipped,
        listening(relay.api, **queries[2]) as two,
        listening(relay.api, **queries[3]) as of_one,
        listening(relay.api, **queries[4]) as of_other,
        listening(relay.api, **queries[5]) as vivix,
        listening(relay.api, **queries[6]) as of_generation,
    ):
        await publish(relay.api, 1)
        await publish(relay.api, 2, type_="order.paid")
        await world.watch(relay, "vivix", duration=0)
        await until(lambda: len(every.events) == 3)
        await relay.api.post(f"/v1/endpoints/{endpoint['id']}/test")
        await every.got(4)
        await of_one.got(2)
        # What came before has passed all of them.
        await of_other.got(1)
    kinds = [one.event for one in every.events]
    assert kinds == ["order.shipped", "order.paid", "generation.completed", "endpoint.test"]
    assert [one.event for one in shipped.events] == ["order.shipped"]
    assert [one.event for one in two.events] == ["order.paid", "generation.completed"]
    assert [one.event for one in of_one.events] == ["order.shipped", "endpoint.test"]
    assert [one.event for one in of_other.events] == ["generation.completed"]
    assert [one.event for one in vivix.events] == ["generation.completed"]
    assert of_generation.events == []


async def test_what_cannot_be_streamed_is_refused(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "STREAMS", 2)
    relay = await world.relay()
    writer = await world.member(relay, "write")
    assert (await writer.get(PATH)).status_code == 403
    for query, headers, status in (
        ({"endpoint_id": "ep_x"}, {}, 404),
        ({"last_event_id": "x"}, {}, 422),
        ({}, {"last-event-id": "evt_" + "Z" * 26}, 422),
        ({"timeout": "-1"}, {}, 422),
        ({"no": "such"}, {}, 422),
    ):
        answer = await relay.api.get(PATH, params=query, headers=headers)
        assert answer.status_code == status, answer.text
    theirs = await world.member(relay, "read", tenant="theirs")
    assert (await relay.api.head(PATH)).status_code == 200
    async with listening(relay.api), listening(relay.api):
        refused = await relay.api.get(PATH)
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        assert (await theirs.get(PATH, params={"timeout": 0})).status_code == 200
    # Who went away makes room.
    answer = refused
    async with asyncio.timeout(10):
        while answer.status_code == 429:
            answer = await relay.api.get(PATH, params={"timeout": 0})
    assert answer.status_code == 200


async def test_a_stream_ends_when_its_time_is_over_its_key_revoked_or_its_endpoint_deleted(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("relay.web.stream.HEARTBEAT", 0.1)
    relay = await world.relay()
    endpoint = await world.endpoint(relay, event_types=["order.shipped"])
    made = await world.key(relay, "read")
    member = await world.client(relay, made["key"])
    assert "retry: 1000\n\n" in (await relay.api.get(PATH, params={"timeout": 0.2})).text
    async with listening(member) as theirs, listening(relay.api, endpoint_id=endpoint["id"]) as of_endpoint:
        assert (await relay.api.delete(f"/v1/keys/{made['id']}")).status_code == 204
        await theirs.end()
        assert not of_endpoint.ended
        await relay.api.delete(f"/v1/endpoints/{endpoint['id']}")
        await publish(relay.api, 1)
        await of_endpoint.end()
        assert of_endpoint.events == []


async def test_a_heartbeat_shows_that_a_silent_stream_lives(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("relay.web.stream.HEARTBEAT", 0.1)
    relay = await world.relay()
    assert ": ping" in (await relay.api.get(PATH, params={"timeout": 1})).text


async def test_a_reader_that_lags_behind_is_dropped_and_harms_nobody(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "MOST_EVENTS", 20)
    relay = await world.relay()
    large = {"type": "order.shipped", "data": {"much": "x" * 200_000}}
    async with (
        relay.api.stream("GET", PATH, timeout=60) as slow,
        listening(relay.api) as quick,
    ):
        ids: list[str] = []
        for _ in range(80):
            ids.append((await relay.api.post("/v1/events", json=large)).json()["id"])
            await until(lambda: quick.ids[-1:] == ids[-1:])
        assert not quick.ended
        seen = [event.id async for event in EventSource(slow).aiter_sse() if event.data]
    assert 0 < len(seen) < len(ids)
    assert seen == ids[: len(seen)]
    async with listening(relay.api, after=seen[-1]) as back:
        await until(lambda: back.ids == ids[len(seen) :])


async def test_a_stream_hears_of_what_other_relays_store(fleet: Fleet, world: World) -> None:
    one, other = await fleet.joined(2)
    async with listening(one.api) as here, listening(other.api) as there:
        ids = [*await publish(one.api, 1), *await publish(other.api, 2)]
        generation = await world.watch(one, "luma", duration=0)
        for listener in (here, there):
            await listener.got(3)
            assert set(ids) < set(listener.ids)
            assert json.loads(listener.events[-1].data)["data"]["id"] == generation["id"]


async def test_a_relay_is_told_of_new_events_by_those_who_know_that_it_streams(
    fleet: Fleet, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Only the bell brings it in time.
    monkeypatch.setattr(live, "_SWEEP", 3600)
    one, other = await fleet.joined(2)
    async with listening(one.api) as listener:
        async with asyncio.timeout(20):
            number = 0
            while not listener.events:
                await publish(other.api, number := number + 1)
                await asyncio.sleep(0.05)


def made(now: int, number: int) -> Event:
    data = {"number": number}
    return Event(new_id("evt", now), "default", "order.shipped", envelope("order.shipped", "", data), now)


async def test_no_stream_misses_what_is_committed_behind_younger_events(fleet: Fleet, world: World) -> None:
    """Writers whose clocks differ and whose transactions end in any order; readers come and go."""
    one, other = await fleet.joined(2)
    database = await open_database(fleet.url)
    store = store_on(database, KEYRING)
    stored: list[str] = []
    told: dict[int, list[str]] = {}
    over = asyncio.Event()

    async def write(late: int, place: int) -> None:
        """What it commits was made so many milliseconds before."""
        for number in range(500 if THOROUGH else 25):
            event = made(world.clock() - late, number)
            await asyncio.sleep(0.002 * place)
            await store.events.announce([event], Handoff("nobody", 0, lambda *_: False), now=world.clock())
            stored.append(event.id)

    async def read(place: int) -> None:
        """Comes back again and again, to one relay or the other, with the last id that it has."""
        told[place], last, turn = [], first, 0
        while not (over.is_set() and set(stored) <= set(told[place])):
            turn += 1
            async with listening((one, other)[turn % 2].api, after=last) as listener:
                enough = len(set(told[place])) + 7

                def some(listener: Listener = listener, enough: int = enough) -> bool:
                    known = {*told[place], *listener.ids}
                    return len(known) >= enough or (over.is_set() and set(stored) <= known)

                await until(some)
                told[place] += listener.ids
                last = listener.ids[-1] if listener.ids else last
            # Something happens while nobody listens.
            gone = len(stored)
            await until(lambda gone=gone: over.is_set() or len(stored) >= gone + 5)  # type: ignore[misc]

    [first] = await publish(one.api, 0)
    async with listening(one.api) as here, listening(other.api) as there:
        readers = [asyncio.create_task(read(place)) for place in range(3)]
        lates = (0, 0, 300, 3_000, live.LATE - 5_000)
        await asyncio.gather(*(write(late, place) for place, late in enumerate(lates)))
        over.set()
        await asyncio.gather(*readers)
        await until(lambda: all(set(stored) <= set(listener.ids) for listener in (here, there)))
        # One stream tells everything once.
        assert all(len(listener.ids) == len(set(listener.ids)) for listener in (here, there))
    await database.close()


async def test_a_transaction_that_is_long_under_way_is_not_passed_over(fleet: Fleet, world: World) -> None:
    one = await fleet.join()
    async with listening(one.api) as listener:
        slow = made(world.clock(), 0)
        async with fleet.database.write() as tx:
            await tx.execute(
                """
                INSERT INTO events (id, tenant, type, body, created_at)
                VALUES (:id, :tenant, :type, :body, 0)
                """,
                id=slow.id,
                tenant="default",
                type=slow.type,
                body=slow.body,
            )
            quick = await publish(one.api, *range(10))
            await listener.got(10)
            # Long after the young ones were all that was looked at.
            world.clock.forward(seconds=5)
        await until(lambda: slow.id in listener.ids)
        assert sorted(listener.ids) == sorted([slow.id, *quick])
        last = listener.ids[-2]
    async with listening(one.api, after=last) as listener:
        await until(lambda: slow.id in listener.ids)


async def test_a_stream_carries_nothing_of_a_neighbour(database_url: str, world: World) -> None:
    relay = await world.relay(database=database_url)
    ours, theirs = [await world.member(relay, "admin", tenant=name) for name in ("ours", "theirs")]
    url = world.subscriber.origin + "/"
    endpoint = (await ours.post("/v1/endpoints", json={"url": url, "event_types": ["order.shipped"]})).json()
    [first] = await publish(ours, 1)
    assert (await theirs.get(PATH, params={"endpoint_id": endpoint["id"]})).status_code == 404
    async with (
        listening(theirs) as anew,
        listening(theirs, after=first) as resumed,
        listening(relay.api, after=first) as of_operator,
        listening(ours, after=first) as own,
    ):
        [second] = await publish(ours, 2)
        await until(lambda: second in own.ids)
        [mine] = await publish(theirs, 3)
        await until(lambda: anew.ids == resumed.ids == [mine])
    assert of_operator.ids == []


async def test_who_comes_back_is_told_of_older_events_that_were_committed_meanwhile(
    fleet: Fleet, world: World
) -> None:
    one, other = await fleet.joined(2)
    store = store_on(fleet.database, KEYRING)
    async with listening(one.api) as listener:
        [told] = await publish(one.api, 1)
        await listener.got(1)
    late = [made(world.clock() - ago, ago) for ago in (10, 2_000, live.LATE - 5_000)]
    for event in late:
        await store.events.announce([event], Handoff("nobody", 0, lambda *_: False), now=world.clock())
    # The first one has seen them by now, and the other one has not looked yet.
    async with listening(one.api, after=told) as here, listening(other.api, after=told) as there:
        await until(lambda: all({one.id for one in late} <= {*seen.ids} for seen in (here, there)))


@asynccontextmanager
async def streams(folder: Path, now: Callable[[], int]) -> AsyncIterator[tuple[Store, live.Live]]:
    """A store of one relay alone, and its streams."""
    database = await open_database(f"sqlite:///{folder}/relay.db")
    await migrate(database, now=0)
    store = store_on(database, KEYRING)
    streams = live.Live(store, ring=lambda *_: None, now=now)
    try:
        yield store, streams
    finally:
        await streams.close()
        await database.close()


async def put(store: Store, *events: Event) -> None:
    await store.events.announce(events, Handoff("nobody", 0, lambda *_: False), now=0)


async def told(reader: live.Reader, count: int) -> list[str]:
    ids = list[str]()
    async with asyncio.timeout(20):
        async for event in reader:
            ids.append(event.id)
            if len(ids) == count:
                break
    return ids


async def test_what_was_told_before_a_restart_is_not_taken_for_all_that_was_made_before(
    tmp_path: Path, world: World
) -> None:
    late, young = made(world.clock() - 5_000, 1), made(world.clock(), 2)
    async with streams(tmp_path, world.clock) as (store, before):
        reader = await before.open("default", live.Wish())
        for event in (young, late):
            await put(store, event)
            before.stored(["default"])
            assert await told(reader, 1) == [event.id]
    async with streams(tmp_path, world.clock) as (_, after):
        # It was gone before the late one.
        assert await told(await after.open("default", live.Wish(), after=young.id), 1) == [late.id]


async def test_who_was_told_in_the_order_of_ids_misses_nothing_that_came_to_light_before(
    tmp_path: Path, world: World
) -> None:
    early, late, young = [made(world.clock() + at, at) for at in (0, 1_000, 2_000)]
    async with streams(tmp_path, world.clock) as (store, one):
        reader = await one.open("default", live.Wish())
        for event in (early, young, late):
            await put(store, event)
            one.stored(["default"])
            assert await told(reader, 1) == [event.id]
        world.clock.forward(seconds=live.LATE / 1000 + 10)
        back = await one.open("default", live.Wish(), after=early.id)
        assert await told(back, 1) == [late.id]
        again = await one.open("default", live.Wish(), after=late.id)
        assert await told(again, 1) == [young.id]


async def test_who_catches_up_at_its_own_pace_is_not_dropped_for_what_comes_meanwhile(
    tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "MOST_EVENTS", 60)
    monkeypatch.setattr(live, "_PORTION", 1_000)
    first, *old = [made(world.clock() - 300 + number, number) for number in range(301)]
    async with streams(tmp_path, world.clock) as (store, one):
        await put(store, first, *old)
        slow = aiter(await one.open("default", live.Wish(), after=first.id))
        quick = await one.open("default", live.Wish())
        seen = [(await anext(slow)).id]
        stored = [event.id for event in old]
        async with asyncio.timeout(30):
            for turn in range(3):
                news = [made(world.clock() + 1 + turn, number) for number in range(50)]
                await put(store, *news)
                one.stored(["default"])
                assert sorted(await told(quick, 50)) == sorted(event.id for event in news)
                stored += [event.id for event in news]
            while len(seen) < len(stored):
                seen.append((await anext(slow)).id)
    assert sorted(seen) == sorted(stored)


def test_who_catches_up_holds_a_portion_of_the_bodies_at_once() -> None:
    sizes = {"a": live._PORTION, "b": 1, "c": live._PORTION - 1, "d": 1, "e": 2 * live._PORTION}
    assert list(portions(list(sizes), sizes, live._PORTION)) == [["a"], ["b", "c"], ["d"], ["e"]]


async def test_streams_of_endpoints_may_join_while_news_are_looked_at(
    tmp_path: Path, world: World, caplog: pytest.LogCaptureFixture
) -> None:
    async with streams(tmp_path, world.clock) as (store, one):
        ids = ["ep_1", "ep_2"]
        for id_ in ids:
            endpoint = Endpoint(id_, "default", "https://a.example/", [], 0, 0, event_types=["order.shipped"])
            await store.endpoints.create(endpoint, None)
        reader = await one.open("default", live.Wish(endpoint_id=ids[0]))

        async def come_and_go() -> None:
            while True:
                await asyncio.sleep(0)
                (await one.open("default", live.Wish(endpoint_id=ids[1]))).close()
                other = await one.open("default", live.Wish(endpoint_id=ids[1]))
                await asyncio.sleep(0.001)
                other.close()

        others = asyncio.create_task(come_and_go())
        for number in range(30):
            event = made(world.clock(), number)
            await put(store, event)
            one.stored(["default"])
            assert await told(reader, 1) == [event.id]
        others.cancel()
    assert not [record for record in caplog.records if record.message.startswith("stream.not_read")]
