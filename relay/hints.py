"""When a callback has its generation asked about: calling back is cheap, and asking spends a budget.

Whoever has a callback URL may call it for ever, so a generation's callbacks have it asked at ever longer
pauses, and those of one account share half of its requests. What comes too often is late, never lost.
"""

from relay.schedule import AFTER_CALLBACK, called_interval

LONGEST_PAUSE = 60_000
# Requests a minute, where an account has no limit.
PER_MINUTE = 60
LONGEST_WAIT = 600_000


class Turns:
    """The turns of one account's callbacks: half of `per_minute` at once, and evenly as many a minute; where
    there are several `relays`, each has its part of that. `interval` is the shortest pause between two asks
    about one job, in milliseconds."""

    def __init__(self, per_minute: int | None, interval: int = 0) -> None:
        self.per_minute, self.interval, self.relays = per_minute, interval, 1
        half = (per_minute or PER_MINUTE) / 2
        self._pause = 60_000 / half
        self._burst = self._pause * (max(1, int(half)) - 1)
        self._next = 0.0

    def first(self, now: int) -> int:
        """When the next turn is, `now` or later."""
        return max(now, int(self._ahead(now) - self._burst))

    def take(self, now: int) -> None:
        """Takes that turn."""
        self._next = self._ahead(now) + self._pause * self.relays

    def _ahead(self, now: int) -> float:
        # What is booked further ahead was booked before the clock was set back.
        return min(max(self._next, now), now + self._burst + LONGEST_WAIT)


def pause(callbacks: int, interval: int) -> int:
    """Milliseconds from the last ask to the one that the last of so many callbacks may bring; `interval` is
    the shortest that the provider wants."""
    return max(min(1_000 * callbacks * callbacks, LONGEST_PAUSE), called_interval(interval))


def hint_asks(callbacks: int) -> int:
    """Where the quick asks begin after the last of so many callbacks: the first has them all."""
    return min(callbacks - 1, len(AFTER_CALLBACK))


def ask_at(
    planned: int | None, asked_at: int | None, callbacks: int, turns: Turns | None, *, now: int
) -> int | None:
    """When to ask after the last of so many callbacks; never later than planned.

    Takes a turn when that is sooner than planned; without `turns` there is no limit.
    """
    at = now if turns is None else turns.first(now)
    if asked_at is not None:
        at = max(at, asked_at + pause(callbacks, turns.interval if turns is not None else 0))
    if planned is not None and planned <= at:
        return planned
    if turns is not None:
        turns.take(now)
    return at
