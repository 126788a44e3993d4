"""The way out to subscribers: one entrance, `Sender.send`, which answers for everything that can happen."""

import asyncio
import ssl
from collections.abc import Callable, Mapping
from typing import Self

import aiohttp
from aiohttp import BytesPayload, ClientResponse, ClientSession, ClientTimeout, DummyCookieJar
from yarl import URL

from relay import __version__
from relay.body import storable
from relay.delivery import Answer, Code
from relay.guard import BlockedAddress, Guard, cause, connector, reason
from relay.times import parse_retry_after

USER_AGENT = f"Relay/{__version__}"
_READ = 64 * 1024
_ON_THE_WIRE = 512 * 1024
_KEPT = 16 * 1024
# Where a long answer is cut off, so much at most may be the beginning of a secret.
_LONGEST_SECRET = 8 * 1024
# A receiver that closes an idle connection while we reuse it costs an attempt: reuse only briefly.
_KEEPALIVE = 4.0
_JSON = "application/json"
_HEADERS = {"content-type": _JSON, "user-agent": USER_AGENT, "accept-encoding": "identity"}
_FAILURES: tuple[tuple[type[BaseException], Code], ...] = (
    (TimeoutError, Code.TIMEOUT),
    (aiohttp.ClientConnectorDNSError, Code.DNS),
    (aiohttp.ClientSSLError, Code.TLS),
    (ssl.SSLError, Code.TLS),
    (aiohttp.ClientConnectorError, Code.CONNECT),
    (aiohttp.ClientConnectionError, Code.DISCONNECTED),
    (aiohttp.ClientPayloadError, Code.DISCONNECTED),
    (aiohttp.ClientError, Code.BAD_RESPONSE),
    (OSError, Code.DISCONNECTED),
)


class Sender:
    """POSTs bodies. Follows no redirect, keeps no cookie, uses no proxy of the environment, decodes nothing,
    reads at most 64 KiB of an answer, and takes no longer than its deadline in all."""

    def __init__(
        self, session: ClientSession, guard: Guard, *, timeout: int, proxy: str | None, now: Callable[[], int]
    ) -> None:
        self._session, self._guard, self._proxy = session, guard, proxy
        self._timeout, self._now = timeout, now

    @classmethod
    def open(cls, guard: Guard, *, timeout: int, proxy: str | None = None, now: Callable[[], int]) -> Self:
        """`timeout` in milliseconds; call it where a loop runs, and `close` the sender in the end.

        With an operator's egress `proxy` names are looked up there; literal addresses are still checked.
        """
        session = ClientSession(
            connector=connector(
                guard, keepalive=_KEEPALIVE, limit=0, proxied=proxy is not None, most_bytes=_ON_THE_WIRE
            ),
            cookie_jar=DummyCookieJar(),
            timeout=ClientTimeout(total=None),
            auto_decompress=False,
            trust_env=False,
            headers=_HEADERS,
        )
        return cls(session, guard, timeout=timeout, proxy=proxy, now=now)

    async def close(self) -> None:
        await self._session.close()

    async def send(
        self, url: str, body: bytes, headers: Mapping[str, str], *, clean: Callable[[str], str] = str
    ) -> Answer:
        """The outcome of one POST, in words that went through `clean`. Raises nothing but cancellation."""
        started_at = self._now()
        loop = asyncio.get_running_loop()
        begun = loop.time()
        status = excerpt = code = message = retry_after = None
        try:
            if self._proxy is not None:
                self._guard.check_literal(url)
            async with asyncio.timeout(self._timeout / 1000):
                async with self._session.post(
                    # The URL was made canonical when it was stored: nothing may re-read it differently now.
                    URL(url, encoded=True),
                    data=BytesPayload(body, content_type=_JSON),
                    headers=headers,
                    allow_redirects=False,
                    proxy=self._proxy,
                ) as response:
                    status = response.status
                    retry_after = parse_retry_after(response.headers.get("retry-after"), started_at)
                    excerpt = await _excerpt(response, clean)
            code, message = _judge(status)
        except Exception as error:
            code, message = _explain(error, self._timeout, clean)
            if code is Code.BLOCKED_ADDRESS:
                status = excerpt = None
        return Answer(
            started_at=started_at,
            duration_ms=round((loop.time() - begun) * 1000),
            status=status,
            body=excerpt,
            code=code,
            message=message,
            retry_after=retry_after,
        )


async def _excerpt(response: ClientResponse, clean: Callable[[str], str]) -> str:
    """The beginning of the body, as text for people; what is left unread costs the connection."""
    read = bytearray()
    while len(read) < _READ:
        chunk = await response.content.readany()
        if not chunk:
            break
        read += chunk
    if not read:
        return ""
    text = clean(read.decode("utf-8", "replace"))
    if not response.content.at_eof():
        response.close()
        text = text[:-_LONGEST_SECRET]
    return storable(text[:_KEPT]).encode()[:_KEPT].decode("utf-8", "ignore")


def _judge(status: int) -> tuple[Code | None, str | None]:
    if 200 <= status <= 299:
        return None, None
    if 300 <= status <= 399:
        return Code.REDIRECT, f"the endpoint answered {status}; redirects are not followed"
    return Code.HTTP_STATUS, f"the endpoint answered {status}"


def _explain(error: Exception, timeout: int, clean: Callable[[str], str]) -> tuple[Code, str]:
    if isinstance(cause(error), BlockedAddress):
        return Code.BLOCKED_ADDRESS, str(cause(error))
    if isinstance(error, aiohttp.InvalidURL):
        return Code.BLOCKED_ADDRESS, "this URL cannot be connected to"
    code = next((code for kind, code in _FAILURES if isinstance(error, kind)), Code.INTERNAL)
    if code is Code.TIMEOUT:
        return code, f"no whole answer within {timeout / 1000:g} s"
    return code, reason(error, clean)
