"""What holds for the whole API: keys, refusals, bodies, pages, idempotency, callbacks, health."""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import httpx
import pytest

from relay.web.operations import OPERATIONS
from tests.conftest import ADMIN_KEY, RunningRelay, World

URL = "https://hooks.example.com/relay"
LARGEST_BODY = 1024 * 1024
LISTS = ("/v1/endpoints", "/v1/generations", "/v1/events", "/v1/deliveries", "/v1/replays")
PREFIXES = {
    "endpoints": "ep",
    "generations": "gen",
    "events": "evt",
    "deliveries": "dlv",
    "replays": "rpl",
    "keys": "key",
    "audit": "aud",
}


# What is in it is tried in tests/test_stream.py.
STREAM = "/v1/events/stream"


async def operations(relay: RunningRelay) -> list[tuple[str, str, dict[str, Any]]]:
    """Method, path and description of every operation that needs a key."""
    document = (await relay.api.get("/openapi.json")).json()
    return [
        (method.upper(), path, operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
        if operation.get("security") != []
    ]


def example(operation: dict[str, Any]) -> Any:
    return operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("example")


def at(path: str, name: str) -> str:
    """A path of the document, of the thing with this id or name; nobody waits for the end of a stream."""
    return re.sub(r"\{\w+\}", name, path) + ("?timeout=0" if path == STREAM else "")


def fields(answer: httpx.Response) -> list[str]:
    """The fields that a problem names, after a look at its shape."""
    assert answer.headers["content-type"] == "application/problem+json", answer.text
    problem = answer.json()
    assert problem["status"] == answer.status_code
    assert all(isinstance(problem[name], str) and problem[name] for name in ("type", "title", "detail"))
    errors = problem.get("errors", [])
    assert all(isinstance(one["message"], str) and one["message"] for one in errors)
    return [one["field"] for one in errors]


async def nothing_exists(relay: RunningRelay) -> bool:
    return all([(await relay.api.get(path)).json()["data"] == [] for path in LISTS])


NOT_THE_KEY = [
    "",
    "Bearer",
    "Bearer wrong",
    f"Bearer {ADMIN_KEY[:-1]}",
    f"Bearer {ADMIN_KEY} more",
    f"Basic {ADMIN_KEY}",
    ADMIN_KEY,
]


async def test_every_operation_is_refused_without_the_key(world: World) -> None:
    relay = await world.relay()
    async with httpx.AsyncClient(base_url=relay.origin) as stranger:
        for method, path, operation in await operations(relay):
            for headers in ({}, *({"authorization": value} for value in NOT_THE_KEY)):
                answer = await stranger.request(
                    method, at(path, "x"), json=example(operation), headers=headers
                )
                assert answer.status_code == 401, f"{method} {path} {headers}"
                assert answer.headers["www-authenticate"].startswith("Bearer")
                assert fields(answer) == []
    assert await nothing_exists(relay)


async def test_an_unknown_id_is_not_found_by_any_operation(world: World) -> None:
    relay = await world.relay()
    endpoint, generation = await world.endpoint(relay), await world.watch(relay, "luma", duration=600)
    tried = 0
    for method, path, operation in await operations(relay):
        # Under a name of one's own choice something new comes into being.
        if "{" not in path or method == "PUT":
            continue
        kind = path.split("/")[2]
        of_another_kind = endpoint["id"] if kind == "generations" else generation["id"]
        unknown = f"{PREFIXES.get(kind, kind)}_01ARZ3NDEKTSV4RRFFQ69G5FAV"
        for id_ in (unknown, "x", "%00%ff", of_another_kind):
            answer = await relay.api.request(method, at(path, id_), json=example(operation))
            assert answer.status_code == 404, f"{method} {path} {id_}: {answer.text}"
            assert fields(answer) == []
            tried += 1
    assert tried >= 4 * 15


async def test_unknown_paths_and_methods_are_problems(world: World) -> None:
    relay = await world.relay()
    for path in ("/", "/v1", "/v1/nope", "/v1/endpoints/a/b/c", "/v2/endpoints"):
        answer = await relay.api.get(path)
        assert answer.status_code == 404, f"{path}: {answer.status_code}"
        assert fields(answer) == []
    for method, path in (("PUT", "/v1/endpoints/x"), ("POST", "/healthz"), ("GET", "/hooks/pictory/x")):
        answer = await relay.api.request(method, path)
        assert answer.status_code == 405, f"{method} {path}"
        assert fields(answer) == []


async def test_a_path_with_a_slash_too_many_is_unknown_rather_than_redirected(world: World) -> None:
    relay = await world.relay()
    hook = (await relay.api.post("/v1/generations", json={"account": "pictory"})).json()["webhook_url"]
    for method, path in (("GET", "/v1/endpoints/"), ("POST", "/v1/generations/"), ("POST", hook + "/")):
        answer = await relay.api.request(method, path, json={})
        assert answer.status_code == 404, f"{path}: {answer.status_code} {answer.headers.get('location')}"
        assert fields(answer) == []


async def test_a_wrong_method_is_told_every_right_one(world: World) -> None:
    relay = await world.relay()
    answer = await relay.api.put("/v1/endpoints")
    assert answer.status_code == 405
    # RFC 9110, section 15.5.6: the methods that the resource supports, all of them.
    assert {"GET", "POST"} <= set(re.split(r",\s*", answer.headers["allow"]))


MALFORMED = [
    b"{",
    b"hello",
    b'{"url": "https://a.example"} {}',
    b"\xff\xfe{}",
    b"[]",
    b"null",
    b'"text"',
    b'{"metadata": {"n": NaN}}',
    b'{"metadata": {"n": -Infinity}}',
    b'{"metadata": {"n": ' + b"9" * 5000 + b"}}",
    b'{"metadata": ' + b'{"a":' * 101 + b"1" + b"}" * 102,
    b"[" * 100_000,
    b'{"a":' * 100_000,
]


async def test_malformed_json_is_refused_and_changes_nothing(world: World) -> None:
    relay = await world.relay()
    endpoint, generation = await world.endpoint(relay), await world.watch(relay, "luma", duration=600)
    paths = (f"/v1/endpoints/{endpoint['id']}", f"/v1/generations/{generation['id']}")
    before = (await relay.api.get("/v1/endpoints")).json()
    for method, path, bodies in (
        ("POST", "/v1/endpoints", [b"", *MALFORMED]),
        ("POST", "/v1/generations", [b"", *MALFORMED]),
        ("POST", paths[0] + "/secret/rotate", MALFORMED),
        ("PATCH", paths[0], MALFORMED),
        ("PATCH", paths[1], MALFORMED),
    ):
        for body in bodies:
            answer = await relay.api.request(method, path, content=body)
            assert answer.status_code == 400, f"{method} {path} {body[:40]!r}: {answer.status_code}"
            assert fields(answer) == []
    assert (await relay.api.get("/v1/endpoints")).json() == before
    assert (await relay.api.get(paths[0] + "/secret")).json()["secret"] == endpoint["secret"]
    [watched] = (await relay.api.get("/v1/generations")).json()["data"]
    assert (watched["id"], watched["metadata"]) == (generation["id"], {})


async def test_odd_numbers_and_characters_are_refused_or_kept_as_they_are(world: World) -> None:
    relay = await world.relay()
    bodies = {
        "/v1/endpoints": b'{"url": "https://a.example", "metadata": {"n": 1e999}}',
        "/v1/generations": b'{"account": "luma", "job_id": "j", "metadata": {"n": -1e999}}',
    }
    for path, body in bodies.items():
        answer = await relay.api.post(path, content=body)
        assert answer.status_code in (400, 422), answer.text
        assert not re.search(rb"Infinity|NaN", answer.content)
    assert await nothing_exists(relay)
    kept = {"nul": "a\u0000b", "emoji": "🏮", "line": "\u2028", "quote": '"\\</script>'}
    answer = await relay.api.post("/v1/endpoints", json={"url": URL, "metadata": kept})
    assert answer.json()["metadata"] == kept
    for body in (
        b'{"url": "https://a.example", "description": "\\ud800"}',
        b'{"url": "https://\\ud800.example"}',
    ):
        answer = await relay.api.post("/v1/endpoints", content=body)
        assert answer.status_code == 422, answer.text
        assert len(fields(answer)) == 1


async def test_characters_that_a_database_has_not_are_refused_wherever_text_is_taken(
    world: World, database_url: str
) -> None:
    relay = await world.relay(database=database_url)
    made = (await relay.api.post("/v1/endpoints", json={"url": URL})).json()
    for one in OPERATIONS:
        path = at(one.path, "a%00" if "{id}" in one.path else "{name}")
        nowhere = await relay.api.request(one.method, path, json=one.example)
        assert nowhere.status_code == 404 or "{id}" not in one.path, f"{one.method} {one.path}"
        for name in one.body.model_fields if one.body is not None else ():
            for value in ("a\0b", ["a\0b"], "a\ud800b", ["a\ud800b"]):
                body = json.dumps({**one.example, name: value})
                answer = await relay.api.request(one.method, at(one.path, made["id"]), content=body)
                assert answer.status_code in (404, 422), f"{one.method} {one.path} {name}: {answer.text}"
        for name in one.query.model_fields if one.query is not None else ():
            answer = await relay.api.request(one.method, at(one.path, "x"), params={name: "a\0"})
            assert answer.status_code == 422, f"{one.method} {one.path} {name}: {answer.text}"


async def chunks(body: bytes) -> AsyncIterator[bytes]:
    for at in range(0, len(body), 65_536):
        yield body[at : at + 65_536]


async def test_a_body_over_a_mebibyte_is_too_large(world: World) -> None:
    relay = await world.relay()
    body = b'{"url": "https://hooks.example.com/"}'.ljust(LARGEST_BODY + 1)
    hook = (await relay.api.post("/v1/generations", json={"account": "pictory"})).json()["webhook_url"]
    for path in ("/v1/endpoints", "/v1/generations", hook):
        for content in (body, chunks(body)):
            answer = await relay.api.post(path, content=content)
            assert answer.status_code == 413, path
            assert fields(answer) == []
    assert (await relay.api.get("/v1/endpoints")).json()["data"] == []
    for content in (body[:-1], chunks(body[:-1])):
        answer = await relay.api.post("/v1/endpoints", content=content)
        assert answer.status_code == 201, "a mebibyte is not over the limit"


PAGES = {"limit": ("0", "-1", "x", "1.5", "1" * 30), "colour": ("red",), "cursor": ("c" * 10_000,)}
TIMES = {"since": ("yesterday", "", "12"), "until": ("2026-13-01T00:00:00Z",)}
STATUS = {"status": ("done", "")}


async def test_a_list_refuses_what_it_does_not_know(world: World) -> None:
    relay = await world.relay()
    for path, table in {
        "/v1/endpoints": PAGES,
        "/v1/accounts": PAGES,
        "/v1/keys": PAGES,
        "/v1/audit": PAGES | TIMES,
        "/v1/events": PAGES | TIMES,
        "/v1/generations": PAGES | TIMES | STATUS,
        "/v1/deliveries": PAGES | TIMES | STATUS,
    }.items():
        for name, values in table.items():
            for value in values:
                answer = await relay.api.get(path, params={name: value})
                assert answer.status_code == 422, f"{path}?{name}={value[:40]}"
                assert fields(answer) == [name]


async def begin(world: World, relay: RunningRelay, path: str) -> Callable[[], Awaitable[str]]:
    """How to make one more of what is listed at a path; it answers its id."""
    endpoint = (await world.endpoint(relay))["id"] if path == "/v1/deliveries" else None

    async def make() -> str:
        world.clock.forward(seconds=0.002)  # ids are ordered by the millisecond
        match path:
            case "/v1/endpoints":
                return str((await world.endpoint(relay))["id"])
            case "/v1/generations":
                return str((await world.watch(relay, "luma", duration=600))["id"])
        return str((await relay.api.post(f"/v1/endpoints/{endpoint}/test")).json()["id"])

    return make


@pytest.mark.parametrize("path", ["/v1/endpoints", "/v1/generations", "/v1/deliveries"])
async def test_pages_go_on_from_newest_to_oldest_while_new_things_arrive(world: World, path: str) -> None:
    relay = await world.relay()
    make = await begin(world, relay, path)
    made = [await make() for _ in range(5)]
    seen, sizes, cursor = [], [], None
    while True:
        query = {"limit": "2", **({"cursor": cursor} if cursor else {})}
        page = (await relay.api.get(path, params=query)).json()
        seen += [one["id"] for one in page["data"]]
        sizes.append(len(page["data"]))
        cursor = page["next_cursor"]
        if cursor is None:
            break
        await make()
    assert seen == made[::-1]
    assert sizes == [2, 2, 1]
    everything = (await relay.api.get(path)).json()
    assert len(everything["data"]) == 7
    assert everything["next_cursor"] is None
    if path == "/v1/deliveries":  # each of its own event
        events = [one["event_id"] for one in everything["data"]]
        first = (await relay.api.get("/v1/events", params={"limit": 4})).json()
        rest = await relay.api.get("/v1/events", params={"limit": 4, "cursor": first["next_cursor"]})
        assert [one["id"] for one in first["data"] + rest.json()["data"]] == events
        assert rest.json()["next_cursor"] is None


def values(thing: Any) -> Iterator[tuple[str, Any]]:
    """Every name and value in a JSON value, but not in what others wrote."""
    for name, value in thing.items() if isinstance(thing, dict) else ():
        yield name, value
        if name not in ("raw", "metadata", "headers"):
            yield from values(value)
    for one in thing if isinstance(thing, list) else ():
        yield from values(one)


async def test_ids_tell_their_kind_and_times_are_rfc_3339_with_milliseconds(world: World) -> None:
    relay = await world.relay()
    await world.endpoint(relay)
    await relay.api.post("/v1/keys", json={"scopes": ["read"]})
    await relay.api.post("/v1/replays", json={"since": "2026-01-01T00:00:00Z"})
    await world.watch(relay, "luma", duration=0)
    await world.subscriber.got(1)
    delivered = await relay.eventually("/v1/deliveries?status=delivered", lambda page: page["data"])
    attempts = (await relay.api.get(f"/v1/deliveries/{delivered['data'][0]['id']}")).json()["attempts"]
    kinds = {**PREFIXES, "attempts": "att"}
    times = 0
    for kind, prefix in kinds.items():
        data = attempts if kind == "attempts" else (await relay.api.get(f"/v1/{kind}")).json()["data"]
        assert data, kind
        assert all(re.fullmatch(rf"{prefix}_[0-9A-Z]{{26}}", one["id"]) for one in data), kind
        for name, value in values(data):
            if (name.endswith("_at") or name in ("at", "timestamp")) and value is not None:
                assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", value), name
                times += 1
    assert times >= 10


CREATIONS = [
    ("/v1/endpoints", {"url": URL}, {"url": URL + "/other"}),
    ("/v1/generations", {"account": "pictory"}, {"account": "pictory", "metadata": {"n": 1}}),
    ("/v1/generations", {"account": "luma", "job_id": "j"}, {"account": "luma", "job_id": "k"}),
]


@pytest.mark.parametrize(("path", "body", "other"), CREATIONS)
async def test_an_idempotency_key_creates_once(
    world: World, path: str, body: dict[str, Any], other: dict[str, Any]
) -> None:
    # What is answered is the generation as it is: an ask between two answers makes them differ.
    relay = await world.relay(accounts=world.unhurried())
    key = {"idempotency-key": "order 42"}
    refused = await relay.api.post(path, json=body | {"colour": "red"}, headers=key)
    assert refused.status_code == 422, "and what was refused uses up no key"
    answers = await asyncio.gather(*(relay.api.post(path, json=body, headers=key) for _ in range(8)))
    answers.append(await relay.api.post(path, json=body, headers=key))
    assert {answer.status_code for answer in answers} == {201}
    assert all(answer.json() == answers[0].json() for answer in answers)
    for another_path, another_body in ((path, other), ("/v1/endpoints", {"url": "https://b.example"})):
        answer = await relay.api.post(another_path, json=another_body, headers=key)
        assert answer.status_code == 422
        assert fields(answer) == ["Idempotency-Key"]
    listed = [(await relay.api.get(path)).json()["data"] for path in ("/v1/endpoints", "/v1/generations")]
    assert [one["id"] for one in listed[0] + listed[1]] == [answers[0].json()["id"]]
    assert (await relay.api.post(path, json=body | other, headers={"idempotency-key": "43"})).is_success


async def test_an_impossible_idempotency_key_is_refused_and_a_possible_one_repeats_a_200_too(
    world: World,
) -> None:
    relay = await world.relay()
    for key in ("", "k" * 10_000):
        answer = await relay.api.post("/v1/endpoints", json={"url": URL}, headers={"idempotency-key": key})
        assert answer.status_code == 422
        assert fields(answer) == ["Idempotency-Key"]
    assert await nothing_exists(relay)
    watched = await world.watch(relay, "luma", duration=600)
    body = {"account": "luma", "job_id": watched["job_id"]}
    for _ in range(2):
        answer = await relay.api.post("/v1/generations", json=body, headers={"idempotency-key": "k"})
        assert (answer.status_code, answer.json()["id"]) == (200, watched["id"])


def with_second_pictory(world: World) -> dict[str, Any]:
    accounts = world.document()["accounts"]
    return accounts | {"pictory-2": accounts["pictory"]}


async def test_a_callback_without_a_valid_token_is_not_found_and_does_nothing(world: World) -> None:
    relay = await world.relay(accounts=with_second_pictory(world))
    job_id = world.simulator.submit("pictory", duration=600)
    made = await relay.api.post("/v1/generations", json={"account": "pictory"})
    before = made.json()
    good = before["webhook_url"].removeprefix(relay.origin)
    token = good.rsplit("/", 1)[1]
    assert good == f"/hooks/pictory/{token}"
    bad = [
        "/hooks/pictory",
        "/hooks/pictory/",
        "/hooks/pictory/x",
        f"/hooks/pictory/{before['id']}",
        f"/hooks/pictory/{token[:-1]}",
        f"/hooks/pictory/{token}x",
        f"/hooks/pictory/x{token}",
        "/hooks/pictory/" + token.replace(".", "", 1),
        "/hooks/pictory/%00%ff",
        "/hooks/pictory/" + "x" * 20_000,
        f"/hooks/pictory-2/{token}",
        f"/hooks/luma/{token}",
        f"/hooks/nobody/{token}",
    ]
    stranger = httpx.AsyncClient(base_url=relay.origin)
    async with stranger:
        for path in bad:
            answer = await stranger.post(path, json={"job_id": job_id})
            assert answer.status_code == 404, f"{path[:80]}: {answer.status_code}"
            assert fields(answer) == []
        assert (await relay.api.get(f"/v1/generations/{before['id']}")).json() == before
        assert (await stranger.post(good, json={"job_id": job_id})).status_code == 200
    # The good one, which came last, is the only one that made Relay ask.
    await relay.eventually(f"/v1/generations/{before['id']}", lambda one: one["job_id"] == job_id)
    assert len(world.simulator.requests) == 1


GARBAGE = [
    b"",
    b"null",
    b"[]",
    b"{",
    b"\xff\x00",
    b'{"job_id": 5}',
    b'{"job_id": {"job_id": "x"}}',
    b'{"job_id": ""}',
    b'{"job_id": "\\ud800"}',
    b'{"job_id": "\\u0000"}',
    b'{"job_id": "../../../v1/endpoints"}',
    b'{"job_id": "..", "success": true}',
    b'{"job_id": "' + b"j" * 500_000 + b'"}',
    b'{"job_id": ' + b"9" * 5000 + b"}",
    b'{"a":' * 100_000,
    b'{"success": false, "data": {"status": "failed", "error_code": "5000"}}',
    b'{"success": true, "data": {"status": "completed", "url": "https://evil.example/x.png"}}',
]


async def test_garbage_in_a_valid_callback_neither_crashes_nor_announces_nor_stops_the_next(
    world: World,
) -> None:
    relay = await world.relay()
    await world.endpoint(relay)
    made = (await relay.api.post("/v1/generations", json={"account": "pictory"})).json()
    for body in GARBAGE:
        answer = await relay.api.post(made["webhook_url"], content=body)
        assert answer.status_code == 200 or 400 <= answer.status_code <= 499, f"{body[:40]!r}: {answer.text}"
    world.simulator.submit("pictory", duration=0, request={"webhook": made["webhook_url"]})
    [received] = await world.subscriber.got(1)
    assert b"evil" not in received.body
    assert len((await relay.api.get("/v1/events")).json()["data"]) == 1


async def test_a_forged_callback_only_makes_relay_ask(world: World) -> None:
    relay = await world.relay()
    await world.endpoint(relay)
    generation = await world.watch(relay, "pictory", duration=600)
    path = f"/v1/generations/{generation['id']}"
    asked = (await relay.api.get(path)).json()["polls"]
    forged = {"status": "completed", "url": "https://evil.example/x.png"}
    body = {"job_id": generation["job_id"], "success": True, "data": forged}
    assert (await relay.api.post(generation["webhook_url"], json=body)).status_code == 200
    after = await relay.eventually(path, lambda one: one["polls"] > asked)
    assert (after["status"], after["outputs"]) == ("processing", [])
    assert (await relay.api.get("/v1/events")).json()["data"] == []


async def test_a_callback_cannot_claim_the_job_of_another_generation(world: World) -> None:
    relay = await world.relay()
    await world.endpoint(relay)
    watched = await world.watch(relay, "pictory", duration=600)
    nameless = (await relay.api.post("/v1/generations", json={"account": "pictory"})).json()
    claim = {"job_id": watched["job_id"]}
    assert (await relay.api.post(nameless["webhook_url"], json=claim)).status_code == 200
    path = f"/v1/generations/{nameless['id']}"
    assert (await relay.eventually(path, lambda one: one["polls"] > 0))["job_id"] is None
    world.clock.forward(seconds=600)
    completed = await relay.eventually(
        f"/v1/generations/{watched['id']}", lambda one: one["status"] == "completed"
    )
    assert completed["job_id"] == watched["job_id"]
    assert (await relay.api.get(path)).json()["status"] == "queued"
    [event] = (await relay.api.get("/v1/events")).json()["data"]
    assert event["generation_id"] == watched["id"]


async def test_health_needs_no_key_and_readiness_names_its_checks(world: World) -> None:
    relay = await world.relay()
    async with httpx.AsyncClient(base_url=relay.origin) as stranger:
        live, ready = await stranger.get("/healthz"), await stranger.get("/readyz")
    assert (live.status_code, live.json()["status"]) == (200, "ok")
    assert (ready.status_code, ready.json()["status"]) == (200, "ok")
    assert {"database", "migrations", "clock"} <= set(ready.json()["checks"])


async def test_accounts_tell_how_they_are_and_never_a_credential(world: World) -> None:
    accounts = world.document()["accounts"]
    accounts["luma"] = accounts["luma"] | {"api_key": "a-wrong-key-of-luma"}
    relay = await world.relay(accounts=accounts)
    await world.watch(relay, "luma", duration=600)
    listed = await relay.eventually(
        "/v1/accounts", lambda page: any(one["status"] != "ok" for one in page["data"])
    )
    by_name = {one["name"]: one for one in listed["data"]}
    assert by_name["luma"]["provider"] == "luma"
    assert by_name["luma"]["status"] == "unauthorized"
    assert by_name["luma"]["last_error"]
    assert by_name["vivix"]["status"] == "ok"
    assert by_name["vivix"]["last_error"] is None
    text = (await relay.api.get("/v1/accounts")).text
    assert not [name for name, one in accounts.items() if one["api_key"] in text]
    first = (await relay.api.get("/v1/accounts", params={"limit": 3})).json()
    rest = (await relay.api.get("/v1/accounts", params={"limit": 3, "cursor": first["next_cursor"]})).json()
    assert len(first["data"]) == 3
    assert {one["name"] for one in first["data"] + rest["data"]} == set(accounts)
    assert rest["next_cursor"] is None
