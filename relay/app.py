"""Builds everything, starts it and stops it; the only place that constructs anything."""

import asyncio
import gc
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager

from apscheduler.schedulers.asyncio import AsyncIOScheduler
from starlette.applications import Starlette

from relay import signature
from relay.asker import Asker
from relay.batch import Batch
from relay.bell import Bell
from relay.callback import Callbacks
from relay.catalog import Catalog
from relay.config import Settings, TracingSettings, accounts, check_url
from relay.deliver import Deliverer
from relay.errors import StoreError
from relay.generation import Update
from relay.guard import Guard
from relay.hints import Turns
from relay.hold import SPARE, Holder
from relay.ids import new_id
from relay.ingest import Ingest
from relay.key import Key, Scope, hash_of, new_key
from relay.keyring import KeyRing
from relay.limit import Limit
from relay.live import Live
from relay.metrics import Metrics
from relay.poll import Poller
from relay.prune import Pruner
from relay.pulse import Pulse
from relay.redact import Redactor
from relay.renew import Renewer
from relay.replay import Counting, advance
from relay.roster import Roster
from relay.sender import Sender
from relay.server import Server, bind, origin, use_all_files
from relay.shard import Held
from relay.store import Store, open_database, store_on
from relay.store.audit import Entry
from relay.store.generations import Hint
from relay.store.migrate import migrate
from relay.store.tables import check_whole
from relay.tenant import DEFAULT
from relay.tracing import Tracing
from relay.web import inbound, ops
from relay.web.api import REPLAYS_A_SECOND, REPLAYS_AT_ONCE, TESTS_A_MINUTE
from relay.web.auth import Gate
from relay.web.context import Relay, State
from relay.web.headers import SecurityHeaders
from relay.web.operations import OPERATIONS
from relay.web.problem import HANDLERS

log = logging.getLogger(__name__)
POLL_TICK = 0.25
RETRY_TICK = 0.25
REPLAY_TICK = 0.25
BEAT = 2
PRUNE_TICK = 60
TIDY_TICK = 5
KEYS_TICK = 60
LAG_TICK = 0.5
# A tick whose store takes nothing beats slower and slower: of so many beats at least one is tried.
LONGEST_REST = 8
# A database that is not there yet is waited for; seconds.
PATIENCE = 60
# Thousands of deliveries are in hand at once and hardly any leaves a cycle behind: looking for cycles after
# every 700 new objects, as Python does, would take a quarter of the delivery path.
NEW_OBJECTS = 50_000


def wall_clock() -> int:
    """Unix milliseconds."""
    return time.time_ns() // 1_000_000


def build(
    settings: Settings,
    *,
    now: Callable[[], int] = wall_clock,
    show_key: Callable[[str], None] | None = None,
    redactor: Redactor | None = None,
) -> Starlette:
    """The relay as an ASGI application; its lifespan is the relay's life.

    `show_key` is told the admin key when one had to be made; nobody can learn it afterwards. `redactor` is
    the one that logs go through, if they do: refusals go through it too.
    """

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[State]:
        async with running(settings, now=now, show_key=show_key, redactor=redactor) as relay:
            yield {"relay": relay}

    return _web(settings, lifespan)


async def serve(
    settings: Settings, *, show_key: Callable[[str], None], redactor: Redactor | None = None
) -> None:
    """Serves until SIGTERM or SIGINT, then finishes what is in flight. Raises ConfigError."""
    use_all_files()
    bound = bind(settings.host, settings.port)
    async with running(settings, now=wall_clock, show_key=show_key, redactor=redactor) as relay:

        @asynccontextmanager
        async def lifespan(app: Starlette) -> AsyncIterator[State]:
            yield {"relay": relay}

        server = Server(
            _web(settings, lifespan),
            grace=settings.delivery.timeout / 1000,
            trusted_proxies=settings.network.trusted_proxies,
        )

        def wind_down() -> None:
            relay.ingest.stop_waiting()
            relay.live.stop()
            relay.poller.stop_claiming()
            relay.deliverer.stop_claiming()
            relay.holder.wind_down()

        server.stop_on_signals(wind_down)
        gc.freeze()
        gc.set_threshold(NEW_OBJECTS, *gc.get_threshold()[1:])
        log.info("relay.serving", extra={"url": origin(bound), "accounts": len(relay.accounts)})
        await server.serve(sockets=[bound])
    log.info("relay.stopped")


def _web(
    settings: Settings, lifespan: Callable[[Starlette], AbstractAsyncContextManager[State]]
) -> Starlette:
    # Routes are tried in this order: those that are called most come first.
    posts_first = sorted(OPERATIONS, key=lambda one: (one.method != "POST", not one.creates))
    routes = [*(one.route() for one in posts_first), *inbound.routes(), *ops.routes(OPERATIONS)]
    app = Starlette(routes=routes, lifespan=lifespan, exception_handlers=HANDLERS)
    app.router.redirect_slashes = False
    # Outside of everything, also of what answers when something has crashed.
    is_https = settings.origin.startswith("https://")
    app.middleware_stack = SecurityHeaders(app.build_middleware_stack(), https=is_https)
    return app


@asynccontextmanager
async def running(
    settings: Settings,
    *,
    now: Callable[[], int],
    show_key: Callable[[str], None] | None = None,
    redactor: Redactor | None = None,
) -> AsyncIterator[Relay]:
    """A relay at work. Leaving finishes what is in flight, gives back the rest and closes everything."""
    async with AsyncExitStack() as stack:
        database = await open_database(settings.database, patience=PATIENCE)
        stack.push_async_callback(database.close)
        keyring = KeyRing(settings.secret_keys)
        store = store_on(database, keyring)
        await _prepare(store, settings, now=now, show_key=show_key)
        guard = Guard(settings.network.allow)
        asker = Asker.open(
            guard, capability=f"{settings.origin}/hooks/", proxy=settings.network.proxy, now=now
        )
        stack.push_async_callback(asker.close)
        sender = Sender.open(guard, timeout=settings.delivery.timeout, proxy=settings.network.proxy, now=now)
        stack.push_async_callback(sender.close)
        known = redactor or Redactor(*settings.secrets)
        name, tracing = new_id("rly", now()), None
        if settings.tracing.endpoint is not None:
            tracing = _open_tracing(settings.tracing, settings.tracing.endpoint, relay=name)
            stack.push_async_callback(tracing.close)
        relay = _assemble(
            settings,
            store,
            asker,
            sender,
            keyring=keyring,
            redactor=known,
            name=name,
            tracing=tracing,
            now=now,
        )
        await relay.accounts.look_at_all()
        await relay.poller.resume()
        await stack.enter_async_context(database.listening(_listener(relay)))
        await relay.holder.start()
        stack.callback(asyncio.create_task(_feel_the_loop(relay.metrics)).cancel)
        metronome = _metronome(relay)
        stack.callback(metronome.shutdown, wait=False)
        stack.push_async_callback(relay.live.close)
        stack.push_async_callback(relay.bell.flush)
        stack.push_async_callback(_steady("keys", relay.gate.write_down))
        stack.push_async_callback(relay.holder.stop)
        # In the order of their ends: polls first, then what they recorded, then what is being delivered.
        stack.push_async_callback(relay.deliverer.stop)
        stack.push_async_callback(relay.ingest.flush)
        stack.push_async_callback(relay.poller.stop)
        stack.push_async_callback(relay.pruner.stop)
        stack.callback(relay.holder.wind_down)
        # A shutdown would cancel the ticks under way, and what they have just claimed would be nobody's.
        stack.callback(metronome.pause)
        yield relay


def _open_tracing(settings: TracingSettings, endpoint: str, *, relay: str) -> Tracing:
    return Tracing.open(
        endpoint,
        headers=settings.headers,
        service=settings.service,
        relay=relay,
        share=settings.share,
        propagates=settings.propagate,
    )


async def _prepare(
    store: Store,
    settings: Settings,
    *,
    now: Callable[[], int],
    show_key: Callable[[str], None] | None,
) -> None:
    for name in await migrate(store.database, now=now()):
        log.info("database.migrated", extra={"migration": name})
    await check_whole(store.database)
    await store.sealed.check()
    await store.tenants.found(DEFAULT, signature.new_secret(), now=now())
    if settings.admin_key is None and not await store.keys.any():
        at = now()
        key_id, text = new_key(at)
        key = Key(key_id, DEFAULT, "admin", (Scope.ADMIN,), hash_of(text), created_at=at)
        entry = Entry(DEFAULT, at, "relay", "key.created", key_id)
        if await store.keys.create_first(key, entry=entry) and show_key is not None:
            show_key(text)


def _assemble(
    settings: Settings,
    store: Store,
    asker: Asker,
    sender: Sender,
    *,
    keyring: KeyRing,
    redactor: Redactor,
    name: str,
    tracing: Tracing | None,
    now: Callable[[], int],
) -> Relay:
    held, metrics, pulse = Held(), Metrics(settings.accounts), Pulse()
    bell = Bell(store.database, relay=name)

    def check_base_url(url: str) -> None:
        check_url("base_url", url, settings, allow_http=settings.network.allow_http)

    roster = Roster(accounts(settings), store, check=check_base_url, now=now)

    async def look(tenant: str, account: str, job_id: str) -> Update:
        return await poller.look(tenant, account, job_id)

    deliverer = Deliverer(
        store,
        sender,
        schedule=settings.delivery.schedule,
        timeout=settings.delivery.timeout,
        concurrency=settings.delivery.concurrency,
        endpoint_concurrency=settings.delivery.endpoint_concurrency,
        shards=held,
        ring=bell.ring,
        renew=Renewer(store, look=look, now=now).renew,
        metrics=metrics,
        tracing=tracing,
        now=now,
    )
    live = Live(store, ring=bell.ring, now=now)
    ingest = Ingest(
        store,
        handoff=deliverer.handoff,
        accept=deliverer.accept,
        stored=live.stored,
        progress_interval=settings.delivery.progress_interval,
        metrics=metrics,
        tracing=tracing,
        now=now,
    )

    poller = Poller(
        store,
        asker,
        roster,
        relay=name,
        shards=held,
        ring=bell.ring,
        record=ingest.record,
        changed=ingest.account_changed,
        metrics=metrics,
        tracing=tracing,
        now=now,
    )

    async def take(shards: Collection[int]) -> None:
        await asyncio.gather(poller.take(shards), deliverer.take(shards))

    async def let_go(shards: Collection[int]) -> None:
        await asyncio.gather(poller.let_go(shards), deliverer.let_go(shards))

    holder = Holder(
        store,
        held,
        relay=name,
        lease=deliverer.longest_attempt + SPARE,
        take=take,
        let_go=let_go,
        changed=lambda: bell.ring("shards"),
        now=now,
    )
    all_turns: dict[str, Turns] = {}

    def turns(name: str) -> Turns | None:
        account = roster.get(name)
        if account is None:
            all_turns.pop(name, None)
            return None
        per_minute, interval = account.requests_per_minute, account.pace.interval
        one = all_turns.get(name)
        if one is None or (one.per_minute, one.interval) != (per_minute, interval):
            one = all_turns[name] = Turns(per_minute, interval)
        one.relays = held.relays
        return one

    async def hint(hints: Sequence[Hint]) -> Sequence[None]:
        await store.generations.hint(hints, turns=turns, now=now())
        return [None] * len(hints)

    def may_prune() -> bool:
        # To remove much may take hours; as long as it asks, it is alive.
        pulse.beat("prune", time.monotonic())
        return held.covers("retention", now())

    return Relay(
        settings=settings,
        store=store,
        keyring=keyring,
        accounts=roster,
        callbacks=Callbacks(settings.origin, settings.secret_keys),
        ingest=ingest,
        live=live,
        catalog=Catalog(store, ring=bell.ring, now=now),
        asker=asker,
        poller=poller,
        deliverer=deliverer,
        shards=held,
        holder=holder,
        pruner=Pruner(
            store,
            events=settings.retention.events,
            attempts=settings.retention.attempts,
            bodies=settings.retention.bodies,
            audit=settings.retention.audit,
            may=may_prune,
            observed=metrics.pruned,
            now=now,
        ),
        bell=bell,
        gate=Gate(store.keys, settings.admin_key, now=now),
        test_limit=Limit(TESTS_A_MINUTE / 60, TESTS_A_MINUTE),
        replay_limit=Limit(REPLAYS_A_SECOND, REPLAYS_AT_ONCE),
        counting=Counting(store),
        pulse=pulse,
        redactor=redactor,
        watch=Batch(store.generations.create, observed=metrics.written("watch")),
        hint=Batch(hint, observed=metrics.written("hint")),
        metrics=metrics,
        tracing=tracing,
        now=now,
    )


def _listener(relay: Relay) -> Callable[[str], None]:
    def heard(what: str, which: str) -> None:
        match what:
            case "deliveries" if int(which) in relay.shards.staying:
                relay.deliverer.wake()
            case "generations" if int(which) in relay.shards.staying:
                relay.poller.wake()
            case "account" if int(which) in relay.shards.staying:
                relay.poller.lend()
            case "accounts":
                relay.accounts.hear(which)
                relay.poller.wake()
            case "endpoint":
                relay.deliverer.forget(which)
            case "callbacks":
                relay.deliverer.forget_callbacks(which)
            case "types":
                relay.catalog.forget(which)
            case "events":
                relay.live.wake(which)
            case "streams":
                relay.live.heard(which)
            case "shards":
                relay.holder.wake()

    return lambda message: relay.bell.hear(message, heard)


def _metronome(relay: Relay) -> AsyncIOScheduler:
    """Beats time for ticks that are idempotent; it never holds a job of its own per generation."""
    scheduler = AsyncIOScheduler(
        timezone="UTC", job_defaults={"coalesce": True, "max_instances": 1, "misfire_grace_time": None}
    )

    async def replay() -> None:
        await advance(relay.store, covers=relay.shards.covers, wake=relay.deliverer.wake, now=relay.now)

    def every(
        seconds: float, name: str, tick: Callable[[], Awaitable[None]], *, longest_rest: int = LONGEST_REST
    ) -> None:
        steady = _steady(name, tick, longest_rest=longest_rest)

        async def beat() -> None:
            await steady()
            relay.pulse.beat(name, time.monotonic())

        relay.pulse.expect(name, every=seconds, now=time.monotonic())
        scheduler.add_job(beat, "interval", seconds=seconds)

    every(POLL_TICK, "poll", relay.poller.tick)
    every(RETRY_TICK, "deliver", relay.deliverer.tick)
    every(REPLAY_TICK, "replay", replay)
    if not relay.store.database.alone:
        every(BEAT, "hold", relay.holder.beat, longest_rest=1)
    else:
        every(TIDY_TICK, "tidy", relay.store.database.tidy, longest_rest=1)
    every(PRUNE_TICK, "prune", relay.pruner.tick, longest_rest=1)
    every(KEYS_TICK, "keys", relay.gate.write_down, longest_rest=1)
    scheduler.start()
    return scheduler


async def _feel_the_loop(metrics: Metrics) -> None:
    """How late what is due begins, again and again."""
    clock = asyncio.get_running_loop().time
    while True:
        due = clock() + LAG_TICK
        await asyncio.sleep(LAG_TICK)
        metrics.loop_lagged(max(0.0, clock() - due))


def _steady(
    name: str, tick: Callable[[], Awaitable[None]], *, longest_rest: int = LONGEST_REST
) -> Callable[[], Awaitable[None]]:
    """A tick that says when its store begins to take nothing, and when that is over."""
    failures = rest = 0

    async def beat() -> None:
        nonlocal failures, rest
        rest -= 1
        if rest > 0:
            return
        try:
            await tick()
        except StoreError as error:
            if not failures:
                log.error("store.unavailable", extra={"tick": name, "error": str(error)})
            failures += 1
            rest = min(2**failures, longest_rest)
        else:
            if failures:
                log.warning("store.available", extra={"tick": name, "failures": failures})
            failures = rest = 0

    return beat
