"""Three real programs over one PostgreSQL, under load, while one of them or the database is killed, stopped
or hung: what was acknowledged is announced once and delivered, and the limits hold for all of them together.

`RELAY_THOROUGH=1` does it all more often.
"""

import asyncio
import random
import signal
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Collection, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from itertools import count, pairwise
from pathlib import Path
from statistics import quantiles
from typing import Any

import asyncpg
import httpx
import pytest

from relay.event import ENDINGS
from relay.shard import SHARDS
from relay.simulator import Simulator
from tests.conftest import need
from tests.postgres import WHY_MISSING, Cluster, binaries, running_cluster
from tests.program import THOROUGH, Program, Receiver, drained, everything, seeded, was_in_flight
from tests.serving import serving

pytestmark = [
    # One fleet at a time: it is as large as what runs the tests.
    pytest.mark.xdist_group("fleet"),
    pytest.mark.timeout(900 if THOROUGH else 240),
]

RELAYS = 3
# How many requests an account may make, in the whole fleet.
PER_MINUTE, PER_DAY = 240, 60
# What an endpoint takes, from the whole fleet: requests at once, requests a second.
AT_ONCE, RATE = 3, 10
TIMEOUT = 2
# A shard is its holder's for so many seconds from its last beat: the longest attempt, and some patience.
SHARD_LEASE, BEAT = TIMEOUT + 5 + 10, 2
# What a relay was asking about or delivering comes due again after so many seconds at the latest.
LEASE = 60
TYPES = 8
PLAIN = 24
ACCOUNTS = {
    "limited": ("pixellabs", {"requests_per_minute": PER_MINUTE, "requests_per_day": 1_000_000}),
    "vivix": ("vivix", {}),
    # Callbacks share half of an account's requests, and of 60 a minute where it has no limit.
    "pictory": ("pictory", {"requests_per_minute": 6_000}),
    "luma": ("luma", {}),
    "scarce": ("luma", {"requests_per_day": PER_DAY}),
}


def wishes() -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The endpoints: where, and what they ask for."""
    for number in range(PLAIN):
        yield f"/plain/{number}", {"event_types": [f"load.{number % TYPES}"]}
    for number in range(3):
        yield f"/endings/{number}", {}
    yield "/capped", {"event_types": ["load.0", "load.1"]}
    yield "/rated", {"event_types": ["load.2"], "rate_limit": RATE}
    yield "/moody", {"event_types": ["load.3"]}


@dataclass
class Fleet:
    """Relays on one database, the providers that they ask and the endpoints that they tell."""

    programs: Sequence[Program]
    database: str
    simulator: Simulator
    receiver: Receiver
    subscriber: str
    endpoints: dict[str, dict[str, Any]] = field(default_factory=dict)

    async def start(self) -> None:
        await asyncio.gather(*(program.start() for program in self.programs))

    async def rows(self, sql: str) -> Sequence[Any]:
        connection = await asyncpg.connect(self.database)
        try:
            return list(await connection.fetch(sql))
        finally:
            await connection.close()


@asynccontextmanager
async def fleet_on(database: str, directory: Path) -> AsyncIterator[Fleet]:
    """A fleet that runs, and has its endpoints."""
    simulator = Simulator(seed=7, rate_limit=1_000_000)
    receiver = Receiver(seeded(7), pauses={"/capped": 0.3}, moody={"/moody": 0.1})
    async with serving(simulator.app) as providers, serving(receiver.app) as subscriber:
        bases = Simulator.base_urls(providers)
        accounts = {
            name: {
                "provider": provider, "api_key": simulator.keys[provider], "base_url": bases[provider],
                "poll_interval": "100ms", **limits,
            }
            for name, (provider, limits) in ACCOUNTS.items()
        }  # fmt: skip
        delivery = {
            "timeout": f"{TIMEOUT}s", "schedule": ["200ms"] * 20, "endpoint_concurrency": AT_ONCE,
        }  # fmt: skip
        programs = [
            # The database knows each by its number.
            Program.placed(
                directory / str(number),
                f"{database}{'&' if '?' in database else '?'}application_name={number}",
                accounts=accounts,
                delivery=delivery,
            )
            for number in range(RELAYS)
        ]
        fleet = Fleet(programs, database, simulator, receiver, subscriber)
        try:
            await fleet.start()
            async with programs[0].api() as api:
                for path, wish in wishes():
                    answer = await api.post("/v1/endpoints", json={"url": subscriber + path, **wish})
                    fleet.endpoints[path] = answer.json()
                answer = await api.get("/v1/signing-secret")
                fleet.endpoints["/called"] = {"secret": answer.json()["secret"], "event_types": None}
            receiver.secrets |= {path: one["secret"] for path, one in fleet.endpoints.items()}
            yield fleet
        finally:
            for program in programs:
                if program.process is not None:
                    await program.end(signal.SIGKILL)


@dataclass
class Load:
    """Asks the relays, any of them, through every outage; what needs an answer is asked again of another."""

    fleet: Fleet
    dice: random.Random = field(default_factory=lambda: seeded(1))
    watched: dict[str, str] = field(default_factory=dict)  # generation id → outcome, of what was acknowledged
    limited: list[str] = field(default_factory=list)  # generation ids, of the accounts with limits
    called: dict[str, str] = field(
        default_factory=dict
    )  # generation id → job id, where only a callback names it
    published: dict[int, str] = field(default_factory=dict)  # number → event id, of what was acknowledged
    answered: dict[str, float] = field(default_factory=dict)  # event id → when it was acknowledged
    refusals: list[tuple[float, httpx.Response]] = field(default_factory=list)  # 503, and when
    scarce: set[str] = field(default_factory=set)  # jobs of the account that may ask least
    _clients: Sequence[httpx.AsyncClient] = ()
    _numbers: Iterator[int] = field(default_factory=count)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        work = (self._watch, self._watch, self._call_back, self._publish, self._publish, self._refresh)
        async with AsyncExitStack() as stack:
            self._clients = [
                await stack.enter_async_context(program.api(timeout=2)) for program in self.fleet.programs
            ]
            tasks = [asyncio.create_task(one()) for one in work]
            try:
                await self._use_up()
                yield
            finally:
                for task in tasks:
                    task.cancel()
                results = await asyncio.gather(*tasks, return_exceptions=True)
            assert {type(one) for one in results} == {asyncio.CancelledError}, results
            await self._finish()

    async def _use_up(self) -> None:
        """Returns when the account that may ask least has asked for what it may at once. What takes least at
        once is sent more than that."""
        await self._publish_at_once(["load.0"] * 4 * AT_ONCE, "keyed")
        for _ in range(20):
            await self._watch_one("scarce", duration=600)
        async with asyncio.timeout(30):
            while True:
                if self.asked_scarcely() > PER_DAY * 0.4:
                    return
                await asyncio.sleep(0.1)

    def asked_scarcely(self) -> int:
        """How many requests the account that may ask least has made."""
        return sum(one.job_id in self.scarce for one in self.fleet.simulator.requests)

    async def _ask(self, method: str, path: str, **request: Any) -> httpx.Response | None:
        """The answer of some relay, if it gives any but that the database is away."""
        try:
            answer = await self.dice.choice(self._clients).request(method, path, **request)
        except httpx.HTTPError:
            return None
        if answer.status_code == 503:
            self.refusals.append((time.monotonic(), answer))
            return None
        assert answer.status_code < 500, answer.text
        return answer

    async def _watch(self) -> None:
        while True:
            await self._watch_one(self.dice.choice(list(ACCOUNTS)), duration=self.dice.uniform(0, 1.5))
            await asyncio.sleep(0.25)

    async def _watch_one(self, account: str, *, duration: float) -> None:
        outcome = self.dice.choice(("completed", "completed", "failed"))
        job_id = self.fleet.simulator.submit(ACCOUNTS[account][0], duration=duration, outcome=outcome)
        wish = {"account": account, "job_id": job_id}
        if account == "scarce":
            self.scarce.add(job_id)
        elif self.dice.random() < 0.3:
            wish["callback_url"] = self.fleet.subscriber + "/called"
        answer = await self._ask("POST", "/v1/generations", json=wish)
        if answer is not None:
            self._note(answer.json(), account, outcome)

    async def _call_back(self) -> None:
        while True:
            answer = await self._ask("POST", "/v1/generations", json={"account": "pictory"})
            if answer is not None:
                made, outcome = answer.json(), self.dice.choice(("completed", "failed"))
                path = httpx.URL(made["webhook_url"]).path
                webhook = self.dice.choice(self.fleet.programs).origin + path
                self.called[made["id"]] = self.fleet.simulator.submit(
                    "pictory",
                    request={"webhook": webhook},
                    duration=self.dice.uniform(0, 1.5),
                    outcome=outcome,
                )
                self._note(made, "pictory", outcome)
            await asyncio.sleep(0.3)

    async def _publish(self) -> None:
        while True:
            types = [f"load.{self.dice.randrange(TYPES)}" for _ in range(self.dice.choice((1, 1, 1, 8)))]
            await self._publish_at_once(types, self.dice.choice(("plain", "keyed", "named")))
            await asyncio.sleep(0.3)

    async def _publish_at_once(self, types: Sequence[str], how: str) -> None:
        numbers = [next(self._numbers) for _ in types]
        events = [
            {"type": type_, "data": {"number": number}} | ({"id": f"name-{number}"} if how == "named" else {})
            for type_, number in zip(types, numbers, strict=True)
        ]
        headers = {"idempotency-key": f"key-{numbers[0]}"} if how == "keyed" else {}
        body = events if len(events) > 1 else events[0]
        while (answer := await self._ask("POST", "/v1/events", json=body, headers=headers)) is None:
            if how == "plain":
                return
            await asyncio.sleep(0.1)
        assert answer.status_code == 201, answer.text
        made = answer.json()["data"] if len(events) > 1 else [answer.json()]
        self.published |= {number: event["id"] for number, event in zip(numbers, made, strict=True)}
        self.answered |= {event["id"]: time.monotonic() for event in made}

    async def _refresh(self) -> None:
        while True:
            if self.limited:
                await self._ask("POST", f"/v1/generations/{self.dice.choice(self.limited[-20:])}/refresh")
            await asyncio.sleep(0.5)

    def _note(self, made: Mapping[str, Any], account: str, outcome: str) -> None:
        if account in ("limited", "scarce"):
            self.limited.append(made["id"])
        if account != "scarce":
            self.watched[made["id"]] = outcome

    async def _finish(self) -> None:
        """Does what users do in the end: names the jobs whose callbacks were lost, gives up what would take
        days, or what was taken without their knowing."""
        jobs = self.fleet.simulator.jobs
        for generation_id, job_id in self.called.items():
            while not (statuses := jobs["pictory", job_id].callbacks):  # noqa: ASYNC110
                await asyncio.sleep(0.1)
            if statuses != [200]:
                await self._insist("PATCH", f"/v1/generations/{generation_id}", json={"job_id": job_id})
                await self._insist("POST", f"/v1/generations/{generation_id}/refresh")
        async with self.fleet.programs[0].api() as api:
            for one in await everything(api, "/v1/generations"):
                nobody_knows = one["account"] == "pictory" and one["id"] not in self.called
                if one["account"] == "scarce" or (one["job_id"] is None and nobody_knows):
                    await self._insist("DELETE", f"/v1/generations/{one['id']}")

    async def _insist(self, method: str, path: str, **request: Any) -> None:
        async with asyncio.timeout(30):
            while await self._ask(method, path, **request) is None:
                pass


def at_most(times: Collection[float], seconds: float) -> int:
    """The most of these times that lie within so many seconds."""
    ordered, first, most = sorted(times), 0, 0
    for last, at in enumerate(ordered):
        while at - ordered[first] > seconds:
            first += 1
        most = max(most, last - first + 1)
    return most


def assert_limits_held(load: Load) -> None:
    """As those who were asked have seen it."""
    asked, receiver = load.fleet.simulator.requests, load.fleet.receiver
    limited = [one.time for one in asked if one.provider == "pixellabs"]
    assert at_most(limited, 60) <= PER_MINUTE
    # A tenth of a minute's requests at once, the others evenly.
    assert at_most(limited, 10) <= PER_MINUTE * (0.1 + 0.9 / 6) * 1.1
    # Half of a day's requests as they are wanted, the others evenly.
    assert PER_DAY * 0.4 < load.asked_scarcely() <= PER_DAY
    assert max(receiver.most.values()) == receiver.most["/capped"] == AT_ONCE
    rated = [at for times in receiver.received["/rated"].values() for at in times]
    assert at_most(rated, 10) <= 10 * RATE * 1.1


def assert_announced_once(load: Load, events: Sequence[Mapping[str, Any]]) -> None:
    endings, numbers = defaultdict(list), Counter[int]()
    for event in events:
        if event["type"] in ENDINGS.values():
            endings[event["generation_id"]].append(event["type"])
        if event["type"].startswith("load."):
            numbers[event["data"]["number"]] += 1
    assert {len(types) for types in endings.values()} == {1}
    lost = {
        one: endings[one]
        for one, outcome in load.watched.items()
        if endings[one] != [f"generation.{outcome}"]
    }
    assert not lost
    assert set(numbers.values()) == {1}
    assert load.published.keys() <= numbers.keys()
    assert set(load.published.values()) <= {event["id"] for event in events}


_TRIED = """
    SELECT d.event_id, COALESCE(p.url, d.callback_url) AS url, d.status, d.attempts, COUNT(a.id) AS logged,
        COUNT(a.id) FILTER (WHERE a.error_code IS NULL) AS accepted
    FROM deliveries d LEFT JOIN endpoints p ON p.id = d.endpoint_id
    LEFT JOIN attempts a ON a.delivery_id = d.id GROUP BY d.id, p.url
"""


async def assert_delivered(
    load: Load, events: Sequence[Mapping[str, Any]], moments: Sequence[float], *, held_for: float
) -> int:
    """Everything, to everyone who wants it; and again only what was refused, or was in flight at one of the
    moments and had nobody who might send it for `held_for` seconds. How many came again for that."""
    fleet, again = load.fleet, 0
    api = fleet.programs[0].api(timeout=30)
    async with api:
        watched = await everything(api, "/v1/generations")
    called = {one["id"] for one in watched if one["callback_url"] is not None}
    for path, endpoint in fleet.endpoints.items():
        types = endpoint["event_types"] or ENDINGS.values()
        wanted = {
            one["id"]
            for one in events
            if one["type"] in types and (path != "/called" or one["generation_id"] in called)
        }
        assert set(fleet.receiver.received[path]) == wanted, path
    for row in await fleet.rows(_TRIED):
        path = row["url"].removeprefix(fleet.subscriber)
        times, failures = fleet.receiver.received[path][row["event_id"]], row["logged"] - row["accepted"]
        told = (path, dict(row), times, moments)
        assert (row["status"], row["accepted"], row["attempts"]) == ("delivered", 1, row["logged"]), told
        unexplained = [
            (first, later)
            for first, later in pairwise(times)
            if not was_in_flight(first, later, [at for at in moments if later >= at + held_for])
        ]
        assert len(unexplained) <= failures, told
        again += max(0, len(times) - 1 - failures)
    assert not fleet.receiver.forged
    return again


async def judge(load: Load, moments: Sequence[float] = (), *, held_for: float = 0, wait: float = 30) -> int:
    """Whether everything is as it should be, within so many seconds from now; how many deliveries came twice
    because they were in flight at one of the moments."""
    begun, fleet = time.monotonic(), load.fleet
    async with fleet.programs[0].api(timeout=30) as api:
        await drained(api, timeout=wait)
        took = time.monotonic() - begun
        events = await everything(api, "/v1/events")
    assert_announced_once(load, events)
    again = await assert_delivered(load, events, moments, held_for=held_for)
    assert_limits_held(load)
    received = fleet.receiver.received
    lags = [
        min(times[id_]) - at
        for times in received.values()
        for id_, at in load.answered.items()
        if id_ in times
    ]
    hundredths = quantiles(lags, n=100)
    print(
        f"{len(load.published)} published, {len(load.watched)} watched, {len(load.refusals)} refused "
        f"with 503, {fleet.receiver.came.total()} requests received, {again} again; "
        f"delivered after {hundredths[49]:.3f} s (median), {hundredths[98]:.1f} s (99 %), {max(lags):.1f} s "
        f"(longest); all over {took:.1f} s after the load"
    )
    return again


async def whole(fleet: Fleet, relays: int = RELAYS, *, within: float) -> float:
    """After so many seconds every shard is held by one of so many relays that live."""
    begun = time.monotonic()
    async with asyncio.timeout(within):
        while True:
            now = time.time_ns() // 1_000_000
            [row] = await fleet.rows(
                f"""
                SELECT COUNT(*) AS held, COUNT(DISTINCT holder) AS holders
                FROM shards JOIN relays ON relays.id = shards.holder
                WHERE held_until > {now} AND seen_at > {now - 2 * BEAT * 1000}
                """  # noqa: S608 # a number of ours
            )
            if (row["held"], row["holders"]) == (SHARDS, relays):
                return time.monotonic() - begun
            await asyncio.sleep(0.1)


@pytest.fixture
async def fleet(cluster: Cluster, tmp_path: Path) -> AsyncIterator[Fleet]:
    url = cluster.database()
    async with fleet_on(url, tmp_path) as fleet:
        yield fleet
    cluster.drop(url)


async def test_relays_that_are_killed_lose_nothing_and_overstep_nothing(fleet: Fleet):
    load, kills, dice = Load(fleet), [], seeded(2026)
    async with load.running():
        for number in range(30 if THOROUGH else 4):
            await asyncio.sleep(dice.uniform(0.5, 4))
            program = fleet.programs[number % RELAYS]
            kills.append(time.monotonic())
            assert await program.end(signal.SIGKILL) == -signal.SIGKILL
            await program.start()
        recovered = await whole(fleet, within=SHARD_LEASE + 10)
    print(f"every shard is held again {recovered:.1f} s after the last one that was killed is back")
    await judge(load, kills, held_for=SHARD_LEASE - 4 * BEAT, wait=LEASE + 20)


async def test_relays_that_are_restarted_in_turn_lose_nothing_and_send_nothing_twice(fleet: Fleet):
    load = Load(fleet)
    async with load.running():
        for number in range(20 if THOROUGH else 3):
            program = fleet.programs[number % RELAYS]
            begun = time.monotonic()
            assert await program.end(signal.SIGTERM) == 0
            print(f"stopped in {time.monotonic() - begun:.1f} s")
            await program.start()
    assert await judge(load) == 0


async def test_a_relay_that_hangs_for_longer_than_its_leases_overwrites_nothing(fleet: Fleet):
    load, moments = Load(fleet), []
    async with load.running():
        for number, seconds in enumerate([25, 25, 25, 65] if THOROUGH else [25]):
            program = fleet.programs[number % RELAYS]
            moments.append(time.monotonic())
            program.tell(signal.SIGSTOP)
            await asyncio.sleep(seconds)
            moments.append(time.monotonic())
            program.tell(signal.SIGCONT)
            await asyncio.sleep(5)
    await judge(load, moments, wait=LEASE + 20)


async def test_a_relay_that_hangs_in_the_middle_of_a_write_keeps_nobody_from_writing(fleet: Fleet):
    load, moments = Load(fleet), []
    async with load.running():
        program = await hung_in_a_write(fleet)
        moments.append(time.monotonic())
        await whole(fleet, RELAYS - 1, within=SHARD_LEASE + 10)
        moments.append(time.monotonic())
        program.tell(signal.SIGCONT)
    await judge(load, moments, wait=LEASE + 20)


async def hung_in_a_write(fleet: Fleet) -> Program:
    """A relay that has written down how accounts stand, and hangs before it commits that."""
    connection = await asyncpg.connect(fleet.database)
    try:
        async with connection.transaction(), asyncio.timeout(15):
            await connection.execute("LOCK TABLE accounts IN SHARE MODE")
            while True:
                if waiting := await connection.fetch(_WAITING):
                    break
                await asyncio.sleep(0.01)
            program = fleet.programs[int(waiting[0]["application_name"])]
            program.tell(signal.SIGSTOP)
        return program
    finally:
        await connection.close()


_WAITING = """
    SELECT application_name FROM pg_stat_activity JOIN pg_locks USING (pid)
    WHERE relation = 'accounts'::regclass AND NOT granted
"""


async def refused(fleet: Fleet) -> None:
    """Every relay says that it takes nothing now, and when to come back."""
    async with AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(program.api(timeout=10)) for program in fleet.programs]
        event = {"type": "refused", "data": {}}
        answers = await asyncio.gather(*(api.post("/v1/events", json=event) for api in clients))
    told = [(one.status_code, int(one.headers.get("retry-after", 0)) > 0) for one in answers]
    assert told == [(503, True)] * RELAYS


async def ready(fleet: Fleet, *, within: float) -> None:
    """Returns once every relay takes writes."""

    async def one(program: Program) -> None:
        async with program.api() as api:
            while True:
                with suppress(httpx.HTTPError):
                    if (await api.get("/readyz")).status_code == 200:
                        return
                await asyncio.sleep(0.05)

    async with asyncio.timeout(within):
        await asyncio.gather(*(one(program) for program in fleet.programs))


def throughout(begin: float, end: float) -> list[float]:
    """Moments so close to each other that nothing is in flight between two of them only."""
    return [begin + number / 4 for number in range(round(4 * (end - begin)) + 1)]


async def test_a_database_that_is_killed_comes_back_to_relays_that_have_lost_nothing(tmp_path: Path):
    need(binaries(), WHY_MISSING)
    dice, moments = seeded(2026), []
    with running_cluster() as cluster:
        async with fleet_on(cluster.database(template=None), tmp_path) as fleet:
            load = Load(fleet)
            async with load.running():
                for number in range(10 if THOROUGH else 2):
                    await asyncio.sleep(dice.uniform(1, 4))
                    killed = time.monotonic()
                    await asyncio.to_thread(cluster.kill)
                    await refused(fleet)
                    asked = time.monotonic()
                    # Sometimes for longer than anything is held.
                    await asyncio.sleep(SHARD_LEASE + 5 if number == 5 else dice.uniform(0, 3))
                    await asyncio.to_thread(cluster.start)
                    started = time.monotonic()
                    await ready(fleet, within=10)
                    moments += throughout(killed, time.monotonic())
                    print(
                        f"refused within {asked - killed:.1f} s, away for {started - killed:.1f} s, "
                        f"all relays take writes {time.monotonic() - started:.1f} s later"
                    )
            assert load.refusals
            await judge(load, moments, wait=LEASE + 20)


async def test_a_standby_takes_over_with_everything_that_was_acknowledged(tmp_path: Path):
    need(binaries(), WHY_MISSING)
    dice, moments = seeded(2026), []
    with running_cluster() as primary, ExitStack() as standbys:
        standby = standbys.enter_context(primary.standby())
        name = primary.database(template=None).rsplit("/", 1)[1]
        hosts = f"127.0.0.1:{primary.port},127.0.0.1:{standby.port}"
        url = f"postgresql://relay@{hosts}/{name}?target_session_attrs=read-write"
        async with fleet_on(url, tmp_path) as fleet:
            load = Load(fleet)
            async with load.running():
                for number in range(4 if THOROUGH else 1):
                    if number:
                        # The dead one's place is taken by a standby of the one that took over.
                        place = standby.standby(port=primary.port)
                        primary, standby = standby, await asyncio.to_thread(standbys.enter_context, place)
                    await asyncio.sleep(dice.uniform(1, 4))
                    killed = time.monotonic()
                    await asyncio.to_thread(primary.kill)
                    await asyncio.to_thread(standby.promote)
                    promoted = time.monotonic()
                    await ready(fleet, within=10)
                    moments += throughout(killed, time.monotonic())
                    print(
                        f"promoted within {promoted - killed:.1f} s, "
                        f"all relays take writes {time.monotonic() - promoted:.1f} s later"
                    )
                await asyncio.sleep(2)
            await judge(load, moments, wait=LEASE + 20)
