"""How many requests an account may make: its documented limits, and what the provider says of them."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from relay.times import parse_retry_after

MINUTE, DAY = 60_000, 86_400_000
# Of an account without a limit, so many at once; also what a provider that hangs can hold.
AT_ONCE = 32
# So much of a limit is left to whoever else uses the credential.
SPARED = 0.1
FIRST_THROTTLE, LONGEST_THROTTLE = 5_000, 300_000
LONGEST_TOLD = 3_600_000
# Two windows of a limit end at least so far apart.
WINDOWS_DIFFER = 2_000
SCARCEST = 4.0
# In the first tenth of a day nobody can tell whether its requests will last.
EARLY = 0.1
# A reset that is given as a time, not as a number of seconds, is a larger number than this.
_EPOCH_SECONDS, _EPOCH_MILLISECONDS = 1e9, 1e11


@dataclass(slots=True)
class Budget:
    """The requests of one account; all times are unix milliseconds, all limits may be None.

    `per_minute` is spread evenly but for a burst of a tenth of it; `per_day` is spread over what is left of
    the day once half of it is used. `left` is what the provider said may still be asked before `left_until`.
    """

    per_minute: int | None = None
    per_day: int | None = None
    next_at: float = 0.0
    day_ends_at: int = 0
    used_today: int = 0
    paused_until: int = 0
    throttles: int = 0  # answers 429 in a row
    left: int = 0
    left_until: int = 0

    @property
    def is_limited(self) -> bool:
        return self.per_minute is not None or self.per_day is not None

    def available(self, now: int) -> int:
        """How many requests may be made at once now."""
        self._mind_the_clock(now)
        if now < self.paused_until:
            return 0
        left = self._left_today(now)
        if now < self.left_until:
            left = min(left, self.left)
        pause = self._pause(now)
        if not pause:
            return min(AT_ONCE, left)
        spare = self._burst() - max(0.0, self.next_at - now)
        return min(left, max(0, int(spare / pause + 1)))

    def take(self, now: int) -> None:
        """Books one request."""
        if now >= self.day_ends_at:
            self.day_ends_at, self.used_today = now + DAY, 0
        self.used_today += 1
        self.left = max(0, self.left - 1)
        self.next_at = max(self.next_at, now) + self._pause(now)

    def wait(self, now: int) -> int:
        """Milliseconds until a request may be made."""
        if self.available(now):
            return 0
        wait = max(1, self.paused_until - now, math.ceil(self.next_at - now - self._burst()))
        if not self.left:
            wait = max(wait, self.left_until - now)
        return wait if self._left_today(now) else max(wait, self.day_ends_at - now)

    def hear(self, status: int, headers: Mapping[str, str], now: int) -> None:
        """What an answer says of the limits: 429, `Retry-After`, `X-RateLimit-*` (names in lower case)."""
        told = min(parse_retry_after(headers.get("retry-after"), now) or 0, LONGEST_TOLD)
        if status == 429:
            if now >= self.paused_until:
                self.throttles += 1
            pause = min(FIRST_THROTTLE << min(max(self.throttles - 1, 0), 16), LONGEST_THROTTLE)
            told = told or pause
        elif 200 <= status <= 299:
            self.throttles = 0
        if told:
            self.paused_until = max(self.paused_until, now + told)
        self._count_down(headers, now)

    def scarcity(self, now: int) -> float:
        """How much rarer asks should be for the day's requests to last: 1 is not at all."""
        if self.per_day is None or now >= self.day_ends_at:
            return 1.0
        passed = max(1 - (self.day_ends_at - now) / DAY, EARLY)
        return min(max(self.used_today / self.per_day / passed, 1.0), SCARCEST)

    def left_today(self, now: int) -> int | None:
        """What is left of `per_day`; None where that is not limited."""
        if self.per_day is None:
            return None
        return max(0, self.per_day - (self.used_today if now < self.day_ends_at else 0))

    def kept(self) -> dict[str, Any]:
        """What must survive a restart."""
        return {name: value for name, value in asdict(self).items() if not name.startswith("per_")}

    def resume(self, kept: Mapping[str, Any]) -> None:
        """Goes on as it was when `kept` was written."""
        for name in self.kept():
            setattr(self, name, kept.get(name, getattr(self, name)))

    def _count_down(self, headers: Mapping[str, str], now: int) -> None:
        """Takes the provider's word for how many requests are left, and until when."""
        remaining, reset = _number(headers, "remaining"), _number(headers, "reset")
        if remaining is None or (reset is None and "x-ratelimit-reset" in headers):
            return
        if reset is None:
            until = float(now + MINUTE)
        elif reset > _EPOCH_MILLISECONDS:
            until = reset
        else:
            until = reset * 1000 if reset > _EPOCH_SECONDS else now + reset * 1000
        until = min(until, now + LONGEST_TOLD)
        # Answers overtake each other: within one window the least is right.
        same = now < self.left_until and until < self.left_until + WINDOWS_DIFFER
        self.left = min(self.left, int(remaining)) if same else int(min(remaining, 1e9))
        self.left_until = round(until)

    def _left_today(self, now: int) -> int:
        """How many of the day's requests may be made before those that are left are spread."""
        if self.per_day is None:
            return AT_ONCE
        used = self.used_today if now < self.day_ends_at else 0
        return self.per_day // 2 + 1 - used if used * 2 <= self.per_day else max(0, self.per_day - used)

    def _pause(self, now: int) -> float:
        pause = MINUTE / (self.per_minute * (1 - SPARED)) if self.per_minute else 0.0
        if self.per_day is not None and now < self.day_ends_at and self.used_today * 2 > self.per_day:
            pause = max(pause, (self.day_ends_at - now) / max(1, self.per_day - self.used_today))
        return pause

    def _burst(self) -> float:
        """By how many milliseconds requests may be early, whatever the day's requests are spread over."""
        return MINUTE / (1 - SPARED) * max(0.0, SPARED - 1 / self.per_minute) if self.per_minute else 0.0

    def _mind_the_clock(self, now: int) -> None:
        """What lies further ahead than can be is from before the clock was set back."""
        self.paused_until = min(self.paused_until, now + LONGEST_TOLD)
        self.day_ends_at = min(self.day_ends_at, now + DAY)
        self.left_until = min(self.left_until, now + LONGEST_TOLD)
        self.next_at = min(self.next_at, now + max(MINUTE, self._burst() + self._pause(now)))


def _number(headers: Mapping[str, str], name: str) -> float | None:
    try:
        value = float(headers.get(f"x-ratelimit-{name}", ""))
    except ValueError:
        return None
    return value if math.isfinite(value) and value >= 0 else None
