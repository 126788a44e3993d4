"""How much an endpoint may be sent now, by how its answers went: one pure value per endpoint.

    closed ──5 failures in a row──► open ──time──► half-open ──success──► closed, ramping up
                                     ▲                └──failure──┐
                                     └────────────────────────────┘  (twice as long)

Failures are what says that the endpoint is unwell: the network, time-outs, 5xx. Apart from that a
`Retry-After`, a 429, 502, 503 or 504 pauses the endpoint for a while. Times are milliseconds.
"""

from dataclasses import dataclass, replace
from enum import StrEnum

from relay.delivery import LONGEST_RETRY_AFTER, Answer, Code

THRESHOLD = 5
FIRST_PAUSE, LONGEST_PAUSE = 30_000, 900_000
FIRST_THROTTLE, LONGEST_THROTTLE = 1_000, 60_000
SLOW, SLOTS_WHEN_SLOW = 5_000, 2
SPREAD = 0.2
_THROTTLING = frozenset({429, 502, 503, 504})
_UNWELL = frozenset({Code.TIMEOUT, Code.DNS, Code.CONNECT, Code.TLS, Code.DISCONNECTED, Code.BAD_RESPONSE})


class State(StrEnum):
    CLOSED = "closed"  # as many as ever
    OPEN = "open"  # unwell: nothing is sent
    HALF_OPEN = "half_open"  # one is sent, to see
    RECOVERING = "recovering"  # well again: more and more are sent
    PAUSED = "paused"  # it asked for less: nothing is sent for a while


@dataclass(frozen=True, slots=True)
class Breaker:
    """`failures` in a row, `trips` since the last success, `throttles` in a row; nothing is sent before
    `paused_until`. `allowance` is how many may be in flight while it recovers, None for as many as ever.
    `latency` is a moving average."""

    failures: int = 0
    trips: int = 0
    throttles: int = 0
    paused_until: int = 0
    allowance: int | None = None
    latency: float | None = None

    def state(self, now: int) -> State:
        """How it is now, in one word."""
        if now < self.paused_until:
            return State.OPEN if self.trips else State.PAUSED
        if self.trips:
            return State.HALF_OPEN
        return State.CLOSED if self.allowance is None else State.RECOVERING

    def slots(self, now: int, most: int) -> int:
        """How many attempts may be in flight at once now, of at most `most`."""
        if now < self.paused_until:
            return 0
        if self.trips and self.allowance is None:
            return 1
        if self.latency is not None and self.latency > SLOW:
            most = min(most, SLOTS_WHEN_SLOW)
        return most if self.allowance is None else min(most, self.allowance)

    def after(self, answer: Answer, *, now: int, most: int, spread: float) -> "Breaker":
        """After an answer at `now`; `spread` in [0, 1) makes a pause up to a fifth longer."""
        latency = (
            answer.duration_ms if self.latency is None else 0.8 * self.latency + 0.2 * answer.duration_ms
        )
        known = replace(self, latency=latency)
        if answer.accepted:
            return known._recovered(most)._throttled(answer, now, spread)
        if _is_unwell(answer):
            known = replace(known, failures=self.failures + 1)
            if known.failures >= THRESHOLD or self.trips:
                known = known._tripped(now, spread)
        else:
            known = replace(known, failures=0)
        return known._throttled(answer, now, spread)

    def _recovered(self, most: int) -> "Breaker":
        allowance = self.allowance
        if self.trips:
            allowance = 1
        if allowance is not None:
            allowance = allowance * 2 if allowance * 2 < most else None
        return replace(self, failures=0, trips=0, throttles=0, allowance=allowance)

    def _tripped(self, now: int, spread: float) -> "Breaker":
        if self.trips and now < self.paused_until:
            # An attempt that was in flight when it opened says nothing new.
            return self
        pause = min(FIRST_PAUSE << min(self.trips, 16), LONGEST_PAUSE)
        return replace(
            self,
            trips=self.trips + 1,
            allowance=None,
            paused_until=max(self.paused_until, now + round(pause * (1 + SPREAD * spread))),
        )

    def _throttled(self, answer: Answer, now: int, spread: float) -> "Breaker":
        told = min(answer.retry_after or 0, LONGEST_RETRY_AFTER)
        if not told and (answer.status not in _THROTTLING or now < self.paused_until):
            # What was in flight when the pause began says nothing new.
            return self
        pause = min(FIRST_THROTTLE << min(self.throttles, 16), LONGEST_THROTTLE)
        until = now + max(told, round(pause * (1 + SPREAD * spread)))
        return replace(self, throttles=self.throttles + 1, paused_until=max(self.paused_until, until))


def _is_unwell(answer: Answer) -> bool:
    return answer.code in _UNWELL or (answer.status is not None and answer.status >= 500)
