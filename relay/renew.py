"""Renewing: before an event goes out whose URLs have expired, its provider is asked for fresh ones."""

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence

from relay.budget import AT_ONCE
from relay.errors import Limited, NotFound, ProviderError
from relay.event import Event, renewed
from relay.generation import ENDINGS, Output, Status, Update
from relay.store import Store

log = logging.getLogger(__name__)
# How long an event is held back for a provider that cannot be asked.
PATIENCE = 3_600_000


class Renewer:
    """Keeps the URLs in events alive. `look` asks an account about a tenant's job (`Poller.look`)."""

    def __init__(
        self, store: Store, *, look: Callable[[str, str, str], Awaitable[Update]], now: Callable[[], int]
    ) -> None:
        self._store, self._look, self._now = store, look, now
        self._under_way: dict[str, asyncio.Future[bool]] = {}
        self._asking: Counter[str] = Counter()
        self._waiting_since: dict[str, int] = {}

    async def renew(self, event_id: str, by: int) -> bool:
        """Whether the event may be sent as it is stored now: its URLs live beyond `by`, or it says which of
        them do not. False when its provider should be asked again later.

        However many ask about an event at once, its provider is asked once.
        """
        if event_id in self._under_way:
            return await asyncio.shield(self._under_way[event_id])
        outcome = self._under_way[event_id] = asyncio.get_running_loop().create_future()
        is_fit = False
        try:
            is_fit = await self._renew(event_id, by)
        finally:
            del self._under_way[event_id]
            outcome.set_result(is_fit)
        return is_fit

    async def _renew(self, event_id: str, by: int) -> bool:
        found = await self._store.events.get_many([event_id])
        if not found or found[0].expires_at is None or found[0].expires_at > by:
            return True  # it is gone, or another delivery of it was here before
        [event] = found
        outputs = await self._ask(event)
        if outputs is None and self._may_wait(event_id):
            return False
        self._waiting_since.pop(event_id, None)
        await self._store.events.renew(event, renewed(event, outputs or (), by=by, now=self._now()))
        log.info("event.renewed", extra={"event_id": event_id, "outputs": len(outputs or ())})
        return True

    async def _ask(self, event: Event) -> Sequence[Output] | None:
        """The outputs as the provider gives them now, empty when it never will; None when it may later."""
        found = await self._store.generations.get_many([event.generation_id or ""])
        if not found or found[0].job_id is None:
            return ()
        account, job_id = found[0].account, found[0].job_id
        if self._asking[account] >= AT_ONCE:
            return None  # who comes beyond that comes again
        self._asking[account] += 1
        try:
            update = await self._look(event.tenant, account, job_id)
        except NotFound:
            return ()
        except (Limited, ProviderError) as error:
            log.info("event.not_renewed", extra={"event_id": event.id, "error": str(error)})
            return None
        finally:
            self._asking[account] -= 1
        if update.status not in ENDINGS:
            return None
        return update.outputs if update.status is Status.COMPLETED else ()

    def _may_wait(self, event_id: str) -> bool:
        now = self._now()
        since = self._waiting_since.setdefault(event_id, now)
        # The first is the oldest; it may be of an event whose delivery was canceled meanwhile.
        oldest = next(iter(self._waiting_since))
        if self._waiting_since[oldest] < now - 2 * PATIENCE:
            del self._waiting_since[oldest]
        return now < since + PATIENCE
