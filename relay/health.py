"""How an account is: whether its provider answers, and takes its credential."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from enum import StrEnum
from typing import Any, Self

from relay.errors import ProviderError

# Failures in a row after which the provider counts as out of order.
THRESHOLD = 5
FIRST_PAUSE, LONGEST_PAUSE = 15_000, 300_000
# A credential that is refused is tried again so often.
REFUSED_PAUSE = 300_000
SPREAD = 0.2
_LONGEST = round(max(LONGEST_PAUSE, REFUSED_PAUSE) * (1 + SPREAD))
OUTAGES_KEPT = 50


class Status(StrEnum):
    OK = "ok"  # asked as usual
    UNAUTHORIZED = "unauthorized"  # the credential is refused; it is tried now and then
    FAILING = "failing"  # the provider is out of order; it is probed


@dataclass(frozen=True, slots=True)
class Health:
    """How an account's last requests went. Times are unix milliseconds.

    While `status` is not ok, one request is made each time `paused_until` has passed. `outages` are the
    (beginning, end) of the last times when it was not ok.
    """

    status: Status = Status.OK
    failures: int = 0
    trips: int = 0
    paused_until: int = 0
    failing_since: int | None = None
    last_error: str | None = None
    last_error_at: int | None = None
    outages: Sequence[tuple[int, int]] = ()

    def after(self, error: ProviderError | None, *, now: int, spread: float) -> Self:
        """After an ask; `spread` in [0, 1) makes a pause up to a fifth longer."""
        if error is None:
            return self._recovered(now)
        noted = replace(self, last_error=f"{error.code}: {error}", last_error_at=now)
        if error.code == "rate_limited" and self.status is Status.OK:
            return noted  # that is the budget's matter
        if error.code in ("rate_limited", "refused") and self.status is not Status.UNAUTHORIZED:
            return noted._recovered(now)  # it answers
        if error.code == "unauthorized":
            return noted._paused(Status.UNAUTHORIZED, REFUSED_PAUSE, now, spread)
        noted = replace(noted, failures=self.failures + 1, failing_since=self.failing_since or now)
        if self.status is Status.UNAUTHORIZED or noted.failures < THRESHOLD:
            return (
                noted if self.status is Status.OK else noted._paused(self.status, REFUSED_PAUSE, now, spread)
            )
        if self.status is Status.FAILING and not self.may_ask(now):
            return noted  # what was in flight when it opened says nothing new
        pause = min(FIRST_PAUSE << min(self.trips, 16), LONGEST_PAUSE)
        return noted._paused(Status.FAILING, pause, now, spread)

    def may_ask(self, now: int) -> bool:
        # A pause that ends later than can be is from before the clock was set back.
        return self.status is Status.OK or not now < self.paused_until <= now + _LONGEST

    def outage(self, since: int, until: int) -> int:
        """Milliseconds between two times in which the account could not be asked."""
        spans = list(self.outages)
        if self.status is not Status.OK:
            spans.append((self.failing_since or until, until))
        lasted, counted = 0, since
        for begin, end in sorted(spans):  # they overlap when the clock was set back
            lasted += max(0, min(end, until) - max(begin, counted))
            counted = max(counted, end)
        return lasted

    def tried_at_once(self) -> Self:
        """The same, but whether it is still so is found out now: the account is not what it was."""
        return replace(self, paused_until=0)

    def kept(self) -> dict[str, Any]:
        """What must survive a restart."""
        return asdict(self)

    @classmethod
    def resumed(cls, kept: Mapping[str, Any]) -> Self:
        """As it was when `kept` was written; a refused credential, which may be another one now, is tried at
        once. A status that another release wrote is none."""
        if kept.get("status", Status.OK) not in set(Status):
            return cls()
        known = {one.name: kept[one.name] for one in fields(cls) if one.name in kept}
        outages = tuple((begin, end) for begin, end in kept.get("outages", ()))
        health = cls(**{**known, "status": Status(kept.get("status", Status.OK)), "outages": outages})
        return health.tried_at_once() if health.status is Status.UNAUTHORIZED else health

    def _recovered(self, now: int) -> Self:
        outages = self.outages
        if self.status is not Status.OK and self.failing_since is not None:
            outages = (*outages, (self.failing_since, now))[-OUTAGES_KEPT:]
        return replace(
            self, status=Status.OK, failures=0, trips=0, paused_until=0, failing_since=None, outages=outages
        )

    def _paused(self, status: Status, pause: int, now: int, spread: float) -> Self:
        return replace(
            self,
            status=status,
            trips=self.trips + 1,
            failing_since=self.failing_since or now,
            paused_until=now + round(pause * (1 + SPREAD * spread)),
        )
