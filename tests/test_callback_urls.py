"""The URLs that providers call: who may call them, for how long, and how often."""

import asyncio
import hmac
import json
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.app import build
from relay.callback import Callbacks
from relay.config import read_config
from tests.conftest import ADMIN_KEY, World
from tests.serving import listener, origin_of, serving

BASE = "https://relay.example.com"
OLDEST, OLD, NEW, NEWEST = (f"secret-key-number-{number}" for number in range(4))
KEYS = st.lists(st.text(min_size=1), min_size=1, max_size=4, unique=True)


def token_of(url: str) -> str:
    return url.rsplit("/", 1)[1]


@given(KEYS, st.sampled_from(["luma", "pictory-eu"]), st.text(st.characters(codec="utf-8"), max_size=40))
def test_a_url_is_read_again_for_its_own_account(keys, account, generation_id):
    callbacks = Callbacks(BASE + "/", keys)
    url = callbacks.url(account, generation_id)
    assert url.startswith(f"{BASE}/hooks/{account}/")
    assert callbacks.generation(account, token_of(url)) == generation_id
    assert callbacks.generation("another", token_of(url)) is None


def test_after_a_rotation_the_old_urls_still_work_until_their_key_is_dropped():
    before = token_of(Callbacks(BASE, [OLD]).url("luma", "gen_1"))
    during, after = Callbacks(BASE, [NEW, OLD, OLDEST]), Callbacks(BASE, [NEWEST, NEW])
    assert during.generation("luma", before) == "gen_1"
    assert after.generation("luma", before) is None


def test_the_newest_key_makes_the_urls():
    made = token_of(Callbacks(BASE, [NEW, OLD]).url("luma", "gen_1"))
    assert Callbacks(BASE, [NEW]).generation("luma", made) == "gen_1"
    assert Callbacks(BASE, [OLD]).generation("luma", made) is None


@given(st.text() | st.binary().map(bytes.hex))
def test_a_token_of_nobody_is_nobodys(token):
    assert Callbacks(BASE, [NEW, OLD]).generation("luma", token) is None


def test_a_token_that_is_changed_anywhere_is_nobodys():
    callbacks = Callbacks(BASE, [NEW, OLD])
    token = token_of(callbacks.url("luma", "gen_1"))
    for place, character in enumerate(token):
        for other in "Aa0_.":
            changed = token[:place] + other + token[place + 1 :]
            # The last character of unpadded base64 has bits that mean nothing.
            if other != character and place < len(token) - 1:
                assert callbacks.generation("luma", changed) is None, changed


@asynccontextmanager
async def standing_still(world: World) -> AsyncIterator[tuple[httpx.AsyncClient, list[int]]]:
    """A client of a relay whose time is what the list says."""
    bound, now = listener(), [world.clock()]
    signed = {"provider": "vivix", "api_key": "some-key", "webhook_secret": "the-secret"}
    document = world.document(accounts={**world.document()["accounts"], "signed": signed})
    settings = read_config({"public_url": origin_of(bound), **document}, {})
    headers = {"authorization": f"Bearer {ADMIN_KEY}"}
    async with (
        serving(build(settings, now=lambda: now[0]), bound) as origin,
        httpx.AsyncClient(base_url=origin, headers=headers, timeout=60) as client,
    ):
        yield client, now


async def statuses(client: httpx.AsyncClient, url: str, count: int, **request: object) -> Counter[int]:
    few = asyncio.Semaphore(10)  # the client is slow with more

    async def call() -> int:
        async with few:
            return (await client.post(url, **request)).status_code  # type: ignore[arg-type]

    return Counter(await asyncio.gather(*(call() for _ in range(count))))


@pytest.mark.timeout(240)
async def test_a_job_is_called_back_a_hundred_times_a_second_at_most(world: World) -> None:
    async with standing_still(world) as (client, now):
        first, second = [
            (await client.post("/v1/generations", json={"account": "pictory"})).json()["webhook_url"]
            for _ in range(2)
        ]
        assert await statuses(client, first, 510, json={}) == {200: 500, 429: 10}
        refused = await client.post(first, json={})
        assert refused.headers["content-type"] == "application/problem+json"
        assert (refused.json()["type"], refused.headers["retry-after"]) == ("urn:relay:problem:limited", "1")
        assert await statuses(client, second, 20, json={}) == {200: 20}
        now[0] += 500
        assert await statuses(client, first, 60, json={}) == {200: 50, 429: 10}


async def test_strangers_do_not_use_up_what_a_job_is_called_back(world: World) -> None:
    async with standing_still(world) as (client, _):
        url = (await client.post("/v1/generations", json={"account": "pictory"})).json()["webhook_url"]
        assert await statuses(client, url[:-2], 510, json={}) == {404: 510}
        assert await statuses(client, url, 20, json={}) == {200: 20}


@pytest.mark.timeout(240)
async def test_an_account_is_called_back_a_hundred_times_a_second_at_most_by_who_can_sign(
    world: World,
) -> None:
    body = json.dumps({"generation_id": "job", "status": "completed"}).encode()
    right = {"x-vivix-signature": "sha256=" + hmac.digest(b"the-secret", body, "sha256").hex()}
    wrong = {"x-vivix-signature": "sha256=" + hmac.digest(b"a secret", body, "sha256").hex()}
    async with standing_still(world) as (client, now):
        hook = "/hooks/signed"
        assert await statuses(client, hook, 600, content=body, headers=wrong) == {401: 600}
        assert await statuses(client, hook, 510, content=body, headers=right) == {200: 500, 429: 10}
        now[0] += 100
        assert await statuses(client, hook, 20, content=body, headers=right) == {200: 10, 429: 10}
        assert await statuses(client, hook, 5, content=body, headers=wrong) == {401: 5}
