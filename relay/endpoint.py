"""An endpoint is a subscriber's URL with its secrets and its filter."""

import ipaddress
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from relay.event import ENDINGS, Event

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
    *("expect", "host", "keep-alive", "metadata", "metadata-flavor", "origin", "proxy-authenticate"),
    *("proxy-authorization", "proxy-connection", "referer", "te", "trailer", "transfer-encoding", "upgrade"),
    *("user-agent", "via", "x-aws-ec2-metadata-token", "x-aws-ec2-metadata-token-ttl-seconds"),
}
_FORBIDDEN_PREFIXES = ("webhook-", "x-amz-", "x-goog-", "x-azure-", "x-forwarded-", "sec-")
_SENSITIVE = ("auth", "token", "key", "secret", "password", "credential", "signature", "cookie")

Networks = Sequence[ipaddress.IPv4Network | ipaddress.IPv6Network]


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Empty `event_types` means the four endings; empty `accounts` means every account."""

    id: str
    tenant: str
    url: str
    secret: str
    created_at: int
    updated_at: int
    description: str | None = None
    event_types: Sequence[str] = ()
    accounts: Sequence[str] = ()
    headers: Mapping[str, str] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)
    previous_secret: str | None = None
    previous_secret_expires_at: int | None = None
    rate_limit: float | None = None  # attempts a second
    failing_since: int | None = None  # every attempt since then has failed
    failing_event: str | None = None  # the first of the events that failed
    disabled_at: int | None = None
    disabled_reason: str | None = None
    deleted_at: int | None = None

    def wants(self, event: Event) -> bool:
        if self.event_types:
            if event.type not in self.event_types:
                return False
        elif event.type not in DEFAULT_TYPES:
            return False
        return not self.accounts or event.account in self.accounts

    def secrets(self, now: int) -> tuple[str, ...]:
        """What to sign with, newest first: after a rotation the old secret is valid for a while."""
        if self.previous_secret and (self.previous_secret_expires_at or 0) > now:
            return (self.secret, self.previous_secret)
        return (self.secret,)


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
