"""Accounts of several tenants: shared by the configuration, or added by API, over real HTTP."""

import asyncio
import hmac
import json
import sqlite3
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from relay.providers import PROVIDERS
from relay.simulator import Simulator
from relay.store.credentials import MOST
from tests.conftest import RunningRelay, World
from tests.serving import serving

ALL = ["admin"]
KEY = "luma-key-of-the-tenant-0123456789"


@dataclass
class Tenant:
    """A tenant at a relay, and the providers where its own keys are good."""

    name: str
    api: httpx.AsyncClient
    simulator: Simulator
    origin: str

    def account(self, provider: str = "luma", **fields: Any) -> dict[str, Any]:
        """What it says of an account at its own simulator."""
        made = {
            "name": provider,
            "provider": provider,
            "api_key": self.simulator.keys[provider],
            "base_url": Simulator.base_urls(self.origin)[provider],
            "poll_interval_seconds": 0.1,
        }
        return {**made, **fields}

    async def add(self, provider: str = "luma", **fields: Any) -> dict[str, Any]:
        answer = await self.api.post("/v1/accounts", json=self.account(provider, **fields))
        assert answer.status_code == 201, answer.text
        return dict(answer.json())

    async def watch(self, account: str = "luma", **plan: Any) -> dict[str, Any]:
        job_id = self.simulator.submit(account, **{"duration": 0.2, **plan})
        return await self.watch_job(account, job_id)

    async def watch_job(self, account: str, job_id: str | None, **fields: Any) -> dict[str, Any]:
        answer = await self.api.post("/v1/generations", json={"account": account, "job_id": job_id, **fields})
        assert answer.status_code == 201, answer.text
        return dict(answer.json())

    async def shown(self, account: str = "luma") -> dict[str, Any]:
        answer = await self.api.get(f"/v1/accounts/{account}")
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    async def names(self) -> list[str]:
        return [one["name"] for one in (await self.api.get("/v1/accounts")).json()["data"]]

    async def eventually(self, path: str, true: Callable[[Any], bool], *, timeout: float = 15) -> Any:
        async with asyncio.timeout(timeout):
            while True:
                answer = await self.api.get(path)
                if answer.status_code == 200 and true(answer.json()):
                    return answer.json()
                await asyncio.sleep(0.02)

    def asked(self, provider: str = "luma") -> list[int | None]:
        """What its provider answered when it was asked about jobs."""
        return [
            one.status for one in self.simulator.requests if one.provider == provider and one.method == "GET"
        ]


async def client(
    stack: AsyncExitStack, relay: RunningRelay, tenant: str, scopes: Sequence[str] = ALL
) -> httpx.AsyncClient:
    """Somebody of a tenant."""
    answer = await relay.api.post("/v1/keys", json={"tenant": tenant, "scopes": list(scopes)})
    assert answer.status_code == 201, answer.text
    headers = {"authorization": f"Bearer {answer.json()['key']}"}
    return await stack.enter_async_context(
        httpx.AsyncClient(base_url=relay.origin, headers=headers, timeout=30)
    )


async def tenant(world: World, relay: RunningRelay, name: str, seed: int = 7) -> Tenant:
    keys = {provider: f"{provider}-key-of-{name}-0123456789" for provider in Simulator.base_urls("")}
    simulator = Simulator(seed=seed, now=lambda: world.clock() / 1000, keys=keys)
    origin = await world.stack.enter_async_context(serving(simulator.app))
    return Tenant(name, await client(world.stack, relay, name), simulator, origin)


async def two(world: World, relay: RunningRelay) -> tuple[Tenant, Tenant]:
    return await tenant(world, relay, "acme", seed=7), await tenant(world, relay, "bolt", seed=8)


@asynccontextmanager
async def provider_answering(answer: Callable[[Request], Any]) -> AsyncIterator[str]:
    """The origin of a provider that answers every GET with what `answer` gives."""

    async def get(request: Request) -> Response:
        given = answer(request)
        return given if isinstance(given, Response) else JSONResponse(given)

    async with serving(Starlette(routes=[Route("/{path:path}", get)])) as origin:
        yield origin


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(15):
        while not true():  # noqa: ASYNC110 # nobody tells when
            await asyncio.sleep(0.01)


def without_accounts(world: World, **changes: Any) -> dict[str, Any]:
    return {**world.document(), "accounts": {}, **changes}


async def test_two_tenants_call_their_accounts_the_same_and_neither_notices_the_other(world: World):
    relay = await world.relay()  # its own luma is for the tenant default
    tenants = await two(world, relay)
    watched: dict[str, dict[str, Any]] = {}
    for one in tenants:
        url = f"{world.subscriber.origin}/{one.name}"
        assert (
            await one.api.post("/v1/endpoints", json={"url": url, "accounts": ["luma"]})
        ).status_code == 422
        await one.add()
        body = {"url": url, "accounts": ["luma"], "event_types": ["generation.completed"]}
        assert (await one.api.post("/v1/endpoints", json=body)).status_code == 201
        # The same job id at both: another one's must not be found in its stead.
        watched[one.name] = await one.watch(job_id="11111111-1111-4111-8111-111111111111")
        assert watched[one.name]["account"] == "luma"
    for one in tenants:
        [received] = await world.subscriber.got(1, path=f"/{one.name}")
        told = json.loads(received.body)["data"]
        assert (told["id"], told["account"], told["status"]) == (watched[one.name]["id"], "luma", "completed")
        assert set(one.asked()) == {200}
        for path in ("/v1/generations?account=luma", "/v1/events?account=luma"):
            [found] = (await one.api.get(path)).json()["data"]
            assert found["account"] == "luma", path
        for other in (f"{one.name}.luma", "bolt.luma", "acme.luma", "vivix", "Luma", ""):
            answer = await one.api.get("/v1/generations", params={"account": other})
            assert answer.json()["data"] == [], other
        assert await one.names() == ["luma"]
    assert [one for one in world.simulator.requests if one.provider == "luma"] == []
    assert len(world.subscriber.received) == 2


async def test_a_list_by_account_goes_on_where_it_stopped(world: World):
    """Also over two accounts that the tenant knows by one name: the own one, and the one before."""
    accounts = {"luma": {**world.document()["accounts"]["luma"], "tenants": ["acme"], "poll_interval": "1h"}}
    expected: list[str] = []
    async with world.running(accounts=accounts) as relay:
        acme = await tenant(world, relay, "acme")
        expected += [(await acme.watch_job("luma", f"job-{number}"))["id"] for number in range(3)]
        key = acme.api.headers["authorization"]
    async with world.running(accounts={}) as relay:
        acme.api = relay.api
        relay.api.headers["authorization"] = key
        await acme.add(poll_interval_seconds=3600)
        expected += [(await acme.watch_job("luma", f"job-{number}"))["id"] for number in range(3)]
        found, cursor = [], None
        for _ in range(6):
            params = {"account": "luma", "limit": 1} | ({"cursor": cursor} if cursor else {})
            page = (await acme.api.get("/v1/generations", params=params)).json()
            found += [one["id"] for one in page["data"]]
            cursor = page["next_cursor"]
        assert cursor is None
    assert found == expected[::-1]


async def test_an_account_is_shared_with_whom_the_configuration_names_and_with_nobody_else(world: World):
    mine = world.document()["accounts"]
    accounts = {
        "luma": {**mine["luma"], "tenants": ["acme", "bolt"]},
        "vivix": {**mine["vivix"], "tenants": "all"},
        "pixellabs": mine["pixellabs"],
    }
    relay = await world.relay(accounts=accounts)
    acme, bolt = await two(world, relay)
    carl = await client(world.stack, relay, "carl")
    names = {
        name: [one["name"] for one in (await api.get("/v1/accounts")).json()["data"]]
        for name, api in (("acme", acme.api), ("bolt", bolt.api), ("carl", carl), ("default", relay.api))
    }
    assert names == {
        "acme": ["luma", "vivix"],
        "bolt": ["luma", "vivix"],
        "carl": ["vivix"],
        "default": ["pixellabs", "vivix"],
    }
    for api, name in ((carl, "luma"), (relay.api, "luma"), (acme.api, "pixellabs"), (acme.api, "nobody")):
        answers = [
            await api.get(f"/v1/accounts/{name}"),
            await api.post("/v1/generations", json={"account": name, "job_id": "j"}),
            await api.post("/v1/endpoints", json={"url": "https://a.example", "accounts": [name]}),
            await api.patch(f"/v1/accounts/{name}", json={"requests_per_day": 1}),
            await api.delete(f"/v1/accounts/{name}"),
        ]
        assert [one.status_code for one in answers] == [404, 422, 422, 404, 404], name
        nobody = [
            await api.get("/v1/accounts/nobody"),
            await api.post("/v1/generations", json={"account": "nobody", "job_id": "j"}),
        ]
        assert [one.text.replace(name, "nobody") for one in answers[:2]] == [one.text for one in nobody]
    # Whoever has it uses it; each hears of his own job only.
    for api, path in ((acme.api, "/acme"), (bolt.api, "/bolt")):
        await api.post("/v1/endpoints", json={"url": world.subscriber.origin + path, "accounts": ["luma"]})
        job_id = world.simulator.submit("luma", duration=0)
        made = await api.post("/v1/generations", json={"account": "luma", "job_id": job_id})
        assert made.status_code == 201
        [received] = await world.subscriber.got(1, path=path)
        assert json.loads(received.body)["data"]["job_id"] == job_id
        for other in (acme.api, bolt.api, carl, relay.api):
            shown = await other.get(f"/v1/generations/{made.json()['id']}")
            assert shown.status_code == (200 if other is api else 404)


async def test_those_who_have_an_account_are_told_that_it_fails_but_not_what_was_said_of_anothers_job(
    world: World,
):
    mine = world.document()["accounts"]
    secret = "the prompt of somebody else was refused"

    def answer(request: Request) -> Response:
        return JSONResponse({"detail": secret}, 401)

    async with provider_answering(answer) as origin:
        to = {"base_url": f"{origin}/v1"}
        accounts = {
            "luma": {**mine["luma"], **to, "tenants": ["acme", "bolt"]},
            "vivix": {**mine["vivix"], **to, "tenants": "all"},
            "pixellabs": {**mine["pixellabs"], **to, "tenants": ["acme"]},
        }
        relay = await world.relay(accounts=accounts)
        acme, bolt = await two(world, relay)
        await bolt.add("pictory")
        apis = {"acme": acme.api, "bolt": bolt.api, "default": relay.api}
        for name, api in apis.items():
            body = {"url": f"{world.subscriber.origin}/{name}", "event_types": ["account.failing"]}
            assert (await api.post("/v1/endpoints", json=body)).status_code == 201
        bolt.simulator.keys["pictory"] = "another"
        for name in ("luma", "vivix", "pixellabs"):
            await acme.watch_job(name, world.simulator.submit(name))
        await bolt.watch("pictory")
        await world.subscriber.got(5)
        told = {
            name: {
                one["data"]["account"]: one["data"]["reason"]
                for one in (json.loads(each.body) for each in world.subscriber._at(f"/{name}"))
            }
            for name in apis
        }
        assert {name: set(one) for name, one in told.items()} == {
            "acme": {"luma", "pixellabs"},
            "bolt": {"luma", "pictory"},
            "default": {"vivix"},
        }
        assert told["acme"]["luma"] == told["bolt"]["luma"] == "unauthorized"
        # It is nobody's but his, or he is the operator.
        assert secret in told["acme"]["pixellabs"]
        assert secret in told["default"]["vivix"]
        shown = {
            name: (await api.get("/v1/accounts/vivix")).json()["last_error"] for name, api in apis.items()
        }
        assert shown == {"acme": "unauthorized", "bolt": "unauthorized", "default": told["default"]["vivix"]}


async def test_nobody_else_sees_uses_changes_or_deletes_an_added_account(world: World):
    relay = await world.relay(accounts={})
    acme, bolt = await two(world, relay)
    await acme.add(poll_interval_seconds=3600)
    generation = await acme.watch(duration=1e6)
    for api in (bolt.api, relay.api):
        assert (await api.get("/v1/accounts")).json()["data"] == []
        for name in ("luma", "acme.luma"):
            answers = [
                await api.get(f"/v1/accounts/{name}"),
                await api.patch(f"/v1/accounts/{name}", json={"api_key": "the-key-of-a-thief"}),
                await api.delete(f"/v1/accounts/{name}"),
                await api.post("/v1/generations", json={"account": name, "job_id": "j"}),
                await api.post("/v1/endpoints", json={"url": "https://a.example", "accounts": [name]}),
            ]
            assert [one.status_code for one in answers] == [404, 404, 404, 422, 422]
        assert (await api.post(f"/v1/generations/{generation['id']}/refresh")).status_code == 404
        assert (await api.get("/v1/generations", params={"account": "luma"})).json()["data"] == []
    assert [one["name"] for one in (await acme.api.get("/v1/accounts")).json()["data"]] == ["luma"]
    refreshed = await acme.api.post(f"/v1/generations/{generation['id']}/refresh")
    assert (refreshed.status_code, acme.asked()[-1]) == (200, 200)
    assert (await acme.shown())["api_key_hint"] == "6789"


async def test_only_admins_of_a_tenant_add_change_and_delete_accounts(world: World):
    relay = await world.relay(accounts={})
    acme = await tenant(world, relay, "acme")
    await acme.add()
    worker = await client(world.stack, relay, "acme", ["read", "write", "replay"])
    assert (await worker.get("/v1/accounts/luma")).status_code == 200
    assert (await worker.post("/v1/accounts", json=acme.account(name="more"))).status_code == 403
    assert (await worker.patch("/v1/accounts/luma", json={})).status_code == 403
    assert (await worker.delete("/v1/accounts/luma")).status_code == 403
    assert await acme.names() == ["luma"]


async def test_what_is_done_with_accounts_is_in_the_audit_log_without_a_value(world: World):
    relay = await world.relay(accounts={})
    acme = await tenant(world, relay, "acme")
    await acme.add()
    await acme.api.post("/v1/accounts", json=acme.account())  # refused
    await acme.api.patch("/v1/accounts/luma", json={"api_key": "the-second-key-0123456789", "base_url": None})
    await acme.api.delete("/v1/accounts/luma")
    await acme.api.delete("/v1/accounts/luma")  # it is gone
    answer = await acme.api.get("/v1/audit")
    noted = [one for one in answer.json()["data"] if one["action"].startswith("account.")]
    assert [(one["action"], one["object"]) for one in noted[::-1]] == [
        ("account.created", "luma"),
        ("account.changed", "luma"),
        ("account.deleted", "luma"),
    ]
    assert "base_url" in json.dumps(noted[1])
    assert "the-second-key" not in answer.text
    assert acme.simulator.keys["luma"] not in answer.text


async def test_accounts_of_the_configuration_are_changed_there(world: World):
    relay = await world.relay()
    for method in ("PATCH", "DELETE"):
        answer = await relay.api.request(method, "/v1/accounts/luma", json={})
        assert answer.status_code == 409
        assert "configuration file (accounts.luma)" in answer.json()["detail"]
    shown = (await relay.api.get("/v1/accounts/luma")).json()
    assert (shown["configured"], shown["api_key_hint"]) == (True, None)


async def test_a_name_that_is_taken_or_seen_already_is_refused(world: World):
    mine = world.document()["accounts"]
    accounts = {"luma": {**mine["luma"], "tenants": ["acme"]}, "vivix": mine["vivix"]}
    relay = await world.relay(accounts=accounts)
    acme, bolt = await two(world, relay)
    refused = await acme.api.post("/v1/accounts", json=acme.account())
    assert (refused.status_code, "luma" in refused.json()["detail"]) == (409, True)
    # What it does not see it cannot be refused for: it would learn of it.
    assert (await acme.add("vivix"))["configured"] is False
    refused = await acme.api.post("/v1/accounts", json=acme.account("vivix"))
    assert refused.status_code == 409
    await bolt.add()
    assert (await acme.names(), await bolt.names()) == (["luma", "vivix"], ["luma"])


async def test_an_own_account_hides_one_that_the_configuration_came_to_have(world: World):
    accounts = world.document()["accounts"]
    async with world.running(accounts={}) as relay:
        acme = await tenant(world, relay, "acme")
        await acme.add()
        key = acme.api.headers["authorization"]
    async with world.running(accounts={"luma": {**accounts["luma"], "tenants": "all"}}) as relay:
        relay.api.headers["authorization"] = key
        acme.api = relay.api
        assert (await acme.shown())["configured"] is False
        assert await acme.names() == ["luma"]
        generation = await acme.watch()
        await acme.eventually(f"/v1/generations/{generation['id']}", lambda one: one["status"] == "completed")
        assert world.simulator.requests == []


BAD: list[tuple[dict[str, Any], str]] = [
    ({"name": "Luma"}, "name"),
    ({"name": "a.b"}, "name"),
    ({"name": ""}, "name"),
    ({"name": "x" * 65}, "name"),
    ({"provider": "nobody"}, "provider"),
    ({"provider": "tests.intruder:Intruder"}, "provider"),
    ({"provider": PROVIDERS["luma"]}, "provider"),
    ({"api_key": ""}, "api_key"),
    ({"api_key": "short"}, "api_key"),
    ({"api_key": "two words-0123456789"}, "api_key"),
    ({"api_key": "line\r\nx-evil: 1-0123456789"}, "api_key"),
    ({"api_key": "schlüssel-0123456789"}, "api_key"),
    ({"api_key": "k" * 4097}, "api_key"),
    ({"api_key": None}, "api_key"),
    ({"webhook_secret": ""}, "webhook_secret.0"),
    ({"webhook_secret": []}, "webhook_secret"),
    ({"webhook_secret": ["long-enough"] * 11}, "webhook_secret"),
    ({"base_url": "http://luma.example/v1"}, "base_url"),
    ({"base_url": "https://user:pass@luma.example/v1"}, "base_url"),
    ({"base_url": "file:///etc/passwd"}, "base_url"),
    ({"base_url": "https://luma.example/v1#x"}, "base_url"),
    ({"poll_interval_seconds": 0}, "poll_interval_seconds"),
    ({"poll_interval_seconds": "1"}, "poll_interval_seconds"),
    ({"timeout_seconds": 1e10}, "timeout_seconds"),
    ({"requests_per_minute": 0}, "requests_per_minute"),
    ({"requests_per_day": 1.5}, "requests_per_day"),
    ({"tenants": "all"}, "tenants"),
]


@pytest.mark.parametrize(("changes", "field"), BAD)
async def test_what_is_no_account_is_refused_and_not_quoted(
    world: World, changes: dict[str, Any], field: str
):
    relay = await world.relay(accounts={})
    good = {"name": "luma", "provider": "luma", "api_key": KEY, "webhook_secret": "of-the-webhook"}
    answer = await relay.api.post("/v1/accounts", json={**good, **changes})
    assert answer.status_code == 422, answer.text
    assert [one["field"] for one in answer.json()["errors"]] == [field]
    for name in ("api_key", "webhook_secret"):
        given = {**good, **changes}[name]
        assert not isinstance(given, str) or not given or given not in answer.text
    assert (await relay.api.get("/v1/accounts")).json()["data"] == []


async def test_an_added_account_is_at_its_providers_own_address_unless_it_says_otherwise(world: World):
    relay = await world.relay(accounts={})
    body = {"name": "a", "provider": "pixellabs", "api_key": "0123456789"}
    made = (await relay.api.post("/v1/accounts", json=body)).json()
    assert made == {
        "name": "a",
        "provider": "pixellabs",
        "status": "ok",
        "configured": False,
        "api_key_hint": None,  # too short to show any of it
        "base_url": "https://api.pixellabsai.app/v1",
        "timeout_seconds": made["timeout_seconds"],
        "poll_interval_seconds": made["poll_interval_seconds"],
        "calls_back": False,
        "webhook_url": None,
        "budget": {
            "requests_per_minute": 60,
            "requests_per_day": 1000,
            "used_today": 0,
            "next_request_at": None,
        },
        "last_error": None,
        "last_error_at": None,
    }
    changes = {
        "timeout_seconds": 7,
        "poll_interval_seconds": 2.5,
        "requests_per_minute": 3,
        "requests_per_day": 9,
    }
    changed = (await relay.api.patch("/v1/accounts/a", json=changes)).json()
    assert (changed["timeout_seconds"], changed["poll_interval_seconds"]) == (7, 2.5)
    assert (changed["budget"]["requests_per_minute"], changed["budget"]["requests_per_day"]) == (3, 9)
    assert (await relay.api.get("/v1/accounts/a")).json() == changed
    nothing = dict.fromkeys(changes)
    again = (await relay.api.patch("/v1/accounts/a", json=nothing)).json()
    assert {**again, "budget": None} == {**made, "budget": None}
    assert again["budget"]["requests_per_day"] == 1000


async def test_a_tenant_has_a_hundred_accounts_at_most(world: World):
    relay = await world.relay(accounts={})
    for number in range(MOST):
        body = {"name": f"a-{number}", "provider": "luma", "api_key": KEY}
        assert (await relay.api.post("/v1/accounts", json=body)).status_code == 201
    answer = await relay.api.post("/v1/accounts", json={"name": "b", "provider": "luma", "api_key": KEY})
    assert answer.status_code == 409
    found, cursor = [], ""
    while cursor is not None:
        params = {"limit": 30} | ({"cursor": cursor} if cursor else {})
        page = (await relay.api.get("/v1/accounts", params=params)).json()
        found += [one["name"] for one in page["data"]]
        cursor = page["next_cursor"]
    assert found == sorted(f"a-{number}" for number in range(MOST))


async def test_the_same_idempotency_key_adds_one_account_and_tells_of_it_again(world: World):
    relay = await world.relay(accounts={})
    acme, bolt = await two(world, relay)
    headers = {"idempotency-key": "k"}
    for one in (acme, bolt):
        answers = [await one.api.post("/v1/accounts", json=one.account(), headers=headers) for _ in range(2)]
        assert [answer.status_code for answer in answers] == [201, 201]
        assert answers[0].json() == answers[1].json()
        other = await one.api.post("/v1/accounts", json=one.account(name="b"), headers=headers)
        assert other.status_code == 422
        assert await one.names() == ["luma"]
    await acme.api.delete("/v1/accounts/luma")
    gone = await acme.api.post("/v1/accounts", json=acme.account(), headers=headers)
    assert gone.status_code == 409
    assert await acme.names() == []


async def test_a_new_credential_is_used_at_once_and_makes_a_refused_account_recover(world: World):
    relay = await world.relay(accounts={})
    acme = await tenant(world, relay, "acme")
    url = f"{world.subscriber.origin}/acme"
    types = ["account.failing", "account.recovered", "generation.completed"]
    await acme.api.post("/v1/endpoints", json={"url": url, "event_types": types})
    await acme.add(api_key="a-key-that-is-no-good-0123")
    generation = await acme.watch(duration=0)
    await acme.eventually("/v1/accounts/luma", lambda one: one["status"] == "unauthorized")
    assert acme.asked() == [401]
    answer = await acme.api.patch("/v1/accounts/luma", json={"api_key": acme.simulator.keys["luma"]})
    assert (answer.status_code, answer.json()["api_key_hint"]) == (200, "6789")
    await acme.eventually(f"/v1/generations/{generation['id']}", lambda one: one["status"] == "completed")
    assert (await acme.shown())["status"] == "ok"
    assert acme.asked() == [401, 200]
    told = [json.loads(one.body) for one in await world.subscriber.got(3, path="/acme")]
    assert {one["type"] for one in told} == set(types)
    assert {one["data"]["account"] for one in told} == {"luma"}


async def test_what_was_answered_to_the_old_credential_says_nothing_of_the_new_one(world: World):
    go_on, seen = asyncio.Event(), list[str]()

    async def get(request: Request) -> Response:
        seen.append(request.headers["authorization"])
        if "old" in seen[-1]:
            await go_on.wait()
            return JSONResponse({"detail": "no"}, 401)
        return JSONResponse({"state": "queued"})

    relay = await world.relay(accounts={})
    async with serving(Starlette(routes=[Route("/{path:path}", get)])) as origin:
        body = {"name": "luma", "provider": "luma", "api_key": "old-0123456789", "base_url": f"{origin}/v1"}
        assert (await relay.api.post("/v1/accounts", json=body)).status_code == 201
        made = (await relay.api.post("/v1/generations", json={"account": "luma", "job_id": "j"})).json()
        asking = asyncio.create_task(relay.api.post(f"/v1/generations/{made['id']}/refresh"))
        await until(lambda: len(seen) == 1)
        await relay.api.patch("/v1/accounts/luma", json={"api_key": "new-0123456789"})
        go_on.set()
        assert (await asking).json()["last_error"].startswith("unauthorized")
        await relay.eventually("/v1/accounts/luma", lambda one: one["status"] == "ok")
        assert (await relay.api.post(f"/v1/generations/{made['id']}/refresh")).json()["last_error"] is None
        assert (await relay.api.get("/v1/accounts/luma")).json()["last_error"] is None
    assert seen[-1] == "Bearer new-0123456789"


async def test_a_stored_credential_does_not_follow_to_another_host(world: World):
    relay = await world.relay(accounts={})
    acme = await tenant(world, relay, "acme")
    await acme.add(poll_interval_seconds=3600)
    seen: list[str] = []

    def answer(request: Request) -> Any:
        seen.append(request.headers["authorization"])
        return {"state": "queued"}

    async with provider_answering(answer) as elsewhere:
        for base_url in (f"{elsewhere}/v1", None):  # the provider's own is another host too
            refused = await acme.api.patch("/v1/accounts/luma", json={"base_url": base_url})
            assert refused.status_code == 422
            assert [one["field"] for one in refused.json()["errors"]] == ["api_key"]
        elsewhere_on_its_host = Simulator.base_urls(acme.origin)["luma"] + "/"
        kept = await acme.api.patch("/v1/accounts/luma", json={"base_url": elsewhere_on_its_host})
        assert kept.status_code == 200
        changes = {"base_url": f"{elsewhere}/v1", "api_key": "for-elsewhere-0123456789"}
        assert (await acme.api.patch("/v1/accounts/luma", json=changes)).status_code == 200
        generation = await acme.watch()
        await acme.api.post(f"/v1/generations/{generation['id']}/refresh")
    assert seen
    assert set(seen) == {"Bearer for-elsewhere-0123456789"}


async def test_an_account_is_deleted_once_none_of_its_generations_is_open(world: World):
    relay = await world.relay(accounts={})
    acme = await tenant(world, relay, "acme")
    await acme.add()
    generation = await acme.watch(duration=1e6)
    refused = await acme.api.delete("/v1/accounts/luma")
    assert (refused.status_code, "open generations" in refused.json()["detail"]) == (409, True)
    assert (await acme.api.delete(f"/v1/generations/{generation['id']}")).status_code == 204
    ended = await acme.watch(duration=0)
    await acme.eventually(f"/v1/generations/{ended['id']}", lambda one: one["status"] == "completed")
    assert (await acme.api.delete("/v1/accounts/luma")).status_code == 204
    assert (await acme.api.delete("/v1/accounts/luma")).status_code == 404
    assert await acme.names() == []
    refused = await acme.api.post("/v1/generations", json={"account": "luma", "job_id": "j"})
    assert refused.status_code == 422
    # Its history stays, under its name.
    [kept] = (await acme.api.get("/v1/generations", params={"account": "luma"})).json()["data"]
    assert (kept["id"], kept["account"]) == (ended["id"], "luma")
    # And its name is free, for another credential with a budget of its own.
    used = await acme.add()
    assert used["budget"]["used_today"] == 0
    again = await acme.watch(duration=0)
    await acme.eventually(f"/v1/generations/{again['id']}", lambda one: one["status"] == "completed")


async def test_added_accounts_are_there_again_after_a_restart(world: World):
    async with world.running(accounts={}) as relay:
        acme, bolt = await two(world, relay)
        for one in (acme, bolt):
            await one.add(requests_per_day=500)
            body = {"url": f"{world.subscriber.origin}/{one.name}"}
            assert (await one.api.post("/v1/endpoints", json=body)).status_code == 201
        open_ = {one.name: await one.watch(duration=0.5) for one in (acme, bolt)}
        await until(lambda: bool(acme.asked() and bolt.asked()))
        used = (await acme.shown())["budget"]["used_today"]
        keys = {one.name: one.api.headers["authorization"] for one in (acme, bolt)}
    async with world.running(accounts={}) as relay:
        relay.api.headers["authorization"] = keys["acme"]
        acme.api = relay.api
        assert (await acme.shown())["budget"]["used_today"] >= used
        for one in (acme, bolt):
            [received] = await world.subscriber.got(1, path=f"/{one.name}")
            assert json.loads(received.body)["data"]["id"] == open_[one.name]["id"]
        generation = await acme.watch(duration=0)
        await acme.eventually(f"/v1/generations/{generation['id']}", lambda one: one["status"] == "completed")


async def test_callbacks_work_for_added_accounts(world: World):
    relay = await world.relay(accounts={})
    acme, bolt = await two(world, relay)
    secret = "of-the-webhook-of-acme"
    for one in (acme, bolt):
        await one.add("pictory", poll_interval_seconds=3600)
        await one.add("luma")
        made = await one.add("vivix", poll_interval_seconds=3600)
        assert made["webhook_url"] == f"{relay.origin}/hooks/{one.name}.vivix"
        assert (await one.shown("luma"))["webhook_url"] is None
    watched = await acme.watch_job("pictory", None)
    assert watched["webhook_url"].startswith(f"{relay.origin}/hooks/acme.pictory/")
    stolen = watched["webhook_url"].replace("acme.", "bolt.")
    async with httpx.AsyncClient() as stranger:
        assert (await stranger.post(stolen, json={})).status_code == 404
        acme.simulator.submit("pictory", request={"webhook": watched["webhook_url"]}, duration=0)
        ended = await acme.eventually(
            f"/v1/generations/{watched['id']}", lambda one: one["status"] == "completed"
        )
        assert (ended["account"], ended["learned_by"]) == ("pictory", "callback")
        # Not before there is a secret; and then the name of the job is only this tenant's.
        job_id = "22222222-2222-4222-8222-222222222222"
        jobs = [await one.watch("vivix", job_id=job_id, duration=0) for one in (acme, bolt)]
        body = json.dumps({"generation_id": job_id, "status": "completed"}).encode()
        signed = {"x-vivix-signature": f"sha256={hmac.digest(secret.encode(), body, 'sha256').hex()}"}
        hook = f"{relay.origin}/hooks/acme.vivix"
        assert (await stranger.post(hook, content=body, headers=signed)).status_code == 404
        await acme.api.patch("/v1/accounts/vivix", json={"webhook_secret": ["another-one", secret]})
        assert (await stranger.post(hook, content=body)).status_code == 401
        assert (await stranger.post(hook, content=body, headers=signed)).status_code == 200
        await acme.eventually(f"/v1/generations/{jobs[0]['id']}", lambda one: one["status"] == "completed")
        assert bolt.asked("vivix") == []
        await acme.api.patch("/v1/accounts/vivix", json={"webhook_secret": None})
        assert (await stranger.post(hook, content=body, headers=signed)).status_code == 404
        for name in ("nobody.vivix", ".vivix", "acme.", "acme.vivix.x", "vivix", "%00.a", "a" * 9000 + ".b"):
            answer = await stranger.post(f"{relay.origin}/hooks/{name}", content=body, headers=signed)
            assert answer.status_code == 404, name


async def test_a_credential_is_in_no_answer_event_error_or_log(
    world: World, caplog: pytest.LogCaptureFixture
):
    caplog.set_level("DEBUG")
    first, second, signs = "first-key-0123456789-abc", "second-key-0123456789-abc", "signs-0123456789-abc"
    relay = await world.relay(accounts={})
    await world.endpoint(relay, event_types=["account.failing", "account.recovered", "generation.failed"])
    texts: list[str] = []

    async def call(method: str, path: str, **options: Any) -> httpx.Response:
        answer = await relay.api.request(method, path, **options)
        texts.append(str(answer.headers) + answer.text)
        return answer

    def answer(request: Request) -> Any:
        said = f"{request.headers['authorization']} {signs} is wrong"
        if "first" in said:
            return JSONResponse({"error": "unauthorized", "message": said, said: said}, 401)
        return {"id": "j", "status": "failed", "error": said, "message": said, "output_urls": [said]}

    async with provider_answering(answer) as origin:
        body = {
            "name": "vivix",
            "provider": "vivix",
            "api_key": first,
            "webhook_secret": signs,
            "base_url": f"{origin}/v1",
            "poll_interval_seconds": 0.1,
        }
        key = {"idempotency-key": "k"}
        for headers in (key, key, {}):
            await call("POST", "/v1/accounts", json=body, headers=headers)
        made = await call("POST", "/v1/generations", json={"account": "vivix", "job_id": "j"})
        path = f"/v1/generations/{made.json()['id']}"
        await call("POST", f"{path}/refresh")
        await relay.eventually("/v1/accounts/vivix", lambda one: one["status"] == "unauthorized")
        for path_ in ("/v1/accounts", "/v1/accounts/vivix", path, "/v1/events", "/v1/audit"):
            await call("GET", path_)
        await call("PATCH", "/v1/accounts/vivix", json={"api_key": second})
        await relay.eventually(path, lambda one: one["status"] == "failed")
        await world.subscriber.got(3)
        for path_ in ("/v1/accounts/vivix", path, "/v1/events", "/v1/deliveries", "/v1/audit", "/metrics"):
            await call("GET", path_)
        await call("PATCH", "/v1/accounts/vivix", json={"api_key": second + "\n"})
        await call("DELETE", "/v1/accounts/vivix")
    texts += [one.body.decode() for one in world.subscriber.received]
    texts += [str(vars(record)) for record in caplog.records if not record.name.startswith("aiosqlite")]
    assert any("is wrong" in text for text in texts), "what was said was told, without the credential"
    for secret in (first, second, signs):
        assert [text for text in texts if secret in text] == []


async def test_what_a_tenant_chooses_as_its_credential_is_not_blotted_out_for_others(world: World):
    relay = await world.relay(accounts={})
    acme, bolt = await two(world, relay)
    chosen = ["event_types.0", "secretive_field", "endpoint.something"]

    async def refusals() -> list[Any]:
        wrong = {"url": "https://a.example", "event_types": [1], "secretive_field": 1}
        refused = await bolt.api.post("/v1/endpoints", json=wrong)
        missing = await bolt.api.get("/v1/endpoints/endpoint.something")
        assert (refused.status_code, missing.status_code) == (422, 404)
        return [refused.json(), missing.json()]

    before = await refusals()
    assert all(text in str(before) for text in chosen)
    await acme.add(api_key=chosen[0], webhook_secret=chosen[1:])
    await acme.api.patch("/v1/accounts/luma", json={"api_key": chosen[1]})
    assert await refusals() == before


async def test_what_a_tenant_calls_its_provider_cannot_be_inside(world: World):
    relay = await world.relay(accounts={}, network={"allow": []})
    for base_url in ("https://169.254.169.254/latest", "https://localhost/v1"):
        body = {"name": f"luma-{len(base_url)}", "provider": "luma", "api_key": KEY, "base_url": base_url}
        assert (await relay.api.post("/v1/accounts", json=body)).status_code == 201
        made = await relay.api.post("/v1/generations", json={"account": body["name"], "job_id": "j"})
        shown = await relay.api.post(f"/v1/generations/{made.json()['id']}/refresh")
        assert shown.json()["last_error"].startswith("unreachable"), base_url
    refused = await relay.api.post("/v1/accounts", json={**body, "base_url": "http://127.0.0.1:1/v1"})
    assert refused.status_code == 422


@asynccontextmanager
async def from_another_time() -> AsyncIterator[str]:
    """The origin of a provider whose clock is wrong by years."""
    body = b'{"state": "queued"}'
    head = f"HTTP/1.1 200 OK\r\ndate: Mon, 01 Jan 2001 00:00:00 GMT\r\ncontent-length: {len(body)}\r\n\r\n"

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(head.encode() + body)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


@pytest.mark.parametrize("is_configured", [False, True])
async def test_only_the_operators_providers_tell_the_time(world: World, is_configured: bool):
    async with from_another_time() as origin:
        account = {"provider": "luma", "api_key": KEY, "base_url": f"{origin}/v1"}
        relay = await world.relay(accounts={"luma": account} if is_configured else {})
        if not is_configured:
            added = await relay.api.post("/v1/accounts", json={"name": "luma", **account})
            assert added.status_code == 201
        made = (await relay.api.post("/v1/generations", json={"account": "luma", "job_id": "j"})).json()
        shown = (await relay.api.post(f"/v1/generations/{made['id']}/refresh")).json()
        assert shown["last_error"] is None
        # A tenant could have all relays taken out of service.
        assert (await relay.api.get("/readyz")).status_code == (503 if is_configured else 200)


async def test_who_has_an_account_no_more_cannot_use_it_but_what_is_watched_goes_on(world: World):
    luma = {**world.document()["accounts"]["luma"], "poll_interval": "1h"}
    async with world.running(accounts={"luma": {**luma, "tenants": ["acme"]}}) as relay:
        acme = await tenant(world, relay, "acme")
        job = world.simulator.submit("luma", duration=0)
        made = await acme.watch_job("luma", job, timeout_seconds=86_400)
        key = acme.api.headers["authorization"]
    async with world.running(accounts={"luma": luma}) as relay:
        relay.api.headers["authorization"] = key
        refused = await relay.api.post(f"/v1/generations/{made['id']}/refresh")
        assert (refused.status_code, world.simulator.requests) == (409, [])
        refused = await relay.api.patch(f"/v1/generations/{made['id']}", json={"job_id": "another"})
        assert "any more" in refused.json()["detail"]
        world.clock.forward(seconds=3700)
        await relay.eventually(f"/v1/generations/{made['id']}", lambda one: one["status"] == "completed")


async def test_an_account_that_cannot_be_used_any_more_harms_no_other(world: World):
    """Plain http was allowed when it was added."""
    async with world.running(accounts={}, network={"allow": ["127.0.0.0/8"], "allow_http": True}) as relay:
        acme = await tenant(world, relay, "acme")
        await acme.add()
        await acme.add("vivix", base_url="http://vivix.example/v1", poll_interval_seconds=3600)
        stranded = await acme.watch_job("vivix", "job", timeout_seconds=30)
        key = acme.api.headers["authorization"]
    async with world.running(accounts={}) as relay:
        relay.api.headers["authorization"] = key
        acme.api = relay.api
        assert await acme.names() == ["luma"]
        generation = await acme.watch(duration=0)
        await acme.eventually(f"/v1/generations/{generation['id']}", lambda one: one["status"] == "completed")
        still = await acme.api.patch("/v1/accounts/vivix", json={"requests_per_day": 5})
        assert (still.status_code, [one["field"] for one in still.json()["errors"]]) == (422, ["base_url"])
        world.clock.forward(seconds=31)
        await acme.eventually(f"/v1/generations/{stranded['id']}", lambda one: one["status"] == "timed_out")
        # It can be made good, and be deleted.
        mended = {"base_url": None, "api_key": "another-0123456789"}
        assert (await acme.api.patch("/v1/accounts/vivix", json=mended)).status_code == 200
        assert await acme.names() == ["luma", "vivix"]
        assert (await acme.api.delete("/v1/accounts/vivix")).status_code == 204


async def test_what_somebody_writes_into_the_database_imports_nothing(world: World, tmp_path: Path):
    (tmp_path / "intruder_of_the_tests.py").write_text("raise SystemExit('imported')")
    async with world.running(accounts={}) as relay:
        acme = await tenant(world, relay, "acme")
        await acme.add()
        key = acme.api.headers["authorization"]
    with closing(sqlite3.connect(world.directory / "relay.db")) as database:
        database.execute("UPDATE credentials SET provider = 'intruder_of_the_tests:Intruder'")
        database.commit()
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(tmp_path))
        async with world.running(accounts={}) as relay:
            relay.api.headers["authorization"] = key
            assert (await relay.api.get("/v1/accounts")).json()["data"] == []
            assert (await relay.api.delete("/v1/accounts/luma")).status_code == 204
