"""A selection is which deliveries a replay is of; a replay makes them pending, at its own pace.

pending ──► running ──► completed
   └───────────┴──────► canceled | failed

It first goes through the deliveries that it is of, then through the events that lack one, each in the order
of their ids. The last id that is done with is its `position`: whoever goes on with it goes on from there.
"""

import math
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import StrEnum

from relay.event import TEST, TRIED_ONCE
from relay.ids import first_id

RATE_LIMIT, HIGHEST_RATE_LIMIT = 10.0, 1000.0
_SECOND = 1000


class Wanted(StrEnum):
    """Which deliveries are replayed."""

    FAILED = "failed"  # that failed, or were canceled when their endpoint was disabled
    MISSING = "missing"  # that are not there: the endpoint was made, or its filter changed, after the event
    ALL = "all"  # every finished one, and those that are not there


class Status(StrEnum):
    PENDING = "pending"  # whoever holds the shard of its endpoint begins with it soon
    RUNNING = "running"  # from its position on
    COMPLETED = "completed"  # it came to its end
    CANCELED = "canceled"  # somebody asked for that; what was made pending stays so
    FAILED = "failed"  # it cannot go on: `error` says why


@dataclass(frozen=True, slots=True)
class Selection:
    """What is None selects nothing; times are unix milliseconds, of when a delivery or an event was made:
    from `since` on, before `until`. Without `endpoint_id` it is of everything of the tenant."""

    tenant: str
    wanted: Wanted
    until: int
    since: int | None = None
    endpoint_id: str | None = None
    generation_id: str | None = None
    account: str | None = None
    event_type: str | None = None

    @property
    def start(self) -> str:
        """The position of what has not begun."""
        return self._first("evt" if self.wanted is Wanted.MISSING else "dlv")

    def after(self, position: str) -> str | None:
        """Where to go on when nothing of the kind of `position` is left; None at the end."""
        return self._first("evt") if self.wanted is Wanted.ALL and is_of_delivery(position) else None

    def includes(self, event_type: str, account: str | None, generation_id: str | None) -> bool:
        """Whether it is of such events: those that were of their moment only if that type is asked for."""
        if self.event_type is None:
            if event_type in TRIED_ONCE:
                return False
        elif event_type != self.event_type:
            return False
        if self.account is not None and account != self.account:
            return False
        return self.generation_id is None or generation_id == self.generation_id

    def can_lack(self, event_type: str) -> bool:
        """Whether an endpoint that wants such events may lack a delivery: a test is of one endpoint only."""
        return event_type != TEST

    def _first(self, prefix: str) -> str:
        return first_id(prefix, self.since or 0)


@dataclass(frozen=True, slots=True)
class Found:
    """A delivery that is to be made pending, or made (`delivery_id` is None), and where it was found.

    An attempt that may still be under way lets nobody take it before `ready_at`."""

    position: str
    event_id: str
    delivery_id: str | None
    endpoint_id: str | None
    destination: str
    ready_at: int = 0


@dataclass(frozen=True, slots=True)
class Replay:
    """A replay as it stands: `done` of about `total` deliveries are pending again, or were. `rate_limit` is
    how many a second each destination gets, `paced_at` until when it is used up."""

    id: str
    selection: Selection
    rate_limit: float
    status: Status
    total: int
    done: int
    position: str
    paced_at: int
    created_at: int
    updated_at: int
    ended_at: int | None = None
    error: str | None = None

    @property
    def name(self) -> str:
        """Whose shard decides which relay goes on with it."""
        return self.selection.endpoint_id or self.id

    def allowance(self, now: int) -> int:
        """How many each destination may get now; what is not used within a second is lost."""
        unused = now - self._paced_at(now)
        # Of a slow one the product may come out just below 1, however long it waits.
        return max(math.floor(unused * self.rate_limit / _SECOND), int(unused >= self._pause))

    def paced(self, count: int, now: int) -> int:
        """`paced_at` once a destination got so many."""
        return self._paced_at(now) + math.ceil(count * _SECOND / self.rate_limit)

    @property
    def _pause(self) -> int:
        return math.ceil(_SECOND / self.rate_limit)

    def _paced_at(self, now: int) -> int:
        most = max(_SECOND, self._pause)
        # What lies further ahead than can be is from before the clock was set back.
        return now - most if self.paced_at > now + most else min(max(self.paced_at, now - most), now)


def is_of_delivery(position: str) -> bool:
    """Whether it is among deliveries, not among events."""
    return position.startswith("dlv_")


def choose(
    found: Sequence[Found],
    given: Counter[str],
    *,
    room: int,
    most: int,
    now: int,
    crowded: Collection[str] = (),
) -> tuple[Sequence[Found], Found | None]:
    """Those that may be made pending now, and the first one that may not. `given` is how many each
    destination got already, and is counted on: `room` each, and `most` together; what is `crowded` gets
    nothing."""
    chosen = list[Found]()
    for one in found:
        full = one.destination in crowded or given[one.destination] >= room
        if full or given.total() >= most or one.ready_at > now:
            return chosen, one
        given[one.destination] += 1
        chosen.append(one)
    return chosen, None


def position_before(found: Sequence[Found], left: Found) -> str | None:
    """The last position that is done with where one was left; None when nothing before it was found."""
    before = None
    for one in found:
        if one.position == left.position:
            break
        before = one.position
    return before
