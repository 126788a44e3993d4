"""What a provider echoes or a broken provider file says never carries the credential on."""

import gc
import ipaddress
import json
import time
from base64 import b64encode
from collections.abc import Awaitable, Callable
from dataclasses import replace
from urllib.parse import quote

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from relay.asker import Asker
from relay.errors import ProviderError
from relay.guard import Guard
from relay.providers import Account, Provider, Reply
from relay.providers.vivix import Vivix
from relay.redact import Redactor
from tests.serving import serving

KEY = "vvx_live_a/secret"


class Broken(Vivix):
    """A provider file with a mistake that shows what it read."""

    def read(self, answer, *, now):
        raise LookupError(answer)


async def echo(request: Request) -> Response:
    said = request.headers["authorization"].removeprefix("Bearer ")
    return JSONResponse({"status": "failed", "error": said, "message": f"bad key {said}"})


async def ask(provider: Provider, answer: Callable[[Request], Awaitable[Response]] = echo):
    async with serving(Starlette(routes=[Route("/{path:path}", answer)])) as origin:
        guard = Guard([ipaddress.ip_network("127.0.0.0/8")])
        asker = Asker.open(guard, capability="https://r/hooks/", now=lambda: time.time_ns() // 1_000_000)
        try:
            account = Account("a", provider, KEY, origin, provider.pace)
            return asker.read(account, await asker.fetch(account, "job"))
        finally:
            await asker.close()


async def test_an_echoed_credential_is_blotted_out_of_every_part_of_the_problem():
    update = await ask(Vivix())
    assert update.error is not None
    assert KEY not in repr(update)
    assert update.error.message == "bad key [redacted]"


async def test_an_echoed_credential_is_blotted_out_wherever_the_answer_has_words():
    async def answer(request: Request) -> Response:
        said = request.headers["authorization"].removeprefix("Bearer ")
        return JSONResponse(
            {
                "status": "completed",
                "model": said,
                "output_urls": [
                    f"https://cdn.test/1.png?key={quote(said, safe='')}",
                    f"https://cdn.test/{said}",
                ],
                "headers": {said: [f"Bearer {said}", b64encode(f"me:{said}".encode()).decode()]},
            }
        )

    update = await ask(Vivix(), answer)
    assert len(update.outputs) == 2
    assert update.model == "[redacted]"
    assert not [piece for piece in (KEY, quote(KEY, safe=""), "bGl2ZV9h") if piece in repr(update)]


async def test_a_mistake_in_a_provider_file_is_an_unreadable_answer_without_the_credential():
    with pytest.raises(ProviderError) as raised:
        await ask(Broken())
    assert raised.value.code == "unreadable"
    assert KEY not in str(raised.value)


class Careless(Vivix):
    """Says what an update cannot hold."""

    def read(self, answer, *, now):
        return replace(super().read(answer, now=now), progress="half", credits="many")


async def test_a_provider_file_that_says_what_cannot_be_stored_is_an_unreadable_answer_that_names_it():
    with pytest.raises(ProviderError, match="progress, credits") as raised:
        await ask(Careless())
    assert raised.value.code == "unreadable"


class Odd(Vivix):
    """Finds words that no database holds."""

    def read(self, answer, *, now):
        raise ProviderError("unavailable", "a\0b\ud800c")


async def test_what_a_provider_says_can_be_stored():
    with pytest.raises(ProviderError) as raised:
        await ask(Odd())
    assert str(raised.value) == "a\ufffdb\ufffdc"


@pytest.mark.parametrize("host", ["10.0.0.5", "169.254.169.254", "[::ffff:10.0.0.5]"])
async def test_a_proxy_is_not_asked_for_an_address_that_the_guard_refuses(host: str):
    asked = []

    async def proxy(request: Request) -> Response:
        asked.append(str(request.url))
        return JSONResponse({"status": "completed"})

    async with serving(Starlette(routes=[Route("/{path:path}", proxy)])) as origin:
        asker = Asker.open(Guard([]), capability="https://r/hooks/", proxy=origin, now=lambda: 0)
        try:
            with pytest.raises(ProviderError, match="not allowed"):
                await asker.fetch(Account("a", Vivix(), KEY, f"http://{host}/v1", Vivix().pace), "job")
            assert asked == []
            await asker.fetch(Account("a", Vivix(), KEY, "http://vivix.example/v1", Vivix().pace), "job")
            assert len(asked) == 1
        finally:
            await asker.close()


def test_the_credentials_of_accounts_that_are_gone_are_kept_nowhere():
    provider = Vivix()
    asker = Asker(httpx.AsyncBaseTransport(), capability="https://r/hooks/", now=lambda: 0)

    def ask(key: str) -> None:
        account = Account("a", provider, key, provider.base_url, provider.pace)
        update = asker.read(account, Reply(200, json.dumps({"status": "failed", "error": key}).encode(), {}))
        assert key not in repr(update)

    def held() -> int:
        gc.collect()
        return sum(isinstance(one, Redactor) for one in gc.get_objects())

    before = held()
    for number in range(20):
        ask(f"{KEY}-{number}")
    assert held() <= before + 1
