"""From an update to an event to its deliveries: one transaction, grouped."""

import asyncio
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress

from relay.batch import Batch
from relay.delivery import Claimed
from relay.endpoint import Endpoint
from relay.errors import Refused
from relay.event import ENDINGS, UNKNOWN_STATUS, Event, account_failing, account_recovered, news
from relay.generation import Generation
from relay.health import Health, Status
from relay.metrics import Metrics
from relay.providers import Account
from relay.schedule import Report
from relay.store import Store
from relay.store.events import Change, Handoff, Publication
from relay.tracing import Tracing

log = logging.getLogger(__name__)
# Another relay may have recorded the end that is waited for; seconds.
LOOK_AGAIN = 1.0
# Which filters a tenant has, for so many tenants, is read again after so many milliseconds.
MOST_TENANTS, FILTERS_READ_EVERY = 1_000, 5_000


class Ingest:
    """Records reports. `handoff` says how many fresh deliveries may be handed over, `accept` takes them;
    `stored` is told whose events were stored.
    Progress is announced every `progress_interval` milliseconds at most."""

    def __init__(
        self,
        store: Store,
        *,
        handoff: Callable[[], Handoff],
        accept: Callable[[Sequence[Claimed], Handoff], None],
        stored: Callable[[Collection[str]], None],
        progress_interval: int,
        metrics: Metrics,
        tracing: Tracing | None,
        now: Callable[[], int],
    ) -> None:
        self._store, self._handoff, self._accept, self._now = store, handoff, accept, now
        self._stored, self._tracing = stored, tracing
        self._progress_interval, self._metrics = progress_interval, metrics
        self._batch: Batch[Report, Generation | None] = Batch(self._write, observed=metrics.written("record"))
        self._published: Batch[Publication, Sequence[Event] | Refused] = Batch(
            self._publish, observed=metrics.written("publish")
        )
        self._filtering: dict[str, tuple[int, Sequence[Endpoint]]] = {}
        self._waiting: dict[str, set[asyncio.Event]] = {}
        self._stopping = False

    async def record(self, report: Report) -> Generation | None:
        """The generation after the report, durably; None when it is no longer watched."""
        return await self._batch(report)

    async def publish(self, publication: Publication) -> Sequence[Event]:
        """The events as they are stored, durably, all or none; earlier ones where there are any of the same
        `source_id` or Idempotency-Key. Raises Refused when that key was used for something else."""
        await self._filter(publication.events)
        result = await self._published(publication)
        if isinstance(result, Refused):
            raise result
        self._trace([one for one, own in zip(result, publication.events, strict=True) if one is own])
        return result

    async def announce(self, events: Sequence[Event]) -> None:
        """Makes events of Relay's own known to the endpoints that want them, durably, all or none."""
        await self._filter(events)
        handoff = self._handoff()
        self._accept(await self._store.events.announce(events, handoff, now=self._now()), handoff)
        self._stored({event.tenant for event in events})
        self._trace(events)

    async def account_changed(self, account: Account, health: Health) -> None:
        """Announces to its tenants that an account cannot be asked any more, or can again."""
        said = {"account": account.name, "status": health.status.value, "error": health.last_error}
        log.warning("account.changed", extra=said)
        about, now = (account.shown, account.provider.name), self._now()
        if health.status is Status.OK:
            events = [account_recovered(tenant, *about, now=now) for tenant in account.listeners]
        else:
            events = [
                account_failing(tenant, *about, account.told(tenant, health.last_error) or "", now=now)
                for tenant in account.listeners
            ]
        await self.announce(events)

    def stop_waiting(self) -> None:
        """Whoever waits for an end is answered now."""
        self._stopping = True
        for bells in self._waiting.values():
            for bell in bells:
                bell.set()

    async def flush(self) -> None:
        await self._batch.flush()
        await self._published.flush()

    async def ended(self, tenant: str, generation_id: str, *, timeout: float) -> Generation | None:
        """The generation once it has ended, or as it is after `timeout` seconds; None when there is none."""
        bell = asyncio.Event()
        self._waiting.setdefault(generation_id, set()).add(bell)
        try:
            return await self._until_ended(tenant, generation_id, bell, timeout)
        finally:
            bells = self._waiting[generation_id]
            bells.discard(bell)
            if not bells:
                del self._waiting[generation_id]

    async def _until_ended(
        self, tenant: str, generation_id: str, bell: asyncio.Event, timeout: float
    ) -> Generation | None:
        clock = asyncio.get_running_loop().time
        deadline = clock() + timeout
        while True:
            bell.clear()
            generation = await self._store.generations.get(tenant, generation_id)
            left = deadline - clock()
            if generation is None or generation.ended or self._stopping or left <= 0:
                return generation
            with suppress(TimeoutError):
                async with asyncio.timeout(left if self._store.database.alone else min(left, LOOK_AGAIN)):
                    await bell.wait()

    async def _filter(self, events: Sequence[Event]) -> None:
        """Asks the filters now, with pauses: the transaction, which others wait for, will find them asked,
        but for the newest."""
        filtering = await self._filters({event.tenant for event in events})
        for event in events:
            for one in filtering[event.tenant]:
                if one.takes(event.type, event.account):
                    one.lets_through(event.body)
                    await asyncio.sleep(0)

    async def _filters(self, tenants: set[str]) -> Mapping[str, Sequence[Endpoint]]:
        """The endpoints with a filter that each of the tenants has, or had a moment ago."""
        now = self._now()
        read = {one: self._filtering[one] for one in tenants if one in self._filtering}
        known = {
            one: endpoints
            for one, (read_at, endpoints) in read.items()
            if 0 <= now - read_at < FILTERS_READ_EVERY
        }
        unknown = tenants - known.keys()
        if unknown:
            found: dict[str, list[Endpoint]] = {one: [] for one in unknown}
            for endpoint in await self._store.endpoints.filtering(sorted(unknown)):
                found[endpoint.tenant].append(endpoint)
            if len(self._filtering) >= MOST_TENANTS:
                self._filtering.clear()
            self._filtering |= {one: (now, endpoints) for one, endpoints in found.items()}
            known |= found
        return known

    async def _publish(self, publications: Sequence[Publication]) -> Sequence[Sequence[Event] | Refused]:
        handoff = self._handoff()
        results, claimed = await self._store.events.publish(publications, handoff, now=self._now())
        self._accept(claimed, handoff)
        self._stored({one.tenant for one in publications})
        return results

    async def _write(self, reports: Sequence[Report]) -> Sequence[Generation | None]:
        now = self._now()
        ids = sorted({report.generation_id for report in reports})
        known = {one.id: one for one in await self._store.generations.get_many(ids)}
        current = dict(known)
        moves: list[tuple[Generation, Generation]] = []
        asked = []
        for report in reports:
            generation = current.get(report.generation_id)
            if generation is None:
                continue
            after = None
            if report.update is not None:
                after = generation.after(report.update, now=now, learned_by=report.learned_by)
            if after is not None:
                moves.append((generation, after))
                current[after.id] = generation = after
            asked.append(report.asked(generation))
        changes = [
            Change(after, events)
            for id_, after in sorted(current.items())
            if (events := self._news(known[id_], after, now)) or after is not known[id_]
        ]
        await self._filter([event for one in changes for event in one.events])
        handoff = self._handoff()
        fresh, claimed = await self._store.events.record(changes, asked, handoff, now=now)
        self._accept(claimed, handoff)
        self._stored({event.tenant for event in fresh})
        for before, after in moves:
            _log(before, after)
        for event in fresh:
            generation = current[event.generation_id or ""]
            if event.type == UNKNOWN_STATUS:
                _warn(generation)
            if event.type in ENDINGS.values():
                self._metrics.ended(generation)
                if self._tracing is not None:
                    _trace_end(self._tracing, generation, event)
                log.info("generation.ended", extra=_line(generation, event))
                self._ring(generation.id)
        return [current.get(report.generation_id) for report in reports]

    def _trace(self, events: Sequence[Event]) -> None:
        """Events that are about no generation have traces of their own, begun once: when they are stored."""
        if self._tracing is None:
            return
        for event in events:
            self._tracing.note(
                "event",
                event.id,
                begun=event.created_at,
                ended=self._now(),
                first=True,
                attributes={"relay.event": event.id, "relay.event_type": event.type},
            )

    def _news(self, before: Generation, after: Generation, now: int) -> Sequence[Event]:
        return news(before, after, now=now, progress_interval=self._progress_interval)

    def _ring(self, generation_id: str) -> None:
        for bell in self._waiting.get(generation_id, ()):
            bell.set()


def _trace_end(tracing: Tracing, generation: Generation, event: Event) -> None:
    known_at = generation.known_at or generation.created_at
    attributes: dict[str, str | int | None] = {
        "relay.generation": generation.id,
        "relay.provider": generation.provider,
        "relay.account": generation.account,
        "relay.status": generation.status.value,
        "relay.learned_by": generation.learned_by,
        "relay.asks": generation.asks + 1,
        "relay.event": event.id,
    }
    # A late ending is told again, and the trace has its first span already.
    tracing.note(
        "generation",
        generation.id,
        begun=generation.created_at,
        ended=known_at,
        first=not generation.late,
        attributes=attributes,
    )


def _line(generation: Generation, event: Event) -> Mapping[str, object]:
    """The one wide line of a generation that has ended."""
    update, known_at = generation.update, generation.known_at or 0
    ended_at = update.completed_at if update is not None else None
    return {
        "generation": generation.id,
        "event_id": event.id,
        "provider": generation.provider,
        "account": generation.account,
        "job": generation.job_id,
        "status": generation.status.value,
        "provider_status": update.provider_status if update is not None else None,
        "model": update.model if update is not None else None,
        "outputs": len(update.outputs) if update is not None else 0,
        "code": update.error.code.value if update is not None and update.error is not None else None,
        "learned_by": generation.learned_by,
        "late": generation.late,
        "asks": generation.asks + 1,
        "hints": generation.hints,
        "watched_ms": known_at - generation.created_at,
        "known_lag_ms": max(0, known_at - ended_at) if ended_at is not None else None,
        "unknown_ms": known_at - generation.open_at if generation.open_at is not None else None,
    }


def _log(before: Generation, after: Generation) -> None:
    if after.status is not before.status and not after.ended:
        log.info(
            "generation.moved",
            extra={
                "generation": after.id,
                "account": after.account,
                "job": after.job_id,
                "from": before.status.value,
                "to": after.status.value,
                "learned_by": after.learned_by,
            },
        )


def _warn(generation: Generation) -> None:
    log.warning(
        UNKNOWN_STATUS,
        extra={
            "generation": generation.id,
            "account": generation.account,
            "provider_status": generation.update.provider_status if generation.update else None,
        },
    )
