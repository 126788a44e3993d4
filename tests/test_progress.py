"""What is told of a generation while it runs: only to those who ask, only the latest, never after the end."""

import asyncio
import json
import logging
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay import event
from relay.delivery import Claimed
from relay.generation import ENDINGS, Generation, LearnedBy, Output, Status, Update
from relay.ingest import Ingest
from relay.metrics import Metrics
from relay.schedule import Report
from relay.store import Store
from relay.store.events import Change
from tests.conftest import RunningRelay, World
from tests.serving import Received, until
from tests.test_polling import only, provider_answering
from tests.test_store import (
    NOTHING_HANDED_OVER,
    asked,
    claimed_deliveries,
    listed,
    prepared,
    registered,
    taking,
)
from tests.test_store import watched as stored_generation

NOW, SECOND, INTERVAL = 1_800_000_000_000, 1_000, 10_000
TENANT = "default"
PROCESSING, PROGRESS, UNKNOWN = (
    "generation.processing",
    "generation.progress",
    "generation.unknown_status",
)
COMPLETED = "generation.completed"
ALL = [PROCESSING, PROGRESS, UNKNOWN, *(f"generation.{status}" for status in sorted(ENDINGS))]


@dataclass
class Job:
    """A job at a provider that says what it is told to say, and the generation that watches it."""

    relay: RunningRelay
    answer: dict[str, Any] = field(default_factory=dict)
    id: str = ""

    async def says(self, status: str, progress: int | None = None) -> dict[str, Any]:
        """The provider's answer from now on, and the generation once Relay has heard it."""
        self.answer |= {"status": status, "progress": progress, "imageUrl": "https://cdn.test/1.png"}
        answer = await self.relay.api.post(f"/v1/generations/{self.id}/refresh")
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    async def stored(self) -> list[dict[str, Any]]:
        """Its events, oldest first."""
        page = await self.relay.api.get("/v1/events", params={"generation_id": self.id, "limit": 100})
        return sorted(page.json()["data"], key=lambda one: (one["created_at"], one["id"]))


@pytest.fixture
async def job(world: World) -> AsyncIterator[Job]:
    """Watched, and asked about only when a test wants it; progress is told every ten minutes at most."""
    said: dict[str, Any] = {"status": "queued", "progress": 0}
    async with provider_answering(lambda request: said) as origin:
        pace = {"poll_interval": "100h", "timeout": "1000h", "requests_per_minute": 100_000}
        relay = await world.relay(
            accounts=only("pixellabs", world, base_url=origin, **pace),
            delivery={"timeout": "2s", "progress_interval": "10m"},
        )
        body = {
            "account": "pixellabs",
            "job_id": "1",
            "callback_url": f"{world.subscriber.origin}/callback",
            "metadata": {"order": 42},
        }
        made = await relay.api.post("/v1/generations", json=body)
        assert made.status_code == 201, made.text
        yield Job(relay, said, made.json()["id"])


def types(received: Sequence[Received]) -> list[str]:
    return [json.loads(one.body)["type"] for one in received]


def told(received: Sequence[Received]) -> list[float]:
    """The progress that was told by events of progress."""
    events = [json.loads(one.body) for one in received]
    return [one["data"]["progress"] for one in events if one["type"] == PROGRESS]


async def all_delivered(relay: RunningRelay) -> list[dict[str, Any]]:
    """Every delivery, once none is open."""

    def done(page: Any) -> bool:
        return all(one["status"] not in ("pending", "sending") for one in page["data"])

    return list((await relay.eventually("/v1/deliveries?limit=100", done))["data"])


async def to(relay: RunningRelay, endpoint: dict[str, Any], **statuses: str) -> list[dict[str, Any]]:
    """The deliveries to an endpoint, oldest first, once those of each type have the status."""
    path = f"/v1/deliveries?limit=100&endpoint_id={endpoint['id']}"

    def as_wished(page: Any) -> bool:
        found = {one["event_type"].removeprefix("generation."): one["status"] for one in page["data"]}
        return found == statuses

    return list((await relay.eventually(path, as_wished))["data"][::-1])


# Who is told.


async def test_only_those_who_ask_are_told_before_the_end(world: World, job: Job):
    await world.endpoint(job.relay, "/asking", event_types=[PROCESSING, PROGRESS, COMPLETED])
    for path in ("/silent", "/also-silent"):
        await world.endpoint(job.relay, path)
    await job.says("queued", 0)
    shown = await job.says("processing", 10)
    received = await world.subscriber.got(2, path="/asking")
    await job.says("completed", 100)
    await world.subscriber.got(3, path="/asking")
    await all_delivered(job.relay)
    assert Counter(types(received)) == {PROCESSING: 1, PROGRESS: 1}
    assert types(await world.subscriber.got(3, path="/asking"))[2:] == [COMPLETED]
    for path in ("/silent", "/also-silent", "/callback"):
        assert types(await world.subscriber.got(1, path=path)) == [COMPLETED], path
    for one in received:
        data = json.loads(one.body)["data"]
        assert data == {name: shown[name] for name in data}, "as the generation was shown then"
        assert (data["id"], data["status"], data["progress"]) == (job.id, "processing", 0.1)
        assert (data["completed_at"], data["outputs"], data["metadata"]) == (None, [], {"order": 42})


async def test_what_nobody_asks_for_is_not_stored(world: World, job: Job):
    await world.endpoint(job.relay, "/endings")
    await world.endpoint(job.relay, "/elsewhere", event_types=[PROCESSING, PROGRESS], accounts=["luma"])
    disabled = await world.endpoint(job.relay, "/disabled", event_types=[PROCESSING, PROGRESS])
    await job.relay.api.post(f"/v1/endpoints/{disabled['id']}/disable")
    await job.says("processing", 10)
    assert await job.stored() == []
    # What is asked for later is told from then on.
    await world.endpoint(job.relay, "/asking", event_types=[PROCESSING, PROGRESS])
    assert (await job.says("processing", 10))["progress"] == 0.1
    assert await job.stored() == [], "and only what is new"
    await job.says("processing", 20)
    assert [(one["type"], one["data"]["progress"]) for one in await job.stored()] == [(PROGRESS, 0.2)]
    await job.says("completed", 100)
    await world.subscriber.got(1, path="/callback")
    assert [one["type"] for one in await job.stored()] == [PROGRESS, COMPLETED]


# How often.


async def test_processing_is_told_once(world: World, job: Job):
    await world.endpoint(job.relay, event_types=[PROCESSING, COMPLETED])
    for status in ("queued", "processing", "queued", "hibernating", "processing", "completed"):
        await job.says(status)
    await world.subscriber.got(2, path="/")
    await all_delivered(job.relay)
    assert types(await world.subscriber.got(2, path="/")) == [PROCESSING, COMPLETED]


async def test_progress_is_told_once_in_an_interval_and_then_the_latest(world: World, job: Job):
    await world.endpoint(job.relay, event_types=[PROGRESS])
    for progress in (0, 10, 20, 30):
        await job.says("processing", progress)
    world.clock.forward(seconds=9 * 60)
    await job.says("processing", 40)
    assert told(await world.subscriber.got(1, path="/")) == [0.1]
    world.clock.forward(seconds=61)
    await job.says("processing", 40)  # no news of the provider's, but of Relay's
    assert told(await world.subscriber.got(2, path="/")) == [0.1, 0.4]
    world.clock.forward(seconds=601)
    await job.says("processing", 40)
    await job.says("processing", 50)
    assert told(await world.subscriber.got(3, path="/")) == [0.1, 0.4, 0.5]
    assert [one["data"]["progress"] for one in await job.stored()] == [0.1, 0.4, 0.5]


# Never after the end.


async def test_what_an_endpoint_refused_is_not_sent_again_after_the_end(world: World, job: Job):
    endpoint = await world.endpoint(job.relay, "/failing", event_types=[PROCESSING, PROGRESS, COMPLETED])
    world.subscriber.answer(500, 500, 204, path="/failing")
    await job.says("processing", 10)
    await to(job.relay, endpoint, processing="failed", progress="failed")
    await job.says("completed", 100)
    found = await to(job.relay, endpoint, processing="failed", progress="failed", completed="delivered")
    assert [one["attempt_count"] for one in found] == [1, 1, 1]
    assert [one["next_attempt_at"] for one in found] == [None] * 3
    assert types(await world.subscriber.got(3, path="/failing"))[2:] == [COMPLETED]


async def test_what_is_still_pending_is_canceled_by_the_next_one_and_by_the_end(world: World, job: Job):
    endpoint = await world.endpoint(job.relay, "/slow", event_types=[PROCESSING, PROGRESS, COMPLETED])
    # Its answer pauses the whole endpoint.
    world.subscriber.answer(503, 204, path="/slow", headers={"retry-after": "7200"})
    await job.says("processing", 0)
    await to(job.relay, endpoint, processing="failed")
    await job.says("processing", 10)
    [_, first] = await to(job.relay, endpoint, processing="failed", progress="pending")
    world.clock.forward(seconds=601)
    await job.says("processing", 20)
    found = (await job.relay.api.get(f"/v1/deliveries?endpoint_id={endpoint['id']}")).json()["data"]
    assert [one["status"] for one in found] == ["pending", "canceled", "failed"]
    assert found[1]["id"] == first["id"]
    assert found[1]["next_attempt_at"] is None
    await job.says("completed", 100)
    found = (await job.relay.api.get(f"/v1/deliveries?endpoint_id={endpoint['id']}")).json()["data"]
    assert [one["status"] for one in found] == ["pending", "canceled", "canceled", "failed"]
    world.clock.forward(seconds=7201)
    assert types(await world.subscriber.got(2, path="/slow")) == [PROCESSING, COMPLETED]
    found = await all_delivered(job.relay)
    assert Counter(one["status"] for one in found) == {"delivered": 2, "canceled": 2, "failed": 1}
    assert len(await world.subscriber.got(2, path="/slow")) == 2


# Unknown statuses.


async def test_an_unknown_status_is_told_once_and_the_generation_still_ends(
    world: World, job: Job, caplog: pytest.LogCaptureFixture
):
    endpoint = await world.endpoint(job.relay, event_types=[UNKNOWN, COMPLETED])
    with caplog.at_level(logging.WARNING, logger="relay"):
        for status in ("hibernating", "hibernating", "dreaming", "processing", "hibernating"):
            shown = await job.says(status)
    assert (shown["status"], shown["provider_status"]) == ("processing", "hibernating")
    warnings = [one for one in caplog.records if one.getMessage() == UNKNOWN]
    assert [vars(one)["provider_status"] for one in warnings] == ["hibernating"]
    await job.says("completed")
    first, _ = received = await world.subscriber.got(2, path="/")
    assert types(received) == [UNKNOWN, COMPLETED]
    data = json.loads(first.body)["data"]
    assert (data["id"], data["status"], data["provider_status"]) == (job.id, "queued", "hibernating")
    await to(job.relay, endpoint, unknown_status="delivered", completed="delivered")
    assert [one["type"] for one in await job.stored()] == [UNKNOWN, COMPLETED]
    assert types(await world.subscriber.got(1, path="/callback")) == [COMPLETED]


async def test_an_unknown_status_can_be_read_about_though_nobody_is_told(world: World, job: Job):
    await job.says("hibernating")
    assert [one["type"] for one in await job.stored()] == [UNKNOWN]
    assert (await job.relay.api.get("/v1/deliveries")).json()["data"] == []


async def test_an_unknown_status_is_told_again_and_again_until_it_is_heard(world: World, job: Job):
    await world.endpoint(job.relay, event_types=[UNKNOWN])
    world.subscriber.answer(500, 204)
    await job.says("hibernating")
    await job.relay.eventually(
        "/v1/deliveries", lambda page: [one["status"] for one in page["data"]] == ["pending"]
    )
    world.clock.forward(seconds=6.1)
    assert types(await world.subscriber.got(2, path="/")) == [UNKNOWN, UNKNOWN]


# The store.


@pytest.fixture
async def store(database_url: str) -> AsyncIterator[Store]:
    async with prepared(database_url) as store:
        yield store


@dataclass
class Time:
    """The time of the tests that have no relay."""

    now: int = NOW

    def __call__(self) -> int:
        return self.now


def ingest_of(store: Store, now: Time, accepted: list[Claimed] | None = None, *, room: int = 0) -> Ingest:
    taken: list[Claimed] = [] if accepted is None else accepted
    return Ingest(
        store,
        handoff=lambda: taking(room, now=now()),
        accept=lambda claimed, handoff: taken.extend(claimed),
        stored=lambda tenants: None,
        progress_interval=INTERVAL,
        metrics=Metrics(),
        tracing=None,
        now=now,
    )


def report(generation: Generation, update: Update) -> Report:
    return Report(generation.id, LearnedBy.POLL, update, asked=asked)


def running(progress: float | None = None, word: str = "processing") -> Update:
    return Update(Status.PROCESSING, word, progress=progress)


DONE = Update(Status.COMPLETED, "completed", outputs=(Output("https://a.test/1.png"),))


async def by_type(store: Store, generation: Generation) -> dict[str, event.Event]:
    return {one.type: one for one in await listed(store.events, {"generation_id": generation.id})}


async def status_of(store: Store, one: Claimed) -> str:
    found = await store.deliveries.get(TENANT, one.id)
    assert found is not None
    return found.status.value


@pytest.mark.parametrize("crashed", [True, False])
async def test_what_was_in_memory_at_the_end_and_is_given_back_is_not_sent_after_it(
    store: Store, crashed: bool
):
    await registered(store, event_types=ALL)
    now, taken = Time(), list[Claimed]()
    generation = await stored_generation(store)
    ingest = ingest_of(store, now, taken, room=9)
    await ingest.record(report(generation, running(0.1)))
    fleeting = list(taken)
    assert sorted(one.event_type for one in fleeting) == [PROCESSING, PROGRESS]
    assert {await status_of(store, one) for one in fleeting} == {"sending"}
    now.now += SECOND
    await ingest_of(store, now).record(report(generation, DONE))
    if crashed:
        now.now += 60 * SECOND
    else:
        await store.deliveries.release(fleeting, now=now())
    claimed = await claimed_deliveries(store, now=now())
    assert [one.event_type for one in claimed] == [COMPLETED]
    assert {await status_of(store, one) for one in fleeting} == {"canceled"}
    # Whoever wants one all the same gets it.
    await store.deliveries.replay(TENANT, fleeting[0].id, now=now())
    [again] = await claimed_deliveries(store, now=now(), lease="another")
    assert again.id == fleeting[0].id


async def test_what_was_given_back_is_still_sent_while_it_is_the_latest(store: Store):
    await registered(store, event_types=ALL)
    now, taken = Time(), list[Claimed]()
    generation = await stored_generation(store)
    ingest = ingest_of(store, now, taken, room=9)
    await ingest.record(report(generation, running(0.1)))
    await store.deliveries.release(taken, now=now())
    claimed = await claimed_deliveries(store, now=now())
    assert sorted(one.event_type for one in claimed) == [PROCESSING, PROGRESS]
    now.now += INTERVAL
    await ingest_of(store, now).record(report(generation, running(0.2)))
    await store.deliveries.release(claimed, now=now())
    [latest] = await claimed_deliveries(store, now=now(), lease="another")
    assert json.loads(latest.body)["data"]["progress"] == 0.2


async def test_news_of_what_has_moved_meanwhile_are_not_stored(store: Store):
    await registered(store, event_types=ALL)
    read = await stored_generation(store)
    unknown = read.after(Update(None, "hibernating", progress=0.5), now=NOW, learned_by=LearnedBy.POLL)
    begun = read.after(running(0.1), now=NOW, learned_by=LearnedBy.POLL)
    assert unknown is not None
    assert begun is not None
    changes = [
        Change(after, event.news(read, after, now=NOW, progress_interval=INTERVAL))
        for after in (begun, unknown, begun)
    ]
    assert [len(one.events) for one in changes] == [2, 2, 2]
    for change in changes:
        await store.events.record([change], [], NOTHING_HANDED_OVER, now=NOW)
    stored = await by_type(store, read)
    assert {one.id for one in stored.values()} == {one.id for one in changes[0].events}
    assert (stored[PROCESSING].announces, stored[PROGRESS].announces) == ("processing", None)
    [row] = await store.generations.get_many([read.id])
    assert (row.version, row.progress_told, row.progress_at) == (1, 0.1, NOW)


async def test_what_another_tenant_asks_for_is_not_stored(store: Store):
    await registered(store, event_types=ALL, tenant="another")
    ours = await stored_generation(store)
    theirs = await stored_generation(store, "job-2", tenant="another")
    ingest = ingest_of(store, Time())
    await asyncio.gather(*(ingest.record(report(one, running(0.1))) for one in (ours, theirs)))  # one write
    page = await listed(store.events, tenant="another")
    assert {(one.type, one.generation_id) for one in page} == {(PROCESSING, theirs.id), (PROGRESS, theirs.id)}
    assert await by_type(store, ours) == {}


async def test_filters_are_asked_about_what_is_told_before_anybody_waits_for_the_database(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    async with prepared(f"sqlite:///{tmp_path}/relay.db") as store:
        for type_ in (PROGRESS, COMPLETED, event.FAILING):
            # It says in the log when it is asked.
            await registered(store, event_types=[type_], filter=f"length(data.progress) == '{type_}'")
        first, second = await stored_generation(store), await stored_generation(store, "job-2")
        ingest = ingest_of(store, Time())
        with caplog.at_level(logging.WARNING, "relay.filter"):
            async with asyncio.timeout(15), asyncio.TaskGroup() as group, store.database.write():
                reports = (report(first, running(0.1)), report(second, DONE))
                told = [group.create_task(ingest.record(one)) for one in reports]
                failing = event.account_failing(TENANT, "luma", "luma", "why", now=NOW)
                told.append(group.create_task(ingest.announce([failing])))
                await until(lambda: len(caplog.records) == 3)
                assert not any(one.done() for one in told)
    assert {one.message for one in caplog.records} == {"filter.failed"}


async def test_who_waits_for_the_end_is_not_answered_before(store: Store):
    await registered(store, event_types=ALL)
    ingest, generation = ingest_of(store, Time()), await stored_generation(store)
    waiting = asyncio.create_task(ingest.ended(TENANT, generation.id, timeout=30))
    await asyncio.sleep(0)  # it has begun to wait
    await ingest.record(report(generation, running(0.1)))
    await ingest.record(report(generation, Update(None, "hibernating")))
    await ingest.record(report(generation, DONE))
    ended = await waiting
    assert ended is not None
    assert ended.status is Status.COMPLETED


# Random histories.

UPDATES = st.builds(
    lambda status, word, progress: Update(
        status,
        status.value if status is not None else word,
        progress=progress,
        outputs=DONE.outputs if status is Status.COMPLETED else (),
    ),
    st.sampled_from([Status.QUEUED, *[Status.PROCESSING] * 4, None, *sorted(ENDINGS)]),
    st.sampled_from(["hibernating", "dreaming"]),
    st.none() | st.sampled_from([0.0, 0.1, 0.2, 0.5, 1.0]),
)
# Milliseconds, and what two relays are told then, at once.
HISTORIES = st.lists(st.tuples(st.integers(1, 2 * INTERVAL), st.lists(UPDATES, min_size=1, max_size=3)))


async def history(store: Store, steps: Sequence[tuple[int, Sequence[Update]]]) -> Generation:
    """A new generation after all of it."""
    made = await stored_generation(store, None)
    now = Time()
    relays = [ingest_of(store, now), ingest_of(store, now)]
    for pause, updates in steps:
        now.now += pause
        await asyncio.gather(
            *(relays[n % 2].record(report(made, update)) for n, update in enumerate(updates))
        )
    [after] = await store.generations.get_many([made.id])
    return after


async def check(store: Store, after: Generation) -> None:
    # By transaction and statement, where a row has no number.
    as_written = "rowid" if store.database.alone else "xmin::text::bigint, cmin::text::bigint"
    async with store.database.read() as tx:
        events = [
            event.Event(**dict(row))
            for row in await tx.fetch(
                f"SELECT * FROM events WHERE generation_id = :id ORDER BY {as_written}",  # noqa: S608
                id=after.id,
            )
        ]
        pending = await tx.fetch(
            """
            SELECT e.type, e.created_at FROM deliveries d JOIN events e ON e.id = d.event_id
            WHERE e.generation_id = :id AND d.status = 'pending'
            """,
            id=after.id,
        )
    counted = Counter(one.type for one in events)
    assert max((n for type_, n in counted.items() if type_ != PROGRESS), default=0) <= 1, "each once"
    endings = [n for n, one in enumerate(events) if one.type in event.ENDINGS.values()]
    # A time-out and a late ending that come in one write are one.
    assert after.ended <= len(endings) <= after.ended + after.late
    if endings:
        assert f"generation.{after.status}" in counted
        assert {one.type for one in events[endings[0] :]} <= set(event.ENDINGS.values()), "nothing later"
    progress = [one for one in events if one.type == PROGRESS]
    assert all(later.created_at - one.created_at >= INTERVAL for one, later in pairwise(progress))
    fleeting = {row["created_at"] for row in pending if row["type"] in event.FLEETING}
    told = {one.created_at for one in events if one.type in event.FLEETING}
    assert fleeting == (set() if endings or not told else {max(told)}), "only the latest waits to be sent"


@pytest.mark.timeout(600)  # thousands of histories, when all are asked for
def test_whatever_is_reported_each_thing_is_told_once_in_its_time_and_nothing_after_the_end(
    database_url: str,
):
    async def begin() -> Store:
        store = await stack.enter_async_context(prepared(database_url))
        await registered(store, event_types=ALL)
        return store

    with asyncio.Runner() as runner:
        stack = AsyncExitStack()
        store = runner.run(begin())

        @given(HISTORIES)
        def holds(steps: Sequence[tuple[int, Sequence[Update]]]) -> None:
            runner.run(check(store, runner.run(history(store, steps))))

        try:
            holds()
        finally:
            runner.run(stack.aclose())


# Accounts.


async def test_what_happens_to_an_account_is_told_to_those_who_want_it_of_this_account(store: Store):
    both = ["account.failing", "account.recovered"]
    here = await registered(store, event_types=both, accounts=["luma"])
    everywhere = await registered(store, event_types=both[:1])
    await registered(store, event_types=both, accounts=["vivix"])
    await registered(store)
    await registered(store, event_types=both, tenant="another")
    await registered(store, event_types=ALL)
    now, taken = Time(), list[Claimed]()
    failing = event.account_failing(TENANT, "luma", "luma", "unauthorized: no such key", now=NOW)
    recovered = event.account_recovered(TENANT, "luma", "luma", now=NOW)
    await ingest_of(store, now, taken, room=2).announce([failing, recovered])
    rest = await claimed_deliveries(store)
    assert len(taken) == 2, "what is handed over, the others are pending"
    assert Counter((one.event_id, one.endpoint_id) for one in [*taken, *rest]) == {
        (failing.id, here.id): 1,
        (failing.id, everywhere.id): 1,
        (recovered.id, here.id): 1,
    }
    assert await store.events.get(TENANT, failing.id) == failing
    at = "2027-01-15T08:00:00.000Z"
    assert [json.loads(one.body) for one in (failing, recovered)] == [
        {
            "type": "account.failing",
            "timestamp": at,
            "data": {
                "account": "luma",
                "provider": "luma",
                "reason": "unauthorized: no such key",
                "since": at,
            },
        },
        {
            "type": "account.recovered",
            "timestamp": at,
            "data": {"account": "luma", "provider": "luma", "status": "ok", "since": at},
        },
    ]


async def test_nothing_is_announced_when_there_is_nothing(store: Store):
    taken: list[Claimed] = []
    await ingest_of(store, Time(), taken, room=9).announce([])
    assert taken == []
    assert await listed(store.events) == []
