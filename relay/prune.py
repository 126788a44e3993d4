"""Retention: removes what has ended and is old, a little at a time."""

import logging
from collections.abc import Awaitable, Callable
from functools import partial

from relay.store import Store

log = logging.getLogger(__name__)
_BATCH = 500
_IDEMPOTENCY = 86_400_000


async def prune(store: Store, *, events: int, attempts: int, audit: int, now: int) -> int:
    """Removes what is older than `events`, `attempts` and `audit` (milliseconds) and not on its way any more.

    Idempotency keys go after a day. Returns how many rows went.
    """
    retention = store.retention
    return (
        await _drain(partial(retention.remove_attempts, before=now - attempts, limit=_BATCH))
        + await _drain(partial(retention.remove_events, before=now - events, limit=_BATCH))
        + await _drain(partial(retention.remove_generations, before=now - events, limit=_BATCH))
        + await _drain(partial(retention.remove_replays, before=now - events, limit=_BATCH))
        + await _drain(partial(retention.remove_audit, before=now - audit, limit=_BATCH))
        + await _drain(partial(retention.remove_idempotency_keys, before=now - _IDEMPOTENCY, limit=_BATCH))
    )


async def _drain(remove: Callable[[], Awaitable[int]]) -> int:
    total = 0
    while removed := await remove():
        total += removed
        if removed < _BATCH:
            break
    return total
