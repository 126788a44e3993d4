"""A delivery is one event on its way to one endpoint.

pending ──claim──► sending ──2xx──────────► delivered
   ▲                  ├──retry later──► pending
   │                  └──refused / attempts exhausted──► failed
   ├── replay ── delivered | failed | canceled
pending | sending ── endpoint disabled or deleted, or the event outdated ──► canceled
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from urllib.parse import urlsplit


class Status(StrEnum):
    PENDING = "pending"  # due at `due_at`
    SENDING = "sending"  # claimed; due again when the lease runs out
    DELIVERED = "delivered"  # the endpoint answered 2xx
    FAILED = "failed"  # the endpoint refused, or the attempts ran out
    CANCELED = "canceled"  # the endpoint was disabled or deleted, or a newer event took its event's place


MOVES: Mapping[Status, frozenset[Status]] = {
    Status.PENDING: frozenset({Status.SENDING, Status.CANCELED}),
    Status.SENDING: frozenset({Status.DELIVERED, Status.PENDING, Status.FAILED, Status.CANCELED}),
    Status.DELIVERED: frozenset({Status.PENDING}),
    Status.FAILED: frozenset({Status.PENDING}),
    Status.CANCELED: frozenset({Status.PENDING}),
}


class Trigger(StrEnum):
    SCHEDULED = "scheduled"  # fresh, or retried on the schedule
    REPLAY = "replay"  # somebody asked for it


class Code(StrEnum):
    """Why an attempt was not accepted."""

    HTTP_STATUS = "http_status"  # an answer, but not 2xx
    REDIRECT = "redirect"  # 3xx, never followed
    TIMEOUT = "timeout"  # no whole answer within the deadline
    DNS = "dns"  # the name could not be looked up
    CONNECT = "connect"  # no connection
    TLS = "tls"  # no trusted connection
    DISCONNECTED = "disconnected"  # the connection ended before the answer did
    BAD_RESPONSE = "bad_response"  # not HTTP
    BLOCKED_ADDRESS = "blocked_address"  # the guard refused: never retried
    INTERNAL = "internal"  # a fault of Relay's own


def destination(tenant: str, endpoint_id: str | None, callback_url: str | None) -> str:
    """What shares one queue, one breaker and one limit: an endpoint, or the host of a tenant's callback URLs.
    What a host answers to one tenant slows no other."""
    return endpoint_id or f"callback:{tenant}:{urlsplit(callback_url or '').netloc}"


LONGEST_RETRY_AFTER = 86_400_000
JITTER = 0.2


@dataclass(frozen=True, slots=True)
class Answer:
    """The outcome of one attempt, whatever it was. `retry_after` in milliseconds; `body` an excerpt."""

    started_at: int
    duration_ms: int
    status: int | None = None
    body: str | None = None
    code: Code | None = None
    message: str | None = None
    retry_after: int | None = None

    @property
    def accepted(self) -> bool:
        return self.code is None and self.status is not None and 200 <= self.status <= 299


@dataclass(frozen=True, slots=True)
class Claimed:
    """A delivery in the hands of this process until `lease_until`, with all that an attempt needs.

    `attempts` were made in all, `run_attempts` of them since the delivery last became pending afresh.
    `endpoint_id` is None for a generation's `callback_url`. `event_at` is when its event was stored.
    """

    id: str
    event_id: str
    event_type: str
    endpoint_id: str | None
    destination: str
    url: str
    secrets: Sequence[str] = field(repr=False)
    body: bytes
    attempts: int
    run_attempts: int
    trigger: Trigger
    lease: str
    lease_until: int
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    rate_limit: float | None = None  # attempts a second
    expires_at: int | None = None  # when the first URL in the body stops to work
    generation_id: str | None = None
    event_at: int = 0
    is_replayed: bool = False  # a replay made it pending, now or before

    @property
    def is_retry(self) -> bool:
        """Whether it has been tried, or told, before."""
        return self.run_attempts > 0 or self.trigger is Trigger.REPLAY


@dataclass(frozen=True, slots=True)
class Settlement:
    """What an attempt did to its delivery; written in one go, and only while the lease is still held."""

    delivery_id: str
    lease: str
    number: int
    trigger: Trigger
    answer: Answer
    status: Status
    due_at: int | None
    disable_endpoint: str | None = None
    endpoint_id: str | None = None
    event_id: str | None = None
    endpoint_is_well: bool | None = None


def settle(
    claimed: Claimed,
    answer: Answer,
    *,
    schedule: Sequence[int],
    now: int,
    spread: float,
    endpoint_is_well: bool | None = None,
) -> Settlement:
    """The move that an answer makes. `schedule` holds the pauses in milliseconds; `spread` in [0, 1)
    adds up to a fifth to a pause, never takes from it. `endpoint_is_well` is passed on when it is news."""
    status, due_at, disable = Status.FAILED, None, None
    if answer.accepted:
        status = Status.DELIVERED
    elif answer.status == 410:
        disable = claimed.endpoint_id
    elif answer.code is not Code.BLOCKED_ADDRESS and claimed.run_attempts < len(schedule):
        pause = round(schedule[claimed.run_attempts] * (1 + JITTER * spread))
        status = Status.PENDING
        due_at = now + max(pause, min(answer.retry_after or 0, LONGEST_RETRY_AFTER))
    return Settlement(
        delivery_id=claimed.id,
        lease=claimed.lease,
        number=claimed.attempts + 1,
        trigger=claimed.trigger,
        answer=answer,
        status=status,
        due_at=due_at,
        disable_endpoint=disable,
        endpoint_id=claimed.endpoint_id,
        event_id=claimed.event_id,
        endpoint_is_well=endpoint_is_well,
    )
