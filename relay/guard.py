"""Which addresses may be connected to; every outgoing connection asks here, at connection time.

The lists are the special-purpose registries of IANA and what clouds put beside them; Python's own
`is_global` and `is_private` let a third of those through.
"""

import asyncio
import ipaddress
import logging
import math
import os
import socket
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import lru_cache, partial
from typing import Any
from urllib.parse import urlsplit

import ifaddr
from aiohttp import ClientPayloadError
from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.client_proto import ResponseHandler
from aiohttp.connector import AddrInfoType, TCPConnector

from relay.body import storable

log = logging.getLogger(__name__)
Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network
_Question = tuple[str, socket.AddressFamily]
_Found = tuple[socket.AddressFamily, str]

# Seconds.
LOOKUP_TIMEOUT = 5.0
ANSWER_TTL, REFUSAL_TTL = 30.0, 10.0
OWN_TTL = 60.0
LOOKUPS_KEPT = 4096
ADDRESSES = 4

_DENIED_V4 = tuple(
    ipaddress.IPv4Network(text)
    for text in (
        *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12"),
        *("192.0.0.0/24", "192.0.2.0/24", "192.31.196.0/24", "192.52.193.0/24", "192.88.99.0/24"),
        *("192.168.0.0/16", "192.175.48.0/24", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24"),
        *("224.0.0.0/4", "240.0.0.0/4"),
        "168.63.129.16/32",  # Azure's platform address looks public
    )
)
_PUBLIC_V6 = ipaddress.IPv6Network("2000::/3")
_DENIED_V6 = tuple(
    ipaddress.IPv6Network(text)
    for text in ("2001::/23", "2001:db8::/32", "2002::/16", "2620:4f:8000::/48", "3fff::/20")
)


class BlockedAddress(OSError):
    """The guard refused an address; nothing was sent."""


class Guard:
    """Permits public addresses that are not this machine's own, and whatever is inside `allow`."""

    def __init__(self, allow: Sequence[Network], own: Callable[[], frozenset[str]] | None = None) -> None:
        self._allow = tuple(allow)
        self._own = own or _own_addresses
        self._known = lru_cache(maxsize=4096)(self._decide)
        self._mine: tuple[float, frozenset[str]] = (-math.inf, frozenset())

    def permits(self, address: str) -> bool:
        """Whether an address, in its text form, may be connected to; what is no address may not."""
        allowed, public, canonical = self._known(address)
        return allowed or (public and canonical not in self._own_now())

    def _decide(self, text: str) -> tuple[bool, bool, str]:
        """Whether it is inside `allow`, and whether it is public."""
        try:
            address = ipaddress.ip_address(text)
        except ValueError:
            return False, False, text
        if isinstance(address, ipaddress.IPv6Address) and address.scope_id is not None:
            return False, False, text
        allowed = any(address in network for network in self._allow)
        if isinstance(address, ipaddress.IPv4Address):
            return allowed, not any(address in network for network in _DENIED_V4), str(address)
        denied = any(address in network for network in _DENIED_V6)
        return allowed, address in _PUBLIC_V6 and not denied, str(address)

    def _own_now(self) -> frozenset[str]:
        # Interfaces come and go, but not with every connection.
        read_at, addresses = self._mine
        if time.monotonic() - read_at > OWN_TTL:
            addresses = self._own()
            self._mine = (time.monotonic(), addresses)
        return addresses

    def check_literal(self, url: str) -> None:
        """Raises BlockedAddress for a URL whose host is an address that may not be connected to."""
        host = urlsplit(url).hostname or ""
        with suppress(ValueError):
            ipaddress.ip_address(host)
            if not self.permits(host):
                raise BlockedAddress(f"connections to {host} are not allowed")

    def socket(self, address: AddrInfoType) -> socket.socket:
        """aiohttp's `socket_factory`: the last word before a connection, literals in URLs included."""
        family, kind, protocol, _, target = address
        if not self.permits(str(target[0])):
            raise BlockedAddress(f"connections to {target[0]} are not allowed")
        return socket.socket(family=family, type=kind, proto=protocol)


def _own_addresses() -> frozenset[str]:
    found = (ip.ip for adapter in ifaddr.get_adapters() for ip in adapter.ips)
    return frozenset(ip if isinstance(ip, str) else ip[0] for ip in found)


class GuardedResolver(AbstractResolver):
    """Looks names up in threads of its own, each name once at a time, and remembers the answer for a
    while; every address of an answer must pass the guard. A dead name delays nobody else; while so many are
    dead that no thread is left, what was known of a name before goes for it, and others wait."""

    def __init__(self, guard: Guard, *, threads: int = 256) -> None:
        self._guard = guard
        self._most_threads, self._threads = threads, 0
        self._waiting: deque[tuple[_Question, asyncio.Future[Sequence[_Found]]]] = deque()
        self._answers: dict[_Question, tuple[float, asyncio.Future[Sequence[_Found]]]] = {}

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        found = await self._look_up((host, family))
        for _, address in found:
            if not self._guard.permits(address):
                # Where names inside lead is the operator's business, and who gave this one may be a stranger.
                log.info("guard.refused", extra={"host": host, "address": address})
                raise BlockedAddress(f"{host} leads to an address that connections are not allowed to")
        return [
            ResolveResult(
                hostname=host, host=address, port=port, family=kind, proto=0, flags=socket.AI_NUMERICHOST
            )
            for kind, address in found[:ADDRESSES]
        ]

    async def close(self) -> None:
        self._answers.clear()

    async def _look_up(self, question: _Question) -> Sequence[_Found]:
        loop = asyncio.get_running_loop()
        until, answer = self._answers.get(question, (0.0, None))
        if answer is None or (answer.done() and loop.time() > until):
            if answer is not None and self._threads >= self._most_threads and answer.exception() is None:
                return answer.result()
            if len(self._answers) > LOOKUPS_KEPT:
                self._forget(loop.time())
            answer = self._begin(question)
            self._answers[question] = (loop.time() + ANSWER_TTL, answer)
            answer.add_done_callback(lambda done: self._keep(question, done, loop.time()))
        try:
            async with asyncio.timeout(LOOKUP_TIMEOUT):
                # Whoever asks next finds this look-up under way, also when this one gave up.
                return await asyncio.shield(answer)
        except TimeoutError as error:
            raise OSError(f"{question[0]} could not be looked up within {LOOKUP_TIMEOUT:g} s") from error

    def _begin(self, question: _Question) -> asyncio.Future[Sequence[_Found]]:
        if len(self._waiting) >= LOOKUPS_KEPT:
            raise OSError("too many names are being looked up")
        answer: asyncio.Future[Sequence[_Found]] = asyncio.get_running_loop().create_future()
        self._waiting.append((question, answer))
        self._work_off()
        return answer

    def _work_off(self) -> None:
        while self._waiting and self._threads < self._most_threads:
            self._start(*self._waiting.popleft())

    def _start(self, question: _Question, answer: asyncio.Future[Sequence[_Found]]) -> None:
        """Looks up in a thread that keeps nobody waiting: neither other look-ups nor the program's end."""
        loop = asyncio.get_running_loop()

        def finish(found: Sequence[_Found] | OSError | UnicodeError) -> None:
            self._threads -= 1
            if isinstance(found, Exception):
                answer.set_exception(found)
                answer.exception()  # whoever asked may have gone
            else:
                answer.set_result(found)
            self._work_off()

        def work() -> None:
            try:
                found: Sequence[_Found] | OSError | UnicodeError = _getaddrinfo(question)
            except (OSError, UnicodeError) as error:
                found = error
            with suppress(RuntimeError):  # the loop has ended meanwhile
                loop.call_soon_threadsafe(finish, found)

        self._threads += 1
        threading.Thread(target=work, name="dns", daemon=True).start()

    def _keep(self, question: _Question, answer: asyncio.Future[Sequence[_Found]], now: float) -> None:
        if answer.cancelled():
            self._answers.pop(question, None)
            return
        ttl = ANSWER_TTL if answer.exception() is None else REFUSAL_TTL
        self._answers[question] = (now + ttl, answer)

    def _forget(self, now: float) -> None:
        self._answers = {
            question: (until, answer)
            for question, (until, answer) in self._answers.items()
            if not answer.done() or now <= until
        }


def _getaddrinfo(question: _Question) -> Sequence[_Found]:
    host, family = question
    # A name with its final dot is looked up as it is, without the search domains of this machine.
    name = host if host.endswith(".") or host == "localhost" else host + "."
    found = socket.getaddrinfo(name, None, family, socket.SOCK_STREAM)
    return [(kind, str(target[0])) for kind, _, _, _, target in found]


def connector(
    guard: Guard, *, keepalive: float, limit: int, most_bytes: int, proxied: bool = False
) -> TCPConnector:
    """An aiohttp connector that connects nowhere else than where the guard permits, and reads no more than
    `most_bytes` of an answer.

    `proxied`: every connection goes to the operator's own proxy, which may be anywhere, and which decides.
    """
    made = (
        TCPConnector(keepalive_timeout=keepalive, limit=limit)
        if proxied
        else TCPConnector(
            resolver=GuardedResolver(guard),
            socket_factory=guard.socket,
            use_dns_cache=False,
            happy_eyeballs_delay=None,
            keepalive_timeout=keepalive,
            limit=limit,
        )
    )
    # aiohttp has no public way to bound what is read off the wire.
    made._factory = partial(_Bounded, most_bytes)  # type: ignore[assignment] # it only ever calls it
    return made


class _Bounded(ResponseHandler):
    """A connection that is cut when one answer is longer on the wire than it may be: extensions of chunks
    and interim answers count as well."""

    def __init__(self, most_bytes: int) -> None:
        super().__init__(asyncio.get_running_loop())
        self._most = self._left = most_bytes

    def set_response_params(self, **params: Any) -> None:
        self._left = self._most
        super().set_response_params(**params)

    def data_received(self, data: bytes) -> None:
        self._left -= len(data)
        if self._left >= 0:
            super().data_received(data)
            return
        error = ClientPayloadError(f"the answer is longer than {self._most} bytes")
        self.set_exception(error)
        if self._payload is not None:
            self._payload.set_exception(error)
        if self.transport is not None:
            self.transport.abort()


def cause(error: BaseException) -> BaseException:
    """What a client's error is about, however deep the client has wrapped it."""
    for _ in range(8):
        inner = getattr(error, "os_error", None) or error.__cause__
        if not isinstance(inner, BaseException):
            break
        error = inner
    return error


def reason(error: BaseException, clean: Callable[[str], str] = str) -> str:
    """What went wrong, in a few words for people, which went through `clean` before they were cut short."""
    found = cause(error)
    if isinstance(found, ssl.SSLCertVerificationError):
        return found.verify_message
    if isinstance(found, ssl.SSLError):
        return found.reason or str(found)
    if isinstance(found, OSError) and found.errno is not None and found.errno > 0:
        return os.strerror(found.errno)
    return storable(clean(str(found) or str(error) or type(error).__name__)[:300])
