"""Which addresses may be connected to; every outgoing connection asks here, at connection time.

The lists are the special-purpose registries of IANA and what clouds put beside them; Python's own
`is_global` and `is_private` let a third of those through.
"""

import asyncio
import ipaddress
import os
import socket
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.connector import AddrInfoType, TCPConnector

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

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
    """Permits public addresses, and those inside `allow`."""

    def __init__(self, allow: Sequence[Network]) -> None:
        self._allow = tuple(allow)
        self._known = lru_cache(maxsize=4096)(self._decide)

    def permits(self, address: str) -> bool:
        """Whether an address, in its text form, may be connected to; what is no address may not."""
        return self._known(address)

    def _decide(self, text: str) -> bool:
        try:
            address = ipaddress.ip_address(text)
        except ValueError:
            return False
        if isinstance(address, ipaddress.IPv6Address) and address.scope_id is not None:
            return False
        if any(address in network for network in self._allow):
            return True
        if isinstance(address, ipaddress.IPv4Address):
            return not any(address in network for network in _DENIED_V4)
        return address in _PUBLIC_V6 and not any(address in network for network in _DENIED_V6)

    def socket(self, address: AddrInfoType) -> socket.socket:
        """aiohttp's `socket_factory`: the last word before a connection, literals in URLs included."""
        family, kind, protocol, _, target = address
        if not self.permits(str(target[0])):
            raise BlockedAddress(f"connections to {target[0]} are not allowed")
        return socket.socket(family=family, type=kind, proto=protocol)


class GuardedResolver(AbstractResolver):
    """Looks names up in threads of its own; every address of an answer must pass the guard."""

    def __init__(self, guard: Guard, *, threads: int = 32) -> None:
        self._guard = guard
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="dns")

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        # A name with its final dot is looked up as it is, without the search domains of this machine.
        name = host if host.endswith(".") or host == "localhost" else host + "."
        loop = asyncio.get_running_loop()
        found = await loop.run_in_executor(
            self._threads, lambda: socket.getaddrinfo(name, port, family, socket.SOCK_STREAM)
        )
        addresses = [(kind, str(target[0])) for kind, _, _, _, target in found]
        for _, address in addresses:
            if not self._guard.permits(address):
                raise BlockedAddress(f"{host} leads to {address}, and connections there are not allowed")
        return [
            ResolveResult(
                hostname=host, host=address, port=port, family=kind, proto=0, flags=socket.AI_NUMERICHOST
            )
            for kind, address in addresses
        ]

    async def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)


def connector(guard: Guard, *, keepalive: float, limit: int) -> TCPConnector:
    """An aiohttp connector that connects nowhere else than where the guard permits."""
    return TCPConnector(
        resolver=GuardedResolver(guard),
        socket_factory=guard.socket,
        use_dns_cache=True,
        ttl_dns_cache=10,
        happy_eyeballs_delay=None,
        keepalive_timeout=keepalive,
        limit=limit,
    )


def cause(error: BaseException) -> BaseException:
    """What a client's error is about, however deep the client has wrapped it."""
    for _ in range(8):
        inner = getattr(error, "os_error", None) or error.__cause__
        if not isinstance(inner, BaseException):
            break
        error = inner
    return error


def reason(error: BaseException) -> str:
    """What went wrong, in a few words for people."""
    found = cause(error)
    if isinstance(found, OSError) and found.errno is not None and found.errno > 0:
        return os.strerror(found.errno)
    return str(found)[:300] or str(error)[:300] or type(error).__name__
