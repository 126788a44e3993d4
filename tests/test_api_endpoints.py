"""Endpoints over the API: registered, changed, tested, rotated, disabled, deleted."""

import asyncio
import json
from collections.abc import Sequence

import httpx
import pytest
from standardwebhooks import Webhook, WebhookVerificationError

from relay.store import endpoints
from tests.conftest import ADMIN_KEY, RunningRelay, World
from tests.serving import Received

URL = "https://hooks.example.com/relay"
SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
ENDINGS = ["generation.completed", "generation.failed", "generation.canceled", "generation.timed_out"]


def named(answer: httpx.Response) -> list[str]:
    return [one["field"] for one in answer.json()["errors"]]


def accepts(secret: str, received: Received) -> bool:
    """Whether the official package takes the webhook for one signed with the secret."""
    try:
        Webhook(secret).verify(received.body, received.headers)
    except WebhookVerificationError:
        return False
    return True


async def send_test(world: World, relay: RunningRelay, endpoint_id: str) -> Received:
    answer = await relay.api.post(f"/v1/endpoints/{endpoint_id}/test")
    assert answer.status_code == 202, answer.text
    event_id = answer.json()["event_id"]

    def arrived(received: Sequence[Received]) -> bool:
        return any(one.headers["webhook-id"] == event_id for one in received)

    received = await world.subscriber.until(arrived)
    return next(one for one in received if one.headers["webhook-id"] == event_id)


async def test_an_endpoint_is_kept_as_given_and_its_secret_shown_only_where_promised(world: World) -> None:
    relay = await world.relay()
    given = {
        "url": URL,
        "description": "orders",
        "event_types": ["generation.completed", "my.own_type"],
        "accounts": ["luma", "vivix"],
        "headers": {"x-tenant": "a b"},
        "metadata": {"order": 42, "deep": [{"a": None}]},
    }
    answer = await relay.api.post("/v1/endpoints", json=given)
    assert answer.status_code == 201
    created = answer.json()
    assert {name: created[name] for name in given} == given
    assert (created["status"], created["disabled_reason"]) == ("enabled", None)
    assert created["secret"].startswith("whsec_")
    path = f"/v1/endpoints/{created['id']}"
    assert (await relay.api.get(path + "/secret")).json()["secret"] == created["secret"]
    without = {name: value for name, value in created.items() if name != "secret"}
    assert (await relay.api.get(path)).json() == without
    for shown in (
        await relay.api.get("/v1/endpoints"),
        await relay.api.patch(path, json={"description": "x"}),
        await relay.api.post(path + "/disable"),
        await relay.api.post(path + "/enable"),
    ):
        assert shown.status_code == 200
        assert created["secret"] not in shown.text
    own = await relay.api.post("/v1/endpoints", json={"url": URL, "secret": SECRET})
    assert own.json()["secret"] == SECRET
    other = await relay.api.post("/v1/endpoints", json={"url": URL})
    assert other.json()["secret"] != created["secret"], "the same URL twice: two endpoints, two secrets"


IMPOSSIBLE_URLS = [
    "",
    " ",
    "hooks.example.com",
    "//hooks.example.com/",
    "/relative",
    "ftp://hooks.example.com/",
    "javascript:alert(1)",
    "file:///etc/passwd",
    "https://",
    "https:///path",
    "https://:443/",
    "https://hooks.example.com:99999/",
    "https://hooks.example.com:0/",
    "https://hooks.example.com:x/",
    "https://user:password@hooks.example.com/",
    "https://hooks.example.com/\r\nx: y",
    "https://hooks example.com/",
    "https://hooks.example.com/a b",
    "https://-.example.com/",
    "https://a..example.com/",
    "https://" + "a" * 64 + ".example.com/",
    "https://[::1/",
    "https://[fe80::1%25eth0]/",
    "https://999.1.1.1/",
    "https://2130706433/",
    "https://0x7f.1/",
    "http://hooks.example.com/",
    "https://hooks.example.com/" + "a" * 100_000,
]
WRONG = [
    ({}, "url"),
    ({"url": 5}, "url"),
    ({"url": None}, "url"),
    ({"url": [URL]}, "url"),
    ({"url": URL, "colour": "red"}, "colour"),
    ({"url": URL, "id": "ep_x"}, "id"),
    ({"url": URL, "description": 5}, "description"),
    ({"url": URL, "event_types": "generation.completed"}, "event_types"),
    ({"url": URL, "event_types": [1]}, "event_types.0"),
    ({"url": URL, "event_types": ["a b"]}, "event_types.0"),
    ({"url": URL, "accounts": ["nobody"]}, "accounts"),
    ({"url": URL, "accounts": {"luma": True}}, "accounts"),
    ({"url": URL, "headers": {"x-a": 1}}, "headers.x-a"),
    ({"url": URL, "headers": {"x-a": "b\r\nx-c: d"}}, "headers"),
    ({"url": URL, "headers": {"webhook-signature": "v1,x"}}, "headers"),
    ({"url": URL, "headers": {"Host": "other.example"}}, "headers"),
    ({"url": URL, "secret": "whsec_"}, "secret"),
    ({"url": URL, "secret": "x" * 32}, "secret"),
    ({"url": URL, "secret": 5}, "secret"),
    ({"url": URL, "rate_limit": 1e-16}, "rate_limit"),
    ({"url": URL, "rate_limit": 5e-324}, "rate_limit"),
    ({"url": URL, "metadata": [1]}, "metadata"),
    ({"url": URL, "metadata": "x"}, "metadata"),
]


async def test_impossible_urls_and_wrong_fields_are_named_and_nothing_is_created(world: World) -> None:
    relay = await world.relay()
    for body, field in [*WRONG, *(({"url": url}, "url") for url in IMPOSSIBLE_URLS)]:
        answer = await relay.api.post("/v1/endpoints", json=body)
        assert answer.status_code == 422, f"{str(body)[:100]}: {answer.status_code}"
        assert named(answer) == [field], str(body)[:100]
    both = await relay.api.post("/v1/endpoints", json={"url": 5, "colour": "red"})
    assert set(named(both)) == {"url", "colour"}
    assert (await relay.api.get("/v1/endpoints")).json()["data"] == []


async def test_a_patch_changes_what_it_names_and_nothing_else(world: World) -> None:
    relay = await world.relay()
    fields = {"description": "a", "event_types": ["my.type"], "accounts": ["luma"], "metadata": {"a": 1}}
    created = await world.endpoint(relay, **fields)
    path = f"/v1/endpoints/{created['id']}"
    before = (await relay.api.get(path)).json()
    assert (await relay.api.patch(path, json={})).status_code == 200
    for body in (
        {"description": "b"},
        {"metadata": {"b": 2}},
        {"event_types": ["generation.failed"]},
        {"accounts": None},
        {"description": None},
        {"event_types": None},
        {"headers": {"x-a": "b"}},
        {"url": "https://other.example/hook", "headers": {"x-a": "c"}},
    ):
        world.clock.forward(seconds=0.01)
        answer = await relay.api.patch(path, json=body)
        after = answer.json()
        assert answer.status_code == 200
        assert after == before | body | {"updated_at": after["updated_at"]}
        assert after["updated_at"] > before["updated_at"]
        assert (await relay.api.get(path)).json() == after
        before = after
    for body, field in (
        ({"url": "ftp://x.example"}, "url"),
        ({"url": None}, "url"),
        ({"status": "disabled"}, "status"),
        ({"secret": SECRET}, "secret"),
        ({"accounts": ["nobody"]}, "accounts"),
        ({"description": "c", "event_types": 5}, "event_types"),
    ):
        answer = await relay.api.patch(path, json=body)
        assert (answer.status_code, named(answer)) == (422, [field])
    assert (await relay.api.get(path)).json() == before
    assert (await relay.api.get(path + "/secret")).json()["secret"] == created["secret"]


@pytest.mark.parametrize("moved", ["https://b.test/", "https://a.test:8443/", "http://127.0.0.1/"])
async def test_headers_stay_behind_when_the_url_moves_to_another_host_or_port(
    world: World, moved: str
) -> None:
    relay = await world.relay()
    old = "https://127.0.0.1/" if moved.startswith("http:") else "https://a.test/"
    made = (await relay.api.post("/v1/endpoints", json={"url": old, "headers": {"x-a": "b"}})).json()
    path = f"/v1/endpoints/{made['id']}"
    same = await relay.api.patch(path, json={"url": old + "path"})
    assert same.json()["headers"] == {"x-a": "b"}
    assert (await relay.api.patch(path, json={"url": moved})).json()["headers"] == {}


async def test_changes_at_the_same_time_do_not_undo_each_other(world: World) -> None:
    relay = await world.relay()
    path = f"/v1/endpoints/{(await world.endpoint(relay))['id']}"
    for n in range(5):
        answers = await asyncio.gather(
            relay.api.patch(path, json={"description": str(n)}),
            relay.api.patch(path, json={"metadata": {"n": n}}),
        )
        assert {answer.status_code for answer in answers} == {200}
        after = (await relay.api.get(path)).json()
        assert (after["description"], after["metadata"]) == (str(n), {"n": n})


async def test_a_change_at_the_same_time_does_not_bring_back_the_rotated_secret(world: World) -> None:
    relay = await world.relay()
    path = f"/v1/endpoints/{(await world.endpoint(relay))['id']}"
    for n in range(5):
        rotated, *_ = await asyncio.gather(
            relay.api.post(path + "/secret/rotate"),
            *(relay.api.patch(path, json={"metadata": {"n": n}}) for _ in range(3)),
        )
        assert (await relay.api.get(path + "/secret")).json()["secret"] == rotated.json()["secret"]


async def test_an_endpoint_receives_only_what_its_filter_wants(world: World) -> None:
    relay = await world.relay()
    wanted = {
        "/endings": {},
        "/failures": {"event_types": ["generation.failed"]},
        "/luma": {"accounts": ["luma"]},
        "/luma-completed": {"accounts": ["luma", "vivix"], "event_types": ["generation.completed"]},
        "/own": {"event_types": ["my.type"]},
    }
    for path, fields in wanted.items():
        await world.endpoint(relay, path, **fields)
    for provider, outcome in (("luma", "completed"), ("luma", "failed"), ("pixellabs", "failed")):
        await world.watch(relay, provider, outcome=outcome, duration=0)
    deliveries = await relay.eventually(
        "/v1/deliveries",
        lambda page: len(page["data"]) == 8 and all(one["status"] == "delivered" for one in page["data"]),
    )
    assert len(deliveries["data"]) == 8
    got: dict[str, list[tuple[str, str]]] = {path: [] for path in wanted}
    for one in world.subscriber.received:
        event = json.loads(one.body)
        got[one.path].append((event["data"]["account"], event["type"].removeprefix("generation.")))
    everything = {("luma", "completed"), ("luma", "failed"), ("pixellabs", "failed")}
    assert {path: set(found) for path, found in got.items()} == {
        "/endings": everything,
        "/failures": {("luma", "failed"), ("pixellabs", "failed")},
        "/luma": {("luma", "completed"), ("luma", "failed")},
        "/luma-completed": {("luma", "completed")},
        "/own": set(),
    }


async def test_a_test_event_comes_signed_whatever_the_filter_and_with_the_endpoints_headers(
    world: World,
) -> None:
    relay = await world.relay()
    endpoint = await world.endpoint(
        relay, "/hook?a=b", event_types=["my.type"], accounts=["luma"], headers={"x-tenant": "7"}
    )
    await world.endpoint(relay, "/another")
    received = await send_test(world, relay, endpoint["id"])
    assert accepts(endpoint["secret"], received)
    event = json.loads(received.body)
    assert event["type"] == "endpoint.test"
    assert event["timestamp"].endswith("Z")
    assert isinstance(event["data"], dict)
    assert received.body == json.dumps(event, ensure_ascii=False, separators=(",", ":")).encode(), "compact"
    assert received.path == "/hook"
    headers = received.headers
    assert headers["x-tenant"] == "7"
    assert headers["content-type"] == "application/json"
    assert headers["user-agent"].startswith("Relay/")
    assert abs(int(headers["webhook-timestamp"]) - world.clock() / 1000) < 60
    [listed] = (await relay.api.get("/v1/deliveries")).json()["data"]
    assert (listed["endpoint_id"], listed["event_type"]) == (endpoint["id"], "endpoint.test")


async def test_a_rotated_secret_signs_beside_the_old_one_until_the_overlap_is_over(world: World) -> None:
    relay = await world.relay()
    endpoint = await world.endpoint(relay)
    rotate = f"/v1/endpoints/{endpoint['id']}/secret/rotate"
    old = endpoint["secret"]
    started = world.clock()
    answer = await relay.api.post(rotate, json={})
    assert answer.status_code == 200
    new = answer.json()["secret"]
    assert new != old
    assert (await relay.api.get(f"/v1/endpoints/{endpoint['id']}/secret")).json() == answer.json()
    received = await send_test(world, relay, endpoint["id"])
    assert received.headers["webhook-signature"].count("v1,") == 2
    assert accepts(new, received)
    assert accepts(old, received)

    again = await relay.api.post(rotate, json={"secret": SECRET, "overlap_seconds": 60})
    assert again.json()["secret"] == SECRET
    received = await send_test(world, relay, endpoint["id"])
    assert accepts(SECRET, received)
    assert accepts(new, received)
    world.clock.forward(seconds=61)
    received = await send_test(world, relay, endpoint["id"])
    assert accepts(SECRET, received)
    assert not accepts(new, received), "its overlap is over"

    answer = await relay.api.post(rotate, json={"overlap_seconds": 0})
    received = await send_test(world, relay, endpoint["id"])
    assert accepts(answer.json()["secret"], received)
    assert not accepts(SECRET, received)
    for body, field in (
        ({"overlap_seconds": -1}, "overlap_seconds"),
        ({"overlap_seconds": "1"}, "overlap_seconds"),
        ({"secret": "short"}, "secret"),
        ({"colour": "red"}, "colour"),
    ):
        refused = await relay.api.post(rotate, json=body)
        assert (refused.status_code, named(refused)) == (422, [field])
    assert world.clock() - started < 5 * 60_000, "or the signatures are too old for the package"


@pytest.mark.parametrize(
    ("method", "action"), [("POST", "/disable"), ("DELETE", "")], ids=["disabled", "deleted"]
)
async def test_what_is_pending_is_canceled_and_nothing_more_is_sent(
    world: World, method: str, action: str
) -> None:
    relay = await world.relay()
    world.subscriber.answer(500, path="/failing")
    endpoint, other = await world.endpoint(relay, "/failing"), await world.endpoint(relay, "/other")
    path = f"/v1/endpoints/{endpoint['id']}"
    await world.watch(relay, "luma", duration=0)
    page = await relay.eventually(
        f"/v1/deliveries?endpoint_id={endpoint['id']}",
        lambda page: page["data"] and page["data"][0]["status"] == "pending",
    )
    [delivery] = page["data"]
    assert delivery["attempt_count"] == 1
    assert (await relay.api.request(method, path + action)).is_success
    canceled = (await relay.api.get(f"/v1/deliveries/{delivery['id']}")).json()
    assert (canceled["status"], canceled["next_attempt_at"]) == ("canceled", None)
    await world.watch(relay, "luma", duration=0)
    await world.subscriber.got(2, path="/other")
    listed = (await relay.api.get("/v1/deliveries", params={"endpoint_id": endpoint["id"]})).json()["data"]
    assert [one["id"] for one in listed] == [delivery["id"]], "no delivery for the new event"
    replayed = await relay.api.post(f"/v1/deliveries/{delivery['id']}/replay")
    assert replayed.status_code == 409
    if method == "DELETE":
        for gone in (path, path + "/secret"):
            assert (await relay.api.get(gone)).status_code == 404
        assert (await relay.api.delete(path)).status_code == 404
        assert [one["id"] for one in (await relay.api.get("/v1/endpoints")).json()["data"]] == [other["id"]]
        return
    shown = (await relay.api.get(path)).json()
    assert (shown["status"], bool(shown["disabled_reason"])) == ("disabled", True)
    assert (await relay.api.post(path + "/test")).status_code == 409
    enabled = (await relay.api.post(path + "/enable")).json()
    assert (enabled["status"], enabled["disabled_reason"]) == ("enabled", None)
    world.subscriber.answer(204, path="/failing")
    assert (await relay.api.get(f"/v1/deliveries/{delivery['id']}")).json()["status"] == "canceled"
    assert (await relay.api.post(f"/v1/deliveries/{delivery['id']}/replay")).status_code == 202
    await relay.eventually(f"/v1/deliveries/{delivery['id']}", lambda one: one["status"] == "delivered")
    await world.watch(relay, "luma", duration=0)
    await world.subscriber.got(3, path="/failing")


SENSITIVE = {
    "Authorization": "Bearer the-one",
    "X-Api-Key": "the-two",
    "x-auth": "the-three",
    "X-Session-Token": "the-four",
    "x-client-secret": "the-five",
    "X-Password": "the-six",
    "X-Hub-Signature": "the-seven",
    "x-credentials": "the-eight",
    "x-set-cookie": "the-nine",
}
PLAIN = {"X-Tenant": "7", "x-trace": "abc"}


async def headers_at(world: World, relay: RunningRelay, endpoint_id: str) -> dict[str, str]:
    """What is really sent to an endpoint, of all these."""
    received = (await send_test(world, relay, endpoint_id)).headers
    known = {name.lower() for name in SENSITIVE | PLAIN}
    return {name: value for name, value in received.items() if name in known}


async def test_values_of_sensitive_headers_are_sent_and_not_shown(world: World) -> None:
    relay = await world.relay()
    shown = {**dict.fromkeys(SENSITIVE, "[redacted]"), **PLAIN}
    made = await world.endpoint(relay, headers={**SENSITIVE, **PLAIN})
    path = f"/v1/endpoints/{made['id']}"
    assert made["headers"] == shown
    assert (await relay.api.get(path)).json()["headers"] == shown
    assert (await relay.api.get("/v1/endpoints")).json()["data"][0]["headers"] == shown
    answer = await relay.api.patch(path, json={"description": "orders"})
    assert answer.json()["headers"] == shown
    sent = await headers_at(world, relay, made["id"])
    assert sent == {name.lower(): value for name, value in {**SENSITIVE, **PLAIN}.items()}


async def test_what_was_shown_can_be_sent_back_and_keeps_what_is_there(world: World) -> None:
    relay = await world.relay()
    made = await world.endpoint(relay, headers={"X-Api-Key": "old-key", "x-auth": "old-auth", "x-trace": "a"})
    path = f"/v1/endpoints/{made['id']}"
    back = {"x-api-key": "[redacted]", "x-auth": "new-auth", "x-tenant": "7"}
    answer = await relay.api.patch(path, json={"headers": back, "url": world.subscriber.origin + "/other"})
    assert answer.status_code == 200, answer.text
    assert answer.json()["headers"] == {"x-api-key": "[redacted]", "x-auth": "[redacted]", "x-tenant": "7"}
    sent = await headers_at(world, relay, made["id"])
    assert sent == {"x-api-key": "old-key", "x-auth": "new-auth", "x-tenant": "7"}


async def test_a_value_that_is_not_there_cannot_be_kept(world: World) -> None:
    relay = await world.relay()
    nothing = {"x-api-key": "[redacted]"}
    answer = await relay.api.post("/v1/endpoints", json={"url": URL, "headers": nothing})
    assert (answer.status_code, named(answer)) == (422, ["headers"])
    made = await world.endpoint(relay, headers={"x-auth": "some-value"})
    path = f"/v1/endpoints/{made['id']}"
    for change in (
        {"headers": nothing},
        {"url": "https://other.example", "headers": {"x-auth": "[redacted]"}},
    ):
        answer = await relay.api.patch(path, json=change)
        assert (answer.status_code, named(answer)) == (422, ["headers"])
    assert await headers_at(world, relay, made["id"]) == {"x-auth": "some-value"}


async def test_a_tenant_has_only_so_many_endpoints(
    database_url: str, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoints, "MOST", 3)
    relay = await world.relay(database=database_url)
    key, body = {"idempotency-key": "k"}, {"url": URL}
    first = (await relay.api.post("/v1/endpoints", json=body, headers=key)).json()
    for path in ("/a", "/b"):
        last = await world.endpoint(relay, path)
    # One that takes nothing counts as well; a neighbour's do not.
    assert (await relay.api.post(f"/v1/endpoints/{last['id']}/disable")).status_code == 200
    answer = await relay.api.post("/v1/endpoints", json=body)
    assert (answer.status_code, "there are 3 endpoints already" in answer.json()["detail"]) == (409, True)
    neighbour = await world.member(relay, "write", tenant="acme")
    assert (await neighbour.post("/v1/endpoints", json=body)).status_code == 201
    # What was created before is told again, and may be changed.
    again = await relay.api.post("/v1/endpoints", json=body, headers=key)
    assert (again.status_code, again.json()["id"]) == (201, first["id"])
    change = await relay.api.patch(f"/v1/endpoints/{first['id']}", json={"description": "orders"})
    assert change.status_code == 200
    assert (await relay.api.delete(f"/v1/endpoints/{last['id']}")).status_code == 204
    assert (await relay.api.post("/v1/endpoints", json=body)).status_code == 201


async def test_a_header_is_not_kept_for_another_host_however_two_changes_meet(
    database_url: str, world: World
) -> None:
    relay = await world.relay(database=database_url)
    for _ in range(10):
        made = await world.endpoint(relay, headers={"x-auth": "some-value"})
        path = f"/v1/endpoints/{made['id']}"
        moved, kept = await asyncio.gather(
            relay.api.patch(path, json={"url": "https://other.example/"}),
            relay.api.patch(path, json={"headers": {"x-auth": "[redacted]"}}),
        )
        # Who comes second either moves without them or has none to keep.
        assert (moved.status_code, kept.status_code) in ((200, 200), (200, 422))
        after = (await relay.api.get(path)).json()
        assert (after["url"], after["headers"]) == ("https://other.example/", {})


@pytest.mark.parametrize(
    "url",
    ["https://user:the-password/x@host.example", "https://host.example:the-password/", "https://the\u2028x"],
)
async def test_a_url_that_is_none_is_not_repeated(world: World, url: str) -> None:
    relay = await world.relay()
    answer = await relay.api.post("/v1/endpoints", json={"url": url})
    assert (answer.status_code, named(answer)) == (422, ["url"])
    assert "the" not in answer.json()["errors"][0]["message"]


async def test_a_refusal_does_not_repeat_a_secret_in_the_wrong_place(world: World) -> None:
    relay = await world.relay()
    secret = "whsec_" + "QUJDRUZH" * 4
    for body in (
        {"url": URL, secret: 1},
        {"url": URL, "accounts": [secret]},
        {"url": URL, "accounts": [ADMIN_KEY]},
    ):
        answer = await relay.api.post("/v1/endpoints", json=body)
        assert answer.status_code == 422
        assert "[redacted]" in answer.text
        assert "QUJD" not in answer.text and ADMIN_KEY not in answer.text
    answer = await relay.api.get(f"/v1/endpoints/{secret}")
    assert (answer.status_code, answer.json()["detail"]) == (404, "no endpoint whsec_[redacted]")
