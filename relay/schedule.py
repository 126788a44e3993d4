"""When to ask a provider next: one pure function of what is known.

Simple on purpose: a first delay, then pauses that grow with the age of the job, so that the news is
at most a tenth of the waiting time late. Replace `next_ask` to be cleverer.
"""

from collections.abc import Callable
from dataclasses import dataclass

from relay.errors import ProviderError
from relay.generation import FINAL, Generation, LearnedBy, Status, Update

# A provider's own answer may lag behind its callback.
AFTER_CALLBACK = (1_000, 2_000, 5_000, 10_000)
LATE_PAUSE = 600_000
LATE_WATCH = 86_400_000
LONGEST_PAUSE = 60_000
LONGEST_BACKOFF = 300_000
LONGEST_RETRY_AFTER = 3_600_000
# "No such job" may only mean "not yet visible": asked again after these multiples of the interval.
MISSING_PAUSES = (1, 3, 8)


@dataclass(frozen=True, slots=True)
class Pace:
    """How often a provider wants to be asked, in milliseconds.

    `first`: from being watched to the first ask. `interval`: the shortest pause. `timeout`: until
    `timed_out`. `backstop`: the pause while a callback is awaited.
    """

    first: int
    interval: int
    timeout: int
    backstop: int = 60_000


@dataclass(frozen=True, slots=True)
class Asked:
    """How the asking of one claimed generation went, and when to ask again.

    `errors` and `missing` count asks in a row, `hint_asks` those since the last callback; `hints` is how
    many callbacks were known when it was asked.
    """

    generation_id: str
    lease: str
    at: int
    due_at: int | None
    errors: int
    missing: int
    hint_asks: int | None
    hints: int
    last_error: str | None


@dataclass(frozen=True, slots=True)
class Report:
    """What an ask brought: an update or none. `asked` says how the asking goes on, given the generation as
    it stands after the update."""

    generation_id: str
    learned_by: LearnedBy
    update: Update | None
    asked: Callable[[Generation], Asked]


def first_ask(pace: Pace, *, now: int, deadline_at: int, job_known: bool, awaits_callback: bool) -> int:
    """When a generation that is now being watched is asked about first."""
    if not job_known:
        return deadline_at
    return min(now + (pace.backstop if awaits_callback else pace.first), deadline_at)


def next_ask(
    generation: Generation, pace: Pace, *, now: int, spread: float, error: ProviderError | None = None
) -> int | None:
    """When to ask again after an ask at `now`; None when there is nothing left to learn.

    `generation` is as it stands after that ask. `spread` in [0, 1) adds up to a tenth, so that jobs
    begun together do not stay together. Never later than the deadline.
    """
    if generation.status in FINAL:
        return None
    if generation.status is Status.TIMED_OUT:
        due_at = now + max(LATE_PAUSE, pace.interval, _told_to_wait(error))
        return due_at if due_at <= generation.deadline_at + LATE_WATCH else None
    if generation.job_id is None and generation.claimed_job_id is None:
        return generation.deadline_at
    pause = _pause(generation, pace, now=now, error=error)
    return min(now + round(pause * (1 + 0.1 * spread)), max(now, generation.deadline_at))


def _told_to_wait(error: ProviderError | None) -> int:
    return min(error.retry_after or 0, LONGEST_RETRY_AFTER) if error is not None else 0


def _pause(generation: Generation, pace: Pace, *, now: int, error: ProviderError | None) -> int:
    if error is not None:
        backoff = min(pace.interval << min(generation.errors, 16), LONGEST_BACKOFF)
        return max(pace.interval, backoff, _told_to_wait(error))
    if generation.missing:
        return pace.interval * MISSING_PAUSES[min(generation.missing, len(MISSING_PAUSES)) - 1]
    if generation.hint_asks:
        return AFTER_CALLBACK[min(generation.hint_asks, len(AFTER_CALLBACK)) - 1]
    if generation.awaits_callback:
        return max(pace.backstop, pace.interval)
    age = now - generation.created_at
    return max(pace.interval, min(age // 10, LONGEST_PAUSE))
