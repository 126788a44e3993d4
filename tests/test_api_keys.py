"""API keys: made, shown once, limited in what they may do and how often, expired and revoked."""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.requests import Request

from relay.app import build
from relay.config import read_config
from relay.errors import Limited, StoreError
from relay.key import Scope, hash_of, new_key
from relay.keyring import KeyRing
from relay.store import open_database, store_on
from relay.store.keys import MOST
from relay.times import rfc3339
from relay.web.auth import Gate
from tests.conftest import ADMIN_KEY, Clock, RunningRelay, World
from tests.fleet import Fleet
from tests.serving import serving
from tests.test_api_rules import at, example, fields, operations
from tests.test_store import a_key, fill_with_keys, prepared

USUAL = {"scopes": ["read", "write"]}
ALONE = [scope.value for scope in Scope]


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


async def refusal(relay: RunningRelay, key: str) -> str:
    """What is said to who has this key."""
    answer = await relay.api.get("/v1/endpoints", headers=bearer(key))
    assert answer.status_code == 401, answer.text
    assert answer.headers["www-authenticate"] == "Bearer"
    return str(answer.json()["detail"])


# Making and showing them.


async def test_a_key_is_shown_once_and_is_nowhere_else(database_url: str, world: World) -> None:
    relay = await world.relay(database=database_url)
    at = rfc3339(world.clock() + 3_600_000)
    given = {"scopes": ["write", "read", "read"], "name": "orders", "expires_at": at, "rate_limit": 2.5}
    answer = await relay.api.post("/v1/keys", json=given)
    assert answer.status_code == 201
    made = answer.json()
    key = made.pop("key")
    assert key.startswith(f"rk_{made['id'].removeprefix('key_')}_")
    assert made == {
        "id": made["id"],
        "tenant": "default",
        "name": "orders",
        "scopes": ["read", "write"],
        "rate_limit": 2.5,
        "created_at": made["created_at"],
        "expires_at": at,
        "revoked_at": None,
        "last_used_at": None,
    }
    assert (await relay.api.get("/v1/accounts", headers=bearer(key))).status_code == 200
    shown = [await relay.api.get(path) for path in ("/v1/keys", f"/v1/keys/{made['id']}", "/v1/audit")]
    assert shown[0].json()["data"] == [made] == [shown[1].json()]
    assert not [answer for answer in shown if key[-43:] in answer.text]
    if database_url.startswith("sqlite"):
        files = list(world.directory.glob("relay.db*"))
        assert files
        assert not [file for file in files if key[-43:].encode() in file.read_bytes()]


async def test_an_idempotency_key_makes_one_key_and_shows_it_once(database_url: str, world: World) -> None:
    relay = await world.relay(database=database_url)
    body, header = {**USUAL, "tenant": "acme"}, {"idempotency-key": "k"}
    answers = await asyncio.gather(*(relay.api.post("/v1/keys", json=body, headers=header) for _ in range(5)))
    made = [answer.json() for answer in answers]
    assert {answer.status_code for answer in answers} == {201}
    assert len({one["id"] for one in made}) == 1
    assert sum(one["key"] is not None for one in made) == 1
    assert len((await relay.api.get("/v1/keys", params={"tenant": "acme"})).json()["data"]) == 1
    assert len((await relay.api.get("/v1/audit", params={"tenant": "acme"})).json()["data"]) == 1


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "scopes"),
        ({"scopes": []}, "scopes"),
        ({"scopes": ["root"]}, "scopes.0"),
        ({"scopes": "read"}, "scopes"),
        ({"scopes": ["READ"]}, "scopes.0"),
        ({"scopes": [1]}, "scopes.0"),
        ({**USUAL, "name": ""}, "name"),
        ({**USUAL, "name": "n" * 201}, "name"),
        ({**USUAL, "name": "a\0b"}, "name"),
        ({**USUAL, "tenant": ""}, "tenant"),
        ({**USUAL, "tenant": "Acme"}, "tenant"),
        ({**USUAL, "tenant": "acme\n"}, "tenant"),
        ({**USUAL, "tenant": "a" * 65}, "tenant"),
        ({**USUAL, "expires_at": "2020-01-01T00:00:00Z"}, "expires_at"),
        ({**USUAL, "expires_at": "tomorrow"}, "expires_at"),
        ({**USUAL, "rate_limit": 0}, "rate_limit"),
        ({**USUAL, "rate_limit": 5e-324}, "rate_limit"),
        ({**USUAL, "rate_limit": 10_001}, "rate_limit"),
        ({**USUAL, "key": "rk_mine"}, "key"),
    ],
)
async def test_a_wrong_key_is_refused_with_its_field(world: World, body: dict[str, Any], field: str) -> None:
    relay = await world.relay()
    answer = await relay.api.post("/v1/keys", json=body)
    assert answer.status_code == 422, answer.text
    assert fields(answer) == [field]
    assert (await relay.api.get("/v1/keys")).json()["data"] == []


# Who is let in.


async def test_only_who_has_the_key_is_told_what_became_of_it(database_url: str, world: World) -> None:
    relay = await world.relay(database=database_url)
    soon = rfc3339(world.clock() + 60_000)
    expired, revoked, good = (
        await world.key(relay, "admin", expires_at=soon),
        await world.key(relay, "admin"),
        await world.key(relay, "admin"),
    )
    for made in (expired, revoked, good):
        assert (await relay.api.get("/v1/keys", headers=bearer(made["key"]))).status_code == 200
    world.clock.forward(seconds=60)
    assert (await relay.api.delete(f"/v1/keys/{revoked['id']}")).status_code == 204
    at = (await relay.api.get(f"/v1/keys/{revoked['id']}")).json()["revoked_at"]
    assert await refusal(relay, revoked["key"]) == f"this API key was revoked at {at}"
    assert await refusal(relay, expired["key"]) == f"this API key expired at {soon}"
    texts = [made["key"] for made in (expired, revoked, good)]
    strangers = [
        *(new_key(world.clock())[1], "rk_", "rk_x_y", good["id"]),
        # The id of one and the rest of another, or of nobody's.
        *(one[:30] + other[30:] for one in texts for other in [*texts, new_key(0)[1]] if one != other),
        *(text[:-1] for text in texts),
        *(text + "0" for text in texts),
    ]
    said = {await refusal(relay, text) for text in strangers}
    assert said == {"this API key is not known here"}
    assert (await relay.api.get("/v1/keys", headers=bearer(good["key"]))).status_code == 200


async def test_a_revoked_key_ends_with_the_next_request_and_not_with_the_one_under_way(world: World) -> None:
    relay = await world.relay()
    reader = await world.key(relay, "read")
    generation = await world.watch(relay, "luma", duration=600)
    path = f"/v1/generations/{generation['id']}/wait"
    params = {"timeout": 1.5}
    waiting = asyncio.create_task(relay.api.get(path, params=params, headers=bearer(reader["key"])))
    done, _ = await asyncio.wait([waiting], timeout=0.5)
    assert not done
    for _ in range(2):
        assert (await relay.api.delete(f"/v1/keys/{reader['id']}")).status_code == 204
    assert (await relay.api.get(path, headers=bearer(reader["key"]))).status_code == 401
    assert (await waiting).status_code == 200


async def test_a_key_may_revoke_itself(world: World) -> None:
    relay = await world.relay()
    made = await world.key(relay, "admin")
    member = await world.client(relay, made["key"])
    assert (await member.delete(f"/v1/keys/{made['id']}")).status_code == 204
    assert (await member.delete(f"/v1/keys/{made['id']}")).status_code == 401


async def test_a_key_of_one_relay_is_known_to_all_and_refused_by_all_at_once(fleet: Fleet) -> None:
    one, other = [await fleet.join(), await fleet.join()]
    for revoking, asked in ((one, other), (other, one)):
        made = await fleet.world.key(one, "read")
        assert (await asked.api.get("/v1/events", headers=bearer(made["key"]))).status_code == 200
        assert (await revoking.api.delete(f"/v1/keys/{made['id']}")).status_code == 204
        assert (await asked.api.get("/v1/events", headers=bearer(made["key"]))).status_code == 401


@pytest.mark.parametrize("environment", [{}, {"RELAY_ADMIN_KEY": ""}])
async def test_without_an_admin_key_nobody_is_admin_but_who_is_shown_the_first_key(
    tmp_path: Path, clock: Clock, environment: dict[str, str]
) -> None:
    settings = read_config(
        {"database": f"sqlite:///{tmp_path}/relay.db", "secret_key": "s" * 32}, environment
    )
    shown: list[str] = []
    async with (
        serving(build(settings, now=clock, show_key=shown.append)) as origin,
        httpx.AsyncClient(base_url=origin) as stranger,
    ):
        for key in ("", "None", "null", "''", "admin", "rk_", "default", "admin_key", "${RELAY_ADMIN_KEY}"):
            for header in (f"Bearer {key}".strip(), key):
                answer = await stranger.get("/v1/endpoints", headers={"authorization": header})
                assert answer.status_code == 401, header
        [first] = shown
        [made] = (await stranger.get("/v1/keys", headers=bearer(first))).json()["data"]
        assert (made["scopes"], made["tenant"]) == (["admin"], "default")
        assert first.startswith(f"rk_{made['id'].removeprefix('key_')}_")
        [entry] = (await stranger.get("/v1/audit", headers=bearer(first))).json()["data"]
        assert (entry["actor"], entry["action"], entry["object"]) == ("relay", "key.created", made["id"])


# What they may do.


@pytest.mark.parametrize("scope", ALONE)
async def test_a_scope_allows_what_the_document_says_and_nothing_else(world: World, scope: str) -> None:
    relay = await world.relay()
    member = await world.member(relay, scope)
    allowed: list[str] = []
    for method, path, operation in await operations(relay):
        answer = await member.request(method, at(path, "x"), json=example(operation))
        assert operation["x-scope"] in ALONE
        may = scope in (operation["x-scope"], "admin")
        assert (answer.status_code == 403) is not may, f"{method} {path}: {answer.text}"
        assert answer.status_code not in (401, 500), f"{method} {path}: {answer.text}"
        if may:
            allowed.append(f"{method} {path}")
        else:
            assert f"the scope {operation['x-scope']}" in answer.json()["detail"]
    assert allowed


# The table of the reference, written down here once more.
SCOPES = {
    "read": [
        *("GET /v1/endpoints", "GET /v1/endpoints/{id}", "GET /v1/generations", "GET /v1/generations/{id}"),
        *("GET /v1/generations/{id}/wait", "GET /v1/events", "GET /v1/events/{id}", "GET /v1/deliveries"),
        *("GET /v1/deliveries/{id}", "GET /v1/accounts", "GET /v1/accounts/{name}"),
        *("GET /v1/replays", "GET /v1/replays/{id}"),
    ],
    "write": [
        *("POST /v1/endpoints", "PATCH /v1/endpoints/{id}", "DELETE /v1/endpoints/{id}"),
        *("POST /v1/endpoints/{id}/enable", "POST /v1/endpoints/{id}/disable"),
        *("POST /v1/endpoints/{id}/test", "POST /v1/generations", "PATCH /v1/generations/{id}"),
        *("DELETE /v1/generations/{id}", "POST /v1/generations/{id}/refresh", "POST /v1/events"),
    ],
    "replay": ["POST /v1/deliveries/{id}/replay", "POST /v1/replays", "DELETE /v1/replays/{id}"],
    "admin": [
        *("GET /v1/endpoints/{id}/secret", "POST /v1/endpoints/{id}/secret/rotate", "GET /v1/signing-secret"),
        "POST /v1/signing-secret/rotate",
        *("POST /v1/keys", "GET /v1/keys", "GET /v1/keys/{id}", "DELETE /v1/keys/{id}", "GET /v1/audit"),
        *("POST /v1/accounts", "PATCH /v1/accounts/{name}", "DELETE /v1/accounts/{name}"),
    ],
}


async def test_every_operation_needs_the_scope_that_it_should(world: World) -> None:
    relay = await world.relay()
    needed = {f"{method} {path}": one["x-scope"] for method, path, one in await operations(relay)}
    assert {name: scope for scope, names in SCOPES.items() for name in names}.items() <= needed.items()
    for name, scope in needed.items():
        # Whatever is added later: who only reads changes nothing, and sees no secret.
        assert scope != "read" or (name.startswith("GET ") and "secret" not in name), name


async def test_values_of_headers_are_for_admins_and_who_sends_back_what_stands_for_them_keeps_them(
    world: World,
) -> None:
    relay = await world.relay()
    url = world.subscriber.origin + "/"
    headers = {"authorization": "Bearer sesame", "x-team": "tulips"}
    made = await world.endpoint(relay, headers=headers)
    path = f"/v1/endpoints/{made['id']}"
    shown = (await relay.api.get(path)).json()["headers"]
    assert shown == {"authorization": "[redacted]", "x-team": "tulips"}
    reader, writer = await world.member(relay, "read"), await world.member(relay, "write")
    answers = [
        await reader.get(path),
        await reader.get("/v1/endpoints"),
        await writer.patch(path, json={"description": "a"}),
        await writer.post(path + "/disable"),
        await writer.post(path + "/enable"),
        await writer.post("/v1/endpoints", json={"url": url, "headers": headers}),
    ]
    for answer in answers:
        assert answer.is_success
        assert "sesame" not in answer.text and "tulips" not in answer.text
        assert "authorization" in answer.text
    back = await writer.patch(path, json={"headers": answers[0].json()["headers"]})
    assert back.status_code == 200
    assert (await relay.api.get(path)).json()["headers"] == shown
    await relay.api.post(path + "/test")
    [received] = await world.subscriber.got(1)
    assert (received.headers["authorization"], received.headers["x-team"]) == ("Bearer sesame", "tulips")


async def test_a_rotated_secret_is_not_shown_again_to_who_made_the_endpoint(
    database_url: str, world: World
) -> None:
    relay = await world.relay(database=database_url)
    writer = await world.member(relay, "write")

    async def make(api: httpx.AsyncClient) -> dict[str, Any]:
        body, key = {"url": world.subscriber.origin + "/"}, {"idempotency-key": "k"}
        answer = await api.post("/v1/endpoints", json=body, headers=key)
        assert answer.status_code == 201
        return dict(answer.json())

    first = await make(writer)
    assert await make(writer) == first
    path = f"/v1/endpoints/{first['id']}"
    assert (await relay.api.post(path + "/secret/rotate")).status_code == 200
    new = (await relay.api.get(path + "/secret")).json()["secret"]
    world.clock.forward(seconds=0.002)
    before = (await relay.api.get("/v1/audit")).json()["data"]
    assert ((await make(writer))["id"], (await make(writer))["secret"]) == (first["id"], None)
    assert (await relay.api.get("/v1/audit")).json()["data"] == before
    assert (await make(relay.api))["secret"] == new


async def test_several_scopes_allow_what_each_allows(world: World) -> None:
    relay = await world.relay()
    member = await world.member(relay, "read", "replay")
    answers = {
        "GET /v1/endpoints": 200,
        "POST /v1/deliveries/x/replay": 404,
        "POST /v1/events": 403,
        "GET /v1/keys": 403,
    }
    for name, status in answers.items():
        assert (await member.request(*name.split(), json={})).status_code == status, name


async def test_a_forbidden_request_is_refused_before_its_body_is_read(world: World) -> None:
    relay = await world.relay()
    member = await world.member(relay, "read")
    assert (await member.post("/v1/endpoints", content=b"{")).status_code == 403


# How often.


async def test_a_key_may_be_used_so_often_as_its_limit_says(world: World) -> None:
    relay = await world.relay()
    # Time stands still where it is forwarded far: a burst, and what comes back of it.
    limited, other = await world.member(relay, "read", rate_limit=0.01), await world.member(relay, "read")
    fast = await world.member(relay, "read", rate_limit=5)
    assert (await limited.get("/v1/endpoints")).status_code == 200
    refused = await limited.get("/v1/endpoints")
    assert refused.status_code == 429
    assert 0 < int(refused.headers["retry-after"]) <= 100
    assert "0.01 times a second" in refused.json()["detail"]
    # Also what it may not do at all, and nobody else's requests, not those of a key that is like it.
    alike = await world.member(relay, "read", rate_limit=0.01)
    assert (await alike.get("/v1/endpoints")).status_code == 200
    assert (await limited.get("/v1/keys")).status_code == 429
    assert (await other.get("/v1/endpoints")).status_code == 200
    statuses = [(await fast.get("/v1/endpoints")).status_code for _ in range(5)]
    assert statuses == [200] * 5
    world.clock.forward(seconds=int(refused.headers["retry-after"]))
    assert (await limited.get("/v1/endpoints")).status_code == 200
    assert (await limited.get("/v1/endpoints")).status_code == 429


async def test_an_endpoint_is_tested_ten_times_a_minute_at_most(world: World) -> None:
    relay = await world.relay()
    one, other = await world.endpoint(relay), await world.endpoint(relay)
    path = f"/v1/endpoints/{one['id']}/test"
    statuses = [(await relay.api.post(path)).status_code for _ in range(11)]
    assert statuses == [202] * 10 + [429]
    refused = await relay.api.post(path)
    assert 0 < int(refused.headers["retry-after"]) <= 6
    assert (await relay.api.post(f"/v1/endpoints/{other['id']}/test")).status_code == 202
    assert (
        len((await relay.api.get("/v1/deliveries", params={"endpoint_id": one["id"]})).json()["data"]) == 10
    )
    world.clock.forward(seconds=6)
    assert (await relay.api.post(path)).status_code == 202


async def test_a_tenant_replays_a_hundred_and_then_ten_a_second(world: World) -> None:
    relay = await world.relay()
    other = await world.member(relay, "replay", tenant="other")
    path = "/v1/deliveries/dlv_unknown/replay"

    async def until_limited() -> tuple[int, httpx.Response]:
        for count in range(200):
            answer = await relay.api.post(path)
            if answer.status_code == 429:
                return count, answer
            assert answer.status_code == 404
        raise AssertionError("there is no limit")

    count, refused = await until_limited()
    # So many seconds pass meanwhile.
    assert 100 <= count <= 150
    assert refused.headers["retry-after"] == "1"
    assert (await other.post(path)).status_code == 404
    world.clock.forward(seconds=1)
    count, _ = await until_limited()
    assert 10 <= count <= 20


# When they were used last.


async def test_when_a_key_was_used_is_written_down_by_and_by(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("relay.app.KEYS_TICK", 0.1)
    relay = await world.relay()
    made = await world.key(relay, "read")
    before = rfc3339(world.clock())
    await relay.api.get("/v1/endpoints", headers=bearer(made["key"]))
    shown = await relay.eventually(f"/v1/keys/{made['id']}", lambda one: one["last_used_at"] is not None)
    assert before <= shown["last_used_at"] <= rfc3339(world.clock())


async def test_when_keys_were_used_is_written_down_at_the_stop_and_never_goes_back(
    database_url: str, world: World
) -> None:
    async with world.running(database=database_url) as relay:
        used, unused = await world.key(relay, "read"), await world.key(relay, "read")
        assert (await relay.api.get("/v1/endpoints", headers=bearer(used["key"]))).status_code == 200
        assert await last_used(relay, used, unused) == [None, None]
    world.clock.forward(seconds=-3600)
    async with world.running(database=database_url) as relay:
        [at, never] = await last_used(relay, used, unused)
        assert at is not None
        assert at > used["created_at"]
        assert never is None
        assert (await relay.api.get("/v1/endpoints", headers=bearer(used["key"]))).status_code == 200
    async with world.running(database=database_url) as relay:
        assert await last_used(relay, used, unused) == [at, None]


async def test_when_keys_were_used_is_kept_while_it_cannot_be_written_down(
    database_url: str, clock: Clock
) -> None:
    async with prepared(database_url) as store:
        gate = Gate(store.keys, None, now=clock)
        texts = [new_key(clock()) for _ in range(2)]
        for id_, text in texts:
            await store.keys.create(a_key(id=id_, hash=hash_of(text)))

        async def rename(before: str, after: str) -> None:
            async with store.database.write() as tx:
                await tx.execute(f"ALTER TABLE {before} RENAME TO {after}")

        await gate.admit(carrying(texts[0][1]))
        await rename("keys", "lost")
        for _ in range(2):
            with pytest.raises(StoreError):
                await gate.write_down()
        await rename("lost", "keys")
        await gate.admit(carrying(texts[1][1]))
        await gate.write_down()
        assert None not in [key.last_used_at for key in await store.keys.all(None)]


def carrying(key: str) -> Request:
    headers = [(b"authorization", f"Bearer {key}".encode())]
    return Request({"type": "http", "headers": headers, "client": ("203.0.113.5", 443)})


async def last_used(relay: RunningRelay, *keys: dict[str, Any]) -> Sequence[str | None]:
    shown = [(await relay.api.get(f"/v1/keys/{key['id']}")).json() for key in keys]
    return [one["last_used_at"] for one in shown]


async def test_the_key_of_the_configuration_is_no_key_of_the_list(world: World) -> None:
    relay = await world.relay()
    assert (await relay.api.get("/v1/keys")).json()["data"] == []
    assert (await relay.api.get("/v1/keys", headers=bearer(ADMIN_KEY))).status_code == 200


async def test_a_key_that_ends_makes_none_that_outlasts_it(world: World) -> None:
    relay = await world.relay()
    admin = await world.member(relay, "admin", expires_at="2099-01-01T00:00:00Z")
    for longer in ({}, {"expires_at": "2099-01-01T00:00:01Z"}):
        answer = await admin.post("/v1/keys", json={"scopes": ["read"], **longer})
        assert (answer.status_code, answer.json()["errors"][0]["field"]) == (422, "expires_at")
    for end in ("2098-01-01T00:00:00Z", "2099-01-01T00:00:00Z"):
        answer = await admin.post("/v1/keys", json={"scopes": ["admin"], "expires_at": end})
        assert answer.status_code == 201


async def test_a_key_with_a_rate_limit_makes_none_that_is_faster(world: World) -> None:
    relay = await world.relay()
    admin = await world.member(relay, "admin", rate_limit=100)
    refused = await admin.post("/v1/keys", json={**USUAL, "rate_limit": 100.5})
    assert (refused.status_code, fields(refused)) == (422, ["rate_limit"])
    given: list[dict[str, Any]] = [{}, {"rate_limit": None}, {"rate_limit": 100}, {"rate_limit": 2.5}]
    made = [(await admin.post("/v1/keys", json={**USUAL, **one})).json() for one in given]
    assert [one["rate_limit"] for one in made] == [100, 100, 100, 2.5]


async def test_a_tenant_with_too_many_keys_makes_another_one_when_one_is_revoked(world: World) -> None:
    relay = await world.relay()
    admin = await world.member(relay, "admin", tenant="acme")
    database = await open_database(relay.settings.database, alone=False)
    try:
        await fill_with_keys(store_on(database, KeyRing(["x"])), "acme", MOST - 1, now=world.clock())
    finally:
        await database.close()
    refused = await admin.post("/v1/keys", json=USUAL)
    assert (refused.status_code, f"{MOST} keys" in refused.json()["detail"]) == (409, True)
    assert (await relay.api.post("/v1/keys", json=USUAL)).status_code == 201
    # Those that have ended are none of them.
    newest = [one["id"] for one in (await admin.get("/v1/keys")).json()["data"] if not one["expires_at"]]
    assert (await admin.delete(f"/v1/keys/{newest[0]}")).status_code == 204
    assert (await admin.post("/v1/keys", json=USUAL)).status_code == 201
    assert (await admin.post("/v1/keys", json=USUAL)).status_code == 409
    world.clock.forward(seconds=61)
    assert (await admin.post("/v1/keys", json=USUAL)).status_code == 201


async def test_keys_with_other_rates_do_not_begin_a_keys_limit_anew(database_url: str, clock: Clock) -> None:
    async with prepared(database_url) as store:
        gate = Gate(store.keys, None, now=clock)
        texts = []
        for number in range(150):
            id_, text = new_key(clock())
            slow = 0.001 + number / 1_000_000
            await store.keys.create(a_key(id=id_, hash=hash_of(text), rate_limit=slow))
            texts.append(text)
        for text in texts:
            await gate.admit(carrying(text))
        for text in texts:
            with pytest.raises(Limited):
                await gate.admit(carrying(text))
