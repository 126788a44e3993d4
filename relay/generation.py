"""A generation is one job at one account that Relay watches.

queued ──► processing ──► completed | failed | canceled      (a provider may skip processing)
queued | processing ──deadline──► timed_out                  (it may still finish)
timed_out ──late answer──► completed | failed | canceled     (announced, marked late)
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, Self


class Status(StrEnum):
    QUEUED = "queued"  # the provider has not begun, as far as we know
    PROCESSING = "processing"  # the provider has begun
    COMPLETED = "completed"  # ended with at least one output
    FAILED = "failed"  # ended without; `error` says why
    CANCELED = "canceled"  # ended by somebody's wish at the provider
    TIMED_OUT = "timed_out"  # the deadline passed here; the job may still finish there


MOVES: Mapping[Status, frozenset[Status]] = {
    Status.QUEUED: frozenset(
        {Status.PROCESSING, Status.COMPLETED, Status.FAILED, Status.CANCELED, Status.TIMED_OUT}
    ),
    Status.PROCESSING: frozenset({Status.COMPLETED, Status.FAILED, Status.CANCELED, Status.TIMED_OUT}),
    Status.TIMED_OUT: frozenset({Status.COMPLETED, Status.FAILED, Status.CANCELED}),
    Status.COMPLETED: frozenset(),
    Status.FAILED: frozenset(),
    Status.CANCELED: frozenset(),
}
OPEN = frozenset({Status.QUEUED, Status.PROCESSING})
ENDINGS = frozenset(Status) - OPEN
# A provider's clock that says more is not believed.
OLDEST_JOB = 86_400_000
FINAL = frozenset(status for status, moves in MOVES.items() if not moves)


class LearnedBy(StrEnum):
    POLL = "poll"  # Relay asked on its schedule
    CALLBACK = "callback"  # a callback made Relay ask
    REFRESH = "refresh"  # a user made Relay ask
    DEADLINE = "deadline"  # nobody said: the deadline passed


class Code(StrEnum):
    """What went wrong, in the words of every provider at once."""

    CONTENT_MODERATED = "content_moderated"
    INVALID_REQUEST = "invalid_request"
    INSUFFICIENT_CREDITS = "insufficient_credits"
    RATE_LIMITED = "rate_limited"
    PROVIDER_ERROR = "provider_error"
    NOT_FOUND = "not_found"
    NO_OUTPUT = "no_output"
    TIMED_OUT = "timed_out"
    UNKNOWN = "unknown"


def is_job_id(text: str) -> bool:
    """Whether a provider's job id can be asked about: visible ASCII that stays one part of a URL's path."""
    return text not in (".", "..") and re.fullmatch(r"[\x21-\x7e]{1,255}", text) is not None


@dataclass(frozen=True, slots=True)
class Output:
    """One result; `expires_at` in unix milliseconds."""

    url: str
    kind: str | None = None
    content_type: str | None = None
    width: int | None = None
    height: int | None = None
    expires_at: int | None = None
    permanent_url: str | None = None


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a generation ended without outputs; `retryable` is None where nobody says."""

    code: Code
    message: str
    retryable: bool | None = None
    provider_code: str | None = None


@dataclass(frozen=True, slots=True)
class Update:
    """What a provider said about a generation, normalized.

    `status` is None when the provider used a word that is not in its table. Times and durations are
    milliseconds; `progress` is 0 to 1; `elapsed_ms` and `remaining_ms` are how long the
    provider says it has taken and will take; `raw` is the provider's own answer.
    """

    status: Status | None
    provider_status: str | None = None
    kind: str | None = None
    model: str | None = None
    progress: float | None = None
    outputs: tuple[Output, ...] = ()
    error: Problem | None = None
    credits: float | None = None
    created_at: int | None = None
    completed_at: int | None = None
    duration_ms: int | None = None
    elapsed_ms: int | None = None
    remaining_ms: int | None = None
    raw: Any = None

    @property
    def is_missing(self) -> bool:
        """Whether the provider says that there is no such job."""
        return self.error is not None and self.error.code is Code.NOT_FOUND


@dataclass(frozen=True, slots=True)
class Generation:
    """A watched job and how the watching goes. Times are unix milliseconds.

    `due_at` is when to ask next, None when there is nothing left to ask. `version` counts changes:
    whoever writes must have read the version before.
    """

    id: str
    tenant: str
    account: str
    provider: str
    job_id: str | None
    status: Status
    created_at: int
    deadline_at: int
    due_at: int | None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    callback_url: str | None = None
    claimed_job_id: str | None = None  # what a callback said; believed once the provider confirms it
    awaits_callback: bool = False  # the provider was given our URL, so polling is only the backstop
    update: Update | None = None  # the last news
    known_at: int | None = None  # when Relay learned the ending
    late: bool = False
    learned_by: LearnedBy | None = None
    asked_at: int | None = None
    open_at: int | None = None  # when the provider last said that it had not ended
    chance: float = 0.0  # how likely it has ended at due_at (a cumulative hazard)
    rate: float = 0.0  # by how much that grows each millisecond after
    outage: int = 0  # how much of its deadline is owed to outages, milliseconds
    asks: int = 0
    errors: int = 0  # asks in a row that brought no answer
    missing: int = 0  # asks in a row that were answered "no such job"
    hint_asks: int | None = None  # quick asks since a callback; None when there is no open hint
    hints: int = 0  # callbacks so far
    last_error: str | None = None
    progress_told: float | None = None  # what was last announced of its progress
    progress_at: int | None = None  # and when
    lease: str | None = None
    version: int = 0

    @property
    def ended(self) -> bool:
        return self.status in ENDINGS

    @property
    def started_at(self) -> int:
        """When the job began, as far as is known: it may be older than the watching of it."""
        told = self.update.created_at if self.update is not None else None
        if told is None or told < self.created_at - OLDEST_JOB:
            return self.created_at
        return min(self.created_at, told)

    def after(self, update: Update, *, now: int, learned_by: LearnedBy) -> Self | None:
        """This generation after the update, or None when the update is no news.

        Endings are sticky; a status never moves but along MOVES; `completed` without an output is
        `failed` with code `no_output`.
        """
        if self.status in FINAL:
            return None
        update = _with_its_output(update)
        if self.status is Status.PROCESSING and update.status is Status.QUEUED:
            return None
        moves = update.status is not None and update.status in MOVES[self.status]
        if self.status is Status.TIMED_OUT and not moves:
            return None
        if not moves and self._says_nothing_new(update):
            return None
        status = update.status if moves and update.status is not None else self.status
        ends = status in ENDINGS
        return replace(
            self,
            status=status,
            update=update,
            known_at=now if ends else None,
            late=self.status is Status.TIMED_OUT,
            learned_by=learned_by if ends else None,
            due_at=None if status in FINAL else self.due_at,
        )

    def _says_nothing_new(self, update: Update) -> bool:
        known = self.update
        return known is not None and (known.provider_status, known.progress, known.model) == (
            update.provider_status,
            update.progress,
            update.model,
        )

    def has_progress_to_tell(self, *, now: int, interval: int) -> bool:
        """Whether its progress is another than the one that was last announced, `interval` ago or more."""
        progress = self.update.progress if self.update is not None else None
        if self.ended or progress is None or progress == (self.progress_told or 0.0):
            return False
        return self.progress_at is None or now >= self.progress_at + interval

    def timed_out(self) -> Update:
        """The update that the deadline makes: nothing is claimed about the job but that it is late."""
        known = self.update or Update(status=None)
        waited = round((self.deadline_at - self.created_at) / 1000)
        message = f"no ending within {waited} s; the job may still finish at the provider"
        if self.last_error:
            message += f" (last problem: {self.last_error})"
        return replace(
            known, status=Status.TIMED_OUT, outputs=(), error=Problem(Code.TIMED_OUT, message, retryable=None)
        )


def _with_its_output(update: Update) -> Update:
    if update.status is Status.COMPLETED and not update.outputs:
        problem = Problem(Code.NO_OUTPUT, "the provider says completed but gave no output")
        return replace(update, status=Status.FAILED, error=problem)
    return update
