"""Vivix's signed callbacks about all jobs of an account: only ever a hint, and never a burden."""

import asyncio
import hmac
import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import httpx
import pytest

from relay.times import parse_rfc3339
from tests.conftest import RunningRelay, World

NEW, OLD = "the-new-secret-of-the-webhook", "the-old-secret-of-the-webhook"
EVIL = {"output_url": "https://evil.test/1.png", "output_urls": ["https://evil.test/1.png"]}


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(15):
        while True:
            if condition():
                return
            await asyncio.sleep(0.01)


async def relay_of(world: World, **vivix: Any) -> RunningRelay:
    """A relay whose Vivix account is polled so slowly that only callbacks have it asked."""
    accounts = dict(world.document()["accounts"])
    changes = {"poll_interval": "10m", "webhook_secret": NEW, **vivix}
    return await world.relay(accounts={**accounts, "vivix": {**accounts["vivix"], **changes}})


def asked(world: World, *job_ids: str) -> int:
    return sum(one.job_id in job_ids and one.method == "GET" for one in world.simulator.requests)


def body_of(job_id: str, status: str = "completed", **fields: Any) -> bytes:
    return json.dumps({"generation_id": job_id, "status": status, **EVIL, **fields}).encode()


def signature(body: bytes, secret: str = NEW) -> dict[str, str]:
    return {"x-vivix-signature": f"sha256={hmac.digest(secret.encode(), body, 'sha256').hex()}"}


async def call_back(
    relay: RunningRelay, body: bytes, headers: dict[str, Any] | None = None, *, account: str = "vivix"
) -> httpx.Response:
    signed = signature(body) if headers is None else headers
    async with httpx.AsyncClient(base_url=relay.origin) as client:
        return await client.post(f"/hooks/{account}", content=body, headers=signed)


async def flood(relay: RunningRelay, bodies: Iterable[bytes]) -> None:
    """Calls back with each body, many at once, and sees each answered with 200."""
    async with httpx.AsyncClient(base_url=relay.origin, timeout=30) as client:
        answers = await asyncio.gather(
            *(client.post("/hooks/vivix", content=body, headers=signature(body)) for body in bodies)
        )
    assert {one.status_code for one in answers} == {200}


async def shown(relay: RunningRelay, generation: dict[str, Any]) -> dict[str, Any]:
    return dict((await relay.api.get(f"/v1/generations/{generation['id']}")).json())


async def heard(relay: RunningRelay, world: World) -> str:
    """Returns when a callback about another job, sent after all others, has been confirmed by asking."""
    last = await world.watch(relay, "vivix", duration=0)
    assert (await call_back(relay, body_of(last["job_id"]))).status_code == 200
    await relay.eventually(f"/v1/generations/{last['id']}", lambda one: one["status"] == "completed")
    return str(last["job_id"])


@pytest.mark.parametrize("outcome", ["completed", "failed"])
async def test_a_signed_callback_is_confirmed_by_asking(world: World, outcome: str):
    relay = await relay_of(world)
    await world.endpoint(relay)
    webhook = {"webhook": f"{relay.origin}/hooks/vivix", "webhook_secret": NEW}
    generation = await world.watch(relay, "vivix", outcome=outcome, **webhook)
    [received] = await world.subscriber.got(1)
    event = json.loads(received.body)
    assert event["type"] == f"generation.{outcome}"
    assert (event["data"]["id"], event["data"]["learned_by"]) == (generation["id"], "callback")
    assert "credits_used" in event["data"]["raw"] and "credits_charged" not in event["data"]["raw"]
    assert asked(world, generation["job_id"]) == 1
    await until(lambda: world.simulator.jobs["vivix", generation["job_id"]].callbacks == [200])


@pytest.mark.parametrize("status", ["completed", "failed", "processing", "no such word"])
async def test_what_a_signed_callback_says_of_a_running_job_is_not_announced(world: World, status: str):
    relay = await relay_of(world)
    generation = await world.watch(relay, "vivix", duration=600)
    body = body_of(generation["job_id"], status, error_code="EVIL", error_message="evil")
    assert (await call_back(relay, body)).status_code == 200
    path = f"/v1/generations/{generation['id']}"
    now = await relay.eventually(path, lambda one: one["polls"] >= 1)
    assert now["status"] in ("queued", "processing")
    assert (now["outputs"], now["error"]) == ([], None)
    assert (await relay.api.get("/v1/events")).json()["data"] == []


async def test_a_callback_without_the_right_signature_is_401_and_does_nothing(world: World):
    relay = await relay_of(world)
    generation = await world.watch(relay, "vivix", duration=0)
    body = body_of(generation["job_id"])
    right = signature(body)["x-vivix-signature"]
    for what, headers in {
        "missing": {},
        "empty": {"x-vivix-signature": ""},
        "forged": {"x-vivix-signature": "sha256=" + "0" * 64},
        "of another secret": signature(body, OLD),
        "of another body": signature(body + b" "),
        "without its prefix": {"x-vivix-signature": right.removeprefix("sha256=")},
        "of another kind": {"x-vivix-signature": right.replace("sha256", "sha1")},
        "cut short": {"x-vivix-signature": right[:-1]},
        "one of two": {"x-vivix-signature": f"{right},{right}"},
        "not ASCII": {"x-vivix-signature": "sha256=é".encode()},
        "by the API key": signature(body, world.simulator.keys["vivix"]),
    }.items():
        answer = await call_back(relay, body, headers)
        assert answer.status_code == 401, what
        assert answer.headers["content-type"] == "application/problem+json", what
        assert NEW not in answer.text, what
    tampered = body.replace(b"completed", b"processed")
    assert (await call_back(relay, tampered, signature(body))).status_code == 401
    assert await shown(relay, generation) == generation
    await heard(relay, world)
    assert asked(world, generation["job_id"]) == 0


async def test_while_a_secret_is_changed_the_old_and_the_new_are_both_taken(world: World):
    relay = await relay_of(world, webhook_secret=[NEW, OLD])
    for secret in (NEW, OLD):
        generation = await world.watch(relay, "vivix", duration=0)
        body = body_of(generation["job_id"])
        assert (await call_back(relay, body, signature(body, secret))).status_code == 200
        path = f"/v1/generations/{generation['id']}"
        await relay.eventually(path, lambda one: one["status"] == "completed")
    assert (await call_back(relay, body, signature(body, "another"))).status_code == 401


async def test_a_replayed_callback_only_asks_again(world: World):
    relay = await relay_of(world)
    generation = await world.watch(relay, "vivix", duration=600)
    path, body = f"/v1/generations/{generation['id']}", body_of(generation["job_id"])
    assert (await call_back(relay, body)).status_code == 200
    await relay.eventually(path, lambda one: one["polls"] >= 1)
    world.clock.forward(seconds=300)
    assert (await call_back(relay, body)).status_code == 200
    now = await relay.eventually(path, lambda one: one["polls"] >= 2)
    assert now["status"] == "processing"
    world.clock.forward(seconds=301)
    assert (await call_back(relay, body)).status_code == 200
    await relay.eventually(path, lambda one: one["status"] == "completed")
    asks = asked(world, generation["job_id"])
    assert (await call_back(relay, body)).status_code == 200
    await heard(relay, world)
    assert asked(world, generation["job_id"]) == asks
    events = (await relay.api.get("/v1/events")).json()["data"]
    assert [one["generation_id"] for one in events].count(generation["id"]) == 1


async def test_a_callback_about_a_job_that_nobody_watches_is_answered_and_asks_nothing(world: World):
    relay = await relay_of(world)
    for job_id in (world.simulator.submit("vivix", duration=0), "made-up", "../account", "a?b"):
        assert (await call_back(relay, body_of(job_id))).status_code == 200
    last = await heard(relay, world)
    assert [one.job_id for one in world.simulator.requests] == [last]


@pytest.mark.parametrize(
    "body", [b"", b"not json", b"[]", b"null", b"\xff\xfe", b'{"generation_id": 5}', b"[" * 100_000]
)
async def test_signed_garbage_is_answered_and_asks_nothing(world: World, body: bytes):
    relay = await relay_of(world)
    assert (await call_back(relay, body)).status_code == 200
    assert (await call_back(relay, body, signature(body, OLD))).status_code == 401
    assert world.simulator.requests == []


async def test_a_callback_that_is_too_large_is_refused(world: World):
    relay = await relay_of(world)
    assert (await call_back(relay, body_of("job", padding="x" * 2_000_000))).status_code == 413


async def test_where_no_signed_callback_is_expected_it_is_an_unknown_path(world: World):
    accounts = world.document()["accounts"]
    relay = await world.relay(accounts={**accounts, "luma": {**accounts["luma"], "webhook_secret": NEW}})
    body = body_of(world.simulator.submit("vivix"))
    async with httpx.AsyncClient(base_url=relay.origin) as client:
        unknown = await client.post("/nothing/of/the/kind", content=body)
    for account in ("vivix", "luma", "pictory", "nobody"):
        answer = await call_back(relay, body, account=account)
        assert (answer.status_code, answer.json()) == (404, unknown.json()), account
    assert world.simulator.requests == []


async def test_a_flood_of_callbacks_for_one_generation_is_a_handful_of_requests(world: World):
    relay = await relay_of(world)
    generation = await world.watch(relay, "vivix", duration=600)
    path, began = f"/v1/generations/{generation['id']}", world.clock()
    for _ in range(10):
        await flood(relay, [body_of(generation["job_id"])] * 20)
        await relay.eventually(path, lambda one: due_at(one) > world.clock())
        world.clock.forward(seconds=6)
    elapsed = world.clock() - began
    # The first callback brings five asks at most; one after the eighth waits for a minute and brings one.
    assert 1 <= asked(world, generation["job_id"]) <= 5 + elapsed // 60_000
    # And yet the end is learned from a callback.
    world.clock.forward(seconds=550)
    await flood(relay, [body_of(generation["job_id"])])
    world.clock.forward(seconds=60)
    ended = await relay.eventually(path, lambda one: one["status"] == "completed")
    assert ended["learned_by"] == "callback"


def due_at(generation: dict[str, Any]) -> int:
    when = parse_rfc3339(generation["next_poll_at"])
    assert when is not None
    return when


async def generations_of(relay: RunningRelay, world: World, count: int) -> Sequence[dict[str, Any]]:
    job_ids = [world.simulator.submit("vivix", duration=0) for _ in range(count)]
    wishes = [{"account": "vivix", "job_id": job_id} for job_id in job_ids]
    return [dict((await relay.api.post("/v1/generations", json=wish)).json()) for wish in wishes]


async def test_a_flood_over_many_generations_takes_half_of_the_accounts_requests_at_once(world: World):
    relay = await relay_of(world)
    generations = await generations_of(relay, world, 45)
    job_ids = [one["job_id"] for one in generations]
    began = world.clock()
    await flood(relay, [body_of(job_id) for job_id in job_ids] * 3)
    await until(lambda: asked(world, *job_ids) >= 30)
    found = asked(world, *job_ids)
    # Without a limit of its own an account has 60 a minute: 30 at once, then one every 2 s.
    assert found <= 30 + (world.clock() - began) // 2_000 + 1
    world.clock.forward(seconds=30)
    for one in generations:
        path = f"/v1/generations/{one['id']}"
        await relay.eventually(path, lambda one: one["status"] == "completed")
    assert asked(world, *job_ids) == len(generations)


async def test_one_generations_flood_does_not_delay_the_callbacks_of_the_others(world: World):
    relay = await relay_of(world, requests_per_minute=20)
    noisy = await world.watch(relay, "vivix", duration=600)
    await flood(relay, [body_of(noisy["job_id"])] * 100)
    other = await world.watch(relay, "vivix", duration=0)
    assert (await call_back(relay, body_of(other["job_id"]))).status_code == 200
    now = await shown(relay, other)
    assert now["status"] == "completed" or due_at(now) <= world.clock() + 60_000
    world.clock.forward(seconds=60)
    await relay.eventually(f"/v1/generations/{other['id']}", lambda one: one["status"] == "completed")


async def test_the_secret_of_the_webhook_is_never_shown(world: World, caplog: pytest.LogCaptureFixture):
    relay = await relay_of(world)
    await call_back(relay, b"{}")
    await call_back(relay, b"{}", {})
    account = (await relay.api.get("/v1/accounts")).text
    assert NEW not in repr(relay.settings) + caplog.text + account
