"""What Prometheus gets: who gets it, that it says what happened, and nothing that it must not."""

import asyncio
import re
from collections.abc import Callable, Mapping

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from relay.metrics import MOST_ACCOUNTS, OTHER, Metrics
from tests.conftest import ADMIN_KEY, RunningRelay, World

TOKEN = "token-of-the-tests"
Samples = Mapping[tuple[str, frozenset[tuple[str, str]]], float]


def parsed(text: str) -> Samples:
    return {
        (one.name, frozenset(one.labels.items())): one.value
        for family in text_string_to_metric_families(text)
        for one in family.samples
    }


async def read(relay: RunningRelay) -> Samples:
    answer = await relay.api.get("/metrics")
    assert answer.status_code == 200, answer.text
    return parsed(answer.text)


def value(samples: Samples, name: str, **labels: str) -> float:
    """The sum of those that have these labels."""
    return sum(
        number
        for (one, found), number in samples.items()
        if one == name and labels.items() <= dict(found).items()
    )


async def eventually(relay: RunningRelay, true: Callable[[Samples], bool]) -> Samples:
    async with asyncio.timeout(15):
        while not true(found := await read(relay)):
            await asyncio.sleep(0.05)
            relay.clock.forward(seconds=6)  # what was asked of the database is asked again
    return found


# Who gets it.


async def ask(relay: RunningRelay, authorization: str | None) -> httpx.Response:
    async with httpx.AsyncClient(base_url=relay.origin) as stranger:
        headers = {"authorization": authorization} if authorization is not None else {}
        return await stranger.get("/metrics", headers=headers)


@pytest.mark.parametrize("authorization", [None, "Bearer wrong", f"Basic {TOKEN}", "Bearer"])
async def test_a_stranger_gets_nothing(world: World, authorization: str | None):
    relay = await world.relay(metrics={"token": TOKEN})
    refused = await ask(relay, authorization)
    assert refused.status_code == 401
    assert "relay_" not in refused.text


async def test_without_a_token_there_is_none_to_guess(world: World):
    relay = await world.relay()
    assert [(await ask(relay, f"Bearer {word}")).status_code for word in ("x", "None", "null")] == [401] * 3


async def test_the_token_and_the_operators_keys_let_in_and_other_keys_do_not(world: World):
    relay = await world.relay(metrics={"token": TOKEN})
    operator = await world.key(relay, "admin")
    reader = await world.key(relay, "read", "write", "replay")
    neighbour = await world.key(relay, "admin", tenant="acme")
    found = [
        (await ask(relay, f"Bearer {text}")).status_code
        for text in (TOKEN, ADMIN_KEY, operator["key"], reader["key"], neighbour["key"])
    ]
    assert found == [200, 200, 200, 403, 403]


async def test_who_connects_from_an_allowed_network_needs_no_token(world: World):
    relay = await world.relay(metrics={"allow": ["127.0.0.0/8"]})
    answer = await ask(relay, None)
    assert answer.status_code == 200
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["content-type"].startswith("text/plain; version=")


async def test_another_network_is_not_allowed(world: World):
    relay = await world.relay(metrics={"allow": ["10.0.0.0/8", "fd00::/8"]})
    assert (await ask(relay, None)).status_code == 401


# What it says.


async def test_it_says_how_soon_an_end_was_known_and_announced(world: World):
    relay = await world.relay()
    await world.endpoint(relay)
    for provider in ("pixellabs", "luma"):
        # Long enough to be seen while it runs.
        await world.watch(relay, provider, duration=2)
    await world.subscriber.got(2)
    found = await eventually(
        relay, lambda all_: value(all_, "relay_store_batch_size_sum", batch="settle") == 2
    )
    for provider, basis in (("pixellabs", "told"), ("luma", "at_most")):
        ended = {"provider": provider, "account": provider, "status": "completed"}
        assert value(found, "relay_generations_ended_total", **ended) == 1
        assert value(found, "relay_known_lag_seconds_count", provider=provider, basis=basis) == 1
        asks = value(found, "relay_asks_per_generation_sum", provider=provider)
        assert asks == value(found, "relay_asks_total", provider=provider, outcome="ok") > 0
    for until in ("first_attempt", "delivered"):
        assert value(found, "relay_announce_lag_seconds_count", until=until) == 2
    assert 0 < value(found, "relay_announce_lag_seconds_sum", until="delivered") < 30
    assert value(found, "relay_attempts_total", outcome="accepted", status="2xx") == 2
    assert value(found, "relay_deliveries_ended_total", status="delivered") == 2
    for batch in ("watch", "record", "settle"):
        assert value(found, "relay_store_batch_size_sum", batch=batch) >= 2
        assert value(found, "relay_store_batch_duration_seconds_sum", batch=batch) > 0


async def test_an_attempt_that_failed_says_why_and_a_replay_is_no_news(world: World):
    relay = await world.relay(delivery={"timeout": "2s", "schedule": ["10ms"]})
    world.subscriber.answer(500, 404, 200)
    await world.endpoint(relay, event_types=["a.b"])
    await relay.api.post("/v1/events", json={"type": "a.b", "data": {}})
    failed = await relay.eventually("/v1/deliveries?status=failed", lambda page: page["data"])
    await relay.api.post(f"/v1/deliveries/{failed['data'][0]['id']}/replay")
    await world.subscriber.got(3)
    found = await eventually(
        relay, lambda all_: value(all_, "relay_deliveries_ended_total", status="delivered") == 1
    )
    assert value(found, "relay_attempts_total", outcome="http_status", status="5xx") == 1
    assert value(found, "relay_attempts_total", outcome="http_status", status="4xx") == 1
    assert value(found, "relay_deliveries_ended_total", status="failed") == 1
    assert value(found, "relay_announce_lag_seconds_count", until="first_attempt") == 1
    assert value(found, "relay_announce_lag_seconds_count", until="delivered") == 0


async def test_what_a_replay_made_pending_is_no_news_though_it_was_never_tried_before(world: World):
    relay = await world.relay(delivery={"timeout": "2s", "schedule": ["10ms"]})
    # What waits for its turn is canceled untried, and replayed by itself.
    slow = await world.endpoint(relay, "/slow", event_types=["a.b"], rate_limit=0.01)
    await relay.api.post("/v1/events", json=[{"type": "a.b", "data": {}}] * 2)
    await world.subscriber.got(1, path="/slow")
    path = f"/v1/endpoints/{slow['id']}"
    assert (await relay.api.post(path + "/disable")).status_code == 200
    page = await relay.eventually("/v1/deliveries?status=canceled", lambda page: page["data"])
    [untried] = page["data"]
    assert (await relay.api.post(path + "/enable")).status_code == 200
    assert (await relay.api.patch(path, json={"rate_limit": None})).status_code == 200
    world.subscriber.answer(500, 204, path="/slow")
    assert (await relay.api.post(f"/v1/deliveries/{untried['id']}/replay")).status_code == 202
    # What an endpoint has missed is replayed in bulk.
    late = await world.endpoint(relay, "/late", event_types=["a.b"])
    world.subscriber.answer(500, 204, path="/late")
    missing = {"since": "1970-01-01T00:00:00Z", "status": "missing", "endpoint_id": late["id"]}
    assert (await relay.api.post("/v1/replays", json=missing)).status_code == 202
    found = await eventually(
        relay, lambda all_: value(all_, "relay_deliveries_ended_total", status="delivered") == 4
    )
    assert value(found, "relay_attempts_total", outcome="http_status") == 2
    assert value(found, "relay_announce_lag_seconds_count", until="first_attempt") == 1
    assert value(found, "relay_announce_lag_seconds_count", until="delivered") == 1


async def test_it_says_what_waits_and_for_how_long(world: World):
    relay = await world.relay(delivery={"timeout": "2s", "schedule": ["1h"]})
    world.subscriber.answer(500)
    await world.endpoint(relay, event_types=["a.b"])
    found = await read(relay)
    assert value(found, "relay_deliveries_open") == value(found, "relay_delivery_oldest_due_age_seconds") == 0
    await relay.api.post("/v1/events", json=[{"type": "a.b", "data": {}}] * 9)
    found = await eventually(relay, lambda all_: value(all_, "relay_deliveries_open", when="later") == 9)
    assert value(found, "relay_delivery_oldest_due_age_seconds") == 0
    # Five failures in a row, and nothing is sent for a while, due as it may be.
    assert value(found, "relay_breakers", state="open") == 1
    assert value(found, "relay_breakers") == 1


async def test_it_says_how_accounts_are(world: World):
    accounts = world.document()["accounts"]
    accounts["vivix"]["api_key"] = "wrong"
    accounts["pixellabs"]["requests_per_day"] = 500
    relay = await world.relay(accounts=accounts)
    for name in ("vivix", "pixellabs"):
        job_id = world.simulator.submit(name, duration=0.1)
        await relay.api.post("/v1/generations", json={"account": name, "job_id": job_id})
    found = await eventually(
        relay, lambda all_: value(all_, "relay_generations_ended_total", account="pixellabs") == 1
    )
    found = await eventually(
        relay, lambda all_: value(all_, "relay_accounts", account="vivix", status="unauthorized") == 1
    )
    assert value(found, "relay_accounts", account="vivix", status="ok") == 0
    assert value(found, "relay_accounts", account="luma", status="ok") == 1
    assert value(found, "relay_asks_total", account="vivix", outcome="unauthorized") >= 1
    assert value(found, "relay_account_requests_available", account="vivix") == 0
    asked = value(found, "relay_asks_total", account="pixellabs")
    assert value(found, "relay_account_requests_left_today", account="pixellabs") == 500 - asked


async def test_it_says_how_the_process_and_the_database_are(world: World):
    relay = await world.relay()
    found = await eventually(relay, lambda all_: value(all_, "relay_event_loop_lag_seconds_count") > 0)
    assert value(found, "relay_database_up") == 1
    assert value(found, "relay_database_bytes", part="main") > 100_000
    assert ("relay_database_bytes", frozenset({("part", "wal")})) in found
    assert value(found, "process_resident_memory_bytes") > 0
    assert value(found, "relay_build_info") == 1
    assert value(found, "relay_shards_held") == 64


# What it must not say.


async def test_no_label_holds_an_id_a_url_or_a_tenant(world: World):
    relay = await world.relay()
    made = await world.member(relay, "admin", tenant="acme")
    url = world.simulator_origin + "/luma/v1"
    key = {"name": "own", "provider": "luma", "api_key": "key-of-acme", "base_url": url}
    await made.post("/v1/accounts", json=key)
    await made.post("/v1/endpoints", json={"url": world.subscriber.origin, "event_types": ["order.paid"]})
    await made.post("/v1/events", json={"type": "order.paid", "data": {}})
    await made.post("/v1/generations", json={"account": "own", "job_id": "job-1"})
    await world.subscriber.got(1)
    found = await eventually(relay, lambda all_: value(all_, "relay_asks_total", account="added:own") > 0)
    values = {text for _, labels in found for _, text in labels}
    assert not [one for one in values if re.search(r"_[0-9A-HJKMNP-TV-Z]{26}|://|acme|order|job-1", one)]


def test_so_many_accounts_have_labels_of_their_own_and_all_others_are_one_together():
    metrics = Metrics(["luma"])
    names = [f"acme.account-{number}" for number in range(2 * MOST_ACCOUNTS)]
    labels = {metrics.account(name) for name in names}
    assert len(labels) == MOST_ACCOUNTS  # 99 of their own, and the rest
    assert OTHER in labels
    assert metrics.account("luma") == "luma"
    assert metrics.account("acme.luma") == OTHER
    assert metrics.account("neighbour.account-1") == metrics.account("acme.account-1") == "added:account-1"
