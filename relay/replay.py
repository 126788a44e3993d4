"""Replaying in bulk: makes finished deliveries pending again, and those that are missing, a little at a time.

How far a replay has come is in its row, written in the transaction of what it makes pending: whichever relay
goes on with it, and whenever, leaves nothing out and makes nothing pending twice.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from itertools import chain, repeat

from relay.errors import Limited, StoreError
from relay.ids import LATE
from relay.selection import Found, Replay, Selection, choose, position_before
from relay.store import Store

log = logging.getLogger(__name__)
# Rows that are looked at in one go: first as many as what is found soon needs, then many.
FEW, MANY = 100, 2_000
# Rows that are counted in one go.
TALLIED = 50_000
# Counts of one tenant at once, and when another one may be asked for, milliseconds.
COUNTS, COUNT_PAUSE = 5, 2_000
# So many seconds one beat looks for something, for all replays together; each looks once at least.
LOOKING = 1.0
# Deliveries that one transaction makes pending.
MOST = 500


class Counting:
    """What selections are of, counted. That goes through everybody's rows, in stretches: one stretch at a
    time, whoever they are for, and what else is read comes between any two."""

    def __init__(self, store: Store) -> None:
        self._store, self._turn = store, asyncio.Lock()
        self._asked: Counter[str] = Counter()

    async def count(self, selection: Selection) -> int:
        """How many deliveries it is of now. Raises Limited when COUNTS of its tenant are under way."""
        if self._asked[selection.tenant] >= COUNTS:
            raise Limited(f"{COUNTS} replays are being counted: try again soon", retry_after=COUNT_PAUSE)
        self._asked[selection.tenant] += 1
        try:
            return await count(self._store, selection, turn=self._turn)
        finally:
            self._asked[selection.tenant] -= 1
            # Of those that are not counted now nothing is kept.
            self._asked = +self._asked


async def count(store: Store, selection: Selection, *, turn: asyncio.Lock | None = None) -> int:
    """How many deliveries it is of now."""
    total, position = 0, selection.start
    while True:
        async with turn or nullcontext():
            some, behind = await store.replays.tally(selection, position, limit=TALLIED)
        total += some
        following = behind or selection.after(position)
        if following is None:
            return total
        position = following


async def advance(
    store: Store,
    *,
    covers: Callable[[str, int], bool],
    wake: Callable[[str], None],
    now: Callable[[], int],
) -> None:
    """Goes on with every replay that is this relay's: `covers` says so of a name, until a time. `wake` is
    called with each destination that something has become pending for. Idempotent."""
    replays = [one for one in await store.replays.open() if covers(one.name, now())]
    for replay in replays:
        # Those before it have taken their time.
        if not covers(replay.name, now()):
            continue
        try:
            destinations = await _go_on(store, replay, seconds=LOOKING / len(replays), now=now())
        except StoreError as error:
            if error.general:
                raise
            # What it was about to make pending is just being removed, or the like: it looks again.
            log.warning("replay.delayed: %s", error, extra={"replay": replay.id})
            continue
        for name in sorted(destinations):
            wake(name)


async def _go_on(store: Store, replay: Replay, *, seconds: float, now: int) -> set[str]:
    """Where something has become pending to."""
    clock = asyncio.get_running_loop().time
    over = clock() + seconds
    obstacle = await store.replays.obstacle(replay.selection)
    if obstacle is not None:
        await store.replays.fail(replay, obstacle, now=now)
        log.warning("replay.failed", extra={"replay": replay.id, "error": obstacle})
        return set()
    room = replay.allowance(now)
    if room < 1:
        return set()
    # Of one endpoint it is known before anything is looked for.
    asked = {replay.selection.endpoint_id or ""}
    crowded = await store.replays.crowded(asked, now=now)
    if crowded:
        return set()
    chosen, given, position = list[Found](), Counter[str](), replay.position
    following: str | None = position
    for limit in chain([FEW], repeat(MANY)):
        until, rest = _committed(store, replay, now), over - clock()
        stretch = await store.replays.look(replay.selection, position, limit=limit, until=until, seconds=rest)
        names = {one.destination for one in stretch.found[:MOST]} - asked
        crowded |= await store.replays.crowded(names, now=now)
        asked |= names
        some, left = choose(stretch.found, given, room=room, most=MOST, now=now, crowded=crowded)
        chosen += some
        if left is not None:
            following = position_before(stretch.found, left) or position
            break
        following = stretch.position or replay.selection.after(position)
        if following is None or (stretch.position is not None and not stretch.more) or clock() >= over:
            break
        position = following
    if following == replay.position and not chosen:
        return set()
    paced_at = replay.paced(max(given.values(), default=0), now)
    if not await store.replays.advance(replay, chosen, following, paced_at=paced_at, now=now):
        return set()
    if following is None:
        log.info("replay.completed", extra={"replay": replay.id})
    return {one.destination for one in chosen}


def _committed(store: Store, replay: Replay, now: int) -> int:
    """Nothing that was made before this time is still to be committed."""
    return replay.selection.until if store.database.alone else min(replay.selection.until, now - LATE)
