"""What strangers send: any body is taken or refused, never a mistake of ours."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.providers import PROVIDERS, load
from relay.web.operations import OPERATIONS
from tests.conftest import World
from tests.nasty import JSON_TEXT, OBJECTS, TEXT, VALUES

URL = "https://hooks.example.com/relay"
REQUESTS = {
    "POST /v1/events": st.fixed_dictionaries(
        {"type": st.just("order.paid") | TEXT, "data": OBJECTS}, optional={"id": TEXT}
    ),
    "POST /v1/endpoints": st.fixed_dictionaries(
        {"url": st.just(URL) | TEXT},
        optional={
            "metadata": OBJECTS,
            "description": TEXT,
            "headers": st.dictionaries(TEXT, TEXT, max_size=3),
            "event_types": st.lists(TEXT, max_size=3),
            "rate_limit": st.integers(-1, 10**299) | st.floats(),
        },
    ),
    "POST /v1/generations": st.fixed_dictionaries(
        {"account": st.sampled_from(["luma", "pictory"]) | TEXT},
        optional={"metadata": OBJECTS, "job_id": TEXT, "callback_url": TEXT, "timeout_seconds": st.floats()},
    ),
}


def some(strategy: st.SearchStrategy[Any]) -> list[Any]:
    """Examples, as many as the profile says."""
    found: list[Any] = []

    @given(strategy)
    def collect(one: Any) -> None:
        found.append(one)

    collect()
    return found


@pytest.mark.timeout(600)
@pytest.mark.parametrize("asked", REQUESTS)
async def test_what_is_accepted_can_be_stored_and_read_and_the_rest_is_refused(
    world: World, database_url: str, asked: str
) -> None:
    relay = await world.relay(database=database_url)
    method, path = asked.split()
    for one in some(REQUESTS[asked]):
        text = json.dumps(one)
        answer = await relay.api.request(method, path, content=text)
        assert answer.status_code in (200, 201, 400, 422), f"{answer.status_code} for {text}"
        if answer.status_code in (200, 201):
            read = await relay.api.get(f"{path}/{answer.json()['id']}")
            assert read.status_code == 200, text
            assert (await relay.api.get(path, params={"limit": 1})).status_code == 200, text


@pytest.mark.timeout(600)
async def test_any_callback_is_answered(world: World) -> None:
    signed = {"provider": "vivix", "api_key": "some-key", "webhook_secret": "whsec_of_vivix"}
    relay = await world.relay(accounts={**world.document()["accounts"], "signed": signed})
    hook = (await relay.api.post("/v1/generations", json={"account": "pictory"})).json()["webhook_url"]
    for body in some(JSON_TEXT.map(str.encode) | st.binary()):
        assert (await relay.api.post(hook, content=body)).status_code in (200, 429), body
        assert (await relay.api.post("/hooks/signed", content=body)).status_code == 401, body


@pytest.mark.parametrize("name", PROVIDERS)
@given(VALUES, TEXT, st.binary(), st.lists(TEXT, max_size=3))
def test_no_provider_stumbles_over_a_callback(
    name: str, value: Any, header: str, body: bytes, secrets: list[str]
) -> None:
    provider = load(name)
    for document in (value, {"job_id": value, "generation_id": value, "data": value}, [value]):
        claimed = provider.claimed_job(document)
        assert claimed is None or isinstance(claimed, str)
    headers = {"x-vivix-signature": header.encode("utf-8", "replace").decode("latin-1")}
    assert (
        provider.signed(headers, body, [one.encode("utf-8", "replace").decode() for one in secrets]) is False
    )


@pytest.mark.parametrize("encoding", ["gzip", "br", "identity, gzip", "GZIP", "unknown"])
async def test_an_encoded_body_is_refused_before_it_is_read(world: World, encoding: str) -> None:
    signed = {"provider": "vivix", "api_key": "some-key", "webhook_secret": "whsec_of_vivix"}
    relay = await world.relay(accounts={**world.document()["accounts"], "signed": signed})
    hook = (await relay.api.post("/v1/generations", json={"account": "pictory"})).json()["webhook_url"]
    paths = [one.path.format(id="x") for one in OPERATIONS if one.method == "POST"]
    for path in (*paths, hook, "/hooks/signed"):
        answer = await relay.api.post(path, content=b"{}", headers={"content-encoding": encoding})
        assert answer.status_code == 415, path
        assert answer.headers["content-type"] == "application/problem+json"
        assert answer.json()["type"] == "urn:relay:problem:unsupported"


@pytest.mark.parametrize("encoding", ["identity", "Identity", ""])
async def test_a_body_that_is_said_to_be_as_it_is_is_taken(world: World, encoding: str) -> None:
    relay = await world.relay()
    answer = await relay.api.post("/v1/endpoints", json={"url": URL}, headers={"content-encoding": encoding})
    assert answer.status_code == 201


MANY: dict[str, Callable[[], Any]] = {
    "fields": lambda: {"url": URL, **{f"field-{number}": 1 for number in range(50_000)}},
    "headers": lambda: {"url": URL, "headers": {f"x-{number}": 1 for number in range(50_000)}},
    "a name": lambda: {"url": URL, "n" * 500_000: 1},
}


@pytest.mark.parametrize("made", MANY.values(), ids=MANY)
async def test_a_refusal_is_short_whatever_is_wrong(world: World, made: Callable[[], Any]) -> None:
    relay = await world.relay()
    answer = await relay.api.post("/v1/endpoints", json=made())
    assert answer.status_code == 422
    assert len(answer.content) < 4096
    assert answer.json()["errors"]
