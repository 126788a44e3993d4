"""The way out to providers: one GET for one job, at the account's configured base URL and nowhere else."""

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, replace
from email.utils import parsedate_to_datetime
from functools import partial
from typing import Any, Self
from weakref import WeakKeyDictionary

import httpx
from aiohttp import ClientError, ClientSession, ClientTimeout, DummyCookieJar
from httpx_aiohttp import AiohttpTransport
from pydantic import TypeAdapter, ValidationError

from relay import __version__
from relay.body import storable
from relay.errors import ProviderError
from relay.generation import Update
from relay.guard import Guard, connector, reason
from relay.providers import Account, Reply, understand
from relay.redact import Redactor, redact

TIMEOUT = 20.0
LARGEST_ANSWER = 1024 * 1024
LONGEST_COMPLAINT = 500
_UPDATE = TypeAdapter(Update)
_HEADERS = {
    # Some providers refuse clients that do not say who they are.
    "user-agent": f"Relay/{__version__}",
    "accept": "application/json",
    "accept-encoding": "identity",
}


class Asker:
    """Asks providers. Follows no redirect, keeps no cookie, uses no proxy of the environment.

    httpx's client would keep cookies and read `Location`: only its transport is used.
    """

    def __init__(
        self,
        transport: httpx.AsyncBaseTransport,
        *,
        capability: str,
        now: Callable[[], int],
        check: Callable[[str], None] = lambda url: None,
    ) -> None:
        self._transport, self._capability, self._now, self._check = transport, capability, now, check
        self._skews: deque[int] = deque(maxlen=15)
        # Tenants change their credentials as often as they like: what is gone is forgotten.
        self._known = WeakKeyDictionary[Account, Redactor]()

    @classmethod
    def open(cls, guard: Guard, *, capability: str, proxy: str | None = None, now: Callable[[], int]) -> Self:
        """Call it where a loop runs, and `close` the asker in the end.

        `capability` is the prefix of our own callback URLs, which no answer may carry on; `proxy` the
        operator's own.
        """
        session = ClientSession(
            connector=connector(
                guard, keepalive=30.0, limit=0, most_bytes=2 * LARGEST_ANSWER, proxied=proxy is not None
            ),
            cookie_jar=DummyCookieJar(),
            timeout=ClientTimeout(total=None),
            trust_env=False,
        )
        transport = AiohttpTransport(client=session, proxy=httpx.Proxy(proxy) if proxy else None)
        if proxy is None:
            return cls(transport, capability=capability, now=now)
        # Nothing else looks at an address when it is the proxy that is connected to.
        return cls(transport, capability=capability, now=now, check=guard.check_literal)

    async def close(self) -> None:
        await self._transport.aclose()

    @property
    def skew(self) -> int | None:
        """Milliseconds by which our clock is ahead of the providers', by their last answers; None without."""
        return sorted(self._skews)[len(self._skews) // 2] if self._skews else None

    def read(self, account: Account, reply: Reply) -> Update:
        """What the provider says about a job, with the credential and our own callback URLs blotted out.

        Raises ProviderError when the reply cannot be read or holds nothing about a job.
        """
        try:
            update = understand(account.provider, reply, now=self._now())
        except ProviderError as error:
            said = storable(self._clean(str(error), account))[:LONGEST_COMPLAINT]
            raise ProviderError(error.code, said, retry_after=error.retry_after) from error
        except Exception as error:
            said = storable(self._clean(repr(error), account))[:LONGEST_COMPLAINT]
            raise ProviderError("unreadable", f"{account.provider.name} failed to read it: {said}") from error
        try:
            # A provider file that is not ours may say anything, and what is stored must be readable again.
            _UPDATE.validate_python(asdict(replace(update, raw=None)))
        except ValidationError as error:
            said = ", ".join(".".join(map(str, one["loc"])) for one in error.errors())
            raise ProviderError("unreadable", f"{account.provider.name} gave a wrong {said}") from error
        return self._without_secrets(update, account)

    def _without_secrets(self, update: Update, account: Account) -> Update:
        clean = partial(self._clean, account=account)
        problem = update.error
        if problem is not None:
            problem = replace(
                problem, message=clean(problem.message), provider_code=clean(problem.provider_code)
            )
        outputs = tuple(
            replace(one, url=clean(one.url), permanent_url=clean(one.permanent_url)) for one in update.outputs
        )
        return replace(
            update,
            provider_status=clean(update.provider_status),
            model=clean(update.model),
            outputs=outputs,
            raw=clean(update.raw),
            error=problem,
        )

    async def fetch(self, account: Account, job_id: str) -> Reply:
        """The provider's reply as it came. Raises ProviderError when there is none."""
        try:
            url = account.url(job_id)
            self._check(url)
            request = httpx.Request(
                "GET",
                url,
                headers={**_HEADERS, "authorization": account.provider.authorization(account.api_key)},
            )
            async with asyncio.timeout(TIMEOUT):
                response = await self._transport.handle_async_request(request)
                try:
                    body = await _read(response)
                finally:
                    await response.aclose()
        except TimeoutError as error:
            raise ProviderError("unreachable", f"no whole answer within {TIMEOUT:g} s") from error
        except (httpx.HTTPError, httpx.InvalidURL, ClientError, OSError, ValueError) as error:
            said = reason(error, partial(self._clean, account=account))
            raise ProviderError("unreachable", f"cannot be asked: {said}") from error
        if account.owner is None:
            # What a tenant calls a provider may say anything, and all relays would count as out of order.
            self._compare_clocks(response.headers.get("date"))
        return Reply(response.status_code, body, dict(response.headers))

    def _clean(self, value: Any, account: Account) -> Any:
        known = self._known.get(account)
        if known is None:
            known = self._known[account] = Redactor(account.api_key, *account.webhook_secrets)
        return redact(value, known, capability=self._capability)

    def _compare_clocks(self, date: str | None) -> None:
        try:
            self._skews.append(self._now() - round(parsedate_to_datetime(date or "").timestamp() * 1000))
        except (ValueError, TypeError, OverflowError):
            return


async def _read(response: httpx.Response) -> bytes:
    body = bytearray()
    async for chunk in response.aiter_raw():
        body += chunk
        if len(body) > LARGEST_ANSWER:
            raise ProviderError("unreadable", f"the answer is larger than {LARGEST_ANSWER} bytes")
    return bytes(body)
