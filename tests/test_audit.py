"""The audit log: what was done, by whom, to what, from where; both are written, or neither."""

import re
from pathlib import Path
from typing import Any

import httpx
import pytest

from relay.keyring import KeyRing
from relay.store import open_database
from tests.conftest import RunningRelay, World
from tests.test_api_rules import at, operations
from tests.test_cli import relay as program
from tests.test_cli import write

ROOT = Path(__file__).parent.parent
SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
KEY = "key-of-an-account-0123456789"


async def audited(api: httpx.AsyncClient, **query: Any) -> list[dict[str, Any]]:
    """The log, oldest first."""
    page = (await api.get("/v1/audit", params={"limit": 200, **query})).json()
    return list(reversed(page["data"]))


async def deeds(
    world: World, relay: RunningRelay, api: httpx.AsyncClient
) -> list[tuple[str, str, str, list[str]]]:
    """Does once whatever is audited; the operation, and what is to be read of it: action, object, fields."""
    done: list[tuple[str, str, str, list[str]]] = []

    async def do(operation: str, id_: str, action: str, *fields: str, **body: Any) -> Any:
        method, path = operation.split()
        # Ids are ordered by the millisecond.
        world.clock.forward(seconds=0.002)
        answer = await api.request(method, at(path, id_), json=body or None)
        assert answer.is_success, f"{operation}: {answer.text}"
        made = answer.json() if answer.content else {}
        done.append((operation, action, id_ or made.get("id") or made["name"], list(fields)))
        return made

    one, url = "/v1/endpoints/{id}", world.subscriber.origin + "/"
    endpoint = (await do("POST /v1/endpoints", "", "endpoint.created", url=url, secret=SECRET))["id"]
    test = await do(f"POST {one}/test", endpoint, "endpoint.tested")
    await relay.eventually(f"/v1/deliveries/{test['id']}", lambda one: one["status"] == "delivered")
    change = (f"PATCH {one}", endpoint, "endpoint.changed")
    await do(*change, "description", "metadata", description="a", metadata={})
    await do(*change, "headers", "url", url="https://elsewhere.example/")  # headers do not go along
    await do(*change, "headers", "url", url=url, headers={"x-a": "of theirs"})
    await do(f"GET {one}/secret", endpoint, "endpoint.secret_revealed")
    await do(f"POST {one}/secret/rotate", endpoint, "endpoint.secret_rotated")
    await do(f"POST {one}/disable", endpoint, "endpoint.disabled")
    await do(f"POST {one}/enable", endpoint, "endpoint.enabled")
    await do("POST /v1/deliveries/{id}/replay", test["id"], "delivery.replayed")
    again = await do(f"POST {one}/test", endpoint, "endpoint.tested")
    await relay.eventually(f"/v1/deliveries/{again['id']}", lambda one: one["status"] == "delivered")
    slowly = {"status": "all", "event_type": "endpoint.test", "since": test["created_at"], "rate_limit": 0.01}
    assert (await relay.api.post("/v1/replays", json={**slowly, "dry_run": True})).status_code == 202
    replay = await do("POST /v1/replays", "", "replay.created", **slowly)
    await do("DELETE /v1/replays/{id}", replay["id"], "replay.canceled")
    await do(f"DELETE {one}", endpoint, "endpoint.deleted")
    await do("GET /v1/signing-secret", "default", "tenant.secret_revealed")
    await do("POST /v1/signing-secret/rotate", "default", "tenant.secret_rotated")
    account = {"name": "studio", "provider": "luma", "api_key": KEY}
    await do("POST /v1/accounts", "", "account.created", **account)
    await do("PATCH /v1/accounts/{name}", "studio", "account.changed", "api_key", api_key=KEY[::-1])
    await do("DELETE /v1/accounts/{name}", "studio", "account.deleted")
    key = await do("POST /v1/keys", "", "key.created", scopes=["read"], name="of theirs")
    await do("DELETE /v1/keys/{id}", key["id"], "key.revoked")
    return done


LOOKS = {"GET /v1/keys", "GET /v1/keys/{id}", "GET /v1/audit"}


async def test_all_that_admins_do_and_what_concerns_endpoints_is_on_record(
    database_url: str, world: World
) -> None:
    relay = await world.relay(database=database_url)
    made = await world.key(relay, "admin")
    admin = await world.client(relay, made["key"])
    done = await deeds(world, relay, admin)
    log = (await audited(admin))[1:]
    assert [(one["action"], one["object"], one["details"]["fields"]) for one in log] == [
        (action, object_, fields) for _, action, object_, fields in done
    ]
    assert {(one["tenant"], one["actor"], one["address"]) for one in log} == {
        ("default", made["id"], "127.0.0.1")
    }
    # Whatever is added: what only admins may do, and what changes endpoints.
    needed = {
        f"{method} {path}"
        for method, path, operation in await operations(relay)
        if operation["x-scope"] in ("admin", "replay")
        or (method != "GET" and path.startswith("/v1/endpoints"))
    }
    assert {operation for operation, *_ in done} == needed - LOOKS
    # Names of fields, never what is in them.
    text = (await admin.get("/v1/audit", params={"limit": 200})).text
    for value in (SECRET, KEY, KEY[::-1], "of theirs", "elsewhere", "x-a", made["key"][-43:]):
        assert value not in text


async def test_the_key_of_the_configuration_and_relay_itself_have_names_in_the_log(world: World) -> None:
    relay = await world.relay()
    await world.endpoint(relay)
    assert [one["actor"] for one in await audited(relay.api)] == ["admin_key"]


async def test_an_endpoint_that_relay_gives_up_is_on_record_once(database_url: str, world: World) -> None:
    relay = await world.relay(database=database_url)
    gone = await world.endpoint(relay, "/gone", event_types=["a.b"])
    world.subscriber.answer(410, path="/gone")
    answer = await relay.api.post("/v1/events", json=[{"type": "a.b", "data": {}}] * 5)
    assert answer.status_code == 201
    path = f"/v1/endpoints/{gone['id']}"
    await relay.eventually(path, lambda one: one["status"] == "disabled")
    assert (await relay.api.post(path + "/disable")).status_code == 200
    log = await audited(relay.api, action="endpoint.disabled")
    assert [(one["object"], one["actor"], one["address"]) for one in log] == [(gone["id"], "relay", None)]


async def test_what_was_not_done_is_not_on_record(database_url: str, world: World) -> None:
    relay = await world.relay(database=database_url)
    reader = await world.member(relay, "read")
    endpoint = await world.endpoint(relay)
    path = f"/v1/endpoints/{endpoint['id']}"
    assert (await relay.api.post(path + "/disable")).status_code == 200
    before = await audited(relay.api)
    unknown = "key_01ARZ3NDEKTSV4RRFFQ69G5FAV"
    for api, method, url, body, status in (
        (reader, "POST", path + "/enable", None, 403),
        (reader, "GET", path + "/secret", None, 403),
        (relay.api, "POST", path + "/test", None, 409),
        (relay.api, "PATCH", path, {"url": "ftp://a.example"}, 422),
        (relay.api, "POST", "/v1/endpoints", {"url": "x"}, 422),
        (relay.api, "GET", "/v1/endpoints/ep_x/secret", None, 404),
        (relay.api, "DELETE", "/v1/endpoints/ep_x", None, 404),
        (relay.api, "POST", "/v1/deliveries/dlv_x/replay", None, 404),
        (relay.api, "DELETE", f"/v1/keys/{unknown}", None, 404),
        (relay.api, "POST", "/v1/keys", {"scopes": []}, 422),
    ):
        answer = await api.request(method, url, json=body)
        assert answer.status_code == status, f"{method} {url}: {answer.text}"
    assert await audited(relay.api) == before


async def test_a_key_that_is_revoked_twice_is_on_record_once(database_url: str, world: World) -> None:
    relay = await world.relay(database=database_url)
    made = await world.key(relay, "read")
    for _ in range(3):
        assert (await relay.api.delete(f"/v1/keys/{made['id']}")).status_code == 204
    assert len(await audited(relay.api, action="key.revoked")) == 1


async def test_what_is_so_already_is_not_on_record_again(database_url: str, world: World) -> None:
    relay = await world.relay(database=database_url)
    made = await world.endpoint(relay)
    await relay.api.post("/v1/accounts", json={"name": "studio", "provider": "luma", "api_key": KEY})
    path = f"/v1/endpoints/{made['id']}"
    for verb in ("enable", "disable", "disable", "enable", "enable"):
        world.clock.forward(seconds=0.002)
        assert (await relay.api.post(f"{path}/{verb}")).status_code == 200
    for url in (path, "/v1/accounts/studio"):
        assert (await relay.api.patch(url, json={})).status_code == 200
    log = [one["action"].split(".")[1] for one in await audited(relay.api)]
    assert log == ["created", "created", "disabled", "enabled"]


async def test_a_repeated_creation_is_on_record_as_showing_the_secret_again(
    database_url: str, world: World
) -> None:
    relay = await world.relay(database=database_url)
    for _ in range(2):
        answer = await relay.api.post(
            "/v1/endpoints", json={"url": "https://a.example"}, headers={"idempotency-key": "k"}
        )
        world.clock.forward(seconds=0.002)
    log = [(one["action"], one["object"]) for one in await audited(relay.api)]
    id_ = answer.json()["id"]
    assert log == [("endpoint.created", id_), ("endpoint.secret_revealed", id_)]


async def test_nothing_is_done_and_no_secret_shown_that_cannot_be_put_on_record(
    database_url: str, world: World
) -> None:
    relay = await world.relay(database=database_url)
    endpoint = await world.endpoint(relay, secret=SECRET)
    made = await world.key(relay, "read")
    await relay.api.post("/v1/accounts", json={"name": "studio", "provider": "luma", "api_key": KEY})
    off = await world.endpoint(relay)
    await relay.api.post(f"/v1/endpoints/{off['id']}/disable")
    test = (await relay.api.post(f"/v1/endpoints/{endpoint['id']}/test")).json()
    await relay.eventually(f"/v1/deliveries/{test['id']}", lambda one: one["status"] == "delivered")
    path = f"/v1/endpoints/{endpoint['id']}"
    operations = [
        ("POST", "/v1/endpoints", {"url": "https://b.example"}),
        ("PATCH", path, {"description": "changed"}),
        ("DELETE", path, None),
        ("POST", f"/v1/endpoints/{off['id']}/enable", None),
        ("POST", path + "/disable", None),
        ("POST", path + "/test", None),
        ("POST", path + "/secret/rotate", None),
        ("GET", path + "/secret", None),
        ("GET", "/v1/signing-secret", None),
        ("POST", f"/v1/deliveries/{test['id']}/replay", None),
        ("POST", "/v1/keys", {"scopes": ["admin"]}),
        ("DELETE", f"/v1/keys/{made['id']}", None),
        ("POST", "/v1/accounts", {"name": "new", "provider": "luma", "api_key": KEY}),
        ("PATCH", "/v1/accounts/studio", {"requests_per_minute": 5}),
        ("DELETE", "/v1/accounts/studio", None),
    ]
    lists = [f"/v1/{noun}" for noun in ("endpoints", "deliveries", "events", "keys", "accounts")]
    before = [(await relay.api.get(one)).json() for one in lists]
    await run(database_url, "ALTER TABLE audit RENAME TO lost")
    for method, url, body in operations:
        answer = await relay.api.request(method, url, json=body)
        assert answer.status_code == 503, f"{method} {url}: {answer.text}"
        assert "whsec_" not in answer.text
        assert "rk_" not in answer.text
    assert [(await relay.api.get(one)).json() for one in lists] == before
    await run(database_url, "ALTER TABLE lost RENAME TO audit")
    assert (await relay.api.get(path + "/secret")).json()["secret"] == SECRET
    assert len(world.subscriber.received) == 1


async def run(url: str, sql: str) -> None:
    database = await open_database(url, alone=False)
    async with database.write() as tx:
        await tx.execute(sql)
    await database.close()


async def test_the_log_is_filtered_and_comes_in_pages_newest_first(database_url: str, world: World) -> None:
    relay = await world.relay(database=database_url)
    made = await world.key(relay, "admin")
    admin = await world.client(relay, made["key"])
    deed = [(action, object_) for _, action, object_, _ in await deeds(world, relay, admin)]
    done = [("key.created", made["id"]), *deed]
    log = await audited(relay.api)
    assert [(one["action"], one["object"]) for one in log] == done
    for name in ("actor", "action", "object"):
        for value in {one[name] for one in log}:
            assert await audited(admin, **{name: value}) == [one for one in log if one[name] == value]
        assert await audited(admin, **{name: "another"}) == []
    both = {"actor": made["id"], "action": "endpoint.changed", "object": log[1]["object"]}
    assert await audited(admin, **both) == log[3:6]
    at = log[6]["at"]
    assert await audited(admin, since=at) == log[6:]
    assert await audited(admin, until=at) == log[:6]
    assert await audited(admin, since=log[3]["at"], until=at, action="endpoint.changed") == log[3:6]
    seen, cursor = [], {}
    while True:
        page = (await admin.get("/v1/audit", params={"limit": 4, "actor": made["id"], **cursor})).json()
        seen += page["data"]
        if page["next_cursor"] is None:
            break
        cursor = {"cursor": page["next_cursor"]}
    assert seen == log[:0:-1]


async def test_what_is_done_on_the_command_line_is_on_record(database_url: str, world: World) -> None:
    write(world.directory, world.document(database=database_url))
    relay = await world.relay(database=database_url)
    made = await program("keys", "create", "--tenant", "acme", cwd=world.directory)
    [listed] = (await relay.api.get("/v1/keys", params={"tenant": "acme"})).json()["data"]
    await program("keys", "revoke", listed["id"], cwd=world.directory)
    log = await audited(relay.api, tenant="acme")
    assert [(one["action"], one["object"], one["actor"], one["address"]) for one in log] == [
        ("key.created", listed["id"], "cli", None),
        ("key.revoked", listed["id"], "cli", None),
    ]
    assert made.out.strip()[-43:] not in str(log)
    assert (await program("rekey", cwd=world.directory)).code == 0
    key_id = KeyRing([relay.settings.secret_key]).newest
    log = await audited(relay.api, action="secrets.rekeyed")
    assert [(one["object"], one["actor"], one["address"]) for one in log] == [(key_id, "cli", None)]


def test_no_statement_changes_an_entry_and_only_retention_removes_one() -> None:
    changing = re.compile(r"(UPDATE|DELETE\s+FROM|INSERT\s+INTO|REPLACE\s+INTO|DROP\s+TABLE)\s+audit\b", re.I)
    found = {
        (file.relative_to(ROOT / "relay").as_posix(), " ".join(match[1].upper().split()))
        for file in (ROOT / "relay").rglob("*")
        if file.suffix in (".py", ".sql")
        for match in changing.finditer(file.read_text())
    }
    assert found == {("store/audit.py", "INSERT INTO"), ("store/retention.py", "DELETE FROM")}


@pytest.mark.parametrize("kept", ["365d", "1d"])
async def test_old_entries_are_removed_as_the_configuration_says(
    database_url: str, world: World, monkeypatch: pytest.MonkeyPatch, kept: str
) -> None:
    monkeypatch.setattr("relay.app.PRUNE_TICK", 0.1)
    relay = await world.relay(database=database_url, retention={"audit": kept} if kept != "365d" else {})
    await world.key(relay, "read")
    days = 365 if kept == "365d" else 1
    world.clock.forward(seconds=days * 86_400 - 60)
    await world.endpoint(relay)
    assert len(await audited(relay.api)) == 2
    world.clock.forward(seconds=120)
    await relay.eventually("/v1/audit", lambda page: len(page["data"]) == 1)
    assert [one["action"] for one in await audited(relay.api)] == ["endpoint.created"]
