"""The way out to providers: one GET for one job, at the account's configured base URL and nowhere else."""

import asyncio
import re
from collections import deque
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from typing import Self

import httpx
from aiohttp import ClientError, ClientSession, ClientTimeout, DummyCookieJar
from httpx_aiohttp import AiohttpTransport

from relay import __version__
from relay.errors import ProviderError
from relay.generation import Update
from relay.guard import Guard, connector, reason
from relay.providers import Account, Reply, understand

TIMEOUT = 20.0
LARGEST_ANSWER = 1024 * 1024
_CAPABILITY = re.compile(rb"(/hooks/[\w.-]+/)[\w.-]+")


class Asker:
    """Asks providers. Follows no redirect, keeps no cookie, uses no proxy of the environment."""

    def __init__(self, client: httpx.AsyncClient, *, now: Callable[[], int]) -> None:
        self._client, self._now = client, now
        self._skews: deque[int] = deque(maxlen=15)

    @classmethod
    def open(cls, guard: Guard, *, now: Callable[[], int]) -> Self:
        """Call it where a loop runs, and `close` the asker in the end."""
        session = ClientSession(
            connector=connector(guard, keepalive=30.0, limit=256),
            cookie_jar=DummyCookieJar(),
            timeout=ClientTimeout(total=None),
            trust_env=False,
        )
        client = httpx.AsyncClient(
            transport=AiohttpTransport(client=session),
            timeout=TIMEOUT,
            follow_redirects=False,
            trust_env=False,
            # Some providers refuse clients that do not say who they are.
            headers={
                "user-agent": f"Relay/{__version__}",
                "accept": "application/json",
                "accept-encoding": "identity",
            },
        )
        return cls(client, now=now)

    async def close(self) -> None:
        await self._client.aclose()

    @property
    def skew(self) -> int | None:
        """Milliseconds by which our clock is ahead of the providers', by their last answers; None without."""
        return sorted(self._skews)[len(self._skews) // 2] if self._skews else None

    def _compare_clocks(self, date: str | None) -> None:
        try:
            self._skews.append(self._now() - round(parsedate_to_datetime(date or "").timestamp() * 1000))
        except (ValueError, TypeError, OverflowError):
            return

    async def ask(self, account: Account, job_id: str) -> Update:
        """What the provider says about a job now. Raises ProviderError when it cannot be asked or read."""
        reply = await self.fetch(account, job_id)
        return understand(account.provider, reply, now=self._now())

    async def fetch(self, account: Account, job_id: str) -> Reply:
        """The provider's reply, with the credential and our own callback URLs blotted out of it."""
        headers = {"authorization": account.provider.authorization(account.api_key)}
        try:
            async with (
                asyncio.timeout(TIMEOUT),
                self._client.stream("GET", account.url(job_id), headers=headers) as response,
            ):
                body = await _read(response)
        except TimeoutError as error:
            raise ProviderError("unreachable", f"no whole answer within {TIMEOUT:g} s") from error
        except (httpx.HTTPError, httpx.InvalidURL, ClientError, OSError, ValueError) as error:
            raise ProviderError("unreachable", f"cannot be asked: {reason(error)}") from error
        self._compare_clocks(response.headers.get("date"))
        body = body.replace(account.api_key.encode(), b"[redacted]")
        return Reply(response.status_code, _CAPABILITY.sub(rb"\1[redacted]", body), dict(response.headers))


async def _read(response: httpx.Response) -> bytes:
    body = bytearray()
    async for chunk in response.aiter_raw():
        body += chunk
        if len(body) > LARGEST_ANSWER:
            raise ProviderError("unreadable", f"the answer is larger than {LARGEST_ANSWER} bytes")
    return bytes(body)
