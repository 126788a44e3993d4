"""Retention: removes what has ended and is old, a little at a time, and gives its space back."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Protocol

from relay.store import Store
from relay.store.retention import Step

log = logging.getLogger(__name__)
_IDEMPOTENCY = 86_400_000
# A step is made as large as the database does within so many seconds, and is followed by a rest so many times
# as long: whoever delivers meanwhile waits for one step at most, and seldom. Who is not done after so many
# seconds, when the next round would begin, removes less than comes, and rests only as long as it works.
STEP_SECONDS, REST, HURRY_AFTER = 0.025, 3, 60
_FEWEST, _FIRST, _MOST = 50, 100, 1_000
_LONGEST = 1.0
# Of what has become free in a database's file, so much is given back in one step.
PAGES = 128


class _Remove(Protocol):
    def __call__(self, *, limit: int, after: str) -> Awaitable[Step]: ...


class Pruner:
    """Removes what is older than the ages it is given (milliseconds), as long as this relay `may`; tells
    `observed` what."""

    def __init__(
        self,
        store: Store,
        *,
        events: int,
        attempts: int,
        bodies: int,
        audit: int,
        may: Callable[[], bool],
        observed: Callable[[str, int, float], None],
        now: Callable[[], int],
    ) -> None:
        self._stopping = False
        self._prune = partial(
            prune,
            store,
            events=events,
            attempts=attempts,
            bodies=bodies,
            audit=audit,
            observed=observed,
            looked_through={},
            goes_on=lambda: may() and not self._stopping,
        )
        self._may, self._now = may, now
        self._at_it = asyncio.Lock()

    async def tick(self) -> None:
        """Removes all that is old now; idempotent."""
        async with self._at_it:
            if self._may() and not self._stopping:
                await self._prune(now=self._now())

    async def stop(self) -> None:
        """Returns when the step under way is done."""
        self._stopping = True
        async with self._at_it:
            pass


async def prune(
    store: Store,
    *,
    events: int,
    attempts: int,
    audit: int,
    now: int,
    bodies: int | None = None,
    looked_through: dict[str, str] | None = None,
    goes_on: Callable[[], bool] = lambda: True,
    observed: Callable[[str, int, float], None] = lambda kind, rows, seconds: None,
) -> int:
    """Removes what is older than `events`, `attempts` and `audit` (milliseconds) and not on its way any more;
    of attempts older than `bodies` what was answered. Idempotency keys go after a day.

    It takes its time; before every step it asks whether it `goes_on`, and after it tells what kind it removed
    how many rows of, and for how many seconds that kept others from writing. `looked_through` remembers from
    one call to the next where bodies are left. Returns how many rows went.
    """
    retention, total, began = store.retention, 0, time.monotonic()

    async def rest(took: float) -> None:
        await asyncio.sleep(min(_LONGEST, took * (REST if time.monotonic() - began < HURRY_AFTER else 1)))

    # Events take their attempts with them: few are left to be removed by themselves.
    kinds: dict[str, _Remove] = {
        "events": partial(retention.remove_events, before=now - events),
        "attempts": partial(retention.remove_attempts, before=now - attempts),
        "generations": partial(retention.remove_generations, before=now - events),
        "replays": partial(retention.remove_replays, before=now - events),
        "audit": partial(retention.remove_audit, before=now - audit),
        "idempotency_keys": partial(retention.remove_idempotency_keys, before=now - _IDEMPOTENCY),
    }
    if bodies is not None and bodies < attempts:
        kinds["bodies"] = partial(retention.forget_bodies, before=now - bodies)
    seen = looked_through if looked_through is not None else {}
    for kind, remove in kinds.items():
        after: str | None
        after, rows = seen.get(kind, ""), _FIRST
        while after is not None and goes_on():
            step = await remove(limit=rows, after=after)
            observed(kind, step.removed, retention.held)
            total, after, rows = total + step.removed, step.after, _next_rows(rows, retention.held)
            if after is not None and kind == "bodies":
                seen[kind] = after
            await rest(retention.held)
    while goes_on():
        begun = time.monotonic()
        if not await store.database.shrink(PAGES):
            break
        await rest(time.monotonic() - begun)
    if total:
        log.info("retention.removed", extra={"rows": total, "seconds": round(time.monotonic() - began)})
    return total


def _next_rows(rows: int, took: float) -> int:
    """How many rows the next step looks at, by how many seconds the last one took."""
    if took > STEP_SECONDS:
        return max(_FEWEST, rows // 2)
    return min(_MOST, rows * 2) if took < STEP_SECONDS / 2 else rows
