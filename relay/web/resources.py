"""What goes in and out of the API, field by field: validation and OpenAPI are both made from these."""

import json
import re
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

from relay import account, delivery, endpoint, event, generation, schema, selection
from relay import filter as filter_
from relay.body import compact
from relay.key import Key, Scope
from relay.limit import LOWEST_RATE
from relay.providers import PROVIDERS
from relay.redact import BLOT
from relay.signature import secret_key
from relay.store.audit import Noted
from relay.store.deliveries import MOST_ATTEMPTS
from relay.store.types import DeclaredType
from relay.tenant import NAME as NAME_OF_TENANT
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


def _schema(value: Mapping[str, Any]) -> Mapping[str, Any]:
    schema.checked(value)
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


def _provider(value: str) -> str:
    # Never a module to import: that is for the configuration alone.
    if value not in PROVIDERS:
        raise ValueError(f"must be one of {', '.join(PROVIDERS)}")
    return value


def _without_default(schema: dict[str, Any]) -> None:
    del schema["default"]


def _listed(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _headers(value: Mapping[str, str]) -> Mapping[str, str]:
    for name, content in value.items():
        problem = endpoint.header_problem(name, content)
        if problem is not None:
            raise ValueError(f"{name!r} {problem}")
    return value


def _instant(value: object) -> int:
    at = parse_rfc3339(value)
    if at is None:
        raise ValueError("must be an RFC 3339 time since 1970, such as 2026-03-16T14:30:00Z")
    return at


def _said(**schema: Any) -> Any:
    """What the document says of a value that a validator, which has better words for people, looks at."""
    return Field(json_schema_extra=schema)


_TYPE = rf"^{event.TYPE.pattern}$"
_OURS = "|".join(event.RESERVED).replace(".", r"\.")
Url = Annotated[str, _said(pattern="^https?://")]
# What has a name of its own, or an id.
Name = Annotated[str, Field(max_length=255)]
Metadata = Annotated[Mapping[str, Any], AfterValidator(_small)]
EventType = Annotated[str, AfterValidator(_event_type), _said(pattern=_TYPE, maxLength=128)]
PublishedType = Annotated[
    str,
    AfterValidator(_event_type),
    AfterValidator(_not_ours),
    _said(pattern=f"^(?!{_OURS}){_TYPE[1:]}", maxLength=128),
]
JobId = Annotated[str, AfterValidator(_job_id), _said(pattern=r"^[\x21-\x7e]{1,255}$")]
Secret = Annotated[str, AfterValidator(_secret), _said(pattern="^whsec_[A-Za-z0-9+/]{32,86}={0,2}$")]
HeaderName = Annotated[str, _said(pattern=r"^[!#$%&'*+.^_`|~0-9A-Za-z-]+$")]
HeaderValue = Annotated[str, _said(pattern=r"^[\x21-\x7e]([\x20-\x7e]*[\x21-\x7e])?$", maxLength=1024)]
Headers = Annotated[Mapping[HeaderName, HeaderValue], Field(max_length=20), AfterValidator(_headers)]
Filter = Annotated[
    str,
    AfterValidator(filter_.checked),
    Field(
        description="A JMESPath expression over the body that is sent: it must find something that is not"
        " null, false or empty.",
        examples=["data.kind == 'image' && data.metadata.order"],
        json_schema_extra={"minLength": 1, "maxLength": filter_.LONGEST},
    ),
]
RateLimit = Annotated[
    float, Field(ge=LOWEST_RATE, le=10_000, description="Attempts a second, at most; 0.001 to 10,000.")
]
# What Relay shows to a provider, or a provider to Relay. Shorter ones could not be blotted out of a text.
Credential = Annotated[str, Field(min_length=8, max_length=4096, pattern=r"^[\x21-\x7e]+$")]
WebhookSecrets = Annotated[
    list[Credential],
    Field(min_length=1, max_length=10, description="One, or a list of several while it is changed."),
    BeforeValidator(_listed, json_schema_input_type=Credential | list[Credential]),
]
Seconds = Annotated[float, Field(ge=0.1, le=30 * 86_400)]
Limit = Annotated[int, Field(ge=1, le=1_000_000_000)]
Instant = Annotated[
    int, BeforeValidator(_instant, json_schema_input_type=Annotated[str, _said(format="date-time")])
]
Time = Annotated[str, Field(examples=["2026-03-16T14:30:12.000Z"], json_schema_extra={"format": "date-time"})]


class _Input(BaseModel):
    @field_validator("*", mode="before")
    @classmethod
    def _can_be_stored(cls, value: object) -> object:
        # A database has no such text, not even to look for it.
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and (found := re.search("[\0\ud800-\udfff]", text)):
                raise ValueError(f"must not contain the character U+{ord(found[0]):04X}")
        return value


class Request(_Input):
    """What callers send: unknown fields and wrong types are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Query(_Input):
    """What stands behind the `?`: all of it is text, so numbers are read from it."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class PageQuery(Query):
    limit: int = Field(default=50, ge=1, le=200)
    # An id, or where there is none a name: that of a declared type is the longest.
    cursor: str | None = Field(default=None, max_length=128)

    def filters(self) -> dict[str, Any]:
        """The filters that were given, by name."""
        return self.model_dump(exclude={"limit", "cursor"}, exclude_none=True)


class Resource(BaseModel):
    """What callers receive."""

    model_config = ConfigDict(frozen=True)


class Page(Resource, Generic[T]):
    """Newest first; give `next_cursor` as `cursor` for what comes after. Where things are large a page may
    have fewer of them than `limit`: there is more unless `next_cursor` is null."""

    data: Sequence[T]
    next_cursor: str | None


class EndpointCreate(Request):
    url: Url
    description: str | None = Field(default=None, max_length=1000)
    event_types: Annotated[list[EventType], Field(max_length=100)] | None = None
    accounts: Annotated[list[Name], Field(max_length=100)] | None = None
    filter: Filter | None = None
    headers: Headers | None = None
    rate_limit: RateLimit | None = None
    secret: Secret | None = None
    ed25519: bool = Field(default=False, description="Whether to sign with Ed25519 (`v1a`) as well.")
    metadata: Metadata | None = None


def _no_default_url(schema: dict[str, Any]) -> None:
    """What stands for a URL that is not given is none to give."""
    schema["properties"]["url"].pop("default")


class EndpointChange(Request):
    """Only the fields that are given are changed."""

    model_config = ConfigDict(json_schema_extra=_no_default_url)

    url: Url = ""
    description: str | None = Field(default=None, max_length=1000)
    event_types: Annotated[list[EventType], Field(max_length=100)] | None = None
    accounts: Annotated[list[Name], Field(max_length=100)] | None = None
    filter: Filter | None = None
    headers: Headers | None = Field(
        default=None, description=f"All of them; the value {BLOT} keeps the one that is there."
    )
    rate_limit: RateLimit | None = None
    ed25519: bool = False
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
    filter: str | None
    headers: Mapping[str, str] = Field(
        description=f"{BLOT} stands for what may be secret: admins see values of harmless names."
    )
    rate_limit: float | None
    public_key: str | None = Field(description="`whpk_…`, where it is signed with Ed25519 (`v1a`) as well.")
    metadata: Mapping[str, Any]
    status: Literal["enabled", "disabled"]
    disabled_reason: str | None
    disabled_at: Time | None
    failing_since: Time | None = Field(description="Every attempt since then has failed.")
    previous_secret_expires_at: Time | None = Field(
        description="Until when the secrets before the last rotation sign too; it may have passed."
    )
    created_at: Time
    updated_at: Time

    @classmethod
    def of(cls, one: endpoint.Endpoint, *, to_admin: bool) -> Self:
        return cls(**_endpoint(one, to_admin=to_admin))


class EndpointWithSecret(EndpointResource):
    secret: str | None = Field(
        description="Null when an Idempotency-Key is used again after a rotation, but not for admins."
    )

    @classmethod
    def of(cls, one: endpoint.Endpoint, *, to_admin: bool) -> Self:
        newest = one.secrets[0]
        shown = newest.symmetric if to_admin or not newest.is_rotated else None
        return cls(**_endpoint(one, to_admin=to_admin), secret=shown)


def _endpoint(one: endpoint.Endpoint, *, to_admin: bool) -> dict[str, Any]:
    previous = max((secret.expires_at or 0 for secret in one.secrets), default=0)
    return {
        "id": one.id,
        "url": one.url,
        "description": one.description,
        "event_types": list(one.event_types) or None,
        "accounts": list(one.accounts) or None,
        "filter": one.filter,
        "headers": {
            name: value if to_admin and not endpoint.is_sensitive(name) else BLOT
            for name, value in one.headers.items()
        },
        "rate_limit": one.rate_limit,
        "public_key": one.public_key,
        "metadata": one.metadata,
        "status": "disabled" if one.disabled_at is not None else "enabled",
        "disabled_reason": one.disabled_reason,
        "disabled_at": rfc3339(one.disabled_at) if one.disabled_at is not None else None,
        "failing_since": rfc3339(one.failing_since) if one.failing_since is not None else None,
        "previous_secret_expires_at": rfc3339(previous) if previous else None,
        "created_at": rfc3339(one.created_at),
        "updated_at": rfc3339(one.updated_at),
    }


class SecretResource(Resource):
    secret: str
    public_key: str | None = Field(default=None, description="`whpk_…`, where it signs with Ed25519 as well.")
    previous_secret_expires_at: Time | None = None


class GenerationCreate(Request):
    account: Name
    job_id: JobId | None = None
    callback_url: Url | None = None
    metadata: Metadata | None = None
    timeout_seconds: float | None = Field(default=None, gt=0, le=30 * 86_400)


class GenerationChange(Request):
    """Only the fields that are given are changed."""

    model_config = ConfigDict(
        json_schema_extra={
            "anyOf": [
                {"required": ["job_id"], "properties": {"job_id": {"not": {"type": "null"}}}},
                {"required": ["metadata"], "properties": {"metadata": {"not": {"type": "null"}}}},
            ]
        }
    )

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


class EventTypePut(Request):
    description: str | None = Field(default=None, max_length=1000)
    schema_: Annotated[Mapping[str, Any], AfterValidator(_schema)] | None = Field(
        default=None,
        alias="schema",
        description="JSON Schema, Draft 2020-12, that the `data` of its events must fit from now on. It may"
        f" refer to its own $defs only, and not in circles; {schema.LARGEST} bytes, {schema.MOST_PARTS} parts"
        f" and {schema.MOST_PATTERNS} patterns at most, and {schema.MOST_WORK} parts times values of the"
        " data of an event.",
    )


class EventTypeResource(Resource):
    type: str
    description: str | None
    schema_: Mapping[str, Any] | None = Field(alias="schema")
    created_at: Time
    updated_at: Time

    @classmethod
    def of(cls, one: DeclaredType) -> Self:
        return cls(
            type=one.type,
            description=one.description,
            schema=json.loads(one.schema) if one.schema is not None else None,
            created_at=rfc3339(one.created_at),
            updated_at=rfc3339(one.updated_at),
        )


class EventQuery(PageQuery):
    type: str | None = None
    generation_id: str | None = None
    account: str | None = None
    since: Instant | None = None
    until: Instant | None = None


class StreamQuery(Query):
    type: str | None = Field(default=None, description="One, or several with commas between.")
    generation_id: str | None = None
    account: str | None = None
    endpoint_id: str | None = Field(default=None, description="What this endpoint gets.")
    last_event_id: str | None = Field(
        default=None, description="For the first request of who cannot send the header Last-Event-ID."
    )
    timeout: float | None = Field(
        default=None, ge=0, le=86_400, description="The stream ends after so many seconds."
    )

    @property
    def types(self) -> Sequence[str]:
        return [one.strip() for one in self.type.split(",")] if self.type else []


def problem_of_type(type_: str) -> str | None:
    """What is wrong with the type of an event that somebody wants to publish; None when nothing is."""
    try:
        _not_ours(_event_type(type_))
    except ValueError as error:
        return str(error)
    return None


def is_event_id(text: str) -> bool:
    """Whether an event may have this id."""
    return re.fullmatch("evt_[0-7][0-9A-HJKMNP-TV-Z]{25}", text) is not None


class EventResource(Resource):
    id: str
    type: str
    timestamp: Time
    data: Mapping[str, Any]
    generation_id: str | None
    account: str | None
    source_id: str | None = Field(description="Its publisher's own name for it.")
    created_at: Time


class PublishedEvent(EventResource):
    created: bool = Field(
        description="Whether this request has stored it: false when there was one under its name before, or"
        " under this Idempotency-Key."
    )


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
    attempts: Sequence[AttemptResource] = Field(
        description=f"The last {MOST_ATTEMPTS}, the first of them first; `attempt_count` counts all."
    )


class ReplayCreate(Request):
    model_config = ConfigDict(
        json_schema_extra={"anyOf": [{"required": ["since"]}, {"required": ["generation_id"]}]}
    )

    endpoint_id: Name | None = Field(default=None, description="Without it, all endpoints that are enabled.")
    generation_id: Name | None = None
    account: Name | None = None
    event_type: EventType | None = Field(
        default=None,
        description="Without it, all types but generation.processing, generation.progress and endpoint.test.",
    )
    status: Annotated[selection.Wanted, Field(strict=False)] = Field(
        default=selection.Wanted.FAILED,
        description="`failed`: deliveries that failed, or were canceled when their endpoint was disabled."
        " `missing`: events that an endpoint wants, as its filter is now, and has no delivery of."
        " `all`: every finished delivery, and what is missing.",
    )
    since: Instant | None = Field(
        default=None,
        description="Of deliveries, and of events that miss one, by the time they were made."
        " Required without a generation_id.",
    )
    until: Instant | None = Field(default=None, description="Now, without it; later is not looked at.")
    rate_limit: float = Field(
        default=selection.RATE_LIMIT,
        ge=LOWEST_RATE,
        le=selection.HIGHEST_RATE_LIMIT,
        description="How many a second each endpoint is given, at most; 0.001 to 1,000.",
    )
    dry_run: bool = Field(default=False, description="Only count: nothing is replayed.")

    @model_validator(mode="after")
    def _has_a_beginning(self) -> Self:
        if self.since is None and self.generation_id is None:
            raise ValueError("give since, or generation_id")
        return self


class ReplayQuery(PageQuery):
    status: selection.Status | None = None
    endpoint_id: str | None = None
    since: Instant | None = None
    until: Instant | None = None


class ReplayResource(Resource):
    id: str | None = Field(description="Null for what was only counted.")
    status: selection.Status | None = Field(description="Null for what was only counted.")
    total: int = Field(description="How many deliveries there were to replay when it was made.")
    done: int = Field(description="How many were made pending, each once.")
    error: str | None = Field(description="Why it failed.")
    deliveries: selection.Wanted = Field(description="Which ones: the status that was asked for.")
    endpoint_id: str | None
    generation_id: str | None
    account: str | None
    event_type: str | None
    since: Time | None
    until: Time
    rate_limit: float
    created_at: Time
    updated_at: Time
    ended_at: Time | None

    @classmethod
    def of(cls, one: selection.Replay, *, counted_only: bool = False) -> Self:
        of = one.selection
        return cls(
            id=None if counted_only else one.id,
            status=None if counted_only else one.status,
            total=one.total,
            done=one.done,
            error=one.error,
            deliveries=of.wanted,
            endpoint_id=of.endpoint_id,
            generation_id=of.generation_id,
            account=of.account,
            event_type=of.event_type,
            since=rfc3339(of.since) if of.since is not None else None,
            until=rfc3339(of.until),
            rate_limit=one.rate_limit,
            created_at=rfc3339(one.created_at),
            updated_at=rfc3339(one.updated_at),
            ended_at=rfc3339(one.ended_at) if one.ended_at is not None else None,
        )


class BudgetResource(Resource):
    requests_per_minute: int | None
    requests_per_day: int | None
    used_today: int
    next_request_at: Time | None = Field(description="When the next request may be made; null is now.")


class AccountCreate(Request):
    name: str = Field(pattern=account.NAME)
    provider: Annotated[str, AfterValidator(_provider), Field(json_schema_extra={"enum": sorted(PROVIDERS)})]
    api_key: Credential = Field(repr=False)
    webhook_secret: WebhookSecrets | None = Field(default=None, repr=False)
    base_url: str | None = None
    timeout_seconds: Seconds | None = None
    poll_interval_seconds: Seconds | None = None
    requests_per_minute: Limit | None = None
    requests_per_day: Limit | None = None


class AccountChange(Request):
    """Only the fields that are given are changed; null is the provider's own value again."""

    api_key: Credential = Field(
        default="",
        repr=False,
        description="Needed with a base_url at another host.",
        # That is no value it may have: left out, it stays as it is.
        json_schema_extra=_without_default,
    )
    webhook_secret: WebhookSecrets | None = Field(default=None, repr=False)
    base_url: str | None = None
    timeout_seconds: Seconds | None = None
    poll_interval_seconds: Seconds | None = None
    requests_per_minute: Limit | None = None
    requests_per_day: Limit | None = None


class AccountResource(Resource):
    name: str
    provider: str
    status: Literal["ok", "unauthorized", "failing"]
    configured: bool = Field(description="In the configuration file: it cannot be changed by API.")
    api_key_hint: str | None = Field(
        description="The last 4 characters of a key that was given by API and has at least 20."
    )
    base_url: str
    timeout_seconds: float
    poll_interval_seconds: float = Field(
        description="The shortest pause between two polls of one generation."
    )
    calls_back: bool
    webhook_url: str | None = Field(
        description="Where a provider that signs may call back about any job of the account; null where it"
        " does not sign. Register it there, and set webhook_secret: until then nothing is taken."
    )
    budget: BudgetResource
    last_error: str | None
    last_error_at: Time | None


class KeyCreate(Request):
    scopes: Annotated[list[Annotated[Scope, Field(strict=False)]], Field(min_length=1)]
    name: str | None = Field(default=None, min_length=1, max_length=200)
    tenant: str | None = Field(
        default=None,
        pattern=NAME_OF_TENANT,
        description="Another tenant than the caller's: only for admins of the tenant default.",
    )
    expires_at: Annotated[Instant | None, Field(description="Without it, until it is revoked.")] = None
    rate_limit: float | None = Field(
        default=None,
        ge=LOWEST_RATE,
        le=10_000,
        description="Requests a second, at most, for each relay; 0.001 to 10,000. A key that has one makes"
        " none with more, and without it one with the same.",
    )


class TenantQuery(Query):
    tenant: str | None = None


class KeyQuery(PageQuery, TenantQuery):
    pass


class KeyResource(Resource):
    id: str
    tenant: str
    name: str | None
    scopes: Sequence[Scope]
    rate_limit: float | None
    created_at: Time
    expires_at: Time | None
    revoked_at: Time | None
    last_used_at: Time | None = Field(description="Written down about once a minute.")

    @classmethod
    def of(cls, one: Key) -> Self:
        return cls(**_key(one))


class KeyWithText(KeyResource):
    key: str | None = Field(
        description="Shown now and never again: null when an Idempotency-Key is used again."
    )

    @classmethod
    def of(cls, one: Key, text: str | None = None) -> Self:
        return cls(**_key(one), key=text)


def _key(one: Key) -> dict[str, Any]:
    times = ("created_at", "expires_at", "revoked_at", "last_used_at")
    return {
        **{name: getattr(one, name) for name in ("id", "tenant", "name", "scopes", "rate_limit")},
        **{name: rfc3339(at) if (at := getattr(one, name)) is not None else None for name in times},
    }


class AuditQuery(PageQuery, TenantQuery):
    actor: str | None = None
    action: str | None = None
    object: str | None = None
    since: Instant | None = None
    until: Instant | None = None


class ChangedFields(Resource):
    fields: Sequence[str] = Field(description="The names of what was changed, never the values.")


class AuditResource(Resource):
    id: str
    tenant: str
    at: Time
    actor: str = Field(description="A key's id, admin_key (that of the configuration), cli or relay.")
    action: str = Field(examples=["endpoint.secret_revealed"])
    object: str
    address: str | None
    details: ChangedFields

    @classmethod
    def of(cls, one: Noted) -> Self:
        entry = one.entry
        return cls(
            id=one.id,
            tenant=entry.tenant,
            at=rfc3339(entry.at),
            actor=entry.actor,
            action=entry.action,
            object=entry.object,
            address=entry.address,
            details=ChangedFields(fields=entry.fields),
        )


class HealthResource(Resource):
    status: Literal["ok", "failing"]
    checks: Mapping[str, str] = {}
