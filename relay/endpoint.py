"""An endpoint is a subscriber's URL with its secrets and its filter."""

import ipaddress
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import httpx

from relay import signature
from relay.event import ENDINGS, Event
from relay.filter import passes

DEFAULT_TYPES = frozenset(ENDINGS.values())
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_VISIBLE = re.compile(r"[\x21-\x7e](?:[\x20-\x7e]*[\x21-\x7e])?")
_LABEL = re.compile(r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?")
_FORBIDDEN_HEADERS = {
    *(
        "accept-encoding",
        "connection",
        "content-encoding",
        "content-length",
        "content-type",
        "cookie",
        "date",
    ),
    *("expect", "forwarded", "host", "keep-alive", "metadata", "metadata-flavor", "origin"),
    *("proxy-authenticate", "proxy-authorization", "proxy-connection", "referer", "te", "trailer"),
    *("transfer-encoding", "upgrade", "user-agent", "via", "x-method-override", "x-real-ip", "x-rewrite-url"),
}
_FORBIDDEN_PREFIXES = (
    *("sec-", "webhook-", "x-amz-", "x-aws-ec2-metadata-token", "x-azure-", "x-forwarded", "x-goog-"),
    *("x-http-method", "x-original-"),
)
_SENSITIVE = ("auth", "token", "key", "secret", "password", "credential", "signature", "cookie")

Networks = Sequence[ipaddress.IPv4Network | ipaddress.IPv6Network]


# So many may be valid at once: each of them is one more signature.
MOST_SECRETS = 10


@dataclass(frozen=True, slots=True)
class Secret:
    """What deliveries are signed with: a `whsec_…`, and a `whsk_…` where Ed25519 is wanted as well. After a
    rotation it is valid until `expires_at`. `is_rotated`: not the one that the endpoint was made with."""

    symmetric: str = field(repr=False)
    private: str | None = field(default=None, repr=False)
    expires_at: int | None = None
    is_rotated: bool = False


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Empty `event_types` means the four endings; empty `accounts` means every account; `filter` is an
    expression over the body that must find something (`relay/filter.py`).

    `secrets` stand newest first; there are none where those at rest cannot be opened."""

    id: str
    tenant: str
    url: str
    secrets: Sequence[Secret]
    created_at: int
    updated_at: int
    description: str | None = None
    event_types: Sequence[str] = ()
    accounts: Sequence[str] = ()
    filter: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    metadata: Mapping[str, Any] = field(default_factory=dict)
    rate_limit: float | None = None  # attempts a second
    failing_since: int | None = None  # every attempt since then has failed
    failing_event: str | None = None  # the first of the events that failed
    disabled_at: int | None = None
    disabled_reason: str | None = None
    deleted_at: int | None = None

    def wants(self, event: Event) -> bool:
        return self.takes(event.type, event.account) and self.lets_through(event.body)

    def takes(self, event_type: str, account: str | None) -> bool:
        """Whether it wants such events, as far as their bodies do not matter."""
        if event_type not in (self.event_types or DEFAULT_TYPES):
            return False
        return not self.accounts or account in self.accounts

    def lets_through(self, body: bytes) -> bool:
        """Whether nothing in the body speaks against it."""
        return self.filter is None or passes(self.filter, body, endpoint=self.id)

    @property
    def public_key(self) -> str | None:
        """What everybody may verify its deliveries with; None unless they are signed with Ed25519 as well."""
        private = self.secrets[0].private if self.secrets else None
        return signature.public_key(private) if private else None

    def signing(self, now: int) -> tuple[str, ...]:
        """What to sign with, newest first: after a rotation the old secrets are valid for a while."""
        return valid(self.secrets, now)


def valid(secrets: Sequence[Secret], now: int) -> tuple[str, ...]:
    """Each `whsec_…` and `whsk_…` that has not expired, in their order."""
    return tuple(
        text
        for one in secrets
        if one.expires_at is None or one.expires_at > now
        for text in (one.symmetric, one.private)
        if text
    )


def rotated(secrets: Sequence[Secret], new: str, *, now: int, expires_at: int) -> tuple[Secret, ...]:
    """The secrets after a rotation: none of the old ones is valid for longer than until `expires_at`."""
    asymmetric = bool(secrets) and secrets[0].private is not None
    old = [replace(one, expires_at=min(one.expires_at or expires_at, expires_at)) for one in secrets]
    kept = [one for one in old if (one.expires_at or 0) > now]
    newest = Secret(new, signature.new_private_key() if asymmetric else None, is_rotated=True)
    return (newest, *kept[: MOST_SECRETS - 1])


def with_ed25519(secrets: Sequence[Secret], wanted: bool) -> tuple[Secret, ...]:
    """The secrets with a `whsk_…` for the newest, or with none at all."""
    if not wanted:
        return tuple(replace(one, private=None) for one in secrets)
    if not secrets or secrets[0].private is not None:
        return tuple(secrets)
    return (replace(secrets[0], private=signature.new_private_key()), *secrets[1:])


def canonical_url(text: str, *, allow_http: bool, allow: Networks) -> str:
    """The URL as it will be stored and connected to. Raises ValueError that says what is wrong with it.

    Plain http is only for `allow_http` or an address in `allow`. Which addresses a name may lead to is
    decided at connection time, not here.
    """
    if len(text) > 2048:
        raise ValueError("is longer than 2048 characters")
    if re.search(r"[\x00-\x20\x7f\\]", text):
        raise ValueError("must not contain spaces, control characters or backslashes")
    try:
        url = httpx.URL(text)
        host, port = url.raw_host.decode("ascii"), url.port
    except (httpx.InvalidURL, UnicodeError, ValueError) as error:
        # What comes behind a colon is a piece of the URL, and that may be a password.
        raise ValueError(f"is not a URL: {str(error).partition(':')[0]}") from error
    if url.scheme not in ("http", "https"):
        raise ValueError("must begin with https://")
    if not host:
        raise ValueError("has no host")
    if url.userinfo or "@" in re.split(r"[/?#]", text.split("//", 1)[-1], maxsplit=1)[0]:
        raise ValueError("must not contain a user name or password")
    if "#" in text:
        raise ValueError("must not contain a fragment")
    if port is not None and not 1 <= port <= 65535:
        raise ValueError("has a port that does not exist")
    literal = _literal(host)
    if url.scheme == "http" and not allow_http and not _inside(literal, allow):
        raise ValueError("must begin with https:// (network.allow_http permits plain http)")
    return str(url.copy_with(host=host.removesuffix(".") if literal is None else str(literal)))


def origin(text: str) -> tuple[str, str, int | None]:
    """Whom a URL talks to: scheme, host, port."""
    url = httpx.URL(text)
    return url.scheme, url.host, url.port


def _literal(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The address in a host, None for a name. Raises ValueError for what is neither."""
    bare = host.removeprefix("[").removesuffix("]")
    try:
        address = ipaddress.ip_address(bare)
    except ValueError:
        address = None
    if address is not None:
        if getattr(address, "scope_id", None):
            raise ValueError("must not contain a zone id")
        return address
    labels = host.removesuffix(".").lower().split(".")
    if len(host) > 253 or not all(_LABEL.fullmatch(label) for label in labels):
        raise ValueError(f"has a host that cannot exist: {host!r}")
    # inet_aton reads 127.1, 0x7f.1 and 2130706433 as addresses: no such spelling is taken for a name.
    if re.fullmatch(r"\d+|0x[0-9a-f]*", labels[-1]):
        raise ValueError("has a host that is neither a name nor a dotted address")
    return None


def _inside(address: ipaddress.IPv4Address | ipaddress.IPv6Address | None, networks: Networks) -> bool:
    return address is not None and any(address in network for network in networks)


def is_sensitive(header: str) -> bool:
    """Whether the name of a custom header says that its value is nobody's business."""
    name = header.lower()
    return any(word in name for word in _SENSITIVE)


def header_problem(name: str, value: str) -> str | None:
    """What is wrong with a custom header, None when it may be sent."""
    lowered = name.lower()
    if not _TOKEN.fullmatch(name):
        return "is not a header name"
    if lowered in _FORBIDDEN_HEADERS or lowered.startswith(_FORBIDDEN_PREFIXES):
        return "may not be set"
    if len(value) > 1024 or not _VISIBLE.fullmatch(value):
        return "must have a value of 1 to 1024 visible ASCII characters"
    return None
