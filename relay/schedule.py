"""When to ask a provider next: one pure function of what is known.

What is known is how long such jobs take (`relay.durations`), how old this one is, what the provider says of
its progress, how scarce the account's requests are now, and the pauses that its documentation asks for.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from relay.durations import Plan
from relay.errors import ProviderError
from relay.generation import FINAL, Generation, LearnedBy, Status, Update

# A request may cost so much lag, as a share of how long such jobs take: six requests to learn of an end five
# hundredths of the duration late, when durations vary by a third.
PRICE = 0.01
# A provider's own answer may lag behind its callback.
AFTER_CALLBACK = (1_000, 2_000, 5_000, 10_000)
# Who wants polls to be rare still wants a callback to be confirmed: then no pause need be longer than this.
LONGEST_INTERVAL = 10_000
LATE_PAUSE = 600_000
LATE_WATCH = 86_400_000
LONGEST_PAUSE = 60_000
LONGEST_BACKOFF = 60_000
LONGEST_RETRY_AFTER = 3_600_000
# "No such job" may only mean "not yet visible": believed when it was said again after these pauses.
MISSING_PAUSES = (5_000, 15_000, 45_000)
# How likely a job has ended whose provider has called back, as a cumulative hazard.
CALLED = 7.0
# Jobs that are begun together do not stay together: a pause is up to a twentieth shorter or longer.
SPREAD = 0.05
# While nobody knows how long such jobs take, the news is at most this share of their age late.
UNKNOWN_SHARE = 0.1
# What a provider says of the progress may make a pause so many times longer or shorter.
HINT_REACH = 4.0
# The least that is expected of a job, in ends per millisecond: nobody is put off for ever.
LEAST_RATE = 1e-7


@dataclass(frozen=True, slots=True)
class Pace:
    """How a provider wants to be asked, in milliseconds.

    `interval`: the shortest pause. `timeout`: until `timed_out`. `backstop`: the pause while a callback is
    awaited. `typical`: the median and the sigma (log-normal) that its jobs are expected to take, None when
    nothing is expected.
    """

    interval: int
    timeout: int
    backstop: int = 60_000
    typical: tuple[int, float] | None = None


@dataclass(frozen=True, slots=True)
class Ask:
    """When to ask, None for never; how likely the job has ended by then (as a cumulative hazard: 0.7 is
    evens), and by how much that grows with each millisecond after."""

    due_at: int | None
    chance: float = 0.0
    rate: float = LEAST_RATE


@dataclass(frozen=True, slots=True)
class Asked:
    """How the asking of one claimed generation went, and when to ask again.

    `errors` and `missing` count asks in a row, `hint_asks` those since the last callback; `hints` is how
    many callbacks were known when it was asked. `open_at` is when the job was last seen not to have ended;
    `outage` how much of the time until `deadline_at` is owed to outages; `hinted_at` when to ask if a
    callback came meanwhile.
    """

    generation_id: str
    lease: str
    at: int
    due_at: int | None
    chance: float
    rate: float
    open_at: int | None
    deadline_at: int
    outage: int
    errors: int
    missing: int
    hint_asks: int | None
    hints: int
    hinted_at: int
    last_error: str | None


@dataclass(frozen=True, slots=True)
class Report:
    """What an ask brought: an update or none. `asked` says how the asking goes on, given the generation as
    it stands after the update."""

    generation_id: str
    learned_by: LearnedBy
    update: Update | None
    asked: Callable[[Generation], Asked]


def first_ask(
    pace: Pace, plan: Plan | None, *, now: int, deadline_at: int, job_known: bool, awaits_callback: bool
) -> Ask:
    """When a generation that is now being watched is asked about first."""
    pause: float
    if not job_known:
        pause = deadline_at - now
    elif awaits_callback:
        pause = max(pace.backstop, pace.interval)
    else:
        pause = max(pace.interval, plan.next_look(0, _price(plan, 1.0)) if plan is not None else 0)
    return _likely(plan, min(now + round(pause), deadline_at), 0, pause)


def next_ask(
    generation: Generation,
    pace: Pace,
    plan: Plan | None,
    *,
    now: int,
    spread: float,
    scarcity: float = 1.0,
    heard: Update | None = None,
    error: ProviderError | None = None,
) -> Ask:
    """When to ask again after an ask at `now`.

    `generation` is as it stands after that ask, which brought `heard` or `error`. `plan` is None while nobody
    knows how long such jobs take; `scarcity`, at least 1, makes asks that much rarer. `spread` in [0, 1)
    makes a pause up to a twentieth shorter or longer, so that jobs begun together do not stay together, but
    never shorter than the documented one. Never later than the deadline, never None before it.
    """
    if generation.status in FINAL:
        return Ask(None)
    is_known = generation.job_id is not None or generation.claimed_job_id is not None
    if generation.status is Status.TIMED_OUT:
        if not is_known:
            return Ask(None)  # only a callback can say more
        due_at = now + max(LATE_PAUSE, pace.interval, _told_to_wait(error))
        # Later than the deadline where nobody was there to see it pass.
        watched_from = max(generation.deadline_at, generation.known_at or 0)
        return Ask(due_at if due_at <= watched_from + LATE_WATCH else None)
    if not is_known:
        return Ask(generation.deadline_at)
    age = max(0, now - generation.started_at)
    if heard is not None and heard.elapsed_ms is not None:
        age = heard.elapsed_ms
    pause = _pause(generation, pace, plan, age=age, scarcity=scarcity, heard=heard, error=error)
    shortest = called_interval(pace.interval) if generation.hint_asks else pace.interval
    pause = max(shortest, _told_to_wait(error), pause * (1 - SPREAD + 2 * SPREAD * spread))
    due_at = min(now + round(pause), max(now, generation.deadline_at))
    likely = _likely(plan, due_at, age, pause)
    return replace(likely, chance=CALLED) if generation.hint_asks else likely


def called_interval(interval: int) -> int:
    """The shortest pause between two asks about a job whose provider has called back."""
    return min(interval, LONGEST_INTERVAL)


def sightings(generation: Generation, *, now: int) -> int:
    """How many times in a row "no such job" has been said, with this time. One that comes before its pause is
    over, because a user or a callback made Relay ask, is none more: it says nothing new."""
    seen = generation.missing
    if seen and generation.asked_at is not None:
        pause = MISSING_PAUSES[min(seen, len(MISSING_PAUSES)) - 1] * (1 - SPREAD)
        if now < generation.asked_at + int(pause):
            return seen
    return seen + 1


def _told_to_wait(error: ProviderError | None) -> int:
    return min(error.retry_after or 0, LONGEST_RETRY_AFTER) if error is not None else 0


def _pause(
    generation: Generation,
    pace: Pace,
    plan: Plan | None,
    *,
    age: int,
    scarcity: float,
    heard: Update | None,
    error: ProviderError | None,
) -> float:
    if error is not None:
        backoff = min(pace.interval << min(generation.errors, 16), max(pace.interval, LONGEST_BACKOFF))
        return backoff
    if generation.missing:
        return max(pace.interval, MISSING_PAUSES[min(generation.missing, len(MISSING_PAUSES)) - 1])
    if generation.hint_asks:
        return AFTER_CALLBACK[min(generation.hint_asks, len(AFTER_CALLBACK)) - 1]
    if generation.awaits_callback:
        return max(pace.backstop, pace.interval)
    if plan is None:
        pause = scarcity * max(pace.interval, min(age * UNKNOWN_SHARE, LONGEST_PAUSE))
    else:
        pause = plan.next_look(age, _price(plan, scarcity)) - age
        if age > plan.median:
            pause = min(pause, scarcity * max(LONGEST_PAUSE, plan.median / 4))
    return _hinted(pause, heard, age)


def _hinted(pause: float, update: Update | None, age: int) -> float:
    """The pause, as the provider's own word of what is left suggests: half of that, within HINT_REACH."""
    left = _left(update, age)
    if left is None:
        return pause
    return min(max(left / 2, pause / HINT_REACH), pause * HINT_REACH)


def _left(update: Update | None, age: int) -> float | None:
    """How much longer the provider says the job takes; None when it says nothing one can go by."""
    if update is None:
        return None
    if update.remaining_ms is not None:
        return update.remaining_ms
    if update.progress is not None and 0.05 <= update.progress <= 1:
        return age * (1 - update.progress) / update.progress
    return None


def _price(plan: Plan, scarcity: float) -> float:
    # Requests go with one over the square root of their price.
    return PRICE * plan.median * scarcity**2


def _likely(plan: Plan | None, due_at: int, age: float, pause: float) -> Ask:
    """An ask after a pause that begins at this age, with how likely it finds the end."""
    if plan is None:
        return Ask(due_at, pause / (age + pause + 1), 1 / (age + pause + 1))
    then = age + pause
    soon = max(pause, plan.median / 2)
    chance, more = _hazard(plan, age, then), _hazard(plan, then, then + soon)
    return Ask(due_at, chance, max(LEAST_RATE, more / soon))


def _hazard(plan: Plan, age: float, later: float) -> float:
    return -math.log(max(1 - plan.ended_since(age, later), 1e-6))
