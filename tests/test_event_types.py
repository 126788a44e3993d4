"""Declared types, and what publishing says: item by item, in order, all or none."""

import asyncio
import time
from typing import Any

import pytest

from relay import catalog, schema
from relay.store import types
from tests.conftest import World
from tests.fleet import Fleet
from tests.serving import Subscriber, serving
from tests.test_audit import audited

TYPES, EVENTS = "/v1/event-types", "/v1/events"
ORDER = {
    "type": "object",
    "required": ["order"],
    "properties": {
        "order": {"type": "integer"},
        "items": {"type": "array", "items": {"$ref": "#/$defs/item"}},
    },
    "$defs": {"item": {"type": "object", "properties": {"code": {"pattern": "^[A-Z]{3}-[0-9]+$"}}}},
}


def unevaluated(depth: int) -> dict[str, Any]:
    inner = unevaluated(depth - 1) if depth else {}
    return {"allOf": [inner], "unevaluatedProperties": {"type": "integer"}}


async def test_what_does_not_fit_its_type_is_refused_and_the_place_is_named(
    database_url: str, world: World
) -> None:
    relay = await world.relay(database=database_url)
    made = await relay.api.put(f"{TYPES}/order.shipped", json={"schema": ORDER, "description": "gone"})
    assert (made.status_code, made.json()["schema"], made.json()["description"]) == (201, ORDER, "gone")

    async def publish(*data: Any, type_: str = "order.shipped") -> Any:
        items = [{"type": type_, "data": one} for one in data]
        return await relay.api.post(EVENTS, json=items if len(items) > 1 else items[0])

    for data, field in (
        ({}, "data"),
        ({"order": "42"}, "data.order"),
        ({"order": 1, "items": [{"code": "ABC-1"}, {"code": "x"}]}, "data.items.1.code"),
    ):
        answer = await publish(data)
        assert answer.status_code == 422, answer.text
        [error] = answer.json()["errors"]
        assert error["field"] == field
        assert "it " in error["message"] or "required" in error["message"]
    # Of a list each that is wrong is named, and none is stored.
    answer = await publish({"order": 1}, {}, {"order": None}, {"order": 2})
    assert [error["field"] for error in answer.json()["errors"]] == ["1.data", "2.data.order"]
    assert (await relay.api.get(EVENTS)).json()["data"] == []
    assert (await publish({"order": 1, "items": [{"code": "ABC-1"}]})).status_code == 201
    assert (await publish({}, type_="order.lost")).status_code == 201
    # What no text can hold is looked at as it will be sent.
    for number, status in ((b"1", 201), (b'"1"', 422)):
        body = b'{"type": "order.shipped", "data": {"order": %s, "\\ud800": "\\ud800"}}' % number
        assert (await relay.api.post(EVENTS, content=body)).status_code == status
    # It is as it was declared last, at once.
    assert (await relay.api.put(f"{TYPES}/order.shipped", json={"schema": {}})).status_code == 200
    assert (await publish({})).status_code == 201
    assert (await relay.api.put(f"{TYPES}/order.shipped", json={"schema": ORDER})).status_code == 200
    assert (await publish({})).status_code == 422
    assert (await relay.api.delete(f"{TYPES}/order.shipped")).status_code == 204
    assert (await publish({})).status_code == 201


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"type": "thing"}, "type: "),
        ({"properties": {"a": {"minimum": "1"}}}, "properties.a.minimum: "),
        ({"pattern": "("}, "pattern: "),
        ({"pattern": "(?=a)b"}, "pattern: "),
        ({"$ref": "https://json-schema.org/draft/2020-12/schema"}, "is none of its own"),
        ({"$ref": "file:///etc/passwd"}, "is none of its own"),
        ({"properties": {"a": {"$ref": "#/properties/b"}, "b": {}}}, "is none of its own"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"items": {"$ref": "#/$defs/a"}}}}, "leads back to itself"),
        ({"$id": "http://127.0.0.1/", "$ref": "x"}, "$id: is not taken"),
        ({"$schema": "http://json-schema.org/draft-07/schema#"}, "$schema: must be"),
        ({"enum": ["x" * schema.LARGEST]}, "bytes of JSON at most"),
        ({"anyOf": [{}] * schema.MOST_PARTS}, "parts"),
        (
            {
                "$ref": "#/$defs/a0",
                "$defs": {
                    **{f"a{n}": {"allOf": [{"$ref": f"#/$defs/a{n + 1}"}] * 2} for n in range(60)},
                    "a60": {},
                },
            },
            "parts",
        ),
        ({"properties": {f"a{n}": {"pattern": "a"} for n in range(30)}}, "patterns"),
        ({"patternProperties": {f"a{n}": True for n in range(30)}}, "patterns"),
        ({"enum": list(range(schema.MOST_PARTS))}, "parts"),
        ({"anyOf": [False] * schema.MOST_PARTS}, "parts"),
        (unevaluated(9), "parts"),
        # What a JSON Pointer reads otherwise than it is written.
        ({"$ref": "#/$defs/l~10", "$defs": {"l~10": {}, "l/0": {"$ref": "#/$defs/l~10"}}}, "letters"),
        ({"$ref": "#/$defs/%61", "$defs": {"a": {}}}, "is none of its own"),
        ({"$ref": "#/$defs/l~10", "$defs": {"l": {}}}, "is none of its own"),
        ({"$defs": {"%61": {}}}, "letters"),
    ],
)
def test_a_schema_that_is_none_or_too_much_is_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError) as refused:
        schema.checked(given)
    assert said in str(refused.value)


def test_a_pattern_takes_no_longer_than_its_text() -> None:
    text = schema.checked({"properties": {"a": {"pattern": "^(a+)+$"}, "b": {"uniqueItems": True}}})
    began = time.process_time()
    assert schema.complaint(text, {"a": "a" * 200_000 + "!"}) is not None
    assert schema.complaint(text, {"b": [{"n": n} for n in range(15_000)]}) is None
    assert time.process_time() - began < 5


@pytest.mark.parametrize(
    ("given", "data"),
    [
        ({"items": {"enum": ["x", *range(400)]}}, [399] * 60_000),
        ({"items": {"anyOf": [{"const": number} for number in range(80)]}}, [79] * 60_000),
        ({"allOf": [{"uniqueItems": True}] * 150}, [{"n": number} for number in range(20_000)]),
        ({"items": {"allOf": [{"multipleOf": 0.1}] * 20}}, [10**299] * 800),
        (unevaluated(2), {str(number): number for number in range(15_000)}),
    ],
)
def test_no_schema_takes_long(given: dict[str, Any], data: Any) -> None:
    text = schema.checked({"properties": {"a": given}})
    began = time.process_time()
    found = schema.complaint(text, {"a": data})
    # A tenth of a second; without the bound, many seconds.
    assert time.process_time() - began < 1
    assert found is None or "too large" in found[1]


def test_an_ordinary_schema_takes_large_data() -> None:
    item = {"type": "object", "required": ["id"], "properties": {"id": {"type": "string"}}}
    text = schema.checked({"properties": {"items": {"type": "array", "items": item}}})
    assert schema.complaint(text, {"items": [{"id": str(number)} for number in range(10_000)]}) is None
    assert schema.complaint(text, {"items": [], "more": "x" * 250_000}) is None


async def test_nothing_is_ever_fetched_for_a_schema(world: World) -> None:
    relay = await world.relay()
    stranger = Subscriber()
    async with serving(stranger.app) as origin:
        for given in (
            {"$ref": f"{origin}/schema"},
            {"properties": {"a": {"$ref": f"{origin}/schema"}}},
            {"$schema": f"{origin}/schema"},
            {"$id": f"{origin}/", "$ref": "schema"},
            {"$dynamicRef": f"{origin}/schema"},
        ):
            answer = await relay.api.put(f"{TYPES}/order.shipped", json={"schema": given})
            assert answer.status_code == 422, answer.text
            assert [error["field"] for error in answer.json()["errors"]] == ["schema"]
        # A property may have such a name.
        fine = {"properties": {"$ref": {"type": "string"}, "$id": {"type": "string"}}}
        assert (await relay.api.put(f"{TYPES}/order.shipped", json={"schema": fine})).status_code == 201
        body = {"type": "order.shipped", "data": {"$ref": f"{origin}/schema"}}
        assert (await relay.api.post(EVENTS, json=body)).status_code == 201
    assert stranger.received == []


async def test_types_are_listed_by_name_noted_and_not_without_end(
    database_url: str, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(types, "MOST", 3)
    relay = await world.relay(database=database_url)
    longest = "b." + "b" * 126
    for name in ("c.c", "a.a", longest):
        answer = await relay.api.put(f"{TYPES}/{name}", json={})
        assert answer.status_code == 201
        world.clock.forward(seconds=0.002)
    assert (await relay.api.put(f"{TYPES}/d.d", json={})).status_code == 409
    changed = await relay.api.put(f"{TYPES}/c.c", json={"description": "the last", "schema": None})
    assert (changed.status_code, changed.json()["schema"]) == (200, None)
    assert changed.json()["created_at"] < changed.json()["updated_at"]
    page = (await relay.api.get(TYPES, params={"limit": 2})).json()
    assert ([one["type"] for one in page["data"]], page["next_cursor"]) == (["a.a", longest], longest)
    page = (await relay.api.get(TYPES, params={"cursor": longest})).json()
    assert (page["data"], page["next_cursor"]) == ([changed.json()], None)
    assert (await relay.api.get(f"{TYPES}/c.c")).json() == changed.json()
    for path in ("d.d", "%00"):
        assert (await relay.api.get(f"{TYPES}/{path}")).status_code == 404
        assert (await relay.api.delete(f"{TYPES}/{path}")).status_code == 404
    for name in ("generation.mine", "a..b", "a-b", "x" * 129):
        answer = await relay.api.put(f"{TYPES}/{name}", json={})
        assert (answer.status_code, answer.json()["errors"][0]["field"]) == (422, "type")
    world.clock.forward(seconds=0.002)
    assert (await relay.api.delete(f"{TYPES}/c.c")).status_code == 204
    log = [(one["action"], one["object"], one["details"]["fields"]) for one in await audited(relay.api)]
    declared = [("event_type.declared", name, []) for name in ("c.c", "a.a", longest)]
    again = ("event_type.declared", "c.c", ["description", "schema"])
    assert log == [*declared, again, ("event_type.deleted", "c.c", [])]
    reader = await world.member(relay, "read")
    assert (await reader.put(f"{TYPES}/e.e", json={})).status_code == 403


async def test_every_relay_knows_what_was_declared(
    fleet: Fleet, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Only the bell tells it.
    monkeypatch.setattr(catalog, "READ_EVERY", 3_600_000)
    one, other = await fleet.joined(2)
    body = {"type": "order.shipped", "data": {}}
    for api in (one.api, other.api):
        assert (await api.post(EVENTS, json=body)).status_code == 201
    for given, status in ((ORDER, 422), (None, 201)):
        assert (await one.api.put(f"{TYPES}/order.shipped", json={"schema": given})).is_success
        async with asyncio.timeout(15):
            answered = None
            while answered != status:
                answered = (await other.api.post(EVENTS, json=body)).status_code


async def test_each_item_of_a_list_says_whether_it_is_new(database_url: str, world: World) -> None:
    relay = await world.relay(database=database_url)

    async def publish(*names: str | None, key: str | None = None) -> list[dict[str, Any]]:
        items = [{"type": "order.shipped", "data": {"of": name}, "id": name} for name in names]
        headers = {"idempotency-key": key} if key else {}
        answer = await relay.api.post(EVENTS, json=items, headers=headers)
        assert answer.status_code == 201, answer.text
        return list(answer.json()["data"])

    first = await publish("a", None, "b")
    assert [one["created"] for one in first] == [True] * 3
    second = await publish("c", "b", None, "a", "c", key="k")
    assert [one["created"] for one in second] == [True, False, True, False, False]
    assert [one["id"] for one in second][1::2] == [first[2]["id"], first[0]["id"]]
    assert second[4]["id"] == second[0]["id"]
    again = await publish("c", "b", None, "a", "c", key="k")
    assert again == [one | {"created": False} for one in second]
    assert len((await relay.api.get(EVENTS)).json()["data"]) == 5
    alone = await relay.api.post(EVENTS, json={"type": "order.shipped", "data": {}, "id": "a"})
    assert (alone.json()["id"], alone.json()["created"]) == (first[0]["id"], False)


async def test_what_an_idempotency_key_published_is_told_again_whatever_its_schema_is_now(
    world: World,
) -> None:
    relay = await world.relay()
    asked = {"json": [{"type": "order.shipped", "data": {"n": 1}}], "headers": {"idempotency-key": "monday"}}
    first = await relay.api.post("/v1/events", **asked)
    assert first.status_code == 201
    strict = {"schema": {"required": ["weight"]}}
    assert (await relay.api.put(f"{TYPES}/order.shipped", json=strict)).status_code == 201
    again = await relay.api.post("/v1/events", **asked)
    assert again.status_code == 201, again.text
    [was], [told] = first.json()["data"], again.json()["data"]
    assert told == was | {"created": False}
    for change in ({"json": [{"type": "order.shipped", "data": {"n": 2}}]}, {"headers": {}}):
        assert (await relay.api.post("/v1/events", **asked | change)).status_code == 422
    assert len((await relay.api.get("/v1/events")).json()["data"]) == 1
