"""What a provider is: the code that understands one AI service.

A provider is a value without I/O: it says where to ask and how to read. Asking is `relay.poll`'s work.
To add one: a file here, a line in PROVIDERS, a folder of recorded answers under `tests/providers/`.
A provider outside the package is named `"module:Class"` in the configuration.
"""

import mimetypes
import posixpath
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any, ClassVar, Self
from urllib.parse import parse_qsl, quote, urlsplit

from relay import account
from relay.body import parse
from relay.errors import ConfigError, Malformed, ProviderError
from relay.generation import Code, Output, Problem, Status, Update, is_job_id
from relay.schedule import Pace
from relay.tenant import DEFAULT
from relay.times import parse_retry_after, parse_rfc3339, rfc3339

PROVIDERS = {
    "luma": "relay.providers.luma:Luma",
    "pictory": "relay.providers.pictory:Pictory",
    "pixellabs": "relay.providers.pixellabs:PixelLabs",
    "vivix": "relay.providers.vivix:Vivix",
}
# What a status says of a request; any other says that the provider is out of order.
# Only what Python itself knows: the tables of machines differ.
_TYPES = mimetypes.MimeTypes(filenames=())
# A job that has more is announced with the first of them; `raw` has them all.
MOST_OUTPUTS = 1000
KINDS = frozenset({"image", "video", "audio", "3d", "text"})
# A credential of so many characters may show its last four.
LONG_ENOUGH = 20
_MODELS = {".glb", ".gltf", ".obj", ".fbx", ".usdz", ".stl", ".ply"}


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back over the wire; header names are lower-case."""

    status: int
    body: bytes
    headers: Mapping[str, str]


class Provider(ABC):
    """One AI service. Subclasses are stateless; the credential belongs to the account."""

    name: ClassVar[str]
    base_url: ClassVar[str]  # with the API's version prefix
    pace: ClassVar[Pace]
    requests_per_minute: ClassVar[int | None] = None
    requests_per_day: ClassVar[int | None] = None
    calls_back: ClassVar[bool] = False  # to the URL that one job is given
    signs: ClassVar[bool] = False  # its callbacks for all jobs of an account: `signed` knows how

    @abstractmethod
    def path(self, job_id: str) -> str:
        """Where the status of a job is asked, below the base URL; `job_id` is already quoted."""

    @abstractmethod
    def read(self, answer: Mapping[str, Any], *, now: int) -> Update:
        """The meaning of a 200 answer. Raises nothing: what is missing or odd becomes None."""

    def authorization(self, api_key: str) -> str:
        """The Authorization header's value."""
        return f"Bearer {api_key}"

    def not_found(self, status: int, answer: Any) -> bool:
        """Whether a refusal means that this account has no such job; `answer` is its JSON, if it is any.

        A page of some gateway is not the provider's word.
        """
        return status == 404 and isinstance(answer, dict)

    def complaint(self, answer: Mapping[str, Any]) -> tuple[str | None, str | None]:
        """The code and the message in a refusal."""
        return text(answer.get("error")), text(answer.get("message")) or text(answer.get("detail"))

    def signed(self, headers: Mapping[str, str], body: bytes, secrets: Sequence[str]) -> bool:
        """Whether a callback was signed with one of the account's secrets; header names are lower-case."""
        return False

    def claimed_job(self, callback: Any) -> str | None:
        """The job id that a callback's JSON names; only ever a claim."""
        return None


@dataclass(frozen=True, slots=True, weakref_slot=True)
class Account:
    """One credential at a provider. `repr` never shows the credential.

    `webhook_secrets` are those with which the provider may sign its callbacks; `tenants` are those that have
    the account, None for all of them.
    """

    name: str
    provider: Provider
    api_key: str
    base_url: str
    pace: Pace
    requests_per_minute: int | None = None
    requests_per_day: int | None = None
    webhook_secrets: tuple[str, ...] = ()
    tenants: tuple[str, ...] | None = (DEFAULT,)

    @classmethod
    def at(
        cls,
        provider: Provider,
        name: str,
        *,
        api_key: str,
        base_url: str | None = None,
        timeout: int | None = None,
        poll_interval: int | None = None,
        requests_per_minute: int | None = None,
        requests_per_day: int | None = None,
        webhook_secrets: tuple[str, ...] = (),
        tenants: tuple[str, ...] | None = (DEFAULT,),
    ) -> Self:
        """An account with the provider's own values for what is not given; durations are milliseconds."""
        pace = replace(provider.pace, timeout=timeout or provider.pace.timeout)
        if poll_interval is not None:
            # Who says how often wants to be told that soon: nothing is expected before it was seen.
            pace = replace(pace, interval=poll_interval, backstop=5 * poll_interval, typical=None)
        return cls(
            name=name,
            provider=provider,
            api_key=api_key,
            base_url=base_url or provider.base_url,
            pace=pace,
            requests_per_minute=requests_per_minute or provider.requests_per_minute,
            requests_per_day=requests_per_day or provider.requests_per_day,
            webhook_secrets=webhook_secrets,
            tenants=tenants,
        )

    @property
    def shown(self) -> str:
        """What tenants call it."""
        return account.shown(self.name)

    @property
    def owner(self) -> str | None:
        """The tenant that has added it; None for one of the configuration."""
        return account.owner(self.name)

    @property
    def api_key_hint(self) -> str | None:
        """By what its owner knows which credential it is; None where so much of it would say too much."""
        return self.api_key[-4:] if self.owner is not None and len(self.api_key) >= LONG_ENOUGH else None

    @property
    def listeners(self) -> tuple[str, ...]:
        """The tenants that are told when it stops to work."""
        return (DEFAULT,) if self.tenants is None else self.tenants

    def is_of(self, tenant: str) -> bool:
        """Whether a tenant has it."""
        return self.tenants is None or tenant in self.tenants

    def told(self, tenant: str, error: str | None) -> str | None:
        """What a tenant may read of an error of the account: it may quote what was said of another's job."""
        if error is None or tenant == DEFAULT or self.tenants == (tenant,):
            return error
        return error.partition(":")[0]

    @property
    def takes_signed_callbacks(self) -> bool:
        return self.provider.signs and bool(self.webhook_secrets)

    def __repr__(self) -> str:
        return f"Account({self.name!r}, {self.provider.name!r})"

    def url(self, job_id: str) -> str:
        """Where a job is asked about. Raises ValueError for what is no job id."""
        if not is_job_id(job_id):
            raise ValueError(f"{job_id[:50]!r} is not a job id")
        return self.base_url.rstrip("/") + self.provider.path(quote(job_id, safe=""))


def load(name: str) -> Provider:
    """The provider of that name, or of the `module:Class` outside the package. Raises ConfigError."""
    target = PROVIDERS.get(name, name)
    module, colon, class_ = target.partition(":")
    if not colon:
        known = ", ".join(PROVIDERS)
        raise ConfigError(f'unknown provider {name!r}: use one of {known}, or "module:Class"')
    try:
        provider = getattr(import_module(module), class_)()
    except (ImportError, AttributeError, TypeError) as error:
        raise ConfigError(f"provider {name!r} cannot be loaded: {error}") from error
    if not isinstance(provider, Provider):
        raise ConfigError(f"provider {name!r} is not a relay.providers.Provider")
    return provider


def understand(provider: Provider, reply: Reply, *, now: int) -> Update:
    """The update in a provider's reply. Raises ProviderError when it holds none.

    "No such job" is an update (`failed`, `not_found`): whether to believe it yet is the caller's choice.
    """
    if 200 <= reply.status <= 299:
        return provider.read(_object(reply), now=now)
    try:
        answer = parse(reply.body) if reply.body.strip() else {}
    except Malformed:
        answer = None
    code, message = provider.complaint(answer) if isinstance(answer, dict) else (None, None)
    if provider.not_found(reply.status, answer):
        return missing(answer, message or f"{provider.name} has no such job for this account", code)
    retry_after = parse_retry_after(reply.headers.get("retry-after"), now)
    said = f"{provider.name} answered {reply.status}"
    said += "".join(f": {word}" for word in (code, message) if word)
    # What answers 4xx in JSON is no gateway: the provider is there and refuses this one question.
    usual = "refused" if 400 <= reply.status <= 499 and isinstance(answer, dict) and answer else "unavailable"
    code = {401: "unauthorized", 403: "blocked", 408: "unavailable", 429: "rate_limited"}.get(
        reply.status, usual
    )
    raise ProviderError(code, said, retry_after=retry_after)


def missing(answer: Any, message: str, code: str | None, provider_status: str | None = None) -> Update:
    """The update of a job that the provider does not know."""
    problem = Problem(Code.NOT_FOUND, message, retryable=False, provider_code=code)
    return Update(status=Status.FAILED, provider_status=provider_status, error=problem, raw=answer)


def _object(reply: Reply) -> Mapping[str, Any]:
    try:
        answer = parse(reply.body)
    except Malformed as error:
        raise ProviderError("unreadable", f"the answer cannot be read: {error}") from error
    if not isinstance(answer, dict):
        raise ProviderError("unreadable", "the answer is not a JSON object")
    return answer


def text(value: Any) -> str | None:
    """A non-empty string that can be written as UTF-8, else None."""
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) and value else None


def number(value: Any) -> float | int | None:
    """A number that is not negative, else None; digits in a string count."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 2**53:
        return None
    return value


def whole(value: Any) -> int | None:
    """A number as an integer, else None."""
    found = number(value)
    return round(found) if found is not None else None


def output(
    url: Any,
    *,
    kind: str | None = None,
    content_type: str | None = None,
    width: Any = None,
    height: Any = None,
    expires_at: int | None = None,
    permanent_url: Any = None,
) -> tuple[Output, ...]:
    """The output at a URL, as a tuple to add up (MOST_OUTPUTS at most); empty when there is no URL.

    What the provider does not say about its kind and type, the file extension does; what it does not say
    about its end, the URL's own signature does.
    """
    if text(url) is None:
        return ()
    guessed_kind, guessed_type = _media(url)
    return (
        Output(
            url=url,
            kind=kind or guessed_kind,
            content_type=content_type or guessed_type,
            width=whole(width),
            height=whole(height),
            expires_at=expires_at if expires_at is not None else expiry(url),
            permanent_url=text(permanent_url),
        ),
    )


def expiry(url: str) -> int | None:
    """When a signed URL stops to work, in unix milliseconds, as its query says it; else None."""
    try:
        pairs = parse_qsl(urlsplit(url).query, max_num_fields=100)
    except ValueError:
        return None
    query = {name.lower(): value for name, value in pairs}
    for scheme in ("x-amz", "x-goog"):
        signed_at = parse_rfc3339(query.get(f"{scheme}-date"))
        lifetime = query.get(f"{scheme}-expires", "")
        if signed_at is not None and re.fullmatch(r"[0-9]{1,9}", lifetime):
            return _in_range(signed_at + int(lifetime) * 1000)
    # Ten digits are the years 2001 to 2286: a shorter number is a duration, a longer one no seconds.
    if "signature" in query and re.fullmatch(r"[0-9]{10}", query.get("expires", "")):
        return int(query["expires"]) * 1000
    return parse_rfc3339(query.get("se")) if "sig" in query else None


def _in_range(at: int) -> int | None:
    """A time that can be written."""
    try:
        rfc3339(at)
    except OverflowError:
        return None
    return at


def _media(url: str) -> tuple[str | None, str | None]:
    try:
        path = urlsplit(url).path
    except ValueError:
        return None, None
    content_type, _ = _TYPES.guess_type(path, strict=False)
    if posixpath.splitext(path)[1].lower() in _MODELS:
        return "3d", content_type
    main = (content_type or "").partition("/")[0]
    return (main if main in KINDS else None), content_type
