"""The lane of one destination: what of its deliveries is in memory, and how much of it may be sent now."""

from collections import deque
from dataclasses import dataclass, field

from relay.breaker import Breaker
from relay.delivery import Claimed, Trigger

# In memory at most, of one lane.
HELD_PER_LANE = 512
# A lane holds what it can send within so many milliseconds, so that leases do not run out in it.
AHEAD = 10_000
UNKNOWN_LATENCY = 500
# A lane that must wait longer than this gives back what it holds.
PATIENCE = 2_000
# Endpoints that have not answered well of late share half of all slots, and each has few of them once a
# quarter of that half is taken.
OVERDUE, UNPROVEN_SLOTS = 1_000, 2
# While fresh work waits, one in so many of a lane's attempts is a retry.
RETRIES_TURN = 5


@dataclass(slots=True)
class Lane:
    """The deliveries to one destination that are in memory, and how it is."""

    fresh: deque[Claimed] = field(default_factory=deque)
    retries: deque[Claimed] = field(default_factory=deque)
    sending: int = 0
    unsettled: int = 0  # in flight, or answered and not yet written
    breaker: Breaker = field(default_factory=Breaker)
    ready: bool = False  # in the ring of those whose turn comes, or waiting for a moment
    backlog: bool = False  # more of it is due in the store
    well: bool | None = None  # how its last attempt went; None when only the store may know
    begun: dict[str, float] = field(default_factory=dict)  # when the attempts in flight began, oldest first
    turn: int = 0
    rate_limit: float | None = None
    next_at: float = 0.0  # when its rate limit allows the next attempt

    @property
    def waiting(self) -> int:
        return len(self.fresh) + len(self.retries)

    @property
    def held(self) -> int:
        return self.waiting + self.sending

    def is_proven(self, now: float) -> bool:
        """Whether its last answer was good and none is overdue: only then it may take many slots."""
        return self.well is True and now - next(iter(self.begun.values()), now) < OVERDUE

    def slots(self, now: int, most: int, *, crowded: bool) -> int:
        """How many may be in flight at once; `crowded` says that many are whose endpoints may hang."""
        slots = self.breaker.slots(now, most)
        return min(slots, UNPROVEN_SLOTS) if crowded and not self.is_proven(now) else slots

    def room(self, now: int, most: int) -> int:
        """How many more it may hold: what it sends within AHEAD; negative when it holds too many."""
        slots = self.breaker.slots(now, most)
        if slots == 0 or self.next_at > now + PATIENCE:
            return -self.held
        if self.breaker.trips:
            return 1 - self.held
        latency = max(1.0, UNKNOWN_LATENCY if self.breaker.latency is None else self.breaker.latency)
        room = min(HELD_PER_LANE, max(2 * slots, round(slots * AHEAD / latency)))
        if self.rate_limit is not None:
            room = min(room, max(1, round(self.rate_limit * PATIENCE / 1000)))
        return room - self.held

    def room_for_fresh(self, now: int, most: int) -> int:
        """The same for what is told for the first time: that does not wait until what is tried or told again
        has made room."""
        return self.room(now, most) + len(self.retries)

    def passes(self, now: int, most: int) -> int:
        """For how many there is room that are told for the first time, beyond `room`: where what is replayed
        waits in the store too, they are behind it."""
        if not any(one.trigger is Trigger.REPLAY for one in self.retries):
            return 0
        return max(0, min(len(self.retries), self.room_for_fresh(now, most)))

    def is_idle(self, now: int, most: int) -> bool:
        """Whether forgetting it loses nothing."""
        healthy = self.breaker.slots(now, most) == most and not self.breaker.failures
        return not self.held and not self.unsettled and healthy and not self.backlog and self.next_at <= now

    def put(self, one: Claimed) -> None:
        (self.retries if one.is_retry else self.fresh).append(one)

    def take(self, *, retries_allowed: bool) -> Claimed | None:
        self.turn += 1
        its_turn = not self.fresh or self.turn % RETRIES_TURN == 0
        if self.retries and retries_allowed and its_turn:
            return self.retries.popleft()
        return self.fresh.popleft() if self.fresh else None
