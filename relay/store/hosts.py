"""Where PostgreSQL is: what its URL says, and connections to whichever of its hosts takes one."""

import ssl
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

import asyncpg

from relay.errors import ConfigError
from relay.times import parse_duration

# For each host, as libpq has it: one that does not even refuse must leave time for the next one.
CONNECT_SECONDS = 3.0
# A server ends a statement at `command_timeout`; what says nothing even then is no server any more.
ANSWER_SECONDS = 1.0
_SHAPE = "postgresql://user:password@host:5432/database"
# Relay writes: a standby is of no use to it.
_SESSIONS = ("any", "primary", "read-write")
_FILES = ("sslrootcert", "sslcert", "sslkey", "sslcrl")
# Not there now, perhaps there soon, or at the next host.
_AWAY = (
    OSError,
    asyncpg.PostgresConnectionError,
    asyncpg.CannotConnectNowError,
    asyncpg.AdminShutdownError,
    asyncpg.CrashShutdownError,
    asyncpg.InsufficientResourcesError,
    asyncpg.TargetServerAttributeNotMatched,
)
_ADVICE: Sequence[tuple[type[Exception], str]] = (
    (
        asyncpg.InvalidAuthorizationSpecificationError,
        "check the user and the password in the URL, and the server's pg_hba.conf",
    ),
    (asyncpg.InvalidCatalogNameError, "create that database, or name another one in the URL"),
    (asyncpg.InsufficientPrivilegeError, "grant it to the user in the URL"),
    (asyncpg.CantChangeRuntimeParamError, "check what stands behind the ? of the URL"),
    (asyncpg.UndefinedObjectError, "check what stands behind the ? of the URL"),
    (ssl.SSLError, "check sslmode and sslrootcert in the URL"),
    (ConnectionError, "check sslmode in the URL"),
)


@dataclass(frozen=True, slots=True)
class Address:
    """What a URL says. `urls` is one for each host, as asyncpg reads them; `name` shows no credential."""

    urls: Sequence[str]
    name: str
    pool_size: int = 8
    statement_cache_size: int = 300
    command_timeout: int = 10_000


def read_url(url: str) -> Address:
    """Raises ConfigError, which names the parameter and never shows a password."""
    try:
        parts = urlsplit(url)
        given = dict(parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query)))
    except ValueError as error:
        # Its own message quotes what may be a part of the password.
        raise ConfigError(f"database: this URL cannot be read: write {_SHAPE}") from error
    user, at, hosts = parts.netloc.rpartition("@")
    if "@" in user or "@" in parts.path + (parts.query if not at else "") or parts.fragment:
        raise ConfigError(
            f"database: this URL cannot be read: write {_SHAPE}, and in the user and the password"
            " %40 for @, %3A for :, %2F for /, %3F for ?, %23 for #, %25 for %"
        )
    ours = {name: read(name, given.pop(name)) for name, read in _OURS.items() if name in given}
    _check(given)
    named = hosts.split(",")
    if len(named) > 1:
        given.setdefault("target_session_attrs", "read-write")
    given.setdefault("application_name", "relay")
    query = urlencode(given, quote_via=quote)
    for host in named:
        _check_host(host, alone=len(named) == 1)
    return Address(
        urls=[f"postgresql://{user}{at}{host}{parts.path}?{query}" for host in named],
        name=(hosts or given.get("host", "localhost")) + unquote(parts.path),
        **ours,
    )


class Hosts:
    """Connections to the first host that takes one; who does not is tried last the next time."""

    def __init__(self, address: Address) -> None:
        self._urls = list(address.urls)
        self._statement_cache_size = address.statement_cache_size
        self._command_timeout = address.command_timeout / 1000 + ANSWER_SECONDS

    @property
    def current(self) -> str:
        """The URL that the last connection was made to."""
        return self._urls[0]

    async def connect(self, *_: Any, **options: Any) -> "asyncpg.Connection[asyncpg.Record]":
        """A new connection, for the caller to close; asyncpg's pool has `options` of its own. Raises what one
        of the hosts said."""
        said: list[Exception] = []
        for url in tuple(self._urls):
            try:
                connection: asyncpg.Connection[asyncpg.Record] = await asyncpg.connect(
                    url,
                    timeout=CONNECT_SECONDS,
                    statement_cache_size=self._statement_cache_size,
                    command_timeout=self._command_timeout,
                    **options,
                )
                return connection
            except Exception as error:
                self._urls.remove(url)
                self._urls.append(url)
                said.append(error)
        # What somebody must do something about is more worth knowing than who is not there.
        raise next((error for error in said if not is_away(error)), said[-1])


def is_away(error: Exception) -> bool:
    """Whether it may be different soon, or elsewhere; a wrong password will not be."""
    if isinstance(error, ssl.SSLError):
        return isinstance(error, ssl.SSLEOFError)
    return isinstance(error, _AWAY) and not _refuses_tls(error)


def why(error: BaseException) -> str:
    """An error in one line, without the rows that PostgreSQL likes to show."""
    if isinstance(error, TimeoutError):
        return "it did not answer in time"
    said = getattr(error, "message", None) or (error.args[0] if isinstance(error, _SPEAKING) else error)
    lines = str(said).strip().splitlines()
    if not lines:
        return type(error).__name__
    if isinstance(error, asyncpg.DuplicatePreparedStatementError | asyncpg.InvalidSQLStatementNameError):
        return f"{lines[0]} (behind PgBouncer add statement_cache_size=0 to the URL)"
    return lines[0]


def advice(error: Exception) -> str:
    """What to do about an error that will not go away by itself."""
    known = next((text for kind, text in _ADVICE if isinstance(error, kind)), None)
    return f"{why(error)}; {known}" if known else why(error)


_SPEAKING = (asyncpg.PostgresError, asyncpg.InterfaceError)


def _refuses_tls(error: Exception) -> bool:
    return type(error) is ConnectionError and "rejected SSL" in str(error)


def _check(given: Mapping[str, str]) -> None:
    empty = next((name for name, value in given.items() if not value), None)
    if empty is not None:
        raise ConfigError(f"database: {empty} in this URL is empty: give it a value, or leave it out")
    wanted = given.get("target_session_attrs", "any")
    if wanted not in _SESSIONS:
        raise ConfigError(
            f"database: target_session_attrs is {wanted!r}: Relay writes, so write any, primary or read-write"
        )
    for name in _FILES:
        try:
            if name in given:
                with open(given[name], "rb"):
                    pass
        except OSError as error:
            raise ConfigError(f"database: {name}: {given[name]} cannot be read: {error.strerror}") from error


def _check_host(host: str, *, alone: bool) -> None:
    port = host.rpartition("]")[2].partition(":")[2]
    if port and not (port.isdigit() and 0 < int(port) < 65536):
        raise ConfigError(f"database: a port in this URL is no number: write {_SHAPE}")
    if not host and not alone:
        raise ConfigError("database: a host in this URL is empty: write them with one comma between two")


def _number(least: int, most: int) -> Callable[[str, str], int]:
    def read(name: str, text: str) -> int:
        if not text.isdecimal() or not least <= int(text) <= most:
            raise ConfigError(f"database: {name} is {text!r}: write a whole number from {least} to {most}")
        return int(text)

    return read


def _duration(name: str, text: str) -> int:
    try:
        milliseconds = parse_duration(f"{text}s" if text.isdecimal() else text)
    except ValueError as error:
        raise ConfigError(f"database: {name}: {error}") from error
    if not 100 <= milliseconds <= 600_000:
        raise ConfigError(f"database: {name} is {text!r}: write a duration from 100ms to 10m")
    return milliseconds


_OURS: Mapping[str, Callable[[str, str], int]] = {
    "pool_size": _number(2, 1000),
    "statement_cache_size": _number(0, 10_000),
    "command_timeout": _duration,
}
