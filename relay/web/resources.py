"""What goes in and out of the API, field by field: validation and OpenAPI are both made from these."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Generic, Literal, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)

from relay import delivery, endpoint, event, generation
from relay.body import compact
from relay.redact import BLOT
from relay.signature import secret_key
from relay.times import parse_rfc3339, rfc3339

LARGEST_METADATA = 16 * 1024
LARGEST_DATA = 256 * 1024
T = TypeVar("T")


def _small(value: Mapping[str, Any]) -> Mapping[str, Any]:
    if len(compact(value)) > LARGEST_METADATA:
        raise ValueError(f"may be {LARGEST_METADATA} bytes of JSON at most")
    return value


def _publishable(value: Mapping[str, Any]) -> Mapping[str, Any]:
    if len(compact(value)) > LARGEST_DATA:
        raise ValueError(f"may be {LARGEST_DATA} bytes of JSON at most")
    return value


def _event_type(value: str) -> str:
    if len(value) > 128 or not event.TYPE.fullmatch(value):
        raise ValueError("must be words of letters, digits and _ with full stops between")
    return value


def _not_ours(value: str) -> str:
    if value.startswith(event.RESERVED):
        raise ValueError(f"must not begin with {', '.join(event.RESERVED)}: only Relay announces these")
    return value


def _job_id(value: str) -> str:
    if not generation.is_job_id(value):
        raise ValueError("must be 1 to 255 visible ASCII characters, and not only dots")
    return value


def _secret(value: str) -> str:
    secret_key(value)
    if not value.startswith("whsec_"):
        raise ValueError("must begin with whsec_")
    return value


def _headers(value: Mapping[str, str]) -> Mapping[str, str]:
    for name, content in value.items():
        problem = endpoint.header_problem(name, content)
        if problem is not None:
            raise ValueError(f"{name!r} {problem}")
    return value


def _instant(value: object) -> int:
    at = parse_rfc3339(value)
    if at is None:
        raise ValueError("must be an RFC 3339 time, such as 2026-03-16T14:30:00Z")
    return at


Metadata = Annotated[Mapping[str, Any], AfterValidator(_small)]
EventType = Annotated[str, AfterValidator(_event_type)]
PublishedType = Annotated[EventType, AfterValidator(_not_ours)]
JobId = Annotated[str, AfterValidator(_job_id)]
Secret = Annotated[str, AfterValidator(_secret)]
Headers = Annotated[Mapping[str, str], Field(max_length=20), AfterValidator(_headers)]
RateLimit = Annotated[float, Field(gt=0, le=10_000, description="Attempts a second, at most.")]
Instant = Annotated[int, BeforeValidator(_instant, json_schema_input_type=str)]
Time = Annotated[str, Field(examples=["2026-03-16T14:30:12.000Z"], json_schema_extra={"format": "date-time"})]


class _Input(BaseModel):
    @field_validator("*", mode="before")
    @classmethod
    def _can_be_stored(cls, value: object) -> object:
        # PostgreSQL has no such text, not even to look for it.
        if isinstance(value, str) and "\0" in value:
            raise ValueError("must not contain the character U+0000")
        return value


class Request(_Input):
    """What callers send: unknown fields and wrong types are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Query(_Input):
    """What stands behind the `?`: all of it is text, so numbers are read from it."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class PageQuery(Query):
    limit: int = Field(default=50, ge=1, le=200)
    cursor: str | None = Field(default=None, max_length=64)

    def filters(self) -> dict[str, Any]:
        """The filters that were given, by name."""
        return self.model_dump(exclude={"limit", "cursor"}, exclude_none=True)


class Resource(BaseModel):
    """What callers receive."""

    model_config = ConfigDict(frozen=True)


class Page(Resource, Generic[T]):
    """Newest first; give `next_cursor` as `cursor` for what comes after."""

    data: Sequence[T]
    next_cursor: str | None


class EndpointCreate(Request):
    url: str
    description: str | None = Field(default=None, max_length=1000)
    event_types: Annotated[list[EventType], Field(max_length=100)] | None = None
    accounts: Annotated[list[str], Field(max_length=100)] | None = None
    filter: None = Field(default=None, description="Reserved: filters on the payload are not there yet.")
    headers: Headers | None = None
    rate_limit: RateLimit | None = None
    secret: Secret | None = None
    metadata: Metadata | None = None


class EndpointChange(Request):
    """Only the fields that are given are changed."""

    url: str = ""
    description: str | None = Field(default=None, max_length=1000)
    event_types: Annotated[list[EventType], Field(max_length=100)] | None = None
    accounts: Annotated[list[str], Field(max_length=100)] | None = None
    headers: Headers | None = Field(
        default=None, description=f"All of them; the value {BLOT} keeps the one that is there."
    )
    rate_limit: RateLimit | None = None
    metadata: Metadata | None = None


class SecretRotate(Request):
    secret: Secret | None = None
    overlap_seconds: int = Field(default=86_400, ge=0, le=30 * 86_400)


class EndpointResource(Resource):
    id: str
    url: str
    description: str | None
    event_types: Sequence[str] | None
    accounts: Sequence[str] | None
    filter: None = None
    headers: Mapping[str, str] = Field(
        description=f"{BLOT} is the value of those whose names look like a credential's."
    )
    rate_limit: float | None
    metadata: Mapping[str, Any]
    status: Literal["enabled", "disabled"]
    disabled_reason: str | None
    created_at: Time
    updated_at: Time

    @classmethod
    def of(cls, one: endpoint.Endpoint) -> Self:
        return cls(**_endpoint(one))


class EndpointWithSecret(EndpointResource):
    secret: str

    @classmethod
    def of(cls, one: endpoint.Endpoint) -> Self:
        return cls(**_endpoint(one), secret=one.secret)


def _endpoint(one: endpoint.Endpoint) -> dict[str, Any]:
    return {
        "id": one.id,
        "url": one.url,
        "description": one.description,
        "event_types": list(one.event_types) or None,
        "accounts": list(one.accounts) or None,
        "headers": {
            name: BLOT if endpoint.is_sensitive(name) else value for name, value in one.headers.items()
        },
        "rate_limit": one.rate_limit,
        "metadata": one.metadata,
        "status": "disabled" if one.disabled_at is not None else "enabled",
        "disabled_reason": one.disabled_reason,
        "created_at": rfc3339(one.created_at),
        "updated_at": rfc3339(one.updated_at),
    }


class SecretResource(Resource):
    secret: str
    previous_secret_expires_at: Time | None = None


class GenerationCreate(Request):
    account: str
    job_id: JobId | None = None
    callback_url: str | None = None
    metadata: Metadata | None = None
    timeout_seconds: float | None = Field(default=None, gt=0, le=30 * 86_400)


class GenerationChange(Request):
    """Only the fields that are given are changed."""

    job_id: JobId | None = None
    metadata: Metadata | None = None

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.job_id is None and self.metadata is None:
            raise ValueError("give job_id or metadata")
        return self


class GenerationQuery(PageQuery):
    account: str | None = None
    provider: str | None = None
    job_id: str | None = None
    status: generation.Status | None = None
    since: Instant | None = None
    until: Instant | None = None


class WaitQuery(Query):
    timeout: float = Field(default=30, ge=0, le=300)


class OutputResource(Resource):
    url: str
    kind: str | None
    content_type: str | None
    width: int | None
    height: int | None
    expires_at: Time | None
    permanent_url: str | None


class ProblemResource(Resource):
    code: generation.Code
    message: str
    retryable: bool | None
    provider_code: str | None


class UsageResource(Resource):
    credits: float | int | None


class GenerationData(Resource):
    """A generation as its events tell it: the `data` of `generation.*`."""

    id: str
    provider: str
    account: str
    job_id: str | None
    status: generation.Status
    provider_status: str | None
    kind: str | None
    model: str | None
    progress: float | None
    outputs: Sequence[OutputResource]
    error: ProblemResource | None
    usage: UsageResource
    created_at: Time
    completed_at: Time | None
    duration_ms: int | None
    late: bool
    learned_by: generation.LearnedBy | None
    metadata: Mapping[str, Any]
    raw: Any


class AnnouncedOutput(OutputResource):
    expired: bool = Field(
        default=False,
        description="There, and true, when the URL had expired and the provider gives no other one any more.",
    )


class AnnouncedGeneration(GenerationData):
    """The `data` of `generation.*` as it may be sent after the first URLs have expired."""

    outputs: Sequence[AnnouncedOutput]
    refreshed_at: Time | None = Field(
        default=None, description="There when the provider was asked for fresh URLs before this was sent."
    )


class GenerationResource(GenerationData):
    """And what only the API tells: how the watching goes."""

    callback_url: str | None
    webhook_url: str | None = Field(description="What to give to a provider that calls back.")
    watched_at: Time
    deadline_at: Time
    next_poll_at: Time | None
    polls: int
    last_error: str | None

    @classmethod
    def of(cls, one: generation.Generation, webhook_url: str | None) -> Self:
        return cls(
            **event.describe(one),
            callback_url=one.callback_url,
            webhook_url=webhook_url,
            watched_at=rfc3339(one.created_at),
            deadline_at=rfc3339(one.deadline_at),
            next_poll_at=rfc3339(one.due_at) if one.due_at is not None else None,
            polls=one.asks,
            last_error=one.last_error,
        )


class EventPublish(Request):
    type: PublishedType
    data: Annotated[Mapping[str, Any], AfterValidator(_publishable)]
    id: str | None = Field(
        default=None,
        pattern=r"^[\x21-\x7e]{1,255}$",
        description="Your own name for it: published again under this name, it is not announced again.",
    )


class EventQuery(PageQuery):
    type: str | None = None
    generation_id: str | None = None
    account: str | None = None
    since: Instant | None = None
    until: Instant | None = None


class EventResource(Resource):
    id: str
    type: str
    timestamp: Time
    data: Mapping[str, Any]
    generation_id: str | None
    account: str | None
    source_id: str | None = Field(description="Its publisher's own name for it.")
    created_at: Time


class DeliveryQuery(PageQuery):
    status: delivery.Status | None = None
    endpoint_id: str | None = None
    event_id: str | None = None
    generation_id: str | None = None
    event_type: str | None = None
    since: Instant | None = None
    until: Instant | None = None


class AttemptError(Resource):
    code: str
    message: str


class AttemptResource(Resource):
    id: str
    number: int
    started_at: Time
    duration_ms: int
    trigger: delivery.Trigger
    response_status: int | None
    response_body: str | None
    error: AttemptError | None


class DeliveryResource(Resource):
    id: str
    event_id: str
    event_type: str
    generation_id: str | None
    endpoint_id: str | None
    url: str
    status: delivery.Status
    attempt_count: int
    next_attempt_at: Time | None
    created_at: Time
    updated_at: Time


class DeliveryWithAttempts(DeliveryResource):
    attempts: Sequence[AttemptResource]


class BudgetResource(Resource):
    requests_per_minute: int | None
    requests_per_day: int | None
    used_today: int
    next_request_at: Time | None = Field(description="When the next request may be made; null is now.")


class AccountResource(Resource):
    name: str
    provider: str
    status: Literal["ok", "unauthorized", "failing"]
    base_url: str
    calls_back: bool
    budget: BudgetResource
    last_error: str | None
    last_error_at: Time | None


class HealthResource(Resource):
    status: Literal["ok", "failing"]
    checks: Mapping[str, str] = {}
