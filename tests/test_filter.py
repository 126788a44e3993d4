"""Filters on the payload: which bodies they let through, which are refused, how long they take."""

import asyncio
import json
import logging
import re
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.body import compact
from relay.event import news
from relay.filter import LONGEST, checked, passes
from relay.generation import LearnedBy, Status, Update
from relay.selection import Selection, Wanted
from relay.store import endpoints
from relay.store.events import Change
from tests.conftest import World
from tests.serving import Received
from tests.test_store import (
    NOTHING_HANDED_OVER,
    NOW,
    SECOND,
    TENANT,
    an_event,
    prepared,
    published,
    registered,
    watched,
)

GUIDE = Path(__file__).parent.parent / "docs" / "filters.md"
DATA: dict[str, Any] = {
    "kind": "image",
    "outputs": [
        {"url": "https://a.example/1.png", "width": 1024},
        {"url": "https://a.example/2", "width": None},
    ],
    "metadata": {"order": 42, "tags": ["eu", "vip"]},
    "error": None,
    "progress": 0,
    "none": [],
}
BODY = compact({"type": "generation.completed", "timestamp": "2026-03-16T14:30:12.000Z", "data": DATA})


def lets_through(expression: str, body: bytes = BODY) -> bool:
    return passes(checked(expression), body, endpoint="ep_1")


@pytest.mark.parametrize(
    ("expression", "wanted"),
    [
        ("data.kind == 'image'", True),
        ("data.kind == 'video'", False),
        ("data.metadata.order > `41`", True),
        ("data.metadata.order > '41'", False),
        ("data.error", False),
        ("data.none", False),
        ("data.no.such.thing", False),
        ("data.progress", True),  # 0 is something
        ("contains(data.metadata.tags, 'vip') && type == 'generation.completed'", True),
        ('contains(`["image", "audio"]`, data.kind)', True),
        ("data.outputs[?width > `1000`]", True),
        ("data.outputs[?width > `2000`]", False),
        ("starts_with(timestamp, '2026-03')", True),
        ("!(data.error)", True),
        ("length(data.outputs) == `2`", True),
        ("max_by(data.outputs[?width], &width).width == `1024`", True),
        ("data.outputs[0:1].url | [0]", True),
    ],
)
def test_what_an_expression_finds_is_wanted(expression: str, wanted: bool) -> None:
    assert lets_through(expression) is wanted


@pytest.mark.parametrize(
    ("expression", "said"),
    [
        ("", "1 to 1000 characters"),
        ("a" * (LONGEST + 1), "1 to 1000 characters"),
        ("data.kind = 'image'", "is no JMESPath expression"),
        ("data.[", "is no JMESPath expression"),
        ("data.kind == `image`", "must be JSON; text stands in single quotes"),
        ("[data.a, data.b]", "must not build values"),
        ("data.{a: b}", "must not build values"),
        ("data.outputs[?[url, width]]", "must not build values"),
        ("no_such(data)", "has no function no_such()"),
        ("to_string(data)", "must not use to_string()"),
        ("join('', data.tags)", "must not use join()"),
        ("length(map(&a, data))", "must not use map()"),
        ("contains(data)", "gives contains() 1 arguments; it takes 2"),
        ("length(a, b)", "gives length() 2 arguments; it takes 1"),
        ("(" * 450 + "a" + ")" * 450, "nested too deeply"),
        ("!" * 450 + "a", "nested too deeply"),
        ("||".join("a" * 300), "nested too deeply"),
    ],
)
def test_what_is_no_filter_is_refused_with_what_is_wrong(expression: str, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        checked(expression)


def test_what_makes_no_sense_of_a_body_is_not_wanted_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    expression = "length(data.progress) == `9`"
    with caplog.at_level(logging.WARNING, "relay.filter"):
        assert [lets_through(expression) for _ in range(3)] == [False] * 3
    [record] = caplog.records
    assert (record.message, record.endpoint) == ("filter.failed", "ep_1")
    assert "length" in record.error


EXPENSIVE = [
    # Every element, as often as the length allows.
    " || ".join(["data.raw[?a[?b]]"] * 25),
    "data.raw[?" + "`[1,1,1,1,1,1,1,1,1,1]`[?" * 20 + "@" + "]" * 21,
    "data.raw" + "[]" * 45,
    "data.raw" + "|sort(@)" * 90,
    "data.raw" + "|reverse(@)" * 80,
    " && ".join(["contains(data.raw, 'x') == `false`"] * 20),
    " && ".join(["data.raw == data.raw"] * 41),
    " && ".join(["data == data"] * 60),
    " && ".join(["data.raw[-1:] == data.raw[-1:]"] * 25),
    "data.raw[?@ == $.data.raw]".replace("$.", "") + " || data.raw[?contains(@, @)]",
    "contains(data.raw, data.raw[0]) || sort(data.raw) || max(data.raw)",
    "sort_by(data.raw, &to_number(@))",
    "data.raw[*]" + "|[*]" * 90,
]
BODIES = [
    compact({"data": {"raw": raw}})
    for raw in (["x"] * 60_000, list(range(50_000)), [[{}]] * 50_000, [[[[[[]]]]]] * 20_000, "x" * 250_000)
]


@pytest.mark.parametrize("number", range(len(EXPENSIVE)))
def test_no_filter_takes_long(number: int) -> None:
    expression = checked(EXPENSIVE[number])
    for body in BODIES:
        passes("data.raw", body, endpoint="ep_1")  # it is parsed once for all
        began = time.process_time()
        passes(expression, body, endpoint="ep_1")
        # Some milliseconds; what grows would take minutes, or all of the memory.
        assert time.process_time() - began < 2


def test_what_was_found_of_a_whole_batch_is_still_known() -> None:
    bodies = [compact({"data": {"raw": [[{}]] * 100, "n": number}}) for number in range(500)]

    def seconds() -> float:
        began = time.process_time()
        for body in bodies:
            for expression in EXPENSIVE[:2]:
                passes(expression, body, endpoint="ep_1")
        return time.process_time() - began

    assert seconds() > 3 * seconds()


def test_an_ordinary_one_has_room_enough() -> None:
    outputs = [{"url": f"https://a.example/{number}", "kind": "image"} for number in range(200)]
    data = {"outputs": outputs, "tags": [str(number) for number in range(2_000)], "text": "x" * 200_000}
    body = compact({"type": "a", "timestamp": "", "data": data})
    assert lets_through("data.outputs[?kind == 'image']", body)
    assert lets_through("contains(data.tags, '1999') && contains(data.text, 'xx')", body)
    assert lets_through("data.outputs[0] == data.outputs[0] && length(data.tags) > `10`", body)


@given(st.text("datkind.[]?=&|!'`(){}:@*, 01", max_size=60))
def test_whatever_is_written_is_refused_or_decides(text: str) -> None:
    try:
        expression = checked(text)
    except ValueError:
        return
    assert passes(expression, BODY, endpoint="ep_1") in (True, False)


# Over the API.


async def numbers(received: list[Received]) -> list[int]:
    return [json.loads(one.body)["data"]["number"] for one in received]


async def test_an_endpoint_gets_what_its_filter_finds(database_url: str, world: World) -> None:
    relay = await world.relay(database=database_url)
    made = await world.endpoint(relay, event_types=["order.shipped"], filter="data.number >= `3`")
    every = await world.endpoint(relay, path="/every", event_types=["order.shipped"])
    assert (made["filter"], every["filter"]) == ("data.number >= `3`", None)

    async def publish(*numbers: int) -> None:
        body = [{"type": "order.shipped", "data": {"number": number}} for number in numbers]
        assert (await relay.api.post("/v1/events", json=body)).status_code == 201

    await publish(1, 2, 3, 4)
    await world.subscriber.got(4, path="/every")
    assert sorted(await numbers(list(await world.subscriber.got(2, path="/")))) == [3, 4]
    path = f"/v1/endpoints/{made['id']}"
    changed = await relay.api.patch(path, json={"filter": "data.number == `1`"})
    assert changed.json()["filter"] == "data.number == `1`"
    await publish(1, 2, 3)
    assert sorted(await numbers(list(await world.subscriber.got(3, path="/")))) == [1, 3, 4]
    assert (await relay.api.patch(path, json={"filter": None})).json()["filter"] is None
    await publish(5)
    assert sorted(await numbers(list(await world.subscriber.got(4, path="/")))) == [1, 3, 4, 5]
    # A test comes through whatever is filtered, and none is kept that nobody gets.
    assert (await relay.api.patch(path, json={"filter": "data.no"})).status_code == 200
    assert (await relay.api.post(path + "/test")).status_code == 202
    await world.subscriber.got(5, path="/")


async def test_only_so_many_endpoints_of_a_tenant_have_a_filter(
    database_url: str, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoints, "MOST_FILTERS", 2)
    relay = await world.relay(database=database_url)
    first, second = [await world.endpoint(relay, path=f"/{n}", filter="data.a") for n in range(2)]
    plain = await world.endpoint(relay, path="/plain")
    body = {"url": world.subscriber.origin + "/more", "filter": "data.a"}
    for method, path in (("POST", "/v1/endpoints"), ("PATCH", f"/v1/endpoints/{plain['id']}")):
        answer = await relay.api.request(method, path, json=body)
        assert (answer.status_code, "2 endpoints have a filter" in answer.json()["detail"]) == (409, True)
    path = f"/v1/endpoints/{first['id']}"
    assert (await relay.api.patch(path, json={"filter": "data.b"})).status_code == 200
    assert (await relay.api.delete(f"/v1/endpoints/{second['id']}")).status_code == 204
    assert (await relay.api.post("/v1/endpoints", json=body)).status_code == 201


async def test_expensive_filters_leave_others_their_turn(world: World) -> None:
    relay = await world.relay()
    for number in range(endpoints.MOST_FILTERS):
        filter_ = " && ".join(["data.raw[?a[?b]] == `[]`"] * 30) + f" || data.n{number}"
        await world.endpoint(relay, path=f"/{number}", event_types=["order.shipped"], filter=filter_)
    items = [{"type": "order.shipped", "data": {"raw": [[{}]] * 800, "n": n}} for n in range(20)]
    publishing = asyncio.create_task(relay.api.post("/v1/events", json=items))
    turns = 0
    while not publishing.done():
        assert (await relay.api.post("/v1/endpoints", json={"url": "x"})).status_code == 422
        turns += 1
    assert publishing.result().status_code == 201
    # Each waits for an evaluation or a few, not for all of them.
    assert turns > 20


class Turns(logging.Handler):
    """Counts the turns that others have, and says how many it were before each record."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.found = 0, list[int]()

    async def __call__(self) -> None:
        while True:
            await asyncio.sleep(0)
            self.count += 1

    def emit(self, record: logging.LogRecord) -> None:
        self.found.append(self.count)


@pytest.mark.parametrize("place", ["a replay", "a report"])
async def test_others_have_their_turn_after_every_evaluation(tmp_path: Path, place: str) -> None:
    async with prepared(f"sqlite:///{tmp_path}/relay.db") as store:
        generation, selection = await watched(store), Selection(TENANT, Wanted.MISSING, until=NOW + SECOND)
        update = Update(Status.PROCESSING, "processing")
        begun = generation.after(update, now=NOW, learned_by=LearnedBy.POLL)
        assert begun is not None
        await published(store, an_event())
        for number in range(endpoints.MOST_FILTERS):
            # It says in the log when it is asked.
            failing = f"length(`{number}`) == '{place}'"
            await registered(store, event_types=["a.b", "generation.processing"], filter=failing)
        turns, log = Turns(), logging.getLogger("relay.filter")
        log.addHandler(turns)
        others = asyncio.create_task(turns())
        if place == "a replay":
            await store.replays.look(selection, selection.start, limit=9, until=selection.until)
        else:
            change = Change(begun, news(generation, begun, now=NOW, progress_interval=SECOND))
            await store.events.record([change], [], NOTHING_HANDED_OVER, now=NOW)
        others.cancel()
        log.removeHandler(turns)
    assert len(set(turns.found)) == len(turns.found) == endpoints.MOST_FILTERS


async def test_a_filter_that_is_none_is_refused_and_names_the_field(world: World) -> None:
    relay = await world.relay()
    made = await world.endpoint(relay, filter="data.kind")
    for method, path in (("POST", "/v1/endpoints"), ("PATCH", f"/v1/endpoints/{made['id']}")):
        for value, said in (("data.[", "JMESPath"), ("[a, b]", "build"), ("", "1 to"), (5, "string")):
            body = {"url": world.subscriber.origin + "/", "filter": value}
            answer = await relay.api.request(method, path, json=body)
            assert answer.status_code == 422, answer.text
            [error] = answer.json()["errors"]
            assert error["field"] == "filter"
            assert said in error["message"]


async def test_what_nobody_wants_while_a_generation_runs_is_not_stored(world: World) -> None:
    relay = await world.relay()
    await world.endpoint(
        relay,
        event_types=["generation.processing", "generation.completed"],
        filter="data.status == 'completed'",
    )
    generation = await world.watch(relay, "luma", duration=0.5)
    await world.subscriber.got(1)
    page = (await relay.api.get("/v1/events", params={"generation_id": generation["id"]})).json()
    assert [one["type"] for one in page["data"]] == ["generation.completed"]


def examples() -> list[tuple[str, bool]]:
    """Each filter of the guide's tables, and whether it is said to let its event through."""
    rows = re.findall(r"^\| `` ?(.+?) ?`` \| .* \| (yes|no) \|$", GUIDE.read_text(), re.M)
    return [(expression.replace("\\|", "|"), verdict == "yes") for expression, verdict in rows]


def test_the_guide_tells_the_truth() -> None:
    text = GUIDE.read_text()
    [event] = re.findall(r"```json\n(.*?)```", text, re.S)
    body = compact(json.loads(event))
    assert len(examples()) >= 8
    for expression, wanted in examples():
        assert lets_through(expression, body) is wanted, expression
    for expression in re.findall(r"^- refused: `` ?(.+?) ?``", text, re.M):
        with pytest.raises(ValueError, match=r"must not"):
            checked(expression)
