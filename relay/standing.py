"""How an account stands: what it may ask, how its provider is, and what its jobs have taught."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from relay.budget import AT_ONCE, Budget
from relay.durations import Experience, Plan, Seen, log_normal
from relay.generation import FINAL, OPEN, Generation
from relay.health import Health, Status
from relay.schedule import Pace

# With nothing to expect, so many ends must have been seen before anything is made of them.
ENOUGH = 20
_ANYTHING = (30_000, 2.0)
# A deadline is put off for outages by no more than this.
LONGEST_OUTAGE = 86_400_000
# A provider's clock, and ours, may be wrong by so much.
TOLERANCE = 5_000


@dataclass(slots=True)
class Standing:
    """One account's requests, health and experience."""

    pace: Pace
    budget: Budget
    health: Health = field(default_factory=Health)
    under_way: int = 0
    lent: int = 0  # so many requests are booked for others to make
    lent_at: int = 0  # when all was well between lender and borrowers
    short: bool = False  # more was due than might be asked, at the last look
    experience: Experience = field(init=False)

    def __post_init__(self) -> None:
        self.experience = Experience(log_normal(*(self.pace.typical or _ANYTHING)))

    def room(self, now: int) -> int:
        """How many jobs may be asked about now: one at a time while the provider is only probed."""
        if not self.health.may_ask(now):
            return 0
        most = AT_ONCE if self.health.status is Status.OK else 1
        return max(0, min(most - self.under_way, self.budget.available(now)))

    def wait(self, now: int) -> int:
        """Milliseconds until a request may be made."""
        paused = 0 if self.health.may_ask(now) else self.health.paused_until - now
        return max(self.budget.wait(now), paused)

    def plan(self, generation: Generation | None = None) -> Plan | None:
        """What is known of how long a job takes; None when that is nothing."""
        if self.pace.typical is None and self.experience.count < ENOUGH:
            return None
        return self.experience.plan(_model(generation) if generation is not None else None)

    def learn(self, generation: Generation) -> None:
        """From a generation that has ended at the provider."""
        seen = how_long(generation)
        if seen is not None:
            self.experience.learn(_model(generation), seen)

    def is_excused(self, now: int) -> bool:
        """Whether deadlines of its generations wait until it can be asked again."""
        since = self.health.failing_since
        is_out = self.health.status is not Status.OK
        return is_out and since is not None and now - since < LONGEST_OUTAGE

    def excuse(self, generation: Generation, *, now: int) -> Generation:
        """The generation with its deadline put off by as long as the account could not be asked."""
        outage = min(self.health.outage(generation.created_at, now), LONGEST_OUTAGE)
        more = outage - generation.outage
        if more <= 0 or generation.status not in OPEN:
            return generation
        return replace(generation, deadline_at=generation.deadline_at + more, outage=outage)

    def kept(self) -> dict[str, Any]:
        """What must survive a restart; the experience is learned anew from the generations."""
        return {"budget": self.budget.kept(), "health": self.health.kept()}

    def resume(self, kept: Mapping[str, Any]) -> None:
        self.budget.resume(kept.get("budget", {}))
        self.health = Health.resumed(kept.get("health", {}))

    def observe(self, kept: Mapping[str, Any], lent: int) -> None:
        """As another relay, which asks with it, has written it down."""
        self.resume(kept)
        self.health = replace(self.health, paused_until=kept.get("health", {}).get("paused_until", 0))
        self.lent = lent


def how_long(generation: Generation) -> Seen | None:
    """How long an ended job took: as its provider says, where that can be, else between two asks."""
    update, known_at, start = generation.update, generation.known_at, generation.started_at
    if generation.status not in FINAL or update is None or known_at is None or update.is_missing:
        return None
    low = max(0, generation.open_at - start) if generation.open_at is not None else 0
    high = known_at - start
    told = update.duration_ms
    if told is None and update.completed_at is not None and update.created_at is not None:
        told = update.completed_at - update.created_at
    if told is not None and low - TOLERANCE <= told <= high + TOLERANCE and told > 0:
        return Seen(told, told)
    return Seen(low, high) if low < high else None


def _model(generation: Generation) -> str | None:
    update = generation.update
    return (update.model or update.kind) if update is not None else None
