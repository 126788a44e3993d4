"""Neighbours on one relay: whatever one has, the other one cannot see, name, count or change.

What is tried is read from the OpenAPI document, so that an operation that is added is tried too.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from standardwebhooks import Webhook, WebhookVerificationError

from relay.key import Scope
from tests.conftest import RunningRelay, World
from tests.serving import Received
from tests.test_api_rules import STREAM, at, example, operations

SCOPES = [scope.value for scope in Scope]


@dataclass
class Tenant:
    """A tenant with one of everything: `ids` by the nouns of their paths; `known` is what tells it apart."""

    name: str
    admin: httpx.AsyncClient
    ids: Mapping[str, str]
    known: Sequence[str]
    secret: str
    signing_secret: str

    def own_in(self, text: str) -> Sequence[str]:
        return [one for one in [*self.ids.values(), *self.known] if one in text]


async def settle(world: World, relay: RunningRelay, name: str) -> Tenant:
    """A new tenant, which has everything that the API makes."""
    admin = await world.member(relay, "admin", tenant=name)

    async def create(path: str, **body: Any) -> Any:
        answer = await admin.post(path, json=body)
        assert answer.is_success, answer.text
        return answer.json()

    account = await create(
        "/v1/accounts",
        name=f"studio-of-{name}",
        provider="luma",
        api_key=world.simulator.keys["luma"],
        base_url=world.simulator.base_urls(world.simulator_origin)["luma"],
        poll_interval_seconds=3600,
    )
    endpoint = await create("/v1/endpoints", url=f"{world.subscriber.origin}/{name}", description=f"{name}'s")
    job = world.simulator.submit("luma", duration=600)
    watched = {"account": account["name"], "job_id": job, "metadata": {"of": name}}
    generation = await create("/v1/generations", **watched)
    called = await create("/v1/generations", account="pictory")
    event = await create("/v1/events", type="order.shipped", data={"of": name}, id=f"order-of-{name}")
    declared = f"order.of_{name}"
    answer = await admin.put(f"/v1/event-types/{declared}", json={"description": f"{name}'s"})
    assert answer.status_code == 201, answer.text
    test = await create(f"/v1/endpoints/{endpoint['id']}/test")
    theirs = RunningRelay(relay.origin, relay.settings, admin, relay.clock)
    await theirs.eventually(f"/v1/deliveries/{test['id']}", lambda one: one["status"] == "delivered")
    key = await create("/v1/keys", scopes=["read"], name=f"a key of {name}")
    # It finds nothing.
    replay = await create("/v1/replays", endpoint_id=endpoint["id"], since="2020-01-01T00:00:00Z")
    await theirs.eventually(f"/v1/replays/{replay['id']}", lambda one: one["status"] == "completed")
    signing_secret = (await admin.get("/v1/signing-secret")).json()["secret"]
    audited = (await admin.get("/v1/audit")).json()["data"]
    return Tenant(
        name,
        admin,
        {
            "endpoints": endpoint["id"],
            "generations": generation["id"],
            "events": event["id"],
            "deliveries": test["id"],
            "replays": replay["id"],
            "keys": key["id"],
            "audit": audited[0]["id"],
            "accounts": account["name"],
            "event-types": declared,
        },
        [
            *(endpoint["secret"], signing_secret, key["key"], job, called["id"], called["webhook_url"]),
            *(test["event_id"], f"order-of-{name}", f'"{name}"', f"{name}'s", f"/{name}"),
            *(entry["id"] for entry in audited),
        ],
        endpoint["secret"],
        signing_secret,
    )


def shared(world: World, **changes: Any) -> dict[str, Any]:
    """The accounts of the configuration, for every tenant."""
    accounts = world.document()["accounts"]
    return {name: {**one, "tenants": "all", **changes} for name, one in accounts.items()}


async def everything(relay: RunningRelay, tenant: Tenant) -> dict[str, Any]:
    """All that a tenant sees: every list, every object, every secret; but not what looking itself leaves."""
    found = {}
    for method, path, _ in await operations(relay):
        if method != "GET" or path in ("/v1/audit", "/v1/generations/{id}/wait", STREAM):
            continue
        url = at(path, tenant.ids.get(path.split("/")[2], ""))
        answer = await tenant.admin.get(url)
        assert answer.status_code == 200, f"{url}: {answer.text}"
        found[url] = answer.json()
    done = (await tenant.admin.get("/v1/audit", params={"limit": 200})).json()["data"]
    return found | {"done": [one for one in done if not one["action"].endswith("secret_revealed")]}


async def test_no_key_of_a_neighbour_finds_or_changes_anything_by_its_id(
    database_url: str, world: World
) -> None:
    # Nothing changes by itself.
    accounts = shared(world, poll_interval="1h")
    relay = await world.relay(database=database_url, accounts=accounts)
    ours, theirs = await settle(world, relay, "ours"), await settle(world, relay, "theirs")
    neighbours = {
        **{scope: await world.member(relay, scope, tenant="theirs") for scope in SCOPES},
        "all": await world.member(relay, *SCOPES, tenant="theirs"),
        # Not even the operator, by accident.
        "all of the operator's": await world.member(relay, *SCOPES),
        "the operator": relay.api,
    }
    before = await everything(relay, ours), await everything(relay, theirs)
    tried = 0
    for method, path, operation in await operations(relay):
        # Under a name of one's own choice there is nobody else's.
        if "{" not in path or method == "PUT":
            continue
        id_ = ours.ids[path.split("/")[2]]
        for scope, neighbour in neighbours.items():
            answer = await neighbour.request(method, at(path, id_), json=example(operation))
            may = scope not in SCOPES or scope in (operation["x-scope"], "admin")
            assert answer.status_code == (404 if may else 403), f"{scope}: {method} {path}: {answer.text}"
            assert ours.own_in(answer.text.replace(id_, "")) == []
            tried += 1
    assert tried >= 7 * 21
    assert (await everything(relay, ours), await everything(relay, theirs)) == before


async def test_no_list_shows_anything_of_a_neighbour_whatever_is_asked_for(
    database_url: str, world: World
) -> None:
    relay = await world.relay(database=database_url, accounts=shared(world))
    ours, theirs = await settle(world, relay, "ours"), await settle(world, relay, "theirs")
    strangers = [theirs.admin, await world.member(relay, *SCOPES), relay.api]
    values = ["ours", *ours.ids.values(), *ours.known]
    shown = 0
    for method, path, operation in await operations(relay):
        if method != "GET" or "{" in path or path == STREAM:
            continue
        names = [one["name"] for one in operation["parameters"] if one["in"] == "query"]
        for stranger in strangers:
            answer = await stranger.get(path)
            assert answer.status_code == 200
            assert ours.own_in(answer.text) == [], path
            shown += len(answer.json().get("data", ()))
        for name in names:
            for value in values:
                answer = await theirs.admin.get(path, params={name: value})
                assert ours.own_in(answer.text) == [], f"{path}?{name}={value}"
                if answer.status_code == 200 and name != "cursor":
                    # A filter of a neighbour's is one that nothing fits.
                    assert answer.json()["data"] == [], f"{path}?{name}={value}"
    assert shown > 10, "there was something to be seen"


async def test_a_neighbours_cursor_leads_nowhere_but_through_ones_own(world: World) -> None:
    relay = await world.relay(accounts=shared(world))
    theirs = await settle(world, relay, "theirs")
    ours = await settle(world, relay, "ours")
    for noun, id_ in ours.ids.items():
        page = (await theirs.admin.get(f"/v1/{noun}", params={"cursor": id_})).json()
        assert theirs.ids[noun] in [one.get("id", one.get("name", one.get("type"))) for one in page["data"]]
        assert ours.own_in(json.dumps(page)) == []


async def test_names_of_one_tenant_are_free_for_the_other(database_url: str, world: World) -> None:
    relay = await world.relay(database=database_url, accounts=shared(world))
    one = await world.member(relay, *SCOPES, tenant="one")
    other = await world.member(relay, *SCOPES, tenant="other")
    job = world.simulator.submit("luma", duration=600)
    bodies: list[tuple[str, dict[str, Any]]] = [
        ("/v1/endpoints", {"url": world.subscriber.origin + "/"}),
        ("/v1/generations", {"account": "luma", "job_id": job}),
        ("/v1/events", {"type": "order.shipped", "data": {"a": 1}, "id": "order-42"}),
        ("/v1/keys", {"scopes": ["read"]}),
    ]
    studio = {"name": "studio", "provider": "luma", "api_key": "of-one-of-them"}
    assert [(await who.post("/v1/accounts", json=studio)).status_code for who in (one, other)] == [201] * 2
    for path, body in bodies:
        key = {"idempotency-key": "the same"} if path == "/v1/endpoints" else {"idempotency-key": path}
        answers = [await who.post(path, json=body, headers=key) for who in (one, other, one, other)]
        assert [answer.status_code for answer in answers] == [201] * 4, path
        ids = [answer.json()["id"] for answer in answers]
        assert ids[:2] == ids[2:], path
        assert ids[0] != ids[1], path
    # A different request under the same key of another tenant is no contradiction either.
    third = await world.member(relay, *SCOPES, tenant="third")
    answer = await third.post("/v1/events", json=bodies[2][1], headers={"idempotency-key": "the same"})
    assert answer.status_code == 201


async def test_what_is_announced_reaches_its_own_tenants_endpoints_signed_with_their_secrets(
    database_url: str, world: World
) -> None:
    relay = await world.relay(database=database_url, accounts=shared(world))
    ours, theirs = await settle(world, relay, "ours"), await settle(world, relay, "theirs")
    job = world.simulator.submit("luma", duration=0.2)
    for tenant in (ours, theirs):
        callback = f"{world.subscriber.origin}/callback/{tenant.name}"
        body = {"account": "luma", "job_id": job, "callback_url": callback}
        assert (await tenant.admin.post("/v1/generations", json=body)).status_code == 201
    for tenant in (ours, theirs):
        # The test, the ending; and that again to the generation's own URL.
        await world.subscriber.got(2, path=f"/{tenant.name}")
        await world.subscriber.got(1, path=f"/callback/{tenant.name}")
    secrets = {
        **{f"/{tenant.name}": tenant.secret for tenant in (ours, theirs)},
        **{f"/callback/{tenant.name}": tenant.signing_secret for tenant in (ours, theirs)},
    }
    assert len(set(secrets.values())) == 4
    for one in world.subscriber.received:
        assert [path for path, secret in secrets.items() if is_signed(one, secret)] == [one.path]
    ended = {path: ids_of(world.subscriber.received, path) for path in secrets}
    assert ended["/ours"] > ended["/callback/ours"]
    assert not ended["/ours"] & ended["/theirs"]


def is_signed(received: Received, secret: str) -> bool:
    try:
        Webhook(secret).verify(received.body, received.headers)
    except WebhookVerificationError:
        return False
    return True


def ids_of(received: Sequence[Received], path: str) -> set[str]:
    return {one.headers["webhook-id"] for one in received if one.path == path}


# The operator.


async def test_the_operators_admins_may_name_another_tenant_and_nobody_else_may(
    database_url: str, world: World
) -> None:
    relay = await world.relay(database=database_url, accounts=shared(world))
    ours, theirs = await settle(world, relay, "ours"), await settle(world, relay, "theirs")
    operator = await world.member(relay, "admin")
    key = f"/v1/keys/{ours.ids['keys']}"
    named = {"params": {"tenant": "ours"}}
    for neighbour in (theirs.admin, await world.member(relay, *SCOPES, tenant="theirs")):
        for tenant in ("ours", "default", "nobody"):
            answers = [
                await neighbour.post("/v1/keys", json={"scopes": ["read"], "tenant": tenant}),
                await neighbour.get("/v1/keys", params={"tenant": tenant}),
                await neighbour.get("/v1/audit", params={"tenant": tenant}),
                await neighbour.get(key, params={"tenant": tenant}),
                await neighbour.delete(key, params={"tenant": tenant}),
            ]
            assert [answer.status_code for answer in answers] == [403] * 5
    for admin in (operator, relay.api, ours.admin):
        listed = await admin.get("/v1/keys", **named)
        assert ours.ids["keys"] in [one["id"] for one in listed.json()["data"]]
        assert (await admin.get(key, **named)).json()["tenant"] == "ours"
        audited = (await admin.get("/v1/audit", **named)).json()["data"]
        assert {one["tenant"] for one in audited} == {"ours"}
    assert (await operator.get("/v1/keys", params={"tenant": "nobody"})).json()["data"] == []
    # Only an admin: what else a key of the operator's may do stays at home.
    assert (await (await world.member(relay, "read", "write")).get(key, **named)).status_code == 403
    made = await operator.post("/v1/keys", json={"scopes": ["read"], "tenant": "ours"})
    member = await world.client(relay, made.json()["key"])
    assert (await member.get(f"/v1/endpoints/{ours.ids['endpoints']}")).status_code == 200
    assert (await operator.delete(key, **named)).status_code == 204
    [revoked] = (await ours.admin.get("/v1/audit", params={"action": "key.revoked"})).json()["data"]
    assert (revoked["object"], revoked["tenant"]) == (ours.ids["keys"], "ours")
    [entry] = (await ours.admin.get("/v1/audit", params={"object": made.json()["id"]})).json()["data"]
    assert entry["actor"] == revoked["actor"]
    assert entry["actor"].startswith("key_")


async def test_a_tenants_secret_is_its_own_from_its_first_key_on(world: World) -> None:
    relay = await world.relay()
    tenants = ["default", "one", "other"]
    secrets = [
        (await (await world.member(relay, "admin", tenant=name)).get("/v1/signing-secret")).json()["secret"]
        for name in [*tenants, *tenants]
    ]
    assert secrets[:3] == secrets[3:]
    assert len(set(secrets)) == 3


async def test_a_neighbours_callback_url_at_the_same_host_slows_nobody_else(
    database_url: str, world: World
) -> None:
    relay = await world.relay(database=database_url, accounts=shared(world))
    ours, theirs = [await world.member(relay, *SCOPES, tenant=name) for name in ("ours", "theirs")]
    world.subscriber.answer(429, path="/theirs", headers={"retry-after": "86400"})

    async def end(api: httpx.AsyncClient, path: str) -> None:
        job = world.simulator.submit("luma", duration=0)
        body = {"account": "luma", "job_id": job, "callback_url": world.subscriber.origin + path}
        assert (await api.post("/v1/generations", json=body)).status_code == 201
        await world.subscriber.got(1, path=path)

    await end(theirs, "/theirs")
    attempted = RunningRelay(relay.origin, relay.settings, theirs, relay.clock)
    await attempted.eventually("/v1/deliveries", lambda page: page["data"][0]["attempt_count"] == 1)
    await end(ours, "/ours")


async def test_where_a_name_inside_leads_is_told_to_nobody_but_the_operator(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "relay.guard")
    relay = await world.relay(network={"allow_http": True})
    theirs = await world.member(relay, *SCOPES, tenant="theirs")
    made = (await theirs.post("/v1/endpoints", json={"url": "http://localhost:9/"})).json()
    sent = (await theirs.post(f"/v1/endpoints/{made['id']}/test")).json()
    found = RunningRelay(relay.origin, relay.settings, theirs, relay.clock)
    path = f"/v1/deliveries/{sent['id']}"
    [attempt] = (await found.eventually(path, lambda one: one["status"] == "failed"))["attempts"]
    assert attempt["error"]["code"] == "blocked_address"
    assert "localhost" in attempt["error"]["message"]
    assert not re.search(r"127\.|::1", json.dumps(attempt))
    assert [one.host for one in caplog.records if one.message == "guard.refused"] == ["localhost"]
